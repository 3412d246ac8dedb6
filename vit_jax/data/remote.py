"""Folders of cloud storage: `gs://bucket/path` and `s3://bucket/path`.

By the packages `gcsfs` and `s3fs` (the extra `cloud`), which find the credentials of the machine.
`etils.epath`, which Orbax and TensorFlow Datasets use, would import TensorFlow for `gs://`; so
nothing but this module sees such an address: others work on a copy on this machine. An object
appears whole or not at all; there are no locks, and nothing can be added to an object.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import filelock

from vit_jax import files
from vit_jax.errors import MissingPackageError, UserError

SCHEMES = ('gs', 's3')
_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}
_REQUESTS = 16  # at once
_SPARE = 1 << 28  # bytes of a disk that a copy leaves free
_AT_LEAST = 1000  # files between two records of what has been read
_RECORD = 'copied.json'


def scheme_of(path: str | os.PathLike[str]) -> str:
    """`gs` of `gs://bucket/path`, in lower case; '' of a path on this machine."""
    match = re.match(r'([A-Za-z][A-Za-z0-9+.-]*)://', os.fspath(path))
    return match[1].lower() if match else ''


def is_remote(path: str | os.PathLike[str], what: str) -> bool:
    """Whether this is an address of cloud storage.

    Args:
      path: that a user wrote.
      what: it is, for the message: `--workdir`.

    Raises:
      UserError: it has another scheme.
    """
    scheme = scheme_of(path)
    if scheme and scheme not in SCHEMES:
        raise UserError(
            f'{what} {os.fspath(path)[:300]}: {scheme}:// is not known here; expected a path on '
            'this machine, gs://bucket/path or s3://bucket/path'
        )
    return bool(scheme)


def is_there(scheme: str) -> bool:
    """Whether the package for addresses of this scheme is installed."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Entry:
    """An object: its size in bytes, and what changes when its content does."""

    size: int
    version: str


