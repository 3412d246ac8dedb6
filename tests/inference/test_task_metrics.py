"""Metrics of several classes and of numbers, beside scikit-learn's."""

import json

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from vit_jax.errors import UserError
from vit_jax.evaluate import Outputs
from vit_jax.inference import regression, several, task

RNG = np.random.default_rng(0)
NAMES = ('a', 'b', 'c', 'never')
N = 60
LABEL = np.concatenate([RNG.random((N, 3)) < (0.5, 0.2, 0.1), np.zeros((N, 1))], axis=1)
LABEL = LABEL.astype(np.float32)
OUTPUT = (2 * LABEL - 2 + RNG.normal(size=LABEL.shape)).astype(np.float32)
READABLE = np.ones(N, bool)
SEVERAL = task.Task('several classes', 0.3, 'photos val')


def test_average_precision_and_f1_are_those_of_scikit_learn():
    found = several.compute(Outputs(LABEL, READABLE, OUTPUT), SEVERAL, NAMES)
    expected = [
        sklearn_metrics.average_precision_score(LABEL[:, i], OUTPUT[:, i]) for i in range(3)
    ]
    np.testing.assert_allclose(found.average_precision, [*expected, np.nan])
    assert found.mean_average_precision == pytest.approx(np.mean(expected))
    seen = SEVERAL.values(OUTPUT) >= 0.3
    for average in (None, 'micro'):
        p, r, f, _ = sklearn_metrics.precision_recall_fscore_support(
            LABEL, seen, average=average, zero_division=np.nan
        )
        mine = found.micro if average else (found.precision, found.recall, found.f1)
        np.testing.assert_allclose(mine, (p, r, f))
    assert found.macro(found.f1) == pytest.approx(found.f1[:3].mean())
    assert found.exact == sklearn_metrics.accuracy_score(LABEL, seen)
    assert found.loss == pytest.approx(
        N * 4 / N * sklearn_metrics.log_loss(LABEL.ravel(), 1 / (1 + np.exp(-OUTPUT.ravel())))
    )
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told['threshold_chosen_on'] == 'photos val' and told['threshold'] == 0.3
    assert told['classes'][3]['average_precision'] is None
    assert told['classes'][0]['images'] == LABEL[:, 0].sum()


def test_an_image_that_cannot_be_read_is_missed():
    readable = READABLE.copy()
    readable[:6] = False
    output = OUTPUT.copy()
    output[:6] = 50  # what happens to stand there
    found = several.compute(Outputs(LABEL, readable, output), SEVERAL, NAMES)
    missed = OUTPUT.copy()
    missed[:6] = -1e9
    expected = several.compute(Outputs(LABEL, READABLE, missed), SEVERAL, NAMES)
    assert found.unreadable == 6 and found.count == N
    np.testing.assert_array_equal(found.average_precision, expected.average_precision)
    np.testing.assert_array_equal(found.recall, expected.recall)
    with pytest.raises(UserError, match='no image of those to evaluate on has any class'):
        several.compute(Outputs(0 * LABEL, READABLE, OUTPUT), SEVERAL, NAMES)


def test_the_threshold_has_the_best_mean_f1():
    found = Outputs(LABEL, READABLE, OUTPUT)
    chosen = several.choose_threshold(found, task.Task('several classes'))
    scores = {
        t: sklearn_metrics.f1_score(
            LABEL[:, :3], SEVERAL.values(OUTPUT)[:, :3] >= t, average='macro', zero_division=0
        )
        for t in np.arange(1, 100) / 100
    }
    assert scores[chosen] == max(scores.values())
    perfect = Outputs(LABEL, READABLE, 100 * (2 * LABEL - 1))
    assert several.choose_threshold(perfect, task.Task('several classes')) == 0.5
    nothing = Outputs(0 * LABEL, READABLE, OUTPUT)
    assert several.choose_threshold(nothing, SEVERAL) == 0.3


def test_errors_of_numbers_are_those_of_scikit_learn():
    target = RNG.normal(size=(N, 2)) * (10, 0.1) + (100, -3)
    numbers = task.standardized(target, ('x', 'y'), ('mm', ''))
    output = (target - numbers.mean) / numbers.deviation + 0.3 * RNG.normal(size=(N, 2))
    predicted = output * numbers.deviation + numbers.mean
    readable = READABLE.copy()
    readable[3] = False
    found = regression.compute(Outputs(target, readable, output), numbers, ('x', 'y'))
    rows = np.flatnonzero(readable)
    for name, function in (
        ('mae', sklearn_metrics.mean_absolute_error),
        ('rmse', sklearn_metrics.root_mean_squared_error),
        ('r2', sklearn_metrics.r2_score),
    ):
        expected = function(target[rows], predicted[rows], multioutput='raw_values')
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-4, err_msg=name)
    told = found.to_dict()
    assert told['unreadable'] == 1 and told['numbers'][0]['unit'] == 'mm'
    same = regression.compute(Outputs(0 * target, READABLE, output), numbers, ('x', 'y'))
    assert same.to_dict()['numbers'][0]['r2'] is None


def test_a_task_says_what_it_says_of_so_many_outputs():
    numbers = task.Task('numbers', units=('mm', ''), mean=(1.0, 2.0), deviation=(3.0, 4.0))
    assert task.Task.from_dict(json.loads(json.dumps(numbers.to_dict()))) != task.ONE_CLASS
    np.testing.assert_array_equal(numbers.values([[1.0, 0.5]]), [[4, 4]])
    with pytest.raises(UserError, match='task.units has 2 values for 3 outputs'):
        numbers.check(3)
    for wrong in ({'kind': 'poem'}, {}, {'kind': 'numbers', 'colour': 1}):
        with pytest.raises(UserError, match='task'):
            task.Task.from_dict(wrong)
    with pytest.raises(UserError, match='not above 0'):
        task.Task('numbers', deviation=(0.0,))
