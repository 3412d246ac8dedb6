"""What `vit_jax finetune` finds out: scores, the probe, and all that the report shows."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.data.decode import BadImageError
from vit_jax.inference import feature_files, model_folder, probe_choice, probes
from vit_jax.inference import metrics as metrics_lib
from vit_jax.run import resume, telemetry
from vit_jax.run.finetuning import look
from vit_jax.run.finetuning.plans import Plan


@dataclasses.dataclass(frozen=True)
class Score:
    """How good a model is on some images.

    Attributes:
      right: images that are predicted right.
      count: images.
      loss: mean cross-entropy, of those that can be read.
    """

    right: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of the images, in [0, 1]."""
        return self.right / self.count

    @property
    def order(self) -> tuple[int, float]:
        """Larger is better: the accuracy, and where it is equal the loss."""
        return self.right, -self.loss if math.isfinite(self.loss) else -math.inf

    def __str__(self) -> str:
        return f'{100 * self.accuracy:.1f} % of {self.count:,} (loss {self.loss:.3f})'


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The probe, and what it was made of.

    Attributes:
      results: of all kinds, see `probe_choice.choose`.
      train: features of the training images.
      val: features of the validation images.
    """

    results: list[probe_choice.Result]
    train: feature_files.Features
    val: feature_files.Features

    @property
    def best(self) -> probe_choice.Result:
        """Of the linear ones."""
        return next(r for r in self.results if isinstance(r.probe, probes.Linear))

    @property
    def setting(self) -> str:
        """Of the best linear one, for people."""
        return f'{self.best.chosen.name} {self.best.chosen.setting}'.strip()

    def to_all(self, classes: int) -> probes.Linear:
        """The best one, fitted to training and validation images."""
        both = self.train, self.val
        values, labels = (
            np.concatenate([getattr(each, name) for each in both]) for name in ('values', 'label')
        )
        found = self.best.fit(values, labels, classes)
        assert isinstance(found, probes.Linear)
        return found


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out, for the report.

    Attributes:
      folder: of all.
      plan: what was done.
      state: what `finetune.json` holds.
      parts: the images.
      model: the chosen one.
      fitted: the probe.
      found: what became of each test image.
      test: features of the test images.
      unreadable: images that could not be read.
    """

    folder: pathlib.Path
    plan: Plan
    state: Mapping[str, Any]
    parts: look.Parts
    model: model_folder.Model
    fitted: Fitted
    found: metrics_lib.Outcomes
    test: feature_files.Features
    unreadable: list[BadImageError]


def score_of(workdir: pathlib.Path) -> Score:
    """Of a run, on the validation images, after its last step."""
    shares, losses = (
        telemetry.read_metric(workdir, f'{name}_val') for name in ('accuracy', 'loss')
    )
    step = max(shares)
    count = files.read_json(workdir / resume.DATA_FILE)['val']['examples']
    return Score(round(shares[step] * count), count, losses[step])
