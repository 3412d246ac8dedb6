"""Folders of images: what is found in them, what is held out, and what is said."""

import importlib.util
import io
import logging
import os
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import image_files, sources
from vit_jax.data.decode import BadImageError, decode
from vit_jax.data.holdout import coverage_notes
from vit_jax.errors import UserError
from vit_jax.inference import predict


def image_bytes(value=0, format='PNG') -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(file, format)
    return file.getvalue()


def write(root, *paths):
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image_bytes(number % 256))


def keys(source, root):
    return [os.path.relpath(source[i].key, root) for i in range(len(source))]


@pytest.fixture
def photos(tmp_path):
    """One folder of classes, 30 cats and 10 dogs."""
    write(tmp_path, *[f'cat/{i:02}.png' for i in range(30)], *[f'dog/{i}.png' for i in range(10)])
    return tmp_path


def test_folder_with_train_and_test(tmp_path):
    write(
        tmp_path, 'train/b/1.png', 'train/a/2.png', 'train/a/3.png', 'test/a/4.png', 'test/b/5.png'
    )
    train, test = sources.open_sources(str(tmp_path))
    assert train.class_names == test.class_names == ('a', 'b') and train.exif
    assert sorted(keys(train, tmp_path)) == ['train/a/2.png', 'train/a/3.png', 'train/b/1.png']
    assert sorted(keys(test, tmp_path)) == ['test/a/4.png', 'test/b/5.png']
    for source in (train, test):
        for i in range(len(source)):
            example = source[i]
            assert f'/{source.class_names[example.label]}/' in example.key
            assert decode(example.image, key=example.key).shape == (4, 5, 3)
    assert train.overlap(test) == 0
    with pytest.raises(IndexError):
        train[3]


@pytest.mark.parametrize('name', ['val', 'valid', 'validation'])
def test_validation_folder(tmp_path, name):
    write(tmp_path, 'train/a/1.png', 'train/b/1.png', f'{name}/a/2.png', f'{name}/b/2.png')
    train, test = sources.open_sources(str(tmp_path))
    assert (len(train), len(test), test.spec) == (2, 2, 'validation')
    write(tmp_path, 'test/a/3.png', 'test/b/3.png')
    assert sources.open_sources(str(tmp_path))[1].spec == 'test'
    both, _ = sources.open_sources(str(tmp_path), train_split='train+validation')
    assert len(both) == 4


def test_two_spellings_of_one_split(tmp_path):
    write(tmp_path, *[f'{split}/{c}/1.png' for split in ('train', 'val', 'valid') for c in 'ab'])
    with pytest.raises(UserError, match='validation split; keep one'):
        sources.open_dataset(str(tmp_path))


def test_train_can_be_a_class(tmp_path):
    write(tmp_path, 'train/1.png', 'car/1.png', 'plane/1.png')
    assert sources.open_dataset(str(tmp_path)).class_names == ('car', 'plane', 'train')


def test_one_folder_is_split_reproducibly_and_stratified(photos):
    train, test = sources.open_sources(str(photos))
    assert (train.spec, test.spec) == ('train[:90%]', 'train[90%:]')
    labels = [test[i].label for i in range(len(test))]
    assert (len(train), len(test), sorted(labels)) == (36, 4, [0, 0, 0, 1])
    everything = keys(train, photos) + keys(test, photos)
    assert len(set(everything)) == 40 and everything != sorted(everything)
    again = sources.open_sources(str(photos))
    assert everything == keys(again[0], photos) + keys(again[1], photos)
    # The order that this version defines; if it changed, users' test images would be trained on.
    assert keys(test, photos) == EXPECTED_TEST
    # Where the folder lies has no part in it.
    elsewhere = photos.parent / 'else where'
    photos.rename(elsewhere)
    assert keys(sources.open_sources(str(elsewhere))[1], elsewhere) == EXPECTED_TEST


