"""Datasets as all storages give them: splits, and selections of splits.

Whatever the storage, a `Source` is a selection of examples from the named splits of a dataset,
written in the split grammar of TensorFlow Datasets (https://www.tensorflow.org/datasets/splits):
`train`, `train[:90%]`, `train[1000:]`, `train[:10%]+validation`; and, what is held out by rule and
what is left, `10% of train[:90%]` and `train[:90%] without 10%`. Nothing here imports TensorFlow.
"""

import bisect
import concurrent.futures
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data import holdout, splits
from vit_jax.data.examples import CLASS_INDEX, Example, Split
from vit_jax.errors import UserError

# Examples in a stored split, in the order of a selection.
Places = range | np.ndarray
# Of so many examples, the labels are read where that is what it takes to hold some out.
MAX_READ = 100_000


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All splits of a dataset, from which `select` takes examples.

    Attributes:
      name: as the user spells it.
      class_names: in the order of the labels.
      exif: see `examples.Source`.
      splits: the stored splits by name.
      channels: see `examples.channels_of`.
      label_dtype: see `examples.label_dtype_of`.
      units: of labels that are known to be numbers, see `inference.task.Task`; else ().
      several: whether vectors are known to be a yes or no for each class.
    """

    name: str
    class_names: tuple[str, ...]
    exif: bool
    splits: Mapping[str, Split]
    channels: int = 3
    label_dtype: np.dtype = CLASS_INDEX
    units: tuple[str, ...] = ()
    several: bool = False

    def select(self, spec: str) -> 'Selection':
        """Takes the examples that a split specification names.

        Args:
          spec: in TFDS's grammar, for example `train[:90%]`. Percentages are rounded to the closest
            example. Of such a split, `10% of SPLIT` and `SPLIT without 10%` are the two parts that
            `Selection.hold_out` gives, `fold 2/5 of SPLIT` and `SPLIT without fold 2/5` those of
            `Selection.fold`, and `SPLIT without OTHER` is what `Selection.without` gives.

        Returns:
          The examples in the order of the specification.

        Raises:
          UserError: a specification that cannot be read, an unknown split, a slice beyond the
            split, no examples.
        """
        if found := re.fullmatch(r'\s*([\d.]+\s*%|fold \d+/\d+) of (.*)', spec):
            return self.select(found[2])._divide(found[1])[1]
        whole, without, other = spec.rpartition(' without ')
        if not without:
            return self._stored(spec)
        if splits.is_share(other) or other.startswith('fold '):
            return self.select(whole)._divide(other)[0]
        return self.select(whole).without(self._stored(other))

    def _stored(self, spec: str) -> 'Selection':
        """The examples that TFDS's grammar names."""
        lengths = {name: len(split) for name, split in self.splits.items()}
        ranges = splits.parse(spec, lengths, self.name)
        return Selection(self, spec, [(name, range(a, b)) for name, a, b in ranges])

    @property
    def first(self) -> str:
        """The split to train on: `train`, or the first one."""
        return 'train' if 'train' in self.splits else next(iter(self.splits))

    def default_specs(self) -> tuple[str, str]:
        """The specifications of training and test examples to use when the user gives none.

        The `test` split if there is one, else `validation`, else the last tenth of `train`, and
        more where that lacks a class of two images or more (`holdout.held_out`); where examples are
        in groups, whole groups (`Selection.hold_out`).

        Raises:
          UserError: no class has two images.
        """
        for name in ('test', 'validation'):
            if name in self.splits and 'train' in self.splits:
                return 'train', name
        first = self.first
        if getattr(self.splits[first], 'groups', None) is not None:
            return f'{first} without 10%', f'10% of {first}'
        classes = self.label_dtype == CLASS_INDEX
        labels = getattr(self.splits[first], 'labels', None) if classes else None
        smallest = holdout.SMALL_CLASS
        if labels is None or np.unique(labels, return_counts=True)[1].min() >= smallest:
            return f'{first}[:90%]', f'{first}[90%:]'
        count = holdout.held_out(labels)
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
      spec: the split specification that `parts` were made from.
      parts: (split name, places in it): a `range` of step 1, or int [n]; at least one, none empty.

    Attributes:
      class_names: see `examples.Source`.
      exif: see `examples.Source`.
      channels: see `examples.channels_of`.
      label_dtype: see `examples.label_dtype_of`.
      units: see `Dataset`.
      several: see `Dataset`.
      spec: the split specification.
    """

    def __init__(self, dataset: Dataset, spec: str, parts: Sequence[tuple[str, Places]]):
        self.class_names = dataset.class_names
        self.exif = dataset.exif
        self.channels = dataset.channels
        self.label_dtype = dataset.label_dtype
        self.units = dataset.units
        self.several = dataset.several
        self.spec = spec
        self._dataset = dataset
        self._parts = tuple(parts)
        self._splits = {name: dataset.splits[name] for name, _ in parts}
        self._ends = tuple(itertools.accumulate(len(places) for _, places in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """Reads example `index`, 0-based; IndexError beyond the end and below 0."""
        if not 0 <= index < len(self):
            raise IndexError(f'{self!r} has no example {index}')
        place = bisect.bisect_right(self._ends, index)
        name, places = self._parts[place]
        return self._splits[name].read(int(places[int(index) - self._ends[place]]))

    def __repr__(self) -> str:
        return f'{self._dataset.name} {self.spec} ({len(self):,} examples)'

    def labels(self) -> np.ndarray | None:
        """Classes, int [examples], where they are known without reading; None where they are not.

        Known are those of folders, tables, digits and arrays; those of TFDS sets stand in the
        records.
        """
        return self.targets() if self.label_dtype == CLASS_INDEX else None

    def targets(self) -> np.ndarray | None:
        """Labels of any kind, [examples, ...], as `labels`."""
        return self._array('labels')

    def groups(self) -> np.ndarray | None:
        """What each example belongs to (a patient, a scene), str [examples]; None if not known."""
        return self._array('groups')

    def weights(self) -> np.ndarray | None:
        """How much each example counts in training, float32 [examples]; None for all alike."""
        return self._array('weights')

    def captions(self) -> list[tuple[str, ...]] | None:
        """Those of all examples, where they are known without reading; else None."""
        parts = self._known('captions')
        return parts if parts is None else [texts for part in parts for texts in part]

    def paths(self) -> list[str] | None:
        """The files of all examples, where each is a file; else None."""
        parts = self._known('paths')
        return parts if parts is None else [path for part in parts for path in part]

    def _array(self, attribute: str) -> np.ndarray | None:
        parts = self._known(attribute)
        return parts if parts is None else np.concatenate(parts)

    def _known(self, attribute: str) -> list[Any] | None:
        """The parts of what the stored splits know of each example; None if one does not."""
        parts = []
        for name, places in self._parts:
            known = getattr(self._splits[name], attribute, None)
            if known is None:
                return None
            if isinstance(places, range):
                parts.append(known[places.start : places.stop])
            else:
                parts.append([known[place] for place in places.tolist()])
        return parts

    def fingerprint(self) -> str:
        """Tells whether this is the same sequence of examples as another time; no image is read.

        It covers the names and sizes of the stored splits (of a folder the names of all
        files, below the split's folder), and which part of them this is.
        """
        digest = hashlib.sha256()
        for name, places in self._parts:
            if isinstance(places, range):
                digest.update(f'{name}\0{places.start}\0{places.stop}\0'.encode())
            else:
                digest.update(f'{name}\0'.encode() + places.astype('<i8').tobytes())
            texts = iter(self._splits[name].identity())
            while some := list(itertools.islice(texts, 10_000)):
                digest.update(('\0'.join(some) + '\0').encode(errors='surrogateescape'))
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
        parts = [np.asarray(places) for name, places in self._parts if name == split]
        return np.concatenate([np.arange(0), *parts])

    def part(self, indices: np.ndarray, spec: str) -> 'Selection':
        """Some of these examples, in the order that they have here.

        Args:
          indices: int [n], increasing, of at least one example.
          spec: see `Selection`.
        """
        parts, first = [], 0
        for (name, places), end in zip(self._parts, self._ends, strict=True):
            chosen = indices[(first <= indices) & (indices < end)] - first
            if len(chosen):
                parts.append((name, np.asarray(places)[chosen]))
            first = end
        return Selection(self._dataset, spec, parts)

    def without(self, other: 'Selection') -> 'Selection':
        """The examples that are not in another selection of the same dataset; all: this itself.

        Raises:
          UserError: none is left.
        """
        kept = [
            ~np.isin(places, other._indices(name))
            if other._splits.get(name) is self._splits[name]
            else np.ones(len(places), bool)
            for name, places in self._parts
        ]
        indices = np.flatnonzero(np.concatenate(kept))
        if not len(indices):
            raise UserError(f'{self!r}: without {other.spec} nothing is left')
        return (
            self
            if len(indices) == len(self)
            else self.part(indices, f'{self.spec} without {other.spec}')
        )

    def hold_out(self, share: str) -> 'tuple[Selection, Selection]':
        """Splits off a share that has each class in proportion, the same every time.

        Of each class with two examples or more, one at least is in either part; see
        `holdout.choose`. Examples in groups are held out by whole groups, see
        `holdout.choose_groups`. Labels that are not known are read; of more than `MAX_READ`
        examples they are not, and any of the examples are taken.

        Args:
          share: such as `10%`.

        Returns:
          What is left, and what is held out, both in the order that the examples have here.

        Raises:
          UserError: the share is not from above 0 to 50 %, or no class has two examples.
        """
        part, groups = splits.share_of(share), self.groups()
        if groups is None:
            held = holdout.choose(self._classes(), part)
        else:
            held = holdout.choose_groups(self._classes(), groups, part)
        if not len(held):
            raise UserError(
                f'no class of {self!r} has two images, so that none can be held out of training: '
                'add images, or name a split for --config.pp.val'
            )
        left = np.setdiff1d(np.arange(len(self)), held)
        return (
            self.part(left, f'{self.spec} without {share}'),
            self.part(held, f'{share} of {self.spec}'),
        )

    def fold(self, text: str) -> 'tuple[Selection, Selection]':
        """One fold of several, for cross-validation; see `holdout.folds`.

        Args:
          text: such as `2/5`, the second of five.

        Returns:
          The other folds, and this one, in the order that the examples have here.

        Raises:
          UserError: no such fold, or too few examples for so many.
        """
        fold, number = splits.fold_of(text)
        there = holdout.folds(self._classes(), self.groups(), number) == fold - 1
        if there.all() or not there.any():
            raise UserError(
                f'{self!r}: groups of such sizes leave a fold of {number} without images'
            )
        text = f'fold {fold}/{number}'
        return (
            self.part(np.flatnonzero(~there), f'{self.spec} without {text}'),
            self.part(np.flatnonzero(there), f'{text} of {self.spec}'),
        )

    def _divide(self, what: str) -> 'tuple[Selection, Selection]':
        """`hold_out` of a share, or a `fold`."""
        if what.startswith('fold '):
            return self.fold(what.removeprefix('fold '))
        return self.hold_out(what)

    def _classes(self) -> np.ndarray:
        """Int [examples]: class of each, of other labels `holdout.strata`.

        All alike where there are none, or too many to read.
        """
        same = np.zeros(len(self), np.int64)
        if self.label_dtype != CLASS_INDEX:
            targets = self.targets()
            return same if targets is None else holdout.strata(targets)
        labels = self.labels()
        if labels is None and len(self) <= MAX_READ:
            with concurrent.futures.ThreadPoolExecutor() as threads:
                labels = np.array(list(threads.map(self._class, range(len(self)))))
        return same if labels is None else labels

    def _class(self, index: int) -> int:
        """The class of an example; one more than the last where its record is damaged."""
        try:
            return int(self[index].label)
        except UserError as error:
            label = getattr(error, 'label', None)
            return len(self.class_names) if label is None else label
