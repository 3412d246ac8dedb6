"""Datasets in files of many images (shards): which split a file is, and an index of what is in it.

The index tells for each image where it begins, so that any can be read alone, and what stands
beside it. It is made once, by reading all files, and kept in the cache; files that change (name,
size, time of change) get another.
"""

import array
import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock
import numpy as np

from vit_jax import files
from vit_jax.data import image_files, rows
from vit_jax.data.columns import Columns
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import MAX_BYTES, BadImageError
from vit_jax.data.listing import is_folder
from vit_jax.data.splits import split_called
from vit_jax.errors import UserError

# Suffixes of the files, by what they are.
KINDS = {
    'hugging_face': r'\.(arrow|parquet)',
    'webdataset': r'\.(tar|tar\.gz|tgz)',
    'array_record': r'\.array_?record(-\d+-of-\d+)?',
}
# Names of the classes, one a line, beside files that have numbers in place of names.
_NAMES_FILES = ('classes.txt', 'label.labels.txt')
_INDEX, _VERSION = 'index.npz', '1'
_MAX_FOLDERS = 50  # that are looked into to see what a folder is

_logger = logging.getLogger(__name__)


def kind_of(path: pathlib.Path) -> str:
    """Which of `KINDS` a file is, or a folder holds; '' for none, as for folders of classes.

    Files of many images that lie beside or in folders of classes (a backup) are not the dataset.
    """
    if not path.is_dir():
        return _kind_of_name(path.name)
    level, kind, with_images = [path], '', set[pathlib.Path]()
    for _ in range(3):
        below = []
        for folder in level[:_MAX_FOLDERS]:
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:  # whoever reads it says why
                continue
            for entry in entries:
                if entry.name.startswith('.'):
                    continue
                if is_folder(entry):
                    below.append(pathlib.Path(entry.path))
                elif image_files.is_image_name(entry.name):
                    with_images.add(folder)
                else:
                    kind = kind or _kind_of_name(entry.name)
            if len(with_images) > 1:
                return ''
        level = below
    return kind


