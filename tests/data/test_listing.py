"""Listing folders of images, and the index of large ones."""

import os
import pathlib
import random
import shutil
import subprocess
import time

import pytest

from vit_jax.data import listing, sources
from vit_jax.data.listing import Index, list_images


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """The folders that were read, by name; sets of any size have an index, settled at once."""
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(listing, 'MIN_INDEXED', 1)
    monkeypatch.setattr(listing, '_SETTLED', 0.0)
    monkeypatch.setattr(listing, '_keeps_times', lambda path: True)
    read, look = [], listing._look
    monkeypatch.setattr(
        listing, '_look', lambda path, arrays: read.append(path) or look(path, arrays)
    )
    return read


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    time.sleep(0.02)  # more than a tick of the file system's clock


def opened(root, looked):
    """(names of the images, names of the folders that were read)."""
    looked.clear()
    split = sources.open_dataset(str(root)).select('train')
    return sorted(os.path.relpath(path, root) for path in split.paths()), sorted(
        os.path.relpath(path, root) for path in looked
    )


def test_only_what_has_changed_is_read_again(tmp_path, looked):
    root = tmp_path / 'photos'
    write(
        root,
        'a/1.jpg',
        'a/2.jpg',
        'b/1.jpg',
        'b/deep/1.png',
        'b/deep/er/1.png',
        'c/x.txt',
        'c/1.gif',
    )
    first, read = opened(root, looked)
    assert read == ['a', 'b', 'b/deep', 'b/deep/er', 'c'] and len(first) == 6
    assert opened(root, looked) == (first, [])

    write(root, 'b/deep/er/2.png')
    second, read = opened(root, looked)
    assert read == ['b/deep/er'] and set(second) - set(first) == {'b/deep/er/2.png'}
    (root / 'a/2.jpg').unlink()
    time.sleep(0.02)
    third, read = opened(root, looked)
    assert read == ['a'] and set(second) - set(third) == {'a/2.jpg'}
    (root / 'a/1.jpg').rename(root / 'a/0.jpg')
    time.sleep(0.02)
    assert 'a/0.jpg' in opened(root, looked)[0]
    (root / 'a/1.jpg').write_text('the content is no part of it')
    (root / 'a/1.jpg').unlink()
    shutil.rmtree(root / 'b/deep')
    write(root, 'b/deep/other.jpg')
    names, read = opened(root, looked)
    assert 'b/deep' in read and [name for name in names if 'deep' in name] == ['b/deep/other.jpg']
    assert opened(root, looked) == (names, [])


def test_a_change_is_seen_although_its_time_is_put_back(tmp_path, looked):
    """As `cp --archive` and `rsync --times` do."""
    write(tmp_path / 'photos', 'a/1.jpg', 'b/1.jpg')
    opened(tmp_path / 'photos', looked)
    before = os.stat(tmp_path / 'photos/a')
    write(tmp_path / 'photos', 'a/2.jpg')
    os.utime(tmp_path / 'photos/a', ns=(before.st_atime_ns, before.st_mtime_ns))
    assert 'a/2.jpg' in opened(tmp_path / 'photos', looked)[0]


def test_what_changed_a_moment_ago_is_not_trusted(tmp_path, looked, monkeypatch):
    monkeypatch.setattr(listing, '_SETTLED', 5.0)
    write(tmp_path / 'photos', 'a/1.jpg', 'b/1.jpg')
    for _ in range(2):
        assert opened(tmp_path / 'photos', looked)[1] == ['a', 'b']


def test_links_are_looked_at_each_time(tmp_path, looked):
    write(tmp_path, 'photos/a/1.jpg', 'photos/b/1.jpg', 'one/1.jpg', 'two/2.jpg')
    (tmp_path / 'photos/b/more').symlink_to(tmp_path / 'one')
    assert 'b/more/1.jpg' in opened(tmp_path / 'photos', looked)[0]
    shutil.rmtree(tmp_path / 'one')
    names, read = opened(tmp_path / 'photos', looked)
    assert names == ['a/1.jpg', 'b/1.jpg'] and 'b' in read
    (tmp_path / 'two').rename(tmp_path / 'one')
    assert 'b/more/2.jpg' in opened(tmp_path / 'photos', looked)[0]


