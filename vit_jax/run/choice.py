"""Which step of a run is the best, and whether to go on: by evaluations on validation images."""

import math
import os
from collections.abc import Mapping

import ml_collections

from vit_jax.run import telemetry

# What is judged by, the first that there is: the metric, and the sign with which larger is better.
JUDGES = {
    'accuracy_val': 1, 'mean_average_precision_val': 1, 'mean_recall_val': 1, 'loss_val': -1,
}  # fmt: skip
FEW = 100  # validation images, of which the best of many results is best by luck


class Choice:
    """The scores of a run so far, and what is chosen by them.

    Args:
      config: resolved; `keep_best` and `patience` count.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        self._keep_best, self._patience = config.keep_best, config.patience
        self._scores: dict[int, float] = {}  # by step; larger is better, NaN is worst

    def read(self, workdir: str | os.PathLike, up_to: int) -> 'Choice':
        """Takes the evaluations of an earlier part of the run from its `metrics.jsonl`.

        Args:
          workdir: folder of the run.
          up_to: the last step that counts.

        Returns:
          Itself.
        """
        _, self._scores = read_scores(workdir, up_to=up_to)
        return self

    def add(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Adds an evaluation; returns whether it is to be kept, because it is the best so far."""
        before = self.best()
        name = next((name for name in JUDGES if name in metrics), None)
        if name is not None:
            self._scores[step] = JUDGES[name] * metrics[name]
        return self.best() != before

    def best(self) -> int | None:
        """The first step of the best score; None if there is none, or it is not to be kept."""
        return self._first_of_best() if self._keep_best else None

    def is_over(self) -> bool:
        """Whether the run ends: `patience` evaluations in a row were not better."""
        best = self._first_of_best() or 0
        return 0 < self._patience <= sum(step > best for step in self._scores)

    def _first_of_best(self) -> int | None:
        finite = {step: score for step, score in self._scores.items() if not math.isnan(score)}
        return max(finite, key=finite.__getitem__, default=None)


def read_scores(
    workdir: str | os.PathLike, *, up_to: int | None = None
) -> tuple[str, dict[int, float]]:
    """The metric that a run is judged by, '' for none yet, and its scores by step; more is better.

    Args:
      workdir: folder of the run.
      up_to: the last step that counts.
    """
    for name, sign in JUDGES.items():
        if found := telemetry.read_metric(workdir, name, up_to=up_to):
            return name, {step: sign * value for step, value in found.items()}
    return '', {}
