"""The input of image-text models, as the original release makes it, without TensorFlow.

T texts become int32 [T, max_len].
"""

import dataclasses
import os
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.errors import UserError, extra

_MAX_WORD_BYTES = 100  # of a word that TensorFlow Text looks up; a longer one is unknown
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
      vocab_path: a text file in UTF-8, a token in each line, with `[CLS]`.
      max_len: length of the token ids; longer texts are cut.
      cls_token: the id of the class token.
      unknown_token: the id of `[UNK]`; the size of the vocabulary where there is none.
      size: of the vocabulary.
    """

    vocab_path: str | os.PathLike[str]
    max_len: int
    cls_token: int = dataclasses.field(init=False)
    unknown_token: int = dataclasses.field(init=False)
    size: int = dataclasses.field(init=False)
    _ids: dict[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reads the vocabulary.

        Raises:
          UserError: it cannot be read, has a token twice, or lacks `[CLS]`.
        """
        tokens = _read(self.vocab_path).decode('utf-8', 'replace').removesuffix('\n').split('\n')
        ids = {token.removesuffix('\r'): index for index, token in enumerate(tokens)}
        if len(ids) < len(tokens) or '[CLS]' not in ids:
            what = 'has a token twice' if len(ids) < len(tokens) else 'has no [CLS]'
            raise UserError(
                f'{self.vocab_path} {what}; expected a vocabulary of BERT, a token in each line'
            )
        object.__setattr__(self, '_ids', ids)
        object.__setattr__(self, 'cls_token', ids['[CLS]'])
        object.__setattr__(self, 'unknown_token', ids.get('[UNK]', len(ids)))
        object.__setattr__(self, 'size', len(ids))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [T, max_len]."""
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
        if len(word.encode('utf-8', 'surrogatepass')) > _MAX_WORD_BYTES:
            return [self.unknown_token]
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = '##' if start else ''
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), 0)
            if not end:
                return [self.unknown_token]
            ids.append(self._ids[prefix + word[start:end]])
            start = end
        return ids


def split_words(text: str) -> list[str]:
    """The words that BERT looks up: folded, without marks, split at spaces and punctuation."""
    text = unicodedata.normalize('NFD', _fold_case(text))
    words = ['']
    for character in text:
        category = unicodedata.category(character)
        if category == 'Mn':
            continue
        if category in ('Cc', 'Cf') or character == ' ':
            words.append('')
        elif category[0] == 'P' or _ALONE.match(character):
            words += [character, '']
        else:
            words[-1] += character
    return [word for word in words if word]


def _fold_case(text: str) -> str:
    """Unicode's NFKC_Casefold (The Unicode Standard, section 3.13)."""
    folded = unicodedata.normalize('NFD', text)
    while True:
        once = unicodedata.normalize('NFKC', _IGNORED.sub('', folded.casefold()))
        if once == folded:
            return once
        folded = once


@dataclasses.dataclass(frozen=True)
class SentencepieceTokenizer:
    """SentencePiece, padded with the token that ends a text; the last token is always that one.

    Attributes:
      vocab_path: a model file of SentencePiece that has `</s>`.
      max_len: length of the token ids; longer texts are cut.
      canonical: whether texts are put into lower case and lose their ASCII punctuation first, as
        SigLIP's are.
      eos_token: the id of `</s>`.
      unknown_token: the id of what is not in the vocabulary.
      size: of the vocabulary.
    """

    vocab_path: str | os.PathLike[str]
    max_len: int
    canonical: bool = False
    eos_token: int = dataclasses.field(init=False)
    unknown_token: int = dataclasses.field(init=False)
    size: int = dataclasses.field(init=False)
    _processor: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reads the model.

        Raises:
          UserError: it cannot be read, or has no `</s>`.
          MissingPackageError: the package sentencepiece is not installed.
        """
        with extra('text'):
            import sentencepiece
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=_read(self.vocab_path))
        except RuntimeError as error:
            raise UserError(f'{self.vocab_path} is not a model of SentencePiece') from error
        if processor.eos_id() < 0:
            raise UserError(f'{self.vocab_path} has no token that ends a text, </s>')
        object.__setattr__(self, '_processor', processor)
        object.__setattr__(self, 'eos_token', processor.eos_id())
        object.__setattr__(self, 'unknown_token', processor.unk_id())
        object.__setattr__(self, 'size', processor.get_piece_size())

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [T, max_len]."""
        out = np.full((len(texts), self.max_len), self.eos_token, np.int32)
        for row, text in zip(out, texts, strict=True):
            text = _canonical(text) if self.canonical else text
            ids = self._processor.encode(text)[: self.max_len - 1]
            row[: len(ids)] = ids
        return out


