"""Datasets: what is found, how it is sliced, and what is said about input that cannot be used."""

import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data import from_sequence, sources
from vit_jax.data.holdout import choose, coverage_notes, held_out, stratified_order
from vit_jax.errors import UserError


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


def test_digits():
    train, test = sources.open_sources('digits')
    assert len(train) + len(test) == 1797 and train.overlap(test) == 0
    assert train.class_names == tuple('0123456789')
    counts = np.bincount([test[i].label for i in range(len(test))])
    assert counts.min() >= 17 and counts.max() <= 19
    example = train[0]
    assert example.image.shape == (8, 8, 3) and example.image.dtype == np.uint8
    pixels = np.stack([train[i].image for i in range(200)])
    assert (pixels.min(), pixels.max()) == (0, 255) and example.key == 'digits:train/0'
    assert test[0].key == 'digits:train/1617'


@pytest.mark.parametrize('name', ['digits', 'tf_flowers'])
def test_a_folder_named_like_a_set_is_a_folder(tmp_path, name, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, f'{name}/a/1.png', f'{name}/a/2.png', f'{name}/b/1.png', f'{name}/b/2.png')
    for spelling in (name, f'./{name}', str(tmp_path / name)):
        assert sources.is_path(spelling)
        assert sources.open_dataset(spelling).class_names == ('a', 'b')
    assert sources.lasting_name(name) == f'./{name}'
    for lasting in (f'./{name}', str(tmp_path / name), 'cifar10', ''):
        assert sources.lasting_name(lasting) == lasting
    assert caplog.text.count(f'the dataset {name} is the folder {tmp_path / name}, not') == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=300), st.integers(1, 99))
@settings(deadline=None, max_examples=100)
def test_stratified_order(labels, percent):
    labels = np.array(labels)
    order = stratified_order(labels)
    assert sorted(order) == list(range(len(labels)))
    first = labels[order[: round(len(labels) * percent / 100)]]
    for label in set(labels):
        total = (labels == label).sum()
        # Never further from its share than one example per class.
        assert abs((first == label).sum() - total * len(first) / len(labels)) <= len(set(labels))


def test_the_order_of_sets_without_small_classes_stays():
    labels = np.repeat(np.arange(5), (10, 13, 29, 11, 50))
    order = stratified_order(labels).astype('<i8')
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == '0712b73866ea8f6b'


