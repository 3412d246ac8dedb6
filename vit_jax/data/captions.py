"""Images with texts: pairs to train two towers on.

    image,caption                  {"image": "a.jpg", "caption": ["a red tulip", "a flower"]}
    a.jpg,a red tulip
    a.jpg,a flower

`sources.open_dataset` opens them where its `columns` have the role `caption`. The label of an
example is then its captions, one or several; after `tokenized`, their token ids.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data import text as text_lib
from vit_jax.data.columns import text_of
from vit_jax.data.dataset import Dataset, Selection
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Example, Split
from vit_jax.data.holdout import stratified_order
from vit_jax.data.reader import default_threads
from vit_jax.data.row_images import AtRows, Images
from vit_jax.errors import UserError, extra

# Of labels that are captions.
CAPTIONS = np.dtype(object)
MAX_CHARACTERS = 100_000  # of a caption; more is no caption but a mistake
DIGITS = 'digits_captions'
_DIGIT_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
_COLOURS = {
    'red': (230, 40, 40),
    'green': (40, 190, 60),
    'blue': (60, 90, 250),
    'yellow': (240, 220, 40),
    'purple': (170, 60, 210),
    'white': (255, 255, 255),
}


def of_cells(cells: Sequence[Any], faults: dict[int, str]) -> list[tuple[str, ...]]:
    """The captions of N rows.

    Args:
      cells: N, each a text or a list of texts.
      faults: by row (index), why it cannot be used; added to.
    """
    found = []
    for row, cell in enumerate(cells):
        texts = cell if isinstance(cell, list | tuple) else [cell]
        captions = tuple(text_of(text) for text in texts)
        found.append(captions)
        if why := _fault(captions):
            faults.setdefault(row, why)
    return found


def _fault(captions: Sequence[str]) -> str:
    """What is wrong with the captions of an image; '' for nothing."""
    if not captions or not all(captions):
        return 'its caption is empty' if captions else 'it has no caption'
    longest = max(map(len, captions))
    return f'its caption has {longest:,} characters' if longest > MAX_CHARACTERS else ''


def by_image(
    images: Images,
    captions: Sequence[tuple[str, ...]],
    splits: Sequence[str],
    faults: dict[int, str],
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Joins the rows of an image.

    Args:
      images: of N rows.
      captions: of N rows.
      splits: of N rows.
      faults: see `of_cells`; an image that is in two splits is one.

    Returns:
      The first row of each image, int [M], and the captions of all its rows, M.
    """
    first: dict[str, int] = {}
    joined: dict[int, tuple[str, ...]] = {}
    for row, texts in enumerate(captions):
        if row in faults:
            continue
        start = first.setdefault(images.identity(row), row)
        if splits[row] != splits[start]:
            faults[row] = f'its image is in {splits[start]} already ({images.called(start)})'
        else:
            joined[start] = joined.get(start, ()) + texts
    return np.array(list(joined), np.int64), list(joined.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Captioned(AtRows):
    """A split of n images with captions, each at a row of `images`."""

    captions: Sequence[tuple[str, ...]]
    groups: np.ndarray | None

    def read(self, index: int) -> Example:
        """See `examples.Split`; the label is a tuple of texts."""
        try:
            image, key = self.images.read(int(self.rows[index]))
        except BadImageError as error:
            error.label = self.captions[index]
            raise
        return Example(image, self.captions[index], key)

    def identity(self) -> Iterator[str]:
        """See `examples.Split`."""
        yield _digest(self.captions)
        if self.groups is not None:
            yield '\0'.join(self.groups.tolist())
        yield from (self.images.identity(int(row)) for row in self.rows)


def _digest(captions: Sequence[tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for texts in captions:
        digest.update(('\0'.join(texts) + '\1').encode(errors='surrogateescape'))
    return digest.hexdigest()


def open_digits() -> Dataset:
    """Scikit-learn's handwritten digits in colours, in the order of the dataset `digits`.

    Image i is that of `digits`, on black, in a colour that i decides; its captions are 'a red
    three' and 'the digit 3 in red'.
    """
    with extra('train'):
        from sklearn import datasets

    digits = datasets.load_digits()
    order = stratified_order(digits.target)
    colours = np.random.RandomState(0).randint(len(_COLOURS), size=len(order))
    rgb = np.array(list(_COLOURS.values()))[colours][:, None, None]
    images = np.round(digits.images[order][..., None] / 16 * rgb).astype(np.uint8)
    names = np.array(list(_COLOURS))[colours].tolist()
    captions = [
        (f'a {colour} {_DIGIT_NAMES[digit]}', f'the digit {digit} in {colour}')
        for digit, colour in zip(digits.target[order].tolist(), names, strict=True)
    ]
    split = _Pixels(f'{DIGITS}:train', images, captions)
    return Dataset(DIGITS, (), False, {'train': split}, 3, CAPTIONS)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pixels:
    """A split held in memory: images uint8 [examples, height, width, 3]."""

    name: str
    images: np.ndarray
    captions: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, index: int) -> Example:
        return Example(self.images[index], self.captions[index], f'{self.name}/{index}')

    def identity(self) -> tuple[str, ...]:
        return self.name, str(len(self)), _digest(self.captions)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tokenized:
    """A split whose labels are token ids, int32 [captions, L]."""

    split: Any
    tokenizer: text_lib.Tokenizer

    def __len__(self) -> int:
        return len(self.split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)  # captions, groups, paths

    def read(self, index: int) -> Example:
        try:
            example = self.split.read(index)
        except BadImageError as error:
            if isinstance(error.label, tuple):
                error.label = self.tokenizer(error.label)
            raise
        if why := _fault(example.label):
            raise BadImageError(example.key, why)
        return dataclasses.replace(example, label=self.tokenizer(example.label))


def tokenized(dataset: Dataset, tokenizer: text_lib.Tokenizer) -> Dataset:
    """The dataset with token ids as labels, int32 [captions, L].

    Args:
      dataset: whose labels are captions.
      tokenizer: see `text.make_tokenizer`.
    """
    splits: Mapping[str, Split] = {
        name: _Tokenized(split, tokenizer) for name, split in dataset.splits.items()
    }
    dtype = np.dtype((np.int32, (tokenizer.max_len,)))
    return dataclasses.replace(dataset, splits=splits, label_dtype=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """The captions of N images, of which one may have several.

    Attributes:
      ids: token ids, int32 [T, L].
      image: the image that each belongs to, int [T], increasing.
    """

    ids: np.ndarray
    image: np.ndarray

    @classmethod
    def of(cls, source: Selection, tokenizer: text_lib.Tokenizer) -> 'Tokens':
        """All captions of a tokenized source; of an image that has none to be read, none.

        Where they stand beside the images (in TFDS sets), the records are read once.
        """
        known = source.captions()
        if known is not None:
            owner = np.repeat(np.arange(len(known)), [len(texts) for texts in known])
            return cls(tokenizer(list(itertools.chain(*known))), owner)

        def read(index: int) -> np.ndarray:
            try:
                return source[index].label  # type: ignore[return-value]
            except BadImageError:
                return np.zeros((0, tokenizer.max_len), np.int32)

        with concurrent.futures.ThreadPoolExecutor(default_threads()) as threads:
            found = list(threads.map(read, range(len(source))))
        owner = np.repeat(np.arange(len(found)), [len(ids) for ids in found])
        if not len(owner):
            raise UserError(f'{source!r}: no record can be read, so that there are no captions')
        return cls(np.concatenate(found), owner)

    def usable(self, readable: np.ndarray) -> np.ndarray:
        """Which of the images can be read and have a caption, bool [N].

        Args:
          readable: which can be read, bool [N].
        """
        return readable & np.isin(np.arange(len(readable)), self.image)


def draw(ids: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One of the captions of an image, as it is drawn for a place in the training batches.

    Args:
      ids: [captions, L].
      key: of the place, see `sampler.Item`.

    Returns:
      int32 [L].
    """
    # The counter begins elsewhere than that of crops and what else is drawn from the key.
    rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 3]))
    return ids[rng.integers(len(ids))]
