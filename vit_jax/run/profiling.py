"""A trace of some steps, for xprof and TensorBoard's profile page."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax

from vit_jax.run import checks
from vit_jax.state import TrainState


class Profile:
    """Writes a trace of the steps that `config.profile` names: a callback of the run.

    It is in `plugins/profile/<time>/` of the workdir: `*.xplane.pb` for xprof and TensorBoard, and
    `*.trace.json.gz` for https://ui.perfetto.dev. A run that is resumed beyond the first of these
    steps writes none. Use it as a context manager: what was begun is written when the run stops.

    Args:
      steps: as `config.profile`.
      workdir: of the run.
      say: gets a line about it.
    """

    def __init__(self, steps: str, workdir: pathlib.Path, say: Callable[[str], None]):
        self._first, self._last = checks.profiled(steps)
        self._workdir, self._say = workdir, say
        self._running, self._seen = False, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def on_start(self, step: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Begins at once if the first step is the next one."""
        self.on_step(step, state, metrics)

    def on_step(self, step: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Begins before the first step, and ends after the last one, is computed."""
        if step == self._first - 1:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._workdir)
            self._running = True
        elif self._running:
            self._seen = step
        if step == self._last and self._running:
            jax.block_until_ready((state, metrics))
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        self._say(
            f'profile: a trace of steps {self._first} to {self._seen} is in {self._workdir}; '
            f'tensorboard --logdir {self._workdir} shows it where xprof is installed'
        )
