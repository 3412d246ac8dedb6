"""Replaces a folder by another, so that a kill at any moment loses neither.

A folder cannot be renamed over one that is not empty, so there are two renames: the old one aside,
the new one into its place. Killed in between, nothing has the name; `recover`, which every reader
and the next writer call, then finishes the job.
"""

import os
import pathlib
import re
import shutil

from vit_jax.errors import UserError


def partial_name(folder: pathlib.Path) -> pathlib.Path:
    """Where this process writes what shall become `folder`: hidden, beside it."""
    return _aside(folder, os.getpid(), 'part')


def put(folder: pathlib.Path) -> None:
    """Gives `partial_name(folder)`, complete and on disk, the name `folder`.

    What was there is removed after that; if the new one cannot be put there, it is left as it was.

    Args:
        folder: the name.

    Raises:
        OSError: it cannot be done.
    """
    new, old = partial_name(folder), _aside(folder, os.getpid(), 'old')
    _flush(new)
    if not folder.exists():
        os.rename(new, folder)
    else:
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: pathlib.Path) -> None:
    """Finishes or undoes the replacement of a folder whose writer was killed.

    Args:
        folder: which may be there or not; if it is, nothing is done.

    Raises:
        UserError: there is something to do, and it cannot be done.
    """
    if os.path.lexists(folder):
        return
    for pid in _leftovers(folder, 'old'):
        if _is_running(pid):
            continue
        new, old = _aside(folder, pid, 'part'), _aside(folder, pid, 'old')
        # The old one is put aside only when the new one is complete.
        complete = new if new.is_dir() else old
        try:
            os.rename(complete, folder)
            _flush(folder.parent)
        except OSError as e:
            raise UserError(
                f'{folder} was being replaced when the process was killed, and cannot be put back '
                f'({e.strerror}): rename {complete} to {folder}'
            ) from e
        if complete is new:
            shutil.rmtree(old, ignore_errors=True)
        return


def sweep(folder: pathlib.Path) -> None:
    """Removes what killed writers of a folder left beside it, after `recover`.

    Args:
        folder: the folder they wrote.
    """
    recover(folder)
    for kind in ('part', 'old'):
        for pid in _leftovers(folder, kind):
            if pid == os.getpid() or not _is_running(pid):
                shutil.rmtree(_aside(folder, pid, kind), ignore_errors=True)


def _aside(folder: pathlib.Path, pid: int, kind: str) -> pathlib.Path:
    return folder.with_name(f'.{folder.name}.{pid}.{kind}')


def _leftovers(folder: pathlib.Path, kind: str) -> list[int]:
    """Process ids in the names of hidden folders of this kind beside `folder`."""
    pattern = re.compile(rf'\.{re.escape(folder.name)}\.([0-9]{{1,10}})\.{kind}')
    try:
        names = os.listdir(folder.parent)
    except (OSError, ValueError):  # No such folder, or none to look into: nothing to find.
        return []
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # A name of an earlier process with this id; ours is not made yet.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(folder: pathlib.Path) -> None:
    """Brings the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
