"""Classifiers on frozen features: linear ones, which can become a model's head, and neighbours.

N training examples with features x [N, D] and labels y [N], of C classes.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from vit_jax.data.holdout import held_out, stratified_order
from vit_jax.errors import UserError, extra
from vit_jax.inference.features import Features, cosines

# What is tried on validation images.
LOGISTIC_CS = (0.01, 0.1, 1.0, 10.0)
RIDGE_PENALTIES = (1.0, 32.0, 1024.0, 32768.0)
NEIGHBOURS = (1, 5, 10, 20)
MANY = 5000  # examples, a tenth of which is enough to choose on
_BIAS = 100.0  # the constant feature of `ridge`, so large that the penalty does not reach it


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear classifier: logits are x @ kernel + bias.

    Attributes:
      kernel: float32 [D, C].
      bias: float32 [C].
    """

    kernel: np.ndarray
    bias: np.ndarray

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Classes, int [M], of features [M, D]."""
        return (x @ self.kernel + self.bias).argmax(-1)


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The commonest class among the k training examples of the smallest angle.

    Attributes:
      x: float32 [N, D].
      y: int [N].
      classes: C.
      k: how many; a tie is for the class of the nearer examples.
    """

    x: np.ndarray
    y: np.ndarray
    classes: int
    k: int

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Classes, int [M], of features [M, D]."""
        k = min(self.k, len(self.y))
        nearest = np.argsort(-cosines(x, self.x), axis=-1, kind='stable')[:, :k]
        # The rank breaks ties, and never more than a tie.
        weights = 1 + np.arange(k, 0, -1) / (2 * k * k)
        votes = np.zeros((len(x), self.classes))
        np.add.at(votes, (np.arange(len(x))[:, None], self.y[nearest]), weights)
        return votes.argmax(-1)


def nearest_mean(x: np.ndarray, y: np.ndarray, classes: int) -> Linear:
    """The class whose mean is nearest: x - mean is smallest where 2 x . mean - mean^2 is largest.

    A class without an example is never the answer.
    """
    x = np.asarray(x, np.float64)
    counts = np.bincount(y, minlength=classes)
    sums = np.zeros((classes, x.shape[1]))
    np.add.at(sums, y, x)
    means = sums / np.maximum(counts, 1)[:, None]
    bias = np.where(counts > 0, -(means**2).sum(-1), np.finfo(np.float32).min)
    return Linear((2 * means.T).astype(np.float32), bias.astype(np.float32))


def ridge(x: np.ndarray, y: np.ndarray, classes: int, penalty: float) -> Linear:
    """Least squares on targets of -1 and 1, with a penalty: few-shot evaluation of the ViT paper.

    As big_vision computes it (evaluators/fewshot_lsr.py): features are standardised, a constant of
    100 is added for the bias, and min |X W - Y|^2 + penalty |W|^2 is solved in closed form.
    """
    x = np.asarray(x, np.float64)
    mean, scale = x.mean(0), x.std(0) + 1e-5
    inputs = np.pad((x - mean) / scale, ((0, 0), (0, 1)), constant_values=_BIAS)
    targets = 2.0 * np.eye(classes)[y] - 1
    if len(inputs) >= inputs.shape[1]:
        gram = inputs.T @ inputs + penalty * np.eye(inputs.shape[1])
        weights = np.linalg.solve(gram, inputs.T @ targets)
    else:  # the same solution, from the smaller matrix
        gram = inputs @ inputs.T + penalty * np.eye(len(inputs))
        weights = inputs.T @ np.linalg.solve(gram, targets)
    return _fold(weights[:-1], _BIAS * weights[-1], mean, scale)


def logistic(x: np.ndarray, y: np.ndarray, classes: int, c: float) -> Linear:
    """Logistic regression of scikit-learn on standardised features.

    A class without an example is never the answer.

    Args:
      x: features.
      y: labels, of two classes at least.
      classes: C.
      c: inverse strength of the regularisation.
    """
    with extra('report'):
        from sklearn import linear_model

    x = np.asarray(x, np.float64)
    mean, scale = x.mean(0), x.std(0) + 1e-5
    fitted = linear_model.LogisticRegression(C=c, max_iter=2000).fit((x - mean) / scale, y)
    kernel, bias = fitted.coef_.T, fitted.intercept_
    if len(fitted.classes_) == 2:  # one row, for the second class
        kernel, bias = np.concatenate([-kernel, kernel], 1) / 2, np.array([-bias[0], bias[0]]) / 2
    all_kernels = np.zeros((x.shape[1], classes))
    all_biases = np.full(classes, -1e9)
    all_kernels[:, fitted.classes_], all_biases[fitted.classes_] = kernel, bias
    return _fold(all_kernels, all_biases, mean, scale)


def _fold(kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Linear:
    """A classifier of (x - mean) / scale as one of x."""
    kernel = kernel / scale[:, None]
    return Linear(kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32))


def interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` examples (Wilson, JASA 22, 1927)."""
    z = 1.959964
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kind of probe with one setting.

    Attributes:
      name: of the kind.
      setting: for people, such as 'C=0.1'.
      fit: makes the classifier of training features, labels and the number of classes.
    """

    name: str
    setting: str
    fit: Callable[[np.ndarray, np.ndarray, int], Linear | Neighbours]


CANDIDATES = (
    *(Candidate('logistic', f'C={c:g}', functools.partial(logistic, c=c)) for c in LOGISTIC_CS),
    *(
        Candidate('ridge', f'penalty={p:g}', functools.partial(ridge, penalty=p))
        for p in RIDGE_PENALTIES
    ),
    *(
        Candidate('k-nearest neighbours', f'k={k}', functools.partial(Neighbours, k=k))
        for k in NEIGHBOURS
    ),
    Candidate('nearest class mean', '', nearest_mean),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a kind of probe.

    Attributes:
      chosen: the setting that was best on validation images; of equal ones, the first.
      validation: accuracy there, in [0, 1].
      probe: with that setting, fitted to training and validation images.
    """

    chosen: Candidate
    validation: float
    probe: Linear | Neighbours


