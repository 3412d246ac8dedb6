"""A workdir in cloud storage: the run works in a folder of this machine, which is copied there.

So Orbax, locks and appended logs stay what they are. A thread looks every few seconds: a finished
checkpoint is copied at once, the logs before it, other files once a minute and at the end. Objects
have no renames, so `checkpoints/<step>/` counts when it has its last object, `_MARKER`, with the
sizes of the others. A run that starts removes checkpoints without it, and reads what is there.

There are no locks either. `_LEASE_FILE` names the run at work and is written again with every copy;
one that was not for `_LEASE_SECONDS`, or whose process on this machine has ended, is taken over. A
run that finds another's name there copies no more, and ends.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax

from vit_jax import files
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data import remote
from vit_jax.errors import UserError
from vit_jax.run import preemption

_LEASE_FILE = 'lease.json'
_LEASE_SECONDS = 300
_MARKER = 'complete.json'  # in the folder of a checkpoint
_LOOK_SECONDS = 2
_COPY_SECONDS = 60
_LINES = ('.jsonl', '.log')  # files that grow line by line

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def mirrored(workdir: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """The folder of this machine that a run works in.

    Args:
      workdir: a path, which is that folder, or an address (`remote.SCHEMES`).

    Yields:
      The folder. What is at the address is in it; what it has in the end is at the address.

    Raises:
      UserError: another scheme, several processes, another run at work, or the storage refuses.
    """
    if not remote.is_remote(workdir, '--workdir'):
        yield pathlib.Path(workdir)
        return
    address = os.fspath(workdir).rstrip('/')
    if jax.process_count() > 1:
        raise UserError(
            f'--workdir {address}: several processes need a workdir on a disk that all of them '
            'see; one process may use cloud storage'
        )
    mirror = _Mirror(address)
    with mirror.leased():
        mirror.read()
        thread = threading.Thread(target=mirror.watch, name='workdir', daemon=True)
        thread.start()
        try:
            yield mirror.folder
        except BaseException as error:
            if isinstance(error, UserError | preemption.PreemptedError):
                error.args = tuple(_named(arg, mirror.folder, address) for arg in error.args)
            try:
                mirror.finish(thread)
            except UserError as second:  # the first one says what is wrong
                _log.warning('%s', second)
            raise
        mirror.finish(thread)


def _named(text: object, folder: pathlib.Path, address: str) -> object:
    """A text in the words of the user, who gave the address."""
    return text.replace(str(folder), address) if isinstance(text, str) else text


class _Mirror:
    """The folder of a run here, and its copy at an address.

    Attributes:
      folder: that the run works in.
    """

    def __init__(self, address: str):
        self._stop = threading.Event()
        self._there = remote.Folder(address)
        self._base = remote.cache_folder() / 'workdirs' / remote.name_of(address)
        self.folder = self._base / 'run'
        self._mine = {'id': uuid.uuid4().hex, 'host': socket.gethostname(), 'process': os.getpid()}
        self._goes_on = False  # what is in the folder was left by the last run that was at work
        self._copied: dict[str, tuple[int, int] | None] = {}  # size and time of files, by name
        self._steps: set[int] = set()  # whose checkpoints are complete there
        self._lost = False  # another run is at work

    @contextlib.contextmanager
    def leased(self) -> Iterator[None]:
        """Says at the address that this run is at work."""
        address, own = self._there.address, self._base / _LEASE_FILE
        if not self._there.write(_LEASE_FILE, self._lease(), new=True):
            other = self._holder()
            if _is_at_work(other):
                raise UserError(
                    f'another run is at work in {address} (process {other.get("process")} on '
                    f'{other.get("host")}, {max(0, time.time() - other["seen"]):.0f} s ago): wait, '
                    f'or use another --workdir. One that died is forgotten after {_LEASE_SECONDS} s'
                )
            before = files.read_json(own) if own.is_file() else {}
            self._goes_on = before.get('id', '') == other.get('id') and self.folder.is_dir()
            self._there.write(_LEASE_FILE, self._lease())
            self._check_lease()
        try:
            self._base.mkdir(parents=True, exist_ok=True)
            if not self._goes_on:
                shutil.rmtree(self.folder, ignore_errors=True)
            files.write_json(own, self._mine)
            yield
        finally:
            if not self._copied and not self.folder.exists() and not self._lost:
                self._give_up()  # nothing came of it

    def read(self) -> None:
        """Brings what is at the address here, but for checkpoints that were never finished."""
        entries = self._there.entries()
        sizes: dict[int, dict[str, int]] = {}
        for name, entry in entries.items():
            if match := re.fullmatch(r'checkpoints/(\d+)/(.+)', name):
                sizes.setdefault(int(match[1]), {})[match[2]] = entry.size
        for step, found in sizes.items():
            marker = self._there.read(f'checkpoints/{step}/{_MARKER}') or b''
            expected = _parsed(marker).get('sizes')
            if expected == {name: size for name, size in found.items() if name != _MARKER}:
                self._steps.add(step)
            else:
                place = f'{self._there.address}/checkpoints/{step}'
                _log.warning('Removing %s, a checkpoint that was never finished', place)
                self._remove(step, found)
        if self._goes_on:
            _log.warning('%s: going on with what this machine has of it', self._there.address)
            return
        wanted = [
            name
            for name in entries
            if name != _LEASE_FILE and not name.endswith(f'/{_MARKER}') and self._counts(name)
        ]
        if not wanted:
            return
        remote.check_room(
            self._base, sum(entries[name].size for name in wanted), self._there.address
        )
        with files.atomic_folder(self.folder) as part:
            self._there.download(wanted, part)
        self._copied = {name: _stamp(self.folder / name) for name in wanted}

    def watch(self) -> None:
        """Copies what is new until `finish`; what fails is tried again."""
        last = time.monotonic()
        while not self._stop.wait(_LOOK_SECONDS):
            saved = set(workdir_lib.saved_steps(self.folder))
            if saved == self._steps and time.monotonic() - last < _COPY_SECONDS:
                continue
            last = time.monotonic()
            try:
                self._copy()
            except (UserError, OSError) as error:
                if self._lost:
                    return
                _log.warning('Not copied yet, tried again in a minute: %s', error)
                self._stop.wait(_COPY_SECONDS)

    def finish(self, watching: threading.Thread) -> None:
        """Ends `watch`, copies the rest, and removes the folder of this machine."""
        self._stop.set()
        watching.join()
        if not self.folder.exists():
            return
        try:
            self._copy()
        except UserError as error:
            left = '' if self._lost else (
                f'. All of it is in {self.folder}: the same command on this machine goes on there'
            )  # fmt: skip
            raise UserError(f'{error}{left}') from error
        self._give_up()

    def _give_up(self) -> None:
        """Gives the address back to others."""
        self._there.remove([_LEASE_FILE])
        shutil.rmtree(self._base, ignore_errors=True)

    def _copy(self) -> None:
        self._check_lease()
        self._there.write(_LEASE_FILE, self._lease())
        saved = set(workdir_lib.saved_steps(self.folder))
        # The newest first, from links: the run may remove it before all of it is copied.
        for step in sorted(saved - self._steps, reverse=True):
            links = self._base / 'upload' / str(step)
            shutil.rmtree(links, ignore_errors=True)
            try:
                shutil.copytree(
                    self.folder / 'checkpoints' / str(step), links, copy_function=os.link
                )
            except (FileNotFoundError, shutil.Error):
                continue  # it is gone
            self._copy_others()  # the metrics of a step are there before its checkpoint
            self._copy_checkpoint(step, links)
            shutil.rmtree(links)
        self._copy_others()
        for step in self._steps - set(workdir_lib.saved_steps(self.folder)):
            names = self._there.entries()
            begin = f'checkpoints/{step}/'
            self._remove(step, [n.removeprefix(begin) for n in names if n.startswith(begin)])

    def _copy_checkpoint(self, step: int, links: pathlib.Path) -> None:
        paths = {path.relative_to(links).as_posix(): path for path in _files_below(links)}
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        begin = f'checkpoints/{step}/'
        self._there.upload({f'{begin}{name}': path for name, path in paths.items()})
        self._there.write(f'{begin}{_MARKER}', json.dumps({'sizes': sizes}).encode())
        self._steps.add(step)

    def _copy_others(self) -> None:
        """Copies what has changed beside the checkpoints; a model's description last."""
        found = {path.relative_to(self.folder).as_posix(): path for path in self._others()}
        later: dict[str, pathlib.Path] = {}
        first: dict[str, pathlib.Path] = {}
        for name, path in found.items():
            stamp = _stamp(path)
            if stamp is None or self._copied.get(name) == stamp:
                continue
            if name.endswith(_LINES):
                content = path.read_bytes()  # whole lines of it
                self._there.write(name, content[: content.rfind(b'\n') + 1])
                self._copied[name] = stamp
            else:
                (later if path.name == 'model.json' else first)[name] = path
        for part in (first, later):
            stamps = {name: _stamp(path) for name, path in part.items()}
            self._copied |= {name: stamps[name] for name in self._there.upload(part)}

    def _others(self) -> Iterator[pathlib.Path]:
        for path in _files_below(self.folder):
            parts = path.relative_to(self.folder).parts
            if parts[0] != 'checkpoints' and not any(part.startswith('.') for part in parts):
                yield path

    def _counts(self, name: str) -> bool:
        """Whether an object is no part of a checkpoint that was never finished."""
        parts = name.split('/')
        return parts[0] != 'checkpoints' or (parts[1].isdigit() and int(parts[1]) in self._steps)

    def _remove(self, step: int, names: Any) -> None:
        """Removes a checkpoint; what it counts by goes first."""
        self._steps.discard(step)
        ordered = sorted(names, key=lambda name: name != _MARKER)
        self._there.remove(f'checkpoints/{step}/{name}' for name in ordered)

    def _lease(self) -> bytes:
        return json.dumps(self._mine | {'seen': time.time()}).encode()

    def _holder(self) -> dict[str, Any]:
        return _parsed(self._there.read(_LEASE_FILE) or b'')

    def _check_lease(self) -> None:
        if self._holder().get('id') != self._mine['id']:
            self._lost = True
            raise UserError(
                f'another run is at work in {self._there.address}: this one copies nothing more '
                'to it. Use another --workdir'
            )


def _is_at_work(lease: dict[str, Any]) -> bool:
    """Whether the run that a lease names may still be at work."""
    seen, process = lease.get('seen'), lease.get('process')
    # Clocks differ: that of the other machine may be ahead.
    if not isinstance(seen, int | float) or not abs(time.time() - seen) < _LEASE_SECONDS:
        return False
    if lease.get('host') != socket.gethostname() or not isinstance(process, int):
        return True
    return files.is_running(process)


def _parsed(content: bytes) -> dict[str, Any]:
    """The object in a small JSON file; {} if there is none."""
    try:
        value = files.parse_json(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _stamp(path: pathlib.Path) -> tuple[int, int] | None:
    """What of a file changes with its content; None if it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(pathlib.Path(path, name) for path, _, names in os.walk(folder) for name in names)
