"""Speed of training, and the share of it that waits for data."""

import contextlib
import time
from collections.abc import Iterator


class TrainingClock:
    """Measures training alone: without the first step (compiling), evaluation and saving."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.images = 0  # since the last lap
        self._steps = 0
        self._waited = 0.0
        self._begin = self._lap = time.monotonic()

    def restart(self) -> float:
        """Forgets what was so far, and returns how long it took, in seconds."""
        took = time.monotonic() - self._begin
        self._start()
        return took

    def step_done(self, images: int) -> None:
        """Counts a step of so many images."""
        self.images += images
        self._steps += 1

    def lap(self) -> tuple[int, float, float]:
        """Images, seconds, and seconds of waiting for data since the last lap, without pauses."""
        now = time.monotonic()
        result = self.images, now - self._lap, self._waited
        self._lap, self.images, self._waited = now, 0, 0.0
        return result

    def seconds_per_step(self) -> float:
        """Mean since the first step, pauses included: what a step costs in the long run."""
        return (time.monotonic() - self._begin) / max(1, self._steps)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what runs in it as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what runs in it out of the lap."""
        start = time.monotonic()
        yield
        self._lap += time.monotonic() - start
