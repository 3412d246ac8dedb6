"""Folders of images: one per class, with or without folders for the splits around them.

    photos/train/daisy/a.jpg   photos/test/daisy/b.jpg    two splits, kept apart
    photos/daisy/a.jpg         photos/roses/c.png         one split, `train`, to be sliced

The first form is meant if there is a folder `train` that itself holds folders. The other folders of
splits are `validation` (also spelled `val` or `valid`) and `test`.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vit_jax.data.dataset import Dataset, Example, check_class_names, stratified_order
from vit_jax.data.decode import BadImageError, read_file
from vit_jax.errors import UserError

SUFFIXES = frozenset(('.jpg', '.jpeg', '.png', '.webp', '.bmp'))

_SPLIT_NAMES = {
    'train': 'train',
    'validation': 'validation',
    'val': 'validation',
    'valid': 'validation',
    'test': 'test',
}

_logger = logging.getLogger(__name__)


def open_folder(root: pathlib.Path, name: str) -> Dataset:
    """Lists the images of a folder.

    Classes are the first-level folders, in the order of their names; images may lie deeper. Hidden
    files and folders are left out, and so is every file that is not jpg, jpeg, png, webp or bmp
    (any case); the log says how many. The order of the examples in a split is `stratified_order`:
    fixed as long as the files keep their names, and any slice has each class in proportion.

    Args:
      root: the folder.
      name: how the user spelled it.

    Returns:
      A dataset whose examples are read from disk on access, EXIF orientation honoured.

    Raises:
      UserError: no images, fewer than two classes, an empty class folder, splits with different
        classes.
    """
    names = _subfolders(root)
    if 'train' in names and _subfolders(root / 'train'):
        folders = _split_folders(root, names)
    else:
        folders = {'train': root}
    classes = _subfolders(folders['train'])
    if not classes:
        raise UserError(
            f'{name} holds no folders of images; expected one per class, {name}/CLASS/*.jpg, or '
            f'{name}/train/CLASS/*.jpg and {name}/test/CLASS/*.jpg'
        )
    check_class_names(classes, name)
    if len(classes) < 2:
        raise UserError(
            f'{folders["train"]} has one class only ({classes[0]}); at least two are needed'
        )
    for split, folder in folders.items():
        others = _subfolders(folder)
        if others != classes:
            missing, extra = sorted(set(classes) - set(others)), sorted(set(others) - set(classes))
            raise UserError(
                f'the classes of {folders["train"]} and {folder} must be the same, but in {split}, '
                f'missing: {", ".join(missing) or "none"}; new: {", ".join(extra) or "none"}'
            )
    places = _Places(folder / name for folder in folders.values() for name in classes)
    splits = {split: _list_split(folder, classes, places) for split, folder in folders.items()}
    return Dataset(name, tuple(classes), True, splits)


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """A split on disk: its folder, and paths and labels (int [examples]) of its images."""

    folder: str
    paths: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Example:
        path, label = self.paths[index], int(self.labels[index])
        try:
            return Example(read_file(path), label, path)
        except BadImageError as error:
            error.label = label
            raise

    def identity(self) -> Iterator[str]:
        return (os.path.relpath(path, self.folder) for path in self.paths)


def _split_folders(root: pathlib.Path, names: list[str]) -> dict[str, pathlib.Path]:
    folders: dict[str, pathlib.Path] = {}
    for name in names:
        split = _SPLIT_NAMES.get(name)
        if split is None:
            _logger.warning(
                '%s is left out: beside train/, only test/ and validation/ are used', root / name
            )
        elif split in folders:
            raise UserError(
                f'{folders[split]} and {root / name} both mean the {split} split; keep one'
            )
        else:
            folders[split] = root / name
    return dict(sorted(folders.items(), key=lambda item: list(_SPLIT_NAMES).index(item[0])))


class _Places:
    """Where the folders of the classes really are, so that no link brings images to another class.

    Args:
      folders: of all classes, of all splits.
    """

    def __init__(self, folders: Iterable[pathlib.Path]):
        self._folders = {os.path.realpath(folder) for folder in folders}
        self._above = {parent for real in self._folders for parent in _parents(real)}

    def is_foreign(self, folder: str, real: str) -> bool:
        """Whether a link from below one class leads above it, or to another class.

        Args:
          folder: real path of the folder of the class.
          real: real path of the folder that the link leads to.
        """
        around = (real, *_parents(real))
        if folder not in around and real in self._above:
            return True
        return next((path for path in around if path in self._folders), folder) != folder


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in pathlib.PurePath(path).parents]


def _list_split(folder: pathlib.Path, classes: list[str], places: _Places) -> _Files:
    paths: list[str] = []
    labels: list[int] = []
    ignored = sum(1 for entry in os.scandir(folder) if entry.is_file())
    known: dict[str, str] = {}
    for label, name in enumerate(classes):
        real = os.path.realpath(folder / name)
        if real in known:
            raise UserError(
                f'{folder / known[real]} and {folder / name} are one folder, {real}, and cannot be '
                'two classes; remove one of the links'
            )
        known[real] = name
        found, others = list_images(folder / name, functools.partial(places.is_foreign, real))
        ignored += others
        if not found:
            raise UserError(
                f'class folder {folder / name} has no images ({", ".join(sorted(SUFFIXES))}); '
                'put some there or remove the folder'
            )
        paths += found
        labels += [label] * len(found)
    if ignored:
        _logger.warning(
            '%s: %d files that are hidden or not images, or not in a class folder, are ignored',
            folder,
            ignored,
        )
    order = stratified_order(np.array(labels))
    return _Files(str(folder), tuple(paths[i] for i in order), np.array(labels)[order])


def list_images(
    folder: str | os.PathLike[str], is_foreign: Callable[[str], bool] = lambda real: False
) -> tuple[list[str], int]:
    """The images below a folder.

    Args:
      folder: searched with everything below it, links followed, hidden files and folders left out.
      is_foreign: of the real path of a folder below it: whether to leave that out, and say so.

    Returns:
      Sorted paths of the images (see `SUFFIXES`), and how many other files there were.
    """
    found, ignored, seen = [], 0, set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # A link to a folder above it.
            folders.clear()
            continue
        if seen and is_foreign(real):
            _logger.warning(
                '%s is left out: it leads to %s, which is above the class or of another', path, real
            )
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith('.')]
        for file in files:
            if not file.startswith('.') and os.path.splitext(file)[1].lower() in SUFFIXES:
                found.append(os.path.join(path, file))
            else:
                ignored += 1
    return sorted(found, key=lambda path: pathlib.Path(path).parts), ignored


def _subfolders(folder: pathlib.Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones and macOS's leftovers."""
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith('.') and entry.name != '__MACOSX'
        )
    except OSError as error:
        raise UserError(f'folder {folder} cannot be read ({error.strerror})') from error
