"""The page of an image-text model: its token ids are ours, and visitors get the models' answers."""

import base64
import json
import lzma
import os
import pathlib
import subprocess

import cv2
import numpy as np
import onnxruntime
import pytest

from vit_jax.data import decode, text
from vit_jax.errors import UserError
from vit_jax.export import page_tokenizer, web

PAGE = pathlib.Path(__file__).parents[2] / 'vit_jax/export/page'
FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures/tokenizers'


@pytest.fixture(scope='module')
def page_ids(packages, tmp_path_factory):
    """`page_ids(tokenizer, texts)`: ids that the page gives, computed by Node.js."""
    folder = tmp_path_factory.mktemp('page')
    (folder / 'package.json').write_text('{"type": "module"}')
    (folder / 'tokenizer.js').write_bytes((PAGE / 'tokenizer.js').read_bytes())
    web.TOKENIZERS.unpack(packages[1], folder, web._TOKENIZERS_FILES)

    def run(tokenizer, texts):
        sent = json.dumps({'told': page_tokenizer.describe(tokenizer), 'texts': texts})
        script = pathlib.Path(__file__).with_name('page_ids.mjs')
        command = ['node', script, folder / 'tokenizer.js']
        done = subprocess.run(command, input=sent, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return np.array(json.loads(done.stdout))

    return run


def fixture(name):
    return json.loads(lzma.decompress((FIXTURES / name).read_bytes()))


def test_word_pieces_of_the_page(page_ids, tmp_path):
    """On all texts of the fixture, those with characters of many scripts."""
    case = fixture('bert.json.xz')
    path = tmp_path / 'vocab.txt'
    path.write_text(''.join(f'{token}\n' for token in case['vocabulary']), 'utf-8', newline='\n')
    tokenizer = text.BertTokenizer(path, max_len=16)
    found = page_ids(tokenizer, case['texts'])
    np.testing.assert_array_equal(found, tokenizer(case['texts']))


@pytest.mark.parametrize('canonical', [False, True])
def test_sentencepiece_of_the_page(page_ids, tmp_path, canonical):
    case = fixture('sentencepiece.json.xz')
    path = tmp_path / 'sentencepiece.model'
    path.write_bytes(base64.b64decode(case['model']))
    tokenizer = text.SentencepieceTokenizer(path, max_len=12, canonical=canonical)
    texts = [*case['texts'], 'A_red--Rose,  in_bloom!']
    np.testing.assert_array_equal(page_ids(tokenizer, texts), tokenizer(texts))


def test_byte_pairs_of_the_page(page_ids, tmp_path):
    """Of CLIP and of Gemma, trained here."""
    tokenizers = pytest.importorskip('tokenizers')
    models, normalizers, pre = tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers
    texts = fixture('bert.json.xz')['texts'][:2000]
    clip = tokenizers.Tokenizer(models.BPE(end_of_word_suffix='</w>', unk_token='<end>'))
    spaces = normalizers.Replace(tokenizers.Regex(r'\s+'), ' ')
    clip.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre.Split(tokenizers.Regex(words), 'removed', invert=True)
    clip.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=['<start>', '<end>'],
        initial_alphabet=pre.ByteLevel.alphabet(),
        end_of_word_suffix='</w>',
        show_progress=False,
    )
    clip.train_from_iterator(texts, trainer)
    clip.post_processor = tokenizers.processors.RobertaProcessing(('<end>', 1), ('<start>', 0))
    clip.save(str(tmp_path / 'clip.json'))
    gemma = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    gemma.normalizer = normalizers.Replace(' ', '\u2581')
    gemma.pre_tokenizer = pre.Split(' ', 'merged_with_previous')
    special = ['<pad>', '<eos>', '<unk>', *(f'<0x{byte:02X}>' for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, limit_alphabet=100, special_tokens=special, show_progress=False
    )
    gemma.train_from_iterator(texts, trainer)
    gemma.post_processor = tokenizers.processors.TemplateProcessing(
        single='$A <eos>', special_tokens=[('<eos>', 1)]
    )
    gemma.save(str(tmp_path / 'gemma.json'))
    # JavaScript takes U+FEFF for a space, the original does not.
    texts = [t for t in texts if '\ufeff' not in t] + ['ΟΔΟΣ Σ', '<end> of <start>']
    for tokenizer in (
        text.JsonTokenizer(tmp_path / 'clip.json', 16, '<end>'),
        text.JsonTokenizer(tmp_path / 'gemma.json', 16, '<pad>', lower=True),
        text.JsonTokenizer(tmp_path / 'gemma.json', 16, '<pad>', pad_left=True),
        text.JsonTokenizer(
            tmp_path / 'gemma.json',
            16,
            '<pad>',
            canonical=True,
            end_token='<eos>',
            blank_token='<unk>',
        ),
    ):
        np.testing.assert_array_equal(page_ids(tokenizer, texts), tokenizer(texts))


def test_what_the_page_cannot_divide_is_refused(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(base64.b64decode(fixture('sentencepiece.json.xz')['model']))
    model.trainer_spec.model_type = model.trainer_spec.BPE
    path = tmp_path / 'pairs.model'
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match='that of unigrams alone'):
        page_tokenizer.describe(text.SentencepieceTokenizer(path, 8))
    tokenizers = pytest.importorskip('tokenizers')
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, unk_token='a'))
    words.save(str(tmp_path / 'words.json'))
    with pytest.raises(UserError, match='of kind WordLevel, and the page has BPE'):
        page_tokenizer.describe(text.JsonTokenizer(tmp_path / 'words.json', 8, 'a'))


