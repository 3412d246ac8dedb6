"""Tells the architecture of a model from the shapes of its parameters."""

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from vit_jax import models, variants
from vit_jax.checkpoint import resize
from vit_jax.checkpoint.adapt import POSITION_EMBEDDING, describe, prefix_positions
from vit_jax.checkpoint.npz import flatten
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.encoder import Encoder
from vit_jax.models.layers import ACTIVATIONS
from vit_jax.models.rotary import Rotary

EVERY_MODEL = ('act', 'layer_norm_eps')  # arguments that name no architecture
OUTPUTS = ('multi_label', 'regression')  # those that say what the outputs are, see `inference.task`
_NO_ARCHITECTURE = (*EVERY_MODEL, *OUTPUTS, 'representation_act')
# Arguments that the arrays tell, and what is no part of an architecture.
_SHAPES = {
    *('model_name', 'num_classes', 'patches', 'transformer', 'hidden_size', 'resnet'),
    *('representation_size', 'head_bias_init', 'encoder', 'num_blocks', 'hidden_dim'),
    *('tokens_mlp_dim', 'channels_mlp_dim', 'parent', 'name', 'dtype', 'attention', 'remat'),
    *('scan_layers', 'scan_from', 'head_tokens_only', 'both_heads', 'cpu_training', 'lora'),
    *('registers', 'register_positions', 'patch_bias'),
}
_ACT = models.VisionTransformer.act
ANY_SIZE = 224  # pixels, of a model that takes images of any size and does not tell of which
_NO_DROPOUT = {'attention_dropout_rate': 0.0, 'dropout_rate': 0.0}


