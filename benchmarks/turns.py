"""Times contestants in turns: every round times each of them once, in rotated order.

Each runs in its own process, so that JAX and PyTorch share neither threads nor memory, and
waits, idle, while another is timed. What a busy machine does to one it does to all.
"""

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks import child

# Between two timings: threads of the one before may spin for a moment, waiting for more work.
PAUSE = 0.25
_ENDS_WITHIN = 10.0

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
      command: starts it, see `child.command`.
      setup: its first line.
      timeout: seconds to wait for any answer.
      cache: folder for compiled programs; '' for none.
      alone: whether no other contestant is on the device.

    Attributes:
      facts: what it said when it was ready.
      ready_s: seconds from the start of the process to the end of its first step.

    Raises:
      ContestantError: it did not get ready.
    """

    def __init__(
        self,
        command: Sequence[str],
        setup: Mapping[str, Any],
        timeout: float,
        *,
        cache: str = '',
        alone: bool = False,
    ):
        self._timeout = timeout
        self._log = tempfile.TemporaryFile('w+', errors='replace')
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=child.environment() | _environment(cache, alone),
        )
        assert self._process.stdin and self._process.stdout
        self._questions, self._output = self._process.stdin, self._process.stdout
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.facts = self._ask(setup)['facts']
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
        return self._ask({'steps': steps})

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        try:
            self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._output.close()
        self._log.close()

    def _read(self) -> None:
        for line in self._output:
            self._answers.put(line)
        self._answers.put('')

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it ended; reading tells
            self._questions.write(json.dumps(request) + '\n')
            self._questions.flush()
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            self._process.kill()
            raise ContestantError(f'no answer within {self._timeout:g} s') from None
        if not line:
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ['no message'])[-1]
            raise ContestantError(f'its process ended with status {self._process.wait()}: {last}')
        answer = json.loads(line)
        if 'error' in answer:
            raise ContestantError(answer['error'])
        return answer


def _environment(cache: str, alone: bool) -> dict[str, str]:
    """What the processes of contestants need to live beside each other, and where programs go."""
    shared = {'TOKENIZERS_PARALLELISM': 'false'}
    if not alone:
        # The contestants share one GPU: none may take all of its memory at the start.
        shared['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    if not cache:
        return shared | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    return shared | {
        'JAX_ENABLE_COMPILATION_CACHE': 'true',
        'JAX_COMPILATION_CACHE_DIR': cache,
        'TORCHINDUCTOR_CACHE_DIR': cache,
    }
