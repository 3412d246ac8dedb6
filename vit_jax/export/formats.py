"""Exports a model to a file for its runtime: written, verified, and only then moved into place.

The formats, which options go with each, and what writes it. Nothing heavy is imported at the top:
the command line reads this for its help and its checks.
"""

import dataclasses
import difflib
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax import files
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.export import verify
    from vit_jax.inference import model_folder

# What a verification found stands in <output>.verify.json.
REPORT_SUFFIX = '.verify.json'


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        suffix: required ending of the file's name; '' for any, None for a folder.
        options: fields of `Options` that it has.
    """

    suffix: str | None
    options: tuple[str, ...]


_GRAPH = ('layout', 'probabilities', 'features', 'attention', 'preprocessing')

FORMATS: Mapping[str, Format] = {
    'onnx': Format('.onnx', ('opset', *_GRAPH, 'dtype')),
    'stablehlo': Format('', _GRAPH),
    'timm': Format(None, ('drop',)),
    'huggingface': Format(None, ('drop',)),
    'torchvision': Format(None, ('drop',)),
    'npz': Format('.npz', ('drop',)),
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
        drop: layers to leave out, of `pytorch.DROPPABLE`.
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
    """Raises `UserError` for what can be checked before a model is read.

    Args:
        name: of the format.
        options: those that differ from the default have to go with the format.
        output: the file or folder to write, which must not exist, in a folder that does.
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
    if not output.name:
        raise UserError(f'--output {output} has no name; give that of a file or folder')
    # External data, a description and the report may be written beside it.
    for suffix in ('', '.data', '.json', REPORT_SUFFIX):
        if os.path.lexists(place := output.with_name(output.name + suffix)):
            raise UserError(f'{place} exists; remove it, or name another place')
    if not output.parent.is_dir():
        raise UserError(f'there is no folder {output.parent}; make it first, or name another place')


def outputs_of(model: 'model_folder.Model', name: str, options: Options) -> tuple[str, ...]:
    """Names of what an exported model gives, see `verify.OUTPUTS`.

    Where the logits prove nothing (there is no head, or it is all zeros), the libraries' models are
    asked for their features, too.

    Args:
        model: the model.
        name: of the format.
        options: as exported.
    """
    from vit_jax.analysis import compare

    has_head = bool(model.model.num_classes)
    scores = ('probabilities' if options.probabilities else 'logits',) if has_head else ()
    if 'features' in FORMATS[name].options:
        extra = tuple(extra for extra in ('features', 'attention') if getattr(options, extra))
        return scores + extra or ('logits',)
    return scores + (() if has_head and not compare.zero_head(model.params) else ('features',))


def export(
    model: 'model_folder.Model',
    output: str | os.PathLike[str],
    *,
    format: str,
    options: Options = DEFAULT,
    verified: bool = True,
    images: Sequence[str] = (),
    console: Any = None,
) -> 'verify.Report | None':
    """Exports a model.

    Beside `output` stands `<output>.verify.json`, what the verification found, also as text.

    Args:
        model: what `model_folder.load` gives.
        output: the file or folder to write; must not exist, its folder must.
        format: a key of `FORMATS`.
        options: see `Options`.
        verified: whether to run the exported model and compare; without it nothing is promised.
        images: files and folders of images to verify on; default photographs of scikit-learn's.
        console: a `rich.console.Console` for what happens; default none of it is shown.

    Returns:
        The report; None if not `verified`.

    Raises:
        UserError: the format or an option cannot express the model, the exported model does not
            compute what the model computes, or the output cannot be written. Nothing was written.
    """
    from vit_jax.export import pytorch, verify

    output = pathlib.Path(output)
    check(format, options, output)
    model, notes = pytorch.drop_layers(model, options.drop)
    outputs = outputs_of(model, format, options)
    if format in ('onnx', 'stablehlo'):
        verify.check_outputs(model.model, outputs)
    chosen = verify.images_for(images) if verified else None
    say = console.print if console else lambda *_: None
    with files.atomic_group(output) as folder:
        made = folder / output.name
        notes += write(made, model, format, options)
        say(_described(model, options, made))
        for note in notes:
            say(f'  {note}')
        if not verified:
            say('not verified (--no-verify)')
            return None
        report = verify.verify(
            model,
            made,
            format=format,
            outputs=outputs,
            dtype=options.dtype,
            layout=options.layout,
            preprocessing=options.preprocessing,
            images=chosen,
        )
        if console:
            report.print(console)
        if report.status == verify.FAILED:
            raise UserError(f'{output} was not written: {"; ".join(report.reasons)}')
        _note_own_form(made, report)
        place = made.with_name(f'{output.name}{REPORT_SUFFIX}')
        files.write_json(place, _description(made, format, options, report))
    return report


