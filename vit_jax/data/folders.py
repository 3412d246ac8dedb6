"""Folders of images: one per class, with or without folders for the splits around them.

    photos/train/daisy/a.jpg   photos/test/daisy/b.jpg    two splits, kept apart
    photos/daisy/a.jpg         photos/roses/c.png         one split, `train`, to be sliced

The first form is meant if there is a folder `train` (or `training`) that itself holds folders. The
other folders of splits are `validation` (also spelled `val` or `valid`) and `test` (or `testing`);
case does not count.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from vit_jax.data import image_files
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import BadImageError, read_file
from vit_jax.data.examples import Example, check_class_names
from vit_jax.data.holdout import stratified_order
from vit_jax.data.listing import Index, is_folder, list_images
from vit_jax.data.splits import SPLITS, split_called
from vit_jax.errors import UserError

_DEPTH = 3  # to which folders of classes are looked for, where there are none
_MAX_FOLDERS = 1000  # that are looked at

_logger = logging.getLogger(__name__)


def open_folder(root: pathlib.Path, name: str, *, channels: int = 3, group: str = '') -> Dataset:
    """Lists the images of a folder.

    Classes are the first-level folders, in the order of their names; images may lie deeper. Hidden
    files and folders are left out, and so is every file whose name does not end as an image's
    (`image_files.suffixes`, any case); the log says how many. The order of the examples in a split
    is `stratified_order`: fixed as long as the files keep their names, and any slice has each class
    in proportion.

    Args:
      root: the folder.
      name: how the user spelled it.
      channels: of the images; with another number than 3, .npy files are images, too.
      group: regular expression of what an image belongs to, searched for in its path from the
        folder of the split (`daisy/patient_07/3.jpg`); its first parentheses, or all of it.

    Returns:
      A dataset whose examples are read from disk on access, EXIF orientation honoured.

    Raises:
      UserError: no images, fewer than two classes, an empty class folder, a split with a class that
        `train` does not have. Where folders of classes are deeper, it names the folder to pass.
    """
    folders = _split_folders(root)
    classes = _subfolders(folders['train'])
    check_class_names(classes, name)
    _check_level(folders['train'], classes)
    for split, folder in folders.items():
        extra = sorted(set(_subfolders(folder)) - set(classes))
        if extra:
            raise UserError(
                f'{split} has classes that training does not know: {", ".join(extra[:5])}'
                f'{", ..." * (len(extra) > 5)} in {folder}, not in {folders["train"]}; add them '
                'there, or take them out here'
            )
    places = _Places(folder / name for folder in folders.values() for name in classes)
    index = Index(root, arrays=channels != 3)
    splits = {
        split: _list_split(folder, classes, places, index, complete=split == 'train')
        for split, folder in folders.items()
    }
    index.save()
    if group:
        splits = {
            s: dataclasses.replace(part, groups=_groups(part, group)) for s, part in splits.items()
        }
    return Dataset(name, tuple(classes), True, splits, channels)


def _groups(part: '_Files', pattern: str) -> np.ndarray:
    """What each image belongs to, str [examples]."""
    try:
        found = [re.search(pattern, path) for path in part.identity()]
    except re.error as error:
        raise UserError(f'config.group={pattern!r} is no regular expression: {error}') from error
    for path, match in zip(part.identity(), found, strict=True):
        if not match:
            raise UserError(
                f'config.group={pattern!r} does not fit {path}: every image has a group. A path '
                'begins with the folder of the class; the group is what the first parentheses '
                "hold, as in --config.group='patient_([0-9]+)'"
            )
    return np.array([match[1] if match.re.groups else match[0] for match in found if match])


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """A split on disk: its folder; paths, labels (int [examples]) and groups of its images."""

    folder: str
    paths: tuple[str, ...]
    labels: np.ndarray
    groups: np.ndarray | None = None

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
        begin = os.path.join(self.folder, '')
        start = len(begin) if self.paths[0].startswith(begin) else 0  # of '.', paths have no './'
        return (path[start:] for path in self.paths)


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folder of each split; of a folder without splits, itself as `train`."""
    names = _subfolders(root)
    splits = {name: split_called(name) for name in names}
    if not any(split == 'train' and _subfolders(root / name) for name, split in splits.items()):
        parts = [root / name for name, split in splits.items() if split and split != 'train']
        parts = [part for part in parts if _has_class_folders(part)]
        if parts and not any(_has_images(root / name) for name in names):
            raise UserError(
                f'{root} has {parts[0].name}/ with folders of classes, but no train/: pass '
                f'{parts[0]} to evaluate on it, or add {root / "train"} to train'
            )
        return {'train': root}
    folders: dict[str, pathlib.Path] = {}
    for name, split in splits.items():
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
    return dict(sorted(folders.items(), key=lambda item: SPLITS.index(item[0])))


