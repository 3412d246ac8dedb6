"""What folders of open_clip tell: open_clip_config.json beside the weights.

By the rules of open_clip 3.3.0. An image tower is a Vision Transformer, its own or timm's; a text
tower is its own text transformer.
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
_PROJECTED = ('linear', 'none')  # whether the text tower has a last matrix
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
# The same of the text tower.
_TEXT_FIXED = {
    **dict.fromkeys(('qk_norm', 'scaled_cosine_attn', 'scale_heads', 'embed_cls'), False),
    **dict.fromkeys(('scale_attn_inner', 'scale_attn', 'scale_fc'), False),
    **dict.fromkeys(('hf_model_name', 'ls_init_value', 'tokenizer_mode'), ''),
}
_TEXT_FREE = {
    *('width', 'layers', 'vocab_size', 'mlp_ratio', 'block_type', 'output_tokens', 'pad_id'),
    *('final_ln_after_pool', 'hf_model_pretrained', 'hf_proj_type', 'hf_pooler_type', 'proj_bias'),
}
_TEXT_READ = {
    *('context_length', 'heads', 'no_causal_mask', 'pool_type', 'eos_id', 'proj_type'),
    *('act_kwargs', 'norm_kwargs', 'hf_tokenizer_name', 'tokenizer_kwargs'),
}
# What `tokenizer_kwargs` may say, and what that is in `data.text.JsonTokenizer`.
_CLEANED: Mapping[str, Mapping[str, bool]] = {
    'whitespace': {},
    'lower': {'lower': True},
    'canonicalize': {'canonical': True},
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
    last = bool(vision.get('final_ln_after_pool', False))
    settings = {
        **_activation_and_epsilon(vision, quick_gelu),
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


def read_text(folder: pathlib.Path) -> dict[str, Any]:
    """What open_clip_config.json tells of the text tower and its tokenizer.

    Args:
        folder: of open_clip.

    Returns:
        `num_heads`; `arguments` of `models.text.TextTransformer` that the arrays do not tell;
        `pool_type`, 'argmax' (the token of the largest id is read), 'eos' (`eos_id` is) or 'last';
        `eos_id`; `pp`, arguments of `data.text.JsonTokenizer`; `of_clip`, whether the tokenizer is
        CLIP's, which fills texts up with id 0.

    Raises:
        UserError: damaged, or a setting that no model here computes.
    """
    place = folder / CONFIG
    stored = files.read_json(place)
    try:
        model = stored.get('model_cfg', stored)
        if model.get('multimodal_cfg') is not None:
            raise UserError(f'{place} is of a CoCa (multimodal_cfg), which no model here computes')
        text = {name: value for name, value in model['text_cfg'].items() if value is not None}
        for name, value in text.items():
            if name in _TEXT_FIXED and value not in (_TEXT_FIXED[name], None):
                raise UserError(f'{place} has {name}={value!r}, which no text tower here computes')
            if name not in {*_TEXT_FIXED, *_TEXT_FREE, *_TEXT_READ}:
                raise UserError(
                    f'{place} has the setting {name}={value!r}, which is not known here'
                )
        for name, known in (('pool_type', ('argmax', 'eos', 'last')), ('proj_type', _PROJECTED)):
            if text.get(name, known[0]) not in known:
                raise UserError(
                    f'{place} has {name}={text[name]!r} in text_cfg; known: {", ".join(known)}'
                )
        arguments = _activation_and_epsilon(text, bool(model.get('quick_gelu', False)))
        return {
            'num_heads': int(text.get('heads', 8)),
            'arguments': {**arguments, 'causal': not text.get('no_causal_mask', False)},
            'pool_type': text.get('pool_type', 'argmax'),
            'eos_id': int(text.get('eos_id', 2)),
            'pp': _cleaning(place, dict(text.get('tokenizer_kwargs') or {})),
            'of_clip': not text.get('hf_tokenizer_name'),
        }
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(f'{place} is damaged ({type(e).__name__}: {e})') from e


def _cleaning(place: pathlib.Path, told: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a text before it is divided into tokens, and of its end mark."""
    clean, strip = told.pop('clean', 'whitespace'), told.pop('strip_sep_token', False)
    if told or clean not in _CLEANED:
        what = next(iter({**told, 'clean': clean}.items()))
        raise UserError(f'{place} has {what[0]}={what[1]!r} in tokenizer_kwargs, not known here')
    return {**_CLEANED[clean], **({'blank_token': '[SEP]'} if strip else {})}


def _activation_and_epsilon(tower: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    act, approximate = 'quick_gelu', (tower.get('act_kwargs') or {}).get('approximate', 'none')
    if not quick_gelu:
        act = {'none': 'gelu', 'tanh': 'gelu_tanh'}[approximate]
    return {'act': act, 'layer_norm_eps': float((tower.get('norm_kwargs') or {}).get('eps', 1e-5))}


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
