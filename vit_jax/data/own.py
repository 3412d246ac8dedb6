"""Your own data as a source: arrays, lists, and datasets of other libraries.

    train = data.from_arrays(images, labels, class_names=('cat', 'dog'))
    train = data.from_sequence(torchvision.datasets.CIFAR10('cifar', train=True))
    train = data.from_sequence(load_dataset('beans', split='train'), keys=('image', 'labels'))

`train.train_and_evaluate(config, workdir, sources=(train, test))` trains on them.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data.dataset import Dataset, Selection
from vit_jax.data.decode import BadImageError, pixels_of, read_file
from vit_jax.data.examples import (
    CLASS_INDEX,
    Example,
    Label,
    Source,
    channels_of,
    check_class_names,
    label_dtype,
    label_dtype_of,
    numbered,
)
from vit_jax.errors import UserError

_SPLIT = 'all'


def from_arrays(
    images: Any,
    labels: Any,
    class_names: Sequence[str] | None = None,
    *,
    channels: int = 3,
    units: Sequence[str] = (),
    groups: Any = None,
    weights: Any = None,
    name: str = '',
    fingerprint: str = '',
) -> Selection:
    """A source of images that are in memory, or in a `np.memmap`.

    Args:
      images: N images as one array: [N, height, width, channels] or [N, height, width]; uint8 in
        [0, 255], uint16, or floats in [0, 1]. See `decode.pixels_of`: what is only `channels` wide
        stays as it is.
      labels: of N examples, see `from_sequence`.
      class_names: see `from_sequence`.
      channels: see `from_sequence`.
      units: see `from_sequence`.
      groups: see `from_sequence`.
      weights: see `from_sequence`.
      name: see `from_sequence`.
      fingerprint: see `from_sequence`.

    Raises:
      UserError: see `from_sequence`.
    """
    images = np.asarray(images)
    if images.ndim not in (3, 4):
        raise UserError(
            f'images must be one array [N, height, width, channels], got {list(images.shape)}; '
            'data.from_sequence takes a list of images of different sizes'
        )
    name = name or 'arrays'
    told: dict[str, Any] = {'channels': channels, 'units': units, 'fingerprint': fingerprint}
    told |= {'groups': groups, 'weights': weights}
    return from_sequence(images, labels, class_names, name=name, **told)


def from_sequence(
    items: Any,
    labels: Any = None,
    class_names: Sequence[str] | None = None,
    *,
    channels: int = 3,
    exif: bool = True,
    keys: tuple[str, str] = ('image', 'label'),
    units: Sequence[str] = (),
    groups: Any = None,
    weights: Any = None,
    name: str = '',
    fingerprint: str = '',
) -> Selection:
    """A source of anything that has a length and `[]`.

    An image is a path, the bytes of a file, a PIL image, or an array (of NumPy, JAX, PyTorch) that
    `decode.pixels_of` takes. A label is the index of a class (a whole number), or a real number, or
    a vector of numbers (several labels for an image as 0 and 1, or probabilities); of these two,
    batches hold float32, and `config.loss` says what they are where it cannot be seen.

    Args:
      items: N images; without `labels`, pairs (image, label) or dicts of both, as datasets of
        PyTorch and Hugging Face give them. Several threads call `items[i]` at once.
      labels: of N examples: integers [N], floats [N], or vectors [N, C]. (`losses.squared_error`
        compares a label with the C outputs of the model: of one number, give [N, 1].)
      class_names: as many as classes, or as the model has outputs. Default: those that `items`
        tells (`.classes` of torchvision, `.features` of Hugging Face); else 'class 0', 'class 1',
        ... up to the largest index or the length of a vector; 'value' for real numbers.
      channels: of the images. With 3, what has 1 or 4 is made to have 3, as that of a file; with
        another number, all images are arrays of so many channels.
      exif: whether to turn files and PIL images upright as their EXIF orientation says.
      keys: of image and label in dicts.
      units: of labels that are numbers: as many texts as `class_names`; default none.
      groups: what each example belongs to (a patient, a scene), N texts or whole numbers: a group
        is on one side of every split; default nothing.
      weights: how much each example counts in training, N numbers from 0 on; default all alike.
      name: what messages call the data; default the type of `items`. Images are called NAME/INDEX,
        or by their path.
      fingerprint: a text that tells this data from another, so that no run is resumed with other
        data; number of examples, labels and class names are compared without it.

    Returns:
      The source.

    Raises:
      UserError: no examples, labels or class names that do not fit, or a first image that cannot
        be used. From `source[i]`, what is wrong with example i.
    """
    name = name or type(items).__name__
    if not (hasattr(items, '__len__') and hasattr(items, '__getitem__')):
        raise UserError(
            f'{name} has no length or no []: data.from_sequence takes a sequence, '
            'data.BatchStream an iterator of batches'
        )
    if not len(items):
        raise UserError(f'{name} has no examples')
    known = None if labels is None else _check_labels(labels, len(items), name)
    split = _Items(
        name, items, known, keys, channels, fingerprint, _check_groups(groups, items, name),
        _check_weights(weights, items, name),
    )  # fmt: skip
    first = split.image_and_label(0)
    if isinstance(first[0], np.ndarray):
        pixels_of(first[0], key=f'{name}/0', channels=channels)
    dtype = label_dtype(first[1] if known is None else known[0])
    names = _names(items, known, class_names, dtype, keys[1], name)
    split = dataclasses.replace(split, label_dtype=dtype, class_names=names)
    if len(units) not in (0, len(names)) or (units and dtype == CLASS_INDEX):
        raise UserError(
            f'{len(units)} units for the {len(names)} outputs of {name}: labels that are numbers '
            'have one each'
        )
    return _whole(Dataset(name, names, exif, {_SPLIT: split}, channels, dtype, tuple(units)))


def as_selection(source: Source | Selection, name: str) -> Selection:
    """Any source as what `train_and_evaluate` works with.

    Args:
      source: has `class_names`, `exif`, a length and `[]`.
      name: what messages call it.

    Raises:
      UserError: it is something else.
    """
    if isinstance(source, Selection):
        return source
    needed = ('class_names', 'exif', '__len__', '__getitem__')
    missing = [attribute for attribute in needed if not hasattr(source, attribute)]
    if missing:
        raise UserError(
            f'{name}: {type(source).__name__} is no source, it has no {", ".join(missing)}; '
            'data.from_sequence makes one of anything with a length and []'
        )
    return _whole(
        Dataset(
            type(source).__name__,
            tuple(source.class_names),
            source.exif,
            {_SPLIT: _OfSource(source)},
            channels_of(source),
            label_dtype_of(source),
        )
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Items:
    """The only split of a dataset made of `items`, see `from_sequence`."""

    name: str
    items: Any
    known: np.ndarray | None  # labels
    keys: tuple[str, str]
    channels: int
    fingerprint: str
    groups: np.ndarray | None
    weights: np.ndarray | None
    label_dtype: np.dtype = CLASS_INDEX
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> np.ndarray | None:
        """Labels of all examples, [N, ...], where they are known."""
        return self.known

    def read(self, index: int) -> Example:
        image, label = self.image_and_label(index)
        key = f'{self.name}/{index}'
        if self.known is None:
            label = self._checked(label, key)
        if not isinstance(image, str | os.PathLike):
            return Example(image, label, key)
        try:
            return Example(read_file(image), label, os.fspath(image))
        except BadImageError as error:
            error.label = label
            raise

    def identity(self) -> tuple[str, ...]:
        labels = b'' if self.known is None else np.ascontiguousarray(self.known).tobytes()
        told = (str(len(self)), str(self.label_dtype), str(self.channels), self.fingerprint)
        if self.groups is not None:
            labels += '\0'.join(self.groups.tolist()).encode(errors='surrogateescape')
        if self.weights is not None:
            labels += self.weights.tobytes()
        return *told, hashlib.sha256(labels).hexdigest()

    def image_and_label(self, index: int) -> tuple[Any, Any]:
        """As they are, but what is an array of another library is one of NumPy."""
        item = self.items[index]
        if self.known is not None:
            label = self.known[index]
            return _image(item), label if label.ndim else label.item()
        if isinstance(item, Mapping):
            missing = [key for key in self.keys if key not in item]
            if missing:
                raise UserError(
                    f'{self.name}/{index} has no {" and no ".join(missing)}, only '
                    f'{", ".join(map(str, item))}: say keys=(IMAGE, LABEL)'
                )
            return _image(item[self.keys[0]]), item[self.keys[1]]
        if isinstance(item, tuple | list) and len(item) == 2:
            return _image(item[0]), item[1]
        raise UserError(
            f'{self.name}/{index} is neither a pair (image, label) nor a dict of both, but '
            f'{type(item).__name__}: data.from_sequence(images, labels) takes them apart'
        )

    def _checked(self, label: Any, key: str) -> Label:
        """The label of a pair, which nobody has seen before."""
        found = label_dtype(label)
        if found != self.label_dtype:
            raise UserError(
                f'{key}: the label is {label!r:.60}, and that of the first example was of type '
                f'{self.label_dtype}; all must be of one kind'
            )
        array = np.asarray(label, found.base)
        _check_values(array, len(self.class_names), key)
        return array if array.ndim else array.item()


@dataclasses.dataclass(frozen=True, eq=False)
class _OfSource:
    """The only split of a dataset made of a source."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Example:
        return self.source[index]

    @property
    def weights(self) -> np.ndarray | None:
        """Those that the source tells, float32 [N]."""
        told = getattr(self.source, 'weights', None)
        return _check_weights(told(), self, type(self.source).__name__) if callable(told) else None

    def identity(self) -> tuple[str, ...]:
        told = str(len(self)), str(label_dtype_of(self.source)), str(channels_of(self.source))
        weights = self.weights
        return told if weights is None else (*told, hashlib.sha256(weights.tobytes()).hexdigest())


