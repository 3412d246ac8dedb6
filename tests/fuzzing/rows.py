"""Datasets whose labels stand in rows: tables, Arrow, Parquet, tar files, ArrayRecord."""

import csv
import io
import json
import os
import pathlib
import random
import runpy
import shutil
import tarfile
from collections.abc import Callable

import pyarrow
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from fuzzing import mutate
from vit_jax.data import sources

MADE = pathlib.Path(__file__).parents[1] / 'fixtures/data/made_sets.py'
KINDS = ('arrow', 'parquet', 'tar', 'array_record')
TABLES = ('labels.csv', 'labels.tsv', 'labels.jsonl', 'labels.parquet', 'metadata.csv')
HEADER = ('file_name', 'label', 'split', 'group', 'weight', 'value')


def make(root: pathlib.Path, pictures: list[bytes]) -> None:
    """Writes the folder `tables`, and one for each of `KINDS`."""
    made = runpy.run_path(str(MADE))
    rows = [(pictures[i % len(pictures)], i % 3, f'photo_{i}') for i in range(12)]
    for kind in KINDS:
        for part, some in (('train', rows[:9]), ('test', rows[9:])):
            path = root / kind / 'set' / f'{part}-00000-of-00001.{kind}'
            path.parent.mkdir(parents=True, exist_ok=True)
            made[f'write_{kind}'](path, some)
    folder = root / 'tables'
    (folder / 'img').mkdir(parents=True)
    table = []
    for number, (image, label, name) in enumerate(rows):
        (folder / 'img' / f'{name}.jpg').write_bytes(image)
        split = 'test' if number > 8 else 'train'
        table.append((f'img/{name}.jpg', 'abc'[label], split, f'g{number // 4}', 1, number / 2))
    for name in TABLES[:2] + TABLES[4:]:
        with open(folder / name, 'w', newline='') as file:
            writer = csv.writer(file, delimiter='\t' if name.endswith('tsv') else ',')
            writer.writerows([HEADER, *table])
    records = [dict(zip(HEADER, row, strict=True)) for row in table]
    (folder / TABLES[2]).write_text(''.join(json.dumps(record) + '\n' for record in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / TABLES[3])


def _open(name: pathlib.Path, columns: str, case: pathlib.Path, read_all: Callable) -> Callable:
    def read():
        os.environ['VIT_JAX_CACHE'] = str(case / 'cache')
        read_all(sources.open_dataset(str(name), columns=columns))

    return read


def tables(rng, corpus: pathlib.Path, case: pathlib.Path, read_all: Callable) -> Callable:
    """A damaged table."""
    shutil.copytree(corpus / 'tables', case / 'set')
    name = rng.choice(TABLES)
    for other in TABLES:
        if other != name:
            (case / 'set' / other).unlink()
    path = case / 'set' / name
    for _ in range(rng.choice((1, 1, 2))):
        path.write_bytes(_damage_table(rng, name, path.read_bytes()))
    columns = rng.choice(
        ('', '', 'label=label', 'labels=label', 'target=value', 'target=value+weight', 'label=x')
    )
    if rng.random() < 0.1:
        columns = rng.choice((*mutate.TEXTS, 'split=,group=', 'labels=weight+value', '=,=+'))
    whole = name.startswith('metadata')
    return _open(case / 'set' if whole else path, columns, case, read_all)


def _damage_table(rng: random.Random, name: str, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return mutate.damage(rng, data)
    if name.endswith('parquet'):
        return _damage_parquet(rng, data)
    text = data.decode('utf-8', 'replace')
    if name.endswith('jsonl'):
        lines = text.splitlines()
        place = rng.randrange(len(lines)) if lines else 0
        try:
            lines[place : place + 1] = [
                mutate.damage_json(rng, json.loads(lines[place])).decode('latin1')
            ]
        except (ValueError, IndexError):  # damaged before
            return mutate.damage(rng, data)
        return '\n'.join(lines).encode()
    separator = '\t' if name.endswith('tsv') else ','
    rows = [line.split(separator) for line in text.splitlines()]
    for _ in range(rng.choice((1, 2, 8))):
        row = rng.choice(rows[:1] if rows and rng.random() < 0.2 else rows or [['']])
        place = rng.randrange(len(row) + 1)
        action = rng.randrange(5)
        if action == 0:
            row.insert(place, _cell(rng))
        elif action == 1:
            del row[place : place + 1]
        else:
            row[place : place + 1] = [_cell(rng)]
    if rng.random() < 0.1:  # many rows, each a class of its own, or many in a cell
        more = rng.choice((1, 3000))
        rows += [
            ['img/photo_1.jpg', _many(rng, number), 'train', 'g', '1', '0']
            for number in range(more)
        ]
    text = '\n'.join(separator.join(row) for row in rows)
    return text.encode('utf-8', 'surrogatepass')


def _cell(rng: random.Random) -> str:
    return rng.choice(
        (
            lambda: str(rng.choice(mutate.NUMBERS)),
            lambda: rng.choice(mutate.TEXTS),
            lambda: rng.choice(('nan', 'inf', '1;2', 'a;b;;c', '"', '""', '"a\n', "'", '1_0', ' ')),
            lambda: rng.choice(('train', 'val', 'TEST', 'labels', 'image', 'path', 'weight')),
            lambda: rng.choice(('../img', '/', 'img', 'img/../..', 'img//photo_1.jpg', './', '~')),
        )
    )()


def _many(rng: random.Random, number: int) -> str:
    return rng.choice((f'c{number}', ';'.join(f'{number}.{i}' for i in range(9)), str(number / 7)))


def _damage_parquet(rng: random.Random, data: bytes) -> bytes:
    """Written anew with other types or values; else its bytes are damaged, the footer the most."""
    try:
        table = parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, UnicodeError):  # damaged before
        return mutate.damage(rng, data)
    if rng.random() < 0.5 or not table.num_columns:
        end = rng.choice((60, 2000))
        return data[:-end] + mutate.damage(rng, data[-end:])
    place = rng.randrange(table.num_columns)
    column = table.column(place)
    new = rng.choice(
        (
            lambda: pyarrow.nulls(table.num_rows),
            lambda: pyarrow.array([rng.choice(mutate.NUMBERS[:12])] * table.num_rows),
            lambda: pyarrow.array([[0, 1]] * table.num_rows),
            lambda: pyarrow.array([{'bytes': b'x', 'path': None}] * table.num_rows),
            lambda: pyarrow.array([{'a': [{}]}] * table.num_rows),
            lambda: column.combine_chunks().dictionary_encode(),
            lambda: pyarrow.array([b'\xff\xfe'] * table.num_rows),
            lambda: pyarrow.array([0.5] * table.num_rows),
        )
    )
    out = io.BytesIO()
    try:
        table = table.set_column(place, table.column_names[place], new())
        metadata = {'huggingface': _metadata(rng)} if rng.random() < 0.5 else None
        compression = rng.choice(('none', 'zstd', 'snappy'))
        parquet.write_table(table.replace_schema_metadata(metadata), out, compression=compression)
    except (pyarrow.ArrowException, UnicodeError):  # what Arrow or Parquet cannot hold
        return mutate.damage(rng, data)
    return out.getvalue()


def _metadata(rng: random.Random) -> bytes:
    """What Hugging Face says of the columns, damaged."""
    features = {
        'image': {'_type': 'Image'},
        'label': {'names': ['a', 'b', 'c'], '_type': 'ClassLabel'},
    }
    return mutate.damage_json(rng, {'info': {'features': features}})


def shards(kind: str) -> Callable:
    """The reader of a kind: a damaged file beside a whole one."""

    def prepare(rng, corpus: pathlib.Path, case: pathlib.Path, read_all: Callable) -> Callable:
        shutil.copytree(corpus / kind / 'set', case / 'set')
        path = rng.choice(sorted((case / 'set').iterdir()))
        for _ in range(rng.choice((1, 1, 2))):
            data = path.read_bytes()
            special = {'tar': _damage_tar, 'parquet': _damage_parquet, 'array_record': _records}
            if kind in special and rng.random() < 0.6:
                data = special[kind](rng, data)
            else:
                data = mutate.damage(rng, data)
            path.write_bytes(data)
        if rng.random() < 0.1:
            names = rng.choice(('a\nb', 'a', '\x1b[2J\n\n', '9' * 5000, '\n' * 9, ''))
            (case / 'set/classes.txt').write_text(names)
        if rng.random() < 0.1:
            new = rng.choice(('x-00000-of-99999999', 'val', 'train-test', 'a\nb', '\x1b[2J'))
            path.rename(path.with_name(f'{new}.{kind}'))
        columns = '' if rng.random() < 0.9 else rng.choice(('label=index', 'labels=label', 'x=y'))
        return _open(case / 'set', columns, case, read_all)

    return prepare


def _damage_tar(rng: random.Random, data: bytes) -> bytes:
    """Members with other names, types and sizes, and texts beside images."""
    out = io.BytesIO()
    form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            members = [(m, archive.extractfile(m).read()) for m in archive if m.isreg()]
    except (tarfile.TarError, OSError, AttributeError, ValueError, OverflowError, MemoryError):
        # damaged before
        return mutate.damage(rng, data)
    for _ in range(rng.choice((1, 2, 5))):
        if not members:
            break
        place = rng.randrange(len(members))
        member, content = members[place]
        action = rng.randrange(8)
        if action == 0:
            member.name = rng.choice(
                (*mutate.TEXTS, 'a' * 300, 'x.cls', 'x.', '.x.jpg', 'a/../b.jpg')
            )
        elif action == 1:
            member.type = rng.choice(
                (b'1', b'2', b'3', b'5', b'6', b'S', b'g', b'x', b'L', b'K', b'V')
            )
            member.linkname = rng.choice(('/etc/passwd', '../x', ''))
        elif action == 2:
            suffix = rng.choice(('cls', 'json', 'txt', 'jpg', 'png', 'npy', 'JPG', 'jpg.json'))
            member.name = f'{member.name.partition(".")[0]}.{suffix}'
        elif action == 3:
            content = rng.choice(
                (b'', b'nan', b'-1', b'9' * 900, b'[' * 90_000, b'{"label": [1, 2]}')
            )
        elif action == 4:
            content = mutate.damage_json(rng, {'label': 'daisy', 'split': 'test', 'weight': 1})
        elif action == 5:
            key = rng.choice(('size', 'path', 'comment', 'GNU.sparse.map'))
            value = rng.choice(('9' * 30, '-1', 'x' * 5000, '0,1,2', '\0'))
            member.pax_headers = {key: value}
        elif action == 6:
            del members[place]
            continue
        else:
            members.insert(place, (member, content))
        members[place] = member, content
    try:
        with tarfile.open(fileobj=out, mode='w', format=form) as archive:
            for member, content in members:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    except (tarfile.TarError, ValueError, UnicodeError, OSError):  # a name that cannot be written
        return mutate.damage(rng, data)
    data = bytearray(out.getvalue())
    if rng.random() < 0.5:  # a header with another size, and a checksum that fits
        place = 512 * rng.randrange(max(1, len(data) // 512))
        header = data[place : place + 512]
        if header[257:262] == b'ustar':
            header[124:136] = rng.choice(
                (b'77777777777\0', b'\x80' + b'\xff' * 11, b'-0000000001\0', b' ' * 12)
            )
            header[148:156] = b' ' * 8
            header[148:156] = b'%06o\0 ' % sum(header)
            data[place : place + 512] = header
    return bytes(data)


def _records(rng: random.Random, data: bytes) -> bytes:
    """An ArrayRecord file of damaged examples."""
    made = runpy.run_path(str(MADE))
    import tempfile

    records = [made['tf_example'](b'\xff\xd8\xff', number % 3) for number in range(8)]
    place = rng.randrange(8)
    records[place] = rng.choice(
        (
            lambda: mutate.damage(rng, records[place]),
            lambda: b'',
            lambda: rng.randbytes(200),
            lambda: made['tf_example'](b'', rng.choice((-1, 2**63 - 1, 7))),
            lambda: b'\n' * 50_000,
        )
    )()
    with tempfile.NamedTemporaryFile() as file:
        writer = ArrayRecordWriter(
            file.name, rng.choice(('group_size:1', 'group_size:4,uncompressed'))
        )
        for record in records:
            writer.write(record)
        writer.close()
        data = pathlib.Path(file.name).read_bytes()
    return mutate.damage(rng, data) if rng.random() < 0.3 else data


def read_undamaged(corpus: pathlib.Path, read_all: Callable) -> None:
    """Reads each as it was made."""
    cache = os.environ.get('VIT_JAX_CACHE')
    os.environ['VIT_JAX_CACHE'] = str(corpus / 'cache')
    for name in TABLES[:4]:
        read_all(sources.open_dataset(str(corpus / 'tables' / name)))
    for kind in KINDS:
        read_all(sources.open_dataset(str(corpus / kind / 'set')))
    shutil.rmtree(corpus / 'cache')
    if cache is not None:
        os.environ['VIT_JAX_CACHE'] = cache
