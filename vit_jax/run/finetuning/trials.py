"""Which runs of training `vit_jax finetune` tries, how long, and what it expects of the time."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.run.finetuning.clock import Measured
from vit_jax.run.finetuning.plans import Run

FORWARD = 0.29  # time of a forward pass, as a share of that of a step that trains all weights
_AROUND = 25.0  # seconds of a run that are not steps, before any was measured
_EXPLORE = 0.3  # share of the time for short runs
_LEAST_STEPS, _LEAST_TRIAL = 20, 14
_PASSES = 60  # over the training images, after which more of it is not expected to help
# Of a run that sees each image often, AugReg's light2 (https://arxiv.org/abs/2106.10270).
_OFTEN, _AUGMENTATION = 8, {'randaug': '2,10', 'mixup': 0.2}
_LONG = 'long-'  # begins the names of long runs
_SAFETY = 0.93  # share of the time that steps are planned for


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to train.

    Attributes:
      name: begins the names of its runs.
      what: is trained, for people.
      settings: knobs by name.
      cost: time of a step, as a share of that of training all weights.
    """

    name: str
    what: str
    settings: Mapping[str, str | float | int]
    cost: float


ALL = Kind('all', 'all weights', {'layer_decay': 0.75}, 1.0)
LAST = Kind('last3', 'the last three blocks', {'train_only': 'last:3', 'layer_decay': 0.75}, 0.45)
LORA = Kind('lora', 'adapters (LoRA)', {'lora_rank': 8}, 0.86)
KINDS = {kind.name: kind for kind in (ALL, LAST, LORA)}
Trial = tuple[Kind, float]
# The most promising first: kinds and learning rates of AdamW.
TRIALS: tuple[Trial, ...] = ((ALL, 1e-3), (ALL, 3e-4), (LAST, 1e-3), (LAST, 3e-4), (LORA, 3e-3))


def to_try(architecture: Mapping[str, Any]) -> tuple[Trial, ...]:
    """Those of `TRIALS` that make sense for a model.

    Args:
      architecture: see `model_folder.Model.model_config`.
    """
    blocks = architecture.get('transformer', {}).get('num_layers', 0)
    none = {kind.name for kind, least in ((LAST, 4), (LORA, 1)) if blocks < least}
    return tuple(each for each in TRIALS if each[0].name not in none)


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What is known of time, model and data when a run is planned.

    Attributes:
      tries: of `to_try`.
      left: seconds for all runs that are to come.
      measured: the runs so far.
      forward: images per second, of features.
      images: to fit to.
      batch: images of a step.
    """

    tries: Sequence[Trial]
    left: float
    measured: Sequence[Measured]
    forward: float
    images: int
    batch: int

    def step(self, kind: Kind) -> float:
        """Seconds that a step is expected to take."""
        for run in reversed(self.measured):
            if run.kind == kind.name:
                return run.step
        if self.measured:
            last = self.measured[-1]
            return last.step * kind.cost / KINDS[last.kind].cost
        return kind.cost * self.batch / (self.forward * FORWARD)

    def around(self) -> float:
        """Seconds of a run that are expected not to be steps."""
        return max((run.around for run in self.measured), default=_AROUND)

    def steps(self, kind: Kind, seconds: float) -> int:
        """Steps of a run that has so many seconds; at most those of `_PASSES`."""
        most = max(_LEAST_STEPS, math.ceil(_PASSES * self.images / self.batch))
        return min(most, int(_SAFETY * (seconds - self.around()) / self.step(kind)))


def how_many(outlook: Outlook) -> int:
    """How many short runs there is time for, besides a long one; one alone says nothing."""
    least = outlook.around() + (_LEAST_TRIAL + 1) * outlook.step(ALL) / _SAFETY
    count = min(len(outlook.tries), int(_EXPLORE * outlook.left / least))
    return count if count > 1 else 0


def trial(outlook: Outlook, place: int, count: int) -> Run | None:
    """A short run.

    Args:
      outlook: `left` is the time for this and all later runs.
      place: which of `outlook.tries`.
      count: of short runs in all.
    """
    kind, rate = outlook.tries[place]
    # Of what was left at first, those before have taken their share.
    share = _EXPLORE / count / (1 - _EXPLORE * place / count)
    steps = outlook.steps(kind, share * outlook.left)
    if steps < _LEAST_TRIAL:
        return None
    return _run(outlook, name_of(kind, rate), kind, rate, steps)


def last(outlook: Outlook, promising: Sequence[Trial], before: Sequence[Run]) -> Run | None:
    """A long run.

    There is one, and more of them where it took less time than there is: because it was faster than
    expected, or had as many passes over the images as are of use.

    Args:
      outlook: `left` is the time for it.
      promising: what may be trained, the best first.
      before: long runs so far.

    Returns:
      None where the time does not suffice, or all was done.
    """
    done = {run.name for run in before}
    least = max((run.settings['total_steps'] // 2 for run in before), default=_LEAST_STEPS)
    for kind, rate in promising:
        steps = outlook.steps(kind, outlook.left)
        name = _LONG + name_of(kind, rate)
        if name not in done and steps >= max(_LEAST_STEPS, least):
            return _run(outlook, name, kind, rate, steps)
    return None


def seconds_of(outlook: Outlook, run: Run) -> float:
    """Seconds that a run is expected to take."""
    kind = kind_of(run)
    return outlook.around() + run.settings['total_steps'] * outlook.step(kind)


def kind_of(run: Run) -> Kind:
    """The kind of a run."""
    return KINDS.get(run.name.removeprefix(_LONG).partition('-')[0], ALL)


def name_of(kind: Kind, rate: float) -> str:
    """The name of a short run."""
    return f'{kind.name}-{rate:g}'


def is_last(run: Run) -> bool:
    """Whether it is a long run."""
    return run.name.startswith(_LONG)


def _run(outlook: Outlook, name: str, kind: Kind, rate: float, steps: int) -> Run:
    often = steps * outlook.batch >= _OFTEN * outlook.images
    settings = {
        **kind.settings,
        'base_lr': rate,
        'total_steps': steps,
        'warmup_steps': max(1, steps // 10),
        # An average over about the last tenth of the steps.
        'ema_decay': round(max(0.5, min(0.9999, 1 - 10 / steps)), 4),
        **(_AUGMENTATION if often else {}),
    }
    return Run(name, kind.what, settings)
