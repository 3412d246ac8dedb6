"""Test images that are training images as well: which are found, and how long it may take."""

import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import copies, sources


@pytest.fixture
def photos(tmp_path):
    """Two classes with 4 training and 3 test images, no two the same."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('test', 3)):
        for name in 'ab':
            folder = tmp_path / 'photos' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.bmp')  # all have one size
    return tmp_path / 'photos'


def find(photos, **options):
    return copies.find(*sources.open_sources(str(photos)), **options)


def test_copies_are_found_by_their_bytes(photos):
    assert find(photos) == ([], True)
    shutil.copy(photos / 'train/a/2.bmp', photos / 'test/b/0.bmp')  # another class, even
    shutil.copy(photos / 'train/a/2.bmp', photos / 'test/b/1.bmp')
    (photos / 'train/b/1.bmp').unlink()
    (photos / 'train/b/1.bmp').symlink_to(photos / 'test/a/2.bmp')
    assert find(photos) == (
        [
            (f'{photos}/test/a/2.bmp', f'{photos}/train/b/1.bmp'),
            (f'{photos}/test/b/0.bmp', f'{photos}/train/a/2.bmp'),
            (f'{photos}/test/b/1.bmp', f'{photos}/train/a/2.bmp'),
        ],
        True,
    )


def test_the_same_pixels_in_another_file_are_found_on_request(photos):
    with Image.open(photos / 'train/a/1.bmp') as picture:
        picture.save(photos / 'test/a/1.png')
    (photos / 'test/b/2.bmp').write_bytes(b'no image')
    assert find(photos) == ([], True)
    pair = (f'{photos}/test/a/1.png', f'{photos}/train/a/1.bmp')
    assert find(photos, pixels=True) == ([pair], True)


def test_only_files_of_a_size_that_is_on_both_sides_are_read(photos, monkeypatch):
    read = []
    original = copies.read_file
    monkeypatch.setattr(copies, 'read_file', lambda path: read.append(path) or original(path))
    for path in (photos / 'train').rglob('*.bmp'):
        path.write_bytes(path.read_bytes() + b'longer')
    (photos / 'train/a/0.bmp').write_bytes((photos / 'test/a/0.bmp').read_bytes())
    assert len(find(photos).pairs) == 1
    assert len(read) == 6 + 1


def test_time_runs_out(photos, monkeypatch):
    shutil.copy(photos / 'train/a/2.bmp', photos / 'test/b/0.bmp')
    assert find(photos, seconds=0) == ([], False)
    monkeypatch.setattr(copies, 'NOTES_SECONDS', 0)
    (note,) = copies.notes(*sources.open_sources(str(photos)), 'x')
    assert note.startswith('not all files were compared within 0 seconds; vit_jax find_copies x')


def test_same_file_on_both_sides_is_no_copy(photos):
    train, test = sources.open_sources(str(photos), train_split='test', test_split='test')
    assert copies.find(train, test) == ([], True)
    assert copies.find(*sources.open_sources('digits')) is None


def test_command(photos, run_script):
    done = run_script('find_copies.py', photos)
    assert (done.returncode, done.stdout) == (0, '')
    assert '0 of the 6 test images have the bytes of one of the 8 training images' in done.stderr
    with Image.open(photos / 'train/a/1.bmp') as picture:
        picture.save(photos / 'test/a/1.png')
    done = run_script('find_copies.py', photos, '--pixels')
    assert done.returncode == 1
    assert done.stdout == f'{photos}/test/a/1.png\t{photos}/train/a/1.bmp\n'
    done = run_script('find_copies.py', 'digits')
    assert done.returncode == 1 and 'digits is no folder or table of image files' in done.stderr
