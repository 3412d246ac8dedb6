"""Structure and checksums of a training state; checksums are computed where the arrays are.

They do not depend on how the arrays are spread over devices.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import sharding
from vit_jax.errors import UserError


def describe(state: Any) -> dict[str, list[Any]]:
    """Returns leaf name -> [shape, dtype], as JSON gives it back. The tree may be abstract."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in _named_leaves(state)}


def checksums(state: Any) -> dict[str, int]:
    """Returns leaf name -> checksum (uint32), computed where the leaves are."""
    named = _named_leaves(state)
    for name, leaf in named:
        if not isinstance(leaf, jax.Array):
            raise TypeError(f'{name} is a {type(leaf).__name__}; a state has only jax.Arrays')
    sums = []
    for _, leaf in named:
        sums.append(_checksum(leaf))
        # On a GPU all are under way before the first is waited for. Virtual devices of a CPU can
        # lock up where two programs that add across devices run at once.
        if sharding.steps_ahead() == 0:
            jax.block_until_ready(sums[-1])
    return {name: int(s) for (name, _), s in zip(named, jax.device_get(sums), strict=True)}


def check_structure(
    path: pathlib.Path, saved: dict[str, list[Any]], expected: dict[str, list[Any]]
) -> None:
    """Raises `UserError` if what `describe` told of a saved state is not what is expected."""
    old, new = (
        {name: f'{dtype}{shape}' for name, (shape, dtype) in leaves.items()}
        for leaves in (saved, expected)
    )
    names = [name for name in new | old if old.get(name) != new.get(name)]
    if names:
        shown = '; '.join(
            f'{name}: saved {old.get(name, "nothing")}, expected {new.get(name, "nothing")}'
            for name in names[:5]
        )
        raise UserError(
            f'{path} was written with another model or optimizer than this config has: '
            f'{len(names)} arrays differ ({shown}{"; ..." if len(names) > 5 else ""}). Use another '
            'workdir, or the config that this one was started with'
        )


def compare(found: dict[str, int], expected: dict[str, int]) -> str:
    """Returns '' if they are equal, else what is wrong."""
    wrong = [name for name, value in found.items() if value != expected[name]]
    return f'{len(wrong)} arrays have wrong checksums, {wrong[0]} among them' if wrong else ''


def digest(metadata: Any) -> str:
    """Returns the SHA-256 of what JSON makes of it."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _named_leaves(state: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Sums a hash of every element and its global index, modulo 2**32.

    The sum of integers does not depend on the order, hence not on sharding or device count; and as
    the hash of an element is a bijection of its (32-bit) value, one changed element always shows.

    Args:
        x: array of any shape, dtype and sharding; typed PRNG keys, too.

    Returns:
        uint32 scalar.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 8-byte types come out as two 4-byte words in a new last axis.
    word = jnp.dtype(f'uint{8 * min(x.dtype.itemsize, 4)}')
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = index * np.uint32(size % 2**32) + position
    return jnp.sum(_mix(words ^ _mix(index + np.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer (Appleby, 2011, public domain): a bijection of 32-bit words."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
