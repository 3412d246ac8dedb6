"""Files of many images: Hugging Face's Arrow and Parquet, WebDataset, ArrayRecord."""

import contextlib
import io
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from vit_jax.data import loader, shards, sources
from vit_jax.data.batches import eval_batches
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

MADE = runpy.run_path(str(pathlib.Path(__file__).parents[1] / 'fixtures/data/made_sets.py'))
CLASSES = MADE['CLASSES']
PP = Preprocess(crop=8)
KINDS = ('arrow', 'parquet', 'tar', 'array_record')


def rows(count, first=0):
    """Photos of noise, each its own; classes 0, 1, 2, 0, ..."""
    made = []
    for number in range(first, first + count):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(file, 'JPEG', quality=95)
        made.append((file.getvalue(), number % 3, f'photo_{number:03}'))
    return made


def write(kind, path, made, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    MADE[f'write_{kind}'](path, made, **options)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache/datasets'


@pytest.fixture(params=KINDS)
def made(request, tmp_path):
    """A folder of each kind: 30 training images in two files, 9 test images in one."""
    kind, root = request.param, tmp_path / 'set'
    all_rows = rows(39)
    write(kind, root / f'train-00000-of-00002.{kind}', all_rows[:17])
    write(kind, root / f'train-00001-of-00002.{kind}', all_rows[17:30])
    write(kind, root / f'test.{kind}', all_rows[30:])
    return root, all_rows


def images(source):
    return sorted(source[index].image for index in range(len(source)))


def test_each_example_is_read_alone_and_right(made):
    root, all_rows = made
    data = sources.open_dataset(str(root))
    names = CLASSES if root.glob('*.arrow') and data.class_names[0] == 'daisy' else ('0', '1', '2')
    assert data.class_names == names and data.exif
    label_of = {image: label for image, label, _ in all_rows}
    for split, expected in (('train', all_rows[:30]), ('test', all_rows[30:])):
        part = data.select(split)
        assert images(part) == sorted(row[0] for row in expected)
        for index in range(len(part)):
            example = part[index]
            assert example.label == label_of[example.image] == part.labels()[index]
            assert example.key.startswith(f'{root}/{split}')
        assert len({part[index].key for index in range(len(part))}) == len(part)
        assert part.paths() is None
        assert np.bincount(part.labels()[-6:]).tolist() == [2, 2, 2]  # each class in proportion


def batches(root, count=1, start=0):
    """Three batches from a step on, joined over the processes."""
    parts = []
    for index in range(count):
        train, _ = sources.open_sources(str(root))
        made = loader.BatchLoader(
            train, PP, batch=8, seed=3, process_index=index, process_count=count
        )
        with contextlib.closing(made.from_step(start, threads=2)) as iterator:
            parts.append([next(iterator) for _ in range(3)])
    return [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_batches_are_a_function_of_seed_and_step(made):
    root, _ = made
    alone, later = batches(root), batches(root, start=2)
    for count in (2, 4):
        for a, b in zip(alone, batches(root, count), strict=True):
            assert all(np.array_equal(a[key], b[key]) for key in a)
    assert all(np.array_equal(alone[2][key], later[0][key]) for key in alone[2])


def test_batches_are_the_same_from_every_kind_of_file(tmp_path):
    """And from a table, which has the same rows."""
    made, lines = rows(30), 'path,label\n'
    for image, label, name in made:
        (tmp_path / f'{name}.jpg').write_bytes(image)
        lines += f'{name}.jpg,{label}\n'
    (tmp_path / 'labels.csv').write_text(lines)
    expected = batches(tmp_path / 'labels.csv')
    for kind in KINDS:
        write(kind, tmp_path / f'all.{kind}', made)
        for a, b in zip(expected, batches(tmp_path / f'all.{kind}'), strict=True):
            assert all(np.array_equal(a[key], b[key]) for key in a)


def test_the_index_is_made_once_and_anew_when_files_change(made, cache, monkeypatch):
    root, all_rows = made
    first, _ = sources.open_sources(str(root))
    (kept,) = cache.glob('*/index.npz')
    monkeypatch.setattr(shards.Builder, 'add', lambda *_: pytest.fail('read again'))
    again, _ = sources.open_sources(str(root))
    assert again.fingerprint() == first.fingerprint() and again[0] == first[0]
    monkeypatch.undo()
    monkeypatch.setenv('VIT_JAX_CACHE', str(cache.parent))
    kept.write_bytes(kept.read_bytes()[:-30])  # a damaged one is made again
    assert sources.open_sources(str(root))[0].fingerprint() == first.fingerprint()
    (test,) = root.glob('test.*')
    write(test.suffix[1:], test, all_rows[31:])
    changed = sources.open_dataset(str(root)).select('test')
    assert len(changed) == 8 and len(list(cache.glob('*/index.npz'))) == 2


def test_the_cache_may_be_read_only(made, cache, monkeypatch, caplog):
    root, _ = made
    cache.parent.mkdir()
    cache.write_text('no folder')
    if list(root.glob('*.parquet')):
        with pytest.raises(UserError, match='cannot write'):
            sources.open_sources(str(root))
    else:
        assert sources.open_sources(str(root))[0][0].image
        assert 'the index is not kept' in caplog.text


def test_splits_by_names(tmp_path):
    def splits(*names):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        return {s.name: s.split for s in shards.find(root, 'webdataset', 'x')}

    assert splits('0.tar', '1.tar') == {'0.tar': 'train', '1.tar': 'train'}
    found = splits('imagenet-train-00.tar', 'data/imagenet_val_00.tar', 'TEST/a.tar', '.x.tar')
    assert sorted(found.values()) == ['test', 'train', 'validation']
    with pytest.raises(UserError, match='0.tar does not; rename it, such as train-0.tar'):
        splits('0.tar', 'val-0.tar')
    with pytest.raises(UserError, match='3 files a-[*]-of-03.tar, 2 are there; a-01-of-03.tar is'):
        splits('a-00-of-03.tar', 'a-02-of-03.tar')


def test_class_names_beside_the_files(tmp_path):
    write('tar', tmp_path / 'set/a.tar', rows(9))
    (tmp_path / 'set/classes.txt').write_text('aster\nbegonia\ncrocus\ndahlia\n')
    data = sources.open_dataset(str(tmp_path / 'set'))
    assert data.class_names == ('aster', 'begonia', 'crocus', 'dahlia')
    assert np.bincount(data.select('train').labels()).tolist() == [3, 3, 3]
    (tmp_path / 'set/classes.txt').write_text('aster\nbegonia\n')
    with pytest.raises(UserError, match='its label 2 is none of the 2 classes.*max_unreadable'):
        sources.open_dataset(str(tmp_path / 'set'), max_unreadable=0.1)


@pytest.mark.parametrize('label', ['json', 'txt'])
def test_labels_of_webdataset(tmp_path, label):
    write('tar', tmp_path / 'train.tar', rows(9), label=label)
    data = sources.open_dataset(str(tmp_path / 'train.tar'))
    assert data.class_names == CLASSES and len(data.select('train')) == 9
    if label == 'json':
        data = sources.open_dataset(str(tmp_path / 'train.tar'), columns='label=index')
        assert data.class_names == ('0', '1', '2')


def test_what_webdataset_leaves_out(tmp_path, caplog):
    write('tar', tmp_path / 'a.tar', rows(8))
    with tarfile.open(tmp_path / 'a.tar', 'a') as archive:
        for name, data in (
            ('alone.cls', b'1'), ('README', b'x'), ('.hidden.jpg', b'x'), ('b/none.jpg', b'x'),
            ('bad.json', b'{'), ('bad.jpg', b'x'), ('big.cls', b'1' * 2000), ('big.jpg', b'x'),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo('link.jpg')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(link)
    assert len(sources.open_dataset(str(tmp_path / 'a.tar')).select('train')) == 8
    for words in (
        'a.tar/alone: it has no image', 'a.tar/b/none.jpg: its label is empty',
        'a.tar/bad.jpg: its .json is not JSON', 'a.tar/big.jpg: its .cls has 2,000 bytes',
        '4 of 12 rows',
    ):  # fmt: skip
        assert words in caplog.text


@pytest.mark.parametrize('share', [0.3, 0.5, 0.9, 0.99])
def test_cut_and_damaged_files_are_named(made, share):
    root, _ = made
    (path,) = root.glob('train-00001*')
    whole = path.read_bytes()
    size = len(whole.rstrip(b'\0'))  # a tar has zeros at its end
    path.write_bytes(whole[: int(share * size)])
    with pytest.raises(UserError, match=f'{path.name} (is|cannot|holds)'):
        sources.open_sources(str(root))
    for data in (b'', whole[:-8] if path.suffix == '.arrow' else whole[: size - 1]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=path.name):
            sources.open_sources(str(root))
    path.write_bytes(b'')
    with pytest.raises(UserError, match=path.name):
        sources.open_sources(str(root))


def test_joined_tars_are_refused(tmp_path):
    write('tar', tmp_path / 'a.tar', rows(4))
    (tmp_path / 'a.tar').write_bytes(2 * (tmp_path / 'a.tar').read_bytes())
    with pytest.raises(UserError, match='a.tar goes on after its end'):
        sources.open_dataset(str(tmp_path))


def test_files_of_an_example_that_are_apart(tmp_path):
    write('tar', tmp_path / 'a.tar', rows(4))
    with tarfile.open(tmp_path / 'a.tar') as whole, tarfile.open(tmp_path / 'b.tar', 'w') as new:
        for member in sorted(
            whole, key=lambda member: member.name.rpartition('.')[2], reverse=True
        ):
            new.addfile(member, whole.extractfile(member))
    with pytest.raises(UserError, match='b.tar: no label stands beside photo_000.jpg.*--sort=name'):
        sources.open_dataset(str(tmp_path / 'b.tar'))


def test_a_compressed_tar_is_refused(tmp_path):
    write('tar', tmp_path / 'a.tar', rows(4))
    (tmp_path / 'a.tar').rename(tmp_path / 'a.tar.gz')
    with pytest.raises(UserError, match='a.tar.gz is compressed'):
        sources.open_dataset(str(tmp_path))


def test_a_file_that_is_cut_while_it_is_read(made):
    root, _ = made
    train, _ = sources.open_sources(str(root))
    for path in [*root.glob('train*'), *root.parent.glob('cache/datasets/*/images.bin')]:
        os.truncate(path, 100)
    errors = []
    list(eval_batches(train, PP, batch=8, on_bad=errors.append))
    assert len(errors) == 30 and all(isinstance(error, BadImageError) for error in errors)


def test_a_saved_dataset_dict(tmp_path, caplog):
    """The layout of `DatasetDict.save_to_disk`, and what is left beside it later."""
    root = tmp_path / 'flowers'
    for split, made in (('train', rows(12)), ('test', rows(6, 12))):
        write('arrow', root / split / 'data-00000-of-00001.arrow', made)
        write('arrow', root / split / 'cache-0123.arrow', rows(3, 50))
        table = pyarrow.ipc.open_stream(root / split / 'data-00000-of-00001.arrow').read_all()
        features = json.loads(table.schema.metadata[b'huggingface'])['info']
        (root / split / 'dataset_info.json').write_text(json.dumps(features))
        (root / split / 'state.json').write_text('{}')
    (root / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
    train, test = sources.open_sources(str(root))
    assert (len(train), len(test), train.class_names) == (12, 6, CLASSES)
    assert not list((tmp_path / 'cache').glob('datasets/*/images.bin'))  # read where they are


@pytest.mark.parametrize('options', [{'file': True}, {'compression': 'zstd'}])
def test_other_arrow_files(tmp_path, options):
    write('arrow', tmp_path / 'a.arrow', rows(9), **options)
    data = sources.open_dataset(str(tmp_path / 'a.arrow')).select('train')
    assert images(data) == sorted(row[0] for row in rows(9))
    packed = list((tmp_path / 'cache').glob('datasets/*/images.bin'))
    assert bool(packed) == ('compression' in options)


def test_parquet_without_names_of_classes_and_with_images_as_bytes(tmp_path):
    made = rows(9)
    write('parquet', tmp_path / 'a.parquet', made, classes=())
    assert sources.open_dataset(str(tmp_path / 'a.parquet')).class_names == ('0', '1', '2')
    table = pyarrow.table(
        {'img': [row[0] for row in made], 'species': [row[2] for row in made[:1]] * 5 + ['b'] * 4}
    )
    parquet.write_table(table, tmp_path / 'b.parquet')
    data = sources.open_dataset(str(tmp_path / 'b.parquet'))
    assert images(data.select('train')) == sorted(row[0] for row in made)
    with pytest.raises(UserError, match='holds int64, and no images'):
        parquet.write_table(pyarrow.table({'image': [1], 'label': [0]}), tmp_path / 'c.parquet')
        sources.open_dataset(str(tmp_path / 'c.parquet'))


def test_images_of_another_type_in_a_later_file(tmp_path):
    write('parquet', tmp_path / 'train-0.parquet', rows(6))
    table = pyarrow.table({'image': [[1], [2]], 'label': [0, 1]})
    parquet.write_table(table, tmp_path / 'train-1.parquet')
    with pytest.raises(UserError, match='train-1.parquet cannot be read: its images are list'):
        sources.open_dataset(str(tmp_path))


def test_several_datasets_in_a_folder(tmp_path):
    for name in ('small', 'large'):
        write('parquet', tmp_path / f'set/{name}/train-00000-of-00001.parquet', rows(4))
    with pytest.raises(UserError, match='holds several datasets, large, small'):
        sources.open_dataset(str(tmp_path / 'set'))


def test_a_full_disk_is_known_before_copying(tmp_path, monkeypatch):
    write('parquet', tmp_path / 'a.parquet', rows(4))
    usage = type('Usage', (), {'free': 10})
    monkeypatch.setattr('shutil.disk_usage', lambda _: usage)
    with pytest.raises(UserError, match='are needed and 0.0 GB free'):
        sources.open_dataset(str(tmp_path / 'a.parquet'))
    assert not list((tmp_path / 'cache').glob('datasets/*/images.bin'))


@pytest.mark.parametrize('form', ['csv', 'jsonl'])
def test_a_folder_with_metadata(tmp_path, form, caplog):
    made = rows(12)
    root = tmp_path / 'set'
    for split, part in (('train', made[:8]), ('test', made[8:])):
        (root / split).mkdir(parents=True)
        for image, _, name in part:
            (root / split / f'{name}.jpg').write_bytes(image)

    def lines(part, prefix=''):
        told = [(f'{prefix}{name}.jpg', CLASSES[label]) for _, label, name in part]
        if form == 'jsonl':
            return ''.join(json.dumps({'file_name': a, 'label': b}) + '\n' for a, b in told)
        return 'file_name,label\n' + ''.join(f'{a},{b}\n' for a, b in told)

    def check():
        train, test = sources.open_sources(str(root))
        assert images(train) == sorted(row[0] for row in made[:8]) and len(test) == 4
        assert train.class_names == CLASSES

    (root / f'metadata.{form}').write_text(
        lines(made[:8], 'train/') + lines(made[8:], 'test/').removeprefix('file_name,label\n')
    )
    check()
    (root / f'metadata.{form}').unlink()
    for split, part in (('train', made[:8]), ('test', [*made[8:], (b'', 0, 'none')])):
        (root / split / f'metadata.{form}').write_text(lines(part))
    caplog.clear()
    with pytest.raises(AssertionError):
        check()
    assert f'{root}/test/metadata.{form}, row' in caplog.text


def test_metadata_without_labels_leaves_folders_of_classes(tmp_path, caplog):
    for image, label, name in rows(9):
        (tmp_path / CLASSES[label]).mkdir(exist_ok=True)
        (tmp_path / CLASSES[label] / f'{name}.jpg').write_bytes(image)
    (tmp_path / 'metadata.csv').write_text('file_name,text\nrose/photo_001.jpg,a rose\n')
    assert sources.open_dataset(str(tmp_path)).class_names == CLASSES
    assert 'has no column of labels' in caplog.text


def test_the_page_writes_an_array_record_file(tmp_path, monkeypatch):
    page = (pathlib.Path(__file__).parents[2] / 'docs/data.md').read_text()
    (block,) = [b for b in re.findall(r'```python\n(.*?)```', page, re.S) if 'ArrayRecord' in b]
    monkeypatch.chdir(tmp_path)
    for image, label, name in rows(8):
        folder = pathlib.Path('photos', CLASSES[label])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{name}.jpg').write_bytes(image)
    exec(compile(block, 'data.md', 'exec'), {})
    pathlib.Path('classes.txt').write_text('daisy\nrose\n')
    data = sources.open_dataset('./flowers.array_record')
    assert data.class_names == ('daisy', 'rose') and len(data.select('train')) == 6


def test_neither_tensorflow_nor_pytorch_is_imported(tmp_path):
    """Training reads each kind in a process where they are installed."""
    names = []
    for kind in KINDS:
        write(kind, tmp_path / f'{kind}/train.{kind}', rows(9))
        write(kind, tmp_path / f'{kind}/test.{kind}', rows(3, 9))
        names.append(str(tmp_path / kind))
    (tmp_path / 'images').mkdir()
    for image, _, name in rows(9):
        (tmp_path / f'images/{name}.jpg').write_bytes(image)
    (tmp_path / 'labels.csv').write_text(
        'path,label\n' + ''.join(f'images/{name}.jpg,{label}\n' for _, label, name in rows(9))
    )
    script = f"""
import contextlib, importlib.util, sys
assert importlib.util.find_spec('tensorflow'), 'proves nothing without TensorFlow installed'
from vit_jax.data import batches, loader, preprocess, sources
for name in {[*names, str(tmp_path / 'labels.csv')]!r}:
    train, test = sources.open_sources(name)
    data = loader.BatchLoader(train, preprocess.Preprocess(crop=16), batch=8, seed=0)
    with contextlib.closing(data.from_step(0)) as iterator:
        next(iterator)
    list(batches.eval_batches(test, preprocess.Preprocess(crop=16), batch=100))
loaded = [name for name in ('tensorflow', 'torch', 'datasets') if name in sys.modules]
assert not loaded, loaded
print('read')
"""
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=False
    )
    assert done.stdout == 'read\n', done.stderr


def test_a_kind_is_seen_without_reading_all(tmp_path):
    assert shards.kind_of(tmp_path) == ''
    for name, kind in (
        ('a.parquet', 'hugging_face'), ('a.ARROW', 'hugging_face'), ('a.tgz', 'webdataset'),
        ('x.array_record-00000-of-00009', 'array_record'), ('x.arrayrecord', 'array_record'),
    ):  # fmt: skip
        (tmp_path / name / 'data').mkdir(parents=True)
        (tmp_path / name / 'data/README.md').touch()
        (tmp_path / name / 'data' / name).touch()
        assert shards.kind_of(tmp_path / name) == kind
    (tmp_path / 'a.parquet/data/logo.png').touch()
    assert shards.kind_of(tmp_path / 'a.parquet') == 'hugging_face'


def test_a_backup_beside_folders_of_classes_is_not_the_dataset(tmp_path):
    for image, label, name in rows(9):
        (tmp_path / CLASSES[label]).mkdir(exist_ok=True)
        (tmp_path / CLASSES[label] / f'{name}.jpg').write_bytes(image)
    write('tar', tmp_path / 'backup.tar', rows(4))
    assert sources.open_dataset(str(tmp_path)).class_names == CLASSES
