"""Files of tables as columns: CSV (`,`, `;` or tabs), JSON Lines, Parquet."""

import contextlib
import csv
import itertools
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vit_jax import files
from vit_jax.data.columns import choose_columns
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


Opened = tuple[list[str], Callable[[Sequence[str]], Table]]


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Opened]:
    """Opens a file, by its suffix one of `SUFFIXES`.

    Yields:
      The names of its columns, and a function that reads those that it is given.

    Raises:
      UserError: from there or from the function: it is no such file, or cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f'{path} is not a regular file')
        if suffix == '.parquet':
            with _open_parquet(path) as found:
                yield found
            return
        with open(path, encoding='utf-8-sig', newline='') as file:
            yield _open_csv(file) if suffix in ('.csv', '.tsv') else _open_json(file)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror or error})') from error
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path} is not text in UTF-8 ({error.reason} at byte {error.start:,}): save it so'
        ) from error
    except csv.Error as error:
        raise UserError(f'{path} is no table of comma-separated values ({error})') from error


def has_paths(path: pathlib.Path, name: str, columns: str) -> bool:
    """Whether the images of a Parquet file are paths, and not the images themselves.

    Args:
      path: of the file.
      name: how the user spelled it.
      columns: see `columns.choose_columns`.

    Raises:
      UserError: the file cannot be read, or has no column of images.
    """
    with _open_parquet(path):
        import pyarrow
        from pyarrow import parquet

        schema = parquet.read_schema(path)
    kind = schema.field(choose_columns(columns, schema.names, name).image).type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _open_csv(file: Iterable[str]) -> Opened:
    lines = iter(file)
    first = next(lines, '')
    separator = max(',;\t', key=first.count)
    reader = csv.reader(itertools.chain([first], lines), delimiter=separator)
    header = [word.strip() for word in next(reader, [])]

    def read(columns: Sequence[str]) -> Table:
        wanted = {column: header.index(column) for column in columns}
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
        return table

    return header, read


def _open_json(file: Iterable[str]) -> Opened:
    records = _records(file)
    head = list(itertools.islice(records, _KEYS_FROM))

    def read(columns: Sequence[str]) -> Table:
        table = Table({column: [] for column in columns}, [], {})
        for number, record, fault in itertools.chain(head, records):
            if fault:
                table.faults[len(table.numbers)] = fault
            table.numbers.append(number)
            for column, values in table.values.items():
                values.append(record.get(column))
        return table

    return list(dict.fromkeys(key for _, record, _ in head for key in record)), read


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


@contextlib.contextmanager
def _open_parquet(path: pathlib.Path) -> Iterator[Opened]:
    with extra('parquet'):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:

            def read(columns: Sequence[str]) -> Table:
                table = file.read(list(columns))
                values = {column: table.column(column).to_pylist() for column in columns}
                return Table(values, list(range(1, table.num_rows + 1)), {})

            yield file.schema_arrow.names, read
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{path} is no Parquet file that can be read ({reason})') from error
