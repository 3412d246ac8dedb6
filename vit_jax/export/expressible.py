"""What of a model another library has to have a place for, and what it refuses."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vit_jax import models, variants
from vit_jax.checkpoint import infer
from vit_jax.inference import model_folder


class UnsupportedError(Exception):
    """What a library has no place for; the message says what."""


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model that its arrays do not tell, with their defaults."""
    names: tuple[str, ...] = (*infer.EVERY_MODEL, *infer.OUTPUTS)
    if not variants.is_mixer(config):
        names += ('classifier', 'class_token', 'fc_norm', 'representation_act', 'rotary')
    module = models.MlpMixer if variants.is_mixer(config) else models.VisionTransformer
    told = {name: config[name] for name in names if config.get(name) is not None}
    return {name: getattr(module, name) for name in names} | told


def in_units(model: model_folder.Model) -> model_folder.Model:
    """A model of numbers whose head gives them in their units, as no format keeps mean and scale.

    Another model as it is.
    """
    task = model.task
    if not (task.mean or task.deviation):
        return model
    mean, deviation = task.scale(len(model.class_names))
    params = dict(model.params)
    for name in {'head', 'head_dist'} & params.keys():
        kernel, bias = (np.asarray(params[name][leaf], np.float64) for leaf in ('kernel', 'bias'))
        scaled = {'kernel': kernel * deviation, 'bias': bias * deviation + mean}
        params[name] = {leaf: value.astype(np.float32) for leaf, value in scaled.items()}
    task = dataclasses.replace(task, mean=(), deviation=())
    return dataclasses.replace(model, params=params, task=task)


def patch_size(config: Mapping[str, Any]) -> int | tuple[int, int]:
    """Side of a patch, or (height, width), pixels."""
    height, width = config['patches']['size']
    return height if height == width else (height, width)


def check_epsilon(settings: Mapping[str, Any]) -> None:
    """Refuses what a library's fixed epsilon, 1e-6, would change by more than rounding."""
    if settings['layer_norm_eps'] > 1e-5:
        raise UnsupportedError(f'its layer_norm_eps is 1e-6, not {settings["layer_norm_eps"]:g}')


def check_plain(config: Mapping[str, Any]) -> None:
    """Refuses the families that Hugging Face's and torchvision's ViT are not."""
    if variants.is_mixer(config):
        raise UnsupportedError('it has no MLP-Mixer')
    if config.get('resnet') is not None:
        raise UnsupportedError('it has no hybrid with this ResNet (conv_root, gn_root, ...)')
    settings = settings_of(config)
    if settings['classifier'] != 'token' or settings['fc_norm']:
        pooling = 'fc_norm' if settings['fc_norm'] else f'classifier {settings["classifier"]!r}'
        raise UnsupportedError(f'it has no mean pooling, max pooling or fc_norm ({pooling})')


def pieces(config: Mapping[str, Any]) -> dict[str, str]:
    """What a Vision Transformer has that the plain one has not: argument -> words for people."""
    encoder = config['transformer']
    words: dict[str, str] = {}
    for name, text in {
        'layer_scale': 'LayerScale',
        'gated_mlp': 'gated MLPs',
        'pre_norm': 'a norm in front of the encoder',
        'qk_norm': 'norms of queries and keys',
        'mlp_norm': 'norms inside of MLPs',
        'attention_norm': 'norms inside of attention',
    }.items():
        words |= {name: text} if encoder.get(name) else {}
    for name, text in {
        'registers': 'register tokens',
        'register_positions': 'positions of registers',
        'fc_norm': 'a norm behind the pooling (fc_norm)',
        'distilled': 'a distillation token (dist, head_dist)',
        'unit_features': 'features of length 1 in front of the head (unit_features)',
        'mlp_head': 'a hidden layer in front of the head (head_hidden)',
        'resnet': 'a ResNet in front (conv_root, gn_root, ...)',
        'rotary': 'rotary positions',
    }.items():
        words |= {name: text} if config.get(name) not in (None, False, 0) else {}
    if (biases := encoder.get('qkv_bias', 'qkv')) != 'qkv':
        missing = ' and '.join(n for n in ('queries', 'keys', 'values') if n[0] not in biases)
        words['qkv_bias'] = f'{missing} without a bias'
    if not encoder.get('add_position_embedding', True):
        words['add_position_embedding'] = 'no learned position embeddings'
    words |= {} if config.get('patch_bias', True) else {'patch_bias': 'patches without a bias'}
    words |= {} if config.get('final_norm', True) else {'final_norm': 'no final norm'}
    return words


def check_pieces(config: Mapping[str, Any], has: Collection[str], owner: str) -> None:
    """Raises `UnsupportedError` for pieces other than those that the owner has."""
    if lacking := [words for name, words in pieces(config).items() if name not in has]:
        raise UnsupportedError(f'{owner} has no place for {", ".join(lacking)}')
