"""Tables of images: a row for each, with the path of its file and its label.

    image,label,split           {"image": "a.jpg", "label": "daisy"}
    a.jpg,daisy,train           {"image": "b.jpg", "label": "rose"}
    b.jpg,rose,test

CSV (`,`, `;` or tabs), JSON Lines and Parquet. Paths are relative to the folder of the table, or to
`image_root`; none may lead out of it. `columns.choose_columns` says how columns are found.
"""

import bisect
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vit_jax import files
from vit_jax.data import rows, table_files
from vit_jax.data.columns import Columns, choose_columns, has_label
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import BadImageError, read_file
from vit_jax.data.listing import is_folder
from vit_jax.data.splits import split_called
from vit_jax.data.table_files import Table
from vit_jax.errors import UserError

_METADATA = 'metadata'  # what Hugging Face calls the table of a folder
_CAPTIONS = 'captions'  # the same of captions

_logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A table, and the part of a dataset that it is.

    Attributes:
      path: of the file.
      split: of its rows, one of `splits.SPLITS`, where no column tells; '' for what the others say.
    """

    path: pathlib.Path
    split: str = ''


def find_metadata(folder: pathlib.Path, *, told: bool, captions: bool = False) -> list[Part]:
    """The tables of an "image folder" of Hugging Face: `metadata.csv`, `.jsonl` or `.parquet`.

    It stands in the folder, or in those of the splits; its column `file_name` has paths from there.

    Args:
      folder: of the dataset.
      told: whether the user says which columns there are; else a table without labels is left out,
        and the log says so.
      captions: whether captions are looked for: then also `captions.csv` and so on, in which paths
        stand in any column.
    """
    stems = (_CAPTIONS, _METADATA) if captions else (_METADATA,)
    parts = _metadata_in(folder, '', stems)
    if not parts:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if is_folder(entry) and (split := split_called(entry.name)):
                parts += _metadata_in(pathlib.Path(entry.path), split, stems)
    kept = []
    for part in parts:
        with table_files.opened(part.path) as (header, _):
            pass
        if 'file_name' not in header and part.path.stem != _CAPTIONS:
            continue
        if told or has_label(header):
            kept.append(part)
        else:
            _logger.warning('Note: %s is left out: it has no column of labels', part.path)
    return kept


def _metadata_in(folder: pathlib.Path, split: str, stems: Sequence[str]) -> list[Part]:
    paths = (folder / f'{s}{suffix}' for s in stems for suffix in ('.csv', '.jsonl', '.parquet'))
    return [Part(path, split) for path in paths if path.is_file()][:1]


def open_tables(
    parts: Sequence[Part],
    name: str,
    *,
    columns: str = '',
    image_root: str = '',
    channels: int = 3,
    max_unreadable: float = 1.0,
) -> Dataset:
    """Reads a table, or several that are one dataset.

    Args:
      parts: the files, each with one of `table_files.SUFFIXES`.
      name: how the user spelled the dataset.
      columns: see `columns.choose_columns`.
      image_root: the folder that paths start from; '' for that of the table.
      channels: of the images; with another number than 3, they may be .npy files.
      max_unreadable: see `rows.make_dataset`.

    Returns:
      A dataset whose images are read from disk on access, EXIF orientation honoured.

    Raises:
      UserError: a file is no table, or one that cannot be used, see `rows.make_dataset`.
    """
    root = (
        files.expand(image_root)
        if image_root
        else pathlib.Path(os.path.commonpath([os.path.abspath(part.path.parent) for part in parts]))
    )
    if not root.is_dir():
        raise UserError(f'config.image_root={image_root}: there is no such folder')
    found, table = _read(parts[0].path, columns)
    starts, names = [0], _names(parts[0], found, table, root, bool(image_root))
    splits = [parts[0].split] * len(names)
    for part in parts[1:]:
        chosen, more = _read(part.path, columns)
        if chosen != found:
            raise UserError(f'{part.path} has other columns than {parts[0].path}')
        starts.append(len(names))
        names += _names(part, chosen, more, root, bool(image_root))
        splits += [part.split] * len(more.numbers)
        table.faults.update({starts[-1] + row: why for row, why in more.faults.items()})
        table.numbers.extend(more.numbers)
        for column, values in table.values.items():
            values.extend(more.values[column])
    paths = [os.fspath(part.path) for part in parts]
    images = _Files(os.path.abspath(root), names, paths, starts, table.numbers)
    if parts[0].path.stem in (_METADATA, _CAPTIONS) and not parts[0].split:
        splits = _splits_of(names)
    return rows.make_dataset(
        name,
        images,
        found,
        table.values,
        faults=table.faults,
        splits=splits if all(splits) else None,
        channels=channels,
        max_unreadable=max_unreadable,
    )


def _names(part: Part, columns: Columns, table: Table, root: pathlib.Path, told: bool) -> list[str]:
    """Paths of the images of a table, from the root, which is told or above the table."""
    folder = '' if told else os.path.relpath(part.path.parent, root)
    names = [str(value or '').strip() for value in table.values[columns.image]]
    return [os.path.join(folder, name) if folder not in ('', '.') and name else name
            for name in names]  # fmt: skip


def _read(path: pathlib.Path, columns: str) -> tuple[Columns, Table]:
    """Which column is what, and the columns that are needed."""
    with table_files.opened(path) as (header, read):
        found = choose_columns(columns, header, str(path))
        return found, read((found.image, *found.others()))


def _splits_of(names: Sequence[str]) -> list[str]:
    """The first folder of each path, if all are called like a split; else nothing."""
    firsts = {name: split_called(os.path.normpath(name).split('/')[0]) for name in set(names)}
    return [firsts[name] or '' for name in names]


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """Images that are files below a folder.

    Attributes:
      root: absolute.
      names: of the rows: paths from `root`, or absolute ones below it; '' where there is none.
      tables: paths of the files that the rows are of.
      starts: the first row of each.
      numbers: of the rows in their file.
    """

    root: str
    names: Sequence[str]
    tables: Sequence[str]
    starts: Sequence[int]
    numbers: Sequence[int]

    def read(self, row: int) -> tuple[bytes, str]:
        path = self.path(row)
        try:
            if why := self._refused(row):
                raise BadImageError(path, why)
            return read_file(path), path
        except BadImageError as error:
            reason = f'{error.reason} ({self._row(row)} of {self._table(row)})'
            raise BadImageError(path, reason) from error

    def called(self, row: int) -> str:
        several = len(self.tables) > 1
        return f'{self._table(row)}, {self._row(row)}' if several else self._row(row)

    def _row(self, row: int) -> str:
        return f'row {self.numbers[row]:,}'

    def _table(self, row: int) -> str:
        return self.tables[bisect.bisect_right(self.starts, row) - 1]

    def path(self, row: int) -> str:
        return os.path.normpath(os.path.join(self.root, self.names[row]))

    def identity(self, row: int) -> str:
        return self.path(row).removeprefix(self.root.rstrip('/') + '/')

    def faults(self) -> Mapping[int, str]:
        """One look into each folder, instead of one at each file."""
        found: dict[int, str] = {}
        listed = functools.cache(_list)
        for row in range(len(self.names)):
            folder, _, name = self.path(row).rpartition('/')
            if why := self._refused(row):
                found[row] = why
            elif name not in listed(folder or '/'):
                found[row] = f'there is no file {self.names[row]:.200} in {self.root}'
        return found

    def _refused(self, row: int) -> str:
        """Why a path is not followed; '' if it is."""
        if not self.names[row]:
            return 'it names no image'
        if not self.path(row).startswith(self.root.rstrip('/') + '/'):
            return (
                f'the path {self.names[row]:.200} leads out of {self.root}; '
                '--config.image_root=FOLDER names another folder, / allows all'
            )
        return ''


def _list(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # no such folder, or no name that a folder can have
        return frozenset()
