"""Tokenizers: the ids of TensorFlow Text 2.21.1, cutting and padding, bad vocabularies.

The fixtures hold vocabularies, made-up texts of many scripts, and the ids that TensorFlow Text gave
for them. SentencePiece's leave out long runs of one letter: there, several divisions are equally
likely, and which one is taken depends on its version.
"""

import base64
import json
import lzma
import pathlib
import re

import numpy as np
import pytest

from vit_jax.data import text
from vit_jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures/tokenizers'


def load(name):
    return json.loads(lzma.decompress((FIXTURES / name).read_bytes()))


def padded(ids, length, value):
    return (ids + length * [value])[:length]


def test_bert_gives_the_ids_of_tensorflow_text(tmp_path):
    case = load('bert.json.xz')
    path = tmp_path / 'vocab.txt'
    path.write_text(''.join(f'{token}\n' for token in case['vocabulary']), 'utf-8', newline='\n')
    tokenizer = text.BertTokenizer(path, max_len=16)
    first = case['vocabulary'].index('[CLS]')
    expected = [padded([first, *ids], 16, 0) for ids in case['ids']]
    assert len(expected) == 10_000
    found = tokenizer(case['texts'])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_sentencepiece_gives_the_ids_of_tensorflow_text(tmp_path):
    case = load('sentencepiece.json.xz')
    path = tmp_path / 'sentencepiece.model'
    path.write_bytes(base64.b64decode(case['model']))
    tokenizer = text.SentencepieceTokenizer(path, max_len=12)
    expected = [padded(ids, 11, ids[-1]) + [ids[-1]] for ids in case['ids']]
    np.testing.assert_array_equal(tokenizer(case['texts']), expected)
    assert tokenizer.eos_token == case['ids'][0][-1]


def test_texts_of_siglip_are_those_of_big_vision(tmp_path):
    """A space for _, then no punctuation, lower case, single spaces."""
    case = load('sentencepiece.json.xz')
    (tmp_path / 'x.model').write_bytes(base64.b64decode(case['model']))
    plain = text.SentencepieceTokenizer(tmp_path / 'x.model', 16)
    canonical = text.SentencepieceTokenizer(tmp_path / 'x.model', 16, canonical=True)
    texts = [
        'A_red--Rose,  in_bloom! ',
        '_',
        'tf_flowers\tand\u3000"dandelion"',
        *case['texts'][:200],
    ]
    marks = r'[!-/:-@\[-^`{-~]'  # all of ASCII but _
    expected = [re.sub(r'\s+', ' ', re.sub(marks, '', t.replace('_', ' ')).lower()) for t in texts]
    assert expected[0].strip() == 'a redrose in bloom'
    np.testing.assert_array_equal(canonical(texts), plain([t.strip() for t in expected]))


def test_a_vocabulary_without_unknown(tmp_path):
    path = tmp_path / 'vocab.txt'
    path.write_text('[PAD]\n[CLS]\nsome\ntest\nwords')
    tokenizer = text.BertTokenizer(vocab_path=path, max_len=3)
    tokens = tokenizer(['some', 'test', 'words', 'xxx', 'Some, test', ''])
    assert tokens.tolist() == [[1, 2, 0], [1, 3, 0], [1, 4, 0], [1, 5, 0], [1, 2, 5], [1, 0, 0]]
    assert tokenizer(['\ud800']).tolist() == [[1, 5, 0]]  # not a text that UTF-8 can hold


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'cannot be read'),
        ('[PAD]\nsome\n', r'has no \[CLS\]'),
        ('[CLS]\nsome\nsome\n', 'has a token twice'),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, message):
    path = tmp_path / 'vocab.txt'
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        text.BertTokenizer(path, 4)
    with pytest.raises(UserError, match='cannot be read|not a model of SentencePiece'):
        text.SentencepieceTokenizer(path, 4)


@pytest.mark.parametrize('shape', [(37, 50), (50, 37), (20, 20), (61, 119), (33, 35), (100, 257)])
def test_the_crop_is_that_of_the_original(shape):
    """Its preprocess.py: sides times a float32 ratio, rounded; bilinear; the centre; uint8."""
    import cv2

    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    ratio = np.float32(20) / np.float32(min(shape))
    height, width = (int(np.round(np.float32(side) * ratio)) for side in shape)
    resized = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = (height - 20) // 2, (width - 20) // 2
    expected = resized[top : top + 20, left : left + 20].astype(np.uint8) / 255 * 2 - 1
    found = text.PreprocessImages(20, crop=True)([image])[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_hostile_texts(tmp_path):
    """Words are words of any length; what is no text is named."""
    vocabulary = tmp_path / 'vocab.txt'
    vocabulary.write_text('[PAD]\n[UNK]\n[CLS]\na\n##a')
    model = tmp_path / 'sentencepiece.model'
    model.write_bytes(base64.b64decode(load('sentencepiece.json.xz')['model']))
    bert, pieces = text.BertTokenizer(vocabulary, 5), text.SentencepieceTokenizer(model, 5)
    texts = ['a' * 2_000_000, 'a ' * 500_000, '\x00\x07a\u200ba', '\ud83d', 'a\ud83d\udc31', '\n\t']
    assert bert(texts).tolist() == [
        *([2, 1, 0, 0, 0], [2, 3, 3, 3, 3], [2, 3, 4, 0, 0], [2, 1, 0, 0, 0]),
        *([2, 1, 0, 0, 0], [2, 0, 0, 0, 0]),
    ]
    assert pieces(texts).shape == (6, 5)
    np.testing.assert_array_equal(pieces(['a\ud83d\udc31']), pieces(['a\U0001f431']))
    for tokenizer in (bert, pieces):
        assert tokenizer([]).shape == (0, 5)
        with pytest.raises(UserError, match='text number 1 is a int, .7.; expected str'):
            tokenizer(['a', 7])
        with pytest.raises(UserError, match='text number 0 is a bytes'):
            tokenizer([b'a'])
        with pytest.raises(UserError, match='expected a list of texts, and got one'):
            tokenizer('a photo')
