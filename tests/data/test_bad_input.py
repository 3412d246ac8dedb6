"""Bad images and hostile data sets on disk: named, counted, and never a hang or another file."""

import concurrent.futures
import io
import json
import os
import pathlib
import resource
import runpy
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import decode, loader, reader, sources
from vit_jax.data.batches import eval_batches
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
_tfds_set = runpy.run_path(str(FIXTURES / 'tfds_set.py'))
tf_example, make_tfds = _tfds_set['tf_example'], _tfds_set['make']
PP = Preprocess(crop=8)


def image_bytes(value=0, format='PNG', mode='RGB') -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).convert(mode).save(file, format)
    return file.getvalue()


def bomb_jpeg() -> bytes:
    jpeg = bytearray(image_bytes(format='JPEG'))
    frame = jpeg.index(b'\xff\xc0')
    jpeg[frame + 5 : frame + 9] = b'\xff\xff\xff\xff'
    return bytes(jpeg)


def bomb_png() -> bytes:
    png = bytearray(image_bytes())
    png[16:24] = struct.pack('>II', 2**31 - 1, 2**31 - 1)  # the header's checksum is wrong now, too
    return bytes(png)


BROKEN = {
    'empty.jpg': b'',
    'truncated.jpg': image_bytes(format='JPEG')[:-20],
    'text.jpg': b'this is no image',
    'page.png': b'<html><body>404</body></html>',
    'bomb.jpg': bomb_jpeg(),
    'bomb.png': bomb_png(),
    'float.png': image_bytes(format='TIFF', mode='F'),
}


@pytest.fixture
def photos(tmp_path):
    """30 good images of two classes and everything that can be wrong with a file."""
    root = tmp_path / 'photos'
    for name in ('cat', 'dog'):
        (root / name).mkdir(parents=True)
        for i in range(14):
            (root / name / f'{i:02}.png').write_bytes(image_bytes(10 * i))
    (root / 'cat' / 'cmyk.jpg').write_bytes(image_bytes(99, 'JPEG', 'CMYK'))
    (root / 'dog' / 'palette.png').write_bytes(image_bytes(99, 'PNG', 'P'))
    for name, data in BROKEN.items():
        (root / 'cat' / name).write_bytes(data)
    (root / 'cat' / 'broken_link.jpg').symlink_to(root / 'nowhere')
    (root / 'cat' / 'itself.jpg').symlink_to(root / 'cat' / 'itself.jpg')
    (root / 'dog' / 'endless.jpg').symlink_to('/dev/zero')
    (root / 'dog' / 'folder.jpg').mkdir()
    (root / 'dog' / 'folder.jpg' / 'inside.png').write_bytes(image_bytes(5))
    os.mkfifo(root / 'dog' / 'pipe.jpg')
    with open(root / 'dog' / 'sparse.jpg', 'wb') as file:
        file.truncate(1 << 40)
    (root / 'dog' / 'new\nline \x1b[31m.jpg').write_bytes(b'no image')
    with open(os.fsencode(root / 'dog') + b'/no \xff\xfe text.jpg', 'wb') as file:
        file.write(b'no image')
    return root


BAD_FILES = {
    *BROKEN, 'broken_link.jpg', 'itself.jpg', 'endless.jpg', 'pipe.jpg', 'sparse.jpg',
    'new\nline \x1b[31m.jpg', os.fsdecode(b'no \xff\xfe text.jpg'),
}  # fmt: skip


def test_every_bad_file_of_a_folder_is_reported_once(photos):
    split = sources.open_dataset(str(photos)).select('train')
    assert len(split) == 31 + len(BAD_FILES)
    errors = []
    once = reader.once_per_key(errors.append)
    for _ in range(2):
        batches = list(eval_batches(split, PP, batch=16, on_bad=once, threads=2))
        assert sum(batch['readable'].sum() for batch in batches) == 31
        assert sum((batch['example'] >= 0).sum() for batch in batches) == len(split)
    assert {os.path.basename(error.key) for error in errors} == BAD_FILES
    assert len(errors) == len(BAD_FILES)
    for error in errors:
        assert str(error).isprintable(), str(error)
        assert error.label == ('dog' in error.key.split('/')[-2])
    dataset = loader.BatchLoader(split, PP, batch=len(split), seed=0, on_bad=errors.append)
    assert dataset[0]['replaced'].sum() == len(BAD_FILES)


def test_files_that_vanish_or_close_after_they_were_listed(photos):
    split = sources.open_dataset(str(photos)).select('train')
    places = {split[i].key: i for i in range(len(split)) if is_readable(split, i)}
    first, second = (str(photos / 'cat' / name) for name in ('03.png', '04.png'))
    os.unlink(first)
    os.unlink(second)
    os.mkdir(second)
    for path, reason in ((first, 'No such file'), (second, 'it is a folder')):
        with pytest.raises(BadImageError, match=reason) as caught:
            split[places[path]]
        assert caught.value.key == path and caught.value.label == 0


