"""The configs that train from scratch: resolved, shrunk, and one step done."""

import jax
import ml_collections
import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import data, train
from vit_jax.configs import scratch_imagenet21k, scratch_s16_imagenet
from vit_jax.errors import UserError
from vit_jax.inference import model_folder
from vit_jax.models import positions

PIXELS = np.random.RandomState(0).randint(0, 256, (16, 40, 36, 3)).astype(np.uint8)
LABELS = np.arange(16) % 3


def shrunk(config, **changes) -> ml_collections.ConfigDict:
    """Its recipe, with a model, images and a duration for a test."""
    config.model.hidden_size = 16
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=2)
    config.pp.crop, config.pp.resize = 32, 36
    config.batch, config.batch_eval, config.epochs, config.total_steps = 4, 4, None, 1
    config.warmup_steps, config.eval_every, config.compile_cache = 0, 1, ''
    config.report = False
    config.update(changes)
    return config_lib.resolve(config)


def run(config, workdir):
    sources = tuple(
        data.from_arrays(PIXELS[part], LABELS[part], ('cat', 'dog', 'cow'))
        for part in (slice(12), slice(12, 16))
    )
    return train.train_and_evaluate(config, workdir, sources=sources)


def test_the_plain_baseline_has_the_settings_of_the_paper_and_takes_a_step(tmp_path):
    config = config_lib.resolve(scratch_s16_imagenet.get_config())
    assert (config.batch, config.epochs, config.warmup_steps) == (1024, 90.0, 10_000)
    assert (config.randaug, config.mixup, config.base_lr) == ('2,10', 0.2, 0.001)
    assert config.weight_decay * config.base_lr == pytest.approx(0.0001)
    assert (config.pp.train, config.pp.test) == ('train[:99%]', 'validation')
    config = shrunk(scratch_s16_imagenet.get_config())
    config.unlock()
    config.model.representation_size = 16
    params = jax.device_get(run(config.lock(), tmp_path / 'run'))
    assert 'cls' not in params
    table = params['Transformer']['posembed_input']['pos_embedding']
    np.testing.assert_array_equal(table[0], positions.sincos_2d(2, 2, 16))
    assert model_folder.load(tmp_path / 'run/model').preprocess.interpolation == 'box'


def test_augreg_begins_with_a_low_head_and_takes_a_step(tmp_path):
    for model, randaug, mixup in (('Ti_16', '', 0.0), ('S_16', '2,0', 0.0), ('L_16', '2,15', 0.5)):
        config = config_lib.resolve(scratch_imagenet21k.get_config(model))
        assert (config.randaug, config.mixup) == (randaug, mixup)
        assert (config.batch, config.epochs, config.loss) == (4096, 300.0, 'sigmoid')
    config = shrunk(scratch_imagenet21k.get_config('B_16'), dataset='photos', base_lr=1e-6)
    params = run(config, tmp_path / 'run')
    np.testing.assert_allclose(params['head']['bias'], -10, atol=1e-4)
    with pytest.raises(ValueError, match='one of Ti_16, S_32'):
        scratch_imagenet21k.get_config('H_14')


def test_sincos_positions_are_the_formula_for_each_patch():
    table = positions.sincos_2d(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = []
            for place in (column, row):
                for wave in (np.sin, np.cos):
                    expected += [wave(place * omega) for omega in (1.0, 1e-4)]
            np.testing.assert_allclose(table[row * 3 + column], expected, atol=1e-6)


def test_sincos_positions_are_for_new_weights_of_models_that_have_positions(tmp_path):
    config = scratch_s16_imagenet.get_config()
    config.pretrained = 'x.npz'
    with pytest.raises(UserError, match='config.pretrained brings positions with it'):
        config_lib.resolve(config)
    config = scratch_s16_imagenet.get_config()
    config.model.hidden_size = 6
    config = shrunk(config, frozen='')
    config.unlock()
    config.model.hidden_size, config.model.representation_size = 6, None
    with pytest.raises(UserError, match='a multiple of 4'):
        run(config.lock(), tmp_path / 'run')
