"""The input of image-text models, as the original release makes it, without TensorFlow.

T texts become int32 [T, max_len].
"""

import dataclasses
import os
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.data.word_pieces import (
    BertTokenizer,
    check_texts,
    read_vocabulary,
    read_word_pieces,
)
from vit_jax.errors import UserError, extra


@dataclasses.dataclass(frozen=True)
class SentencepieceTokenizer:
    """SentencePiece, padded with the token that ends a text; the last token is always that one.

    Attributes:
      vocab_path: a model file of SentencePiece that has `</s>`.
      max_len: length of the token ids; longer texts are cut.
      canonical: whether texts are put into lower case first, _ becomes a space, and other ASCII
        punctuation is taken away, as of SigLIP's.
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
            processor = sentencepiece.SentencePieceProcessor(
                model_proto=read_vocabulary(self.vocab_path)
            )
        except RuntimeError as error:
            raise UserError(f'{self.vocab_path} is not a model of SentencePiece') from error
        if processor.eos_id() < 0:
            raise UserError(f'{self.vocab_path} has no token that ends a text, </s>')
        object.__setattr__(self, '_processor', processor)
        object.__setattr__(self, 'eos_token', processor.eos_id())
        object.__setattr__(self, 'unknown_token', processor.unk_id())
        object.__setattr__(self, 'size', processor.get_piece_size())

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [T, max_len].

        Raises:
          UserError: something is no text.
        """
        check_texts(texts)
        out = np.full((len(texts), self.max_len), self.eos_token, np.int32)
        for row, text in zip(out, map(_encodable, texts), strict=True):
            text = _canonical(text) if self.canonical else text
            ids = self._processor.encode(text)[: self.max_len - 1]
            row[: len(ids)] = ids
        return out


def _canonical(text: str) -> str:
    """Lower case, a space for _, no other punctuation, single spaces.

    As big_vision's `_canonicalize` (evaluators/proj/image_text/prompt_engineering.py), by which
    SigLIP is evaluated. (transformers' SiglipTokenizer takes _ away without a space.)
    """
    return ' '.join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans('_', ' ', string.punctuation.replace('_', ''))