EXPECTED_TEST = ['cat/09.png', 'cat/27.png', 'dog/3.png', 'cat/26.png']


def test_file_types_names_and_hidden_files(tmp_path, caplog):
    good = [
        'a/1.jpg',
        'a/2.JPEG',
        'a/3.Png',
        'b/4.webp',
        'b/5.BMP',
        'b/ünï cödé (1).jpg',
        'b/deep/er/6.png',
    ]
    write(tmp_path, *good)
    write(
        tmp_path, 'a/._1.jpg', 'a/.hidden.png', '.git/x.png', 'b/.trash/y.jpg', '__MACOSX/a/z.jpg'
    )
    for name in ('a/readme.txt', 'b/Thumbs.db', 'labels.csv', 'a/movie.mp4'):
        (tmp_path / name).write_text('no image')
    with caplog.at_level(logging.WARNING):
        split = sources.open_dataset(str(tmp_path)).select('train')
    assert sorted(keys(split, tmp_path)) == sorted(good)
    assert '6 files' in caplog.text and str(tmp_path) in caplog.text


FORMATS = {
    'jpg': 'JPEG', 'jpeg': 'JPEG', 'png': 'PNG', 'webp': 'WEBP', 'bmp': 'BMP', 'gif': 'GIF',
    'tif': 'TIFF', 'TIFF': 'TIFF', 'avif': 'AVIF', 'ico': 'ICO', 'ppm': 'PPM', 'pgm': 'PPM',
    'pbm': 'PPM', 'pnm': 'PPM', 'jp2': 'JPEG2000', 'j2k': 'JPEG2000',
}  # fmt: skip


def test_every_format_that_is_decoded_is_listed_and_the_other_way_round(tmp_path):
    for suffix, format in FORMATS.items():
        for folder in ('a', 'b'):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new('RGB', (16, 16), 'red').save(tmp_path / folder / f'x.{suffix}', format)
    names = {f'.{suffix.lower()}' for suffix in FORMATS}
    assert names == image_files.suffixes() - set(image_files.HEIF_SUFFIXES)
    assert set(FORMATS.values()) == set(image_files.FORMATS)
    split = sources.open_dataset(str(tmp_path)).select('train')
    assert len(split) == 2 * len(FORMATS)
    for i in range(len(split)):
        assert decode(split[i].image, key=split[i].key).shape == (16, 16, 3)
    listed = predict.find_images([tmp_path])
    assert sorted(listed) == sorted(split.paths()), 'predict lists what training reads'


def test_arrays_are_listed_alike_in_training_and_predicting(tmp_path):
    for name in ('a/1.npy', 'b/1.npy', 'a/1.png', 'b/1.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for channels, count in ((3, 2), (5, 4)):
        split = sources.open_dataset(str(tmp_path), channels=channels).select('train')
        assert sorted(predict.find_images([tmp_path], channels=channels)) == sorted(split.paths())
        assert len(split) == count


def test_the_first_picture_of_an_animation_counts(tmp_path):
    frames = [Image.new('RGB', (4, 4), color) for color in ('red', 'blue')]
    frames[0].save(tmp_path / 'x.gif', save_all=True, append_images=frames[1:])
    assert decode((tmp_path / 'x.gif').read_bytes(), key='x')[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize('installed', [True, False])
def test_photos_of_phones_where_their_reader_is_installed(tmp_path, caplog, monkeypatch, installed):
    heif = pytest.importorskip('pillow_heif')
    write(tmp_path, 'a/1.png', 'b/1.png')
    pixels = np.full((16, 24, 3), 200, np.uint8)
    heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / 'a/2.HEIC')
    image_files.suffixes.cache_clear()
    if not installed:
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
        monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    try:
        with caplog.at_level(logging.WARNING):
            split = sources.open_dataset(str(tmp_path)).select('train')
    finally:
        image_files.suffixes.cache_clear()
    photo = (tmp_path / 'a/2.HEIC').read_bytes()
    if installed:
        assert len(split) == 3 and not caplog.text
        assert np.abs(decode(photo, key='x', exif=True).astype(int) - pixels).max() <= 2
    else:
        assert len(split) == 2 and '1 are HEIC: they are read with pip install' in caplog.text
        with pytest.raises(BadImageError, match='need the package pillow-heif'):
            decode(photo, key='x')


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path, 'real/x.png', 'data/a/1.png', 'data/b/1.png')
    (tmp_path / 'data/b/more').symlink_to(tmp_path / 'real')
    (tmp_path / 'data/b/loop').symlink_to(tmp_path / 'data/b')
    split = sources.open_dataset(str(tmp_path / 'data')).select('train')
    assert sorted(keys(split, tmp_path)) == ['data/a/1.png', 'data/b/1.png', 'data/b/more/x.png']


