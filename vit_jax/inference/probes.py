"""Classifiers on frozen features: linear ones, which can become a model's head, and neighbours.

N training examples with features x [N, D] and labels y [N], of C classes.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError, extra
from vit_jax.inference import model_folder
from vit_jax.inference.features import cosines
from vit_jax.inference.model_folder import Model

_LARGE = 10_000_000  # numbers among features, from which on threads pay
NEVER = -1e9  # logit of a class without an example
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

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits, float32 [M, C], of features [M, D]."""
        return x @ self.kernel + self.bias

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Classes, int [M], of features [M, D]."""
        return self.logits(x).argmax(-1)

    def scaled(self, factor: float) -> 'Linear':
        """The one with logits times a factor."""
        return Linear(self.kernel * np.float32(factor), self.bias * np.float32(factor))


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
    bias = np.where(counts > 0, -(means**2).sum(-1), NEVER)
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
        import threadpoolctl
        from sklearn import linear_model

    x = np.asarray(x, np.float64)
    mean, scale = x.mean(0), x.std(0) + 1e-5
    # Threads of BLAS wait for each other with all their might: of small products, on a machine that
    # has other work as well, they made it take 20 times the time of one.
    threads = 1 if x.size < _LARGE else None
    with threadpoolctl.threadpool_limits(threads, 'blas'):
        fitted = linear_model.LogisticRegression(C=c, max_iter=2000).fit((x - mean) / scale, y)
    kernel, bias = fitted.coef_.T, fitted.intercept_
    if len(fitted.classes_) == 2:  # one row, for the second class
        kernel, bias = np.concatenate([-kernel, kernel], 1) / 2, np.array([-bias[0], bias[0]]) / 2
    all_kernels = np.zeros((x.shape[1], classes))
    all_biases = np.full(classes, NEVER)
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


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of several draws (Student's t); of one, from it to it."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean - float(half), mean + float(half)


def check_head(model: Model) -> None:
    """Refuses a model whose head a linear probe cannot be."""
    if getattr(model.model, 'distilled', False) or getattr(model.model, 'mlp_head', False):
        raise UserError('the head of this model is not a linear layer on one vector')


def save(
    folder: str | os.PathLike[str],
    model: Model,
    probe: Linear,
    class_names: Sequence[str],
    source: Mapping[str, Any],
) -> None:
    """Writes a model folder: a model with a probe in the place of its head.

    Args:
      folder: see `model_folder.save`.
      model: that the features are of.
      probe: of them.
      class_names: in label order.
      source: where the probe comes from, see `model_folder.save`.
    """
    model_folder.save(
        folder,
        {**model.params, 'head': {'kernel': probe.kernel, 'bias': probe.bias}},
        model_config=model.model_config,
        class_names=class_names,
        preprocess=model.preprocess,
        source=source,
    )
