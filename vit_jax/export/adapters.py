"""Adapter folders of PEFT (https://github.com/huggingface/peft): written, and merged into a model.

A folder has `adapter_config.json` and `adapter_model.safetensors`; those that are written here also
`vit_jax.json`, which is a model folder's `model.json` of the whole, without weights. Tensors are
called `base_model.model.LAYER.lora_A.weight` [rank, inputs], `.lora_B.weight` [outputs, rank],
`.lora_magnitude_vector` [outputs], and the head, which is trained as a whole, as in the model. With
the name of an adapter in them, `.lora_A.default.weight`, they are read as well.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax import files, groups
from vit_jax.checkpoint import adapt, key_tables, npz, tensors
from vit_jax.errors import UserError
from vit_jax.export import to_hugging_face
from vit_jax.export.expressible import UnsupportedError
from vit_jax.inference import labels, model_folder, soup
from vit_jax.models import lora

CONFIG_FILE, TENSORS_FILE = 'adapter_config.json', 'adapter_model.safetensors'
MODEL_FILE = 'vit_jax.json'
_PREFIX = 'base_model.model.'
_PART = re.compile(
    r'(?P<layer>.+)\.(?:(?P<matrix>lora_[AB])(?:\.\w+)?\.weight'
    r'|(?P<magnitude>lora_magnitude_vector)(?:\.\w+)?(?:\.weight)?)'
)
_SAVED = re.compile(r'(?P<module>.+?)(?:\.modules_to_save\.\w+)?\.(?P<array>weight|bias)')


def write(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    settings: lora.Lora,
    model: model_folder.Model,
    base: str,
) -> str:
    """Writes the adapters and the head of a model.

    Layers are called as in the class of transformers that computes the model; where there is none
    (Mixers, hybrids, average pooling), as here, with dots: only this package can use these.

    Args:
      folder: replaced, if it is one of an adapter.
      params: nested dict of NumPy arrays, with those of the adapters.
      settings: the adapters.
      model: of the merged weights, which are not read.
      base: name or path of the weights that the adapters are for.

    Returns:
      The class of transformers; '' for none.
    """
    folder = pathlib.Path(folder).absolute()
    files.recover(folder)
    if folder.exists() and not (folder / CONFIG_FILE).exists():
        raise UserError(f'{folder} exists and is not the folder of an adapter; name another place')
    flat = npz.flatten(params)
    layers = [name.removesuffix(f'/{lora.A}') for name in flat if name.endswith(f'/{lora.A}')]
    heads = [name for name in flat if re.fullmatch(groups.HEAD, name)]
    theirs, kind = _names(model, [f'{layer}/kernel' for layer in layers] + heads)
    found: dict[str, np.ndarray] = {}
    for layer in layers:
        name = _PREFIX + theirs[f'{layer}/kernel'].removesuffix('.weight')
        found[f'{name}.lora_A.weight'] = flat[f'{layer}/{lora.A}'].T
        found[f'{name}.lora_B.weight'] = flat[f'{layer}/{lora.B}'].T
        if settings.dora:
            found[f'{name}.lora_magnitude_vector'] = flat[f'{layer}/{lora.MAGNITUDE}']
    for name in heads:
        found[_PREFIX + theirs[name]] = flat[name].T

    def last(names: Sequence[str]) -> list[str]:
        return sorted({theirs[name].rpartition('.')[0].rpartition('.')[2] for name in names})

    alpha = settings.rank * settings.scale
    described = {
        'peft_type': 'LORA',
        'task_type': None,
        'base_model_name_or_path': base,
        'inference_mode': True,
        'r': settings.rank,
        'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
        'lora_dropout': settings.dropout,
        'use_dora': settings.dora,
        'target_modules': last([f'{layer}/kernel' for layer in layers]),
        'modules_to_save': last(heads),
        'bias': 'none',
        'fan_in_fan_out': False,
    }
    with files.atomic_folder(folder, exists='replace') as part:
        tensors.save_safetensors(part / TENSORS_FILE, found, {})
        files.write_json(part / CONFIG_FILE, described, indent=2)
        files.write_json(part / MODEL_FILE, model_folder.describe(model))
    return kind


def _names(model: model_folder.Model, names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Name of ours -> that of the tensor in transformers, and its class; or as here, and ''."""
    try:
        table, described = to_hugging_face.describe(model, npz.flatten(model.params))
        config = described['config.json']
        # As the layers of the pinned transformers are called, not the files of earlier ones.
        table = {'Hugging Face': 'Hugging Face v5'}.get(table, table)
        each = {name: key_tables.spellings(name, table) for name in names}
        # Of several the newest; of heads the first, from which `name` makes that of the class.
        ours = {
            found[0 if re.fullmatch(groups.HEAD, name) else -1]: name
            for name, found in each.items()
            if found
        }
        if len(ours) != len(names):
            raise UnsupportedError('a layer is a part of another one there')
        named = to_hugging_face.name(ours, config)
        return {name: theirs for theirs, name in named.items() if isinstance(name, str)}, config[
            'architectures'
        ][0]
    except UnsupportedError:
        ends = {'kernel': 'weight', 'bias': 'bias'}
        split = {name: name.split('/') for name in names}
        return {name: '.'.join([*path[:-1], ends[path[-1]]]) for name, path in split.items()}, ''


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """What a folder holds: A [rank, inputs], B [outputs, rank] and what else belongs to them."""

    layers: Mapping[str, Mapping[str, np.ndarray]]
    saved: Mapping[str, np.ndarray]
    config: Mapping[str, Any]

    def scale(self, layer: str) -> float:
        rank = len(self.layers[layer]['lora_A'])
        alpha = self.config.get('lora_alpha', 8)
        for pattern, value in (self.config.get('alpha_pattern') or {}).items():
            if re.fullmatch(rf'(?:.*\.)?(?:{pattern})', layer):
                alpha = value
        return alpha / (rank**0.5 if self.config.get('use_rslora') else rank)

    def changed(self, layer: str, weight: np.ndarray) -> np.ndarray:
        """The weight [outputs, inputs] of a layer with its adapter merged."""
        part, weight = self.layers[layer], weight.astype(np.float64)
        whole = weight + self.scale(layer) * (part['lora_B'].astype(np.float64) @ part['lora_A'])
        if 'lora_magnitude_vector' in part:
            lengths = np.linalg.norm(whole, axis=1)
            whole *= (part['lora_magnitude_vector'].reshape(-1) / lengths)[:, None]
        return whole.astype(np.float32)


