"""Whole runs on images with several classes, or with numbers, from training to exported files."""

import json

import jax
import modules
import numpy as np
import pytest
import small
from PIL import Image
from sklearn import metrics as sklearn_metrics

from vit_jax import data, losses, train
from vit_jax.data import own
from vit_jax.errors import UserError
from vit_jax.evaluate import Outputs
from vit_jax.export import onnx, pytorch
from vit_jax.export.options import Options
from vit_jax.inference import classifier, model_folder, predict
from vit_jax.inference import several as several_metrics
from vit_jax.inference.task import Task

RNG = np.random.RandomState(0)
PIXELS = RNG.randint(0, 256, (40, 16, 16, 3)).astype(np.uint8)
SEVERAL = (RNG.rand(40, 3) < 0.4).astype(np.float32)
NUMBERS = np.stack([1900 + 100 * RNG.rand(40), RNG.normal(-3, 0.1, 40)], axis=1)


HUBER = {'loss': 'huber', 'huber_delta': 0.5}


def make_config(**changes):
    settings = {'total_steps': 4, 'warmup_steps': 1, 'progress_every': 2}
    return small.run_config(**settings | changes)


def run(workdir, labels, names, units=(), parts=(slice(30), slice(30, 40)), **changes):
    sources = tuple(
        data.from_arrays(PIXELS[part], labels[part], names, units=units) for part in parts
    )
    params = train.train_and_evaluate(make_config(**changes), workdir, sources=sources)
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return jax.device_get(params), lines


def logits_of(model):
    pixels = np.stack([model.preprocess.evaluate(image) for image in PIXELS[30:]])
    return modules.apply(model.model, model.params, pixels / 127.5 - 1)


