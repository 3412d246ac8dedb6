"""Chooses among probes on frozen features, and says how good they are, without test images."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from vit_jax.data.holdout import folds, held_out, stratified_order
from vit_jax.errors import UserError, printable
from vit_jax.inference.features import Features
from vit_jax.inference.probes import (
    NEVER,
    Linear,
    Neighbours,
    logistic,
    nearest_mean,
    ridge,
)

# What is tried on validation images.
LOGISTIC_CS = (0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
RIDGE_PENALTIES = (1.0, 32.0, 1024.0, 32768.0)
NEIGHBOURS = (1, 5, 10, 20)
# Held-out tenths that are enough to choose on have so many images, and so many of each class.
ENOUGH, ENOUGH_OF_CLASS = 500, 50
_FOLDS = 5  # of cross-validation, where they are fewer


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
      probe: with that setting, fitted to training and validation images; logits of a linear one are
        scaled by `calibration_of` the validation images.
      held: int [n], the validation images, each once.
      predicted: int [n], their classes as predicted by what was fitted to others.
      logits: float32 [n, C], likewise, scaled as those of `probe`; None of neighbours.
      factor: by which logits are scaled.
    """

    chosen: Candidate
    validation: float
    probe: Linear | Neighbours
    held: np.ndarray
    predicted: np.ndarray
    logits: np.ndarray | None
    factor: float = 1.0

    def fit(self, x: np.ndarray, y: np.ndarray, classes: int) -> Linear | Neighbours:
        """The same probe, fitted to other features (float32 [N, D]) and labels (int [N])."""
        probe = self.chosen.fit(x, y, classes)
        return probe.scaled(self.factor) if isinstance(probe, Linear) else probe