@pytest.mark.parametrize('name', [b'a\nb', b'\x1b[31mred', b'no \xff\xfe text'])
def test_class_folders_that_cannot_be_printed_or_stored(photos, name):
    os.rename(os.fsencode(photos / 'dog'), os.fsencode(photos) + b'/' + name)
    with pytest.raises(UserError, match='rename it') as caught:
        sources.open_dataset(str(photos))
    assert str(caught.value).isprintable()


def is_readable(split, index):
    try:
        return bool(split[index])
    except BadImageError:
        return False


def test_too_many_open_files_is_not_the_fault_of_an_image(photos):
    """It would make every image of the run a bad one."""
    script = (
        'import resource, sys; from vit_jax.data import decode\n'
        'resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n'
        'try: decode.read_file(sys.argv[1])\n'
        'except OSError as e: print(type(e).__name__, e.errno)\n'
    )
    path = str(photos / 'cat' / '00.png')
    done = subprocess.run([sys.executable, '-c', script, path], capture_output=True, text=True)
    assert done.stdout.split() == ['OSError', '24'], done.stderr


def test_read_file(tmp_path):
    (tmp_path / 'a b.jpg').write_bytes(b'1234')
    assert decode.read_file(tmp_path / 'a b.jpg') == b'1234'
    with pytest.raises(BadImageError, match='not a file name'):
        decode.read_file('a\0b.jpg')


