"""CLIP and SigLIP of transformers, SigLIP of big_vision: embeddings and logits are theirs."""

import base64
import json
import lzma
import pathlib

import jax
import numpy as np
import pytest

from vit_jax.checkpoint import npz, two_towers
from vit_jax.data import text
from vit_jax.errors import UserError
from vit_jax.export import two_towers as export
from vit_jax.inference import two_tower

SENTENCEPIECE = pathlib.Path(__file__).parents[1] / 'fixtures/tokenizers/sentencepiece.json.xz'
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
VISION = SIZES | dict(image_size=28, patch_size=14)
TEXTS = ['A photo of a cat!', 'the red  tulip', 'a', '', 'cat cat cat cat cat cat cat cat cat cat']


@pytest.fixture(scope='module')
def transformers():
    pytest.importorskip('torch')
    library = pytest.importorskip('transformers')
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def save_byte_pairs(folder, transformers):
    """A small tokenizer of CLIP's class, in transformers' own files."""
    characters = [chr(c) for c in range(33, 127)]
    symbols = characters + [f'{c}</w>' for c in characters]
    merges = [('c', 'a'), ('ca', 't</w>'), ('t', 'h'), ('th', 'e</w>'), ('r', 'e')]
    symbols += [''.join(pair) for pair in merges] + ['<|startoftext|>', '<|endoftext|>']
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=12)
    tokenizer.save_pretrained(folder)
    return tokenizer, vocabulary


def save_sentencepiece(folder, transformers):
    (folder / 'spiece.model').write_bytes(
        base64.b64decode(json.loads(lzma.decompress(SENTENCEPIECE.read_bytes()))['model'])
    )
    (folder / 'tokenizer_config.json').write_text('{"tokenizer_class": "SiglipTokenizer"}')
    return transformers.SiglipTokenizer(str(folder / 'spiece.model'), model_max_length=12)


@pytest.fixture(scope='module')
def clip(transformers, tmp_path_factory):
    """(transformers' model and tokenizer, the folder)."""
    folder = tmp_path_factory.mktemp('clip')
    tokenizer, vocabulary = save_byte_pairs(folder, transformers)
    text = SIZES | dict(vocab_size=len(vocabulary), max_position_embeddings=12)
    text |= dict(bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1)
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=20)
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    save_processor(folder)
    return model, tokenizer, folder


@pytest.fixture(scope='module')
def siglip(transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp('siglip')
    tokenizer = save_sentencepiece(folder, transformers)
    text = SIZES | dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=12)
    text |= dict(bos_token_id=0, eos_token_id=1)
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    model = randomise(transformers.SiglipModel(config))
    model.save_pretrained(folder)
    save_processor(folder)
    return model, tokenizer, folder


def save_processor(folder):
    sides = {'height': 28, 'width': 28}
    settings = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=sides, crop_size=28)
    (folder / 'preprocessor_config.json').write_text(json.dumps(settings))


def randomise(model):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(values * 0.2 + float('norm' in name and 'weight' in name))
    return model.eval()


def of_library(case, pixels):
    """(token ids, image embeddings, text embeddings, logits) of transformers; pixels in [-1, 1]."""
    import torch

    model, tokenizer, _ = case
    ids = tokenizer(TEXTS, padding='max_length', truncation=True, max_length=12)['input_ids']
    with torch.no_grad():
        out = model(torch.tensor(ids), torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    return [np.asarray(x) for x in (ids, out.image_embeds, out.text_embeds, out.logits_per_image)]


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_the_model_is_that_of_transformers(name, request, tmp_path):
    case = request.getfixturevalue(name)
    folder = case[-1]
    towers = two_tower.load(folder)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 28, 28, 3)).astype(np.float32)
    ids, images, texts, logits = of_library(case, pixels / 127.5 - 1)
    np.testing.assert_array_equal(towers.tokenizer(TEXTS), ids)
    np.testing.assert_allclose(towers.embed_images(pixels), images, atol=1e-5)
    np.testing.assert_allclose(towers.embed_texts(TEXTS), texts, atol=1e-5)
    found = towers.temperature * images @ texts.T + (towers.bias or 0)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert (towers.bias is None) == (name == 'clip')

    two_tower.save(tmp_path / 'ours', towers)
    again = two_tower.load(tmp_path / 'ours')
    assert again.model == towers.model and again.preprocess == towers.preprocess
    np.testing.assert_array_equal(again.embed_images(pixels), towers.embed_images(pixels))
    np.testing.assert_array_equal(again.embed_texts(TEXTS), towers.embed_texts(TEXTS))


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_written_for_transformers(name, request, tmp_path, transformers):
    """From our folder: its class gives the same, and what was read is written back, bit for bit."""
    from safetensors import numpy as safetensors

    case = request.getfixturevalue(name)
    towers = two_tower.load(case[-1])
    two_tower.save(tmp_path / 'ours', towers)
    assert export.write(tmp_path / 'theirs', two_tower.load(tmp_path / 'ours')) == []
    before, after = (
        safetensors.load_file(folder / 'model.safetensors')
        for folder in (case[-1], tmp_path / 'theirs')
    )
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)
    model = type(case[0]).from_pretrained(tmp_path / 'theirs').eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'theirs')
    for found, expected in zip(
        of_library((model, tokenizer, None), pixels), of_library(case, pixels), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match='exists'):
        export.write(tmp_path / 'theirs', towers)