def _canonical(text: str) -> str:
    """Lower case, no punctuation, single spaces: what SigLIP was trained and is evaluated with."""
    return ' '.join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


@dataclasses.dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer.json of Hugging Face: the byte pairs of CLIP and of Gemma, which SigLIP 2 takes.

    Beginning and end of a text are marked as the file says; of a longer text the end mark is kept.

    Attributes:
      vocab_path: the file.
      max_len: length of the token ids; longer texts are cut.
      pad_token: fills up shorter texts.
      pad_left: whether it does so in front of them.
      lower: whether texts are put into lower case first.
      unknown_token: the id of what is not in the vocabulary; 0 where there is no such thing.
      size: of the vocabulary, the largest id and one.
    """

    vocab_path: str | os.PathLike[str]
    max_len: int
    pad_token: str
    pad_left: bool = False
    lower: bool = False
    unknown_token: int = dataclasses.field(init=False)
    size: int = dataclasses.field(init=False)
    _tokenizer: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reads the file.

        Raises:
          UserError: it cannot be read, is no tokenizer, or has no such `pad_token`.
          MissingPackageError: the package tokenizers is not installed.
        """
        with extra('text'):
            import tokenizers
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(_read(self.vocab_path))
        except Exception as error:  # it has no class of its own
            if isinstance(error, UserError):
                raise
            raise UserError(f'{self.vocab_path} is not a tokenizer.json ({error})') from error
        ids = tokenizer.get_vocab()
        if self.pad_token not in ids:
            raise UserError(f'{self.vocab_path} has no token {self.pad_token!r} to fill up texts')
        tokenizer.enable_truncation(self.max_len)
        tokenizer.enable_padding(
            direction='left' if self.pad_left else 'right',
            pad_id=ids[self.pad_token],
            pad_token=self.pad_token,
            length=self.max_len,
        )
        unknown = tokenizer.token_to_id(getattr(tokenizer.model, 'unk_token', None) or '')
        object.__setattr__(self, '_tokenizer', tokenizer)
        object.__setattr__(self, 'unknown_token', unknown or 0)
        object.__setattr__(self, 'size', max(ids.values()) + 1)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [T, max_len]."""
        if self.lower:
            texts = [text.lower() for text in texts]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        return np.asarray(rows, np.int32).reshape(len(rows), self.max_len)


Tokenizer = BertTokenizer | SentencepieceTokenizer | JsonTokenizer
TOKENIZERS: Mapping[str, type[Tokenizer]] = {
    'bert': BertTokenizer,
    'sentencepiece': SentencepieceTokenizer,
    'json': JsonTokenizer,
}


def make_tokenizer(pp: Mapping[str, Any], vocabulary: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `LitModel.pp` tells.

    Args:
      pp: `tokenizer_name`, `max_len`, and what else the tokenizer's class takes.
      vocabulary: its file.

    Raises:
      UserError: see the classes.
    """
    kind = TOKENIZERS[pp['tokenizer_name']]
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    return kind(vocabulary, **{name: value for name, value in pp.items() if name in names})


@dataclasses.dataclass(frozen=True)
class PreprocessImages:
    """The images of LiT: resized bilinearly to whole grey levels, in [-1, 1].

    Attributes:
      size: side of the result, pixels.
      crop: take the centre of an image whose short side has this size, instead of squashing it.
    """

    size: int
    crop: bool = False

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images, uint8 [height, width, 3], to float32 [B, size, size, 3] in [-1, 1]."""
        how = 'resize_crop' if self.crop else 'squash'
        preprocess = dataclasses.replace(lit_preprocess(self.size), eval=how)
        return np.stack([normalize(preprocess.evaluate(image)) for image in images])


def lit_preprocess(size: int | tuple[int, int]) -> Preprocess:
    """From decoded images to pixels, as the original release's LiT by default."""
    return Preprocess(size, inception_crop=False, whole_levels=True)


def _read(path: str | os.PathLike[str]) -> bytes:
    """All of a vocabulary.

    Raises:
      UserError: there is no such file.
    """
    path = files.expand(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'the vocabulary {path} cannot be read ({error.strerror})') from error
