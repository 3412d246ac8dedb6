"""Runs a reader under watch: time, memory, and what it opens, starts and connects to."""

import gc
import os
import pathlib
import resource
import signal
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable

from vit_jax.errors import UserError

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

_allowed: tuple[str, ...] | None = None
_seen: list[str] = []
_hooked = False


class _TooLong(BaseException):
    pass


def watched(
    read: Callable[[], object],
    folders: tuple[pathlib.Path, ...],
    seconds: int,
    watch_files: bool,
    show: bool = False,
) -> tuple[str, str]:
    """Calls a reader.

    Args:
      read: what is called.
      folders: where it may open files; writing, only in the first.
      seconds: after which it is stopped.
      watch_files: whether to watch which files it opens (not where the name is the user's own).
      show: whether to print its traceback.

    Returns:
      (outcome, detail): 'ok', the name of a `UserError`, or 'FAULT ...' with the traceback.
    """
    _hook(folders if watch_files else ())
    outcome, detail = 'ok', ''
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            read()
    except UserError as error:
        outcome = type(error).__name__
        if not str(error) or len(str(error)) > 200_000:
            outcome, detail = 'FAULT a message of no use', str(error)[:500]
    except _TooLong:
        outcome, detail = 'FAULT no end', traceback.format_exc()[-1500:]
    except BaseException as error:  # whatever it is, it is a fault
        outcome, detail = f'FAULT {type(error).__name__}', traceback.format_exc()[-2500:]
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        signal.alarm(0)
        forbidden = _unhook()
        if show:
            traceback.print_exc()
    if forbidden:
        outcome, detail = f'FAULT {forbidden[0][:200]}', '\n'.join(forbidden[:10])
    return outcome, detail


def limit_memory(beyond: int) -> None:
    """Allows the process so many bytes of address space beyond what it has now."""
    gc.collect()
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
    elif event == 'open' and _allowed and isinstance(arguments[0], str | bytes):
        path, mode, flags = arguments
        path = os.path.realpath(os.fsdecode(path))
        writing = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        places = _allowed[:1] if writing else (*_allowed, *_TRUSTED)
        if not path.startswith(tuple(places)) and path not in ('/dev/null', '/dev/zero'):
            _seen.append(f'open {path!r} {mode}')
