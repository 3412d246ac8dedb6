"""Files and folders that are whole or absent, JSON from elsewhere, paths that a user wrote.

The only place where something is written under another name and then renamed. That name is
`.<name>.<process id>.part`, hidden and in the same folder, so that the rename is atomic, a killed
process's leftovers can be told and removed, and permissions are those of any new file.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from typing import Any

from vit_jax.errors import UserError

MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 100

Path = str | os.PathLike[str]


def expand(path: Path) -> pathlib.Path:
    """The path that a user wrote, with ~ and ~name replaced by the home folder.

    Raises:
        UserError: there is no such user, or no file can have this path (too long, a null byte).
    """
    try:
        expanded = pathlib.Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            expanded.stat()  # fails where whatever is done with it would fail
    except (RuntimeError, ValueError, OSError) as error:
        shown = os.fspath(path)[:300]
        raise UserError(f'{shown} is not a path that can be used ({error})') from error
    return expanded


def read_text(
    path: Path, *, max_bytes: int = MAX_JSON_BYTES, pipes: bool = False, errors: str = 'strict'
) -> str:
    """Reads a file of UTF-8 text.

    Args:
        path: of the file.
        max_bytes: largest size.
        pipes: whether a pipe will do as well, `<(sort names)`, for what a person named. One
            without a writer would never end.
        errors: what becomes of what is not UTF-8, as of `open`.

    Raises:
        UserError: it is not a regular file, larger than `max_bytes`, not UTF-8, or cannot be read.
    """
    path = pathlib.Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not (pipes and stat.S_ISFIFO(mode)):
            raise ValueError('it is not a regular file')
        with open(path, 'rb') as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f'it has more than {max_bytes:,} bytes')
        return content.decode('utf-8', errors)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror or error}') from error
    except ValueError as error:
        raise UserError(f'cannot read {path}: {error}') from error


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        UserError: see `read_text`; also if it holds something else, or is nested too deeply.
    """
    text = read_text(path, max_bytes=max_bytes)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f'cannot read {path}: it is not JSON ({error})') from error
    if not isinstance(content, dict):
        raise UserError(f'{path} should hold a JSON object, and holds a {type(content).__name__}')
    return content


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text holds; the only place that reads JSON from elsewhere.

    Raises:
        ValueError: it is not JSON, nested more than `MAX_JSON_DEPTH` deep, or has a number of so
            many digits that no float holds it.
    """
    try:
        content = json.loads(text, parse_int=_parse_int)
    except RecursionError as error:
        raise ValueError('nested too deeply') from error
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return content
    raise ValueError('nested too deeply')


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes JSON, whole or not at all; an older file is replaced.

    Raises:
        UserError: see `atomic_file`.
        TypeError: `value` is not what JSON can hold.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + '\n')


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all; an older file is replaced.

    What is not text (bytes of a file's name that are not UTF-8) is written as an escape.

    Raises:
        UserError: see `atomic_file`.
    """
    with atomic_file(path) as part:
        part.write_text(text, encoding='utf-8', errors='backslashreplace', newline='')


def check_output(path: Path, *, overwrite: bool, flag: str) -> None:
    """Checks, before any work, that a file can be written.

    Args:
        path: of the file, or a stream such as /dev/stdout.
        overwrite: whether one that is there may be replaced.
        flag: that named it, for messages.

    Raises:
        UserError: it exists, or its folder does not.
    """
    refuse_address(path, flag)
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f'{flag} {path} is a folder; name a file in it')
    if _is_stream(path):
        return
    if path.exists() and not overwrite:
        raise UserError(f'{flag} {path} exists; name another file, or add --overwrite')
    if not path.parent.is_dir():
        raise UserError(f'{flag} {path}: there is no folder {path.parent}; make it first')


