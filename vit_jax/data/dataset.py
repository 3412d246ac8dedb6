"""What every kind of dataset is made of: examples, splits, and selections of splits.

Whatever the storage, a `Source` is a selection of examples from the named splits of a dataset,
written in the split grammar of TensorFlow Datasets (https://www.tensorflow.org/datasets/splits):
`train`, `train[:90%]`, `train[1000:]`, `train[:10%]+validation`. Nothing here imports TensorFlow.
"""

import bisect
import dataclasses
import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vit_jax.errors import UserError, extra

if TYPE_CHECKING:
    from PIL import Image

# The last tenth of `stratified_order` has an image of each class, if all classes have so many.
_SMALL_CLASS = 10

Label = int | float | np.ndarray
# Of labels that are indices of classes.
CLASS_INDEX = np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled image.

    Attributes:
      image: an encoded file, a PIL image, or pixels, see `decode.decode`.
      label: index in the source's `class_names`; or a number, or a vector of numbers.
      key: what a person calls the image: its path, or dataset, split and index
        (`tf_flowers:train/17`).
    """

    image: 'bytes | np.ndarray | Image.Image'
    label: Label
    key: str


class Source(Protocol):
    """A finite sequence of examples, safe to read from several threads.

    What has these two attributes, a length and `[]` is a source. `channels_of` and `label_dtype_of`
    say what else it may have; `data.from_sequence` makes one of nearly anything.

    Attributes:
      class_names: names of the classes, in the order of the labels; in general, of what the model
        gives for an image.
      exif: whether to turn images upright as their EXIF orientation says (photo folders).
    """

    class_names: tuple[str, ...]
    exif: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def channels_of(source: Source) -> int:
    """Channels of the images: the source's `channels`, or 3, which all files are decoded to."""
    return getattr(source, 'channels', 3)


def label_dtype_of(source: Source, label: Label | None = None) -> np.dtype:
    """What labels are: the source's `label_dtype`, or what its first example says that can be read.

    Args:
      source: the examples.
      label: of one of them, so that none need be read.

    Returns:
      int32 for indices of classes, float32 for numbers, a float32 subarray type for vectors, as
      `np.dtype((np.float32, (5,)))`: an array of N such labels has shape [N, 5].
    """
    declared = getattr(source, 'label_dtype', None)
    if declared is not None:
        return declared
    for index in range(len(source)):
        if label is not None:
            break
        try:
            label = source[index].label
        except UserError as error:  # an image that cannot be read may still have a label
            label = getattr(error, 'label', None)
    return CLASS_INDEX if label is None else label_dtype(label)


def label_dtype(label: object) -> np.dtype:
    """The type of labels like this one, see `label_dtype_of`.

    Raises:
      UserError: it is neither a number nor an array of numbers.
    """
    array = np.asarray(label)
    if array.dtype.kind not in 'biuf':
        raise UserError(
            f'a label is the index of a class, a number or an array of numbers; got {label!r:.60}'
        )
    if not array.ndim and array.dtype.kind in 'biu':
        return CLASS_INDEX
    return np.dtype((np.float32, array.shape))


