"""What the config.json of a folder of timm, Hugging Face or torchvision says of a model.

Everything that changes what is computed is taken over, in this package's words, or refused by name.
`timm_models.csv` has the arguments that an architecture of timm 1.0.31 sets by itself; those of
`model_args` in config.json come on top.
"""

import csv
import functools
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vit_jax import files
from vit_jax.checkpoint import model_input, timm_eva
from vit_jax.checkpoint.hugging_face_families import FAMILIES, image_tower, settings
from vit_jax.data.normalization import HALF
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

# What a library computes unless it is told otherwise.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    **timm_eva.DEFAULTS,
    'timm gated': {'act': 'silu', 'layer_norm_eps': 1e-6},
    'timm': {'act': 'gelu', 'layer_norm_eps': 1e-6},
    'DINOv2 gated': {'act': 'silu', 'layer_norm_eps': 1e-6},
    'DINOv2': {'act': 'gelu', 'layer_norm_eps': 1e-6},
    'DINOv3 gated': timm_eva.DEFAULTS['timm DINOv3 gated'],
    'DINOv3': timm_eva.DEFAULTS['timm DINOv3'],
    'CLIP': {'act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'representation_act': 'linear'},
    'OpenCLIP': {'act': 'gelu', 'layer_norm_eps': 1e-5, 'representation_act': 'linear'},
    'SigLIP': {'act': 'gelu_tanh', 'layer_norm_eps': 1e-6},
    'Hugging Face': {'act': 'gelu', 'layer_norm_eps': 1e-12},
    'torchvision': {'act': 'gelu', 'layer_norm_eps': 1e-6},
}

# Their names of activation functions -> those of `models.layers.ACTIVATIONS`.
_TIMM_ACTIVATIONS = {
    **{name: name for name in ('gelu', 'gelu_tanh', 'quick_gelu', 'relu', 'silu', 'tanh')},
    'swish': 'silu',
}
_HUGGING_FACE_ACTIVATIONS = {
    **dict.fromkeys(('gelu', 'gelu_python'), 'gelu'),
    **dict.fromkeys(('gelu_new', 'gelu_fast', 'gelu_pytorch_tanh'), 'gelu_tanh'),
    **dict.fromkeys(('gelu_python_tanh', 'gelu_accurate'), 'gelu_tanh'),
    **{name: name for name in ('quick_gelu', 'relu', 'silu', 'tanh', 'linear')},
    'swish': 'silu',
}
# Our names, for export.
TO_HUGGING_FACE = {'gelu_tanh': 'gelu_pytorch_tanh'} | {
    name: name for name in ('gelu', 'quick_gelu', 'relu', 'silu', 'tanh', 'linear')
}
# SwiGLU, of DINOv2's giant.
_GATED = {'name': 'GluMlp', 'act_layer': 'SiLU', 'gate_last': False}
_POOLING = {'token': 'token', 'avg': 'gap', 'max': 'max', 'avgmax': 'avgmax', 'map': 'map'}
# Arguments of timm's models that change no result of a trained model, or that the arrays tell.
_TIMM_FREE = {
    *('img_size', 'patch_size', 'in_chans', 'num_classes', 'embed_dim', 'depth', 'mlp_ratio'),
    *('dynamic_img_size', 'dynamic_img_pad', 'drop_rate', 'pos_drop_rate', 'patch_drop_rate'),
    *('proj_drop_rate', 'attn_drop_rate', 'drop_path_rate', 'weight_init', 'fix_init', 'distilled'),
    *('qkv_bias', 'num_blocks', 'stem_norm', 'nlhb', 'pretrained_cfg', 'features_only'),
    *('init_values', 'no_embed_class', 'reg_tokens', 'pre_norm', 'qk_norm'),
}
# The values of others that this package computes, beside those that `_timm_settings` reads.
_TIMM_KNOWN: Mapping[str, Sequence[Any]] = {
    'scale_attn_norm': (False,),
    'scale_mlp_norm': (False,),
    'proj_bias': (True,),
    'pos_embed': ('learn',),
    'pool_include_prefix': (False,),
    'norm_layer': (None, '', 'layernorm'),
    'mlp_layer': (None, _GATED),
    'embed_norm_layer': (None, ''),
    'stem_norm': (False,),
}


_TIMM_READ = ('act_layer', 'global_pool', 'class_token', 'fc_norm', 'final_norm', 'num_heads')


