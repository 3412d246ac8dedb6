"""PyTorch's names and layouts of the same models: timm, Hugging Face, torchvision.

`key_tables.csv` has a table for each library, used in both directions. A line says: this layer of
ours is that layer of theirs, laid out so. {i} is the number of a block; {s} and {u} are stage and
unit of a ResNet counted from 0, {S} and {U} the same counted from 1. The layouts:

    same    a single array, no change (tokens, position embeddings)
    norm    scale, bias                            <-> weight, bias, no change
    dense   kernel [in, out], bias                 <-> weight [out, in], bias
    conv    kernel [height, width, in, out], bias  <-> weight [out, in, height, width], bias
    kernel  that of `conv` alone
    heads   kernel [D, H, K], bias [H, K]          <-> weight [H * K, D], bias [H * K]
    out     kernel [H, K, D], bias                 <-> weight [D, H * K], bias
    qkv     `heads` of query, key and value        <-> one weight [3 * H * K, D], one bias
"""

import csv
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.checkpoint.arrays import LazyArray, derive
from vit_jax.errors import UserError, printable

# An array: our name (three for qkv), their name, how it is laid out.
Line = tuple[tuple[str, ...], str, str]

# Layout of a layer -> its arrays: the ends of our and of their name, and the array's layout.
_ARRAYS = {
    'same': [('', '', 'same')],
    'norm': [('/scale', '.weight', 'same'), ('/bias', '.bias', 'same')],
    'dense': [('/kernel', '.weight', 'dense'), ('/bias', '.bias', 'same')],
    'conv': [('/kernel', '.weight', 'conv'), ('/bias', '.bias', 'same')],
    'kernel': [('/kernel', '.weight', 'conv')],
    'heads': [('/kernel', '.weight', 'heads'), ('/bias', '.bias', 'heads_bias')],
    'out': [('/kernel', '.weight', 'out'), ('/bias', '.bias', 'same')],
    'qkv': [('/kernel', 'weight', 'qkv'), ('/bias', 'bias', 'qkv_bias')],
}


def _read_tables() -> dict[str, list[Line]]:
    tables: dict[str, list[Line]] = {}
    with open(pathlib.Path(__file__).with_name('key_tables.csv'), encoding='utf-8') as file:
        for row in csv.DictReader(file):
            parts = ('/query', '/key', '/value') if row['layout'] == 'qkv' else ('',)
            tables.setdefault(row['library'], []).extend(
                (tuple(row['ours'] + part + our_end for part in parts), row['theirs'] + end, layout)
                for our_end, end, layout in _ARRAYS[row['layout']]
            )
    hybrid = tables['timm'] + tables['timm hybrid']
    # timm has no extra name for the stem of a backbone that is only a stem (R+ViT-Ti_16).
    stem = [(ours, theirs.replace('.stem.', '.'), layout) for ours, theirs, layout in hybrid]
    return tables | {'timm hybrid': hybrid, 'timm stem hybrid': stem}


TABLES = _read_tables()

_UNUSED = ('embeddings.mask_token', 'mask_token')  # by a classifier
_OLD_TORCHVISION = re.compile(r'(\.mlp)\.linear_([12])\.')


def recognise(keys: Sequence[str]) -> str:
    """The key of `TABLES` for the names of a state dict, or '' if they are of no known library."""
    if any(key.endswith('embeddings.patch_embeddings.projection.weight') for key in keys):
        old = any('encoder.layer.' in key for key in keys)
        return 'Hugging Face' if old else 'Hugging Face v5'
    if 'conv_proj.weight' in keys and 'class_token' in keys:
        return 'torchvision'
    if 'stem.proj.weight' in keys and any('.mlp_tokens.' in key for key in keys):
        return 'timm Mixer'
    if 'patch_embed.backbone.stem.conv.weight' in keys:
        return 'timm hybrid'
    if 'patch_embed.backbone.conv.weight' in keys:
        return 'timm stem hybrid'
    return 'timm' if 'patch_embed.proj.weight' in keys else ''


