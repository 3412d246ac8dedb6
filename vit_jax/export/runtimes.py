"""Runs an exported model in the runtime it was made for: the child process of `verify.py`.

    python -P runtimes.py FOLDER

FOLDER holds `request.json` (format, path, outputs, batches, and what a format needs besides) and
`inputs.npy` (images or tokens of texts, in the layout and type that the model takes). For each
batch `[first, end)` the outputs are written to `outputs-I.npz`, at the end `result.json`, which
names the package that is missing if the runtime is not installed. Outputs are named as in
`outputs.py`; `own/logits` are those of a library that computes a layer in its own form, on which
the verdict does not depend.

Only `npz`, whose runtime this package is, imports anything of it: the others prove that the file is
enough. (-P, because Python would otherwise look for `onnx` in the folder of this file first.)
"""

import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Outputs = Mapping[str, np.ndarray]
Run = Callable[[np.ndarray], Outputs]


class NotInstalledError(Exception):
    """A package that the runtime needs cannot be imported: its name, and why."""


def main(folder: str) -> None:
    """Does what the request says."""
    place = pathlib.Path(folder)
    request = json.loads((place / 'request.json').read_text(encoding='utf-8'))
    inputs = np.load(place / 'inputs.npy', mmap_mode='r')
    try:
        start = time.perf_counter()
        run, facts = _RUNTIMES[request['format']](request)
        loaded = time.perf_counter()
        for i, (first, end) in enumerate(request['batches']):
            outputs = run(np.array(inputs[first:end]))
            np.savez(place / f'outputs-{i}.npz', allow_pickle=False, **outputs)
    except NotInstalledError as e:
        result: dict[str, Any] = dict(zip(('missing', 'why'), e.args, strict=True))
    else:
        result = {
            **facts,
            'load_seconds': round(loaded - start, 3),
            'run_seconds': round(time.perf_counter() - loaded, 3),
            'imported_vit_jax': 'vit_jax' in sys.modules,
        }
    (place / 'result.json').write_text(json.dumps(result), encoding='utf-8')


