"""Writes models for other libraries: timm, Hugging Face transformers, torchvision.

Each gets a folder: `model.safetensors`, the configuration that makes the library compute what this
package computes (activation, epsilon of LayerNorm, pooling, input in [-1, 1]), and a page that says
how to load it and what differs. What a library has no place for is refused by name.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax import files, models, variants
from vit_jax.checkpoint import adapt, infer, key_tables, npz, tensors
from vit_jax.errors import UserError
from vit_jax.export import to_hugging_face, to_timm
from vit_jax.export.expressible import (
    UnsupportedError,
    check_epsilon,
    check_pieces,
    check_plain,
    in_units,
    patch_size,
    settings_of,
)
from vit_jax.inference import markdown, model_folder
from vit_jax.inference.task import NUMBERS, SEVERAL

TARGETS = ('npz', 'timm', 'huggingface', 'torchvision')
# The page that says how to load a folder, and what differs.
PAGES = {'timm': 'README.md', 'huggingface': 'README.md', 'torchvision': 'NOTE.md'}
DROPPABLE = ('pre_logits',)


def write(destination: str | os.PathLike[str], model: model_folder.Model, *, to: str) -> list[str]:
    """Writes a model in the format of another library, one array at a time.

    Args:
        destination: a folder, or a `.npz` file; must not exist. It appears when it is complete.
        model: what `model_folder.load` or `open_model` gives.
        to: one of `TARGETS`.

    Returns:
        What the user should know about the result, a sentence each.

    Raises:
        UserError: the format cannot express the model (what would be lost is named), or the
            destination exists or cannot be written.
    """
    if to not in TARGETS:
        raise UserError(f'unknown format {to!r}; known: {", ".join(TARGETS)}')
    destination = pathlib.Path(destination)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f'{destination} exists; remove it, or name another place')
    model = in_units(model)
    class_names = model_folder.own_class_names(model)
    if to == 'npz':
        settings = infer.settings(model.model_config, model.params, model.preprocess)
        npz.save(destination, model.params, settings)
        return ['a .npz file has no place for class names: keep them elsewhere'] * bool(class_names)
    if destination.suffix in ('.safetensors', '.pth', '.pt', '.npz'):
        raise UserError(f'--to {to} writes a folder; {destination} looks like the name of a file')
    flat, config = npz.flatten(model.params), model.model_config
    describe = {
        'timm': to_timm.describe,
        'huggingface': to_hugging_face.describe,
        'torchvision': _torchvision,
    }[to]
    try:
        table, described = describe(model, flat)
        named, lost = key_tables.from_params(flat, table)
        if lost:
            raise UnsupportedError(f'it has no place for {adapt.shorten(lost, 6)}')
    except UnsupportedError as why:
        droppable = 'pre_logits/kernel' in flat and not config.get('unit_features')
        hint = ' --drop pre_logits leaves that layer out.' if droppable else ''
        raise UserError(
            f'{to} cannot express this model: {why}.{hint} npz takes every model'
        ) from why
    if to == 'huggingface':
        named = to_hugging_face.name(named, described['config.json'])
    elif to == 'timm':
        named = to_timm.with_positions(named, config)
    metadata = {
        'image_size': json.dumps(model.image_size),
        'settings': json.dumps(settings_of(config)),
        'preprocessing': json.dumps(model.preprocess.to_dict()),
    }
    if 'transformer' in config:
        metadata['num_heads'] = json.dumps(config['transformer']['num_heads'])
    if class_names:
        metadata['class_names'] = json.dumps(list(class_names))
    with files.atomic_folder(destination) as folder:
        tensors.save_safetensors(folder / 'model.safetensors', named, metadata)
        for name, content in described.items():
            files.write_json(folder / name, content, indent=2)
        files.write_text(folder / PAGES[to], _page(to, model, described))
    return _warnings(to, model)


def drop_layers(
    model: model_folder.Model, drop: Sequence[str]
) -> tuple[model_folder.Model, list[str]]:
    """Leaves layers out of a model, for formats that have no place for them.

    Args:
        model: what `model_folder.load` or `open_model` gives.
        drop: what to leave out, of `DROPPABLE`.

    Returns:
        The model that is left, and what the user should know, a sentence each.

    Raises:
        UserError: a layer that cannot be left out, or the head does not fit without it.
    """
    if wrong := [name for name in drop if name not in DROPPABLE]:
        raise UserError(f'cannot drop {wrong[0]!r}; only {", ".join(DROPPABLE)} can be dropped')
    if 'pre_logits' not in drop or 'pre_logits' not in model.params:
        return model, []
    params = {name: leaf for name, leaf in model.params.items() if name != 'pre_logits'}
    config = {**model.model_config, 'representation_size': None}
    notes = ['pre_logits is dropped']
    if 'head' in params:
        notes.append(
            'the head was made for the output of pre_logits: train a new one, its logits mean '
            'nothing now (in the released in21k files it is all zeros anyway)'
        )
        width, shape = variants.pooled_width(config), tuple(params['head']['kernel'].shape)
        if shape[0] != width:
            raise UserError(
                f'without pre_logits the head does not fit: it reads {width} features, and its '
                f'kernel has shape {shape}'
            )
    module = models.from_config(config, num_classes=model.model.num_classes)
    return dataclasses.replace(model, model=module, params=params, model_config=config), notes


def _torchvision(model: model_folder.Model, flat: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    config = model.model_config
    check_plain(config)
    check_pieces(config, ('distilled', 'mlp_head'), 'its VisionTransformer')
    if 'dist' in flat:
        raise UnsupportedError('it has no distillation token (dist, head_dist)')
    if not model.model.num_classes:
        raise UnsupportedError('its VisionTransformer always has a head, and this model has none')
    if model.channels != 3:
        raise UnsupportedError(f'its images have 3 channels, not {model.channels}')
    for what, size in (('images', model.image_size), ('patches', patch_size(config))):
        if not isinstance(size, int):
            raise UnsupportedError(f'its {what} are square, not {variants.in_words(size)}')
    encoder = config['transformer']
    arguments = {
        'image_size': model.image_size,
        'patch_size': config['patches']['size'][0],
        'num_layers': encoder['num_layers'],
        'num_heads': encoder['num_heads'],
        'hidden_dim': config['hidden_size'],
        'mlp_dim': encoder['mlp_dim'],
        'num_classes': model.model.num_classes,
        'representation_size': (
            flat['pre_logits/bias'].shape[0] if 'pre_logits/bias' in flat else None
        ),
    }
    settings = settings_of(config)
    check_epsilon(settings)
    for name, takes in (('act', ('gelu', 'gelu_tanh')), ('representation_act', ('tanh',))):
        if settings[name] not in takes:
            raise UnsupportedError(f'its {name} is {takes[0]}, not {settings[name]}')
    names = model_folder.own_class_names(model)
    described = {
        'library': 'torchvision',
        'class': 'torchvision.models.VisionTransformer',
        'arguments': arguments,
        'mean': [0.5] * 3,
        'std': [0.5] * 3,
        'settings': {name: settings[name] for name in ('act', 'layer_norm_eps')},
        'preprocessing': model.preprocess.to_dict(),
        **({'class_names': list(names)} if names else {}),
    }
    return 'torchvision', {'config.json': described}


def _page(to: str, model: model_folder.Model, described: Mapping[str, Any]) -> str:
    """The page in the folder."""
    values = {
        'to': to,
        'preprocess': model.preprocess,
        'mixer': variants.is_mixer(model.model_config),
        'hybrid': 'resnet' in model.model_config,
        'model_class': described['config.json'].get('architectures', [''])[0],
        **settings_of(model.model_config),
    }
    return markdown.render('export', 'page.md.j2', values, whole=True)


def _warnings(to: str, model: model_folder.Model) -> list[str]:
    """What the user should know about an export, a sentence each."""
    notes, config = [], model.model_config
    settings = settings_of(config)
    one_form = to == 'torchvision' or (to == 'timm' and variants.is_mixer(config))
    if one_form and settings['act'] == 'gelu_tanh':
        notes.append(
            'this class computes GELU in its erf form, which changes logits by 1e-3 to 2e-2; '
            f'{PAGES[to]} in the folder says how to set the tanh form'
        )
    if config.get('resnet') is not None:
        notes.append(
            'timm standardises convolution weights with another epsilon: logits differ by about '
            '1e-5 to 1e-4'
        )
    has = {'timm': (1e-5, 1e-6), 'torchvision': (1e-6,)}.get(to)
    if has and settings['layer_norm_eps'] not in has:
        notes.append(f'LayerNorm epsilon is 1e-6 there, {settings["layer_norm_eps"]:g} here')
    if model.task.kind == SEVERAL and to != 'huggingface':
        notes.append('classes do not exclude each other: take the sigmoid of each logit')
    if model.task.kind == NUMBERS and to != 'huggingface':
        notes.append('the outputs are numbers in their units, not scores of classes')
    if to == 'torchvision':
        notes.append('input is [-1, 1]: mean and standard deviation 0.5, not those of ImageNet')
    elif not model.preprocess.antialias:
        notes.append(
            f'{to} resizes images with antialiasing, this package without: README.md in '
            'the folder says how far its pixels are and how to preprocess exactly'
        )
    return notes
