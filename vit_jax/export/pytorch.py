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
from vit_jax.checkpoint import (
    adapt,
    infer,
    key_tables,
    library_configs,
    model_input,
    npz,
    tensors,
)
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

TARGETS = ('npz', 'timm', 'huggingface', 'torchvision')
# The page that says how to load a folder, and what differs.
PAGES = {'timm': 'README.md', 'huggingface': 'README.md', 'torchvision': 'NOTE.md'}
DROPPABLE = ('pre_logits',)

_SIZE_WORDS = {192: 'tiny', 384: 'small', 768: 'base', 1024: 'large', 1280: 'huge'}
_TIMM_POOLING = {'token': 'token', 'gap': 'avg', 'max': 'max', 'avgmax': 'avgmax'}
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


class _UnsupportedError(Exception):
    """What a library has no place for; the message says what."""


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
    class_names = model_folder.own_class_names(model)
    if to == 'npz':
        npz.save(destination, model.params, infer.settings(model.model_config, model.params))
        return ['a .npz file has no place for class names: keep them elsewhere'] * bool(class_names)
    if destination.suffix in ('.safetensors', '.pth', '.pt', '.npz'):
        raise UserError(f'--to {to} writes a folder; {destination} looks like the name of a file')
    flat, config = npz.flatten(model.params), model.model_config
    describe = {'timm': _timm, 'huggingface': _hugging_face, 'torchvision': _torchvision}[to]
    try:
        table, described = describe(model, flat)
        named, lost = key_tables.from_params(flat, table)
        if lost:
            raise _UnsupportedError(f'it has no place for {adapt.shorten(lost, 6)}')
    except _UnsupportedError as why:
        hint = ' --drop pre_logits leaves that layer out.' if 'pre_logits/kernel' in flat else ''
        raise UserError(
            f'{to} cannot express this model: {why}.{hint} npz takes every model'
        ) from why
    if to == 'huggingface':
        named = _hugging_face_names(named, 'dist' in flat, 'head/bias' in flat)
    metadata = {
        'image_size': json.dumps(model.image_size),
        'settings': json.dumps(_settings(config)),
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
        width, shape = config['hidden_size'], tuple(params['head']['kernel'].shape)
        if shape[0] != width:
            raise UserError(
                f'without pre_logits the head does not fit: it reads {width} features, and its '
                f'kernel has shape {shape}'
            )
    module = models.from_config(config, num_classes=model.model.num_classes)
    return dataclasses.replace(model, model=module, params=params, model_config=config), notes


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model that its arrays do not tell, with their defaults."""
    names = ('act', 'layer_norm_eps')
    if not variants.is_mixer(config):
        names += ('classifier', 'class_token', 'fc_norm', 'representation_act')
    module = models.MlpMixer if variants.is_mixer(config) else models.VisionTransformer
    return {name: config.get(name, getattr(module, name)) for name in names}


def _check_epsilon(settings: Mapping[str, Any]) -> None:
    """Refuses what a library's fixed epsilon, 1e-6, would change by more than rounding."""
    if settings['layer_norm_eps'] > 1e-5:
        raise _UnsupportedError(f'its layer_norm_eps is 1e-6, not {settings["layer_norm_eps"]:g}')


def _timm(model: model_folder.Model, flat: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    config, patch = model.model_config, model.model_config['patches']['size'][0]
    settings = _settings(config)
    _check_epsilon(settings)
    arguments: dict[str, Any] = {'img_size': model.image_size}
    first_layer = 'patch_embed.proj'
    if variants.is_mixer(config):
        key = (patch, config['hidden_dim'], config['num_blocks'])
        if settings['act'] not in ('gelu', 'gelu_tanh'):
            raise _UnsupportedError(f'its Mixer has the activation gelu, not {settings["act"]}')
        if key not in _TIMM_MIXERS:
            raise _UnsupportedError(f'it has no Mixer of patch {key[0]}, width {key[1]}')
        table, architecture, width, pool = 'timm Mixer', _TIMM_MIXERS[key], key[1], 'avg'
        arguments['mlp_ratio'] = [
            config[f'{axis}_mlp_dim'] / width for axis in ('tokens', 'channels')
        ]
        first_layer = 'stem.proj'
    else:
        if settings['classifier'] not in _TIMM_POOLING:
            raise _UnsupportedError(f'it has no classifier {settings["classifier"]!r}')
        table, architecture = _timm_vit(flat, config)
        encoder, width = config['transformer'], config['hidden_size']
        pool = _TIMM_POOLING[settings['classifier']]
        arguments |= {
            'patch_size': patch,
            'embed_dim': width,
            'depth': encoder['num_layers'],
            'num_heads': encoder['num_heads'],
            'mlp_ratio': encoder['mlp_dim'] / width,
            'act_layer': settings['act'],
        }
        if pool != 'token' or settings['fc_norm']:
            arguments |= {
                'class_token': bool(variants.prefix_tokens(config)),
                'global_pool': pool,
                'fc_norm': settings['fc_norm'],
            }
    names = model_folder.own_class_names(model)
    described = {
        'architecture': architecture,
        'num_classes': model.model.num_classes,
        'num_features': width,
        'global_pool': pool,
        'model_args': arguments,
        'pretrained_cfg': {
            'input_size': [3, model.image_size, model.image_size],
            'fixed_input_size': True,
            **model_input.to_timm(model.preprocess),
            'mean': [0.5] * 3,
            'std': [0.5] * 3,
            'num_classes': model.model.num_classes,
            'first_conv': first_layer,
            'classifier': ['head', 'head_dist'] if 'dist' in flat else 'head',
            **({'label_names': list(names)} if names else {}),
        },
    }
    return table, {'config.json': described}


def _timm_vit(flat: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, str]:
    """(table, architecture) of a ViT, DeiT or hybrid."""
    if 'pre_logits/kernel' in flat:  # old timm had one, as pre_logits.fc: it is read, not written
        raise _UnsupportedError('it has no pre_logits')
    width, patch = config['hidden_size'], config['patches']['size'][0]
    hybrid = config.get('resnet')
    if hybrid is not None:
        units = tuple(hybrid['num_layers'])
        name = _TIMM_HYBRIDS.get((units, width)) or _TIMM_HYBRIDS.get((units, None))
        if name is None or hybrid.get('width_factor', 1) != 1:
            raise _UnsupportedError(f'it has no hybrid with ResNet stages of {units} units')
        return ('timm hybrid' if units else 'timm stem hybrid'), name
    size = _SIZE_WORDS.get(width, 'base')
    if 'dist' in flat:
        size = size if size in ('tiny', 'small', 'base') else 'base'
        return 'timm', f'deit_{size}_distilled_patch16_224'
    name = f'{size}_patch{patch}'
    # Any of them makes any ViT: model_args has all sizes.
    return 'timm', f'vit_{name if name in _TIMM_VITS else "base_patch16"}_224'


def _hugging_face(model: model_folder.Model, flat: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    config, classes, distilled = model.model_config, model.model.num_classes, 'dist' in flat
    _check_plain(config)
    if classes and 'pre_logits/kernel' in flat:
        raise _UnsupportedError('its classifier has no pre_logits in front of the head')
    if distilled and not classes:
        raise _UnsupportedError('it loads a DeiT of two tokens with its heads only')
    labels = model_folder.own_class_names(model) or [f'LABEL_{i}' for i in range(classes)]
    kind = 'DeiTForImageClassificationWithTeacher' if distilled else 'ViTForImageClassification'
    encoder, settings = config['transformer'], _settings(config)
    described = {
        'architectures': [kind if classes else 'ViTModel'],
        'model_type': 'deit' if distilled else 'vit',
        'hidden_size': config['hidden_size'],
        'num_hidden_layers': encoder['num_layers'],
        'num_attention_heads': encoder['num_heads'],
        'intermediate_size': encoder['mlp_dim'],
        'hidden_act': library_configs.TO_HUGGING_FACE[settings['act']],
        'layer_norm_eps': settings['layer_norm_eps'],
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
        'initializer_range': 0.02,
        'image_size': model.image_size,
        'patch_size': config['patches']['size'][0],
        'num_channels': flat['embedding/kernel'].shape[2],
        'qkv_bias': True,
        'encoder_stride': config['patches']['size'][0],
        'id2label': {str(i): name for i, name in enumerate(labels)},
        'label2id': {name: i for i, name in enumerate(labels)},
    }
    if 'pre_logits/bias' in flat:
        described['pooler_output_size'] = flat['pre_logits/bias'].shape[0]
        described['pooler_act'] = library_configs.TO_HUGGING_FACE[settings['representation_act']]
    processor = model_input.to_hugging_face(model.preprocess)
    return 'Hugging Face', {'config.json': described, 'preprocessor_config.json': processor}


def _hugging_face_names(named: dict[str, Any], distilled: bool, has_head: bool) -> dict[str, Any]:
    """The prefix of the base model; a DeiT with two heads calls the first one otherwise."""
    prefix = ('deit.' if distilled else 'vit.') if has_head else ''
    new = {}
    for name, array in named.items():
        if distilled and name.startswith('classifier.'):
            name = f'cls_{name}'
        head = name.startswith(('classifier.', 'cls_classifier.', 'distillation_classifier.'))
        new[name if head else prefix + name] = array
    return new


def _torchvision(model: model_folder.Model, flat: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    config = model.model_config
    _check_plain(config)
    if 'dist' in flat:
        raise _UnsupportedError('it has no distillation token (dist, head_dist)')
    if not model.model.num_classes:
        raise _UnsupportedError('its VisionTransformer always has a head, and this model has none')
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
    settings = _settings(config)
    _check_epsilon(settings)
    for name, takes in (('act', ('gelu', 'gelu_tanh')), ('representation_act', ('tanh',))):
        if settings[name] not in takes:
            raise _UnsupportedError(f'its {name} is {takes[0]}, not {settings[name]}')
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


def _check_plain(config: Mapping[str, Any]) -> None:
    """Refuses the families that Hugging Face's and torchvision's ViT are not."""
    if variants.is_mixer(config):
        raise _UnsupportedError('it has no MLP-Mixer')
    if config.get('resnet') is not None:
        raise _UnsupportedError('it has no hybrid with this ResNet (conv_root, gn_root, ...)')
    settings = _settings(config)
    if settings['classifier'] != 'token' or settings['fc_norm']:
        pooling = 'fc_norm' if settings['fc_norm'] else f'classifier {settings["classifier"]!r}'
        raise _UnsupportedError(f'it has no mean pooling, max pooling or fc_norm ({pooling})')


def _page(to: str, model: model_folder.Model, described: Mapping[str, Any]) -> str:
    """The page in the folder."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('vit_jax', 'export'),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template('page.md.j2').render(
        to=to,
        preprocess=model.preprocess,
        mixer=variants.is_mixer(model.model_config),
        hybrid='resnet' in model.model_config,
        model_class=described['config.json'].get('architectures', [''])[0],
        **_settings(model.model_config),
    )


def _warnings(to: str, model: model_folder.Model) -> list[str]:
    """What the user should know about an export, a sentence each."""
    notes, config = [], model.model_config
    settings = _settings(config)
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
    if to != 'huggingface' and settings['layer_norm_eps'] != 1e-6:
        notes.append(f'LayerNorm epsilon is 1e-6 there, {settings["layer_norm_eps"]:g} here')
    if to == 'torchvision':
        notes.append('input is [-1, 1]: mean and standard deviation 0.5, not those of ImageNet')
    elif not model.preprocess.antialias:
        notes.append(
            f'{to} resizes images with antialiasing, this package without: README.md in '
            'the folder says how far its pixels are and how to preprocess exactly'
        )
    return notes