@pytest.mark.parametrize(
    'damage',
    [
        lambda file: file.write_text(''),
        lambda file: file.write_text('[1, ".jpg"]\n'),
        lambda file: file.write_text(file.read_text()[:-20]),
        lambda file: file.write_text(file.read_text().replace('{}', '[')),
        lambda file: file.write_bytes(b'\xff\n\xff'),
    ],
)
def test_a_damaged_index_is_none(tmp_path, looked, damage):
    write(tmp_path / 'photos', 'a/1.jpg', 'b/1.jpg')
    names, _ = opened(tmp_path / 'photos', looked)
    (file,) = (tmp_path / 'cache/listings').iterdir()
    damage(file)
    assert opened(tmp_path / 'photos', looked) == (names, ['a', 'b'])
    assert opened(tmp_path / 'photos', looked) == (names, [])


def test_where_no_index_is_kept(tmp_path, looked, monkeypatch):
    write(tmp_path / 'photos', 'a/1.jpg', 'b/1.jpg')
    monkeypatch.setattr(listing, '_keeps_times', lambda path: False)
    opened(tmp_path / 'photos', looked)
    monkeypatch.setattr(listing, '_keeps_times', lambda path: True)
    monkeypatch.setattr(listing, 'MIN_INDEXED', 3)
    opened(tmp_path / 'photos', looked)
    assert not (tmp_path / 'cache').exists(), 'small sets, and file systems that are not known'
    monkeypatch.setattr(listing, 'MIN_INDEXED', 1)
    (tmp_path / 'cache').write_text('a file')
    assert opened(tmp_path / 'photos', looked)[0] == ['a/1.jpg', 'b/1.jpg'], 'it cannot be kept'


def test_this_file_system_is_known_or_not():
    assert listing._keeps_times('/dev/shm') or not os.path.ismount('/dev/shm')
    assert not listing._keeps_times('/proc') and not listing._keeps_times('/no/such/folder')


def test_arrays_are_another_set(tmp_path, looked):
    write(tmp_path / 'photos', 'a/1.jpg', 'a/1.npy', 'b/1.jpg')
    for channels, count in ((3, 2), (4, 3), (3, 2)):
        dataset = sources.open_dataset(str(tmp_path / 'photos'), channels=channels)
        assert len(dataset.select('train')) == count


def test_the_order_is_that_of_the_parts_of_the_paths(tmp_path):
    rng = random.Random(0)
    letters = 'aB.- é_0~'
    for _ in range(300):
        depth = rng.randint(1, 4)
        parts = [''.join(rng.choices(letters, k=2)).strip('.') or 'x' for _ in range(depth)]
        path = tmp_path.joinpath(*parts[:-1], parts[-1] + rng.choice(('.jpg', '.PNG')))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    everything = [str(path) for path in tmp_path.rglob('*') if path.is_file()]
    shown = [path for path in everything if '/.' not in path.removeprefix(str(tmp_path))]
    found, _ = list_images(tmp_path)
    assert found == sorted(shown, key=lambda path: pathlib.Path(path).parts) and len(found) > 250


def test_folders_in_folders_without_end(tmp_path):
    path = tmp_path / 'deep'
    for _ in range(1200):
        path.mkdir()
        path /= 'x'
    try:
        path.touch()
        path.rename(path.with_suffix('.jpg'))
        assert list_images(tmp_path)[0] == [str(path.with_suffix('.jpg'))]
    finally:  # Python's own way to remove it would recurse
        subprocess.run(['rm', '-rf', tmp_path / 'deep'], check=True)


def test_an_index_is_for_one_set(tmp_path, looked):
    write(tmp_path, 'one/a/1.jpg', 'two/a/1.jpg')
    for name in ('one', 'two'):
        index = Index(tmp_path / name)
        assert list_images(tmp_path / name, index=index)[0] == [str(tmp_path / name / 'a/1.jpg')]
        index.save()
    assert len(list((tmp_path / 'cache/listings').iterdir())) == 2