def test_broken_records_of_a_tfds_set(tmp_path):
    good = [tf_example(image_bytes(20 * i), i % 2) for i in range(8)]
    records = [
        *good,
        tf_example(image_bytes()[:45], 0),  # 8: the image is broken
        good[1][:-3],  # 9: the message is
        b'',  # 10: empty, and so without its features
        os.urandom(200),  # 11
        tf_example(image_bytes(), 7),  # 12: a label that there is not
    ]
    file = make_tfds(tmp_path, records)
    data = bytearray(file.read_bytes())
    data[data.index(good[3]) + 30] ^= 4  # 3: a flipped bit
    file.write_bytes(data)
    split = sources.open_dataset('tiny_set', tfds_data_dir=str(tmp_path)).select('train')
    errors = []
    (batch,) = eval_batches(split, PP, batch=13, on_bad=errors.append)
    reasons = {error.key.rpartition('/')[2]: error.reason for error in errors}
    assert set(reasons) == {'3', '8', '9', '10', '11', '12'}
    assert np.flatnonzero(~batch['readable']).tolist() == [3, 8, 9, 10, 11, 12]
    assert 'hash mismatch' in reasons['3'] and 'is damaged' in reasons['9']
    assert 'its label is 7' in reasons['12'] and 'not an image' in reasons['8']
    assert all(error.key.startswith('tiny_set:train/') for error in errors)
    dataset = loader.BatchLoader(split, PP, batch=13, seed=0, on_bad=errors.append)
    assert dataset[0]['replaced'].sum() == 6
    # The whole file: cut short, or gone after the set was opened.
    file.write_bytes(data[: len(data) // 2])
    again = sources.open_dataset('tiny_set', tfds_data_dir=str(tmp_path)).select('train')
    file.unlink()
    gone = sources.open_dataset('tiny_set', tfds_data_dir=str(tmp_path)).select('train')
    for split in (again, gone):
        with pytest.raises(BadImageError, match=r'tiny_set:train/0: .*damaged'):
            split[0]


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    first = make_tfds(tmp_path, [tf_example(image_bytes(), 1)])
    count = 150
    for i in range(count):
        first.with_name(f'tiny_set-train.array_record-{i:05}-of-{count:05}').hardlink_to(first)
    edit_json(
        first.with_name('dataset_info.json'),
        lambda info: info['splits'][0].update(shardLengths=['1'] * count),
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir('/proc/self/fd'))) + 40
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, limits[1]))
        split = sources.open_dataset('tiny_set', tfds_data_dir=str(tmp_path)).select('train')
        with monkeypatch.context() as patch:
            patch.setattr(resource, 'getrlimit', lambda which: (used, used))
            with pytest.raises(UserError, match=r'^tiny_set:train has 150 shards, .* raise the'):
                split[0]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            assert len(list(threads.map(split.__getitem__, range(count)))) == count
        assert len(split) == count and split[count - 1].label == 1
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (used + count, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


EVIL = 'import pathlib; pathlib.Path({!r}).write_text("ran")\n'


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(root, words, name='tiny_set'):
    with pytest.raises(UserError, match=words) as caught:
        sources.open_dataset(name, tfds_data_dir=str(root))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize('version', ['1.2.0', '1.0.0', 'config/1.2.0'])
def test_features_of_a_tfds_set_run_no_code(tmp_path, monkeypatch, version):
    """TFDS imports the module that a feature names, from wherever Python looks."""
    trace, module = tmp_path / 'trace', f'evil_{abs(hash(version))}'
    (tmp_path / f'{module}.py').write_text(EVIL.format(str(trace)))
    monkeypatch.syspath_prepend(tmp_path)
    records = [tf_example(image_bytes(20 * i), i % 2) for i in range(4)]
    make_tfds(tmp_path / 'tfds', records)
    folder = tmp_path / 'tfds' / 'tiny_set' / version
    if version != '1.2.0':
        shutil.copytree(tmp_path / 'tfds/tiny_set/1.2.0', folder)

    def name_it(features):
        image = features['featuresDict']['features']['image']
        image['pythonClassName'] = f'{module}.Image'

    edit_json(folder / 'features.json', name_it)
    refused(tmp_path / 'tfds', f'{module}.Image.*would run its code')
    # The same file without our check, to see that it is one.
    import tensorflow_datasets as tfds

    with pytest.raises(ValueError, match='Unrecognized FeatureConnector'):
        tfds.builder_from_directory(folder)
    assert trace.read_text() == 'ran'


def class_label(features):
    return features['featuresDict']['features']['label']['classLabel']


def split(info):
    return info['splits'][0]


CLASSES = 'tensorflow_datasets.core.features'
LEGACY_FEATURES = {  # as TFDS wrote them until 4.4; TFDS would read the names from any file
    'type': f'{CLASSES}.features_dict.FeaturesDict',
    'content': {
        'label': {
            'type': f'{CLASSES}.class_label_feature.ClassLabel',
            'content': {'names_file': '/etc/passwd'},
        }
    },
}


@pytest.mark.parametrize(
    ('file', 'change', 'words'),
    [
        (
            'features.json',
            lambda f: class_label(f).update(numClasses=10**12),
            'numClasses is 1000000000000',
        ),
        (
            'features.json',
            lambda f: f.update(LEGACY_FEATURES),
            'names_file',
        ),
        ('dataset_info.json', lambda f: split(f).update(shardLengths=['-3']), 'shardLengths'),
        ('dataset_info.json', lambda f: split(f).update(shardLengths=[2**40]), 'shardLengths'),
        ('dataset_info.json', lambda f: split(f).update(name='../x'), 'name of a split'),
        (
            'dataset_info.json',
            lambda f: split(f).update(filepathTemplate='../../{SPLIT}'),
            'not a plain file name',
        ),
        ('dataset_info.json', lambda f: f.update(splits={'a': 1}), 'splits'),
        ('dataset_info.json', lambda f: f.clear(), 'tiny_set'),
    ],
)  # fmt: skip
def test_descriptions_of_tfds_sets_are_checked(tmp_path, file, change, words):
    make_tfds(tmp_path, [tf_example(image_bytes(), i % 2) for i in range(2)])
    edit_json(tmp_path / 'tiny_set/1.2.0' / file, change)
    refused(tmp_path, words)


LABELS = [b'', b'\xff\xfe', b'a\na\n', b'a\nb\nc', b'a\n', b'a\nb\x1b[31m', 'a\nb\u2028c'.encode()]


@pytest.mark.parametrize('file', ['features.json', 'dataset_info.json', 'label.labels.txt'])
def test_damaged_descriptions_of_tfds_sets(tmp_path, file):
    make_tfds(tmp_path, [tf_example(image_bytes(), i % 2) for i in range(2)])
    path = tmp_path / 'tiny_set/1.2.0' / file
    contents = [b'', b'{', b'[' * 100_000, b'\xff\xfe\x00', b'"text"']
    for content in contents if file.endswith('json') else LABELS:
        path.write_bytes(content)
        if (file, content) == ('label.labels.txt', b''):  # no names: numbers
            assert sources.open_dataset('tiny_set', tfds_data_dir=str(tmp_path)).class_names
            continue
        refused(tmp_path, 'tiny_set')
    with open(path, 'wb') as sparse:
        sparse.truncate(1 << 40)
    refused(tmp_path, 'of more than 67,108,864 bytes')
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path, 'not a regular file')


@pytest.mark.parametrize(
    'name',
    [
        'huggingface:mnist', 'tf_flowers/data_dir=/etc', 'tf_flowers/..', 'tf_flowers/..:3.0.1',
        'a\0b', 'tf_flowers\n', 'x' * 5000, '~no_such_user_here/photos', 'a' * 300 + '/b', '\ud800',
        'tf_flowers:9999999999999999999999.0.0', '/' * 5000, '${HOME}', '*',
    ],
)  # fmt: skip
def test_hostile_names_of_datasets(tmp_path, name):
    with pytest.raises(UserError):
        sources.open_dataset(name, tfds_data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
