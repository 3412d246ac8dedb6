"""PyTorch's names and layouts of the same models: timm, Hugging Face, torchvision.

`key_tables.csv` has a table for each library, used in both directions. A line says: this layer of
ours is that layer of theirs, laid out so. {i} is the number of a block; {s} and {u} are stage and
unit of a ResNet counted from 0, {S} and {U} the same counted from 1. The layouts:

    same    a single array, no change (tokens, position embeddings)
    rows    a single array [1, N, D]               <-> [N, D]
    vector  a single array [1, 1, D]               <-> [D]
    norm    scale, bias                            <-> weight, bias, no change
    dense   kernel [in, out], bias                 <-> weight [out, in], bias
    conv    kernel [height, width, in, out], bias  <-> weight [out, in, height, width], bias
    kernel  that of `conv` alone
    heads   kernel [D, H, K], bias [H, K]          <-> weight [H * K, D], bias [H * K]
    out     kernel [H, K, D], bias                 <-> weight [D, H * K], bias
    qkv     `heads` of query, key and value        <-> one weight [3 * H * K, D], one bias
    kv      `heads` of key and value               <-> one weight [2 * H * K, D], one bias
    gated   `dense` of gate and Dense_0            <-> one weight [2 * out, in], one bias
    head_bias  that of `heads` alone               <-> an array [H * K]
"""

import csv
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint import eva_names
from vit_jax.checkpoint.arrays import LazyArray, derive
from vit_jax.errors import UserError, printable

# An array: our name (or those whose arrays are one of theirs), their name, how each is laid out.
Line = tuple[tuple[str, ...], str, str]

# Layout of a layer -> its arrays: the ends of our and of their name, and the array's layout.
_ARRAYS = {
    **{name: [('', '', name)] for name in ('same', 'rows', 'vector')},
    'norm': [('/scale', '.weight', 'same'), ('/bias', '.bias', 'same')],
    'dense': [('/kernel', '.weight', 'dense'), ('/bias', '.bias', 'same')],
    'conv': [('/kernel', '.weight', 'conv'), ('/bias', '.bias', 'same')],
    'kernel': [('/kernel', '.weight', 'conv')],
    'heads': [('/kernel', '.weight', 'heads'), ('/bias', '.bias', 'heads_bias')],
    'out': [('/kernel', '.weight', 'out'), ('/bias', '.bias', 'same')],
    'head_bias': [('/bias', '', 'heads_bias')],
}
_HEADS = [('/kernel', 'weight', 'heads'), ('/bias', 'bias', 'heads_bias')]
_DENSE = [('/kernel', 'weight', 'dense'), ('/bias', 'bias', 'same')]
# Layout of several layers that are one of theirs -> their names, and the arrays of each.
_PACKED = {
    'qkv': (('/query', '/key', '/value'), _HEADS),
    'kv': (('/key', '/value'), _HEADS),
    'gated': (('/gate', '/Dense_0'), _DENSE),
}


def _read_tables() -> dict[str, list[Line]]:
    tables: dict[str, list[Line]] = {}
    with open(pathlib.Path(__file__).with_name('key_tables.csv'), encoding='utf-8') as file:
        for row in csv.DictReader(file):
            layout = row['layout']
            parts, arrays = _PACKED[layout] if layout in _PACKED else (('',), _ARRAYS[layout])
            tables.setdefault(row['library'], []).extend(
                (tuple(row['ours'] + part + our_end for part in parts), row['theirs'] + end, array)
                for our_end, end, array in arrays
            )
    hybrid = tables['timm'] + tables['timm hybrid']
    # timm has no extra name for the stem of a backbone that is only a stem (R+ViT-Ti_16).
    stem = [(ours, theirs.replace('.stem.', '.'), layout) for ours, theirs, layout in hybrid]
    for name, gated in (  # gated MLPs in place of plain ones
        *(('timm', 'timm gated'), ('DINOv2', 'DINOv2 gated')),
        ('timm EVA', 'timm EVA-02'),
    ):
        others = [line for line in tables[name] if '}/MlpBlock_0/' not in line[0][0]]
        tables[gated] = others + tables[gated]
    for name, other in (  # of the same classes
        *(('SigLIP', 'CLIP'), ('DINOv3 gated', 'DINOv3')),
        *(('timm DINOv3', 'timm EVA'), ('timm DINOv3 gated', 'timm EVA-02')),
    ):
        tables[name] = tables[other]
    text = [line for line in tables['CLIP text'] if not line[0][0].startswith('head/')]
    tables['SigLIP text'] += text
    return tables | {'timm hybrid': hybrid, 'timm stem hybrid': stem}