def _whole(dataset: Dataset) -> Selection:
    return Selection(dataset, _SPLIT, [(_SPLIT, range(len(dataset.splits[_SPLIT])))])


def _image(image: Any) -> Any:
    """A path, bytes, a PIL image or an array of NumPy."""
    if isinstance(image, str | os.PathLike | bytes | np.ndarray) or hasattr(image, 'getexif'):
        return image
    return np.asarray(image)


def _check_labels(labels: Any, count: int, name: str) -> np.ndarray:
    """Labels as one array: int32 [N], float32 [N] or float32 [N, C]."""
    array = np.asarray(labels)
    if array.ndim < 1 or len(array) != count or array.dtype.kind not in 'biuf':
        raise UserError(
            f'labels of {name} must be {count:,} numbers or vectors of numbers, got '
            f'{array.dtype} {list(array.shape)}'
        )
    if array.shape[1:] == (1,) and array.dtype.kind in 'biu':
        raise UserError(
            f'labels of {name} are a column, {list(array.shape)}: use labels[:, 0] for indices of '
            'classes, or floats for vectors of length 1'
        )
    array = array.astype(label_dtype(array[0]).base)
    _check_values(array, None, f'labels of {name}')
    return array


def _check_groups(groups: Any, items: Any, name: str) -> np.ndarray | None:
    """Groups as one array of texts [N]."""
    if groups is None:
        return None
    array = np.asarray(groups)
    if array.shape != (len(items),) or array.dtype.kind not in 'iuUSO':
        raise UserError(
            f'groups of {name} must be {len(items):,} texts or whole numbers, got '
            f'{array.dtype} {list(array.shape)}'
        )
    return array.astype(str)