def merged(base: model_folder.Model, folder: str | os.PathLike[str]) -> model_folder.Model:
    """A model with an adapter merged into its weights.

    Args:
      base: the weights that the adapter was made for, see `model_folder.load`.
      folder: of PEFT, or of a run of this package (`adapter/`), which also tells classes, image
        size and preprocessing; of another, those of `base` stay, and classes of a new head have no
        names.

    Raises:
      UserError: the folder is damaged, or holds something else than LoRA or DoRA of dense layers;
        or it does not fit the model.
    """
    folder = files.expand(folder)
    adapter = _read(folder)
    base = _as_trained(base, folder)
    flat = dict(npz.flatten(base.params))
    heads = base.model_config.get('transformer', {}).get('num_heads', 0)
    places = _places([*(f'{layer}.weight' for layer in adapter.layers), *adapter.saved], flat)
    missing = []
    for layer in adapter.layers:
        place = places.get(f'{layer}.weight')
        if place is None:
            missing.append(layer)
            continue
        try:
            flat |= place.change(flat, heads, functools.partial(adapter.changed, layer))
        except ValueError as error:
            a, b = (adapter.layers[layer][name].shape for name in ('lora_A', 'lora_B'))
            raise UserError(
                f'{folder}: the adapter of {layer}, {b[0]} x {a[1]} of rank {a[0]}, does not fit '
                f'{place.ours[0]} {tuple(flat[place.ours[0]].shape)}: it is of another model'
            ) from error
    for name, array in adapter.saved.items():
        place = places.get(name)
        if place is None or not re.fullmatch(groups.HEAD, place.ours[0]):
            missing.append(name)
        else:
            flat |= place.read(array, heads)
    if missing:
        name = base.model_config.get('model_name') or 'this model'
        raise UserError(
            f'{folder}: no layer of {name} is called '
            f'{adapt.shorten(missing, 4)}: the adapter is of another model'
        )
    params = npz.nest(flat, folder)
    classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
    names = base.class_names
    if len(names) != classes:
        names = labels.numbered(classes)
    source = {**base.source, 'adapter': str(folder)}
    module = base.model.clone(num_classes=classes)
    result = dataclasses.replace(
        base, model=module, params=params, class_names=names, source=source
    )
    model_folder.check(result)
    return result


