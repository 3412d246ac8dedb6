"""Both towers of open_clip: token ids, embeddings and logits are those of its own classes."""

import json

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.export import two_towers as export
from vit_jax.inference import class_texts, two_tower

VISION = dict(image_size=16, layers=2, width=32, patch_size=8, head_width=16)
WORDS = ['a', 'photo', 'of', 'red', 'rose', 'cat', '!', ',']
TEXTS = ['a photo of a cat!', 'A  red rose, a rose', '', 'no such word', 'cat ' * 12]
LENGTH = 9
# Name -> model_cfg, special tokens of its tokenizer (the last one ends texts), the token that fills
# up texts. CLIP's is the only one whose end token has the largest id.
CASES = {
    'OpenAI': (dict(quick_gelu=True), ['<s>', '<e>'], '<e>'),
    'not causal': (
        dict(text=dict(no_causal_mask=True, norm_kwargs={'eps': 1e-3}, mlp_ratio=3.3)),
        ['<s>', '<e>'],
        '<e>',
    ),
    'SigLIP 2': (
        dict(
            custom_text=True,
            init_logit_bias=-10,
            vision=dict(no_ln_pre=True, pool_type='avg', final_ln_after_pool=True),
            text=dict(
                no_causal_mask=True,
                pool_type='last',
                proj_bias=True,
                act_kwargs={'approximate': 'tanh'},
                hf_tokenizer_name='timm/siglip2',
                tokenizer_kwargs={'clean': 'canonicalize'},
            ),
        ),
        ['<pad>', '<e>'],
        '<pad>',
    ),
    'CLIPA': (
        dict(
            text=dict(
                no_causal_mask=True,
                pool_type='last',
                hf_tokenizer_name='bert-base-uncased',
                tokenizer_kwargs={'strip_sep_token': True},
            )
        ),
        ['[PAD]', '[CLS]', '[SEP]'],
        '[PAD]',
    ),
    'worldwide': (
        dict(
            custom_text=True,
            quick_gelu=True,
            text=dict(pool_type='eos', eos_id=2, hf_tokenizer_name='facebook/xlm-v-base'),
        ),
        ['<s>', '<pad>', '</s>'],
        '<pad>',
    ),
}


@pytest.fixture(scope='module')
def libraries():
    torch = pytest.importorskip('torch')
    return torch, pytest.importorskip('open_clip', reason='open_clip is not installed')