def _check_weights(weights: Any, items: Any, name: str) -> np.ndarray | None:
    """Weights as one array, float32 [N]."""
    if weights is None:
        return None
    array = np.asarray(weights)
    fit = array.shape == (len(items),) and array.dtype.kind in 'biuf'
    if not fit or not np.isfinite(array).all() or array.min() < 0:
        raise UserError(
            f'weights of {name} must be {len(items):,} numbers from 0 on, got '
            f'{array.dtype} {list(array.shape)}'
        )
    return array.astype(np.float32)


def _check_values(labels: np.ndarray, classes: int | None, what: str) -> None:
    """Refuses NaN, infinity, and indices that are no class."""
    if labels.dtype.kind == 'f':
        if not np.isfinite(labels).all():
            raise UserError(f'{what}: a number is not finite')
    elif labels.min() < 0 or (classes is not None and labels.max() >= classes):
        worst = labels.min() if labels.min() < 0 else labels.max()
        few = '' if classes is None else f', of {classes} classes'
        raise UserError(f'{what}: {worst} is not the index of a class{few}, counted from 0')


def _names(
    items: Any,
    known: np.ndarray | None,
    given: Sequence[str] | None,
    dtype: np.dtype,
    label: str,
    name: str,
) -> tuple[str, ...]:
    """Names of what the model gives, see `from_sequence`."""
    indices = dtype == CLASS_INDEX
    names = tuple(given or (_told_names(items, label) if indices else ()))
    if not names:
        if known is None and indices:
            raise UserError(
                f'{name} does not tell its classes: data.from_sequence(..., class_names=...)'
            )
        if len(dtype.shape) > 1:
            raise UserError(
                f'labels of {name} are arrays {list(dtype.shape)}: class_names says what the '
                'outputs of the model are'
            )
        names = ('value',)
        if indices and known is not None:
            names = numbered(int(known.max()) + 1)
        elif dtype.shape:
            names = numbered(dtype.shape[0])
    check_class_names(names, name)
    if indices:
        if len(names) < 2:
            raise UserError(f'{name} has one class only; at least two are needed')
        if known is not None:
            _check_values(known, len(names), f'labels of {name}')
    return names


def _told_names(items: Any, label: str) -> tuple[str, ...]:
    """Class names as torchvision and Hugging Face have them; () if there are none."""
    features = getattr(items, 'features', None)
    feature = features.get(label) if isinstance(features, Mapping) else None
    return tuple(map(str, getattr(items, 'classes', None) or getattr(feature, 'names', None) or ()))