def choose(x: np.ndarray, y: np.ndarray, classes: int, *, seed: int = 0) -> list[Result]:
    """Fits all candidates, and chooses the setting of each kind on validation images.

    Each fifth of the examples is predicted by what was fitted to the rest; of `MANY` examples, the
    last tenth alone. Every part has each class in proportion.

    Args:
      x: features, float32 [N, D].
      y: labels, int [N].
      classes: C.
      seed: of the division.

    Returns:
      A result for each kind, the best on validation images first; of equal ones, logistic.

    Raises:
      UserError: fewer than two classes have two examples.
    """
    if (np.bincount(y) > 1).sum() < 2:
        raise UserError('probes are chosen on held-out images: give two of two classes at least')
    order = stratified_order(y, seed=seed)
    parts = np.array_split(order, 5) if len(y) < MANY else [order[-held_out(y[order]) :]]
    found: dict[str, tuple[float, Candidate]] = {}
    for candidate in CANDIDATES:
        right = 0
        for part in parts:
            rest = np.setdiff1d(order, part)
            probe = candidate.fit(x[rest], y[rest], classes)
            right += int((probe.predict(x[part]) == y[part]).sum())
        accuracy = right / sum(map(len, parts))
        if candidate.name not in found or accuracy > found[candidate.name][0]:
            found[candidate.name] = accuracy, candidate
    best = sorted(found.values(), key=lambda pair: -pair[0])
    return [Result(chosen, accuracy, chosen.fit(x, y, classes)) for accuracy, chosen in best]


def few_shot(
    train: Features, test: Features, classes: int, *, shots: int, seed: int, penalty: float = 1024.0
) -> float:
    """Accuracy in [0, 1] on all test images of `ridge` on `shots` images of each class.

    Args:
      train: where the images are drawn from; of a class with fewer, all are taken.
      test: where the accuracy is measured.
      classes: C.
      shots: images of each class.
      seed: of the draw.
      penalty: big_vision's default.
    """
    order = np.random.default_rng(seed).permutation(len(train.label))
    drawn = np.concatenate([order[train.label[order] == y][:shots] for y in range(classes)])
    probe = ridge(train.values[drawn], train.label[drawn], classes, penalty)
    return float((probe.predict(test.values) == test.label).mean())
