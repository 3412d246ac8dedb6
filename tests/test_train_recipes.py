"""Whole runs with the pieces of recipes: they survive a stop, and end in the model folder."""

import jax
import ml_collections
import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import data, train
from vit_jax.configs import digits

RNG = np.random.RandomState(0)
PIXELS = RNG.randint(0, 256, (40, 16, 16, 3)).astype(np.uint8)
LABELS = RNG.randint(0, 3, 40)
RECIPE = {
    'epochs': 1.6, 'decay_type': 'rsqrt', 'cooldown_steps': 2, 'optimizer': 'muon', 'base_lr': 1e-3,
    'weight_decay': 0.1, 'wd_mults': (('.*', 1.0),), 'lr_mults': (('head/.*', 5.0),),
    'layer_decay': 0.75, 'frozen': 'embedding/.*',
    'loss': 'sigmoid', 'label_smoothing': 0.1, 'class_weights': 'balanced',
}  # fmt: skip


def make_config(**changes) -> ml_collections.ConfigDict:
    config = digits.get_config()
    config.model.hidden_size = 16
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=2, dropout_rate=0.0)
    config.pp.crop, config.pp.resize, config.model.patches.size = 16, 0, (8, 8)
    config.batch, config.batch_eval, config.warmup_steps = 8, 8, 2
    config.progress_every, config.eval_every, config.checkpoint_every = 1, 2, 2
    config.compile_cache, config.report = '', False
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config, changes)


def run(config, workdir, callbacks=()):
    sources = tuple(
        data.from_arrays(PIXELS[part], LABELS[part], ('cat', 'dog', 'cow'))
        for part in (slice(30), slice(30, 40))
    )
    return train.train_and_evaluate(config, workdir, sources=sources, callbacks=callbacks)


class Stop:
    def on_step(self, step, state, metrics):
        if step == 5:
            raise KeyboardInterrupt


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('recipe') / 'run'
    return workdir, jax.device_get(run(make_config(**RECIPE), workdir))


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(finished, tmp_path):
    whole, params = finished
    config, workdir = make_config(**RECIPE), tmp_path / 'run'
    with pytest.raises(KeyboardInterrupt):
        run(config, workdir, [Stop()])
    again = jax.device_get(run(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (workdir / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_a_finished_run_of_epochs_started_again_does_nothing(finished, capsys):
    workdir, _ = finished
    assert run(make_config(**RECIPE), workdir) is None
    assert 'this run is finished (6 steps)' in capsys.readouterr().out