@given(st.lists(st.integers(1, 25), min_size=1, max_size=30).filter(lambda c: max(c) > 1))
@settings(deadline=None, max_examples=100)
def test_held_out(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[stratified_order(labels)]
    trained, tested = labels[: -held_out(labels)], labels[-held_out(labels) :]
    assert set(trained.tolist()) == set(range(len(counts)))
    assert set(tested.tolist()) == {label for label, count in enumerate(counts) if count > 1}


@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=30), st.floats(0.001, 0.5), st.integers(0, 9)
)
@settings(deadline=None, max_examples=100)
def test_validation_has_every_class_and_leaves_every_class(counts, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    found = choose(labels, share)
    left = np.setdiff1d(np.arange(len(labels)), found)
    several = {label for label, count in enumerate(counts) if count > 1}
    assert set(labels[found].tolist()) == several and np.all(np.diff(found) > 0)
    assert set(labels[left].tolist()) == {label for label, count in enumerate(counts) if count}
    of_several = sum(count for count in counts if count > 1)
    assert len(found) == max(round(share * of_several), len(several))


def test_three_parts_by_rule_by_name_and_by_folder(tmp_path, photos):
    whole = sources.open_dataset(str(photos)).select('train')
    train, val, test = sources.open_three(str(photos), val_split='10%')
    assert (len(train), len(val), len(test)) == (32, 4, 4)
    assert train.overlap(val) == train.overlap(test) == val.overlap(test) == 0
    parts = [keys(each, photos) for each in (train, val, test)]
    assert sorted(sum(parts, [])) == sorted(keys(whole, photos))
    assert sum(key.startswith('dog') for key in parts[1]) == 1
    # Their names give them back, as `evaluate` and the report need.
    for each in (train, val):
        again = sources.open_dataset(str(photos)).select(each.spec)
        assert again.fingerprint() == each.fingerprint() and again.spec == each.spec
        assert keys(again, photos) == keys(each, photos)
        assert again.labels().tolist() == [each[i].label for i in range(len(each))]
        assert [os.path.relpath(path, photos) for path in again.paths()] == keys(each, photos)
    assert train.spec == 'train[:90%] without 10%' and val.spec == '10% of train[:90%]'

    train, val, test = sources.open_three(
        str(photos), train_split='train', val_split='train[10:20]', test_split='train[:10]'
    )
    assert keys(val, photos) == keys(whole, photos)[10:20]
    assert keys(train, photos) == keys(whole, photos)[:10] + keys(whole, photos)[20:]
    assert train.spec == 'train without train[10:20]'
    assert sources.open_three(str(photos))[1] is None


def test_where_validation_is_needed_the_folder_of_it_is_taken(tmp_path):
    write(tmp_path, *[f'{part}/{name}/{i}.png' for part in ('train', 'val') for name in 'ab'
                      for i in range(5)])  # fmt: skip
    train, val, test = sources.open_three(str(tmp_path), validate=True)
    assert (val.spec, test.spec, len(train), len(val)) == ('10% of train', 'validation', 8, 2)
    with pytest.raises(UserError, match='10 of these 10 images are those of the test'):
        sources.open_three(str(tmp_path), val_split='validation')
    write(tmp_path, 'test/a/1.png', 'test/b/1.png')
    train, val, test = sources.open_three(str(tmp_path), validate=True)
    assert (train.spec, val.spec, test.spec) == ('train', 'validation', 'test')
    train, val, _ = sources.open_three(str(tmp_path), train_split='train+validation', validate=True)
    assert (train.spec, val.spec) == ('train+validation without 10%', '10% of train+validation')


@pytest.mark.parametrize(
    ('share', 'words'),
    [('0%', 'is no share'), ('60%', 'from 0.1% to 50%'), ('1.2.3%', 'is no share')],
)
def test_shares_without_sense(photos, share, words):
    with pytest.raises(UserError, match=words):
        sources.open_three(str(photos), val_split=share)


def test_what_cannot_be_held_out(tmp_path):
    write(tmp_path, *[f'{part}/{name}/1.png' for part in ('train', 'test') for name in 'ab'])
    with pytest.raises(UserError, match='no class of .* has two images'):
        sources.open_three(str(tmp_path), val_split='10%')
    with pytest.raises(UserError, match='without train nothing is left'):
        sources.open_three(str(tmp_path), val_split='train')


def test_labels_that_are_not_known_are_read():
    labels = np.repeat(np.arange(10), 2)
    pairs = [(np.zeros((4, 4, 3), np.uint8), int(label)) for label in labels]
    _, held = from_sequence(pairs, class_names=tuple('abcdefghij')).hold_out('10%')
    assert held.labels() is None
    assert sorted(held[i].label for i in range(len(held))) == list(range(10))


def test_classes_that_are_not_covered_are_named():
    names = tuple('abcdefgh')
    notes = coverage_notes(names, np.array([0, 1, 2, 3, 3, 3, 3, 3]), np.array([1] + [0] * 7))
    assert notes == (
        'of 8 classes, 1 with no training images: a',
        'of 8 classes, 1 with a single image, which is trained on, not tested: b',
        'of 8 classes, 6 with no test images: c, d, e, f, g, ...',
    )


def test_splits_are_tfds_splits(photos):
    """All kinds of datasets cut the same split in the same place, TFDS's."""
    dataset = sources.open_dataset(str(photos))
    whole = keys(dataset.select('train'), photos)
    for spec, expected in {
        'train[:33%]': whole[:13],
        'train[33%:]': whole[13:],
        'train[5:8]': whole[5:8],
        'train[-3:]': whole[-3:],
        'train[:2]+train[-2:]': whole[:2] + whole[-2:],
        ' train[:2] + train[2:4] ': whole[:4],
        'all': whole,
    }.items():
        assert keys(dataset.select(spec), photos) == expected, spec


@pytest.mark.parametrize(
    ('spec', 'words'),
    [
        ('trian', "Unknown split 'trian'"),
        ('train[:', 'Unrecognized split format'),
        ('train[:0]', 'no examples'),
        ('train[9:3]', 'no examples'),
        ('train[:101%]', r'\[-100, 100\]'),
        ('train[:41]', 'incompatible with 40 examples'),
        ('test', "Unknown split 'test'"),
    ],
)
def test_bad_splits(photos, spec, words):
    with pytest.raises(UserError, match=words) as caught:
        sources.open_sources(str(photos), train_split=spec)
    assert 'train (40 examples)' in str(caught.value) and '\n' not in str(caught.value)


def test_overlap(photos):
    dataset = sources.open_dataset(str(photos))
    select = dataset.select
    assert select('train[:30]').overlap(select('train[20:]')) == 10
    assert select('train[:5]+train[:5]').overlap(select('train')) == 5
    assert select('train[:50%]').overlap(select('train[50%:]')) == 0


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('tf_flower', 'did you mean tf_flowers'),
        ('no_such_thing_at_all', 'neither a folder'),
        ('./photos', 'there is no folder ./photos'),
        ('~/no/such/folder', 'there is no folder'),
        ('my photos', 'dataset my photos is neither a folder'),
        ('imdb_reviews', 'not a set for image classification.*has: text, label'),
        ('cifar10:9.9.9', 'cannot be loaded at version 9.9.9'),
        ('', 'no dataset given'),
    ],
)
def test_unknown_datasets(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        sources.open_dataset(name, tfds_data_dir=str(tmp_path))


READ_WITHOUT_TENSORFLOW = """
import contextlib, importlib.util, sys
assert importlib.util.find_spec('tensorflow'), 'proves nothing without TensorFlow installed'
from vit_jax.data import batches, loader, preprocess, sources
train, test = sources.open_sources({name!r}, tfds_data_dir={data_dir!r})
data = loader.BatchLoader(train, preprocess.Preprocess(crop=16), batch=8, seed=0)
with contextlib.closing(data.from_step(0)) as iterator:
    for _ in range(3):
        next(iterator)
for batch in batches.eval_batches(test, preprocess.Preprocess(crop=16), batch=100):
    pass
loaded = [name for name in ('tensorflow', 'torch') if name in sys.modules]
assert not loaded, loaded
print('read', train, 'and', test)
"""


def read_without_tensorflow(name, data_dir):
    """Opens and reads a set in a fresh process; fails if that imports TensorFlow or PyTorch."""
    script = READ_WITHOUT_TENSORFLOW.format(name=name, data_dir=str(data_dir))
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 'read' in done.stdout


def test_tf_flowers(shared_dir):
    data_dir = shared_dir / 'data/tfds'
    train, test = sources.open_sources('tf_flowers', tfds_data_dir=str(data_dir))
    assert (len(train), len(test)) == (3303, 367) and not train.exif
    assert train.class_names == ('dandelion', 'daisy', 'tulips', 'sunflowers', 'roses')
    labels = [train[i].label for i in range(300)] + [test[i].label for i in range(60)]
    assert np.bincount(labels, minlength=5).min() > 30
    assert test[0].key == 'tf_flowers:train/3303'
    whole, _ = sources.open_sources(
        'tf_flowers:3.0.1', tfds_data_dir=str(data_dir), train_split='train'
    )
    assert whole[3303].image == test[0].image and isinstance(test[0].image, bytes)
    read_without_tensorflow('tf_flowers', data_dir)
