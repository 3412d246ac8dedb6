"""What image files there are below a folder, and an index that tells it again without a look.

Reading 1.3 million names takes seconds from a disk's cache and minutes over a network. So of a
large set an index is kept (in `remote.cache_folder()`), with the names in each folder and the times
of its last change. A folder whose times are others is read again, the rest are not. Names are all
that a set consists of here: what is in a file does not matter. The index is used where it cannot
be wrong: on file systems that change a folder's times with its names, for folders without links
(which lead elsewhere), and which had not changed for `_SETTLED` seconds when they were read, since
a second change in the same tick would not show.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable

from vit_jax import files
from vit_jax.data import image_files, remote
from vit_jax.errors import UserError

MIN_INDEXED = 10_000  # images: fewer are listed in no time
_SETTLED = 5.0
_FILE_SYSTEMS = frozenset(
    ('ext2', 'ext3', 'ext4', 'xfs', 'zfs', 'f2fs', 'jfs', 'tmpfs', 'nfs', 'nfs4', 'lustre', 'gpfs')
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Names:
    """What is in one folder: sorted names, without hidden ones.

    `times` tell whether it changed; none if the folder is not for the index.
    """

    images: list[str]
    folders: list[str]
    ignored: dict[str, int]  # other files, by suffix
    times: list[int] = dataclasses.field(default_factory=list)
    links: bool = True  # whether there may be some


class Index:
    """Remembers what was in folders; without a place to keep it, it looks each time.

    Args:
      root: of the set; the index is for it and what is below.
      arrays: whether .npy files are images.
    """

    def __init__(self, root: str | os.PathLike[str], *, arrays: bool = False):
        self.arrays = arrays
        self._root = os.path.realpath(root)
        self._kind = [1, *sorted(image_files.suffixes(arrays))]
        self._kept: dict[str, _Names] = {}
        self._seen: dict[str, _Names] = {}
        self._changed = False
        self._place: pathlib.Path | None = None
        if _keeps_times(self._root):
            name = remote.name_of(f'{self._root}{".npy" * arrays}')
            self._place = remote.cache_folder() / 'listings' / f'{name}.jsonl'
            self._kept = self._read(self._place)

    def names(self, path: str) -> _Names:
        """What is in a folder, from the index where that is as new."""
        kept = self._kept.get(path)
        if kept is not None and kept.times == _times(path):
            self._seen[path] = kept
            return kept
        self._changed = True
        found = self._seen[path] = _look(path, self.arrays)
        return found

    def save(self) -> None:
        """Keeps what was found, if that is many images; a cache that cannot be written is none."""
        images = sum(len(names.images) for names in self._seen.values())
        gone = len(self._seen) < len(self._kept)
        if self._place is None or images < MIN_INDEXED or not (self._changed or gone):
            return
        with contextlib.suppress(OSError, UserError):
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_file(self._place) as part, open(part, 'w', encoding='ascii') as file:
                file.write(json.dumps(self._kind) + '\n')
                for path, names in self._seen.items():
                    if names.times:
                        file.write(json.dumps([path, *dataclasses.astuple(names)]) + '\n')

    def _read(self, place: pathlib.Path) -> dict[str, _Names]:
        kept: dict[str, _Names] = {}
        try:
            with open(place, encoding='ascii') as file:
                if files.parse_json(file.readline()) != self._kind:
                    return {}
                for line in file:
                    path, *names = files.parse_json(line)
                    kept[path] = _Names(*names)
        except (OSError, ValueError, TypeError):  # not there, or damaged
            return {}
        return kept


def list_images(
    folder: str | os.PathLike[str],
    is_foreign: Callable[[str], bool] = lambda real: False,
    *,
    arrays: bool = False,
    index: Index | None = None,
) -> tuple[list[str], collections.Counter[str]]:
    """The images below a folder.

    Args:
      folder: searched with everything below it, links followed, hidden files and folders left out.
      is_foreign: of the real path of a folder below it: whether to leave that out, and say so.
      arrays: whether .npy files are images; with an index, that says so.
      index: of the folder, or of one above it.

    Returns:
      Paths of the images (`image_files.suffixes`), in the order of their parts, and how many other
      files of each suffix there were.
    """
    index = index or Index(folder, arrays=arrays)
    found: list[str] = []
    ignored, seen = collections.Counter[str](), set[str]()
    # Path, and of a folder its real one ('' of a file), the next one last.
    ahead = [(os.fspath(folder), os.path.realpath(folder))]
    while ahead:
        path, real = ahead.pop()
        if not real:
            found.append(path)
            continue
        if real in seen:  # a link to a folder above it
            continue
        if seen and is_foreign(real):
            _log.warning(
                '%s is left out: it leads to %s, which is above the class or of another', path, real
            )
            continue
        seen.add(real)
        names = index.names(path)
        ignored.update(names.ignored)
        begin = os.path.join(path, '')
        if names.folders:
            below = [(begin + name, '') for name in names.images]
            for name in names.folders:
                inside = os.path.join(real, name)
                below.append((begin + name, os.path.realpath(inside) if names.links else inside))
            ahead += sorted(below, reverse=True)
        else:
            found += [begin + name for name in names.images]
    return found, ignored


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look(path: str, arrays: bool) -> _Names:
    """Reads the names in a folder; one that cannot be read has none, which is said."""
    images: list[str] = []
    folders: list[str] = []
    ignored = collections.Counter[str]()
    suffixes, links, before = image_files.suffixes(arrays), False, time.time()
    times = _times(path)
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                links = links or entry.is_symlink()
                if is_folder(entry):
                    if name[0] != '.':
                        folders.append(name)
                    continue
                suffix = image_files.suffix_of(name)
                if suffix in suffixes and name[0] != '.':
                    images.append(name)
                else:
                    ignored[suffix] += 1
    except OSError as error:
        _log.warning('%s cannot be read, and is left out (%s)', path, error.strerror)
        return _Names([], [], {})
    images.sort()
    folders.sort()
    settled = bool(times) and max(times[:2]) / 1e9 < before - _SETTLED
    kept = times if settled and not links else []
    return _Names(images, folders, dict(ignored), kept, links)


def _times(path: str) -> list[int]:
    """Of the last change of names in a folder, and which folder it is; [] if it is gone.

    The second one cannot be set, as tools that copy folders do with the first.
    """
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _keeps_times(path: str) -> bool:
    """Whether a folder is on a file system that is known to change its times with its names."""
    try:
        device = os.stat(path).st_dev
        with open('/proc/self/mountinfo', encoding='utf-8', errors='replace') as mounts:
            for mount in mounts:  # proc(5): ID PARENT MAJOR:MINOR ... - TYPE SOURCE OPTIONS
                fields, _, kind = mount.partition(' - ')
                if fields.split()[2] == f'{os.major(device)}:{os.minor(device)}':
                    return kind.split()[0] in _FILE_SYSTEMS
    except (OSError, IndexError):
        pass
    return False