def _kind_of_name(name: str) -> str:
    if name.startswith('cache-'):  # what the package datasets leaves beside its files
        return ''
    return next((kind for kind, suffix in KINDS.items() if re.search(suffix + '$', name, re.I)), '')


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a dataset.

    Attributes:
      path: of the file.
      name: from the folder of the dataset, for messages.
      split: one of `splits.SPLITS`.
    """

    path: pathlib.Path
    name: str
    split: str


def find(path: pathlib.Path, kind: str, dataset: str) -> list[Shard]:
    """The files of a dataset with the split of each, in the order of their names.

    The split is the last word of a file's path that is called like one, as Hugging Face's hub has
    it: `train-00000-of-00002.parquet`, `data/val/0.tar`; without any, all of it is `train`.

    Args:
      path: of a folder, or of one file.
      kind: one of `KINDS`.
      dataset: as the user spells it.

    Raises:
      UserError: some files tell a split and others do not, or one of N is missing.
    """
    root = path if path.is_dir() else path.parent
    found = [path] if not path.is_dir() else sorted(_walk(path, kind))
    names = [os.path.relpath(file, root) for file in found]
    splits = [_split_of(name) for name in names]
    if any(splits) and not all(splits):
        without, told = names[splits.index('')], names[[bool(s) for s in splits].index(True)]
        raise UserError(
            f'{dataset}: {told} tells by its name which split it is, {without} does not; rename '
            f'it, such as train-{pathlib.PurePath(without).name}, or take it out'
        )
    _check_numbers(names, dataset)
    return [
        Shard(file, name, split or 'train')
        for file, name, split in zip(found, names, splits, strict=True)
    ]


def _walk(root: pathlib.Path, kind: str) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            if not name.startswith('.') and _kind_of_name(name) == kind:
                yield pathlib.Path(folder, name)


def _split_of(name: str) -> str:
    words = [split_called(word) for word in re.split(r'[^A-Za-z]+', name)]
    return next(filter(None, reversed(words)), '') or ''


def _check_numbers(names: Sequence[str], dataset: str) -> None:
    """Notices that one of the files x-00000-of-00003, x-00001-of-00003, ... is missing."""
    counted: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
    for name in names:
        if found := re.fullmatch(r'(.*?)-(\d{1,9})-of-(\d{1,9})(.*)', name):
            counted[found[1], found[3], found[4]].add(int(found[2]))
    for (before, of, after), numbers in counted.items():
        if len(numbers) < int(of):
            missing = next(number for number in range(int(of)) if number not in numbers)
            raise UserError(
                f'{dataset}: of the {int(of):,} files {before}-*-of-{of}{after}, {len(numbers):,} '
                f'are there; {before}-{missing:0{len(of)}}-of-{of}{after} is missing'
            )


@dataclasses.dataclass(eq=False)
class Index:
    """What is in the files of a dataset: N rows, in their order.

    Attributes:
      values: the columns beside the images, N values each.
      names: of the rows, within their file: of a member, or a number.
      shard: int32 [N], of the file.
      offset: int64 [N], where the image begins; or its number, in files of records.
      size: int64 [N], of the image; 0 where there is none.
      faults: rows that cannot be used, and why.
      class_names: in the order of the labels, where these are numbers; else ().
    """

    values: dict[str, list[Any]]
    names: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    faults: dict[int, str]
    class_names: tuple[str, ...] = ()


class Builder:
    """Makes an `Index` row by row.

    Args:
      columns: the columns beside the images.
    """

    def __init__(self, columns: Sequence[str]):
        self.values: dict[str, list[Any]] = {column: [] for column in columns}
        self.class_names: tuple[str, ...] = ()
        self._names: list[str] = []
        self._places = array.array('q')  # three for each row
        self._faults: dict[int, str] = {}

    def add(
        self,
        shard: int,
        name: str,
        offset: int,
        size: int,
        values: Mapping[str, Any],
        fault: str = '',
    ) -> None:
        """Adds a row; see `Index`."""
        if fault:
            self._faults[len(self._names)] = fault
        self._names.append(name)
        self._places.extend((shard, offset, size))
        for column, known in self.values.items():
            known.append(values.get(column))

    def index(self) -> Index:
        """What was added."""
        places = np.array(self._places, np.int64).reshape(-1, 3)
        return Index(
            self.values,
            self._names,
            places[:, 0].astype(np.int32),
            places[:, 1].copy(),
            places[:, 2].copy(),
            self._faults,
            self.class_names,
        )


def key_of(shards: Sequence[Shard], *about: str) -> str:
    """Tells files, as they are now, from others and from what they were before.

    Raises:
      UserError: one cannot be read.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, *about]).encode())
    for shard in shards:
        try:
            status = os.stat(shard.path)
        except OSError as error:
            raise UserError(f'{shard.path} cannot be read ({error.strerror})') from error
        told = [os.path.abspath(shard.path), status.st_size, status.st_mtime_ns, shard.split]
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()[:32]


def cached(
    folder: pathlib.Path, make: Callable[[pathlib.Path], Index], *, beside: bool = False
) -> Index:
    """The index that is kept in a folder of the cache, or a new one.

    Args:
      folder: of this dataset alone; need not be there.
      make: makes the index, given a folder for what is to be kept beside it.
      beside: whether there is something, so that the index alone is of no use.

    Raises:
      UserError: of `make`; or, where something is kept beside it, the cache cannot be written.
    """
    with _alone(folder):
        try:
            return _load(folder / _INDEX)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            pass  # none, or damaged
        if beside:
            with files.atomic_folder(folder, exists='replace') as part:
                index = make(part)
                _save(part / _INDEX, index)
            return index
        index = make(folder)
        try:
            with files.atomic_folder(folder, exists='replace') as part:
                _save(part / _INDEX, index)
        except UserError as error:
            _logger.warning('Note: the index is not kept, and made again next time: %s', error)
        return index


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Waits for other processes of this machine that make the same index."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f'{folder}.lock', fallback_to_soft=False)
        lock.acquire()
    except OSError:  # a cache that cannot be written, or a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _save(path: pathlib.Path, index: Index) -> None:
    told = [index.values, index.names, [*index.faults.items()], index.class_names]
    text = json.dumps(told, default=str).encode()
    arrays = {name: getattr(index, name) for name in ('shard', 'offset', 'size')}
    with open(path, 'wb') as file:
        np.savez(file, told=np.frombuffer(text, np.uint8), **arrays)