def _require(name: str, package: str = '') -> Any:
    """Imports a module of a package that may not be there."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise NotInstalledError(package or name, str(e)) from e


def _onnx(request: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    onnxruntime = _require('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        request['path'], options, providers=['CPUExecutionProvider']
    )
    (given,) = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    metadata = session.get_modelmeta().custom_metadata_map
    return lambda inputs: dict(zip(names, session.run(None, {given.name: inputs}), strict=True)), {
        'runtime': f'onnxruntime {onnxruntime.__version__}',
        'input': {'name': given.name, 'shape': given.shape, 'type': given.type},
        'class_names': json.loads(metadata['class_names']) if 'class_names' in metadata else None,
    }


def _stablehlo(request: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    jax = _require('jax')
    _require('flatbuffers')
    export = importlib.import_module('jax.export')
    with open(request['path'], 'rb') as f:
        model = export.deserialize(bytearray(f.read()))
    with open(f'{request["path"]}.json', encoding='utf-8') as f:
        description = json.load(f)
    (given,) = model.in_avals
    return lambda inputs: {k: np.asarray(v) for k, v in model.call(inputs).items()}, {
        'runtime': f'jax {jax.__version__}',
        'input': {'shape': [str(size) for size in given.shape], 'type': given.dtype.name},
        'class_names': description.get('class_names'),
    }


def _npz(request: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    import vit_jax
    from vit_jax import checkpoint, models
    from vit_jax.analysis import compare
    from vit_jax.export.outputs import forward

    params = checkpoint.load(request['path'])
    head = params.get('head')
    module = models.from_config(
        request['model_config'], num_classes=head['bias'].shape[0] if head else 0
    )
    return compare.compiled(forward(module, request['outputs']), params), {
        'runtime': f'vit_jax {vit_jax.__version__}',
        'class_names': None,
    }


def _timm(request: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    torch, torchvision = _require('torch'), _torchvision()
    timm = _require('timm')
    model = timm.create_model(f'local-dir:{request["path"]}', pretrained=True)
    forms = [
        _standardised(torch, module)
        for module in model.modules()
        if type(module).__name__.startswith('StdConv2d')
    ]
    act = request['model_config'].get('act') or 'gelu_tanh'
    if 'mlp_tokens' in str(model) and act == 'gelu_tanh':
        # timm has no argument for it; README.md in the folder sets it like this.
        tanh = torch.nn.GELU(approximate='tanh')
        mlps = [mlp for block in model.blocks for mlp in (block.mlp_tokens, block.mlp_channels)]
        forms = [_Form('erf GELU', mlp, 'act', mlp.act, tanh) for mlp in mlps]

    def compute(images: Any) -> dict[str, Any]:
        x = model.forward_features(images)
        return {
            'logits': model.forward_head(x),
            'features': model.forward_head(x, pre_logits=True),
        }

    return _torch_run(request, torch, model, compute, forms), {
        'runtime': f'timm {timm.__version__}, PyTorch {torch.__version__}, '
        f'torchvision {torchvision.__version__}',
        'own_form': _names(forms),
        'class_names': model.pretrained_cfg.get('label_names'),
    }


def _hugging_face(request: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    torch = _require('torch')
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
    transformers = _require('transformers')
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(request['path'], local_files_only=True)
    (name,) = config.architectures
    pooled = {}
    if name == 'ViTModel':
        # As the README.md in the folder says: without `pre_logits` there is no pooler.
        pooled = {'add_pooling_layer': request['model_config']['representation_size'] is not None}
    model, info = getattr(transformers, name).from_pretrained(
        request['path'], local_files_only=True, output_loading_info=True, **pooled
    )
    for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        if info[what]:
            raise ValueError(f'from_pretrained reports {what}: {sorted(map(str, info[what]))}')
    encoder = getattr(model, 'vit', None) or getattr(model, 'deit', None) or model

    def compute(images: Any) -> dict[str, Any]:
        outputs = {}
        if 'logits' in request['outputs']:
            outputs['logits'] = model(images).logits
        if 'features' in request['outputs']:
            found = encoder(images)
            outputs['features'] = found.pooler_output if pooled.get('add_pooling_layer') else None
            if outputs['features'] is None:
                tokens = 2 if config.model_type == 'deit' else 1
                outputs['features'] = found.last_hidden_state[:, :tokens].mean(dim=1)
        return outputs

    return _torch_run(request, torch, model, compute), {
        'runtime': f'transformers {transformers.__version__}, PyTorch {torch.__version__}',
        'class_names': [config.id2label[i] for i in range(config.num_labels)],
    }


def _torchvision_model(request: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
    torch, torchvision = _require('torch'), _torchvision()
    load_file = _require('safetensors.torch', 'safetensors').load_file
    folder = pathlib.Path(request['path'])
    description = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    model = torchvision.models.VisionTransformer(**description['arguments'])
    model.load_state_dict(load_file(folder / 'model.safetensors'))
    gelus = [module for module in model.modules() if isinstance(module, torch.nn.GELU)]
    if description['settings']['act'] != 'gelu_tanh':
        gelus = []
    forms = [_Form('erf GELU', gelu, 'approximate', gelu.approximate, 'tanh') for gelu in gelus]
    features: list[Any] = []
    model.heads.head.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))

    def compute(images: Any) -> dict[str, Any]:
        logits = model(images)
        return {'logits': logits, 'features': features.pop()}

    return _torch_run(request, torch, model, compute, forms), {
        'runtime': f'torchvision {torchvision.__version__}, PyTorch {torch.__version__}',
        'own_form': _names(forms),
        'class_names': description.get('class_names'),
    }


class _Form(NamedTuple):
    """A layer that a library computes in its own form: the attribute, its value and ours."""

    name: str
    module: Any
    attribute: str
    theirs: Any
    ours: Any


def _names(forms: Sequence[_Form]) -> str:
    return ' and '.join(dict.fromkeys(form.name for form in forms))


def _standardised(torch: Any, module: Any) -> _Form:
    """Kernels: timm divides by sqrt(variance + 1e-8), this package by (deviation + 1e-5).

    Its form is the same for a kernel and for a multiple s of it but for the epsilon, which becomes
    1e-8 / s^2; with s as below it is ours: s^2 = 1e-8 / ((deviation + 1e-5)^2 - variance).
    """
    weight = module.weight.detach()
    exact = weight.double()
    variance = exact.var(dim=(1, 2, 3), keepdim=True, correction=0)
    ours = (variance.sqrt() + 1e-5).square()
    scaled = exact * (module.eps / (ours - variance)).sqrt()
    parameter = torch.nn.Parameter(scaled.to(weight.dtype))
    return _Form('its standardisation of weights', module, 'weight', module.weight, parameter)


def _torch_run(
    request: Mapping[str, Any],
    torch: Any,
    model: Any,
    compute: Callable[[Any], Mapping[str, Any]],
    forms: Sequence[_Form] = (),
) -> Run:
    """Runs a model that takes NCHW, as PyTorch does, on images [B, S, S, 3]."""
    model.eval()

    def run(images: np.ndarray) -> Outputs:
        outputs: dict[str, np.ndarray] = {}
        with torch.inference_mode():
            x = torch.from_numpy(images).permute(0, 3, 1, 2)
            for prefix in ('own/', '') if forms else ('',):
                for form in forms:
                    value = form.theirs if prefix else form.ours
                    setattr(form.module, form.attribute, value)
                found = compute(x)
                outputs |= {prefix + name: found[name].numpy() for name in request['outputs']}
        return outputs

    return run


def _torchvision() -> Any:
    """torchvision, also where its compiled operators do not fit PyTorch's build.

    A build for another PyTorch (CUDA's beside the CPU's, say) cannot be imported, because the
    operators of object detection are missing. No Vision Transformer uses them: declared, but not
    defined, they are enough.
    """
    torch = _require('torch')
    try:
        return _require('torchvision')
    except RuntimeError as e:
        if 'torchvision::nms' not in str(e):
            raise NotInstalledError('torchvision', f'it cannot be imported: {e}') from e
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        del sys.modules[name]
    operators = torch.library.Library('torchvision', 'DEF')
    for name in ('nms', 'qnms'):
        operators.define(f'{name}(Tensor a) -> Tensor')
    torchvision = _require('torchvision')
    torchvision.operators = operators  # which live as long as this object
    return torchvision


_RUNTIMES = {
    'onnx': _onnx,
    'stablehlo': _stablehlo,
    'npz': _npz,
    'timm': _timm,
    'huggingface': _hugging_face,
    'torchvision': _torchvision_model,
}

if __name__ == '__main__':
    main(sys.argv[1])