def write(
    path: pathlib.Path, model: 'model_folder.Model', name: str, options: Options
) -> list[str]:
    """Writes a model, unverified. `export` is what to call.

    Args:
        path: a file or folder, alone in its folder; other files may be written beside it.
        model: see `export`; what `options.drop` names has been left out already.
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

        stablehlo.write(
            path,
            model,
            outputs=outputs_of(model, name, options),
            layout=options.layout,
            preprocessing=options.preprocessing,
        )
        return []
    from vit_jax.export import pytorch

    return pytorch.write(path, model, to=name)


def _write_onnx(path: pathlib.Path, model: 'model_folder.Model', options: Options) -> list[str]:
    from vit_jax.export import onnx, onnx_quantize

    int8 = options.dtype == 'int8'
    proto = onnx.build(
        model,
        opset=options.opset,
        layout=options.layout,
        output='probabilities' if options.probabilities else 'logits',
        features=options.features,
        attention=options.attention,
        preprocessing=options.preprocessing,
        dtype='float32' if int8 else options.dtype,
    )
    if not int8:
        onnx.save(proto, path)
        return []
    full = path.with_name(f'float32-{path.name}')
    onnx.save(proto, full)
    onnx_quantize.quantize_dynamic(full, path)
    sizes = [file.stat().st_size / 2**20 for file in (full, path)]
    for file in path.parent.glob(f'{full.name}*'):
        file.unlink()
    return [f'{sizes[1]:.1f} MiB, {sizes[0]:.1f} MiB in float32']


def _described(model: 'model_folder.Model', options: Options, made: pathlib.Path) -> str:
    import jax

    name = model.model_config.get('model_name') or 'a model of no known variant'
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    size = sum(file.stat().st_size for file in _files(made)) / 2**20
    return (
        f'{name}, {count:,} parameters, {model.image_size} px, {len(model.class_names)} classes: '
        f'{size:.1f} MiB, {options.dtype}'
    )


def _files(made: pathlib.Path) -> list[pathlib.Path]:
    """Every file of an export: of its folder, or it and those beside it."""
    return sorted(
        p for p in (made.rglob('*') if made.is_dir() else made.parent.iterdir()) if p.is_file()
    )


def _note_own_form(made: pathlib.Path, report: 'verify.Report') -> None:
    """Adds what was measured of the library's own form to the page in the folder."""
    if not report.own_form:
        return
    page = next(page for name in ('NOTE.md', 'README.md') if (page := made / name).is_file())
    with open(page, 'a', encoding='utf-8') as f:
        f.write(f'\n## Measured when this was written\n\n{report.own_line()} ({report.images}).\n')


def _description(
    made: pathlib.Path, format: str, options: Options, report: 'verify.Report'
) -> dict[str, Any]:
    """What stands in <output>.verify.json."""
    import io

    import jax
    import numpy as np
    import rich.console

    import vit_jax

    text = io.StringIO()
    report.print(rich.console.Console(file=text, width=120))
    entries = {}
    for path in _files(made):
        with open(path, 'rb') as f:
            digest = hashlib.file_digest(f, 'sha256').hexdigest()
        name = str(path.relative_to(made.parent))
        entries[name] = {'bytes': path.stat().st_size, 'sha256': digest}
    return {
        'output': made.name,
        'format': format,
        'options': dataclasses.asdict(options),
        **report.to_dict(),
        'text': text.getvalue().splitlines(),
        'files': entries,
        'versions': {
            'vit_jax': vit_jax.__version__,
            'jax': jax.__version__,
            'numpy': np.__version__,
        },
    }