TABLES = _read_tables()

_PROJECTION = re.compile(r'(.*/MultiHeadDotProductAttention_0/(query|key|value))/kernel')
# What no image needs.
_LEFT_OUT = {
    'mask_token, for masked pre-training': re.compile(r'(embeddings\.)?mask_token'),
    'the text tower': re.compile(
        r'text(_model)?\..*|text_projection(\.weight)?|logit_(scale|bias)|transformer\..*'
        r'|token_embedding\.weight|positional_embedding|ln_final\..*|attn_mask'
    ),
}
# What the names of the base model's tensors begin with where it is a part of another.
_BASE_MODELS = {
    'Hugging Face': re.compile(r'^(vit|deit)\.'),
    'CLIP': re.compile(r'^vision_model\.'),
    'SigLIP': re.compile(r'^vision_model\.'),
    'DINOv2': re.compile(r'^dinov2(_with_registers)?\.'),
    'DINOv3': re.compile(r'^model\.'),
}
_OLD_TORCHVISION = re.compile(r'(\.mlp)\.linear_([12])\.')


def recognise(tensors: Mapping[str, Any]) -> str:
    """The key of `TABLES` for a state dict (name -> array), or '' if it is of no known library."""
    keys = list(tensors)
    if 'embeddings.patch_embeddings.weight' in keys:
        return 'DINOv3' + (' gated' if any('mlp.gate_proj.' in key for key in keys) else '')
    if any(key.endswith('layer_scale1.lambda1') for key in keys):
        gated = any(key.endswith(('mlp.weights_in.weight', 'mlp.gate_proj.weight')) for key in keys)
        return 'DINOv2 gated' if gated else 'DINOv2'
    if any(key.endswith('embeddings.patch_embedding.weight') for key in keys):
        return 'CLIP' if any(key.endswith('class_embedding') for key in keys) else 'SigLIP'
    if 'visual.conv1.weight' in keys:
        return 'OpenCLIP'
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
    if 'patch_embed.proj.weight' not in keys:
        return ''
    first, second = (tensors.get(f'blocks.0.mlp.fc{n}.weight') for n in (1, 2))
    gated = first is not None and second is not None and first.shape[0] == 2 * second.shape[-1]
    if any(name in tensors for name in eva_names.SIGNS):
        return eva_names.table(tensors, gated)
    return 'timm gated' if gated else 'timm'


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
    for library, prefix in _BASE_MODELS.items():
        if table.startswith(library):
            tensors = {prefix.sub('', key): array for key, array in tensors.items()}
    if table == 'torchvision':
        tensors = {
            _OLD_TORCHVISION.sub(lambda m: f'{m[1]}.{0 if m[2] == "1" else 3}.', key): array
            for key, array in tensors.items()
        }
    params: dict[str, LazyArray] = {}
    used: set[str] = set()
    notes: list[str] = []
    if table in eva_names.TABLES:
        tensors, notes = eva_names.as_in_timm(tensors, path)
    for ours, theirs, layout in _expand(TABLES[table], tensors, 1):
        used.add(theirs)
        for index, name in enumerate(ours):
            try:
                convert = _from_theirs(layout, num_heads, index, len(ours))
                params[name] = derive(convert, tensors[theirs])
            except (ValueError, IndexError) as e:
                with_heads = f' of {num_heads} heads' if 'heads' in layout else ''
                raise UserError(
                    f'{path}: the tensor {theirs!r} has shape {tuple(tensors[theirs].shape)}, '
                    f'which does not fit {table} tensors for {name}{with_heads}: the file is '
                    'of another model, or mixed up'
                ) from e
    if table not in eva_names.TABLES and not table.startswith('DINOv3'):
        notes += _add_missing_biases(params)
    for words, pattern in _LEFT_OUT.items():
        unused = {key for key in tensors if key not in used and pattern.fullmatch(key)}
        notes += [f'{words}: {len(unused)} tensors are left out'] if unused else []
        used |= unused
    if unknown := [key for key in tensors if key not in used]:
        raise UserError(
            f'{path} looks like {table} weights, but {len(unknown)} of its {len(tensors)} tensors '
            'are of no model here (another architecture):\n  '
            + '\n  '.join(printable(f'{key} {tuple(tensors[key].shape)}') for key in unknown)
        )
    return params, notes