def refuse_address(path: Path, what: str) -> None:
    """Raises `UserError` for gs://bucket/x and the like, which would be a folder `gs:` here.

    Args:
        path: to be written.
        what: it is, for the message.
    """
    first = pathlib.PurePath(path).parts[:1]  # '//' is '/' to pathlib
    if (
        first
        and re.fullmatch(r'[A-Za-z][A-Za-z0-9+.-]+:', first[0])
        and not os.path.exists(first[0])
    ):
        raise UserError(
            f'{what} {os.fspath(path)} is an address, and this is written on this machine only: '
            'name a path, and copy it there'
        )


@contextlib.contextmanager
def atomic_file(
    path: Path, *, overwrite: bool = True, sweep: bool = True
) -> Iterator[pathlib.Path]:
    """A file that appears under its name, complete and on disk, when the block ends.

    After an error or Ctrl-C nothing of it is left, and an older file is as it was.

    Args:
        path: of the file; its folder must exist. A stream (/dev/stdout, a pipe, a device) is given
            to the block as it is.
        overwrite: whether a file that is there in the end may be replaced.
        sweep: whether to look for what killed writers left of it, which lists its folder.

    Yields:
        Where to write it.

    Raises:
        UserError: it cannot be written (no folder, no permission, full disk), or it exists. An
            OSError of the block that is about another file is let through.
    """
    path = pathlib.Path(path)
    if _is_stream(path):
        with _in_words(path, path):
            yield path
        return
    with _part_of(path, sweep=sweep) as part:
        yield part
        _flush(part)
        if not overwrite and os.path.lexists(path):
            raise UserError(f'{path} exists; remove it, or name another file')
        os.replace(part, path)
        _flush(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, exists: str = 'refuse') -> Iterator[pathlib.Path]:
    """A folder that appears under its name, complete and on disk, when the block ends.

    After an error or Ctrl-C nothing of it is left. If the block leaves it empty, nothing appears.
    A folder that is not empty cannot be replaced by one rename: the old one is renamed first.
    Killed between the two, nothing has the name; `recover`, which every reader and the next writer
    call, then finishes the job.

    Args:
        folder: the folder; missing parents are made.
        exists: what happens if there is, in the end, a folder that is not empty: 'refuse' is an
            error, 'replace' removes it, 'keep' keeps it and drops the new one.

    Yields:
        Where to write what it holds.

    Raises:
        UserError: it cannot be written, or is refused. An OSError of the block that is about
            another file is let through.
    """
    refuse_address(folder, 'the output')
    folder = pathlib.Path(folder).absolute()
    recover(folder)
    with _part_of(folder) as part:
        part.mkdir(parents=True)
        yield part
        written = list(part.rglob('*'))
        if not written:
            return
        for path in (*written, part):
            _flush(path)
        _put(part, folder, exists)