def test_what_transformers_has_no_class_for(clip, tmp_path):
    towers = two_tower.load(clip[-1])
    towers.model = towers.model.clone(text=dict(towers.model.text) | {'causal': False})
    with pytest.raises(UserError, match='CLIP has a causal text tower'):
        export.write(tmp_path / 'theirs', towers)


def test_probabilities_of_siglip_are_sigmoids(siglip):
    towers = two_tower.load(siglip[-1])
    pixels = np.full((1, 28, 28, 3), 100, np.float32)
    _, _, _, logits = of_library(siglip, pixels / 127.5 - 1)
    classifier = two_tower.ZeroShotClassifier(towers, ('A photo of a cat!', 'a'), ('{}',))
    found = classifier.task.values(classifier.logits(pixels))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits[:, [0, 2]])), atol=1e-5)
    one = two_tower.ZeroShotClassifier(towers, ('cat', 'a'), exclusive=True)
    np.testing.assert_allclose(one.task.values(one.logits(pixels)).sum(), 1, atol=1e-6)


def test_old_configurations_of_clip_have_a_wrong_end_token(clip, tmp_path):
    """transformers reads the token of the largest id then, which is the end token."""
    for file in clip[-1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / 'config.json').read_text())
    config['text_config']['eos_token_id'] = 2
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert two_towers.open_folder(tmp_path).model == two_towers.open_folder(clip[-1]).model


def test_siglip_of_big_vision(siglip, tmp_path):
    """The same weights under its names; layers of the text tower stacked by scan."""
    towers = two_tower.load(siglip[-1])
    flat = npz.flatten(towers.params)
    renamed = {
        f'params/{name}'.replace('img/Transformer/posembed_input/', 'img/'): np.asarray(array)
        for name, array in flat.items()
    }
    blocks = {n: a for n, a in renamed.items() if '/txt/Encoder_0/encoderblock_0/' in n}
    for name, first in blocks.items():
        second = renamed.pop(name.replace('block_0', 'block_1'))
        del renamed[name]
        renamed[name.replace('block_0', 'block')] = np.stack([first, second])
    np.savez(tmp_path / 'siglip.npz', **renamed)
    loaded = two_tower.load(tmp_path / 'siglip.npz', siglip[-1] / 'spiece.model')
    jax.tree.map(np.testing.assert_array_equal, loaded.params, towers.params)
    np.testing.assert_array_equal(loaded.embed_texts(TEXTS), towers.embed_texts(TEXTS))
    with pytest.raises(UserError, match='needs the file of its tokenizer'):
        two_tower.load(tmp_path / 'siglip.npz')
    del renamed['params/b']
    np.savez(tmp_path / 'siglip.npz', **renamed)
    with pytest.raises(UserError, match='is no SigLIP'):
        two_tower.load(tmp_path / 'siglip.npz', siglip[-1] / 'spiece.model')


def save_gemma(folder, transformers):
    """A small tokenizer of Gemma's kind, which by itself marks the beginning and not the end."""
    import tokenizers

    characters = [chr(c) for c in range(33, 127)] + ['\u2581']
    names = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>', *characters, 'ca', 'cat']
    ids = {name: index for index, name in enumerate(names)}
    tokenizer = transformers.GemmaTokenizer(vocab=ids, merges=[('c', 'a'), ('ca', 't')])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=['<bos>', '$A'], special_tokens=[('<bos>', 2)]
    )
    backend.save(str(folder / 'gemma.json'))
    tokenizer = transformers.Siglip2Tokenizer(vocab=ids, merges=[('c', 'a'), ('ca', 't')])
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=['$A', '<eos>'], special_tokens=[('<eos>', 1)]
    )
    tokenizer.padding_side = 'right'
    return tokenizer