class Split(Protocol):
    """One whole split of a dataset as it is stored; all that differs between storages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Example:
        """Example `index` of the split, 0-based."""

    def identity(self) -> Iterable[str]:
        """What tells this split from another, or from what it was before, without reading it."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All splits of a dataset, from which `select` takes examples.

    Attributes:
      name: as the user spells it.
      class_names: in the order of the labels.
      exif: see `Source`.
      splits: the stored splits by name.
      channels: see `channels_of`.
      label_dtype: see `label_dtype_of`.
    """

    name: str
    class_names: tuple[str, ...]
    exif: bool
    splits: Mapping[str, Split]
    channels: int = 3
    label_dtype: np.dtype = CLASS_INDEX

    def select(self, spec: str) -> 'Selection':
        """Takes the examples that a split specification names.

        Args:
          spec: in TFDS's grammar, for example `train[:90%]`. Percentages are rounded to the closest
            example.

        Returns:
          The examples in the order of the specification.

        Raises:
          UserError: a specification that cannot be read, an unknown split, a slice beyond the
            split, no examples.
        """
        ranges = _parse_split(
            spec, {name: len(split) for name, split in self.splits.items()}, self.name
        )
        return Selection(self, spec, ranges)

    def default_specs(self) -> tuple[str, str]:
        """The specifications of training and test examples to use when the user gives none.

        The `test` split if there is one, else `validation`, else the last tenth of `train`, and
        more where that lacks a class of two images or more (`held_out`).

        Raises:
          UserError: no class has two images.
        """
        for name in ('test', 'validation'):
            if name in self.splits and 'train' in self.splits:
                return 'train', name
        first = 'train' if 'train' in self.splits else next(iter(self.splits))
        labels = getattr(self.splits[first], 'labels', None)
        if labels is None or np.unique(labels, return_counts=True)[1].min() >= _SMALL_CLASS:
            return f'{first}[:90%]', f'{first}[90%:]'
        count = held_out(labels)
        if not count:
            raise UserError(
                f'no class of {self.name} has two images, so that none can be held out to test on. '
                f'Add images, or give both --config.pp.train={first} and --config.pp.test={first}, '
                'which tests on what was trained on'
            )
        return f'{first}[:-{count}]', f'{first}[-{count}:]'


class Selection:
    """The `Source` that all datasets give: slices of stored splits, one after the other.

    Args:
      dataset: the splits to take from.
      spec: the split specification that `ranges` were made from.
      ranges: (split name, first, end), `end` excluded; at least one, none empty.

    Attributes:
      class_names: see `Source`.
      exif: see `Source`.
      channels: see `channels_of`.
      label_dtype: see `label_dtype_of`.
      spec: the split specification.
    """

    def __init__(self, dataset: Dataset, spec: str, ranges: Sequence[tuple[str, int, int]]):
        self.class_names = dataset.class_names
        self.exif = dataset.exif
        self.channels = dataset.channels
        self.label_dtype = dataset.label_dtype
        self.spec = spec
        self._name = dataset.name
        self._ranges = tuple(ranges)
        self._splits = {name: dataset.splits[name] for name, _, _ in ranges}
        self._ends = tuple(itertools.accumulate(end - first for _, first, end in ranges))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`, 0-based; IndexError beyond the end and below 0."""
        if not 0 <= index < len(self):
            raise IndexError(f'{self!r} has no example {index}')
        place = bisect.bisect_right(self._ends, index)
        name, _, end = self._ranges[place]
        return self._splits[name].read(int(index) - self._ends[place] + end)

    def __repr__(self) -> str:
        return f'{self._name} {self.spec} ({len(self):,} examples)'

    def labels(self) -> np.ndarray | None:
        """Labels, int [examples], where they are known without reading; None where they are not.

        Known are those of folders, digits and arrays; those of TFDS sets stand in the records.
        """
        parts = self._known('labels')
        return parts if parts is None else np.concatenate(parts)

    def paths(self) -> list[str] | None:
        """The files of all examples, where each is a file; else None."""
        parts = self._known('paths')
        return parts if parts is None else [path for part in parts for path in part]

    def _known(self, attribute: str) -> list[Any] | None:
        """The parts of what the stored splits know of each example; None if one does not."""
        parts = []
        for name, first, end in self._ranges:
            known = getattr(self._splits[name], attribute, None)
            if known is None:
                return None
            parts.append(known[first:end])
        return parts

    def fingerprint(self) -> str:
        """Tells whether this is the same sequence of examples as another time; no image is read.

        It covers the names and sizes of the stored splits (of a folder the names of all
        files, below the split's folder), and which part of them this is.
        """
        digest = hashlib.sha256()
        for name, first, end in self._ranges:
            digest.update(f'{name}\0{first}\0{end}\0'.encode())
            for part in self._splits[name].identity():
                digest.update(part.encode(errors='surrogateescape') + b'\0')
        return digest.hexdigest()[:32]

    def overlap(self, other: 'Selection') -> int:
        """Number of stored examples of the same dataset that are in both, each counted once."""
        return sum(
            len(np.intersect1d(self._indices(name), other._indices(name)))
            for name, split in self._splits.items()
            if other._splits.get(name) is split
        )

    def _indices(self, split: str) -> np.ndarray:
        """Of the examples of one stored split."""
        parts = [np.arange(first, end) for name, first, end in self._ranges if name == split]
        return np.concatenate([np.arange(0), *parts])


