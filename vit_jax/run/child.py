"""Python programs that are run in a child process, and end when the process that started them does.

As a program it is that child: it imports nothing of this package, and neither does what it runs
have to.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

_LOOK_SECONDS = 0.2


def run(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """Runs a Python program and waits for it; see `start`.

    Args:
      arguments: see `start`.
      **options: of `subprocess.run`.
    """
    return subprocess.run(_command(arguments), check=False, **options)


def start(arguments: Sequence[str], **options: Any) -> subprocess.Popen:
    """Starts a Python program.

    A process that is killed cannot end its children. So the child looks for its parent itself, and
    is gone within a second of it.

    Args:
      arguments: a file and its arguments, or '-m', a module and its arguments.
      **options: of `subprocess.Popen`.
    """
    return subprocess.Popen(_command(arguments), **options)


def how_it_ended(code: int) -> str:
    """How a child process ended that left no message itself, for people."""
    if code == -signal.SIGKILL:
        return 'its process was killed, as the system does when memory runs out'
    if code < 0:
        return f'its process was ended by signal {-code} ({signal.strsignal(-code)})'
    return f'its process ended with code {code}'


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, '-P', __file__, str(os.getpid()), *arguments]


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _main() -> None:
    _, parent, *arguments = sys.argv
    threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()
    if arguments[0] == '-m':
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name='__main__')


if __name__ == '__main__':
    _main()