def check_labels(labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Refuses training images among which no probe can be chosen.

    Args:
      labels: int [N].
      class_names: C names.

    Raises:
      UserError: they are of one class, or fewer than two classes have two images.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    there = np.flatnonzero(counts)
    if len(there) < 2:
        name = class_names[int(there[0])] if len(there) else 'none'
        raise UserError(
            f'all {len(labels):,} training images are of one class, {printable(name)}: there is '
            'nothing to tell apart. Give images of two classes at least'
        )
    if (counts > 1).sum() < 2:
        raise UserError(
            f'of {len(there):,} classes, {int((counts > 1).sum())} with two training images or '
            'more: probes are chosen on held-out images, so give two of two classes at least'
        )


def choose(
    x: np.ndarray, y: np.ndarray, classes: int, *, groups: np.ndarray | None = None, seed: int = 0
) -> list[Result]:
    """Fits all candidates, and chooses the setting of each kind on validation images.

    Each fifth of the examples is predicted by what was fitted to the rest; where a tenth has
    `ENOUGH` of them, and of each class `ENOUGH_OF_CLASS`, the last tenth alone. Every part has each
    class in proportion, and a group is in one of them.

    Args:
      x: features, float32 [N, D].
      y: labels, int [N].
      classes: C.
      groups: [N], what each belongs to; None for nothing.
      seed: of the division, without groups.

    Returns:
      A result for each kind, the best on validation images first; of equal ones, logistic.

    Raises:
      UserError: fewer than two classes have two examples; or all features are the same.
    """
    if (np.bincount(y) > 1).sum() < 2:
        raise UserError('probes are chosen on held-out images: give two of two classes at least')
    if np.ptp(x, axis=0).max() <= 1e-6 * np.abs(x).max():
        raise UserError(
            f'all {len(x):,} training images look the same to the model: are they copies of one '
            'image? There is nothing to tell their classes by'
        )
    parts = _parts(y, groups, seed)
    held = np.concatenate(parts)
    found: dict[str, tuple[int, Candidate, np.ndarray, np.ndarray | None]] = {}
    for candidate in CANDIDATES:
        predicted, logits = list[np.ndarray](), list[np.ndarray]()
        for part in parts:
            rest = np.setdiff1d(np.arange(len(y)), part)
            probe = candidate.fit(x[rest], y[rest], classes)
            predicted.append(probe.predict(x[part]))
            if isinstance(probe, Linear):
                logits.append(probe.logits(x[part]))
        classes_of = np.concatenate(predicted)
        right = int((classes_of == y[held]).sum())
        if candidate.name not in found or right > found[candidate.name][0]:
            told = np.concatenate(logits) if logits else None
            found[candidate.name] = right, candidate, classes_of, told
    results = []
    for right, chosen, classes_of, told in sorted(found.values(), key=lambda each: -each[0]):
        factor = 1.0
        if told is not None:
            factor = calibration_of(told, y[held])
            told = told * np.float32(factor)
        probe = chosen.fit(x, y, classes)
        probe = probe.scaled(factor) if isinstance(probe, Linear) else probe
        results.append(Result(chosen, right / len(held), probe, held, classes_of, told, factor))
    return results


def _parts(y: np.ndarray, groups: np.ndarray | None, seed: int) -> list[np.ndarray]:
    """The parts to predict in turn, each int [n]."""
    if groups is not None:
        most = int(np.unique(y, return_counts=True)[1].max())
        number = min(_FOLDS, len(np.unique(groups)), most)
        if number < 2:
            raise UserError('all training images are of one group, so that none can be held out')
        fold = folds(y, groups, number)
        return [part for i in range(number) if len(part := np.flatnonzero(fold == i))]
    order = stratified_order(y, seed=seed)
    last = order[-held_out(y[order]) :]
    counts = np.bincount(y[last], minlength=int(y.max()) + 1)[np.unique(y)]
    if len(last) >= ENOUGH and counts.min() >= ENOUGH_OF_CLASS:
        return [last]
    return [part for part in np.array_split(order, _FOLDS) if len(part)]


def calibration_of(logits: np.ndarray, y: np.ndarray) -> float:
    """The factor of logits that makes their softmax the most probable (temperature scaling).

    Guo et al. 2017 (https://arxiv.org/abs/1706.04599); with Platt's targets for n examples, 1 - 1 /
    (n + 2) in place of 1, so that a few right predictions do not make it infinite.

    Args:
      logits: float [n, C], of examples that were not fitted to.
      y: labels, int [n].
    """
    from scipy import optimize, special

    known = logits > NEVER / 10  # of classes that had an example
    kept = known[np.arange(len(y)), y]
    logits, y, known = logits[kept].astype(np.float64), y[kept], known[kept]
    if not len(y):
        return 1.0
    share = 1 / (len(y) + 2)
    others = np.maximum(known.sum(-1) - 1, 1)[:, None]
    target = np.where(known, share / others, 0)
    target[np.arange(len(y)), y] = 1 - share
    centred = logits - logits.max(-1, keepdims=True)

    def loss(logarithm: float) -> float:
        return -float(
            (target * np.where(known, special.log_softmax(np.exp(logarithm) * centred, -1), 0))
            .sum(-1)
            .mean()
        )

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-10, 10), method='bounded').x))


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


def cross_validate(
    x: np.ndarray, y: np.ndarray, classes: int, number: int, groups: np.ndarray | None = None
) -> dict[str, tuple[list[int], list[int]]]:
    """Predicts each fold by probes that were chosen and fitted on the others (`choose`).

    Args:
      x: features, float32 [N, D].
      y: labels, int [N].
      classes: C.
      number: of folds.
      groups: [N], what each belongs to; None for nothing.

    Returns:
      For each kind of probe: right predictions in each fold, and images in each.
    """
    fold = folds(y, groups, number)
    found: dict[str, tuple[list[int], list[int]]] = {}
    for i in range(number):
        inside = fold == i
        if not inside.any() or inside.all():
            continue
        theirs = None if groups is None else groups[~inside]
        for result in choose(x[~inside], y[~inside], classes, groups=theirs):
            right, count = found.setdefault(result.chosen.name, ([], []))
            right.append(int((result.probe.predict(x[inside]) == y[inside]).sum()))
            count.append(int(inside.sum()))
    return found