def coverage_notes(
    class_names: Sequence[str], train: np.ndarray, test: np.ndarray
) -> tuple[str, ...]:
    """Sentences on classes that a model never sees in training, or is never tested on.

    Args:
      class_names: C names, in label order.
      train: int [C], training images of each class.
      test: int [C], test images.
    """
    notes = []
    for missing, what in (
        (train == 0, 'no training images'),
        ((train == 1) & (test == 0), 'a single image, which is trained on, not tested'),
        ((train > 1) & (test == 0), 'no test images'),
    ):
        names = [class_names[label] for label in np.flatnonzero(missing).tolist()]
        if names:
            shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
            notes.append(f'of {len(class_names):,} classes, {len(names):,} with {what}: {shown}')
    return tuple(notes)


def numbered(count: int) -> tuple[str, ...]:
    """What classes without names are called: 'class 0', 'class 1', ..."""
    return tuple(f'class {i}' for i in range(count))


def check_class_names(names: Sequence[str], where: str) -> None:
    """Refuses names that could not be printed on one line or stored with the model.

    Args:
      names: of the classes.
      where: they come from, for the message.

    Raises:
      UserError: a name has control characters, line breaks or bytes that are not text.
    """
    for name in names:
        if any(unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') for c in name):
            raise UserError(
                f'{where}: the class name {ascii(name)} has control characters or bytes that are '
                'no text; rename it'
            )


def stratified_order(labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """A fixed shuffled order in which every slice holds each class in proportion.

    Each class is shuffled by itself; then the r-th of the n examples of a class gets the place (r +
    0.5) / n, and all are sorted by it. The last example of a small class, of 2 to 9, gets the place
    0.95, as that of 10, so that the last tenth has it; and where there are small classes, equal
    places are in random order, not in that of the classes.

    Args:
      labels: int [examples].
      seed: of the shuffles.

    Returns:
      int [examples], a permutation of the indices.
    """
    labels = np.asarray(labels)
    place, tie = np.empty(len(labels)), np.zeros(len(labels), np.uint64)
    counts = np.unique(labels, return_counts=True)
    for label, count in zip(*counts, strict=True):
        members = np.flatnonzero(labels == label)
        # Raw bits, because NumPy may change what `permutation` makes of them, and a later version
        # must not move test images into the training set.
        raw = np.random.PCG64([seed, int(label)]).random_raw(count)
        rank = np.argsort(np.argsort(raw))
        place[members] = (rank + 0.5) / count
        if 1 < count < _SMALL_CLASS:
            place[members[rank == count - 1]] = 1 - 0.5 / _SMALL_CLASS
        tie[members] = raw
    if len(labels) and counts[1].min() >= _SMALL_CLASS:
        tie[:] = 0  # as ever
    return np.lexsort((tie, place))


def held_out(labels: np.ndarray) -> int:
    """How many examples at the end of `stratified_order` to test on.

    A tenth of those whose class has two or more, and as many more as it takes to have one of each
    such class.

    Args:
      labels: int [examples], in that order.
    """
    last = {label: place for place, label in enumerate(labels.tolist())}
    counts = np.bincount(labels)
    several = [place for label, place in last.items() if counts[label] > 1]
    tenth = round(sum(counts[counts > 1]) / 10)
    return max([tenth, *(len(labels) - place for place in several)])


def _parse_split(spec: str, lengths: dict[str, int], dataset: str) -> list[tuple[str, int, int]]:
    """A split specification as [(split name, first, end)], by TFDS's own parser and rounding."""
    with extra('train'):
        from tensorflow_datasets.core import splits  # Not TensorFlow; half a second.

    infos = {
        name: splits.SplitInfo(name=name, shard_lengths=[n], num_bytes=0)
        for name, n in lengths.items()
    }
    have = ', '.join(f'{name} ({n:,} examples)' for name, n in lengths.items())
    advice = (
        f'{dataset} has: {have}. '
        'Examples: train, train[:90%], train[90%:], train[:1000], train[:10%]+test[:50]'
    )
    try:
        instructions = splits.AbstractSplit.from_spec(spec.strip()).to_absolute(infos)
    except Exception as error:  # noqa: BLE001  (TFDS raises several kinds for what the user wrote)
        reason = str(error).splitlines()[-1].split(' See format at')[0]
        raise UserError(
            f'split {spec!r} of {dataset} cannot be used: {reason.rstrip(".")}. {advice}'
        ) from error
    ranges = []
    for part in instructions:
        end = lengths[part.splitname] if part.to is None else part.to
        ranges.append((str(part.splitname), part.from_ or 0, end))
    ranges = [part for part in ranges if part[1] < part[2]]
    if not ranges:
        raise UserError(f'split {spec!r} of {dataset} has no examples. {advice}')
    return ranges
