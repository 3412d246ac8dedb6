"""Whole runs with data, loss, optimizer, model and callbacks of one's own."""

import json

import flax.linen as nn
import jax
import modules
import numpy as np
import optax
import pytest
import small

from vit_jax import data, losses, models, train
from vit_jax.errors import UserError
from vit_jax.inference import model_folder
from vit_jax.run import product

RNG = np.random.RandomState(0)
PIXELS = RNG.randint(0, 256, (40, 20, 24, 3)).astype(np.uint8)
SEVERAL = (RNG.rand(40, 3) < 0.4).astype(np.float32)
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def several_labels(**options):
    return tuple(
        data.from_arrays(PIXELS[part], SEVERAL[part], ('cat', 'dog', 'cow'), **options)
        for part in (slice(30), slice(30, 40))
    )


def sigmoid(logits, batch, params):
    """Also tells something of each example, and weighs the parameters."""
    loss, _ = losses.sigmoid_cross_entropy(logits, batch, params)
    right = ((logits > 0) == (batch['label'] > 0.5)).mean()
    return loss + 1e-3 * optax.tree.norm(params, squared=True), {'right_train': right}


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


class Points:
    """Notes when it is called with what; `stop` is a step to fail at."""

    def __init__(self, stop=None):
        self.stop, self.seen = stop, []

    def _note(self, point, step, state, metrics):
        assert int(state.step) == step
        self.seen.append((point, step, sorted(metrics)))

    def on_start(self, step, state, metrics):
        self._note('start', step, state, metrics)

    def on_step(self, step, state, metrics):
        self._note('step', step, state, metrics)
        if step == self.stop:
            raise KeyboardInterrupt
        if step == 3:
            return {'twice_the_loss': 2 * metrics['train_loss']}

    def on_eval(self, step, state, metrics):
        self._note('eval', step, state, metrics)
        return {'half_test': np.float32(0.5)} if 'loss_test' in metrics else None

    def on_checkpoint(self, step, state, metrics):
        self._note('checkpoint', step, state, metrics)

    def on_end(self, step, state, metrics):
        self._note('end', step, state, metrics)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """One run with several labels for each image, another loss and another optimizer."""
    workdir, points = tmp_path_factory.mktemp('own') / 'run', Points()
    config = small.run_config(keep_best=True, report=True)
    params = train.train_and_evaluate(
        config, workdir, sources=several_labels(), loss_fn=sigmoid, tx=TX, callbacks=[points]
    )
    return workdir, jax.device_get(params), points


def test_the_loss_and_its_metrics_are_what_is_logged(finished):
    workdir, _, _ = finished
    found = lines(workdir)
    first, last = found[0], found[-1]
    assert set(first) == {'step', 'train_loss', 'right_train', 'gradient_norm'}
    assert set(last) == {'step', 'loss_test', 'right_test', 'half_test', 'step_tested'}
    best = last['step_tested']
    model = model_folder.load(workdir / ('model' if best == 6 else 'model_best'))
    assert model.class_names == ('cat', 'dog', 'cow')
    pixels = np.stack([model.preprocess.evaluate(image) for image in PIXELS[30:]])
    logits = modules.apply(model.model, model.params, pixels / 127.5 - 1)
    loss, metrics = sigmoid(logits, {'label': SEVERAL[30:]}, model.params)
    assert last['loss_test'] == pytest.approx(float(loss), rel=1e-5)
    assert last['right_test'] == pytest.approx(float(metrics['right_train']), abs=1e-6)
    log = (workdir / 'train.log').read_text()
    assert 'given by the caller: loss_fn sigmoid, tx' in log
    assert 'test loss' in log and 'accuracy' not in log
    report = (workdir / 'report.html').read_text()
    assert 'given its data by a program' in report


