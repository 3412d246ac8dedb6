"""What every kind of dataset is made of: examples, their labels, sources and stored splits."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vit_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Label = Any  # int, float, np.ndarray; of captions, a tuple of texts
# Of labels that are indices of classes.
CLASS_INDEX = np.dtype(np.int32)


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled image.

    Attributes:
      image: an encoded file, a PIL image, or pixels, see `decode.decode`.
      label: index in the source's `class_names`; or a number, or a vector of numbers; or, of pairs
        of images and texts, see `captions`.
      key: what a person calls the image: its path, or dataset, split and index
        (`tf_flowers:train/17`).
    """

    image: 'bytes | np.ndarray | Image.Image'
    label: Label
    key: str


class Source(Protocol):
    """A finite sequence of examples, safe to read from several threads.

    What has these two attributes, a length and `[]` is a source. `channels_of` and `label_dtype_of`
    say what else it may have; `data.from_sequence` makes one of nearly anything.

    Attributes:
      class_names: names of the classes, in the order of the labels; in general, of what the model
        gives for an image.
      exif: whether to turn images upright as their EXIF orientation says (photo folders).
    """

    class_names: tuple[str, ...]
    exif: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def channels_of(source: Source) -> int:
    """Channels of the images: the source's `channels`, or 3, which all files are decoded to."""
    return getattr(source, 'channels', 3)


def weights_of(source: Source) -> np.ndarray | None:
    """How much each example counts in training, float32 [examples] of mean 1; None for all alike.

    Raises:
      UserError: all weights are 0.
    """
    told = getattr(source, 'weights', None)
    weights = told() if callable(told) else None
    if weights is None:
        return None
    mean = weights.mean(dtype=np.float64)
    if not mean > 0:
        raise UserError(f'all weights of {source!r} are 0, so that there is nothing to train on')
    return (weights / mean).astype(np.float32)


def label_dtype_of(source: Source, label: Label | None = None) -> np.dtype:
    """What labels are: the source's `label_dtype`, or what its first example says that can be read.

    Args:
      source: the examples.
      label: of one of them, so that none need be read.

    Returns:
      int32 for indices of classes, float32 for numbers, a float32 subarray type for vectors, as
      `np.dtype((np.float32, (5,)))`: an array of N such labels has shape [N, 5].
    """
    declared = getattr(source, 'label_dtype', None)
    if declared is not None:
        return declared
    for index in range(len(source)):
        if label is not None:
            break
        try:
            label = source[index].label
        except UserError as error:  # an image that cannot be read may still have a label
            label = getattr(error, 'label', None)
    return CLASS_INDEX if label is None else label_dtype(label)


def label_dtype(label: object) -> np.dtype:
    """The type of labels like this one, see `label_dtype_of`.

    Raises:
      UserError: it is neither a number nor an array of numbers.
    """
    array = np.asarray(label)
    if array.dtype.kind not in 'biuf':
        raise UserError(
            f'a label is the index of a class, a number or an array of numbers; got {label!r:.60}'
        )
    if not array.ndim and array.dtype.kind in 'biu':
        return CLASS_INDEX
    return np.dtype((np.float32, array.shape))


class Split(Protocol):
    """One whole split of a dataset as it is stored; all that differs between storages.

    Storages that know them without reading an image also have `labels` ([N, ...], see
    `label_dtype_of`), `groups` (what each example belongs to, str [N], or None), `weights`
    (how much it counts in training, float32 [N], or None) and `paths` (of files, N).
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> Example:
        """Example `index` of the split, 0-based."""

    def identity(self) -> Iterable[str]:
        """What tells this split from another, or from what it was before, without reading it."""


def numbered(count: int) -> tuple[str, ...]:
    """What classes without names are called: 'class 0', 'class 1', ..."""
    return tuple(f'class {i}' for i in range(count))


def check_class_names(names: Sequence[str], where: str) -> None:
    """Refuses names that could not be printed on one line or stored with the model.

    Args:
      names: of the classes.
      where: they come from, for the message.

    Raises:
      UserError: a name has control characters, line breaks or bytes that are not text.
    """
    for name in names:
        if any(unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') for c in name):
            raise UserError(
                f'{where}: the class name {ascii(name)} has control characters or bytes that are '
                'no text; rename it'
            )
