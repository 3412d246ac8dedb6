"""Metrics of numbers: how far the predictions are from the targets, in the targets' units."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.inference.task import Task

if TYPE_CHECKING:
    from vit_jax.evaluate import Outputs


@dataclasses.dataclass(frozen=True, eq=False)
class NumberMetrics:
    """Metrics of N images and C numbers; of the images that could be read.

    Attributes:
      names: of the numbers.
      units: of each, '' for none.
      count: N.
      unreadable: how many of them could not be read.
      mae: float64 [C], mean absolute error.
      rmse: float64 [C], root of the mean squared error.
      r2: float64 [C], coefficient of determination, 1 - squared error / variance; 0 is what the
        mean of these targets as the only prediction would have. NaN where all targets are the same.
      target: float64 [N readable, C].
      predicted: float64 [N readable, C].
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    count: int
    unreadable: int
    mae: np.ndarray
    rmse: np.ndarray
    r2: np.ndarray
    target: np.ndarray
    predicted: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON, without the targets and predictions; NaN becomes None."""
        rows = zip(self.names, self.units, self.mae, self.rmse, self.r2, strict=True)
        return {
            'images': self.count,
            'unreadable': self.unreadable,
            'numbers': [
                {
                    'name': name,
                    'unit': unit,
                    'mean_absolute_error': float(mae),
                    'root_mean_squared_error': float(rmse),
                    'r2': None if np.isnan(r2) else float(r2),
                    'mean_of_targets': float(mean),
                    'deviation_of_targets': float(deviation),
                }
                for (name, unit, mae, rmse, r2), mean, deviation in zip(
                    rows, self.target.mean(axis=0), self.target.std(axis=0), strict=True
                )
            ],
        }


def compute(found: 'Outputs', task: Task, names: Sequence[str]) -> NumberMetrics:
    """Computes all metrics.

    Args:
      found: what the model gave for each image.
      task: with units and scale.
      names: of the C numbers.
    """
    predicted = task.values(found.output[found.readable]).astype(np.float64)
    target = found.label[found.readable].astype(np.float64)
    error = predicted - target
    squared = (error**2).mean(axis=0)
    variance = target.var(axis=0)
    constant = target.min(axis=0) == target.max(axis=0)
    return NumberMetrics(
        names=tuple(names),
        units=tuple(task.unit(i) for i in range(len(names))),
        count=len(found.readable),
        unreadable=int((~found.readable).sum()),
        mae=np.abs(error).mean(axis=0),
        rmse=np.sqrt(squared),
        r2=np.where(constant, np.nan, 1 - squared / np.where(constant, 1, variance)),
        target=target,
        predicted=predicted,
    )


def totals(found: 'Outputs', task: Task) -> dict[str, float]:
    """What is told of an evaluation on the way: `mae`, `rmse` and `r2`, means over the numbers."""
    result = compute(found, task, [''] * found.label.shape[1])
    return {name: float(getattr(result, name).mean()) for name in ('mae', 'rmse', 'r2')}