def _as_trained(base: model_folder.Model, folder: pathlib.Path) -> model_folder.Model:
    """The base at the size, and with the classes, of the model that the adapter was trained in."""
    if not (folder / MODEL_FILE).is_file():
        return base
    import jax

    trained = model_folder.of_description(folder / MODEL_FILE)
    size = (1, *trained.preprocess.size, base.channels)
    shapes = jax.eval_shape(
        lambda x: trained.model.init(jax.random.key(0), x, train=False)['params'],
        jax.ShapeDtypeStruct(size, np.float32),
    )
    name_of_base = str(base.source.get('file', 'the base'))
    params = soup.fitted(base, trained, shapes, name_of_base)
    flat = npz.flatten(params)
    kept = {name: leaf for name, leaf in flat.items() if not re.fullmatch(groups.HEAD, name)}
    if lacking := [n for n, leaf in kept.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise UserError(
            f'{name_of_base} has no {adapt.shorten(lacking, 4)}: other weights than those that '
            f'the adapter in {folder} was trained with, or the training began with new ones, which '
            'it does not hold; the model folder beside it is whole'
        )
    source = {**trained.source, **base.source}
    return dataclasses.replace(trained, params=npz.nest(kept, folder), source=source)


def _read(folder: pathlib.Path) -> _Adapter:
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f'{folder} is no folder of an adapter: it has no {CONFIG_FILE}')
    config = files.read_json(folder / CONFIG_FILE)
    refused = {
        'peft_type': config.get('peft_type', 'LORA') != 'LORA',
        'bias': config.get('bias', 'none') != 'none',
        'fan_in_fan_out': bool(config.get('fan_in_fan_out')),
        'lora_bias': bool(config.get('lora_bias')),
    }
    for name in (name for name, is_so in refused.items() if is_so):
        raise UserError(
            f'{folder / CONFIG_FILE}: {name}={config[name]!r} is not read here: LoRA and DoRA of '
            'dense layers are, without biases of their own'
        )
    numbers = [config.get('lora_alpha', 8), *(config.get('alpha_pattern') or {}).values()]
    if not all(type(n) in (int, float) and np.isfinite(n) for n in numbers):
        raise UserError(f'{folder / CONFIG_FILE}: lora_alpha and alpha_pattern have to be numbers')
    paths = [folder / name for name in (TENSORS_FILE, 'adapter_model.bin')]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f'{folder} has no {TENSORS_FILE}; copy the folder again')
    layers: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, np.ndarray] = {}
    for name, lazy in tensors.open_tensors(path)[0].items():
        array, plain = np.asarray(lazy, np.float32), name.removeprefix(_PREFIX)
        if not np.isfinite(array).all():
            raise UserError(f'{path}: {name} has values that are NaN or infinite')
        if part := _PART.fullmatch(plain):
            layers.setdefault(part['layer'], {})[part['matrix'] or part['magnitude']] = array
        elif '.original_module.' in plain:
            continue
        elif (part := _SAVED.fullmatch(plain)) and 'lora_' not in plain:
            saved[f'{part["module"]}.{part["array"]}'] = array
        else:
            raise UserError(f'{path}: {name} is no part of LoRA or DoRA of a dense layer')
    _check(layers, bool(config.get('use_dora')), path)
    return _Adapter(layers, saved, config)


def _check(layers: Mapping[str, Mapping[str, np.ndarray]], dora: bool, path: pathlib.Path) -> None:
    expected = {'lora_A', 'lora_B', *(['lora_magnitude_vector'] if dora else [])}
    if not layers:
        raise UserError(f'{path} has no lora_A: it holds no adapter')
    for layer, part in layers.items():
        if part.keys() != expected:
            raise UserError(
                f'{path}: {layer} has {", ".join(sorted(part))}, and {CONFIG_FILE} (use_dora='
                f'{dora}) asks for {", ".join(sorted(expected))}'
            )
        a, b = part['lora_A'], part['lora_B']
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise UserError(
                f'{path}: lora_A {a.shape} and lora_B {b.shape} of {layer} are no [rank, inputs] '
                'and [outputs, rank]'
            )
        if dora and part['lora_magnitude_vector'].size != len(b):
            raise UserError(f'{path}: lora_magnitude_vector of {layer} has not {len(b)} numbers')


def _places(names: Sequence[str], flat: Mapping[str, Any]) -> dict[str, key_tables.Place]:
    """Where the tensors of these names are in our parameters."""
    layouts = {
        **dict.fromkeys(('query/kernel', 'key/kernel', 'value/kernel'), 'heads'),
        'out/kernel': 'out',
    }
    found = {}
    for theirs in names:  # called as here
        path, _, array = theirs.replace('.', '/').rpartition('/')
        ours = f'{path}/{"kernel" if array == "weight" else array}'
        if ours in flat or re.fullmatch(groups.HEAD, ours):
            plain = 'dense' if array == 'weight' else 'same'
            layout = layouts.get('/'.join(ours.split('/')[-2:]), plain)
            found[theirs] = key_tables.Place((ours,), layout)
    return key_tables.places(names, flat) | found
