"""Whole runs with the pieces of recipes: they survive a stop, and end in the model folder."""

import json

import jax
import modules
import numpy as np
import pytest
import small

from vit_jax.analysis import report
from vit_jax.checkpoint import npz
from vit_jax.export import onnx
from vit_jax.inference import model_folder
from vit_jax.inference.onnx import OnnxClassifier

RNG = np.random.RandomState(0)
RECIPE = {
    'model.transformer.num_layers': 2, 'epochs': 1.6, 'decay_type': 'rsqrt', 'cooldown_steps': 2,
    'optimizer': 'muon', 'base_lr': 1e-3,
    'weight_decay': 0.1, 'wd_mults': (('.*', 1.0),), 'lr_mults': (('head/.*', 5.0),),
    'layer_decay': 0.75, 'ema_decay': 0.6, 'ema_warmup_steps': 1, 'frozen': 'embedding/.*',
    'loss': 'sigmoid', 'label_smoothing': 0.1, 'class_weights': 'balanced', 'augreg': 'light2',
    'random_erasing': 0.5, 'pp.flip_vertical': True, 'stochastic_depth': 0.3,
    'sam_rho': 0.05, 'gsam_alpha': 0.5, 'repeated_augmentation': 2,
}  # fmt: skip


class Stop:
    def on_step(self, step, state, metrics):
        if step == 5:
            raise KeyboardInterrupt


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('recipe') / 'run'
    return workdir, jax.device_get(small.run(small.run_config(**RECIPE), workdir))


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(finished, tmp_path):
    whole, params = finished
    config, workdir = small.run_config(**RECIPE), tmp_path / 'run'
    with pytest.raises(KeyboardInterrupt):
        small.run(config, workdir, [Stop()])
    again = jax.device_get(small.run(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (workdir / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_its_average_is_exported_and_its_settings_are_reported(finished, tmp_path):
    workdir, params = finished
    opened = model_folder.load(workdir / 'model')
    onnx.save(onnx.build(opened), tmp_path / 'a.onnx')
    pixels = RNG.uniform(0, 255, (3, 16, 16, 3)).astype(np.float32)
    found = OnnxClassifier(tmp_path / 'a.onnx').logits(pixels)
    expected = modules.apply(opened.model, params, pixels / 127.5 - 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    report.write([workdir], tmp_path / 'report.html')
    text = (tmp_path / 'report.html').read_text()
    for name in ('ema_decay', 'stochastic_depth', 'sam_rho', 'random_erasing', 'layer_decay'):
        assert name in text


def test_a_finished_run_of_epochs_started_again_does_nothing(finished, capsys):
    workdir, _ = finished
    assert small.run(small.run_config(**RECIPE), workdir) is None
    assert 'this run is finished (6 steps)' in capsys.readouterr().out


def test_the_moving_average_is_evaluated_and_becomes_the_model(finished, tmp_path):
    """A run with the same steps and without it has the same losses, and another model."""
    workdir, params = finished
    saved = npz.open_file(workdir / 'model/params.npz').read()
    jax.tree.map(np.testing.assert_array_equal, saved, dict(params))
    plain = dict(RECIPE, ema_decay=0.0, ema_warmup_steps=0)
    states = []

    class Copy:
        def on_step(self, step, state, metrics):
            states.append(jax.device_get(state.params))

    last = jax.device_get(small.run(small.run_config(**plain), tmp_path / 'run', [Copy()]))
    jax.tree.map(np.testing.assert_array_equal, last, states[-1])
    average = states[0]
    for state in states[1:]:
        average = jax.tree.map(lambda a, p: 0.6 * a + 0.4 * p, average, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, average)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), params, last))) > 1e-3
    with_and_without = [
        [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
        for path in (workdir, tmp_path / 'run')
    ]
    for name, differs in (('train_loss', False), ('loss_test', True)):
        a, b = ([line[name] for line in lines if name in line] for lines in with_and_without)
        assert (a != b) == differs and len(a) == len(b) > 0
