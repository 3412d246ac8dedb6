"""A model as a folder of timm: its configuration, and where its tensors differ from the table."""

import math
from collections.abc import Mapping
from typing import Any

from vit_jax import variants
from vit_jax.checkpoint import model_input
from vit_jax.checkpoint.arrays import derive
from vit_jax.checkpoint.library_configs import evas, timm_models
from vit_jax.export.expressible import (
    UnsupportedError,
    check_epsilon,
    check_pieces,
    patch_size,
    pieces,
    settings_of,
)
from vit_jax.inference import model_folder

_SIZE_WORDS = {192: 'tiny', 384: 'small', 768: 'base', 1024: 'large', 1280: 'huge'}
# The pieces that timm's VisionTransformer has.
_HAS = {
    *('layer_scale', 'gated_mlp', 'pre_norm', 'qk_norm', 'registers', 'register_positions'),
    *('fc_norm', 'final_norm', 'patch_bias', 'distilled', 'resnet'),
}
# Those of its Eva, and those that only it has.
_EVA_ONLY = {'rotary', 'mlp_norm', 'attention_norm', 'qkv_bias'}
_EVA_HAS = {
    *_EVA_ONLY,
    *('layer_scale', 'gated_mlp', 'qk_norm', 'registers', 'register_positions', 'fc_norm'),
    *('final_norm', 'add_position_embedding'),
}
_TIMM_POOLING = {'token': 'token', 'gap': 'avg', 'max': 'max', 'avgmax': 'avgmax', 'map': 'map'}
_TIMM_VITS = {
    *('tiny_patch16', 'small_patch8', 'small_patch16', 'small_patch32', 'base_patch8'),
    *('base_patch16', 'base_patch32', 'large_patch16', 'large_patch32', 'huge_patch14'),
}
# (units in each stage, width of the encoder or None for any) -> timm's model.
_TIMM_HYBRIDS = {
    ((), None): 'vit_tiny_r_s16_p8_224',
    ((2, 2, 2, 2), 384): 'vit_small_r26_s32_224',
    ((2, 2, 2, 2), None): 'vit_base_r26_s32_224',
    ((3, 4, 9), None): 'vit_base_r50_s16_224',
    ((3, 4, 6, 3), None): 'vit_large_r50_s32_224',
}
# (patch, width, blocks): timm's functions take no others.
_TIMM_MIXERS = {
    (16, 512, 8): 'mixer_s16_224',
    (32, 512, 8): 'mixer_s32_224',
    (16, 768, 12): 'mixer_b16_224',
    (32, 768, 12): 'mixer_b32_224',
    (16, 1024, 24): 'mixer_l16_224',
    (32, 1024, 24): 'mixer_l32_224',
}


