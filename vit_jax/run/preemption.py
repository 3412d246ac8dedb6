"""Stopping a run from outside: SIGTERM (batch systems, Kubernetes, `kill`) and Ctrl-C.

The first signal asks the run to finish its step, save and leave; a second one ends the process at
once.
"""

import signal
import sys
import types
from typing import Self


class PreemptedError(Exception):
    """The run was asked to stop, and has saved where it is; the message tells how to go on.

    Attributes:
      signum: the signal, `signal.SIGTERM` or `signal.SIGINT`. By convention a program exits with
        128 + its number.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def keep_interrupts() -> None:
    """From now on no Ctrl-C is lost; called once, at the start of a program.

    Python drops an exception that is raised in a destructor or in a callback of the garbage
    collector, and JAX has such a callback. A KeyboardInterrupt that is dropped is kept for the
    `StopSignals` that are made later: the run stops at its first step.
    """
    report = sys.unraisablehook

    def hook(dropped: 'sys.UnraisableHookArgs') -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            StopSignals.dropped = signal.SIGINT
        else:
            report(dropped)

    sys.unraisablehook = hook


class StopSignals:
    """Takes note of SIGTERM and SIGINT while the context lasts. For the main thread only.

    Attributes:
      received: number of the first signal, 0 before it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    dropped = 0  # see `keep_interrupts`

    def __init__(self):
        self.received = 0
        self._before = {}

    def __enter__(self) -> Self:
        self.received = self.dropped
        for signum in self.SIGNALS:
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._before.items():
            # None: a handler that was not set from Python, which cannot be put back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: types.FrameType | None) -> None:
        self.received = signum
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the second one ends the process