@pytest.fixture(scope='module')
def several(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('several') / 'run'
    return workdir, run(workdir, SEVERAL, ('cat', 'dog', 'cow'), positive_weights='balanced')


@pytest.fixture(scope='module')
def numbers(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('numbers') / 'run'
    return workdir, run(workdir, NUMBERS, ('year', 'depth'), ('years', ''), **HUBER)


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp('photo') / 'a.png'
    Image.fromarray(PIXELS[30]).save(path)
    return path


def test_several_classes_are_told_from_the_labels_and_scored(several):
    workdir, (_, lines) = several
    model = model_folder.load(workdir / 'model')
    assert model.task == Task('several classes') and model.model.multi_label
    logits = np.asarray(logits_of(model))
    expected = sklearn_metrics.average_precision_score(SEVERAL[30:], logits, average='macro')
    assert lines[-1]['mean_average_precision_test'] == pytest.approx(expected, abs=1e-6)
    loss, _ = losses.sigmoid_cross_entropy(logits, {'label': SEVERAL[30:]}, None)
    assert lines[-1]['loss_test'] == pytest.approx(float(loss), rel=1e-5)
    assert 'mean_average_precision' in (workdir / 'train.log').read_text()


def test_the_threshold_is_chosen_on_validation_images_and_kept(several, tmp_path, photo):
    parts = (slice(20), slice(20, 30), slice(30, 40))
    changes = {'keep_best': True, 'total_steps': 6, 'base_lr': 0.3}
    _, lines = run(tmp_path / 'run', SEVERAL, ('cat', 'dog', 'cow'), parts=parts, **changes)
    assert 'mean_average_precision_test' in lines[-1]
    scores = {
        line['step']: line['mean_average_precision_val'] for line in lines if 'loss_val' in line
    }
    assert lines[-1]['step_tested'] == max(scores, key=scores.__getitem__)
    model = model_folder.load(tmp_path / 'run/model')
    pixels = np.stack([model.preprocess.evaluate(image) for image in PIXELS[20:30]])
    logits = modules.apply(model.model, model.params, pixels / 127.5 - 1)
    found = Outputs(SEVERAL[20:30], np.ones(10, bool), np.asarray(logits))
    chosen = several_metrics.choose_threshold(found, model.task)
    assert model.task.threshold == chosen != 0.5
    assert model.task.chosen_on == 'arrays all (10 examples)'
    assert 'chosen on arrays all (10 examples)' in (tmp_path / 'run/train.log').read_text()
    assert 'not chosen: no config.pp.val' in (several[0] / 'train.log').read_text()
    onnx.save(onnx.build(model), tmp_path / 'a.onnx')
    assert classifier.open_classifier(tmp_path / 'a.onnx').task == model.task


def test_numbers_are_trained_in_their_scale_and_told_in_their_units(numbers, photo):
    workdir, (_, lines) = numbers
    model = model_folder.load(workdir / 'model')
    mean, deviation = NUMBERS[:30].mean(axis=0), NUMBERS[:30].std(axis=0)
    np.testing.assert_allclose(model.task.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(model.task.deviation, deviation, rtol=1e-4)
    assert model.task.units == ('years', '') and model.class_names == ('year', 'depth')
    logits = np.asarray(logits_of(model))
    values = logits * deviation + mean
    (_, found), = predict.predict(model, [photo])  # fmt: skip
    np.testing.assert_allclose(found, values[0], rtol=1e-4)
    target, last = NUMBERS[30:], lines[-1]
    for name, function in (
        ('mae', sklearn_metrics.mean_absolute_error),
        ('rmse', sklearn_metrics.root_mean_squared_error),
        ('r2', sklearn_metrics.r2_score),
    ):
        assert last[f'{name}_test'] == pytest.approx(function(target, values), rel=1e-3), name
    error = np.abs(logits - (target - mean) / deviation)
    huber = np.where(error < 0.5, 0.5 * error**2, 0.5 * (error - 0.25)).mean()
    assert last['loss_test'] == pytest.approx(huber, rel=1e-4)


@pytest.mark.parametrize('kind', ['several', 'numbers'])
def test_exported_files_say_what_the_model_folder_says(kind, request, tmp_path, photo):
    workdir, _ = request.getfixturevalue(kind)
    model = model_folder.load(workdir / 'model')
    onnx.save(onnx.build(model), tmp_path / 'a.onnx')
    pytorch.write(tmp_path / 'hf', model, to='huggingface')
    pytorch.write(tmp_path / 'a.npz', model, to='npz')
    problem = {'several': 'multi_label_classification', 'numbers': 'regression'}[kind]
    described = json.loads((tmp_path / 'hf/config.json').read_text())
    assert described['problem_type'] == problem
    (_, expected), = predict.predict(model, [photo])  # fmt: skip
    for name in ('a.onnx', 'hf', 'a.npz'):
        opened = classifier.open_classifier(tmp_path / name)
        (_, found), = predict.predict(opened, [photo])  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        assert opened.task.kind == model.task.kind
    if kind == 'numbers':
        with pytest.raises(UserError, match='which have no probabilities'):
            onnx.build(model, Options(probabilities=True))
        opened = classifier.open_classifier(tmp_path / 'a.onnx')
        assert opened.task.units == ('years', '')


@pytest.mark.parametrize(
    ('labels', 'changes', 'message'),
    [
        (NUMBERS, {}, 'may be several classes .* numbers .* or probabilities'),
        (NUMBERS[:, 0], {'loss': 'softmax'}, 'use --config.loss=mse or huber'),
        (SEVERAL[:, 0].astype(int), {'loss': 'mse'}, 'these labels are indices of classes'),
        (NUMBERS, {'loss': 'mse', 'label_smoothing': 0.1}, 'numbers have no classes'),
        (NUMBERS, {'loss': 'mse', 'mixup': 0.2}, 'is not the mean of the numbers'),
        (NUMBERS, {'loss': 'mse', 'class_weights': '1,2'}, 'numbers have no classes'),
        (0 * NUMBERS, {'loss': 'mse'}, 'the same|is 0 for every training image'),
        (SEVERAL, {'class_weights': 'balanced'}, 'config.positive_weights weighs each'),
        (SEVERAL, {'positive_weights': '1,2'}, "neither 'balanced' nor 3 numbers"),
        (SEVERAL, {'standardize_targets': False}, 'has no effect on classes'),
        (np.eye(3)[RNG.randint(0, 3, 40)], {'positive_weights': 'balanced'}, 'here each has one'),
    ],
)
def test_what_does_not_go_together_is_refused(labels, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / 'run', labels, None, **changes)
    assert not (tmp_path / 'run').exists()


def test_a_fold_is_tested_on_and_the_others_are_trained_on(tmp_path):
    everything = data.from_arrays(PIXELS, SEVERAL, ('cat', 'dog', 'cow'), groups=np.arange(40) // 4)
    config = make_config(fold='2/5', total_steps=2)
    train.train_and_evaluate(config, tmp_path / 'run', sources=(everything,))
    told = json.loads((tmp_path / 'run/data.json').read_text())
    assert told['train']['split'] == 'all without fold 2/5'
    assert told['test'] == {
        'split': 'fold 2/5 of all',
        'examples': len(everything.fold('2/5')[1]),
        'fingerprint': everything.fold('2/5')[1].fingerprint(),
    }
    for sources, fold in (((everything, everything), '2/5'), ((everything,), '')):
        with pytest.raises(UserError, match='is of one source of examples, .data,., that is divid'):
            train.train_and_evaluate(make_config(fold=fold), tmp_path / 'x', sources=sources)


def test_units_belong_to_numbers():
    with pytest.raises(UserError, match='1 units for the 2 outputs'):
        data.from_arrays(PIXELS, NUMBERS, units=('years',))
    with pytest.raises(UserError, match='labels that are numbers have one each'):
        data.from_arrays(PIXELS, [0, 1] * 20, units=('years', ''))
    assert own.as_selection(data.from_arrays(PIXELS, NUMBERS[:, 0]), '').units == ()