def _check_level(folder: pathlib.Path, classes: list[str]) -> None:
    """Refuses a folder that does not hold those of the classes, and says where these are."""
    if len(classes) < 2 or not any(_has_images(folder / name) for name in classes):
        deeper = _find_class_folders(folder)
        if len(classes) > 1 and len(deeper) > 1:  # such as animals/birds/owl; or color/apple
            _logger.warning(
                'Note: the classes are %s, ... in %s; folders in them, such as %s, are not classes '
                'of their own. To make them so, pass %s',
                ', '.join(classes[:3]), folder, _subfolders(deeper[0])[0], deeper[0],
            )  # fmt: skip
            return
        if deeper:
            raise UserError(
                f'{folder} holds no folders of classes ({", ".join(classes[:5])}); they are in '
                f'{deeper[0]}: pass that'
            )
    if len(classes) > 1:
        return
    found = folder / classes[0] if classes else folder
    images = sum(map(image_files.is_image_name, os.listdir(found)))
    raise UserError(
        f'{folder} holds '
        + (f'one class only ({classes[0]})' if classes else 'no folders of classes')
        + (f'; {images:,} images are right in {found}' if images else '')
        + f'. The folder of an image tells its class: expected two or more, {folder}/CLASS/*.jpg, '
        f'or {folder}/train/CLASS/*.jpg and {folder}/test/CLASS/*.jpg'
    )


def _find_class_folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The highest folders below this one that could be passed instead of it."""
    level = [root]
    for _ in range(_DEPTH):
        level = [folder / name for folder in level for name in _subfolders(folder)]
        level = level[:_MAX_FOLDERS]
        found = [folder for folder in level if _has_class_folders(folder)]
        trains = [folder.parent for folder in found if folder.name.lower() in ('train', 'training')]
        if found:
            return [folder for folder in trains if folder != root] or found
    return []


def _has_class_folders(folder: pathlib.Path) -> bool:
    names = _subfolders(folder)[:_MAX_FOLDERS]
    return len(names) > 1 and sum(_has_images(folder / name) for name in names) > 1


def _has_images(folder: pathlib.Path) -> bool:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(image_files.is_image_name(entry.name) for entry in entries)
    return False  # it cannot be read


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


def _list_split(
    folder: pathlib.Path, classes: list[str], places: _Places, index: Index, *, complete: bool
) -> _Files:
    """The images of a split, which must have all classes if it is to be `complete`."""
    paths: list[str] = []
    counts: dict[int, int] = {}  # images of each label
    ignored = collections.Counter(
        image_files.suffix_of(entry.name) for entry in os.scandir(folder) if entry.is_file()
    )
    known: dict[str, str] = {}
    missing: list[str] = []
    for label, name in enumerate(classes):
        if not complete and not (folder / name).is_dir():
            missing.append(name)
            continue
        real = os.path.realpath(folder / name)
        if real in known:
            raise UserError(
                f'{folder / known[real]} and {folder / name} are one folder, {real}, and cannot be '
                'two classes; remove one of the links'
            )
        known[real] = name
        foreign = functools.partial(places.is_foreign, real)
        found, others = list_images(folder / name, foreign, index=index)
        ignored.update(others)
        if not found and complete:
            raise UserError(
                f'class folder {folder / name} has no images '
                f'({image_files.in_words(index.arrays)}); put some there or remove the folder'
            )
        missing += [] if found else [name]
        paths += found
        counts[label] = len(found)
    if ignored:
        _logger.warning(
            '%s: %d files that are hidden or not images, or not in a class folder, are ignored%s',
            folder, ignored.total(), image_files.hint_of(ignored),
        )  # fmt: skip
    if not paths:
        raise UserError(
            f'{folder} has no images in folders of classes; put some there, or remove it'
        )
    if missing:
        shown = ', '.join(missing[:5]) + ', ...' * (len(missing) > 5)
        _logger.warning(
            'Note: %s has no images of %d of the %d classes: %s',
            folder, len(missing), len(classes), shown,
        )  # fmt: skip
    labels = np.repeat([*counts], [*counts.values()])
    order = stratified_order(labels)
    return _Files(str(folder), tuple(paths[i] for i in order.tolist()), labels[order])


def _subfolders(folder: pathlib.Path) -> list[str]:
    """Sorted names of the folders in a folder, without hidden ones and macOS's leftovers."""
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if is_folder(entry) and not entry.name.startswith('.') and entry.name != '__MACOSX'
        )
    except OSError as error:
        raise UserError(f'folder {folder} cannot be read ({error.strerror})') from error
