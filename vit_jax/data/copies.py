"""Test images that are training images as well, under another name."""

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from vit_jax.data.dataset import Selection
from vit_jax.data.decode import BadImageError, decode, read_file

NOTES_SECONDS = 10  # for `notes`
_CHECK_EVERY = 1000  # files, between two looks at the clock, where none is read


class Copies(NamedTuple):
    """What was found.

    Attributes:
      pairs: paths of a test image and of a training image that is the same, one for each such test
        image.
      complete: whether all were compared; else the time was over.
    """

    pairs: list[tuple[str, str]]
    complete: bool


def find(
    train: Selection, test: Selection, *, pixels: bool = False, seconds: float = float('inf')
) -> Copies | None:
    """Compares the files of test images with those of training images.

    Args:
      train: the training images.
      test: the test images.
      pixels: whether to compare decoded pixels, upright, instead of the bytes of the files; then
        all files are read. Otherwise only those are whose sizes occur on both sides.
      seconds: how long it may take; what was found by then is given.

    Returns:
      The copies; None where the images are not files. A file that is on both sides under the same
      path is no copy, `Selection.overlap` counts those; nor is one that cannot be read.
    """
    train_paths, test_paths = train.paths(), test.paths()
    if train_paths is None or test_paths is None:
        return None
    end = time.monotonic() + seconds
    if pixels:
        candidates: list[tuple[Sequence[str], Sequence[str]]] = [(test_paths, train_paths)]
    else:
        of_test = _by(_size, test_paths, end)
        of_train = _by(_size, train_paths, end)
        sizes = (of_test.keys() & of_train.keys()) - {0}  # empty files are no images
        candidates = [(of_test[size], of_train[size]) for size in sizes]
    pairs = []
    key = _pixels if pixels else _bytes
    for tested, trained in candidates:
        tests, trains = _by(key, tested, end, every=1), _by(key, trained, end, every=1)
        for same in tests.keys() & trains.keys():
            others = trains[same]
            for path in tests[same]:
                other = next((other for other in others if other != path), None)
                if other is not None:
                    pairs.append((path, other))
    return Copies(sorted(pairs), time.monotonic() <= end)


def notes(train: Selection, test: Selection, dataset: str) -> list[str]:
    """Sentences on copies, from what can be compared within `NOTES_SECONDS`.

    Args:
      train: the training images.
      test: the test images.
      dataset: as the user spells it.
    """
    found = find(train, test, seconds=NOTES_SECONDS)
    if found is None:
        return []
    told = []
    if found.pairs:
        told.append(
            f'{len(found.pairs):,} of the {len(test):,} test images are copies of training images, '
            f'byte for byte, such as {" and ".join(found.pairs[0])}; take them out on one side '
            f'(vit_jax find_copies {dataset} lists all)'
        )
    if not found.complete:
        told.append(
            f'not all files were compared within {NOTES_SECONDS} seconds; vit_jax find_copies '
            f'{dataset} tells which test images are training images as well'
        )
    return told


def _by(
    key: Callable[[str], object], paths: Iterable[str], end: float, every: int = _CHECK_EVERY
) -> dict[object, Sequence[str]]:
    """Paths by what they have in common; those that there was no time for are left out."""
    found: dict[object, list[str]] = defaultdict(list)
    for number, path in enumerate(paths):
        if number % every == 0 and time.monotonic() > end:
            break
        try:
            found[key(path)].append(path)
        except (OSError, BadImageError):  # is named where it is read
            continue
    return dict(found)


def _size(path: str) -> int:
    return os.stat(path).st_size


def _bytes(path: str) -> bytes:
    return hashlib.blake2b(read_file(path), digest_size=16).digest()


def _pixels(path: str) -> bytes:
    decoded = decode(read_file(path), key=path, exif=True)
    shape = str(decoded.shape).encode()
    return hashlib.blake2b(shape + decoded.tobytes(), digest_size=16).digest()
