"""A run on a folder of photos: what it says of the data, and what its model is evaluated on."""

import numpy as np
import pytest
from PIL import Image

from vit_jax import config as config_lib
from vit_jax import train
from vit_jax.configs import digits


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """24 dark images, 3 light ones, and a single grey one."""
    root = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for level, (name, count) in enumerate({'dark': 24, 'grey': 1, 'light': 3}.items()):
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 80, (20, 20, 3)) + 85 * level
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f'{i}.png')
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


def test_classes_that_are_not_tested_are_named(workdir):
    log = (workdir / 'train.log').read_text()
    assert (
        'WARNING: of 3 classes, 1 with a single image, which is trained on, not tested: grey' in log
    )
    assert log.count('WARNING') == 1
