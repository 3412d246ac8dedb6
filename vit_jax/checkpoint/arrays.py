"""Arrays of a file that are read when they are needed, and what a file of weights is known to be.

A conversion reads, changes and writes one array at a time; so does loading, which then needs no
more memory than the weights themselves.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from flax import traverse_util

from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

_MAX_AXES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is read from its file whenever NumPy asks for it (`np.asarray`).

    Attributes:
        shape: known without reading.
        read: reads it: contiguous float32 of this shape.
        stored_dtype: name of the type in the file: 'float32', 'bfloat16', ...
        dtype: of what reading gives: float32 always.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
    stored_dtype: str = 'float32'
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array, contiguous float32."""
        if copy is False:
            raise ValueError('an array of a file cannot be had without reading it')
        array = self.read()
        assert array.shape == self.shape, (array.shape, self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def derive(function: Callable[..., np.ndarray], *sources: Any) -> LazyArray:
    """An array computed from others when it is read.

    Args:
        function: takes the arrays of `sources`, float32; must only rearrange or compute, so that
            its result's shape depends on their shapes alone.
        *sources: `LazyArray`s or arrays.

    Returns:
        The lazy result, contiguous float32.
    """
    # An array of one repeated element stands in for the real one: it has the shape and no memory.
    stand_ins = [np.broadcast_to(np.float32(0), source.shape) for source in sources]
    shape = function(*stand_ins).shape

    def read() -> np.ndarray:
        result = function(*(np.asarray(source) for source in sources))
        return np.ascontiguousarray(result, dtype=np.float32).reshape(shape)

    stored = {getattr(source, 'stored_dtype', str(source.dtype)) for source in sources}
    return LazyArray(shape, read, '/'.join(sorted(stored)))


@dataclasses.dataclass(frozen=True)
class Weights:
    """A file (or folder) of weights, recognised and given this package's names; not yet read.

    Attributes:
        path: the file or folder, for people.
        format: what it was recognised as, for people: 'Google .npz', 'timm', ...
        params: nested dict with Linen names; leaves are `LazyArray`.
        notes: what had to be done or is to be known, one sentence each.
        assumed: those of the notes that are guesses.
        class_names: in label order, () where the file does not tell.
        image_size: side or (height, width) of the input in pixels, 0 where only the arrays tell.
        settings: arguments of the model that the arrays do not tell, such as `act`; under
            'told_by_arrays' those that they have to agree with.
        projects: whether its head gives an embedding beside texts', and no scores of classes.
        preprocess: from decoded images to pixels, as the file tells; None where it does not.
        refused: how it says that images become pixels, where that is not computed here.
        resizes: how the library's class fits the positions to images of another size than
            `image_size`, which `preprocess` may then make: 'bicubic', 'bicubic, antialiased'; ''
            where it does not.
    """

    path: str
    format: str
    params: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    image_size: int | tuple[int, int] = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    projects: bool = False
    preprocess: Preprocess | None = None
    refused: str = ''
    resizes: str = ''

    def __str__(self) -> str:
        return '\n  '.join([f'{self.path}: {self.format} weights', *self.notes])

    def read(self) -> dict[str, Any]:
        """Reads everything: a nested dict of float32 NumPy arrays."""
        flat = traverse_util.flatten_dict(self.params)
        return traverse_util.unflatten_dict({name: np.asarray(a) for name, a in flat.items()})


def from_file(
    path: pathlib.Path,
    name: str,
    shape: Sequence[int],
    stored_dtype: str,
    read: Callable[[], np.ndarray],
) -> LazyArray:
    """An array of a file of weights; what is not a weight is refused.

    Args:
        path: the file, for errors.
        name: the array's, for errors.
        shape: as the file declares it.
        stored_dtype: name of its type in the file; 'void16' is bfloat16, which NumPy does not know.
        read: gives the array as it is stored.

    Raises:
        UserError: no weights have such a type or shape. When the array is read: it is damaged, or
            has values that are not finite.
    """
    stored_dtype = 'bfloat16' if stored_dtype == 'void16' else stored_dtype
    if not re.fullmatch(r'b?float\d+\w*', stored_dtype):
        raise UserError(
            f'{path}: the array {name[:200]!r} has type {stored_dtype}; expected weights, of a '
            'float type. Save the model again with vit_jax.checkpoint.save, or download the file '
            'again'
        )
    if not is_shape_of_weights(shape):
        raise UserError(
            f'{path}: cannot read the array {name[:200]!r} of shape {str(tuple(shape))[:80]}: no '
            'weights have this shape'
        )

    def read_checked() -> np.ndarray:
        try:
            array = read()
            if array.dtype == np.dtype('V2'):
                array = array.view(ml_dtypes.bfloat16)
            array = np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape)
        except (MemoryError, UserError):
            raise
        except Exception as e:  # zipfile, safetensors and PyTorch raise nearly anything for damage
            raise UserError(f'{path}: cannot read the array {name!r}: {e}') from e
        if bad := count_not_finite(array):
            raise UserError(
                f'{path}: the array {name!r} has {bad:,} values (of {array.size:,}) that are NaN '
                'or infinite. The training that wrote it diverged, or the file is damaged: take '
                'an earlier checkpoint, or download it again'
            )
        return array

    return LazyArray(tuple(shape), read_checked, stored_dtype)


def is_shape_of_weights(shape: Sequence[int]) -> bool:
    """Whether weights may have this shape: not too many axes, and elements."""
    return len(shape) <= _MAX_AXES and all(size >= 1 for size in shape)


def count_not_finite(array: np.ndarray) -> int:
    """How many elements of a float array are NaN or infinite."""
    # A sum is one fast pass, and not finite if any element is not; it may overflow without that.
    with np.errstate(all='ignore'):
        if np.isfinite(array.sum()):
            return 0
    return array.size - int(np.isfinite(array).sum())
