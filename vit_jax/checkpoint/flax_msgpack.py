"""Weights of transformers' Flax models (`flax_model.msgpack`), named as its PyTorch ones."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np
from flax import serialization, traverse_util

from vit_jax.checkpoint.arrays import LazyArray, from_file
from vit_jax.errors import UserError

_MAX_OBJECTS = 100_000

# Our layout of a kernel, [inputs, outputs] or [height, width, inputs, outputs] -> PyTorch's.
_KERNELS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x.T,
    4: lambda x: x.transpose(3, 2, 0, 1),
}


def open_file(path: pathlib.Path) -> dict[str, LazyArray]:
    """Reads a file of `flax.serialization`.

    Args:
        path: the file; it is read as a whole, and its arrays are views of it.

    Returns:
        Name -> array, as transformers' PyTorch model of the same class has them.

    Raises:
        UserError: damaged, or no tree of arrays.
    """
    try:
        data = path.read_bytes()
        _check_count(data)
        tree = serialization.msgpack_restore(data)
        flat = traverse_util.flatten_dict(tree, sep='.')
    except MemoryError:
        raise
    except Exception as e:  # msgpack raises nearly anything for damage
        raise UserError(
            f'{path} is not a readable .msgpack file ({e}). It may be cut short, damaged, or '
            'renamed: download it again'
        ) from e
    arrays = {}
    for name, leaf in flat.items():
        if not isinstance(leaf, np.ndarray):
            raise UserError(f'{path}: {name[:200]!r} is {type(leaf).__name__}; expected an array')
        theirs, array = _as_in_pytorch(name, leaf)
        read = functools.partial(np.array, array)
        arrays[theirs] = from_file(path, theirs, array.shape, str(array.dtype), read)
    return arrays


def _check_count(data: bytes) -> None:
    """Raises `ValueError` for many objects: a byte each in the file, and a hundred in memory."""
    found = 0

    def count(children: Sequence[Any]) -> None:
        nonlocal found
        found += 1 + len(children)
        if found > _MAX_OBJECTS:
            raise ValueError(f'it has more than {_MAX_OBJECTS:,} objects')

    def unpack(packed: bytes) -> None:
        msgpack.unpackb(
            packed,
            raw=True,
            strict_map_key=False,
            object_pairs_hook=count,
            list_hook=count,
            ext_hook=lambda _, inner: unpack(inner),  # an array: shape, type and bytes
            max_map_len=_MAX_OBJECTS,
            max_array_len=_MAX_OBJECTS,
        )

    unpack(data)


def _as_in_pytorch(name: str, array: Any) -> tuple[str, Any]:
    """Name and layout of one array."""
    module, _, kind = name.rpartition('.')
    if kind == 'kernel' and array.ndim in _KERNELS:
        return f'{module}.weight', _KERNELS[array.ndim](array)
    return (f'{module}.weight' if kind == 'scale' else name), array
