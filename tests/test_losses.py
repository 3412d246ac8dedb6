"""Losses of recipes beside their formulas in NumPy, and what is refused."""

import numpy as np
import pytest

from vit_jax import losses
from vit_jax.errors import UserError

B, C = 6, 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (B, C)).astype(np.float32)
LABEL = RNG.integers(0, C, B).astype(np.int32)
MIXED = RNG.dirichlet(np.ones(C), B).astype(np.float32)
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0])


def expected(kind, label, smoothing, weights):
    """In float64, class by class; DeiT's losses are these (timm's, with the sum over classes)."""
    z, total = LOGITS.astype(np.float64), 0.0
    for row in range(B):
        p = np.eye(C)[label[row]] if label.ndim == 1 else label[row].astype(np.float64)
        smooth = p * (1 - smoothing) + smoothing / C
        softmax = np.exp(z[row]) / np.exp(z[row]).sum()
        sigmoid = 1 / (1 + np.exp(-z[row]))
        if kind == 'softmax':
            loss = -(smooth * np.log(softmax)).sum()
        else:
            loss = -(smooth * np.log(sigmoid) + (1 - smooth) * np.log(1 - sigmoid)).sum()
        total += loss * (p @ weights if len(weights) else 1)
    return total / B


@pytest.mark.parametrize('label', [LABEL, MIXED], ids=['classes', 'probabilities'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('weights', [(), WEIGHTS], ids=['alike', 'weights'])
@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_cross_entropy_is_its_formula(kind, weights, smoothing, label):
    loss_fn = losses.cross_entropy(kind, smoothing=smoothing, class_weights=weights)
    loss, metrics = loss_fn(LOGITS, {'label': label}, None)
    np.testing.assert_allclose(loss, expected(kind, label, smoothing, weights), rtol=1e-5)
    if label.ndim == 1:
        assert metrics['accuracy_train'] == np.float32((LOGITS.argmax(-1) == LABEL).mean())
    else:
        assert metrics == {}


def test_weights_of_classes_are_those_of_pytorch_and_scikit_learn():
    torch = pytest.importorskip('torch')
    from sklearn.utils import class_weight

    loss, _ = losses.cross_entropy(class_weights=WEIGHTS)(LOGITS, {'label': LABEL}, None)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(LOGITS),
        torch.tensor(LABEL).long(),
        weight=torch.tensor(WEIGHTS, dtype=torch.float32),
        reduction='sum',
    )
    np.testing.assert_allclose(loss, theirs / B, rtol=1e-6)
    labels = np.repeat(np.arange(3), (1, 2, 7))
    weights = losses.balanced_weights(labels, 3)
    theirs = class_weight.compute_class_weight('balanced', classes=np.arange(3), y=labels)
    np.testing.assert_allclose(weights, theirs, rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1)
    assert np.isfinite(losses.balanced_weights(labels, 4)).all()


@pytest.mark.parametrize(
    ('loss_fn', 'label'),
    [
        (losses.softmax_cross_entropy, LABEL),
        (losses.softmax_cross_entropy, MIXED),
        (losses.sigmoid_cross_entropy, MIXED),
        (losses.cross_entropy(smoothing=0.1, class_weights=WEIGHTS), LABEL),
        (losses.cross_entropy('sigmoid', positive_weights=WEIGHTS), MIXED),
        (losses.regression('mse', mean=[1], deviation=[2]), MIXED),
        (losses.regression('huber'), MIXED),
        (losses.squared_error, MIXED),
    ],
)
def test_each_example_counts_by_its_weight(loss_fn, label):
    weight = np.array([0, 1, 2, 0.5, 1.5, 1], np.float32)
    alone = [loss_fn(LOGITS[i : i + 1], {'label': label[i : i + 1]}, None)[0] for i in range(B)]
    loss, _ = loss_fn(LOGITS, {'label': label, 'weight': weight}, None)
    np.testing.assert_allclose(loss, weight @ np.array(alone) / B, rtol=1e-5)


def test_without_a_recipe_it_is_the_plain_loss():
    assert losses.cross_entropy() is losses.softmax_cross_entropy
    assert losses.cross_entropy(smoothing=0.1) is not losses.softmax_cross_entropy


@pytest.mark.parametrize('label', [LABEL[:, None], MIXED[:, :2]])
def test_labels_of_another_shape_are_refused(label):
    with pytest.raises(UserError, match='do not fit the logits'):
        losses.cross_entropy(smoothing=0.1)(LOGITS, {'label': label}, None)


def test_positive_weights_are_those_of_pytorch():
    torch = pytest.importorskip('torch')
    several = (RNG.random((B, C)) < 0.4).astype(np.float32)
    weights = np.array([0.5, 2.0, 1.0, 7.0], np.float32)
    for given in ((), weights):
        loss_fn = losses.cross_entropy('sigmoid', positive_weights=given)
        loss, metrics = loss_fn(30 * LOGITS, {'label': several}, None)
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(
            torch.tensor(30 * LOGITS),
            torch.tensor(several),
            pos_weight=torch.tensor(given) if len(given) else None,
            reduction='none',
        )
        np.testing.assert_allclose(loss, theirs.sum(-1).mean(), rtol=1e-6)
        assert metrics == {}
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1]])
    assert losses.balanced_positives(labels).tolist() == [2, 1, 1]


@pytest.mark.parametrize(('kind', 'delta'), [('mse', 1.0), ('huber', 1.0), ('huber', 0.3)])
def test_losses_of_numbers_are_those_of_pytorch(kind, delta):
    torch = pytest.importorskip('torch')
    target = (100 + 10 * RNG.normal(size=(B, C))).astype(np.float32)
    mean, deviation = target.mean(axis=0), target.std(axis=0)
    loss_fn = losses.regression(kind, delta=delta, mean=mean, deviation=deviation)
    loss, _ = loss_fn(LOGITS, {'label': target}, None)
    function = torch.nn.MSELoss() if kind == 'mse' else torch.nn.HuberLoss(delta=delta)
    theirs = function(torch.tensor(LOGITS), torch.tensor((target - mean) / deviation))
    np.testing.assert_allclose(loss, theirs, rtol=1e-6)
    plain, _ = losses.regression(kind, delta=delta)(LOGITS[:, :1], {'label': target[:, 0]}, None)
    np.testing.assert_allclose(
        plain, function(torch.tensor(LOGITS[:, 0]), torch.tensor(target[:, 0])), rtol=1e-6
    )
    with pytest.raises(UserError, match='do not fit the logits'):
        losses.regression(kind)(LOGITS, {'label': target[:, 0]}, None)
