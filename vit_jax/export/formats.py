"""The formats a model can be exported to: which options go with each, and what writes it.

Nothing heavy is imported here: the command line reads this for its help and its checks.
"""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.inference import model_folder

INT8 = 'int8'

# What a verification found stands in <output>.verify.json.
REPORT_SUFFIX = '.verify.json'


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        suffix: what the name of the file has to end with; '' for any. None: it is a folder.
        options: fields of `Options` that it has.
        packages: what has to be installed to run it, as `pip install` takes it.
    """

    suffix: str | None
    options: tuple[str, ...]
    packages: str


_GRAPH = ('layout', 'probabilities', 'features', 'attention', 'preprocessing')

FORMATS: Mapping[str, Format] = {
    'onnx': Format('.onnx', ('opset', *_GRAPH, 'dtype'), 'onnxruntime'),
    'stablehlo': Format('', _GRAPH, 'jax flatbuffers'),
    'timm': Format(None, ('drop',), 'torch torchvision timm'),
    'huggingface': Format(None, ('drop',), 'torch transformers'),
    'torchvision': Format(None, ('drop',), 'torch torchvision'),
    'npz': Format('.npz', ('drop',), 'vit_jax'),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
        opset: version of ONNX's operators.
        layout: of the input, 'NHWC' or 'NCHW'.
        probabilities: whether the softmax of each image's logits takes their place.
        features: whether `features` is an output, too.
        attention: whether `attention` is an output, too.
        preprocessing: whether the input is uint8 in [0, 255] and normalised inside.
        dtype: 'float32', 'float16' or 'int8'.
        drop: layers to leave out, of `checkpoint.export.DROPPABLE`.
    """

    opset: int = 20
    layout: str = 'NHWC'
    probabilities: bool = False
    features: bool = False
    attention: bool = False
    preprocessing: bool = False
    dtype: str = 'float32'
    drop: tuple[str, ...] = ()


DEFAULT = Options()


def check(name: str, options: Options, output: str | os.PathLike[str]) -> None:
    """Raises `UserError` for what can be told before a model is read.

    Args:
        name: of the format.
        options: those that differ from the default have to go with the format.
        output: the file or folder to write.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.4)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f'unknown format {name!r}{hint} Known: {", ".join(FORMATS)}')
    form = FORMATS[name]
    for field in dataclasses.fields(Options):
        if getattr(options, field.name) != field.default and field.name not in form.options:
            takes = [n for n, f in FORMATS.items() if field.name in f.options]
            raise UserError(f'--{field.name} goes with --format {" or ".join(takes)}, not {name}')
    output = pathlib.Path(output)
    others = [f.suffix for f in FORMATS.values() if f.suffix]
    if form.suffix is None and output.suffix in (*others, '.safetensors', '.pth', '.pt'):
        raise UserError(f'--format {name} writes a folder; {output} looks like the name of a file')
    if form.suffix and output.suffix != form.suffix:
        raise UserError(
            f'--format {name} writes a file whose name ends in {form.suffix}; --output is {output}'
        )


def check_place(output: pathlib.Path) -> None:
    """Raises `UserError` if something is where files would be written, or their folder is not.

    Args:
        output: the file or folder to write.
    """
    if not output.name:
        raise UserError(f'{output} is no name for a file or folder')
    for place in (output, *_companions(output)):
        if place.exists() or place.is_symlink():
            raise UserError(f'{place} exists; remove it, or name another place')
    if not output.parent.is_dir():
        raise UserError(f'there is no folder {output.parent}; make it first, or name another place')


def _companions(output: pathlib.Path) -> list[pathlib.Path]:
    """What may be written beside an output: external data, a description, the report."""
    return [output.with_name(output.name + suffix) for suffix in ('.data', '.json', REPORT_SUFFIX)]


def outputs_of(model: 'model_folder.Model', name: str, options: Options) -> tuple[str, ...]:
    """Names of what an exported model gives, see `reference.OUTPUTS`.

    Where the logits prove nothing (there is no head, or it is all zeros), the libraries' models are
    asked for their features, too.

    Args:
        model: the model.
        name: of the format.
        options: as exported.
    """
    has_head = bool(model.model.num_classes)
    scores = ('probabilities' if options.probabilities else 'logits',) if has_head else ()
    if 'features' in FORMATS[name].options:
        extra = tuple(extra for extra in ('features', 'attention') if getattr(options, extra))
        return scores + extra or ('logits',)
    return scores + (() if has_head and not zero_head(model) else ('features',))


def zero_head(model: 'model_folder.Model') -> bool:
    """Whether there is a head, all zeros: logits then do not depend on the image."""
    import numpy as np

    heads = [model.params[name] for name in ('head', 'head_dist') if name in model.params]
    return bool(heads) and not any(np.any(head['kernel']) for head in heads)


def write(
    path: pathlib.Path, model: 'model_folder.Model', name: str, options: Options
) -> list[str]:
    """Writes a model, unverified. `deliver.export` is what to call.

    Args:
        path: a file or folder in a folder of its own, in which files may appear beside it.
        model: see `model_folder.load`; what `options.drop` names has been left out already.
        name: of the format.
        options: see `Options`.

    Returns:
        What the user should know, a sentence each.

    Raises:
        UserError: the format cannot express the model.
    """
    if name == 'onnx':
        return _write_onnx(path, model, options)
    if name == 'stablehlo':
        from vit_jax.export import stablehlo

        outputs = outputs_of(model, name, options)
        stablehlo.write(
            path,
            model,
            outputs=outputs,
            layout=options.layout,
            preprocessing=options.preprocessing,
        )
        return []
    from vit_jax.export import pytorch as export
    from vit_jax.inference import model_folder

    return export.write(
        path,
        model.params,
        to=name,
        model_config=model.model_config,
        image_size=model.image_size,
        class_names=model_folder.own_class_names(model),
    )


def _write_onnx(path: pathlib.Path, model: 'model_folder.Model', options: Options) -> list[str]:
    from vit_jax.export import onnx, onnx_quantize

    proto = onnx.build(
        model,
        opset=options.opset,
        layout=options.layout,
        output='probabilities' if options.probabilities else 'logits',
        features=options.features,
        attention=options.attention,
        preprocessing=options.preprocessing,
        dtype='float32' if options.dtype == INT8 else options.dtype,
    )
    if options.dtype != INT8:
        onnx.save(proto, path)
        return []
    full = path.with_name(f'float32-{path.name}')
    onnx.save(proto, full)
    onnx_quantize.quantize_dynamic(full, path)
    sizes = [file.stat().st_size / 2**20 for file in (full, path)]
    for file in path.parent.glob(f'{full.name}*'):
        file.unlink()
    return [f'{sizes[1]:.1f} MiB, {sizes[0]:.1f} MiB in float32']