def test_siglip_2_of_big_vision_has_a_sticky_end(siglip, transformers, tmp_path):
    """Ids of transformers' Siglip2Tokenizer, 64 of them, the last of a long text being the end."""
    theirs = save_gemma(tmp_path, transformers)
    params = npz.flatten(two_tower.load(siglip[-1]).params)
    rng = np.random.default_rng(0)
    params['txt/pos_embedding'] = rng.normal(size=(1, 64, 32)).astype(np.float32)
    np.savez(tmp_path / 'siglip2.npz', **{f'params/{n}': np.asarray(a) for n, a in params.items()})
    towers = two_tower.load(tmp_path / 'siglip2.npz', tmp_path / 'gemma.json')
    texts = [*TEXTS, 'Cat ' * 40]
    expected = theirs(texts, padding='max_length', truncation=True, max_length=64)['input_ids']
    found = towers.tokenizer(texts)
    np.testing.assert_array_equal(found, expected)
    assert found.shape == (6, 64) and found[-1, -1] == 1 and found[3].tolist() == [1] + 63 * [0]
    two_tower.save(tmp_path / 'ours', towers)
    alone = text.JsonTokenizer(tmp_path / 'ours/tokenizer.json', 64, '<pad>')
    np.testing.assert_array_equal(alone(texts), expected)
    assert export.write(tmp_path / 'theirs', two_tower.load(tmp_path / 'ours')) == []
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / 'theirs')
    ids = written(texts, padding='max_length', truncation=True, max_length=64)['input_ids']
    np.testing.assert_array_equal(ids, expected)


def test_an_end_that_only_the_configuration_of_the_tokenizer_states(siglip, transformers, tmp_path):
    """add_eos_token counts, as in transformers before version 5 and in the training of SigLIP 2."""
    theirs = save_gemma(tmp_path, transformers)
    for name in ('config.json', 'model.safetensors', 'preprocessor_config.json'):
        (tmp_path / name).write_bytes((siglip[-1] / name).read_bytes())
    (tmp_path / 'gemma.json').rename(tmp_path / 'tokenizer.json')
    told = dict(tokenizer_class='GemmaTokenizer', pad_token='<pad>', eos_token='<eos>')
    told |= dict(padding_side='right', add_bos_token=False, add_eos_token=True)
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(told))
    expected = theirs(TEXTS, padding='max_length', truncation=True, max_length=12)['input_ids']
    np.testing.assert_array_equal(two_tower.load(tmp_path).tokenizer(TEXTS), expected)
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(told | {'add_bos_token': True}))
    with pytest.raises(UserError, match='add_bos_token=true, which no text tower here is for'):
        two_tower.load(tmp_path)


def test_siglip_2_of_the_naflex_kind_is_refused_by_name(transformers, tmp_path):
    config = transformers.Siglip2Config()
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict(), default=str))
    with pytest.raises(UserError, match='is a SigLIP 2 of the NaFlex kind'):
        two_tower.load(tmp_path)


@pytest.mark.parametrize(
    ('file', 'change', 'message'),
    [
        ('config.json', {'model_type': 'clip_vision_model'}, 'no model of images and texts'),
        ('config.json', {'text_config': {'hidden_act': 'mish'}}, "hidden_act 'mish'"),
        ('config.json', {'text_config': {'num_attention_heads': 5}}, 'does not fit'),
        ('config.json', {'text_config': {'eos_token_id': [1, 2]}}, 'eos_token_id'),
        ('tokenizer.json', {'model': {}}, 'is not a tokenizer.json'),
        ('tokenizer_config.json', {'pad_token': 'nothing'}, "no token 'nothing'"),
        ('tokenizer.json', None, 'has no tokenizer.json'),
    ],
)
def test_what_is_wrong_is_named(clip, tmp_path, file, change, message):
    for source in clip[-1].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    if change is None:
        (tmp_path / file).unlink()
    else:
        content = json.loads((tmp_path / file).read_text())
        text = content.get('text_config', {}) | change.get('text_config', {})
        (tmp_path / file).write_text(json.dumps({**content, **change, 'text_config': text}))
    with pytest.raises(UserError, match=message):
        two_tower.load(tmp_path)


def test_an_image_tower_alone_is_no_two_towers(transformers, tmp_path):
    config = transformers.CLIPVisionConfig(**VISION)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='no model of images and texts'):
        two_tower.load(tmp_path)
