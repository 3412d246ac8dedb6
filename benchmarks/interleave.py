"""Measures contestants side by side: every round times each of them once, in rotated order.

Each lives in a process of its own, so that JAX and PyTorch share neither threads nor memory, and
waits, idle, while another is timed. What a busy machine does to one it does to all.
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.contestants import MATMULS, ORIGINAL, Contestant

# Between two timings: threads of the one before may spin for a moment, waiting for more work.
PAUSE = 0.25
_ENDS_WITHIN = 10.0


class ContestantError(Exception):
    """A contestant could not do what it was told; the message says why."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured together: one model, size, dtype, batch, and training or inference.

    Attributes:
      variant: its name.
      model_config: see `variants.get_config`, as JSON.
      num_classes: C.
      image_size: pixels.
      dtype: 'float32' or 'bfloat16'.
      batch: images.
      mode: 'training' or 'inference'.
      data: '' for made-up images, else a folder or dataset.
      cores: that each contestant may use; 0 for all.
    """

    variant: str
    model_config: Mapping[str, Any]
    num_classes: int
    image_size: int
    dtype: str
    batch: int
    mode: str
    data: str = ''
    cores: int = 0

    def setup(self, contestant: Contestant) -> dict[str, Any]:
        """What the contestant's process is told first."""
        return dataclasses.asdict(self) | {
            'contestant': contestant.name,
            'options': dict(contestant.options),
        }


@dataclasses.dataclass(frozen=True)
class Timing:
    """How much is timed.

    Attributes:
      rounds: timings of each contestant.
      steps: in each timing; 0: as many as take `seconds`.
      seconds: that one timing takes about.
      warmup: steps of each contestant that are not timed, after its first.
      warm_start: whether to start each contestant twice, to time its first step also with programs
        that were compiled before.
      timeout: seconds after which a contestant that does not answer has failed.
    """

    rounds: int = 10
    steps: int = 0
    seconds: float = 1.0
    warmup: int = 2
    warm_start: bool = True
    timeout: float = 1800.0


class Child:
    """The process of a contestant, ready to be timed.

    Args:
      command: starts it.
      setup: its first line.
      cache: folder for compiled programs; '' for none.
      timeout: seconds to wait for any answer.
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
        cache: str,
        timeout: float,
        *,
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
            env=os.environ | _environment(cache, alone),
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.facts = self._ask(setup)['facts']
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - start

    def time(self, steps: int) -> dict[str, Any]:
        """Lets it do so many steps; `seconds`, `peak_memory`, and what else it reports."""
        return self._ask({'steps': steps})

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._log.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put('')

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it ended; reading tells
            self._process.stdin.write(json.dumps(request) + '\n')
            self._process.stdin.flush()
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


def measure(
    cell: Cell,
    contestants: Sequence[Contestant],
    timing: Timing,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Starts the contestants and times them, turn about.

    Args:
      cell: what they do.
      contestants: who does it.
      timing: how much of it.
      say: told what is going on.

    Returns:
      For each contestant a dict, as JSON: `contestant`, and either `error`, or `facts`, `ready_s`
      (from the start of its process to the end of its first step: with nothing compiled before, and
      `ready_warm_s`, with everything), `steps` (in a timing), `seconds` (per step, of each round)
      and `peak_memory` (bytes).
    """
    results, children = {}, {}
    with contextlib.ExitStack() as stack:
        for contestant in contestants:
            say(f'{contestant.label}: starts')
            try:
                children[contestant.label], results[contestant.label] = _start(
                    cell, contestant, timing, stack
                )
            except ContestantError as error:
                results[contestant.label] = {'error': str(error)}
        failed = {}
        for number in range(timing.rounds):
            say(f'round {number + 1} of {timing.rounds}')
            labels = list(children)
            turn = number % max(1, len(labels))
            for label in labels[turn:] + labels[:turn]:
                if label in failed:
                    continue
                time.sleep(PAUSE)
                result = results[label]
                try:
                    answer = children[label].time(result['steps'])
                except ContestantError as error:
                    failed[label] = {'error': str(error)}
                    continue
                result['seconds'].append(answer['seconds'] / result['steps'])
                result['peak_memory'] = answer['peak_memory']
        results |= failed
    return [{'contestant': c.label, **results[c.label]} for c in contestants]


def _start(
    cell: Cell, contestant: Contestant, timing: Timing, stack: contextlib.ExitStack
) -> tuple[Child, dict[str, Any]]:
    """Starts one, cold, and if asked for once more, warm; warms up, and counts steps to time."""
    cached = contestant.name != ORIGINAL  # which kept none
    cache = stack.enter_context(tempfile.TemporaryDirectory()) if cached else ''

    def start() -> Child:
        return Child(contestant.command, cell.setup(contestant), cache, timing.timeout)

    child = start()
    result = {'facts': child.facts, 'ready_s': child.ready_s}
    if timing.warm_start and contestant.name not in MATMULS:
        child.close()
        child = start()
        result['ready_warm_s'] = child.ready_s
    stack.callback(child.close)
    if timing.warmup:
        child.time(timing.warmup)
    steps = timing.steps
    if not steps:
        steps = max(1, math.ceil(timing.seconds / child.time(1)['seconds']))
    return child, result | {'steps': steps, 'seconds': []}


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
