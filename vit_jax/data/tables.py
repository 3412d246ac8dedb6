"""Tables of images: a row for each, with the path of its file and its label.

    image,label,split           {"image": "a.jpg", "label": "daisy"}
    a.jpg,daisy,train           {"image": "b.jpg", "label": "rose"}
    b.jpg,rose,test

CSV (`,`, `;` or tabs), JSON Lines and Parquet. Paths are relative to the folder of the table, or to
`image_root`; none may lead out of it. `columns.choose_columns` says how columns are found.
"""

import csv
import dataclasses
import functools
import itertools
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vit_jax import files
from vit_jax.data import rows
from vit_jax.data.columns import Columns, choose_columns
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import BadImageError, read_file
from vit_jax.errors import UserError, extra

SUFFIXES = ('.csv', '.tsv', '.jsonl', '.ndjson', '.parquet')
_KEYS_FROM = 100  # lines of JSON whose keys are the columns


class Table(NamedTuple):
    """N rows as they were read.

    Attributes:
      values: the columns that were asked for, N values each.
      numbers: of the rows, as a person counts them: lines from 1 on, so that the first row of a CSV
        is row 2.
      faults: rows (indices) that are broken, and how; their values are None.
    """

    values: dict[str, list[Any]]
    numbers: list[int]
    faults: dict[int, str]


def open_table(
    path: pathlib.Path,
    name: str,
    *,
    columns: str = '',
    image_root: str = '',
    channels: int = 3,
    max_unreadable: float = 1.0,
) -> Dataset:
    """Reads a table.

    Args:
      path: of the file, one of `SUFFIXES`.
      name: how the user spelled it.
      columns: see `columns.choose_columns`.
      image_root: the folder that paths start from; '' for that of the table.
      channels: of the images; with another number than 3, they may be .npy files.
      max_unreadable: see `rows.make_dataset`.

    Returns:
      A dataset whose images are read from disk on access, EXIF orientation honoured.

    Raises:
      UserError: the file is no table, or one that cannot be used, see `rows.make_dataset`.
    """
    root = files.expand(image_root) if image_root else path.parent
    if not root.is_dir():
        raise UserError(f'config.image_root={image_root}: there is no such folder')
    found, table = _read(path, name, columns)
    images = _Files(os.path.abspath(root), [_path(v) for v in table.values[found.image]])
    return rows.make_dataset(
        name,
        images,
        found,
        table.values,
        numbers=table.numbers,
        faults=table.faults,
        channels=channels,
        max_unreadable=max_unreadable,
    )


def _path(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ''


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """Images that are files below a folder.

    Attributes:
      root: absolute.
      names: of the rows: paths from `root`, or absolute ones below it; '' where there is none.
    """

    root: str
    names: Sequence[str]

    def read(self, row: int) -> tuple[bytes, str]:
        path = self.path(row)
        if why := self._refused(row):
            raise BadImageError(path, why)
        return read_file(path), path

    def path(self, row: int) -> str:
        return os.path.normpath(os.path.join(self.root, self.names[row]))

    def identity(self, row: int) -> str:
        return os.path.relpath(self.path(row), self.root)

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


def _read(path: pathlib.Path, name: str, columns: str) -> tuple[Columns, Table]:
    """Which column is what, and the columns that are needed."""
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f'{name} is not a regular file')
        if suffix == '.parquet':
            return _read_parquet(path, name, columns)
        # errors: a line that is not UTF-8 is named, instead of an offset of bytes
        with open(path, encoding='utf-8-sig', newline='') as file:
            read = _read_csv if suffix in ('.csv', '.tsv') else _read_json
            return read(file, name, columns)
    except OSError as error:
        raise UserError(f'{name} cannot be read ({error.strerror or error})') from error
    except UnicodeDecodeError as error:
        raise UserError(
            f'{name} is not text in UTF-8 ({error.reason} at byte {error.start:,}): save it so'
        ) from error


def _read_csv(file: Iterable[str], name: str, columns: str) -> tuple[Columns, Table]:
    lines = iter(file)
    first = next(lines, '')
    separator = max(',;\t', key=first.count)
    try:
        reader = csv.reader(itertools.chain([first], lines), delimiter=separator)
        header = [word.strip() for word in next(reader, [])]
        found = choose_columns(columns, header, name)
        wanted = {column: header.index(column) for column in (found.image, *found.others())}
        table = Table({column: [] for column in wanted}, [], {})
        for number, cells in enumerate(reader, 2):
            if not cells:
                continue
            if len(cells) != len(header):
                table.faults[len(table.numbers)] = (
                    f'it has {len(cells)} cells, and the first line {len(header)}'
                )
                cells = [''] * len(header)
            table.numbers.append(number)
            for column, place in wanted.items():
                table.values[column].append(cells[place])
    except csv.Error as error:
        raise UserError(f'{name} is no table of comma-separated values ({error})') from error
    return found, table


def _read_json(file: Iterable[str], name: str, columns: str) -> tuple[Columns, Table]:
    records = _records(file)
    head = list(itertools.islice(records, _KEYS_FROM))
    keys = list(dict.fromkeys(key for _, record, _ in head for key in record))
    found = choose_columns(columns, keys, name)
    table = Table({column: [] for column in (found.image, *found.others())}, [], {})
    for number, record, fault in itertools.chain(head, records):
        if fault:
            table.faults[len(table.numbers)] = fault
        table.numbers.append(number)
        for column, values in table.values.items():
            values.append(record.get(column))
    return found, table


def _records(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(number, object, '') of each line that is not empty; or why it is none."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = files.parse_json(line)
        except ValueError as error:
            yield number, {}, f'it is not JSON ({error})'
            continue
        if isinstance(record, dict):
            yield number, record, ''
        else:
            yield number, {}, 'it is no JSON object'


def _read_parquet(path: pathlib.Path, name: str, columns: str) -> tuple[Columns, Table]:
    with extra('parquet'):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            found = choose_columns(columns, file.schema_arrow.names, name)
            wanted = [found.image, *found.others()]
            kind = file.schema_arrow.field(found.image).type
            if not pyarrow.types.is_string(kind) and not pyarrow.types.is_large_string(kind):
                raise UserError(f'{name}: the column {found.image} has no paths, but {kind}')
            read = file.read(wanted)
            values = {column: read.column(column).to_pylist() for column in wanted}
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{name} is no Parquet file that can be read ({reason})') from error
    return found, Table(values, list(range(1, read.num_rows + 1)), {})
