"""A run on a folder of photos: what it says of the data, and what its model is evaluated on."""

import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax import config as config_lib
from vit_jax import train
from vit_jax.commands.evaluate import choose_split
from vit_jax.configs import digits
from vit_jax.data import sources
from vit_jax.inference.description import TrainingData


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """24 dark images, 3 light ones, and a single grey one; a dark one that
    is held out is a copy of another."""
    root = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for level, (name, count) in enumerate({'dark': 24, 'grey': 1, 'light': 3}.items()):
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 80, (20, 20, 3)) + 85 * level
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f'{i}.png')
    shutil.copy(root / 'dark/0.png', root / 'dark/13.png')
    return root


@pytest.fixture(scope='module')
def workdir(photos, tmp_path_factory):
    """Of a finished run on them."""
    workdir = tmp_path_factory.mktemp('run')
    config = digits.get_config()
    config.model.hidden_size = 16
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=1, dropout_rate=0.0)
    config.update(dataset=str(photos), report=False, batch=8, accum_steps=1)
    config.update(total_steps=2, warmup_steps=1)
    train.train_and_evaluate(config_lib.resolve(config), workdir)
    return workdir


def test_what_is_wrong_with_the_data_is_named(workdir, photos):
    log = (workdir / 'train.log').read_text()
    assert (
        'WARNING: of 3 classes, 1 with a single image, which is trained on, not tested: grey' in log
    )
    pair = f'{photos}/dark/13.png and {photos}/dark/0.png'
    assert 'WARNING: 1 of the 3 test images are copies of training images, byte for byte' in log
    assert pair in log
    assert log.count('WARNING') == 2


def test_what_is_evaluated_without_being_asked_for(photos, workdir, tmp_path, run_script):
    """The test part; what the training held out; all of other photos."""

    def split(dataset, *words):
        done = run_script('evaluate.py', '--model', workdir / 'model', '--dataset', dataset, *words)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith('split: ')]
        return line.removeprefix('split: ')

    assert split('') == 'train[-3:], what the training of the model held out'
    assert split(photos, '--split', 'train[:5]') == 'train[:5], as --split says'
    moved, other = tmp_path / 'moved', tmp_path / 'other'
    shutil.copytree(photos, moved)
    assert split(moved) == 'train[-3:], what the training of the model held out'
    shutil.copytree(photos, other)
    (other / 'dark/23.png').rename(other / 'dark/another.png')
    assert split(other) == 'train, all of it: the model tells of no training on it'


def test_a_split_of_what_was_trained_on(photos):
    dataset = sources.open_dataset(str(photos))
    fingerprint = dataset.select('train').fingerprint()
    trained = TrainingData(str(photos), 'train', 'test', fingerprint)
    assert choose_split(dataset, trained) == ('train', 'all of it, WHICH THE MODEL WAS TRAINED ON')
    trained = TrainingData(str(photos), 'train[:9]', 'train[9:]')
    assert choose_split(dataset, trained)[0] == 'train[9:]', 'a model of an earlier version'
    trained = TrainingData(f'{photos}/', 'train[:9]', 'train[9:]', 'another')
    spec, reason = choose_split(dataset, trained)
    assert spec == 'train[-3:]' and 'it has changed since' in reason


def test_the_test_part_comes_first_unless_it_was_trained_on(photos, tmp_path):
    for part in ('train', 'val', 'test'):
        shutil.copytree(photos, tmp_path / part)
    dataset = sources.open_dataset(str(tmp_path))
    assert choose_split(dataset, TrainingData()) == ('test', 'the test part of the dataset')
    for train_spec, expected in (('train', 'test'), ('train+test[:9]', 'validation')):
        fingerprint = dataset.select(train_spec).fingerprint()
        trained = TrainingData('elsewhere', train_spec, 'validation', fingerprint)
        assert choose_split(dataset, trained)[0] == expected
    trained = TrainingData('elsewhere', train_spec, 'validation', fingerprint, val='test[9:]')
    assert choose_split(dataset, trained)[0] == 'validation', 'chosen on the test part'
    held_out = dataset.select('train without 10%')
    trained = TrainingData('', held_out.spec, 'test', held_out.fingerprint(), val='10% of train')
    assert choose_split(dataset, trained)[0] == 'test'


def test_a_set_is_evaluated_as_its_preset_says():
    dataset = sources.open_dataset('digits')
    assert choose_split(dataset, TrainingData())[0] == 'train[80%:]'
    assert choose_split(dataset, TrainingData('digits', 'train[:9]', 'train[9:]'))[0] == 'train[9:]'
