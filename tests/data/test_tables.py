"""Tables of images: columns, labels of each kind, splits, and rows that cannot be used."""

import csv
import io
import json
import os

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from vit_jax.data import sources
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import CLASS_INDEX
from vit_jax.errors import UserError

HEADER = ('image', 'label')


def image_bytes(value=0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(file, 'PNG')
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    """A folder with img/0.png to img/39.png, each of its own grey."""
    (tmp_path / 'img').mkdir()
    for number in range(40):
        (tmp_path / f'img/{number}.png').write_bytes(image_bytes(number))
    return tmp_path


def write(path, rows, header=HEADER, separator=','):
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return str(path)


def rows_of(count, **more):
    """Rows of three quarters 'rose' and a quarter 'daisy'."""
    return [
        (f'img/{i}.png', 'daisy' if i % 4 == 3 else 'rose', *more.values()) for i in range(count)
    ]


def grey(example):
    """The number of the image."""
    return int(os.path.basename(example.key).removesuffix('.png'))


def records(rows, header=HEADER):
    return [dict(zip(header, row, strict=True)) for row in rows]


def write_as(form, root, rows, header=HEADER):
    path = root / f'labels.{form}'
    if form in ('csv', 'tsv'):
        return write(path, rows, header, '\t' if form == 'tsv' else ',')
    if form == 'jsonl':
        path.write_text('\n\n'.join(json.dumps(record) for record in records(rows, header)))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records(rows, header)), path)
    return str(path)


@pytest.mark.parametrize('form', ['csv', 'tsv', 'jsonl', 'parquet'])
def test_a_table_is_held_out_from_like_a_folder(root, form):
    for number, (image, label) in enumerate(rows_of(40)):
        folder = root / 'folder' / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{number:02}.png').write_bytes((root / image).read_bytes())
    by_class = sorted(rows_of(40), key=lambda row: (row[1], int(row[0][4:-4])))
    train, test = sources.open_sources(write_as(form, root, by_class))
    of_folder = sources.open_sources(str(root / 'folder'))
    assert train.class_names == ('daisy', 'rose') and train.label_dtype == CLASS_INDEX
    assert (train.spec, test.spec) == ('train[:90%]', 'train[90%:]') and train.exif
    for ours, theirs in zip((train, test), of_folder, strict=True):
        assert np.array_equal(ours.labels(), theirs.labels())
        for place in range(len(ours)):
            a, b = ours[place], theirs[place]
            assert (a.image, a.label) == (b.image, b.label) and grey(a) == grey(b)
    assert train.paths() == [train[i].key for i in range(len(train))]
    assert train.weights() is train.groups() is None


def test_columns_found_and_told(root, caplog):
    header = ('file', 'kind', 'where', 'w', 'who', 'label')
    rows = [(i, k, ('train', 'VAL', 'Testing')[n % 3], 0.5 + n % 2, f'p{n // 8}', 'x')
            for n, (i, k) in enumerate(rows_of(36))]  # fmt: skip
    path = write(root / 'labels.csv', rows, header, ';')
    data = sources.open_dataset(path, columns='label=kind, split=where,weight=w,group=who')
    assert 'a class from kind, split from where, group from who, weight from w' in caplog.text
    assert list(data.splits) == ['train', 'validation', 'test']
    assert data.default_specs() == ('train', 'test')
    for name, remainder in (('train', 0), ('validation', 1), ('test', 2)):
        part = data.select(f'{name}[2:]')
        numbers = [grey(part[i]) for i in range(len(part))]
        assert len(numbers) == 10 and {n % 3 for n in numbers} == {remainder}
        assert part.weights().tolist() == [0.5 + n % 2 for n in numbers]
        assert part.weights().dtype == np.float32
        assert part.groups().tolist() == [f'p{n // 8}' for n in numbers]
        assert part.labels().tolist() == [int(n % 4 != 3) for n in numbers]
    assert sources.open_dataset(path, columns='label=kind,split=').select('train').spec == 'train'


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('label=speces', 'no column speces .*did you mean species'),
        ('label', "'label' is not ROLE=COLUMN; roles are image, label"),
        ('class=species', "'class=species' is not ROLE=COLUMN"),
        ('label=species,labels=species', 'label and labels exclude each other'),
        ('image=path+species', 'image is one column'),
        ('image=', 'has no column that is called like one of the images'),
    ],
)
def test_columns_told_wrong(root, text, words):
    path = write(root / 'labels.csv', rows_of(8), ('path', 'species'))
    with pytest.raises(UserError, match=words):
        sources.open_dataset(path, columns=text)


