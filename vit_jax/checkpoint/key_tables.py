"""PyTorch's names and layouts of the same models: timm, Hugging Face, torchvision.

One table for each library, used in both directions. A line says: this parameter of ours is that
tensor of theirs, laid out so. The layouts:

    same        no change (vectors, tokens, position embeddings)
    dense       kernel [in, out]                      <-> weight [out, in]
    conv        kernel [height, width, in, out]       <-> weight [out, in, height, width]
    heads       kernel [D, H, K] of query/key/value   <-> weight [H * K, D]
    heads_bias  bias [H, K]                           <-> bias [H * K]
    out         kernel [H, K, D] of the projection    <-> weight [D, H * K]
    qkv         query, key and value kernels          <-> one weight [3 * H * K, D]
    qkv_bias    query, key and value biases           <-> one bias [3 * H * K]
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.checkpoint.arrays import LazyArray, derive
from vit_jax.errors import UserError

# A line of a table: our name (three for qkv), their name, layout. {i} is the number of a block;
# {s}, {u} stage and unit of a ResNet counted from 0, {S}, {U} the same counted from 1.
Line = tuple[str | tuple[str, ...], str, str]

_BLOCK = 'Transformer/encoderblock_{i}'
_ATTENTION = f'{_BLOCK}/MultiHeadDotProductAttention_0'
_POSITION = 'Transformer/posembed_input/pos_embedding'
_UNIT = 'block{S}/unit{U}'


def _norm(ours: str, theirs: str) -> list[Line]:
    return [
        (f'{ours}/scale', f'{theirs}.weight', 'same'),
        (f'{ours}/bias', f'{theirs}.bias', 'same'),
    ]


def _layer(ours: str, theirs: str, layout: str = 'dense') -> list[Line]:
    bias = 'heads_bias' if layout == 'heads' else 'same'
    return [
        (f'{ours}/kernel', f'{theirs}.weight', layout),
        (f'{ours}/bias', f'{theirs}.bias', bias),
    ]


def _qkv(weight: str, bias: str) -> list[Line]:
    projections = [f'{_ATTENTION}/{name}' for name in ('query', 'key', 'value')]
    return [
        (tuple(f'{name}/kernel' for name in projections), weight, 'qkv'),
        (tuple(f'{name}/bias' for name in projections), bias, 'qkv_bias'),
    ]


def _hugging_face(attention: Sequence[str], mlp: Sequence[str], layers: str) -> list[Line]:
    query, key, value, out = (f'{layers}.{{i}}.attention.{name}' for name in attention)
    return [
        ('cls', 'embeddings.cls_token', 'same'),
        ('dist', 'embeddings.distillation_token', 'same'),
        (_POSITION, 'embeddings.position_embeddings', 'same'),
        *_layer('embedding', 'embeddings.patch_embeddings.projection', 'conv'),
        *_norm(f'{_BLOCK}/LayerNorm_0', f'{layers}.{{i}}.layernorm_before'),
        *_layer(f'{_ATTENTION}/query', query, 'heads'),
        *_layer(f'{_ATTENTION}/key', key, 'heads'),
        *_layer(f'{_ATTENTION}/value', value, 'heads'),
        *_layer(f'{_ATTENTION}/out', out, 'out'),
        *_norm(f'{_BLOCK}/LayerNorm_1', f'{layers}.{{i}}.layernorm_after'),
        *_layer(f'{_BLOCK}/MlpBlock_0/Dense_0', f'{layers}.{{i}}.{mlp[0]}'),
        *_layer(f'{_BLOCK}/MlpBlock_0/Dense_1', f'{layers}.{{i}}.{mlp[1]}'),
        *_norm('Transformer/encoder_norm', 'layernorm'),
        *_layer('pre_logits', 'pooler.dense'),
        *_layer('head', 'classifier'),
        *_layer('head', 'cls_classifier'),
        *_layer('head_dist', 'distillation_classifier'),
    ]


TABLES: dict[str, list[Line]] = {
    'timm': [
        ('cls', 'cls_token', 'same'),
        ('dist', 'dist_token', 'same'),
        (_POSITION, 'pos_embed', 'same'),
        *_layer('embedding', 'patch_embed.proj', 'conv'),
        *_norm(f'{_BLOCK}/LayerNorm_0', 'blocks.{i}.norm1'),
        *_qkv('blocks.{i}.attn.qkv.weight', 'blocks.{i}.attn.qkv.bias'),
        *_layer(f'{_ATTENTION}/out', 'blocks.{i}.attn.proj', 'out'),
        *_norm(f'{_BLOCK}/LayerNorm_1', 'blocks.{i}.norm2'),
        *_layer(f'{_BLOCK}/MlpBlock_0/Dense_0', 'blocks.{i}.mlp.fc1'),
        *_layer(f'{_BLOCK}/MlpBlock_0/Dense_1', 'blocks.{i}.mlp.fc2'),
        *_norm('Transformer/encoder_norm', 'norm'),
        *_layer('pre_logits', 'pre_logits.fc'),
        *_layer('head', 'head'),
        *_layer('head_dist', 'head_dist'),
    ],
    'timm Mixer': [
        *_layer('stem', 'stem.proj', 'conv'),
        *_norm('MixerBlock_{i}/LayerNorm_0', 'blocks.{i}.norm1'),
        *_layer('MixerBlock_{i}/token_mixing/Dense_0', 'blocks.{i}.mlp_tokens.fc1'),
        *_layer('MixerBlock_{i}/token_mixing/Dense_1', 'blocks.{i}.mlp_tokens.fc2'),
        *_norm('MixerBlock_{i}/LayerNorm_1', 'blocks.{i}.norm2'),
        *_layer('MixerBlock_{i}/channel_mixing/Dense_0', 'blocks.{i}.mlp_channels.fc1'),
        *_layer('MixerBlock_{i}/channel_mixing/Dense_1', 'blocks.{i}.mlp_channels.fc2'),
        *_norm('pre_head_layer_norm', 'norm'),
        *_layer('head', 'head'),
    ],
    'Hugging Face': _hugging_face(
        ('attention.query', 'attention.key', 'attention.value', 'output.dense'),
        ('intermediate.dense', 'output.dense'),
        'encoder.layer',
    ),
    'Hugging Face v5': _hugging_face(
        ('q_proj', 'k_proj', 'v_proj', 'o_proj'), ('mlp.fc1', 'mlp.fc2'), 'layers'
    ),
    'torchvision': [
        ('cls', 'class_token', 'same'),
        (_POSITION, 'encoder.pos_embedding', 'same'),
        *_layer('embedding', 'conv_proj', 'conv'),
        *_norm(f'{_BLOCK}/LayerNorm_0', 'encoder.layers.encoder_layer_{i}.ln_1'),
        *_qkv(
            'encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight',
            'encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias',
        ),
        *_layer(
            f'{_ATTENTION}/out', 'encoder.layers.encoder_layer_{i}.self_attention.out_proj', 'out'
        ),
        *_norm(f'{_BLOCK}/LayerNorm_1', 'encoder.layers.encoder_layer_{i}.ln_2'),
        *_layer(f'{_BLOCK}/MlpBlock_0/Dense_0', 'encoder.layers.encoder_layer_{i}.mlp.0'),
        *_layer(f'{_BLOCK}/MlpBlock_0/Dense_1', 'encoder.layers.encoder_layer_{i}.mlp.3'),
        *_norm('Transformer/encoder_norm', 'encoder.ln'),
        *_layer('pre_logits', 'heads.pre_logits'),
        *_layer('head', 'heads.head'),
    ],
}


def _resnet(root: str, units: str) -> list[Line]:
    return [
        ('conv_root/kernel', f'{root}conv.weight', 'conv'),
        *_norm('gn_root', f'{root}norm'),
        *[(f'{_UNIT}/conv{n}/kernel', f'{units}.conv{n}.weight', 'conv') for n in (1, 2, 3)],
        *[line for n in (1, 2, 3) for line in _norm(f'{_UNIT}/gn{n}', f'{units}.norm{n}')],
        (f'{_UNIT}/conv_proj/kernel', f'{units}.downsample.conv.weight', 'conv'),
        *_norm(f'{_UNIT}/gn_proj', f'{units}.downsample.norm'),
    ]


# timm has no extra name for the stem of a backbone that is only a stem (R+ViT-Ti_16).
TABLES['timm hybrid'] = TABLES['timm'] + _resnet(
    'patch_embed.backbone.stem.', 'patch_embed.backbone.stages.{s}.blocks.{u}'
)
TABLES['timm stem hybrid'] = TABLES['timm'] + _resnet(
    'patch_embed.backbone.', 'patch_embed.backbone.stages.{s}.blocks.{u}'
)

# Tensors that a classifier does not use, and why.
_UNUSED = {
    'embeddings.mask_token': 'mask_token, for masked pre-training, is left out',
    'mask_token': 'mask_token, for masked pre-training, is left out',
}
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
    for key, why in _UNUSED.items():
        if key in tensors:
            used.add(key)
            notes.append(why)
    if unknown := [key for key in tensors if key not in used]:
        raise UserError(
            f'{path} looks like {table} weights, but {len(unknown)} of its {len(tensors)} tensors '
            'are of no model here (another architecture: layer scale, registers, attention '
            'pooling, ...):\n  '
            + '\n  '.join(f'{key} {tuple(tensors[key].shape)}' for key in unknown)
        )
    return params, notes


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
    table: list[Line], keys: Mapping[str, Any], side: int
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yields (ours, theirs, layout) for the keys that there are, found on one side of the table.

    Args:
        table: the lines.
        keys: names of arrays, ours (side 0) or theirs (side 1).
        side: see `keys`.
    """
    for our_names, theirs, layout in table:
        ours = (our_names,) if isinstance(our_names, str) else our_names
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