def test_callbacks_are_called_at_every_point(finished):
    workdir, _, points = finished
    order = [(point, step) for point, step, _ in points.seen]
    expected = [('start', 0)]
    for step in range(1, 7):
        expected.append(('step', step))
        expected += [('eval', step), ('checkpoint', step)] if step % 2 == 0 else []
    assert order == [*expected, ('end', 6), ('eval', lines(workdir)[-1]['step_tested'])]
    known = {point: metrics for point, _, metrics in points.seen}
    assert known['start'] == known['checkpoint'] == known['end'] == []
    assert known['eval'] == ['loss_test', 'right_test']
    assert {'train_loss', 'right_train', 'gradient_norm'} < set(known['step'])
    third = [line for line in lines(workdir) if 'twice_the_loss' in line]
    assert [line['step'] for line in third] == [3]
    assert third[0]['twice_the_loss'] == pytest.approx(2 * third[0]['train_loss'])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(finished, tmp_path):
    whole, params, _ = finished
    config, workdir = small.run_config(keep_best=True), tmp_path / 'run'
    own = {'sources': several_labels(), 'loss_fn': sigmoid, 'tx': TX}
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, workdir, **own, callbacks=[Points(stop=5)])
    for other, words in (
        ({'loss_fn': losses.sigmoid_cross_entropy}, 'loss_fn is another.*loss_fn: "sigmoid" ->'),
        ({'tx': optax.sgd(0.1)}, 'tx is another'),
        ({'sources': several_labels(fingerprint='v2')}, 'dataset is another'),
        ({'tx': None}, 'tx is another'),
    ):
        with pytest.raises(UserError, match=words):
            train.train_and_evaluate(config, workdir, **{**own, **other})
    points = Points()
    found = train.train_and_evaluate(config, workdir, **own, callbacks=[points])
    assert points.seen[0][:2] == ('start', 4)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), params)
    assert (workdir / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    scores = {line['step']: line['loss_val'] for line in lines(whole) if 'loss_val' in line}
    best = min(scores, key=scores.get)
    assert (workdir / 'model_best').exists() == (best != 6)


class Linear(nn.Module):
    """A model of one's own: the mean of each channel, and a layer."""

    outputs: int

    @nn.compact
    def __call__(self, inputs, *, train):
        return nn.Dense(self.outputs)(inputs.mean((1, 2)))


def test_own_model_with_13_channels_real_targets_and_batches_of_an_iterator(tmp_path):
    """A model folder cannot hold it: the log says so, and the checkpoint has the parameters."""
    images = RNG.rand(24, 16, 16, 13).astype(np.float32)
    targets = images.mean((1, 2, 3))[:, None] * 4

    def batches():
        for step in range(6):
            yield images[8 * (step % 2) :][:8], targets[8 * (step % 2) :][:8]

    test = data.from_arrays(images[16:], targets[16:], ('brightness',), channels=13)
    config, workdir = small.run_config(report=True), tmp_path / 'run'
    own = {'loss_fn': losses.squared_error, 'model': Linear(1)}
    sources = data.BatchStream(batches(), ('brightness',), channels=13), test
    params = train.train_and_evaluate(config, workdir, sources=sources, **own)
    log = (workdir / 'train.log').read_text()
    assert 'model: Linear, 14 parameters' in log and 'given by the caller: loss_fn squared' in log
    assert 'WARNING: no model folder: the model is a Linear' in log
    assert not (workdir / 'model').exists() and (workdir / 'checkpoints/6').exists()
    tested = [line['loss_test'] for line in lines(workdir) if 'loss_test' in line]
    assert tested[0] > tested[-1]
    # Started again, there is nothing to do but to give the parameters.
    sources = data.BatchStream(batches(), ('brightness',), channels=13), test
    again = train.train_and_evaluate(config, workdir, sources=sources, **own)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_own_vision_transformer_becomes_a_model_folder_if_its_outputs_have_names(tmp_path):
    model = models.VisionTransformer(
        num_classes=3, patches={'size': (8, 8)}, hidden_size=8, classifier='gap',
        transformer={'num_layers': 1, 'num_heads': 2, 'mlp_dim': 8, 'dropout_rate': 0.0},
    )  # fmt: skip
    config, workdir = small.run_config(total_steps=2, warmup_steps=0), tmp_path / 'run'
    own = {'loss_fn': losses.sigmoid_cross_entropy, 'model': model}
    params = train.train_and_evaluate(config, workdir, sources=several_labels(), **own)
    loaded = model_folder.load(workdir / 'model')
    assert loaded.model == model and loaded.class_names == ('cat', 'dog', 'cow')
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), jax.device_get(dict(params)))
    for other, names, words in (
        (model, 2, 'has 3 outputs, and there are 2 names'),
        (model.clone(encoder=Linear), 3, 'encoder=.*has no JSON form'),
    ):
        with pytest.raises(UserError, match=words):
            product.architecture_of(other, names)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'sources': ([1], [2])}, r'sources\[0\]: list is no source'),
        ({'sources': (data.from_arrays(PIXELS, SEVERAL),) * 1 + several_labels()[1:]}, 'differ'),
        ({'sources': (several_labels()[0], data.from_arrays(PIXELS, SEVERAL[:, 0]))}, 'differ'),
        ({'loss_fn': losses.squared_error, 'model': Linear(2)}, 'do not fit the logits'),
        ({'loss_fn': lambda *_: (0.0, {'lr': 0.0})}, "cannot be called 'lr'"),
        ({'callbacks': [object()]}, 'methods on_start.*object has: none'),
        ({'callbacks': [type('C', (), {'on_epoch': 1})()]}, 'C has: on_epoch'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        own = {'sources': several_labels(), **changes}
        train.train_and_evaluate(small.run_config(), tmp_path / 'run', **own)
    assert not (tmp_path / 'run').exists()