def test_no_link_brings_images_to_another_class(tmp_path, caplog):
    write(tmp_path, 'photos/train/a/1.png', 'photos/train/b/1.png', 'photos/train/b/in/2.png')
    write(tmp_path, 'photos/test/a/8.png', 'photos/test/b/9.png', 'real/c/1.png', 'real/more/1.png')
    train = tmp_path / 'photos/train'
    links = {'up': '..', 'root': '../..', 'far': '/', 'sister': '../a', 'test': '../../test/b'}
    for name, target in links.items():
        (train / 'b' / name).symlink_to(target)
    (train / 'c').symlink_to(tmp_path / 'real/c')  # a class may be a link
    (tmp_path / 'real/c/around').symlink_to(tmp_path / 'real')
    (train / 'b/elsewhere').symlink_to(tmp_path / 'real/more')  # and so may be a part of one
    (tmp_path / 'photos/test/c').symlink_to(tmp_path / 'photos/test/b/deeper')
    write(tmp_path, 'photos/test/b/deeper/7.png')
    data = sources.open_dataset(str(tmp_path / 'photos'))
    assert sorted(keys(data.select('train'), train)) == [
        'a/1.png', 'b/1.png', 'b/elsewhere/1.png', 'b/in/2.png', 'c/1.png'
    ]  # fmt: skip
    assert sorted(keys(data.select('test'), train)) == [
        '../test/a/8.png', '../test/b/9.png', '../test/c/7.png'
    ]  # fmt: skip
    for name in links:
        assert f'{train / "b" / name} is left out' in caplog.text
    assert caplog.text.count('is left out') == len(links) + 2
    (train / 'd').symlink_to('a')
    (tmp_path / 'photos/test/d').symlink_to('a')
    with pytest.raises(UserError, match='train/a and .*train/d are one folder'):
        sources.open_dataset(str(tmp_path / 'photos'))


@pytest.mark.parametrize(
    ('paths', 'words'),
    [
        (['val/a/1.png', 'val/b/1.png'], 'has val/ .*no train/: pass {root}/val to evaluate on it'),
        (['Test/a/1.png', 'Test/b/1.png', 'devkit/x.txt'], 'pass {root}/Test to evaluate'),
        (['images/a/1.png', 'images/b/1.png'], 'in {root}/images: pass that'),
        (['images/a/1.png', 'images/b/1.png', 'lists/x.png.txt'], 'in {root}/images: pass that'),
        (['x/y/train/a/1.png', 'x/y/train/b/1.png', 'x/y/test/a/1.png'], '{root}/x/y: pass that'),
        (['train/all/a/1.png', 'train/all/b/1.png'], 'they are in {root}/train/all: pass that'),
        (['jpg/1.png', 'jpg/2.png'], r'one class only \(jpg\); 2 images are right in {root}/jpg'),
        (['1.png', '2.png', '3.png'], 'no folders of classes; 3 images are right in {root}[.]'),
    ],
)
def test_what_is_a_level_off_is_told_with_the_folder_to_pass(tmp_path, paths, words):
    write(tmp_path, *paths)
    with pytest.raises(UserError, match=words.format(root=tmp_path)) as caught:
        sources.open_dataset(str(tmp_path))
    assert '\n' not in str(caught.value)