def architecture(
    params: Mapping[str, Any],
    source: str,
    *,
    variant: str = '',
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments of the module that parameters belong to.

    Args:
        params: nested dict with Linen names; leaves need a shape only.
        source: name of the checkpoint, for errors.
        variant: name from `models.variants.VARIANTS` to take instead of the one the shapes tell.
        settings: arguments of the module that the arrays do not tell, see `Weights.settings`.

    Returns:
        Plain dict with the keys of `variants.get_config`; 'model_name' is None where no variant has
        these sizes. What neither shapes nor `settings` tell is as the released models have it:
        pooling ('token' or 'gap'), no dropout.

    Raises:
        UserError: the parameters belong to no model of this package, or there is no such variant.
    """
    asked = find_variant(variant) if variant else None
    flat = flatten(params)
    try:
        mixer = any(name.startswith('MixerBlock_') for name in params)
        rotary = bool({**(asked or {}), **(settings or {})}.get('rotary'))
        config = _mixer(flat) if mixer else _vit(flat, rotary)
    except UserError as e:
        raise UserError(f'{source}: {e}') from e
    except (KeyError, IndexError) as e:
        raise UserError(
            f'{source} does not hold the weights of a Vision Transformer or an MLP-Mixer: '
            f'{describe(flat)}, and {e} is missing or has no such shape'
        ) from e
    if asked and variants.is_mixer(asked) != variants.is_mixer(config):
        raise UserError(f'{source} does not fit the model {variant}: it holds {describe(flat)}')
    settings = _checked_settings(settings or {}, config, source)
    stated = _not_default(settings, config, source)
    config |= {name: value for name, value in stated.items() if name not in _NO_ARCHITECTURE}
    sizes = _sizes(config)
    same = [asked] if asked else [v for v in variants.VARIANTS.values() if _sizes(v) == sizes]
    if not same:
        return config | stated
    told = {name: settings[name] for name in EVERY_MODEL if name in settings}
    found = next((v for v in same if v.get('act', _ACT) == told.get('act', _ACT)), same[0])
    found = copy.deepcopy(dict(found))
    for name in told:  # what is the default is not in `stated`
        found.pop(name, None)
    if 'representation_size' in found:  # a Mixer has none
        found['representation_size'] = config['representation_size']
    return found | stated


def settings(
    config: Mapping[str, Any], params: Mapping[str, Any], preprocess: Preprocess
) -> dict[str, Any]:
    """The arguments of a module that its arrays do not tell, where they are not the default.

    Beside them 'preprocessing', where images are not squares that are squashed as by default.

    Args:
        config: the arguments, see `variants.get_config`.
        params: its parameters; leaves need a shape only.
        preprocess: from decoded images to its input.
    """
    try:
        told = architecture(params, '')
    except UserError:  # an encoder of another kind
        told = {}
    default = functools.partial(getattr, _module(config))
    side = preprocess.size[0]
    usual = preprocess.describe() == Preprocess(side).describe()
    more = {} if usual else {'preprocessing': preprocess.to_dict()}
    return more | {
        name: value
        for name, value in ({name: default(name) for name in EVERY_MODEL} | dict(config)).items()
        if name not in _SHAPES and value is not None and value != told.get(name, default(name))
    }


def _module(config: Mapping[str, Any]) -> type[nn.Module]:
    return models.MlpMixer if variants.is_mixer(config) else models.VisionTransformer


def find_variant(name: str) -> Mapping[str, Any]:
    """The arguments of a variant; `UserError` for an unknown name."""
    if name not in variants.VARIANTS:
        raise UserError(f'unknown variant {name!r}; known: {", ".join(variants.VARIANTS)}')
    return variants.VARIANTS[name]


def image_size(
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    source: str,
    stated: int | tuple[int, int] = 0,
) -> int | tuple[int, int]:
    """Size of the input in pixels, from the grid of positions.

    Args:
        params: nested dict with Linen names; leaves need a shape only.
        config: what `architecture` gave.
        source: name of the checkpoint, for errors.
        stated: side or (height, width) that its configuration tells; 0 if it does not.

    Returns:
        The side of square images, or (height, width).

    Raises:
        UserError: the configuration tells another number of positions, or does not tell and they
            are no square grid.
    """
    flat = flatten(params)
    if variants.is_mixer(config):
        tokens = flat['MixerBlock_0/token_mixing/Dense_0/kernel'].shape[0]
    elif POSITION_EMBEDDING not in flat:  # rotary positions fit any grid
        tokens = None
    else:
        tokens = flat[POSITION_EMBEDDING].shape[1] - variants.prefix_positions(config)
    stride = variants.token_stride(config)
    if tokens is None and not stated:
        height, width = (max(1, ANY_SIZE // step) * step for step in stride)
        return height if height == width else (height, width)
    if stated:
        try:
            grid = variants.token_grid(config, stated)
        except ValueError as error:
            raise UserError(
                f'{source}: its configuration tells images of {variants.in_words(stated)} pixels, '
                f'which {" ".join(error.args)}'
            ) from error
        if tokens is not None and grid[0] * grid[1] != tokens:
            raise UserError(
                f'{source}: its configuration tells images of {variants.in_words(stated)} pixels, '
                f'so {grid[0]} x {grid[1]} tokens, and it has {tokens} positions'
            )
        return stated
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        raise UserError(
            f'{source}: its {tokens} positions are not a square grid, and nothing tells the size '
            'of its images: config.json of its folder does'
        )
    return side * stride[0] if stride[0] == stride[1] else (side * stride[0], side * stride[1])


def channels(params: Mapping[str, Any]) -> int:
    """Channels of the images that a model takes, from the kernel of its first layer; else 3."""
    flat = flatten(params)
    for layer in ('conv_root', 'embedding', 'stem'):
        shape: tuple[int, ...] = getattr(flat.get(f'{layer}/kernel'), 'shape', ())
        if len(shape) == 4:
            return shape[2]
    return 3


def square_grid(params: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of the patches of a ViT, if their positions are as many as a square has.

    Args:
        params: nested dict with Linen names; leaves need a shape only.
    """
    flat = flatten(params)
    if POSITION_EMBEDDING not in flat:
        return None
    return resize.square(flat[POSITION_EMBEDDING].shape[1] - prefix_positions(flat))


def token_grid(
    params: Mapping[str, Any], image_size: int | tuple[int, int]
) -> tuple[int, int] | None:
    """(rows, columns) of the tokens that a ViT makes of images of this size.

    Args:
        params: nested dict with Linen names; leaves need a shape only.
        image_size: (height, width) in pixels, or the side of a square.

    Returns:
        The grid; None if the parameters have no position embeddings.

    Raises:
        UserError: no such size, or the parameters have another first layer than the models here.
    """
    flat = flatten(params)
    if POSITION_EMBEDDING not in flat:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    kernel: tuple[int, ...] = getattr(flat.get('embedding/kernel'), 'shape', ())
    if len(kernel) != 4:
        raise UserError(
            'the size of the patches is unknown without embedding/kernel [height, width, channels, '
            'hidden size]: give grid=(rows, columns), not image_size'
        )
    stride = 1
    if 'conv_root/kernel' in flat:
        stages = _count(flat, r'block(\d+)/.*')
        stride = variants.resnet_stride([1] * stages)
    grid = tuple(-(-side // stride) // patch for side, patch in zip(size, kernel[:2], strict=False))
    if len(size) != 2 or min(grid) < 1:
        raise UserError(
            f'image_size={image_size} should be (height, width) in pixels or the side of a square, '
            f'at least one patch of {stride * kernel[0]} x {stride * kernel[1]}'
        )
    return grid[0], grid[1]


def _vit(flat: Mapping[str, Any], rotary: bool) -> dict[str, Any]:
    block = 'Transformer/encoderblock_0'
    kernel = flat['embedding/kernel']
    config: dict[str, Any] = {
        'model_name': None,
        'patches': {'size': tuple(kernel.shape[:2])},
        'hidden_size': kernel.shape[3],
        'transformer': {
            'mlp_dim': flat[f'{block}/MlpBlock_0/Dense_0/kernel'].shape[1],
            'num_heads': flat[f'{block}/MultiHeadDotProductAttention_0/query/kernel'].shape[1],
            'num_layers': _count(flat, r'Transformer/encoderblock_(\d+)/.*'),
            **_NO_DROPOUT,
            **{piece: True for piece, name in _ENCODER_PIECES.items() if name in flat},
            **_biases(flat),
        },
        'classifier': _classifier(flat),
        'representation_size': None,
    }
    if not rotary:
        flat[POSITION_EMBEDDING].shape[1]  # missing, it is named as the others
    elif POSITION_EMBEDDING not in flat:
        config['transformer']['add_position_embedding'] = False
    if 'pre_logits/kernel' in flat:
        config['representation_size'] = flat['pre_logits/kernel'].shape[1]
    if 'conv_root/kernel' in flat:
        stages = _count(flat, r'block(\d+)/.*')
        width_factor = flat['conv_root/kernel'].shape[3] / 64
        config['resnet'] = {
            'num_layers': tuple(
                _count(flat, rf'block{stage}/unit(\d+)/.*') for stage in range(1, stages + 1)
            ),
            'width_factor': int(width_factor) if width_factor >= 1 else width_factor,
        }
    if 'registers' in flat:
        config['registers'] = flat['registers'].shape[1]
        tokens = ('cls' in flat) + ('dist' in flat)
        if POSITION_EMBEDDING in flat and prefix_positions(flat) > tokens:
            config['register_positions'] = True
    by_class_token = config['classifier'].startswith('token')
    config |= {'class_token': True} if 'cls' in flat and not by_class_token else {}
    config |= {piece: True for piece, name in _PIECES.items() if name in flat}
    config |= {} if 'embedding/bias' in flat else {'patch_bias': False}
    if 'Transformer/encoder_norm/scale' not in flat and 'fc_norm' not in config:
        config['final_norm'] = False
    return config


def _classifier(flat: Mapping[str, Any]) -> str:
    """What the head reads, as far as the arrays tell."""
    if 'MAPHead_0/probe' in flat:
        return 'map'
    if 'cls' not in flat or 'fc_norm/scale' in flat:
        return 'gap'
    head, width = flat.get('head/kernel'), flat['embedding/kernel'].shape[3]
    twice = head is not None and head.shape[0] == 2 * width and 'pre_logits/kernel' not in flat
    return 'token_gap' if twice else 'token'


def _biases(flat: Mapping[str, Any]) -> dict[str, str]:
    """Which of queries, keys and values have a bias, where it is not all of them."""
    layer = 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0'
    names = ('query', 'key', 'value')
    biases = ''.join(name[0] for name in names if f'{layer}/{name}/bias' in flat)
    return {} if biases == 'qkv' else {'qkv_bias': biases}


# Arguments of the encoder, and of the model, that are true where there is an array of this name.
_ENCODER_PIECES = {
    'pre_norm': 'Transformer/pre_norm/scale',
    'layer_scale': 'Transformer/encoderblock_0/LayerScale_0/scale',
    'gated_mlp': 'Transformer/encoderblock_0/MlpBlock_0/gate/kernel',
    'qk_norm': 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query_ln/scale',
    'mlp_norm': 'Transformer/encoderblock_0/MlpBlock_0/norm/scale',
    'attention_norm': 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out_ln/scale',
}
_PIECES = {'fc_norm': 'fc_norm/scale', 'distilled': 'dist', 'mlp_head': 'head_hidden/kernel'}


def _mixer(flat: Mapping[str, Any]) -> dict[str, Any]:
    kernel = flat['stem/kernel']
    return {
        'model_name': None,
        'patches': {'size': tuple(kernel.shape[:2])},
        'hidden_dim': kernel.shape[3],
        'num_blocks': _count(flat, r'MixerBlock_(\d+)/.*'),
        'tokens_mlp_dim': flat['MixerBlock_0/token_mixing/Dense_0/kernel'].shape[1],
        'channels_mlp_dim': flat['MixerBlock_0/channel_mixing/Dense_0/kernel'].shape[1],
    }


def _checked_settings(
    settings: Mapping[str, Any], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Those settings that the arrays do not tell.

    Raises:
        UserError: the arrays tell something else.
    """
    settings = dict(settings)
    told = settings.pop('told_by_arrays', {})
    arrays = {**config, **config.get('transformer', {})}
    for name, value in told.items():
        default = Encoder.qkv_bias if name == 'qkv_bias' else type(value)()
        if (found := arrays.get(name, default)) != value:
            raise UserError(
                f'{source}: its configuration says {name}={value!r}, its arrays are those of a '
                f'model with {name}={found!r}: they do not belong together'
            )
    return settings


def _not_default(
    settings: Mapping[str, Any], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Those settings that the module needs to be told; they may come from a file."""
    _check_settings(settings, source)
    if variants.is_mixer(config):
        settings = {n: settings[n] for n in (*EVERY_MODEL, *OUTPUTS) if n in settings}
        return {name: v for name, v in settings.items() if v != getattr(models.MlpMixer, name)}
    told = dict(settings)
    classifier = told.pop('classifier', config['classifier'])
    if told.get('class_token') == classifier.startswith('token'):
        told['class_token'] = None  # follows from the classifier
    told = {name: v for name, v in told.items() if v != getattr(models.VisionTransformer, name)}
    if config['representation_size'] is None:
        told.pop('representation_act', None)
    return told | ({} if classifier == config['classifier'] else {'classifier': classifier})


def _check_settings(settings: Mapping[str, Any], source: str) -> None:
    """Raises `UserError` for what is no setting of a model, or of another type."""
    types = {field.name: field.type for field in dataclasses.fields(models.VisionTransformer)}
    for name, value in settings.items():
        if name not in types or name in _SHAPES:
            raise UserError(f'{source} states {name!r}, which is no setting of a model here')
        if name == 'rotary':
            if value is not None:
                _check_rotary(value, source)
            continue
        kind: Any = types[name]
        right = isinstance(value, kind) and (kind is not float or 0 < value < 1)
        if not right or (name in ('act', 'representation_act') and value not in ACTIVATIONS):
            raise UserError(f'{source} states {name} = {value!r:.100}, which no model here has')


def _check_rotary(value: Any, source: str) -> None:
    """Raises `UserError` for what are no rotary positions."""
    try:
        Rotary(**value)
    except (ValueError, TypeError) as e:
        raise UserError(f'{source} states rotary positions that no model here has: {e}') from e


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the names have where the pattern has its group.

    Raises:
        UserError: one is missing in between, or the first ones are.
    """
    found = {int(match[1]) for name in names if (match := re.fullmatch(pattern, name))}
    first = 1 if pattern.startswith('block') else 0  # of a ResNet, they are counted from 1
    missing = set(range(first, max(found, default=0) + 1)) - found
    if missing:
        raise UserError(f'{pattern.split("(")[0]}{min(missing)} is missing, and later ones are not')
    return len(found)


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells variants apart in an architecture: the sizes that follow from shapes."""
    sizes = {
        key: value
        for key, value in flatten(config).items()
        if not key.endswith('_rate')
        and key not in ('model_name', 'representation_size', *_NO_ARCHITECTURE)
    }
    return sizes | {'patches/size': tuple(config['patches']['size'])}
