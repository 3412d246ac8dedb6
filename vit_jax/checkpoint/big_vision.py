"""big_vision's checkpoints: the same models, stored in several other ways.

Its files may differ from those of the original release: the weights are under a prefix, beside an
optimizer's state or a text tower; the layers of the encoder are stacked by `scan` into one array
per parameter; position embeddings are at the top of the tree, with the class token's added to the
class token itself; fixed sine-cosine position embeddings are not stored at all.
"""

import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from vit_jax.checkpoint.arrays import LazyArray, derive
from vit_jax.errors import UserError
from vit_jax.models.positions import sincos_2d

# Where weights may be, most particular first: beside an optimizer's state, in a collection of their
# own, or as the image tower of an image-text model (SigLIP, LiT).
PREFIXES = (
    'opt/target/params/',
    'opt/target/',
    'optimizer/target/',
    'target/',
    'params/img/',
    'params/params/',
    'params/',
    'img/',
)
_NOT_WEIGHTS = re.compile(r'(?:opt|opt_state|opt_states|optimizer)/.*|step')


def find_weights(keys: Sequence[str]) -> tuple[str, list[str]]:
    """Tells weights from what else a file holds.

    Args:
        keys: of all arrays of the file, such as 'opt/target/head/bias'.

    Returns:
        (the prefix that the weights' keys have, or '', the keys of all other arrays).
    """
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in keys)), '')
    if prefix:
        return prefix, [key for key in keys if not key.startswith(prefix)]
    others = [key for key in keys if _NOT_WEIGHTS.fullmatch(key)]
    return '', others if len(others) < len(keys) else []


def to_vit(tree: Mapping[str, Any], path: pathlib.Path) -> tuple[dict[str, Any], list[str]]:
    """Turns big_vision's layout into that of the original release; other trees stay as they are.

    Args:
        tree: nested dict with Linen names of arrays, lazy or not.
        path: the file, for errors.

    Returns:
        (the tree, what was done: a sentence for each).

    Raises:
        UserError: layers stacked by `scan` are not of one number.
    """
    tree, notes = unstacked(tree, 'Transformer', path)
    transformer = dict(_group(tree, 'Transformer'))
    kernel, position = _group(tree, 'embedding').get('kernel'), tree.get('pos_embedding')
    is_vit = 'encoder_norm' in transformer and getattr(kernel, 'ndim', 0) == 4
    if not is_vit or 'posembed_input' in transformer:
        position = None
    elif getattr(position, 'ndim', 0) == 3:
        del tree['pos_embedding']
        notes.append('position embeddings were moved to Transformer/posembed_input')
    elif position is None and 'cls' not in tree:  # as its ViT-S/16 for ImageNet-1k
        position = _sincos(kernel)
        notes.append(
            'it has no position embeddings: fixed sine-cosine ones, for 224 pixels, were made'
        )
    else:
        position = None
    if position is not None:
        if 'cls' in tree:
            position = derive(_with_class_token, position)
            notes.append('the class token has its position embedding in it: zeros were put there')
        transformer['posembed_input'] = {'pos_embedding': position}
    if transformer:
        tree['Transformer'] = transformer
    return tree, notes


def unstacked(
    tree: Mapping[str, Any], encoder: str, path: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
    """Takes the layers of an encoder apart where they are stacked by `scan`.

    Args:
        tree: nested dict with Linen names of arrays, lazy or not.
        encoder: the name of the encoder in it.
        path: the file, for errors.

    Returns:
        (the tree, what was done: a sentence for each).

    Raises:
        UserError: the layers are not of one number.
    """
    blocks = dict(_group(tree, encoder))
    stacked = _group(blocks, 'encoderblock')
    if not stacked:
        return dict(tree), []
    del blocks['encoderblock']
    blocks |= _unstack(stacked, path)
    return {**tree, encoder: blocks}, ['layers stacked by scan were taken apart']


def _group(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The group of this name; empty if there is none, or an array has the name."""
    group = tree.get(name)
    return group if isinstance(group, Mapping) else {}


def with_class_position(tree: dict[str, Any], grid: tuple[int, int] | None = None) -> list[str]:
    """Gives position embeddings the rows of class and distillation token where they lack them.

    Some models (timm's `no_embed_class`) add position embeddings to the patches only.

    Args:
        tree: nested dict with Linen names; changed in place.
        grid: (rows, columns) of the patches; None where nothing tells, and a square is looked for.

    Returns:
        What was done.
    """
    tokens = ('cls' in tree) + ('dist' in tree)
    try:
        holder = tree['Transformer']['posembed_input']
        count = holder['pos_embedding'].shape[1]
    except (KeyError, IndexError, TypeError):
        return []
    lacks = not _is_square(count - tokens) and _is_square(count)
    if grid:
        lacks = count == grid[0] * grid[1]
    if not tokens or not lacks:
        return []
    for _ in range(tokens):
        holder['pos_embedding'] = derive(_with_class_token, holder['pos_embedding'])
    return ['position embeddings have no place for the class token: zeros were put there']


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _with_class_token(position: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(position[:, :1]), position], axis=1)


def _unstack(stacked: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """[layers, ...] arrays -> encoderblock_0, encoderblock_1, ... of arrays."""
    flat = traverse_util.flatten_dict(stacked)
    counts = {array.shape[:1] for array in flat.values()}
    if len(counts) != 1 or counts == {()}:
        raise UserError(
            f'{path}: the arrays under Transformer/encoderblock should all be stacked over the '
            f'same number of layers; found {sorted(counts)}'
        )

    blocks = {}
    for name, array in flat.items():
        whole = functools.cache(functools.partial(np.asarray, array))  # read once for all layers
        stored = getattr(array, 'stored_dtype', 'float32')
        for index in range(array.shape[0]):
            read = functools.partial(lambda whole, index: whole()[index], whole, index)
            blocks[f'encoderblock_{index}', *name] = LazyArray(array.shape[1:], read, stored)
    return traverse_util.unflatten_dict(blocks)


def _sincos(kernel: Any) -> LazyArray:
    """Fixed position embeddings, [1, N, D], for 224 pixels, see `sincos_2d`."""
    side, width = 224 // kernel.shape[0], kernel.shape[-1]

    def make() -> np.ndarray:
        return sincos_2d(side, side, width)[None]

    return LazyArray((1, side * side, width), make)