@dataclasses.dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer.json of Hugging Face: the byte pairs of CLIP and of Gemma, which SigLIP 2 takes.

    Beginning and end of a text are marked as the file says, or by `end_token`; of a longer text the
    end mark is kept.

    Attributes:
      vocab_path: the file.
      max_len: length of the token ids; longer texts are cut.
      pad_token: fills up shorter texts.
      pad_left: whether it does so in front of them.
      lower: whether texts are put into lower case first.
      canonical: whether they also lose their ASCII punctuation and double spaces, as open_clip's
        SigLIP has them.
      end_token: ends each text, and nothing marks its beginning, whatever the file says; '' for
        what the file says.
      blank_token: id 0 takes its place; '' for none.
      unknown_token: the id of what is not in the vocabulary; 0 where there is no such thing.
      size: of the vocabulary, the largest id and one.
    """

    vocab_path: str | os.PathLike[str]
    max_len: int
    pad_token: str
    pad_left: bool = False
    lower: bool = False
    canonical: bool = False
    end_token: str = ''
    blank_token: str = ''
    unknown_token: int = dataclasses.field(init=False)
    size: int = dataclasses.field(init=False)
    _tokenizer: Any = dataclasses.field(init=False, repr=False, compare=False)
    _blank: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reads the file.

        Raises:
          UserError: it cannot be read, is no tokenizer, or lacks one of these tokens.
          MissingPackageError: the package tokenizers is not installed.
        """
        tokenizer = _open_json(self.vocab_path)
        ids = tokenizer.get_vocab()
        uses = {'fill up': self.pad_token, 'end': self.end_token, 'clean': self.blank_token}
        for use, token in uses.items():
            if token not in ids and (token or use == 'fill up'):
                raise UserError(f'{self.vocab_path} has no token {token!r} to {use} texts')
        if self.end_token:
            import tokenizers

            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=['$A', self.end_token],
                special_tokens=[(self.end_token, ids[self.end_token])],
            )
        tokenizer.enable_truncation(self.max_len)
        tokenizer.enable_padding(
            direction='left' if self.pad_left else 'right',
            pad_id=ids[self.pad_token],
            pad_token=self.pad_token,
            length=self.max_len,
        )
        if len(tokenizer.encode('').ids) != self.max_len:  # marks are never cut
            raise UserError(
                f'{self.vocab_path} marks the beginning and the end of texts, which leaves no room '
                f'in {self.max_len} tokens'
            )
        unknown = tokenizer.token_to_id(getattr(tokenizer.model, 'unk_token', None) or '')
        object.__setattr__(self, '_tokenizer', tokenizer)
        object.__setattr__(self, '_blank', ids.get(self.blank_token, -1))
        object.__setattr__(self, 'unknown_token', unknown or 0)
        object.__setattr__(self, 'size', max(ids.values()) + 1)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [T, max_len].

        Raises:
          UserError: something is no text.
        """
        check_texts(texts)
        texts = [_encodable(text) for text in texts]
        if self.canonical:
            texts = [_canonical(text) for text in texts]
        elif self.lower:
            texts = [text.lower() for text in texts]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        out = np.asarray(rows, np.int32).reshape(len(rows), self.max_len)
        return np.where(out == self._blank, 0, out)

    def uncut(self) -> Any:
        """The `tokenizers.Tokenizer` of it, that neither cuts nor fills up texts."""
        import tokenizers

        whole = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        whole.no_padding()
        whole.no_truncation()
        return whole

    def to_json(self) -> tuple[str, list[str]]:
        """A tokenizer.json that does by itself what this does, as far as there is a word for it.

        Returns:
          The text of the file, and what whoever uses it has to do, a sentence each.
        """
        import tokenizers

        whole = self.uncut()
        if self.lower or self.canonical:
            old = [whole.normalizer] if whole.normalizer else []
            lower = tokenizers.normalizers.Lowercase()
            whole.normalizer = tokenizers.normalizers.Sequence([lower, *old])
        notes = []
        if self.canonical:
            notes.append('its tokenizer does not take punctuation out of texts: do so first')
        if self.blank_token:
            notes.append(f'its tokenizer does not put 0 for {self.blank_token}: do so afterwards')
        return whole.to_str(), notes


def token_of_id(vocab_path: str | os.PathLike[str], index: int) -> str:
    """The token of a tokenizer.json that has this id.

    Raises:
      UserError: see `JsonTokenizer`; there is none.
    """
    tokens = _open_json(vocab_path).get_vocab()
    for token, found in tokens.items():
        if found == index:
            return token
    raise UserError(f'{vocab_path} has no token of number {index}')


def _open_json(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a file."""
    with extra('text'):
        import tokenizers
    try:
        return tokenizers.Tokenizer.from_buffer(read_vocabulary(path))
    except Exception as error:  # it has no class of its own
        if isinstance(error, UserError):
            raise
        raise UserError(f'{path} is not a tokenizer.json ({error})') from error


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


def save_vocabulary(tokenizer: Tokenizer, path: pathlib.Path) -> None:
    """Writes a file that makes the same tokenizer, for other programs, too.

    Of BERT that has a token in each line; a tokenizer.json ends texts as `end_token` says.

    Args:
      tokenizer: whose file it is.
      path: written in place.
    """
    content = read_vocabulary(tokenizer.vocab_path)
    if isinstance(tokenizer, BertTokenizer) and content.startswith(b'{'):
        content = '\n'.join([*read_word_pieces(tokenizer.vocab_path), '']).encode()
    if isinstance(tokenizer, JsonTokenizer) and tokenizer.end_token:
        content = tokenizer.to_json()[0].encode()
    path.write_bytes(content)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raises `UserError` where a tokenizer gives ids that a model has no embedding for.

    Args:
      tokenizer: of the model.
      rows: how many token embeddings it has.
    """
    if tokenizer.unknown_token >= tokenizer.size:
        raise UserError(
            f'the vocabulary {tokenizer.vocab_path} has no token for unknown words ([UNK]): any '
            'such word would get an id beyond it. Take the vocabulary that the model came with'
        )
    if tokenizer.size > rows:
        raise UserError(
            f'the vocabulary {tokenizer.vocab_path} has {tokenizer.size:,} tokens, and the model '
            f'has {rows:,}: it is not the vocabulary of this model'
        )


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


def _encodable(text: str) -> str:
    """A text without halves of UTF-16 characters, which no library for tokens takes."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
