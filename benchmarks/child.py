"""A contestant's process: gets ready, then does steps on command.

The parent and its children talk in lines of JSON over stdin and stdout. First line to the child:
its setup. First line back: `facts`, or `error`. Then for each `{"steps": n}` the seconds they took.
The process ends when its stdin does.

`command` starts it, with the module that has `build` (see `serve`).
"""

import json
import os
import pathlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

# Until here nothing was imported that takes time: what follows counts as the contestant's start.
BEGAN = time.perf_counter()


class Workload(Protocol):
    """What a contestant does."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Known before the first timing, as JSON (seconds of compilation, parameters)."""

    def run(self, steps: int) -> Mapping[str, Any] | None:
        """Does the steps and waits until they are done; may return more to report, as JSON."""

    def peak_memory(self) -> int:
        """Most bytes used so far: of the accelerator, or, on a CPU, of the process."""


def serve(build: Callable[[Mapping[str, Any]], Workload]) -> int:
    """Reads the setup, builds the workload, and runs it until stdin ends.

    Args:
      build: makes the workload of a setup. What takes time or starts threads is imported in it, so
        that the limit of cores (`cores` of the setup) holds for it.

    Returns:
      The exit status: 1 after an error, which is also sent to the parent.
    """
    # Libraries print what they like: to stderr, so that stdout is the parent's.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w', buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + '\n')

    try:
        setup = json.loads(sys.stdin.readline())
        _use_cores(setup.get('cores') or 0)
        if setup.get('memory_gib'):
            limit = round(setup['memory_gib'] * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        workload = build(setup)
        answer({'facts': dict(workload.facts)})
        for line in sys.stdin:
            steps = json.loads(line)['steps']
            start = time.perf_counter()
            more = workload.run(steps) or {}
            seconds = time.perf_counter() - start
            answer({'seconds': seconds, 'peak_memory': workload.peak_memory(), **more})
    except Exception as error:  # The parent reports any error and goes on.
        traceback.print_exc()
        text = ' '.join(str(error).split())[:500]
        answer({'error': f'{type(error).__name__}: {text}' if text else type(error).__name__})
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


def environment() -> dict[str, str]:
    """For a process that imports this package: a checkout runs without being installed."""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
    return os.environ | {'PYTHONPATH': path}


def command(module: str) -> list[str]:
    """What starts the process of the contestant that `module` builds."""
    # Not `python -m benchmarks.child`: the contestant imports this module by its name, and both
    # have to be one, with one `BEGAN`.
    code = (
        'import importlib, sys; from benchmarks import child; '
        'sys.exit(child.serve(lambda setup: importlib.import_module(sys.argv[1]).build(setup)))'
    )
    return [sys.executable, '-c', code, module]