class Folder:
    """What is below an address; errors of the storage are `UserError`.

    Args:
      address: `gs://bucket/path` or `s3://bucket/path`.

    Attributes:
      address: the same, without / at the end.

    Raises:
      UserError: there is no bucket in it, or its package is not installed.
    """

    def __init__(self, address: str):
        scheme, _, path = address.partition('://')
        self.address = f'{scheme}://{path.rstrip("/")}'
        if not path.strip('/'):
            raise UserError(f'{address}: expected {scheme}://bucket/path')
        try:
            import fsspec

            # Without its cache of listings: other machines write, too.
            self._fs = fsspec.filesystem(scheme.lower(), use_listings_cache=False)
        except ImportError as error:
            package = _PACKAGES[scheme.lower()]
            raise MissingPackageError(
                f"{self.address} needs the package {package}: pip install 'vit_jax[cloud]' "
                "(in a checkout: pip install -e '.[cloud]')",
                name=package,
            ) from error
        self._root = self._fs._strip_protocol(self.address).rstrip('/')

    def entries(self) -> dict[str, Entry]:
        """All objects below, by their path from here; '' is the object at the address itself."""
        with self._in_words('list'):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        entries = {}
        for path, info in sorted(found.items()):
            if info.get('type') == 'directory' or path.endswith('/'):
                continue  # what a console makes for an empty folder
            if path != self._root and not path.startswith(f'{self._root}/'):
                continue
            name = path[len(self._root) + 1 :]
            if any(part in ('', '.', '..') for part in name.split('/')) and name:
                raise UserError(f'{self.address}: the name {ascii(name)} is not one of a file')
            versions = (
                info.get(key) for key in ('etag', 'ETag', 'LastModified', 'updated', 'mtime')
            )
            version = next((str(version) for version in versions if version), '')
            entries[name] = Entry(int(info['size']), version)
        return entries

    def read(self, name: str) -> bytes | None:
        """A small object; None if it is not there."""
        with self._in_words('read', name):
            try:
                return self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Writes a small object; with `new`, False if there is one already, which then stays."""
        with self._in_words('write', name):
            try:
                self._fs.pipe_file(self._path(name), content, mode='create' if new else 'overwrite')
            except FileExistsError:
                return False
            return True

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are gone already are none to speak of."""
        for name in names:
            with self._in_words('remove', name), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

    def upload(self, paths: Mapping[str, pathlib.Path]) -> list[str]:
        """Writes files of this machine, several at once.

        Args:
          paths: of the files, by the name of the object.

        Returns:
          The names of those that are there now; the other files are gone.
        """
        written: list[str] = []

        def put(item: tuple[str, pathlib.Path]) -> None:
            name, path = item
            with self._in_words('write', name):
                try:
                    self._fs.put_file(os.fspath(path), self._path(name))
                except FileNotFoundError:
                    if path.exists():  # then it is the bucket
                        raise
                else:
                    written.append(name)

        _at_once(put, paths.items())
        return written

    def download(self, names: Iterable[str], folder: pathlib.Path) -> None:
        """Reads objects into files below a folder, several at once; each appears when it is whole.

        Args:
          names: of the objects.
          folder: their paths below it are their names.
        """

        def get(name: str) -> None:
            target = folder / name if name else folder
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_file(target, sweep=False) as part, self._in_words('read', name):
                self._fs.get_file(self._path(name), os.fspath(part))

        _at_once(get, names)

    def _path(self, name: str) -> str:
        return f'{self._root}/{name}' if name else self._root

    @contextlib.contextmanager
    def _in_words(self, verb: str, name: str = '') -> Iterator[None]:
        """Their packages raise many types: of the system, of HTTP, of credentials."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:
            reason = ' '.join(str(error).split())[:300]
            place = f'{self.address}/{name}' if name else self.address
            raise UserError(f'cannot {verb} {place}: {type(error).__name__}: {reason}') from error


def cache_folder() -> pathlib.Path:
    """Where copies are: VIT_JAX_CACHE, or ~/.cache/vit_jax."""
    return files.expand(os.environ.get('VIT_JAX_CACHE') or '~/.cache/vit_jax')


def name_of(address: str) -> str:
    """A name of a file that tells addresses from each other."""
    digest = hashlib.sha256(address.encode(errors='surrogateescape')).hexdigest()[:12]
    last = re.sub(r'[^\w.-]', '_', address.rsplit('/', 1)[-1])[:60]
    return f'{last}-{digest}'


def local_copy(address: str, say: Callable[[str], None]) -> pathlib.Path:
    """A copy of all that is below an address; what has not changed since is not read again.

    Processes that want the same copy take turns. What is gone there goes here, too.

    Args:
      address: of a folder or a single object.
      say: is told what is about to be read.

    Returns:
      The folder in the cache that holds the copy, or of a single object the file.

    Raises:
      UserError: there is nothing, it cannot be read, or the disk has no room for it.
    """
    folder = Folder(address)
    entries = folder.entries()
    if not entries:
        raise UserError(f'there is nothing at {address}, or it cannot be seen with this account')
    copy = _place(folder.address)
    base = copy.parent
    base.mkdir(parents=True, exist_ok=True)
    record = base / _RECORD
    with filelock.FileLock(base / '.lock', fallback_to_soft=False):
        known: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # none yet, or damaged
            known = files.read_json(record, max_bytes=1 << 31)
        wanted = {name: [entry.size, entry.version] for name, entry in entries.items()}
        missing = [
            name
            for name, told in wanted.items()
            if known.get(name) != told or _size(copy / name if name else copy) != told[0]
        ]
        _remove_others(copy, wanted)
        size = sum(entries[name].size for name in missing)
        check_room(base, size, address)
        if missing:
            say(f'reading {len(missing):,} files, {size / 2**20:,.1f} MiB, of {address} to {copy}')
        done = {name: wanted[name] for name in wanted.keys() - set(missing)}
        if done != known:
            files.write_text(record, json.dumps(done))
        at_once = max(_AT_LEAST, len(missing) // 20)
        for first in range(0, len(missing), at_once):
            some = missing[first : first + at_once]
            folder.download(some, copy)
            done |= {name: wanted[name] for name in some}
            files.write_text(record, json.dumps(done))
    return copy


def existing_copy(address: str) -> pathlib.Path | None:
    """What `local_copy` gave another time, as it is; None if there is none. Nothing is read."""
    copy = _place(address.rstrip('/'))
    return copy if copy.exists() and (copy.parent / _RECORD).is_file() else None


def _place(address: str) -> pathlib.Path:
    """Where the copy of what is at an address goes."""
    last = re.sub(r'[^\w.-]', '_', address.rsplit('/', 1)[-1])[-60:]  # the suffix tells the kind
    return cache_folder() / 'copies' / name_of(address) / ('_' if last in ('', '.', '..') else last)


def check_room(folder: pathlib.Path, size: int, what: str) -> None:
    """Raises `UserError` if a disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if size and size + _SPARE > free:
        raise UserError(
            f'{what} has {size / 2**30:.1f} GiB, and {folder} has room for {free / 2**30:.1f} GiB; '
            'the environment variable VIT_JAX_CACHE names another folder'
        )


def _at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Does it for all items in several threads; the first error ends it."""
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as threads:
        under_way = [threads.submit(work, item) for item in items]
        try:
            for each in concurrent.futures.as_completed(under_way):
                each.result()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _remove_others(copy: pathlib.Path, wanted: Mapping[str, Any]) -> None:
    """Removes what is in the copy and no longer there, and what a killed reader left."""
    for path, _, names in os.walk(copy):
        below = os.path.relpath(path, copy)
        for name in names:
            if os.path.normpath(os.path.join(below, name)) not in wanted:
                os.unlink(os.path.join(path, name))
