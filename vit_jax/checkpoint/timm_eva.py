"""What timm's class Eva computes: EVA, EVA-02, DINOv3 and others with rotary positions.

Source: timm 1.0.31, `models/eva.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError

_DINOV3 = {'layer_norm_eps': 1e-5, 'rotary': {'form': 'dinov3', 'theta': 100.0}}
_EVA = {'layer_norm_eps': 1e-6, 'classifier': 'gap', 'class_token': True, 'fc_norm': True}
_EVA02 = _EVA | {'act': 'silu', 'rotary': {'form': 'axial', 'theta': 10_000.0, 'grid': 16}}
# What models are whose file does not tell, by the table of `key_tables` that has their names.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    'timm DINOv3 gated': _DINOV3 | {'act': 'silu'},
    'timm DINOv3': _DINOV3 | {'act': 'gelu'},
    'timm EVA-02': _EVA02,
    'timm EVA': _EVA | {'act': 'gelu'},
}

POOLING = {'token': 'token', 'avg': 'gap', 'max': 'max', 'avgmax': 'avgmax'}
# Arguments that `settings` reads, that change no result of a trained model, or that arrays tell.
FREE = {
    *('img_size', 'patch_size', 'in_chans', 'num_classes', 'embed_dim', 'depth', 'mlp_ratio'),
    *('dynamic_img_size', 'dynamic_img_pad', 'drop_rate', 'pos_drop_rate', 'patch_drop_rate'),
    *('proj_drop_rate', 'attn_drop_rate', 'drop_path_rate', 'head_init_scale', 'features_only'),
    *('num_heads', 'qkv_bias', 'qkv_fused', 'qk_norm', 'swiglu_mlp', 'swiglu_align_to'),
    *('scale_mlp', 'scale_attn_inner', 'init_values', 'class_token', 'num_reg_tokens'),
    *('no_embed_class', 'use_abs_pos_emb', 'use_rot_pos_emb', 'rope_temperature', 'rope_type'),
    *('rope_rotate_half', 'rope_shift_coords', 'rope_jitter_coords', 'rope_rescale_coords'),
    *('ref_feat_shape', 'global_pool', 'use_fc_norm', 'use_post_transformer_norm'),
}
# The values of others that are computed here.
KNOWN: Mapping[str, Sequence[Any]] = {
    'norm_layer': (),
    'attn_type': ('eva',),
    'num_kv_heads': (None,),
    'attn_only_layer_scale': (False,),
    'rope_grid_offset': (0,),
    'rope_grid_indexing': ('ij',),
    'use_post_norm': (False,),
    'use_pre_transformer_norm': (False,),
}


def settings(place: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `models.VisionTransformer` that a model of this class has.

    Args:
        place: of the arguments, for errors.
        arguments: of the class, all of them in `FREE` or `KNOWN`.

    Raises:
        UserError: no model here computes it.
    """
    pooling = arguments.get('global_pool', 'avg')
    if pooling not in POOLING:
        raise UserError(f'{place} has global_pool={pooling!r}; known: {", ".join(POOLING)}')
    fc_norm = arguments.get('use_fc_norm')
    fc_norm = pooling == 'avg' if fc_norm is None else bool(fc_norm)
    final_norm = arguments.get('use_post_transformer_norm')
    final_norm = not fc_norm if final_norm is None else bool(final_norm)
    if fc_norm and final_norm:
        raise UserError(f'{place} has two norms behind its blocks, and no model here has')
    gated = bool(arguments.get('swiglu_mlp'))
    return {
        'act': 'silu' if gated else 'gelu',
        'layer_norm_eps': 1e-6,
        'classifier': POOLING[pooling],
        'class_token': bool(arguments.get('class_token', True)),
        'fc_norm': fc_norm,
        'final_norm': final_norm or fc_norm,
        'rotary': _rotary(place, arguments) if arguments.get('use_rot_pos_emb') else None,
        'told_by_arrays': {
            'gated_mlp': gated,
            'mlp_norm': bool(arguments.get('scale_mlp')),
            'attention_norm': bool(arguments.get('scale_attn_inner')),
            'qk_norm': bool(arguments.get('qk_norm')),
            'qkv_bias': 'qv' if arguments.get('qkv_bias', True) else '',
            'layer_scale': arguments.get('init_values') is not None,
            'registers': int(arguments.get('num_reg_tokens', 0)),
        },
    }


def _rotary(place: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    kind, half = arguments.get('rope_type', 'cat'), bool(arguments.get('rope_rotate_half'))
    theta = float(arguments.get('rope_temperature', 10_000.0))
    if (kind, half) == ('dinov3', True):
        return {'form': 'dinov3', 'theta': theta}
    grid = arguments.get('ref_feat_shape') or 0
    square = isinstance(grid, int) or len(set(grid)) == 1
    if (kind, half) != ('cat', False) or not square:
        raise UserError(
            f'{place} has rotary positions with rope_type={kind!r}, rope_rotate_half={half}, '
            f'ref_feat_shape={grid!r}, which no model here computes'
        )
    return {'form': 'axial', 'theta': theta, 'grid': grid if isinstance(grid, int) else grid[0]}