@contextlib.contextmanager
def atomic_group(path: Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A file or folder and what belongs beside it: all of them appear when the block ends.

    They are moved one after the other, the main one last, so whoever finds it finds the others.
    After an error or Ctrl-C, also while they are moved, none of them is left.

    Args:
        path: the main file or folder; missing parents are made.
        overwrite: whether what is there in the end may be replaced.

    Yields:
        A folder; whatever the block puts there goes beside `path`, and `<it>/<path.name>` to it.

    Raises:
        UserError: they cannot be written, or exist. An OSError of the block that is about another
            file is let through.
    """
    path = pathlib.Path(path)
    with _part_of(path) as part:
        part.mkdir(parents=True)
        yield part
        for written in part.rglob('*'):
            _flush(written)
        _move(part, path, overwrite)


def recover(folder: Path) -> None:
    """Finishes or undoes the replacement of a folder whose writer was killed.

    Args:
        folder: which may be there or not; if it is, nothing is done.

    Raises:
        UserError: there is something to do, and it cannot be done.
    """
    folder = pathlib.Path(folder).absolute()
    if os.path.lexists(folder):
        return
    for pid in _leftovers(folder, 'old'):
        if is_running(pid):
            continue
        new, old = _beside(folder, pid, 'part'), _beside(folder, pid, 'old')
        # The old one is put aside only when the new one is complete.
        complete = new if new.is_dir() else old
        try:
            os.rename(complete, folder)
            _flush(folder.parent)
        except OSError as error:
            raise UserError(
                f'{folder} was being replaced when the process was killed, and cannot be put back '
                f'({error.strerror}): rename {complete} to {folder}'
            ) from error
        if complete is new:
            _remove(old)
        return


def _parse_int(digits: str) -> int:
    if len(digits) > sys.float_info.max_10_exp:
        raise ValueError(f'a number of {len(digits):,} digits')
    return int(digits)


def _children(node: Any) -> list[Any]:
    """The objects and lists in an object or list."""
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [value for value in values if isinstance(value, dict | list)]


@contextlib.contextmanager
def _part_of(path: pathlib.Path, *, sweep: bool = True) -> Iterator[pathlib.Path]:
    """The hidden name under which `path` is written; what has it in the end is removed."""
    refuse_address(path, 'the output')
    part = _beside(path, os.getpid(), 'part')
    if sweep:
        _remove_leftovers(path)
    with _in_words(path, part):
        try:
            yield part
        finally:
            _remove(part)


def _put(part: pathlib.Path, folder: pathlib.Path, exists: str) -> None:
    """Gives `part` the name `folder`; if that fails, what was there stays."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f'{folder} is a file; remove it, or name another folder')
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(part, folder)
    elif exists == 'keep':
        return
    elif exists == 'refuse':
        raise UserError(f'{folder} exists and is not empty; remove it, or name another folder')
    else:
        old = _beside(folder, os.getpid(), 'old')
        os.rename(folder, old)
        try:
            os.rename(part, folder)
        except OSError:
            os.rename(old, folder)
            raise
        _flush(folder.parent)
        _remove(old)
    _flush(folder.parent)


def _move(part: pathlib.Path, main: pathlib.Path, overwrite: bool) -> None:
    """Moves everything in `part` beside `main`, and that last."""
    made = sorted(part.iterdir(), key=lambda path: path.name == main.name)
    places = {path: main.with_name(path.name) for path in made}
    for place in places.values():
        if not overwrite and os.path.lexists(place):
            raise UserError(f'{place} exists; remove it, or name another place')
    if len(places) > 1:
        _remove(main)  # else it would stand, for a moment, beside what belongs to the new one
    try:
        for path, place in places.items():
            os.replace(path, place)
        _flush(main.parent)
    except BaseException:  # an interruption, too
        for path, place in places.items():
            if not path.exists():
                _remove(place)
        raise


def _is_stream(path: pathlib.Path) -> bool:
    """Whether something is written as it comes: it has no name that a file could be given."""
    if str(path).startswith(('/dev/std', '/dev/fd/', '/proc/')):
        return True  # where these point to a file, it is another process that opened it
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextlib.contextmanager
def _in_words(path: pathlib.Path, part: pathlib.Path) -> Iterator[None]:
    """Turns an OSError about what is being written into a UserError."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str | bytes):
            named = pathlib.Path(os.fsdecode(error.filename))
            if not {named, *named.parents} & {part, path} and named not in path.parents:
                raise
        raise UserError(f'cannot write {path}: {error.strerror or error}') from error


def _beside(path: pathlib.Path, pid: int, kind: str) -> pathlib.Path:
    return path.with_name(f'.{path.name}.{pid}.{kind}')


def _leftovers(path: pathlib.Path, kind: str) -> list[int]:
    """Process ids in the hidden names of this kind beside `path`."""
    pattern = re.compile(rf'\.{re.escape(path.name)}\.([0-9]{{1,10}})\.{kind}')
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):  # No such folder, or none to look into: nothing to find.
        return []
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def _remove_leftovers(path: pathlib.Path) -> None:
    """Removes what killed writers of a file or folder left beside it."""
    for kind in ('part', 'old'):
        for pid in _leftovers(path, kind):
            if not is_running(pid):
                with contextlib.suppress(OSError):  # perhaps another user's
                    _remove(_beside(path, pid, kind))


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is another process of this id on this machine."""
    if pid == os.getpid():
        return False  # A name of an earlier process with this id; ours is not made yet.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(path: pathlib.Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