def test_a_visitor_types_classes_and_searches(towers, tmp_path, browse):
    """By keyboard alone; probabilities are those of the two files in ONNX Runtime."""
    made, site = towers('clip'), tmp_path / 'site'
    web.write(site, made, dtype='float16', classes=['dog'])
    rng = np.random.default_rng(0)
    photos = [str(tmp_path / f'{i}.png') for i in range(3)]
    for photo in photos:
        cv2.imwrite(photo, rng.integers(0, 256, (40, 50, 3), np.uint8))
    words = {'classes': 'rose, photo,<b>dog</b>', 'prompt': 'a {} of', 'query': 'a dog'}
    pictures = os.environ.get('VIT_JAX_PICTURES', '')  # a folder, to look at the page
    told = browse(site, photos=photos, words=words, pictures=pictures)
    assert not told['errors']

    image, texts = (
        onnxruntime.InferenceSession(site / f'{name}.onnx') for name in ('model', 'text')
    )
    pixels = np.stack([decode.load_image(photo, made.preprocess) for photo in photos])
    zimg = image.run(['features'], {'image': (pixels - 127.5) / np.float32(127.5)})[0]
    prompts = ['a rose of', 'a photo of', 'a <b>dog</b> of', 'a dog']
    ztxt = texts.run(['features'], {'tokens': made.tokenizer(prompts)})[0]
    powers = np.exp(made.temperature * zimg @ ztxt[:3].T)
    expected = powers / powers.sum(1, keepdims=True)
    shown = told['figures']
    assert [f['name'] for f in shown] == ['dropped1.png', 'dropped0.png', '0.png']  # newest first
    np.testing.assert_allclose([f['probabilities'] for f in shown], expected[::-1], atol=1e-4)
    best = ['rose', 'photo', '<b>dog</b>'][expected[0].argmax()]
    assert shown[-1]['first'].startswith(best) and all(f['heat'] for f in shown)

    cosines = zimg @ ztxt[3]
    names = ['0.png', 'dropped0.png', 'dropped1.png']
    assert [f['name'] for f in told['ranked']] == [names[i] for i in np.argsort(-cosines)]
    found = [float(f['fit'].rsplit(maxsplit=1)[-1]) for f in told['ranked']]
    np.testing.assert_allclose(found, np.sort(cosines)[::-1], atol=1e-3)
    assert told['texts'] == 4 and told['again'] == 5  # 'a dog' before, 3 classes, then the search
    np.testing.assert_allclose(told['sigmoids'], 1 / (1 + np.exp([1 - 2.4, 1 - 4.0])), atol=1e-6)
    assert told['widths'] == {
        f'{width} {scheme}': width for width in (375, 1280) for scheme in ('light', 'dark')
    }
    assert sorted(told['shot']) == ['0.png', 'camera', 'dropped0.png', 'dropped1.png']
    host = told['requests'][0]
    assert all(url.startswith((host, 'blob:', 'data:')) for url in told['requests'])