def test_labels_of_each_kind(root):
    def opened(labels, header=('label',), columns=''):
        rows = [(f'img/{n}.png', *cells) for n, cells in enumerate(labels)]
        data = sources.open_dataset(
            write(root / 'labels.csv', rows, ('image', *header)), columns=columns
        )
        found = data.select('train')
        order = np.argsort([grey(found[i]) for i in range(len(found))])
        labels = np.array([found[int(i)].label for i in order])
        assert np.array_equal(found.targets()[order], labels)
        return data.class_names, data.several, data.label_dtype, labels.tolist()

    one = (False, CLASS_INDEX)
    assert opened([['10'], ['9'], ['10']]) == (('9', '10'), *one, [1, 0, 1])
    assert opened([['1.0'], ['3.0']]) == (('1', '3'), *one, [0, 1])
    assert opened([['b c'], [' a ']]) == (('a', 'b c'), *one, [1, 0])
    vectors = np.dtype((np.float32, (3,)))
    lists = [['b;a'], ['c'], ['']]
    expected = (('a', 'b', 'c'), True, vectors, [[1, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert opened(lists) == expected
    names = ('a', 'b', 'c')
    binary = [['1', '1', '0'], ['0', '0', '1'], ['0', '0', '0']]
    assert opened(binary, names, 'labels=a+b+c') == expected
    assert opened(lists, columns='label=label')[0] == ('b;a', 'c')
    two, single = np.dtype((np.float32, (2,))), np.dtype((np.float32, (1,)))
    assert opened([['0', '2.5'], ['1', '3']], ('x', 'y'), 'target=x+y') == (
        ('x', 'y'), False, two, [[0, 2.5], [1, 3]],
    )  # fmt: skip
    assert opened([['0.5'], ['-2']]) == (('label',), False, single, [[0.5], [-2]])
    assert opened([['3'], ['5']], ('age',), 'target=age')[1:] == (False, single, [[3], [5]])


def test_rows_that_cannot_be_used_are_named(root, caplog):
    rows = rows_of(30, split='train')
    rows += [
        ('img/30.png', '', 'train'),  # row 32: the header is row 1
        ('img/31.png', 'nan', 'train'),
        ('img/32.png', 'rose', 'tset'),
        ('img/33.png', 'rose'),
        ('img/nowhere.png', 'rose', 'train'),
        ('../secret.png', 'rose', 'train'),
        ('/etc/hostname', 'daisy', 'train'),
        ('', 'daisy', 'train'),
    ]
    path = write(root / 'labels.csv', rows, (*HEADER, 'split'))
    (root.parent / 'secret.png').write_bytes(image_bytes())
    data = sources.open_dataset(path)
    train = data.select('train')
    assert len(train) == 34 and list(data.splits) == ['train']
    for words in (
        '4 of 38 rows cannot be used',
        'row 32: its label is empty',
        'row 33: its label is empty',
        "row 34: its split 'tset' is none of train, validation, test",
        'row 35: it has 2 cells, and the first line 3',
        '4 of 38 rows have no image',
        'row 36: there is no file img/nowhere.png',
        f'row 37: the path ../secret.png leads out of {root}',
        'row 38: the path /etc/hostname leads out of',
        'row 39: it names no image',
    ):
        assert words in caplog.text
    errors = []
    for index in range(34):
        try:
            assert train[index].image
        except BadImageError as error:
            errors.append(error)
    assert sorted(error.reason[error.reason.index('(row') :] for error in errors) == [
        f'(row {row} of {path})' for row in (36, 37, 38, 39)
    ]
    assert {train.class_names[error.label] for error in errors} == {'daisy', 'rose'}
    with pytest.raises(UserError, match=r'row 32.*more than config.max_unreadable=0.2 of them'):
        sources.open_sources(path, max_unreadable=0.2)
    sources.open_sources(path, max_unreadable=8 / 38)


def test_broken_lines_of_json_and_bad_weights(root, caplog):
    good = [json.dumps(record) for record in records(rows_of(12))]
    lines = [*good, '{"image": ', '[1]', '', json.dumps({'image': 'img/13.png'}), '[' * 10_000]
    (root / 'labels.jsonl').write_text('\n'.join(lines))
    assert len(sources.open_dataset(str(root / 'labels.jsonl')).select('train')) == 12
    for words in ('row 13: it is not JSON', 'row 14: it is no JSON object', 'row 16: its label'):
        assert words in caplog.text
    header = (*HEADER, 'weight')
    rows = [
        (*row, weight) for row, weight in zip(rows_of(6), '1 -1 inf 3 x 2'.split(), strict=True)
    ]
    data = sources.open_dataset(write(root / 'labels.csv', rows, header))
    assert sorted(data.select('train').weights().tolist()) == [1, 2, 3]
    assert "row 3: its weight '-1' is no number from 0 on" in caplog.text


def test_the_root_of_the_images(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    path = write(elsewhere / 'labels.csv', rows_of(8))
    with pytest.raises(UserError, match='8 of 8 rows have no image'):
        sources.open_sources(path, max_unreadable=0.5)
    data = sources.open_dataset(path, image_root=str(root))
    before = data.select('train').fingerprint()
    absolute = [(str(root / image), label) for image, label in rows_of(8)]
    path = write(elsewhere / 'labels.csv', absolute)
    assert sources.open_dataset(path, image_root=str(root)).select('train').fingerprint() == before
    assert sources.open_dataset(path, image_root='/').select('train')[0].image
    with pytest.raises(UserError, match='there is no such folder'):
        sources.open_dataset(path, image_root=str(root / 'nothing'))


def test_the_fingerprint_tells_of_labels_weights_and_files(root):
    def fingerprint(rows, header=HEADER):
        data = sources.open_dataset(write(root / 'labels.csv', rows, header))
        return data.select('train[:4]').fingerprint()

    header = (*HEADER, 'weight')
    seen = [
        fingerprint(rows_of(8)),
        fingerprint([('img/9.png', 'rose'), *rows_of(8)[1:]]),
        fingerprint([('img/0.png', 'daisy'), *rows_of(8)[1:]]),
        fingerprint([(*row, 1) for row in rows_of(8)], header),
        fingerprint([(*row, 2) for row in rows_of(8)], header),
    ]
    assert len(set(seen)) == 5 and fingerprint(rows_of(8)) == seen[0]


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('', 'has no column that is called like'),
        ('image,label\n', 'has no rows'),
        ('image,label\nimg/0.png,a\nimg/1.png,a\n', 'one class only: a'),
        ('image,label\nimg/0.png,\n', 'row 2: its label is empty'),
        ('a.png,cat\nb.png,dog\n', 'it has a.png, cat. Say which it is: --config.columns=image'),
        ('image,label,split\nimg/0.png,a,train\nimg/1.png,b,train\nimg/2.png,c,test\n',
         'test has classes that training does not know: c'),
        ('image,label\nimg/0.png,"a\x1bb"\nimg/1.png,c\n', 'control characters'),
        ('image,label\nimg/0.png,"' + 'x' * 200_000, 'no table of comma-separated values'),
        (b'image,label\n\xff\xfe', 'not text in UTF-8'),
        ('image,label\n' + ''.join(f'img/{i}.png,{i};{-i}\n' for i in range(1, 700)),
         '1,398 different labels of 699 rows'),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(root, content, words):
    data = content if isinstance(content, bytes) else content.encode()
    (root / 'labels.csv').write_bytes(data)
    with pytest.raises(UserError, match=words):
        sources.open_dataset(str(root / 'labels.csv'))


def test_what_is_no_table(root):
    with pytest.raises(UserError, match='there is no table x.csv'):
        sources.open_dataset('x.csv')
    (root / 'labels.txt').write_text('')
    with pytest.raises(UserError, match='a file, but no table'):
        sources.open_dataset(str(root / 'labels.txt'))
    (root / 'labels.parquet').write_bytes(b'PAR1 and no more')
    with pytest.raises(UserError, match='no Parquet file that can be read'):
        sources.open_dataset(str(root / 'labels.parquet'))
    with pytest.raises(UserError, match="config.columns='label=x' is for tables"):
        sources.open_dataset('digits', columns='label=x')
    os.mkfifo(root / 'pipe.csv')
    with pytest.raises(UserError, match='not a regular file'):
        sources.open_dataset(str(root / 'pipe.csv'))
