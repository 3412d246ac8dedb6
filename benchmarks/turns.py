"""Times contestants in turns, each in its own process: the protocol between them, both ends.

Every round times each contestant once, in rotated order, so what a busy machine does to one it does
to all. In separate processes JAX and PyTorch share neither threads nor memory; a process waits,
idle, while another is timed. `Child` starts one and asks; `serve` runs in it and answers, through a
pipe. The first request is the setup, and its answer the facts; after that each request is a number
of steps, and its answer a dict with the seconds they took. An error is answered by its text.
"""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

# Between two timings: threads of the one before may spin for a moment, waiting for more work.
PAUSE = 0.25
_ENDS_WITHIN = 10.0
_ROOT = str(pathlib.Path(__file__).resolve().parents[1])

T = TypeVar('T')


class ContestantError(Exception):
    """A contestant failed; the message says why."""


def take_turns(
    tasks: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    say: Callable[[str], None] = lambda text: None,
    pause: float = PAUSE,
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Calls every task once in each round; the next round begins with another task.

    Args:
      tasks: by name.
      rounds: how many.
      say: called with progress messages.
      pause: seconds before each call.

    Returns:
      The results of each task, one for each round; and the errors of those that raised
      `ContestantError`, which are not called again.
    """
    results: dict[str, list[T]] = {name: [] for name in tasks}
    errors: dict[str, str] = {}
    names = list(tasks)
    for number in range(rounds):
        say(f'round {number + 1} of {rounds}')
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            if name in errors:
                continue
            time.sleep(pause)
            try:
                results[name].append(tasks[name]())
            except ContestantError as error:
                errors[name] = str(error)
    return results, errors


class Child:
    """The process of a contestant, ready to be timed; a context manager that ends it.

    Args:
      module: has `build`, see `serve`.
      setup: the first message to the contestant.
      timeout: seconds to wait for any answer.
      cache: folder for compiled programs; '' for none.
      alone: whether no other contestant is on the device.

    Attributes:
      facts: its answer when it was ready.
      ready_s: seconds from the start of the process to the end of its first step.

    Raises:
      ContestantError: it did not get ready.
    """

    def __init__(
        self,
        module: str,
        setup: Mapping[str, Any],
        timeout: float,
        *,
        cache: str = '',
        alone: bool = False,
    ):
        self._timeout = timeout
        self._log = tempfile.TemporaryFile('w+', errors='replace')
        self._pipe, theirs = multiprocessing.Pipe()
        code = 'import sys; from benchmarks import turns; sys.exit(turns.serve(*sys.argv[1:]))'
        start = time.perf_counter()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, '-c', code, module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env=_environment(cache, alone),
            )
        try:
            self.facts = self._ask(dict(setup))
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - start

    def __enter__(self) -> 'Child':
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def time(self, steps: int) -> dict[str, Any]:
        """Runs so many steps: `seconds`, `peak_memory`, and what else it reports."""
        return self._ask(steps)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        try:
            self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, request: dict[str, Any] | int) -> dict[str, Any]:
        try:
            self._pipe.send(request)
            if not self._pipe.poll(self._timeout):
                self._process.kill()
                raise ContestantError(f'no answer within {self._timeout:g} s')
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            status = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ['no message'])[-1]
            raise ContestantError(f'its process ended with status {status}: {last}') from None
        if isinstance(answer, str):
            raise ContestantError(answer)
        return answer


def _environment(cache: str, alone: bool) -> dict[str, str]:
    """What the processes of contestants need to live beside each other, and where programs go."""
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get('PYTHONPATH')]))
    found = os.environ | {'PYTHONPATH': path, 'TOKENIZERS_PARALLELISM': 'false'}
    if not alone:
        # The contestants share one GPU: none may take all of its memory at the start.
        found['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    found['JAX_ENABLE_COMPILATION_CACHE'] = 'true' if cache else 'false'
    if cache:
        found |= {'JAX_COMPILATION_CACHE_DIR': cache, 'TORCHINDUCTOR_CACHE_DIR': cache}
    return found


class Workload(Protocol):
    """What a contestant does."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Known before the first timing (seconds of compilation, parameters); for JSON."""

    def run(self, steps: int) -> Mapping[str, Any] | None:
        """Does the steps and waits until they are done; may return more to report, for JSON."""

    def peak_memory(self) -> int:
        """Most bytes used so far: of the accelerator, or, on a CPU, of the process."""


def serve(module: str, pipe: str) -> int:
    """Reads the setup, builds the workload, and runs it until the pipe is closed.

    Args:
      module: its `build(setup)` makes the workload. It is imported here, so that the limits of the
        setup, `cores` and `memory_gib`, hold for the threads that an import starts.
      pipe: file descriptor of the pipe to the parent.

    Returns:
      The exit status: 1 after an error, which is also sent to the parent.
    """
    with multiprocessing.connection.Connection(int(pipe)) as parent:
        try:
            setup = parent.recv()
            _use_cores(setup.get('cores') or 0)
            if setup.get('memory_gib'):
                limit = round(setup['memory_gib'] * 2**30)
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            workload: Workload = importlib.import_module(module).build(setup)
            parent.send(dict(workload.facts))
            with contextlib.suppress(EOFError):
                while True:
                    steps = parent.recv()
                    start = time.perf_counter()
                    more = workload.run(steps) or {}
                    seconds = time.perf_counter() - start
                    memory = workload.peak_memory()
                    parent.send({'seconds': seconds, 'peak_memory': memory, **more})
        except Exception as error:  # The parent reports any error and goes on.
            traceback.print_exc()
            text = ' '.join(str(error).split())[:500]
            parent.send(f'{type(error).__name__}: {text}' if text else type(error).__name__)
            return 1
    return 0


def process_memory() -> int:
    """Most bytes of memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def _use_cores(cores: int) -> None:
    """Restricts this process, and threads that it starts later, to `cores` cores (0: all)."""
    if not cores:
        return
    if not hasattr(os, 'sched_setaffinity'):
        raise OSError('this system cannot keep a process to some cores: leave --cores out')
    allowed = sorted(os.sched_getaffinity(0))
    if cores > len(allowed):
        raise ValueError(f'--cores {cores}: this process may use {len(allowed)}')
    os.sched_setaffinity(0, allowed[:cores])
    os.environ['OMP_NUM_THREADS'] = str(cores)