def save_tokenizer(folder, special, pad, of_clip):
    """Words divided at spaces; beginning and end marked as the special tokens say."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ['zero', 'unknown', *WORDS, *special] if of_clip else [*special, 'unknown', *WORDS]
    ids = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token='unknown'))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start = [name for name in special if name in ('<s>', '[CLS]')]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, '$A', special[-1]], special_tokens=[(name, ids[name]) for name in special]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token='unknown', sep_token=special[-1]
    ).save_pretrained(folder)
    return len(ids)


def write(folder, libraries, config, special, pad):
    """A model of open_clip with random weights, its folder written, and its token ids of TEXTS."""
    torch, open_clip = libraries
    config = dict(config)
    text = dict(context_length=LENGTH, width=24, heads=3, layers=2) | config.pop('text', {})
    of_clip = 'hf_tokenizer_name' not in text
    text['vocab_size'] = save_tokenizer(folder, special, pad, of_clip) + 2 * (not of_clip)
    config |= {'embed_dim': 20, 'text_cfg': text, 'vision_cfg': VISION | config.pop('vision', {})}
    kind = open_clip.CustomTextCLIP if config.get('custom_text') else open_clip.CLIP
    model = kind(**{name: config[name] for name in config if name != 'custom_text'}).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.1)
        model.logit_scale.fill_(2.3)
    torch.save(model.state_dict(), folder / 'open_clip_pytorch_model.bin')
    described = {'model_cfg': config, 'preprocess_cfg': {'mean': [0.5] * 3, 'std': [0.5] * 3}}
    (folder / 'open_clip_config.json').write_text(json.dumps(described))
    if of_clip:  # its own tokenizer fills up with zeros
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), LENGTH, clean='lower')
        tokenizer.tokenizer.pad_token = 'zero'
    else:
        kwargs = text.get('tokenizer_kwargs', {})
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), LENGTH, **kwargs)
    return model, tokenizer(TEXTS)


@pytest.mark.parametrize('case', CASES)
def test_both_towers_are_those_of_open_clip(case, libraries, tmp_path):
    torch, _ = libraries
    model, tokens = write(tmp_path, libraries, *CASES[case])
    towers = two_tower.load(tmp_path)
    np.testing.assert_array_equal(towers.tokenizer(TEXTS), tokens)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.float32)
    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 127.5 - 1)
    with torch.no_grad():
        images = model.encode_image(inputs, normalize=True).numpy()
        texts = model.encode_text(tokens, normalize=True).numpy()
        logits, _ = model.get_logits(inputs, tokens)
    zimg, ztxt = towers.embed_images(pixels), towers.embed_texts(TEXTS)
    np.testing.assert_allclose(zimg, images, atol=1e-5)
    np.testing.assert_allclose(ztxt, texts, atol=1e-5)
    found = towers.temperature * np.asarray(zimg) @ ztxt.T + (towers.bias or 0)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-5 * towers.temperature)
    two_tower.save(tmp_path / 'ours', towers)
    again = two_tower.load(tmp_path / 'ours')
    np.testing.assert_array_equal(again.embed_texts(TEXTS), ztxt)


def test_a_clip_of_open_clip_for_transformers(libraries, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch, _ = libraries
    model, tokens = write(tmp_path, libraries, *CASES['OpenAI'])
    assert export.write(tmp_path / 'theirs', two_tower.load(tmp_path)) == []
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / 'theirs').eval()
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)))
    with torch.no_grad():
        out = theirs(tokens, pixels.float())
        logits, _ = model.get_logits(pixels.float(), tokens)
    np.testing.assert_allclose(out.logits_per_image, logits, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'theirs')
    ids = tokenizer(TEXTS, padding='max_length', truncation=True, max_length=LENGTH)['input_ids']
    np.testing.assert_array_equal(ids, tokens)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ({'hf_model_name': 'roberta-base'}, "hf_model_name='roberta-base', which no text tower"),
        ({'embed_cls': True}, 'embed_cls=True, which no text tower'),
        ({'pool_type': 'first'}, "pool_type='first' in text_cfg; known: argmax, eos, last"),
        ({'rope': True}, 'rope=True, which is not known here'),
        ({'tokenizer_kwargs': {'language': 'x'}}, "language='x' in tokenizer_kwargs"),
        ({'heads': 'x'}, 'is damaged'),
        ({'heads': 5}, 'does not fit OpenCLIP text'),
        ({'pool_type': 'eos', 'eos_id': 1}, 'reads the token 1, and the tokenizer.json beside'),
    ],
)
def test_what_no_text_tower_here_computes(text, message, libraries, tmp_path):
    write(tmp_path, libraries, *CASES['OpenAI'])
    described = json.loads((tmp_path / 'open_clip_config.json').read_text())
    described['model_cfg']['text_cfg'] |= text
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(described))
    with pytest.raises(UserError, match=message):
        two_tower.load(tmp_path)


def test_folders_that_lack_something(libraries, tmp_path):
    torch, _ = libraries
    write(tmp_path, libraries, *CASES['OpenAI'])
    described = json.loads((tmp_path / 'open_clip_config.json').read_text())
    coca = {**described['model_cfg'], 'multimodal_cfg': {}}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps({'model_cfg': coca}))
    with pytest.raises(UserError, match='is of a CoCa'):
        two_tower.load(tmp_path)
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(described))
    (tmp_path / 'tokenizer.json').rename(tmp_path / 'aside')
    with pytest.raises(UserError, match=r'has no tokenizer\.json'):
        two_tower.load(tmp_path)
    (tmp_path / 'aside').rename(tmp_path / 'tokenizer.json')
    file = tmp_path / 'open_clip_pytorch_model.bin'
    tensors = torch.load(file)
    short = {**tensors, 'positional_embedding': tensors['positional_embedding'][:1]}
    torch.save(short, file)
    with pytest.raises(UserError, match='which leaves no room in 1 tokens'):
        two_tower.load(tmp_path)
    torch.save({n: t for n, t in tensors.items() if n != 'logit_scale'}, file)
    with pytest.raises(UserError, match='lacks logit_scale or the text tower'):
        two_tower.load(tmp_path)


def test_the_80_prompts_are_those_of_clip(libraries):
    theirs = [template('{}') for template in libraries[1].OPENAI_IMAGENET_TEMPLATES]
    assert list(class_texts.CLIP80) == theirs
