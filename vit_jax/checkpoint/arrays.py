"""Arrays of a file that are read when they are needed, and what a file of weights is known to be.

A conversion reads, changes and writes one array at a time; so does loading, which then needs no
more memory than the weights themselves.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from vit_jax.errors import UserError


class LazyArray:
    """An array that is read from its file whenever NumPy asks for it (`np.asarray`).

    Attributes:
        shape: known without reading.
        dtype: of what reading gives: float32 always.
        stored_dtype: name of the type in the file: 'float32', 'bfloat16', ...
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, shape: tuple[int, ...], read: Callable[[], np.ndarray], stored_dtype: str = 'float32'
    ):
        self.shape = tuple(int(size) for size in shape)
        self.stored_dtype = stored_dtype
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array, contiguous float32."""
        if copy is False:
            raise ValueError('an array of a file cannot be had without reading it')
        array = self._read()
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

    def __repr__(self) -> str:
        return f'LazyArray(shape={self.shape}, stored_dtype={self.stored_dtype!r})'


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
        class_names: in label order, () where the file does not tell.
        image_size: side of the input in pixels, 0 where only the arrays can tell.
    """

    path: str
    format: str
    params: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    image_size: int = 0

    def __str__(self) -> str:
        return '\n  '.join([f'{self.path}: {self.format} weights', *self.notes])

    def read(self) -> dict[str, Any]:
        """Reads everything: a nested dict of float32 NumPy arrays."""
        flat = traverse_util.flatten_dict(self.params)
        return traverse_util.unflatten_dict({name: np.asarray(a) for name, a in flat.items()})


def to_float32(array: np.ndarray, name: str, path: Any) -> np.ndarray:
    """Contiguous float32 of a stored array of any float type; refuses what is not a weight.

    Args:
        array: as stored; bfloat16 may come as NumPy's two raw bytes.
        name: the array's, for the error.
        path: the file's, for the error.

    Returns:
        The array itself if it is contiguous native float32.

    Raises:
        UserError: another type, or values that are not finite.
    """
    if array.dtype == np.dtype('V2'):  # NumPy has no bfloat16: the two bytes come back as 'void'
        array = array.view(ml_dtypes.bfloat16)
    check_dtype(array.dtype, name, path)
    array = np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape)
    # A sum is one fast pass, and not finite if any element is not; it may overflow without that.
    with np.errstate(all='ignore'):
        suspicious = not np.isfinite(array.sum())
    if suspicious and (bad := array.size - int(np.isfinite(array).sum())):
        raise UserError(
            f'{path}: the array {name!r} has {bad:,} values (of {array.size:,}) that are NaN or '
            'infinite. The training that wrote it diverged, or the file is damaged: take an '
            'earlier checkpoint, or download it again'
        )
    return array


def check_dtype(dtype: np.dtype, name: str, path: Any) -> None:
    """Raises `UserError` unless `dtype` is a float type (bfloat16 may be NumPy's two raw bytes)."""
    if dtype not in (np.dtype('V2'), ml_dtypes.bfloat16) and dtype.kind != 'f':
        what = 'pickled Python objects' if dtype.hasobject else f'type {dtype}'
        raise UserError(
            f'{path}: the array {name!r} has {what}; expected weights, of a float type. Save the '
            'model again with vit_jax.checkpoint.save, or download the file again'
        )
