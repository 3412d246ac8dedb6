"""Your own code at named points of the training loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.state import TrainState

# on_start: before the first step of this process, also of a run that is resumed.
# on_step: after each step. on_eval: after each evaluation; of the test images, where there are
# validation images, after on_end. on_checkpoint: once a checkpoint is being written. on_end: after
# the last step.
POINTS = ('on_start', 'on_step', 'on_eval', 'on_checkpoint', 'on_end')


class EndRun(Exception):  # noqa: N818  (it is no error)
    """Raised by a callback in `on_step`: that step is the last one of the run.

    It is evaluated, and its model is the product of the run, as if `total_steps` were reached.
    """


class Callbacks:
    """Calls those of the objects that have a method for a point.

    A method takes (step, state, metrics): the number of steps done; the `TrainState`, whose arrays
    the next step takes away, so that what is to stay has to be copied; and what is known of the
    step: after a step its metrics, as arrays on the devices (reading one waits for the step), after
    an evaluation those of the validation or test images, as floats, else nothing. What `on_step`
    and `on_eval` return, a dict of numbers by name, or None, is written to `metrics.jsonl`. With
    several processes, each of them calls.

    Args:
      callbacks: objects with at least one of the methods that `POINTS` names.

    Raises:
      UserError: an object without any, or with another method `on_...`.

    Attributes:
      ended: whether one of them has raised `EndRun`.
    """

    def __init__(self, callbacks: Sequence[Any]):
        for callback in callbacks:
            methods = {name for name in dir(callback) if name.startswith('on_')}
            if not methods or methods - set(POINTS):
                raise UserError(
                    f'a callback has one or more of the methods {", ".join(POINTS)}, and '
                    f'{type(callback).__name__} has: {", ".join(sorted(methods)) or "none"}'
                )
        self.objects, self.ended = tuple(callbacks), False
        self._methods: dict[str, list[Callable]] = {
            point: [getattr(each, point) for each in callbacks if hasattr(each, point)]
            for point in POINTS
        }

    def __call__(
        self, point: str, step: int, state: TrainState, metrics: Mapping[str, Any]
    ) -> dict[str, float]:
        """Calls all, in their order; returns what they returned, as floats."""
        told: dict[str, float] = {}
        for method in self._methods[point]:
            try:
                told |= method(step, state, dict(metrics)) or {}
            except EndRun:
                if point != 'on_step':
                    raise
                self.ended = True
        return {name: float(value) for name, value in told.items()}
