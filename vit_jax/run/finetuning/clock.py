"""The time of a `vit_jax finetune`: what is left of it, and what a run of training takes of it."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import numpy as np

from vit_jax.run.callbacks import EndRun
from vit_jax.run.telemetry import format_duration
from vit_jax.state import TrainState

_RECENT = 9  # steps, whose median says how fast it goes
_SLOWEST = 4.0  # times as slow as expected: more is taken for a hitch
_SAVE_SECONDS = 5.0  # between two notes of the time that was spent


class Clock:
    """Counts the time of all sessions, so that one that was stopped has what is left.

    Args:
      seconds: that there are; infinite where nothing ends by the clock.
      spent: in earlier sessions.
      started: when this one began, `time.monotonic()`.
      note: writes down what was spent, in seconds.
    """

    def __init__(self, seconds: float, spent: float, started: float, note: Callable[[float], None]):
        self.seconds = seconds
        self._before, self._started, self._note = spent, started, note
        self._noted = started

    def spent(self) -> float:
        """Seconds, of all sessions."""
        return self._before + time.monotonic() - self._started

    def left(self) -> float:
        """Seconds; infinite without a limit."""
        return self.seconds - self.spent()

    def tick(self) -> None:
        """To be called often: writes down the time that was spent."""
        if time.monotonic() - self._noted > _SAVE_SECONDS:
            self._noted = time.monotonic()
            self._note(self.spent())

    def __str__(self) -> str:
        if math.isinf(self.seconds):
            return f'[{format_duration(self.spent())}]'
        return f'[{format_duration(self.spent())} of {format_duration(self.seconds)}]'


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run took.

    Attributes:
      kind: what was trained.
      step: seconds of a step, the median.
      around: seconds that were not steps: set-up, compiling, evaluation, saving.
    """

    kind: str
    step: float
    around: float


class Watch:
    """A callback that ends a run in time, and measures it.

    Args:
      clock: the time of all.
      until: spent seconds at which all has to be done.
      after: seconds that are needed after the last step; more of them where steps take longer than
        `step`.
      step: seconds that a step is expected to take.
      ended: the step to end after, whatever the clock says; 0 for none.

    Attributes:
      steps: that were done in all.
      ended: whether the run was ended before its last step.
    """

    def __init__(self, clock: Clock, until: float, after: float, step: float, ended: int):
        self._clock, self._until, self._last = clock, until, ended
        self._after, self._expected = after, step
        self._times: list[float] = []
        self.steps, self.ended = 0, False

    def on_step(self, step: int, state: TrainState, metrics: object) -> None:
        """Looks at the clock."""
        del state, metrics
        self.steps = step
        self._times.append(time.monotonic())
        self._clock.tick()
        slower = 1.0
        if len(self._times) > 1:
            recent = statistics.median(np.diff(self._times[-_RECENT - 1 :]).tolist())
            slower = min(max(1.0, recent / self._expected), _SLOWEST)
        late = self._clock.spent() + slower * self._after > self._until
        over = step == self._last if self._last else late
        if over:
            self.ended = True
            raise EndRun

    def measured(self, kind: str, begin: float) -> Measured | None:
        """What a run took that began then (`time.monotonic()`); None of fewer than three steps."""
        gaps = sorted(b - a for a, b in zip(self._times[:-1], self._times[1:], strict=True))
        if len(gaps) < 2:
            return None
        step = gaps[len(gaps) // 2]
        around = time.monotonic() - begin - sum(gaps)
        return Measured(kind, step, max(0.0, around))