def read(folder: pathlib.Path) -> dict[str, Any]:
    """What config.json (and preprocessor_config.json) of a folder tell.

    Args:
        folder: of Hugging Face or timm, or one that `export` wrote for torchvision.

    Returns:
        Those of these that are told: `num_heads`; `settings`, arguments of the model that its
        arrays do not tell; `of_classifier`, those that are others if there is a head, where the
        configuration does not tell; `class_names`; `input`, a `ModelInput`.

    Raises:
        UserError: damaged, or a setting that no model here computes.
    """
    config = files.read_json(folder / 'config.json')
    try:
        if 'architecture' in config:
            return _timm(folder, config)
        if config.get('library') == 'torchvision':  # what `export` writes
            return _torchvision(config)
        return _hugging_face(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as e:
        raise UserError(f'{folder / "config.json"} is damaged ({type(e).__name__}: {e})') from e


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `export` put into the header of a safetensors file; {} for another writer's."""
    try:
        known = {
            key: files.parse_json(metadata[key])
            for key in ('num_heads', 'image_size', 'class_names', 'settings', 'preprocessing')
            if key in metadata
        }
        names, settings = known.get('class_names', []), known.setdefault('settings', {})
        told = known.pop('preprocessing', {'crop': known.pop('image_size', 0)})
        if not isinstance(names, list) or not isinstance(settings, dict):
            return {}
        if type(known.get('num_heads', 0)) is not int:
            return {}
        preprocess = Preprocess.from_dict(told)
    except (ValueError, TypeError, UserError):  # another writer's idea of these words
        return {}
    known['settings'] = {'act': 'gelu_tanh', 'layer_norm_eps': 1e-6} | settings
    return known | {
        'class_names': [str(name) for name in names],
        'input': model_input.ModelInput(preprocess.crop, HALF, preprocess),
    }


@functools.cache
def timm_models() -> dict[str, dict[str, Any]]:
    """The arguments that each architecture of timm 1.0.31 sets by itself."""
    return {row['architecture']: json.loads(row['arguments']) for row in _timm_rows()}


@functools.cache
def evas() -> set[str]:
    """The architectures of timm whose class is Eva."""
    return {row['architecture'] for row in _timm_rows() if row['class'] == 'eva'}


@functools.cache
def _timm_rows() -> list[dict[str, str]]:
    with open(pathlib.Path(__file__).with_name('timm_models.csv'), encoding='utf-8') as file:
        return list(csv.DictReader(file))


def _timm(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    pretrained = config.get('pretrained_cfg', config)
    architecture = str(config['architecture']).split('.')[0]
    stated = config.get('model_args') or {}
    arguments = {**timm_models().get(architecture, {}), **stated}
    pooling, by_arguments = config.get('global_pool'), arguments.get('global_pool')
    eva = architecture in evas()
    by_arguments = by_arguments or ('avg' if eva else 'token')
    if not architecture.startswith('mixer') and pooling and pooling != by_arguments:
        raise UserError(
            f'{folder / "config.json"} states global_pool {pooling!r}, and timm would compute '
            f'{by_arguments!r}, by its model_args or its architecture: put the one that is meant '
            'into model_args'
        )
    known = of_timm_arguments(folder / 'config.json', architecture, arguments)
    names = config.get('label_names') or pretrained.get('label_names')
    if names:
        known['class_names'] = [str(name) for name in names]
    return known | {'input': model_input.of_timm(config)}


def of_timm_arguments(
    file: pathlib.Path, architecture: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """`settings` and `num_heads`, as `read` gives them, of a model of timm.

    Args:
        file: the file that states it, for errors.
        architecture: its name.
        arguments: all of them, those that the architecture sets included.

    Raises:
        UserError: a setting that no model here computes.
    """
    place = f'{file}: {architecture} of timm'
    if architecture in evas():
        _check_arguments(place, arguments, timm_eva.KNOWN, timm_eva.FREE)
        settings = timm_eva.settings(place, arguments)
    else:
        _check_arguments(place, arguments, _TIMM_KNOWN, {*_TIMM_FREE, *_TIMM_READ})
        settings = _timm_settings(place, architecture, arguments)
    if isinstance(norm := arguments.get('norm_layer'), Mapping):
        settings['layer_norm_eps'] = float(norm['eps'])
    if 'told_by_arrays' in settings:
        settings['told_by_arrays'] |= _sizes(arguments, 'embed_dim', 'depth')
    known: dict[str, Any] = {'settings': settings}
    if 'num_heads' in arguments:
        known['num_heads'] = int(arguments['num_heads'])
    return known


def _check_arguments(
    place: str,
    arguments: Mapping[str, Any],
    values: Mapping[str, Sequence[Any]],
    free: Collection[str],
) -> None:
    """Refuses arguments that are not `free` and have none of the `values` that are computed."""
    for name, value in arguments.items():
        if name in values:
            layer_norm = name == 'norm_layer' and _is_layer_norm(value)
            if value not in values[name] and not layer_norm:
                raise UserError(f'{place} has {name}={value!r}, which no model here computes')
        elif name not in free:
            raise UserError(f'{place} has the argument {name}={value!r}, which is not known here')


def _timm_settings(place: str, architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    act = str(arguments.get('act_layer') or 'gelu').lower()
    if act not in _TIMM_ACTIVATIONS:
        raise UserError(
            f'{place} has the activation {act!r}; known: {", ".join(_TIMM_ACTIVATIONS)}'
        )
    settings = {**DEFAULTS['timm'], 'act': _TIMM_ACTIVATIONS[act]}
    if architecture.startswith('mixer'):
        return settings
    pooling = arguments.get('global_pool', 'token')
    if pooling not in _POOLING:
        raise UserError(f'{place} has global_pool={pooling!r}; known: {", ".join(_POOLING)}')
    fc_norm = arguments.get('fc_norm')
    settings['classifier'] = _POOLING[pooling]
    settings['class_token'] = bool(arguments.get('class_token', True))
    if fc_norm is None:
        fc_norm = pooling in ('avg', 'max', 'avgmax')
    final_norm = bool(arguments.get('final_norm', True))
    settings['fc_norm'] = bool(fc_norm) and final_norm
    settings['final_norm'] = final_norm
    settings['told_by_arrays'] = {
        'qk_norm': bool(arguments.get('qk_norm')),
        'pre_norm': bool(arguments.get('pre_norm')),
        'layer_scale': arguments.get('init_values') is not None,
        'gated_mlp': arguments.get('mlp_layer') is not None,
        'registers': int(arguments.get('reg_tokens', 0)),
    }
    return settings


def _sizes(
    config: Mapping[str, Any], hidden_size: str, num_layers: str, mlp_dim: str = ''
) -> dict[str, int]:
    """The sizes that a configuration states under these names, by the names of ours."""
    names = {'hidden_size': hidden_size, 'num_layers': num_layers, 'mlp_dim': mlp_dim}
    return {ours: int(config[theirs]) for ours, theirs in names.items() if theirs in config}


def _is_layer_norm(layer: Any) -> bool:
    return (
        isinstance(layer, Mapping)
        and layer.keys() == {'name', 'eps'}
        and layer['name'] == 'LayerNorm'
    )


def _torchvision(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = config.get('arguments') or {}
    return {
        'num_heads': int(arguments.get('num_heads', 0)),
        'class_names': [str(name) for name in config.get('class_names', ())],
        'input': model_input.of_torchvision(config),
        # What is not there was not written, because it was these.
        'settings': {'act': 'gelu_tanh', 'layer_norm_eps': 1e-6, **config.get('settings', {})},
    }


def _hugging_face(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get('model_type', 'vit')
    if kind not in FAMILIES:
        raise UserError(
            f'{folder / "config.json"} has the model_type {kind!r}; known: {", ".join(FAMILIES)}'
        )
    family, tower = FAMILIES[kind], image_tower(config)
    known: dict[str, Any] = {
        'settings': {
            'act': hugging_face_activation(folder, tower, 'hidden_act', family.hidden_act),
            'layer_norm_eps': float(tower.get('layer_norm_eps', family.layer_norm_eps)),
            'representation_act': hugging_face_activation(folder, config, 'pooler_act', 'tanh'),
            **settings(kind, config),
        },
        'num_heads': int(tower.get('num_attention_heads', family.num_heads)),
    }
    if not config.get('architectures'):
        classifier = settings(kind, {**config, 'architectures': ['ForImageClassification']})
        names = ('classifier', 'final_norm', 'class_token')
        known['of_classifier'] = {name: classifier[name] for name in names if name in classifier}
    problem = config.get('problem_type')
    if problem == 'multi_label_classification':
        known['settings']['multi_label'] = True
    elif problem == 'regression':
        known['settings']['regression'] = True
    elif problem not in (None, 'single_label_classification'):
        raise UserError(
            f'{folder / "config.json"} has the problem_type {str(problem)[:100]!r}, and models '
            'here give scores of classes, or numbers'
        )
    sizes = _sizes(tower, 'hidden_size', 'num_hidden_layers', 'intermediate_size')
    if kind.startswith('dinov2'):
        sizes.pop('mlp_dim', None)  # which these have no word for
    told = known['settings'].get('told_by_arrays', {})
    known['settings']['told_by_arrays'] = {**sizes, **told}
    labels = {int(index): str(name) for index, name in (config.get('id2label') or {}).items()}
    if labels and labels != {index: f'LABEL_{index}' for index in range(len(labels))}:
        known['class_names'] = [labels[index] for index in sorted(labels)]
    return known | {
        'input': model_input.of_hugging_face(
            folder, {**config, **tower, 'model_type': kind}, family.resizes
        )
    }


def hugging_face_activation(
    folder: pathlib.Path, config: Mapping[str, Any], name: str, default: str
) -> str:
    """Our name of the activation function that a configuration has under `name`, or `default`.

    Raises:
        UserError: no model here computes it.
    """
    act = config.get(name) or default
    if not isinstance(act, str) or act not in _HUGGING_FACE_ACTIVATIONS:
        raise UserError(
            f'{folder / "config.json"} has {name} {str(act)[:100]!r}; known: '
            f'{", ".join(_HUGGING_FACE_ACTIVATIONS)}'
        )
    return _HUGGING_FACE_ACTIVATIONS[act]