def _load(path: pathlib.Path) -> Index:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as stored:
        values, names, faults, class_names = json.loads(stored['told'].tobytes())
        shard, offset, size = (stored[name] for name in ('shard', 'offset', 'size'))
    if any(known.shape != (len(names),) for known in (shard, offset, size)):
        raise ValueError('the index does not fit itself')
    return Index(values, names, shard, offset, size, dict(faults), tuple(class_names))


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The images of an index, as `rows.make_dataset` takes them; `read` says how they are read.

    Attributes:
      index: of N rows.
      shards: the files of the dataset.
    """

    index: Index
    shards: Sequence[Shard]

    def read(self, row: int) -> tuple[bytes, str]:
        """See `rows.Images`."""
        raise NotImplementedError

    def called(self, row: int) -> str:
        """See `rows.Images`."""
        return f'{self.shards[int(self.index.shard[row])].path}/{self.index.names[row]}'

    def identity(self, row: int) -> str:
        """See `rows.Images`."""
        shard = self.shards[int(self.index.shard[row])].name
        return f'{shard}/{self.index.names[row]}/{self.index.size[row]}'

    def path(self, row: int) -> None:
        """See `rows.Images`."""

    def faults(self) -> Mapping[int, str]:
        """See `rows.Images`."""
        return dict.fromkeys(np.flatnonzero(self.index.size <= 0).tolist(), 'it has no image')


@dataclasses.dataclass(frozen=True, eq=False)
class Spans(Images):
    """Images that are parts of files.

    Attributes:
      stored: the files that they are parts of: those of the dataset, or one that was made of them.
    """

    stored: Sequence[pathlib.Path]

    def read(self, row: int) -> tuple[bytes, str]:
        """See `rows.Images`."""
        key, size = self.called(row), int(self.index.size[row])
        if not 0 < size <= MAX_BYTES:
            raise BadImageError(key, f'it has {size:,} bytes')
        path = self.stored[int(self.index.shard[row]) if len(self.stored) > 1 else 0]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(descriptor, size, int(self.index.offset[row]))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadImageError(key, f'{path} cannot be read ({error.strerror})') from error
        if len(data) < size:
            raise BadImageError(key, f'{path} ends before it does')
        return data, key


def make_dataset(
    name: str,
    images: Images,
    columns: Columns,
    root: pathlib.Path,
    **options: Any,
) -> Dataset:
    """The dataset that an index tells of; a column for the split goes before names of files.

    Args:
      name: as the user spells it.
      images: with their index.
      columns: which of its values is what.
      root: the folder, where `classes.txt` may be.
      **options: see `rows.make_dataset`.

    Raises:
      UserError: see `rows.make_dataset`.
    """
    index = images.index
    splits = [images.shards[shard].split for shard in index.shard.tolist()]
    class_names = index.class_names or _names_beside(root)
    return rows.make_dataset(
        name, images, columns, index.values, faults=index.faults, splits=splits,
        class_names=class_names, **options,
    )  # fmt: skip


def _names_beside(root: pathlib.Path) -> tuple[str, ...]:
    for name in _NAMES_FILES:
        if (root / name).is_file():
            return tuple(line.strip() for line in files.read_text(root / name).splitlines())
    return ()
