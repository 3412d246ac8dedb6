"""Tokenizers: the ids of TensorFlow Text 2.21.1, cutting and padding, bad vocabularies.

The fixtures hold vocabularies, made-up texts of many scripts, and the ids that TensorFlow Text gave
for them. SentencePiece's leave out long runs of one letter: there, several divisions are equally
likely, and which one is taken depends on its version.
"""

import base64
import json
import lzma
import pathlib

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