def unknown(names: Collection[str], table: str) -> list[str]:
    """Those names of tensors that a table of `TABLES` does not have."""
    used = {theirs for _, theirs, _ in _expand(TABLES[table], names, 1)}
    return [
        name
        for name in names
        if name not in used and not any(p.fullmatch(name) for p in _LEFT_OUT.values())
    ]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor of a library is here.

    Attributes:
        ours: names of the arrays that it holds, one after the other.
        layout: how each is laid out there.
    """

    ours: tuple[str, ...]
    layout: str

    def read(self, tensor: np.ndarray, num_heads: int) -> dict[str, np.ndarray]:
        """Our arrays, from the tensor; `ValueError` if it has another shape than such a one."""
        count = len(self.ours)
        return {
            name: _from_theirs(self.layout, num_heads, index, count)(tensor)
            for index, name in enumerate(self.ours)
        }

    def change(
        self,
        params: Mapping[str, Any],
        num_heads: int,
        change: Callable[[np.ndarray], np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Our arrays, from what `change` makes of the tensor that they are there."""
        arrays = [np.asarray(params[name]) for name in self.ours]
        return self.read(change(_to_theirs(self.layout)(*arrays)), num_heads)


def places(names: Collection[str], params: Collection[str]) -> dict[str, Place]:
    """Where tensors of some library are here.

    Args:
        names: of tensors, perhaps with the name of their base model in front ('vit.'), of any
            library.
        params: our names that there are; others are in no place, but those of heads, which may be
            new.

    Returns:
        Name -> place, of those that have one.
    """
    found: dict[str, Place] = {}
    for shorten in (lambda name: name, lambda name: name.partition('.')[2]):
        plain = {shorten(name): name for name in names}
        for table in TABLES.values():
            for ours, theirs, layout in _expand(table, plain, 1):
                if all(name in params or name.startswith('head') for name in ours):
                    found.setdefault(plain[theirs], Place(ours, layout))
    return found


def spellings(name: str, table: str) -> list[str]:
    """How a library calls an array of ours, in versions of it; none if it is a part of another."""
    lines = _expand(TABLES[table], [name], 0)
    return [theirs for ours, theirs, _ in lines if ours == (name,)]


def _add_missing_biases(params: dict[str, LazyArray]) -> list[str]:
    """Gives queries, keys, values and projection the biases that they lack; what is to be known."""
    lacking = {}
    for name in list(params):
        match = _PROJECTION.fullmatch(name)
        if match and (bias := f'{match[1]}/bias') not in params:
            shape = params[name].shape[1:]
            params[bias] = LazyArray(shape, functools.partial(np.zeros, shape, np.float32))
            lacking[match[2]] = bias
    if 'pre_logits/kernel' in params and 'pre_logits/bias' not in params:  # CLIP's projection
        shape = params['pre_logits/kernel'].shape[1:]
        params['pre_logits/bias'] = LazyArray(shape, functools.partial(np.zeros, shape, np.float32))
    words = f'{" and ".join(lacking)} of the attention have no bias: it is zeros'
    return [words] if lacking else []


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
        tensors[theirs] = derive(_to_theirs(layout), *(params[name] for name in ours))
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
    'rows': lambda x: x[0],
    'vector': lambda x: x[0, 0],
    'dense': lambda x: x.T,
    'conv': lambda x: x.transpose(3, 2, 0, 1),
    'heads': _matrix,
    'heads_bias': lambda x: x.reshape(-1),
    'out': lambda x: x.reshape(-1, x.shape[-1]).T,
}


def _to_theirs(layout: str) -> Callable[..., np.ndarray]:
    """From our arrays, one or several, to theirs, one."""
    convert = _TO_THEIRS[layout]

    def pack(*arrays: np.ndarray) -> np.ndarray:
        converted = [convert(array) for array in arrays]
        return np.concatenate(converted) if len(converted) > 1 else converted[0]

    return pack


def _from_theirs(
    layout: str, heads: int, index: int, count: int
) -> Callable[[np.ndarray], np.ndarray]:
    """From their array to ours, number `index` of `count`: the inverse of `_to_theirs`."""
    inverse: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        'same': lambda x: x,
        'rows': lambda x: x[None],
        'vector': lambda x: x[None, None],
        'dense': lambda x: x.T,
        'conv': lambda x: x.transpose(2, 3, 1, 0),
        'heads': lambda x: x.T.reshape(x.shape[1], heads, -1),
        'heads_bias': lambda x: x.reshape(heads, -1),
        'out': lambda x: x.T.reshape(heads, -1, x.shape[0]),
    }
    convert = inverse[layout]
    return lambda x: convert(np.split(x, count)[index] if count > 1 else x)
