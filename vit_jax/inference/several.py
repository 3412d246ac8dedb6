"""Metrics where an image may have several classes, or none.

Average precision, of the probabilities, is scikit-learn's: the area under the curve of precision
and recall, as steps. Precision, recall and F1 are of the classes that reach a threshold.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.errors import UserError, extra
from vit_jax.inference.task import Task

if TYPE_CHECKING:
    from vit_jax.evaluate import Outputs

# What a threshold is chosen from.
THRESHOLDS = np.arange(1, 100) / 100


@dataclasses.dataclass(frozen=True, eq=False)
class SeveralMetrics:
    """Metrics of N images and C classes.

    Images that could not be read count in N, and no class is found on them: one that is there is
    missed. They are not in `loss`. A class without images has no average precision, and is in no
    mean over classes.

    Attributes:
      class_names: in label order.
      count: N.
      unreadable: how many of them could not be read.
      loss: mean over images of the binary cross-entropies, summed over classes; natural logarithm.
      threshold: the probability from which a class counts as found.
      chosen_on: what the threshold was chosen on; '' for nothing.
      average_precision: float64 [C], NaN where a class has no images.
      precision: float64 [C], of the images on which a class is found the share that has it; NaN
        where it is not found.
      recall: float64 [C], of the images of a class the share on which it is found; NaN where there
        is none.
      f1: float64 [C], 2 TP / (2 TP + FP + FN); NaN where there was neither.
      support: int64 [C], images of each class.
      found: int64 [C], images on which it is found.
      micro: precision, recall and F1 over all pairs of image and class.
      exact: share of N whose classes are all found, and no others.
    """

    class_names: tuple[str, ...]
    count: int
    unreadable: int
    loss: float
    threshold: float
    chosen_on: str
    average_precision: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    found: np.ndarray
    micro: tuple[float, float, float]
    exact: float

    @property
    def mean_average_precision(self) -> float:
        """Mean over the classes that have images."""
        return mean_average_precision(self.average_precision)

    def macro(self, values: np.ndarray) -> float:
        """Mean over the classes that have images; NaN counts as 0."""
        return float(np.nan_to_num(values[self.support > 0]).mean())

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON; NaN becomes None."""
        shares = ('precision', 'recall', 'f1')
        columns = {
            name: [None if np.isnan(v) else v for v in getattr(self, name).tolist()]
            for name in ('average_precision', *shares)
        }
        columns |= {'images': self.support.tolist(), 'found': self.found.tolist()}
        return {
            'images': self.count,
            'unreadable': self.unreadable,
            'mean_average_precision': self.mean_average_precision,
            'loss': self.loss,
            'threshold': self.threshold,
            'threshold_chosen_on': self.chosen_on,
            'macro': {name: self.macro(getattr(self, name)) for name in shares},
            'micro': dict(zip(shares, self.micro, strict=True)),
            'all_classes_right': self.exact,
            'classes': [
                {'class': name} | {column: values[i] for column, values in columns.items()}
                for i, name in enumerate(self.class_names)
            ],
        }


def compute(found: 'Outputs', task: Task, class_names: Sequence[str]) -> SeveralMetrics:
    """Computes all metrics.

    Args:
      found: what the model gave for each image.
      task: with the threshold.
      class_names: of the C classes.

    Raises:
      UserError: no image has any class.
    """
    with extra('report'):
        from sklearn import metrics

    there, readable = found.label > 0.5, found.readable
    if not there.any():
        raise UserError('no image of those to evaluate on has any class')
    seen = (task.values(found.output) >= task.threshold) & readable[:, None]

    def scores(average: str | None) -> Any:
        return metrics.precision_recall_fscore_support(
            there, seen, average=average, zero_division=np.nan
        )[:3]

    precision, recall, f1 = scores(None)
    micro = np.nan_to_num(scores('micro')).tolist()
    return SeveralMetrics(
        class_names=tuple(class_names),
        count=len(readable),
        unreadable=int((~readable).sum()),
        loss=float(loss_of_each(found.output[readable], found.label[readable]).mean()),
        threshold=task.threshold,
        chosen_on=task.chosen_on,
        average_precision=average_precision(found),
        precision=precision,
        recall=recall,
        f1=f1,
        support=there.sum(axis=0),
        found=seen.sum(axis=0),
        micro=(micro[0], micro[1], micro[2]),
        exact=float((readable & (there == seen).all(axis=1)).mean()),
    )


def totals(found: 'Outputs') -> dict[str, float]:
    """What is told of an evaluation on the way: `mean_average_precision`, in [0, 1]."""
    return {'mean_average_precision': mean_average_precision(average_precision(found))}


def average_precision(found: 'Outputs') -> np.ndarray:
    """Of each class, float64 [C]; NaN where it has no images."""
    with extra('report'):
        from sklearn import metrics

    there = found.label > 0.5
    # NaN is never found; what cannot be read comes last.
    lowest = float(np.finfo(np.float32).min)
    score = np.where(found.readable[:, None], np.nan_to_num(found.output, nan=lowest), lowest)
    return np.array([
        metrics.average_precision_score(there[:, i], score[:, i]) if there[:, i].any() else np.nan
        for i in range(there.shape[1])
    ])  # fmt: skip


def mean_average_precision(values: np.ndarray) -> float:
    """Mean over the classes that have one; NaN if none has."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def choose_threshold(found: 'Outputs', task: Task) -> float:
    """The threshold with the highest F1, mean over classes that have images.

    Of several, the one next to 0.5 (of two, the lower one): 0.01, 0.02, ..., 0.99 are tried.

    Args:
      found: what the model gave for each validation image.
      task: of the model.
    """
    there = (found.label > 0.5)[:, found.label.max(axis=0) > 0.5]
    probabilities = task.values(found.output)[:, found.label.max(axis=0) > 0.5]

    def mean_f1(threshold: float) -> float:
        seen = (probabilities >= threshold) & found.readable[:, None]
        both, one = (there & seen).sum(axis=0), there.sum(axis=0) + seen.sum(axis=0)
        return float((2 * both / one).mean())

    scores = [(mean_f1(t), -abs(t - 0.5), -t) for t in THRESHOLDS.tolist()] if there.size else []
    return -max(scores)[2] if scores else task.threshold


def loss_of_each(output: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Binary cross-entropy, summed over classes: float64 [N] of float [N, C] both."""
    x, y = output.astype(np.float64), label.astype(np.float64)
    return (np.logaddexp(0, x) - x * y).sum(axis=-1)
