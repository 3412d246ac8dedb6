"""BERT's word pieces, as TensorFlow Text makes them, without TensorFlow."""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from vit_jax import files
from vit_jax.errors import UserError

MAX_WORD_BYTES = 100  # of a word that TensorFlow Text looks up; a longer one is unknown
# Unicode's property Default_Ignorable_Code_Point, which Python's tables lack.
_IGNORED = re.compile(
    '[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f'
    '\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a'
    '\U000e0000-\U000e0fff]'
)
# What BERT makes words of their own: ASCII's symbols, and the characters of Chinese.
_ALONE = re.compile(
    '[!-/:-@\\[-`{-~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df'
    '\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]'
)


@dataclasses.dataclass(frozen=True)
class BertTokenizer:
    """BERT's word pieces in lower case, with the class token in front, padded with zeros.

    The ids are those of TensorFlow Text 2.21 (`BertTokenizer(lower_case=True)`): case is folded as
    Unicode's NFKC_Casefold does, marks are removed, special tokens inside a text are plain text.

    Attributes:
      vocab_path: a text file in UTF-8, a token in each line, with `[CLS]`; or the tokenizer.json
        of a BERT of Hugging Face, of which the vocabulary is taken.
      max_len: length of the token ids; longer texts are cut.
      cls_token: the id of the class token.
      unknown_token: the id of `[UNK]`; the size of the vocabulary where there is none.
      size: of the vocabulary.
      ids: of each token.
    """

    vocab_path: str | os.PathLike[str]
    max_len: int
    cls_token: int = dataclasses.field(init=False)
    unknown_token: int = dataclasses.field(init=False)
    size: int = dataclasses.field(init=False)
    ids: dict[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reads the vocabulary.

        Raises:
          UserError: it cannot be read, has a token twice, or lacks `[CLS]`.
        """
        tokens = read_word_pieces(self.vocab_path)
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) < len(tokens) or '[CLS]' not in ids:
            what = 'has a token twice' if len(ids) < len(tokens) else 'has no [CLS]'
            raise UserError(
                f'{self.vocab_path} {what}; expected a vocabulary of BERT, a token in each line'
            )
        object.__setattr__(self, 'ids', ids)
        object.__setattr__(self, 'cls_token', ids['[CLS]'])
        object.__setattr__(self, 'unknown_token', ids.get('[UNK]', len(ids)))
        object.__setattr__(self, 'size', len(ids))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [T, max_len].

        Raises:
          UserError: something is no text.
        """
        check_texts(texts)
        out = np.zeros((len(texts), self.max_len), np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = [self.cls_token]
            for word in split_words(text):
                ids += self._pieces(word)
                if len(ids) >= self.max_len:
                    break
            row[: len(ids)] = ids[: self.max_len]
        return out

    def _pieces(self, word: str) -> list[int]:
        """The longest piece of the vocabulary first, then the longest of the rest, and so on."""
        if _bytes_of(word) > MAX_WORD_BYTES:
            return [self.unknown_token]
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = '##' if start else ''
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self.ids), 0)
            if not end:
                return [self.unknown_token]
            ids.append(self.ids[prefix + word[start:end]])
            start = end
        return ids


def read_word_pieces(path: str | os.PathLike[str]) -> list[str]:
    """The tokens of a vocabulary of BERT, in the order of their ids."""
    content = read_vocabulary(path)
    if not content.startswith(b'{'):
        tokens = content.decode('utf-8', 'replace').removesuffix('\n').split('\n')
        return [token.removesuffix('\r') for token in tokens]
    model = files.read_json(files.expand(path)).get('model')
    found = model.get('vocab') if isinstance(model, dict) else None
    if not isinstance(found, dict) or set(found.values()) != set(range(len(found))):
        raise UserError(f'{path} is no tokenizer.json of BERT: no model.vocab of tokens and ids')
    return sorted(found, key=found.__getitem__)


def split_words(text: str) -> Iterator[str]:
    """The words that BERT looks up: folded, without marks, split at spaces and punctuation.

    Of a word that is longer than `BertTokenizer` looks up, only the beginning is given.
    """
    word, room = '', MAX_WORD_BYTES
    for character in unicodedata.normalize('NFD', _fold_case(text)):
        category = unicodedata.category(character)
        if category == 'Mn':
            continue
        space = category in ('Cc', 'Cf') or character == ' '
        alone = not space and bool(category[0] == 'P' or _ALONE.match(character))
        if not (space or alone):
            if room >= 0:  # adding to a string without end takes time without end
                word += character
                room -= 1 if character.isascii() else _bytes_of(character)
            continue
        if word:
            yield word
        word, room = '', MAX_WORD_BYTES
        if alone:
            yield character
    if word:
        yield word


def _bytes_of(text: str) -> int:
    return len(text.encode('utf-8', 'surrogatepass'))


def _fold_case(text: str) -> str:
    """Unicode's NFKC_Casefold (The Unicode Standard, section 3.13)."""
    folded = unicodedata.normalize('NFD', text)
    while True:
        once = unicodedata.normalize('NFKC', _IGNORED.sub('', folded.casefold()))
        if once == folded:
            return once
        folded = once


def check_texts(texts: Sequence[str]) -> None:
    """Raises `UserError` for what is no list of texts."""
    if isinstance(texts, str):
        raise UserError(f'expected a list of texts, and got one: [{texts[:50]!r}] is a list')
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(
                f'text number {index} is a {type(text).__name__}, {str(text)[:50]!r}; expected str'
            )


def read_vocabulary(path: str | os.PathLike[str]) -> bytes:
    """All of a vocabulary.

    Raises:
      UserError: there is no such file.
    """
    path = files.expand(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'the vocabulary {path} cannot be read ({error.strerror})') from error