def test_folders_in_all_folders_of_classes_are_noted(tmp_path, caplog):
    write(tmp_path, *[f'{kind}/{c}/1.png' for kind in ('color', 'grey') for c in ('apple', 'corn')])
    assert sources.open_dataset(str(tmp_path)).class_names == ('color', 'grey')
    assert (
        f'such as apple, are not classes of their own. To make them so, pass {tmp_path}/color'
        in (caplog.text)
    )


def test_a_test_part_without_a_class_is_taken_with_a_note(tmp_path, caplog):
    write(tmp_path, *[f'Training/{c}/{i}.png' for c in 'abcd' for i in range(2)])
    write(tmp_path, 'TESTING/d/1.png', 'TESTING/b/1.png')
    (tmp_path / 'TESTING/a').mkdir()
    train, test = sources.open_sources(str(tmp_path))
    assert (train.spec, test.spec, test.class_names) == ('train', 'test', tuple('abcd'))
    assert sorted(test.labels()) == [1, 3]
    assert 'TESTING has no images of 2 of the 4 classes: a, c' in caplog.text


def test_unusable_folders(tmp_path):
    def message(name):
        with pytest.raises(UserError) as caught:
            sources.open_sources(str(tmp_path / name))
        assert '\n' not in str(caught.value)
        return str(caught.value)

    (tmp_path / 'nothing').mkdir()
    assert 'CLASS/*.jpg' in message('nothing')
    write(tmp_path, 'one/a/1.png')
    assert 'one class only (a)' in message('one')
    write(tmp_path, 'hollow/a/1.png')
    (tmp_path / 'hollow/b').mkdir()
    (tmp_path / 'hollow/b/notes.txt').write_text('')
    assert 'hollow/b has no images' in message('hollow')
    write(
        tmp_path,
        'differ/train/a/1.png',
        'differ/train/b/1.png',
        'differ/test/a/1.png',
        'differ/test/c/1.png',
    )
    assert 'has classes that training does not know: c in' in message('differ')
    assert 'there is no folder' in message('absent')
    (tmp_path / 'file').write_text('')
    assert 'is a file' in message('file')
    (tmp_path / 'closed').mkdir()


def test_a_vanished_file_is_named(photos):
    split = sources.open_dataset(str(photos)).select('train')
    path = split[5].key
    os.remove(path)
    with pytest.raises(BadImageError, match='No such file') as caught:
        split[5]
    assert caught.value.key == path


@pytest.mark.parametrize('counts', [[2] * 30, [5] * 30, [8] * 30, [4, 200], [1] * 30 + [40, 3, 2]])
def test_each_class_of_two_and_more_is_held_out(tmp_path, counts):
    """And each is trained on."""
    counts = np.array(counts)
    write(tmp_path, *[f'c{c:02}/{i}.png' for c, count in enumerate(counts) for i in range(count)])
    train, test = sources.open_sources(str(tmp_path))
    trained, tested = (np.bincount(s.labels(), minlength=len(counts)) for s in (train, test))
    assert (trained + tested == counts).all() and trained.all()
    assert ((tested > 0) == (counts > 1)).all()
    assert len(test) <= max(counts.sum() / 10, (counts > 1).sum()) + 1
    notes = coverage_notes(train.class_names, trained, tested)
    assert len(notes) == (1 in counts)
    if notes:
        assert 'of 33 classes, 30 with a single image' in notes[0]


def test_classes_of_one_image_leave_nothing_to_hold_out(tmp_path):
    write(tmp_path, 'a/1.png', 'b/1.png', 'c/1.png')
    with pytest.raises(UserError, match='no class of .* has two images.*--config.pp.test=train'):
        sources.open_sources(str(tmp_path))