def to_params(
    tensors: Mapping[str, Any], table: str, num_heads: int, path: Any
) -> tuple[dict[str, LazyArray], list[str]]:
    """Gives the tensors of a library this package's names and layouts.

    Args:
        tensors: name -> array, lazy or not, as the library has them.
        table: key of `TABLES`.
        num_heads: of the attention; it does not follow from the tensors.
        path: where they come from, for errors.

    Returns:
        (Linen name -> array, notes for people).

    Raises:
        UserError: tensors that the table does not know; all are listed.
    """
    if table.startswith('Hugging Face'):
        tensors = {re.sub(r'^(vit|deit)\.', '', key): array for key, array in tensors.items()}
    elif table == 'torchvision':
        tensors = {
            _OLD_TORCHVISION.sub(lambda m: f'{m[1]}.{0 if m[2] == "1" else 3}.', key): array
            for key, array in tensors.items()
        }
    params: dict[str, LazyArray] = {}
    used: set[str] = set()
    notes = []
    for ours, theirs, layout in _expand(TABLES[table], tensors, 1):
        used.add(theirs)
        for index, name in enumerate(ours):
            try:
                params[name] = derive(_from_theirs(layout, num_heads, index), tensors[theirs])
            except (ValueError, IndexError) as e:
                with_heads = f' of {num_heads} heads' if 'heads' in layout or 'q' in layout else ''
                raise UserError(
                    f'{path}: the tensor {theirs!r} has shape {tuple(tensors[theirs].shape)}, '
                    f'which does not fit {table} tensors for {name}{with_heads}: the file is '
                    'of another model, or mixed up'
                ) from e
    if any(key in tensors for key in _UNUSED):
        notes.append('mask_token, for masked pre-training, is left out')
    if unknown := [key for key in tensors if key not in used and key not in _UNUSED]:
        raise UserError(
            f'{path} looks like {table} weights, but {len(unknown)} of its {len(tensors)} tensors '
            'are of no model here (another architecture: layer scale, registers, attention '
            'pooling, ...):\n  '
            + '\n  '.join(printable(f'{key} {tuple(tensors[key].shape)}') for key in unknown)
        )
    return params, notes


def unknown(names: Collection[str], table: str) -> list[str]:
    """Those names of tensors that a table of `TABLES` does not have."""
    used = {theirs for _, theirs, _ in _expand(TABLES[table], names, 1)}
    return [name for name in names if name not in used and name not in _UNUSED]


def from_params(params: Mapping[str, Any], table: str) -> tuple[dict[str, LazyArray], list[str]]:
    """Gives parameters the names and layouts of a library.

    Args:
        params: flat dict, Linen name -> array, lazy or not.
        table: key of `TABLES`. Where two lines begin with the same name of ours, the first counts.

    Returns:
        (their name -> array, the names of ours that the library has no place for).
    """
    tensors: dict[str, LazyArray] = {}
    used: set[str] = set()
    for ours, theirs, layout in _expand(TABLES[table], params, 0):
        if not used.isdisjoint(ours) or not all(name in params for name in ours):
            continue
        used.update(ours)
        tensors[theirs] = derive(_TO_THEIRS[layout], *(params[name] for name in ours))
    return tensors, [name for name in params if name not in used]


def _expand(
    table: list[Line], keys: Collection[str], side: int
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """The lines for those of our (side 0) or their (side 1) names that there are, filled in."""
    for ours, theirs, layout in table:
        escaped = re.escape(theirs if side else ours[0])
        pattern = re.compile(re.sub(r'\\{(\w)\\}', r'(?P<\1>\\d+)', escaped))
        for key in keys:
            if match := pattern.fullmatch(key):
                indices = {name: int(value) for name, value in match.groupdict().items()}
                for zero, one in (('s', 'S'), ('u', 'U')):
                    if one in indices:
                        indices[zero] = indices[one] - 1
                    elif zero in indices:
                        indices[one] = indices[zero] + 1
                names = tuple(name.format(**indices) for name in ours)
                yield names, theirs.format(**indices), layout


def _matrix(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(kernel.shape[0], -1).T


_TO_THEIRS: dict[str, Callable[..., np.ndarray]] = {
    'same': lambda x: x,
    'dense': lambda x: x.T,
    'conv': lambda x: x.transpose(3, 2, 0, 1),
    'heads': _matrix,
    'heads_bias': lambda x: x.reshape(-1),
    'out': lambda x: x.reshape(-1, x.shape[-1]).T,
    'qkv': lambda *x: np.concatenate([_matrix(kernel) for kernel in x]),
    'qkv_bias': lambda *x: np.concatenate([bias.reshape(-1) for bias in x]),
}


def _from_theirs(layout: str, heads: int, index: int) -> Callable[[np.ndarray], np.ndarray]:
    """The inverse of `_TO_THEIRS[layout]`, its output number `index`."""

    def part(x: np.ndarray) -> np.ndarray:
        size = x.shape[0] // 3
        return x[index * size : (index + 1) * size]

    inverse: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        'same': lambda x: x,
        'dense': lambda x: x.T,
        'conv': lambda x: x.transpose(2, 3, 1, 0),
        'heads': lambda x: x.T.reshape(x.shape[1], heads, -1),
        'heads_bias': lambda x: x.reshape(heads, -1),
        'out': lambda x: x.T.reshape(heads, -1, x.shape[0]),
        'qkv': lambda x: part(x).T.reshape(x.shape[1], heads, -1),
        'qkv_bias': lambda x: part(x).reshape(heads, -1),
    }
    return inverse[layout]
