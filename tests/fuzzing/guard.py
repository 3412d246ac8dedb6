"""Runs a reader under watch: time, memory, and what it opens, changes, starts and connects to."""

import contextlib
import dataclasses
import gc
import os
import pathlib
import re
import resource
import signal
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable

from vit_jax.errors import UserError, printable_lines

ROOT = pathlib.Path(__file__).parents[2]
# Where Python, its libraries and this project live; /proc and /sys tell about the machine.
_TRUSTED = tuple(
    os.path.realpath(path)
    for path in (
        *(sys.prefix, sys.base_prefix, ROOT, '/proc', '/sys', '/usr', '/lib', '/dev/null'),
        *(sysconfig.get_path('stdlib'), '/dev/urandom', '/etc/localtime', '/etc/ld.so.cache'),
        *('/etc/mime.types', '/etc/nsswitch.conf', '/etc/resolv.conf', '/etc/hosts'),
    )
)
_FORBIDDEN = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork')
_FORBIDDEN += ('pickle.find_class',)
# Of these the first argument is what is changed; of the second, where a name goes.
_CHANGES = ('os.mkdir', 'os.remove', 'os.rmdir', 'os.truncate', 'os.chmod', 'os.chown')
_MOVES = ('os.rename', 'os.link', 'os.symlink')

_allowed: tuple[str, ...] | None = None
_seen: list[str] = []
_hooked = False


class _TooLong(BaseException):
    pass


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of one case.

    Attributes:
      text: 'ok', the name of a `UserError`, or 'FAULT ...'.
      detail: of a fault: the traceback, or what was seen.
      memory: the most that the process had beyond what it had before, bytes.
      cpu: seconds of all its threads and children.
    """

    text: str
    detail: str
    memory: int
    cpu: float


def watched(
    read: Callable[[], object],
    folders: tuple[pathlib.Path, ...],
    seconds: int,
    watch_files: bool,
    limits: Callable[[], tuple[int, float]],
    show: bool = False,
) -> Outcome:
    """Calls a reader.

    Args:
      read: what is called.
      folders: where it may open files; writing, only in the first.
      seconds: after which it is stopped.
      watch_files: whether to watch which files it opens (not where the name is the user's own).
      limits: gives the bytes of memory and the CPU seconds that it may take; asked afterwards.
      show: whether to print its traceback.
    """
    text, detail = 'ok', ''
    signal.signal(signal.SIGALRM, _stop)
    gc.collect()
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    before, start = _status('VmRSS'), _cpu()
    _hook(folders if watch_files else ())
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            read()
    except UserError as error:
        text = type(error).__name__
        if not str(error) or len(str(error)) > 200_000:
            text, detail = 'FAULT a message of no use', str(error)[:500]
        elif str(error) != printable_lines(str(error)):
            text, detail = 'FAULT a message with control characters', ascii(str(error))[:500]
    except _TooLong:
        text, detail = 'FAULT no end', traceback.format_exc()[-1500:]
    except BaseException as error:  # whatever it is, it is a fault
        text, detail = f'FAULT {type(error).__name__}', traceback.format_exc()[-2500:]
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        signal.alarm(0)
        forbidden = _unhook()
        if show:
            traceback.print_exc()
    memory, cpu = _status('VmHWM') - before, _cpu() - start
    forbidden += [f'child process {pid}' for pid in _children()]
    if forbidden:
        text, detail = f'FAULT {forbidden[0][:200]}', '\n'.join(forbidden[:10])
    if not text.startswith('FAULT'):
        most_memory, most_cpu = limits()
        if memory > most_memory:
            text, detail = 'FAULT memory', f'{memory:,} bytes are more than {most_memory:,.0f}'
        elif cpu > most_cpu:
            text, detail = 'FAULT time', f'{cpu:.1f} CPU seconds are more than {most_cpu:.1f}'
    return Outcome(text, detail, memory, cpu)


def _status(name: str) -> int:
    """A size of this process, bytes (proc_pid_status(5))."""
    status = pathlib.Path('/proc/self/status').read_text()
    return int(re.search(rf'{name}:\s+(\d+) kB', status)[1]) << 10


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _children() -> list[str]:
    children = []
    for task in pathlib.Path('/proc/self/task').glob('*/children'):
        with contextlib.suppress(OSError):  # a thread that has ended
            children += task.read_text().split()
    return children


def limit_memory(beyond: int) -> None:
    """Allows the process so many bytes of address space beyond what it has now."""
    gc.collect()
    gc.freeze()  # what is there stays: later collections do not look through it
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    limit = pages * resource.getpagesize() + beyond
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _stop(*_):
    raise _TooLong


def _hook(folders: tuple[pathlib.Path, ...]) -> None:
    global _allowed, _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    _seen.clear()
    _allowed = tuple(os.path.realpath(folder) for folder in folders)


def _unhook() -> list[str]:
    global _allowed
    _allowed = None
    return list(_seen)


def _audit(event: str, arguments: tuple) -> None:
    if _allowed is None:
        return
    if event in _FORBIDDEN:
        _seen.append(f'{event} {arguments!r}'[:300])
    elif event == 'socket.connect' and '127.0.0.1' not in repr(arguments):
        _seen.append(f'{event} {arguments!r}'[:300])
    elif event == 'open' and isinstance(arguments[0], str | bytes):
        path, mode, flags = arguments
        writing = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        _look(path, f'open {mode}', writing)
    elif event in _CHANGES and isinstance(arguments[0], str | bytes | os.PathLike):
        folder = -1 if event == 'os.truncate' else arguments[-1]  # a descriptor, or none
        above = os.readlink(f'/proc/self/fd/{folder}') if folder >= 0 else ''
        _look(os.path.join(above, os.fsdecode(arguments[0])), event, True)
    elif event in _MOVES:
        _look(arguments[1], event, True)


def _look(path: str | bytes | os.PathLike, what: str, writing: bool) -> None:
    """Notes a path that may not be read, or be changed."""
    if not _allowed:
        return
    path = os.path.realpath(os.fsdecode(path))
    places = _allowed[:1] if writing else (*_allowed, *_TRUSTED)
    if not path.startswith(tuple(places)) and path not in ('/dev/null', '/dev/zero'):
        _seen.append(f'{what.split()[0]} {path!r} {what}')
