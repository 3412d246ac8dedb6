"""What folders of open_clip tell: open_clip_config.json beside the weights.

By the rules of open_clip 3.3.0. Its image tower is read: a Vision Transformer, its own or timm's.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from vit_jax import files
from vit_jax.checkpoint import library_configs, model_input
from vit_jax.data.normalization import CLIP
from vit_jax.errors import UserError

CONFIG = 'open_clip_config.json'
_POOLING = {'tok': 'token', 'avg': 'gap'}
# Settings of the tower that are computed here with one value only.
_FIXED = {
    **dict.fromkeys(('attentional_pool', 'qk_norm', 'scaled_cosine_attn', 'scale_heads'), False),
    **dict.fromkeys(('scale_attn_inner', 'scale_attn', 'scale_fc'), False),
}
# Those that change no result of a trained model, or that the arrays tell.
_FREE = {
    *('patch_dropout', 'attn_pooler_queries', 'attn_pooler_heads', 'output_tokens', 'block_type'),
    *('pos_embed_type', 'timm_model_pretrained', 'timm_drop', 'timm_drop_path', 'timm_proj_bias'),
    *('patch_size', 'timm_model_name', 'timm_pool', 'timm_proj'),
}
_READ = {
    *('layers', 'width', 'head_width', 'mlp_ratio', 'image_size', 'ls_init_value', 'no_ln_pre'),
    *('final_ln_after_pool', 'pool_type', 'act_kwargs', 'norm_kwargs'),
}


def is_folder(folder: pathlib.Path) -> bool:
    """Whether open_clip is what tells how the weights of a folder are computed."""
    return (folder / CONFIG).is_file() and not (folder / 'config.json').is_file()


def read(folder: pathlib.Path) -> dict[str, Any]:
    """What open_clip_config.json tells.

    Args:
        folder: of open_clip.

    Returns:
        `num_heads`, `settings` and `input` as `library_configs.read`; `renamed`: what names of
        tensors begin with, and should.

    Raises:
        UserError: damaged, or a setting that no model here computes.
    """
    place = folder / CONFIG
    stored = files.read_json(place)
    try:
        model = stored.get('model_cfg', stored)
        vision = {name: value for name, value in model['vision_cfg'].items() if value is not None}
        for name, value in vision.items():
            if value != _FIXED.get(name, value):
                raise UserError(f'{place} has {name}={value!r}, which no model here computes')
            if name not in {*_FIXED, *_FREE, *_READ}:
                raise UserError(
                    f'{place} has the setting {name}={value!r}, which is not known here'
                )
        told = _input(vision, stored.get('preprocess_cfg') or {})
        tower = _timm if vision.get('timm_model_name') else _own
        return {**tower(place, vision, bool(model.get('quick_gelu', False))), 'input': told}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(f'{place} is damaged ({type(e).__name__}: {e})') from e


def _own(place: pathlib.Path, vision: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    """Of the tower that is open_clip's own."""
    width, pooling = int(vision.get('width', 768)), vision.get('pool_type', 'tok')
    if isinstance(vision.get('layers'), list) or pooling not in _POOLING:
        what = 'layers' if pooling in _POOLING else 'pool_type'
        raise UserError(f'{place} has {what}={vision[what]!r}, which no model here computes')
    act, approximate = 'quick_gelu', (vision.get('act_kwargs') or {}).get('approximate', 'none')
    if not quick_gelu:
        act = {'none': 'gelu', 'tanh': 'gelu_tanh'}[approximate]
    last = bool(vision.get('final_ln_after_pool', False))
    settings = {
        'act': act,
        'layer_norm_eps': float((vision.get('norm_kwargs') or {}).get('eps', 1e-5)),
        'representation_act': 'linear',  # of the projection
        'classifier': _POOLING[pooling],
        'class_token': True,
        'fc_norm': last,
        'told_by_arrays': {
            'hidden_size': width,
            'num_layers': int(vision.get('layers', 12)),
            'mlp_dim': int(width * float(vision.get('mlp_ratio', 4.0))),
            'pre_norm': not vision.get('no_ln_pre', False),
            'layer_scale': vision.get('ls_init_value') is not None,
        },
    }
    heads = width // int(vision.get('head_width', 64))
    renamed = {'visual.ln_post.': 'visual.fc_norm.'} if last else {}
    return {'num_heads': heads, 'settings': settings, 'renamed': renamed}


def _timm(place: pathlib.Path, vision: Mapping[str, Any], _quick_gelu: bool) -> dict[str, Any]:
    """Of a tower that is timm's; it has its own activation."""
    projection, pooling = vision.get('timm_proj', 'linear'), vision.get('timm_pool', 'avg')
    if projection not in ('linear', 'none', ''):
        raise UserError(f'{place} has timm_proj={projection!r}, which no model here computes')
    name = str(vision['timm_model_name']).split('.')[0]
    arguments = dict(library_configs.timm_models().get(name, {}))
    if projection == 'linear':  # made with timm's own pooling, whose norm stays
        made = arguments.get('global_pool', 'token')
        arguments.setdefault('fc_norm', made in ('avg', 'max', 'avgmax'))
    if pooling or projection != 'linear':
        arguments['global_pool'] = pooling
    known = library_configs.of_timm_arguments(place, name, arguments)
    known['settings']['representation_act'] = 'linear'
    head = 'visual.head.proj.' if projection == 'linear' else 'visual.trunk.head.'
    return {**known, 'renamed': {head: 'visual.trunk.pre_logits.fc.'}}


def _input(vision: Mapping[str, Any], told: Mapping[str, Any]) -> model_input.ModelInput:
    """How images become pixels: torchvision's transforms, which are timm's with another name."""
    size = told.get('size') or vision.get('image_size', 224)
    height, width = size if isinstance(size, list) else (size, size)
    mean, std = CLIP
    interpolation = told.get('interpolation') or 'bicubic'
    mode = told.get('resize_mode') or 'shortest'
    return model_input.of_timm(
        {
            'pretrained_cfg': {
                'input_size': (3, height, width),
                'mean': told.get('mean') or mean,
                'std': told.get('std') or std,
                'interpolation': 'bilinear' if interpolation == 'bilinear' else 'bicubic',
                'crop_mode': {'shortest': 'center'}.get(mode, mode),
                'crop_pct': 1.0,
            }
        }
    )
