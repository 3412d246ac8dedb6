"""A model as a folder of Hugging Face's transformers: its class, configuration and names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.checkpoint import model_input
from vit_jax.checkpoint.library_configs import TO_HUGGING_FACE
from vit_jax.export.expressible import (
    UnsupportedError,
    check_pieces,
    check_plain,
    patch_size,
    pieces,
    settings_of,
)
from vit_jax.inference import model_folder
from vit_jax.inference.task import NUMBERS, SEVERAL

# A key of `key_tables.TABLES`, and config.json.
_Described = tuple[str, dict[str, Any]]


def describe(model: model_folder.Model, flat: Mapping[str, Any]) -> _Described:
    """What a model is in transformers.

    Args:
        model: what is written.
        flat: its parameters, Linen name -> array.

    Returns:
        The key of `key_tables.TABLES`; name -> content of each JSON file.

    Raises:
        UnsupportedError: transformers has no class that computes it.
    """
    config = model.model_config
    table, described = _family(config)(model, flat)
    processor = model_input.to_hugging_face(model.preprocess, model.channels)
    return table, {'config.json': described, 'preprocessor_config.json': processor}


def _family(config: Mapping[str, Any]) -> Callable[..., _Described]:
    """The function below that describes the nearest family."""
    encoder = config.get('transformer', {})
    if config.get('rotary'):
        return _dinov3
    if encoder.get('layer_scale'):
        return _dinov2
    if encoder.get('pre_norm'):
        return _clip
    classifier = config.get('classifier', 'token')
    if classifier == 'map' or (classifier == 'gap' and 'siglip' in str(config.get('model_name'))):
        return _siglip
    plain = config.get('resnet') is None and not config.get('fc_norm')
    return _ijepa if plain and classifier == 'gap' and not config.get('class_token') else _vit


def name(named: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """The names of a class, from those of its base model.

    A classifier has its base model as a part; a DeiT with two heads calls the first one otherwise.

    Args:
        named: the tensors, as `key_tables.from_params` names them.
        described: config.json.

    Raises:
        UnsupportedError: a bias that is not zero, where the class has none.
    """
    kind, named = described['model_type'], dict(named)
    if kind == 'dinov2_with_registers':  # which always has one, for masked pre-training
        named['embeddings.mask_token'] = np.zeros((1, described['hidden_size']), np.float32)
    if kind == 'dinov3_vit':
        named['embeddings.mask_token'] = np.zeros((1, 1, described['hidden_size']), np.float32)
    if described['architectures'][0] == 'CLIPVisionModelWithProjection':
        if np.any(named.pop('visual_projection.bias')):
            raise UnsupportedError('its projection has no bias')
        return {k if k[:7] == 'visual_' else f'vision_model.{k}': named[k] for k in named}
    if 'ForImageClassification' not in described['architectures'][0]:
        return named
    if kind == 'clip':  # whose classifier has a final norm and does not use it
        width = described['vision_config']['hidden_size']
        named['post_layernorm.weight'] = np.ones(width, np.float32)
        named['post_layernorm.bias'] = np.zeros(width, np.float32)
    prefix = 'vision_model' if kind in ('clip', 'siglip') else kind
    new = {}
    for theirs, array in named.items():
        if kind == 'deit' and theirs.startswith('classifier.'):
            theirs = f'cls_{theirs}'
        head = theirs.startswith(('classifier.', 'cls_classifier.', 'distillation_classifier.'))
        new[theirs if head else f'{prefix}.{theirs}'] = array
    return new


def _common(model: model_folder.Model, flat: Mapping[str, Any]) -> dict[str, Any]:
    """What the configurations of all classes have."""
    config, labels = model.model_config, _labels(model)
    encoder, settings = config['transformer'], settings_of(config)
    problem = {SEVERAL: 'multi_label_classification', NUMBERS: 'regression'}.get(model.task.kind)
    return {
        'hidden_size': config['hidden_size'],
        'num_hidden_layers': encoder['num_layers'],
        'num_attention_heads': encoder['num_heads'],
        'hidden_act': TO_HUGGING_FACE[settings['act']],
        'layer_norm_eps': settings['layer_norm_eps'],
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
        'initializer_range': 0.02,
        'image_size': model.image_size,
        'patch_size': patch_size(config),
        'num_channels': flat['embedding/kernel'].shape[2],
        'qkv_bias': True,
        **({'problem_type': problem} if problem else {}),
        'id2label': {str(i): label for i, label in enumerate(labels)},
        'label2id': {label: i for i, label in enumerate(labels)},
    }


def _labels(model: model_folder.Model) -> Sequence[str]:
    classes = range(model.model.num_classes)
    return model_folder.own_class_names(model) or [f'LABEL_{i}' for i in classes]


def _vit(model: model_folder.Model, flat: Mapping[str, Any]) -> _Described:
    config, classes, distilled = model.model_config, model.model.num_classes, 'dist' in flat
    check_plain(config)
    check_pieces(config, ('distilled',), 'its ViT')
    if classes and 'pre_logits/kernel' in flat:
        raise UnsupportedError('its classifier has no pre_logits in front of the head')
    if distilled and not classes:
        raise UnsupportedError('it loads a DeiT of two tokens with its heads only')
    kind = 'DeiTForImageClassificationWithTeacher' if distilled else 'ViTForImageClassification'
    described = {
        'architectures': [kind if classes else 'ViTModel'],
        'model_type': 'deit' if distilled else 'vit',
        'intermediate_size': config['transformer']['mlp_dim'],
        'encoder_stride': config['patches']['size'][0],
        **_common(model, flat),
    }
    if 'pre_logits/bias' in flat:
        act = settings_of(config)['representation_act']
        described['pooler_output_size'] = flat['pre_logits/bias'].shape[0]
        described['pooler_act'] = TO_HUGGING_FACE[act]
    return 'Hugging Face', described


def _ijepa(model: model_folder.Model, flat: Mapping[str, Any]) -> _Described:
    config, classes = model.model_config, model.model.num_classes
    check_pieces(config, (), 'its I-JEPA')
    if 'pre_logits/kernel' in flat:
        raise UnsupportedError('its I-JEPA has no pre_logits')
    return 'Hugging Face', {
        'architectures': ['IJepaForImageClassification' if classes else 'IJepaModel'],
        'model_type': 'ijepa',
        'intermediate_size': config['transformer']['mlp_dim'],
        **_common(model, flat),
    }


def _dinov2(model: model_folder.Model, flat: Mapping[str, Any]) -> _Described:
    config, classes = model.model_config, model.model.num_classes
    check_pieces(config, ('layer_scale', 'gated_mlp', 'registers'), 'its DINOv2')
    reads, needed = config['classifier'], 'token_gap' if classes else 'token'
    if reads != needed:
        has = 'classifier' if classes else 'model without a head'
        raise UnsupportedError(f"its DINOv2's {has} has {needed!r}, not {reads!r}")
    if 'pre_logits/kernel' in flat:
        raise UnsupportedError('its DINOv2 has no pre_logits')
    settings, encoder = settings_of(config), config['transformer']
    gated = bool(encoder.get('gated_mlp'))
    if gated and settings['act'] != 'silu':
        raise UnsupportedError(f'its gated MLPs have the activation silu, not {settings["act"]}')
    name = 'Dinov2WithRegisters' if 'registers' in flat else 'Dinov2'
    described = {
        'architectures': [f'{name}{"ForImageClassification" if classes else "Model"}'],
        'model_type': 'dinov2_with_registers' if 'registers' in flat else 'dinov2',
        **_common(model, flat),
        'mlp_ratio': _mlp_ratio(config['hidden_size'], encoder['mlp_dim'], gated),
        'layerscale_value': 1.0,
        'drop_path_rate': 0.0,
        'use_swiglu_ffn': gated,
    }
    if 'registers' in flat:
        described['num_register_tokens'] = flat['registers'].shape[1]
    else:
        described['use_mask_token'] = False
    return 'DINOv2 gated' if gated else 'DINOv2', described


def _dinov3(model: model_folder.Model, flat: Mapping[str, Any]) -> _Described:
    config, encoder = model.model_config, model.model_config['transformer']
    if config['rotary']['form'] != 'dinov3':
        raise UnsupportedError('it has rotary positions of the form of DINOv3 only')
    needed = {'rotary', 'layer_scale', 'registers', 'add_position_embedding'}
    check_pieces(config, needed | {'gated_mlp', 'qkv_bias'}, 'its DINOv3')
    if lacking := needed - pieces(config).keys():
        raise UnsupportedError(f'its DINOv3 has {", ".join(sorted(lacking))}')
    if 'head/kernel' in flat or 'pre_logits/kernel' in flat or config['classifier'] != 'token':
        raise UnsupportedError(
            "it has DINOv3 without a head only (classifier 'token', no pre_logits); timm has it "
            'with one'
        )
    biases = encoder.get('qkv_bias', 'qkv')
    return 'DINOv3', {
        'architectures': ['DINOv3ViTModel'],
        'model_type': 'dinov3_vit',
        **_tower(model, flat),
        **{f'{name}_bias': name[0] in biases for name in ('query', 'key', 'value')},
        'use_gated_mlp': bool(encoder.get('gated_mlp')),
        'num_register_tokens': config['registers'],
        'rope_theta': config['rotary']['theta'],
    }


def _clip(model: model_folder.Model, flat: Mapping[str, Any]) -> _Described:
    config, classes = model.model_config, model.model.num_classes
    check_pieces(config, ('pre_norm', 'patch_bias', 'final_norm'), 'its CLIP')
    if config.get('patch_bias', True):
        raise UnsupportedError('its CLIP has no bias of the patches (patch_bias)')
    reads = config['classifier'], config.get('final_norm', True), 'pre_logits/kernel' in flat
    if classes and reads != ('gap', False, False):
        raise UnsupportedError(
            "its CLIP's classifier reads the mean of the patches without a final norm "
            "(classifier='gap', class_token=True, final_norm=False)"
        )
    if not classes and reads[:2] != ('token', True):
        raise UnsupportedError("its CLIP without a head has classifier 'token' and a final norm")
    tower = _tower(model, flat) | {'model_type': 'clip_vision_model'}
    if classes:
        return 'CLIP', _classifier('CLIPForImageClassification', 'clip', tower, model)
    kind = 'CLIPVisionModelWithProjection' if reads[2] else 'CLIPVisionModel'
    if reads[2]:
        if (act := settings_of(config)['representation_act']) != 'linear':
            raise UnsupportedError(f'its projection has no activation, and not {act}')
        tower['projection_dim'] = flat['pre_logits/kernel'].shape[1]
    return 'CLIP', {'architectures': [kind], **tower}


def _siglip(model: model_folder.Model, flat: Mapping[str, Any]) -> _Described:
    config, classes = model.model_config, model.model.num_classes
    check_pieces(config, (), 'its SigLIP')
    reads, needed = config['classifier'], 'gap' if classes else 'map'
    if reads != needed or 'cls' in flat:
        has = 'classifier' if classes else 'model without a head'
        raise UnsupportedError(f"its SigLIP's {has} has {needed!r}, not {reads!r}")
    if 'pre_logits/kernel' in flat:
        raise UnsupportedError('its SigLIP has no pre_logits')
    tower = _tower(model, flat) | {'model_type': 'siglip_vision_model'}
    if classes:
        tower['vision_use_head'] = False
        return 'SigLIP', _classifier('SiglipForImageClassification', 'siglip', tower, model)
    return 'SigLIP', {'architectures': ['SiglipVisionModel'], **tower}


def _tower(model: model_folder.Model, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an image tower."""
    names = (
        *('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'hidden_act'),
        *('layer_norm_eps', 'image_size', 'patch_size', 'num_channels'),
    )
    common = _common(model, flat)
    tower = {name: common[name] for name in names}
    return tower | {'intermediate_size': model.model_config['transformer']['mlp_dim']}


def _classifier(
    name: str, kind: str, tower: Mapping[str, Any], model: model_folder.Model
) -> dict[str, Any]:
    """The configuration of a classifier, which has its tower's inside."""
    labels = _labels(model)
    return {
        'architectures': [name],
        'model_type': kind,
        'vision_config': dict(tower),
        'id2label': {str(i): label for i, label in enumerate(labels)},
        'label2id': {label: i for i, label in enumerate(labels)},
    }


def _mlp_ratio(width: int, hidden: int, gated: bool) -> float:
    """What makes DINOv2's MLPs as wide as `hidden`: of gated ones, 8 divides two thirds of it."""
    ratio = hidden * 3 / 2 / width if gated else hidden / width
    for near in (round(ratio), ratio, ratio + 1 / width):
        outer = int(width * near)
        if hidden == ((int(outer * 2 / 3) + 7) // 8 * 8 if gated else outer):
            return near
    raise UnsupportedError(f'its DINOv2 has no MLP of {hidden} hidden units')