def describe(model: model_folder.Model, flat: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a model is in timm; arguments and result as of `to_hugging_face.describe`."""
    config, patch = model.model_config, patch_size(model.model_config)
    settings = settings_of(config)
    check_epsilon(settings)
    arguments: dict[str, Any] = {'img_size': model.image_size}
    if model.channels != 3:
        arguments['in_chans'] = model.channels
    first_layer = 'patch_embed.proj'
    if variants.is_mixer(config):
        key = (patch, config['hidden_dim'], config['num_blocks'])
        if settings['act'] not in ('gelu', 'gelu_tanh'):
            raise UnsupportedError(f'its Mixer has the activation gelu, not {settings["act"]}')
        if key not in _TIMM_MIXERS:
            raise UnsupportedError(f'it has no Mixer of patch {key[0]}, width {key[1]}')
        table, architecture, width, pool = 'timm Mixer', _TIMM_MIXERS[key], key[1], 'avg'
        arguments['mlp_ratio'] = [
            config[f'{axis}_mlp_dim'] / width for axis in ('tokens', 'channels')
        ]
        first_layer = 'stem.proj'
    else:
        is_eva = not _EVA_ONLY.isdisjoint(pieces(config))
        has = (_EVA_HAS, 'its Eva') if is_eva else (_HAS, 'its VisionTransformer')
        check_pieces(config, *has)
        if settings['classifier'] not in _TIMM_POOLING:
            raise UnsupportedError(f'it has no classifier {settings["classifier"]!r}')
        table, architecture = _timm_eva(flat, config) if is_eva else _timm_vit(flat, config)
        encoder, width = config['transformer'], config['hidden_size']
        pool = _TIMM_POOLING[settings['classifier']]
        arguments |= {
            'patch_size': patch,
            'embed_dim': width,
            'depth': encoder['num_layers'],
            'num_heads': encoder['num_heads'],
            'mlp_ratio': _mlp_ratio(encoder['mlp_dim'], width),
        }
        if is_eva:
            arguments |= _eva_arguments(config, pool)
        else:
            arguments |= {'act_layer': settings['act']} | _arguments(config, pool, architecture)
    names = model_folder.own_class_names(model)
    described = {
        'architecture': architecture,
        'num_classes': model.model.num_classes,
        'num_features': width,
        'global_pool': pool,
        'model_args': arguments,
        'pretrained_cfg': {
            'input_size': [model.channels, *model.preprocess.size],
            'fixed_input_size': True,
            **model_input.to_timm(model.preprocess),
            'mean': [0.5] * model.channels,
            'std': [0.5] * model.channels,
            'num_classes': model.model.num_classes,
            'first_conv': first_layer,
            'classifier': ['head', 'head_dist'] if 'dist' in flat else 'head',
            **({'label_names': list(names)} if names else {}),
        },
    }
    return table, {'config.json': described}


def _arguments(config: Mapping[str, Any], pool: str, architecture: str) -> dict[str, Any]:
    """The arguments that say which pieces a model has; of a plain ViT the defaults are right."""
    encoder, front = config['transformer'], variants.tokens_in_front(config)
    plain = timm_models().get(architecture, {}).keys() <= {'embed_dim', 'num_heads'}
    if plain and pool == 'token' and pieces(config).keys() <= {'distilled', 'resnet'}:
        return {}
    if bool(encoder.get('pre_norm')) == config.get('patch_bias', True):
        raise UnsupportedError(
            'it has patches without a bias where there is a norm in front of the encoder, and only '
            'there'
        )
    arguments = {
        'class_token': 'cls' in front,
        'reg_tokens': front.get('registers', 0),
        'no_embed_class': variants.prefix_positions(config) < sum(front.values()),
        'global_pool': pool,
        'fc_norm': bool(config.get('fc_norm')),
        'final_norm': config.get('final_norm', True),
        'pre_norm': bool(encoder.get('pre_norm')),
        'qk_norm': bool(encoder.get('qk_norm')),
        'init_values': 1e-5 if encoder.get('layer_scale') else None,
    }
    if 'resnet' in config or 'dist' in front:  # which come with a class token, and no registers
        arguments = {name: arguments[name] for name in ('global_pool', 'fc_norm', 'class_token')}
    if encoder.get('gated_mlp'):  # its first layer has both halves
        arguments['mlp_ratio'] = _mlp_ratio(2 * encoder['mlp_dim'], config['hidden_size'])
    return arguments


def _mlp_ratio(hidden: int, width: int) -> float:
    """What, times the width and rounded down, is the width of the hidden layer."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _eva_arguments(config: Mapping[str, Any], pool: str) -> dict[str, Any]:
    """The arguments of timm's Eva, all that its architectures set otherwise."""
    encoder, front = config['transformer'], variants.tokens_in_front(config)
    gated, mlp_norm = bool(encoder.get('gated_mlp')), bool(encoder.get('mlp_norm'))
    final_norm, fc_norm = config.get('final_norm', True), bool(config.get('fc_norm'))
    rotary = config.get('rotary') or {}
    own_form, grid = rotary.get('form') == 'dinov3', rotary.get('grid')
    return {
        'dynamic_img_size': False,
        'swiglu_mlp': gated,
        'swiglu_align_to': int(gated and not mlp_norm),  # 1 changes no size
        'scale_mlp': mlp_norm,
        'scale_attn_inner': bool(encoder.get('attention_norm')),
        'qkv_fused': False,
        'qkv_bias': encoder.get('qkv_bias') == 'qv',
        'qk_norm': bool(encoder.get('qk_norm')),
        'init_values': 1e-5 if encoder.get('layer_scale') else None,
        'class_token': 'cls' in front,
        'num_reg_tokens': front.get('registers', 0),
        'no_embed_class': variants.prefix_positions(config) < sum(front.values()),
        'use_abs_pos_emb': encoder.get('add_position_embedding', True),
        'use_rot_pos_emb': bool(rotary),
        'rope_type': 'dinov3' if own_form else 'cat',
        'rope_rotate_half': own_form,
        'rope_temperature': rotary.get('theta', 10_000.0),
        'ref_feat_shape': [grid, grid] if grid else None,
        'global_pool': pool,
        'use_fc_norm': fc_norm,
        'use_post_transformer_norm': final_norm and not fc_norm,
    }


def with_positions(named: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors, as a model of timm has them whose position embeddings are the patches' alone.

    Where registers have no position embedding, timm gives the class token none, either: it is added
    to the token.

    Args:
        named: the tensors, as `key_tables.from_params` names them.
        config: of the model.
    """
    tensors = dict(named)
    own = not config.get('register_positions') and 'pos_embed' in tensors
    if own and 'reg_token' in tensors and 'cls_token' in tensors:
        cls, position = tensors['cls_token'], tensors['pos_embed']
        tensors['cls_token'] = derive(lambda token, rows: token + rows[:, :1], cls, position)
        tensors['pos_embed'] = derive(lambda rows: rows[:, 1:], position)
    return tensors


def _timm_eva(flat: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, str]:
    """(table, architecture) of a model whose class is Eva in timm."""
    encoder, settings = config['transformer'], settings_of(config)
    gated = bool(encoder.get('gated_mlp'))
    if 'pre_logits/kernel' in flat or settings['classifier'] == 'map':
        raise UnsupportedError("its Eva has no pre_logits, and not this attention pooling ('map')")
    if settings['act'] != (act := 'silu' if gated else 'gelu'):
        raise UnsupportedError(f'its Eva has the activation {act}, not {settings["act"]}')
    if encoder.get('qkv_bias', 'qkv') not in ('qv', ''):
        raise UnsupportedError('its Eva has biases of queries and values, or none of the three')
    # Any of them makes any Eva, but its epsilon: model_args has no word for that.
    epsilon, name = settings['layer_norm_eps'], str(config.get('model_name'))
    own = timm_models()[name] if name in evas() else None
    if own is None or own.get('norm_layer', {}).get('eps', 1e-6) != epsilon:
        name = 'vit_small_patch16_dinov3' if epsilon == 1e-5 else 'eva02_tiny_patch14_224'
    return 'timm EVA-02' if gated else 'timm EVA', name


def _timm_vit(flat: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, str]:
    """(table, architecture) of a ViT, DeiT or hybrid."""
    if 'pre_logits/kernel' in flat:  # old timm had one, as pre_logits.fc: it is read, not written
        raise UnsupportedError('it has no pre_logits')
    width, patch = config['hidden_size'], patch_size(config)
    hybrid = config.get('resnet')
    if hybrid is not None:
        units = tuple(hybrid['num_layers'])
        name = _TIMM_HYBRIDS.get((units, width)) or _TIMM_HYBRIDS.get((units, None))
        if name is None or hybrid.get('width_factor', 1) != 1:
            raise UnsupportedError(f'it has no hybrid with ResNet stages of {units} units')
        return ('timm hybrid' if units else 'timm stem hybrid'), name
    encoder = config['transformer']
    if encoder.get('gated_mlp'):
        if config.get('act') != 'silu':
            raise UnsupportedError('its gated MLPs have the activation silu')
        return 'timm gated', 'vit_giant_patch14_dinov2'
    if config.get('layer_norm_eps') == 1e-5:  # which only these have
        return 'timm', f'vit_base_patch{32 if patch == 32 else 16}_clip_224'
    own = str(config.get('model_name'))
    if own in timm_models() and own.islower():
        return 'timm', own
    size = _SIZE_WORDS.get(width, 'base')
    if 'dist' in flat:
        size = size if size in ('tiny', 'small', 'base') else 'base'
        return 'timm', f'deit_{size}_distilled_patch16_224'
    name = f'{size}_patch{patch}'
    # Any of them makes any ViT: model_args has all sizes.
    return 'timm', f'vit_{name if name in _TIMM_VITS else "base_patch16"}_224'
