"""Exports a model to a file for its runtime: written, verified, and only then moved into place."""

import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console

import vit_jax
from vit_jax import files, variants
from vit_jax.errors import UserError, printable
from vit_jax.export import pytorch, stablehlo, verify
from vit_jax.export.options import DEFAULT, REPORT_SUFFIX, Options, check
from vit_jax.inference import model_folder


def export(
    model: model_folder.Model,
    output: str | os.PathLike[str],
    *,
    format: str,
    options: Options = DEFAULT,
    verified: bool = True,
    images: Sequence[str] = (),
    told: Mapping[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> verify.Report | None:
    """Exports a model.

    Beside `output` stands `<output>.verify.json`, what the verification found, also as text.

    Args:
        model: what `model_folder.load` gives.
        output: the file or folder to write; must not exist, its folder must.
        format: a key of `options.FORMATS`.
        options: see `Options`.
        verified: whether to run the exported model and compare; without it nothing is promised.
        images: files and folders of images to verify on; default photographs of scikit-learn's.
        told: more for the metadata of an ONNX or StableHLO file.
        console: for what happens; by default none of it is shown.

    Returns:
        The report; None if not `verified`.

    Raises:
        UserError: the format or an option cannot express the model, the exported model does not
            compute what the model computes, or the output cannot be written. Nothing was written.
    """
    check(format, options, output)
    model, notes = pytorch.drop_layers(model, options.drop)
    chosen = verify.images_for(images, channels=model.channels) if verified else None

    def make(path: pathlib.Path) -> list[str]:
        return [*notes, *write(path, model, format, options, told)]

    def test(path: pathlib.Path) -> verify.Report:
        return verify.verify(model, path, format=format, options=options, images=chosen)

    what = (
        f'{in_words(model.model_config.get("model_name"), model.params)}, '
        f'{variants.in_words(model.image_size)} px, {len(model.class_names)} classes'
    )
    return carry_out(output, format, options, what, make, test if verified else None, console)


def carry_out(
    output: str | os.PathLike[str],
    format: str,
    options: Options,
    what: str,
    make: Callable[[pathlib.Path], Sequence[str]],
    test: Callable[[pathlib.Path], verify.Report] | None,
    console: rich.console.Console | None,
) -> verify.Report | None:
    """Writes an export and verifies it, whatever it is of.

    Args:
        output: see `export`; `check` has passed.
        format: see `export`.
        options: see `export`.
        what: the model in words.
        make: writes a path, and gives what the user should know, a sentence each.
        test: verifies what was written; None for not.
        console: see `export`.

    Returns:
        See `export`.

    Raises:
        UserError: what was written is not the model, or the output cannot be written.
    """
    output = pathlib.Path(output)
    console = console or rich.console.Console(quiet=True)
    with files.atomic_group(output) as folder:
        made = folder / output.name
        notes = make(made)
        size = sum(file.stat().st_size for file in _files(made)) / 2**20
        console.print(f'{what}: {size:.1f} MiB, {options.dtype}')
        for note in notes:
            console.print(f'  {printable(note)}')
        if test is None:
            console.print('not verified (--no-verify)')
            return None
        report = test(made)
        report.print(console)
        if report.status == verify.FAILED:
            raise UserError(f'{output} was not written: {"; ".join(report.reasons)}')
        if report.own_form:
            with open(made / pytorch.PAGES[format], 'a', encoding='utf-8') as page:
                page.write('\n## Measured when this was written\n\n')
                page.write(f'{report.own_line()} ({report.images}).\n')
        place = made.with_name(f'{output.name}{REPORT_SUFFIX}')
        files.write_json(place, _description(made, format, options, report))
    return report


def write(
    path: pathlib.Path,
    model: model_folder.Model,
    name: str,
    options: Options,
    told: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes a model, unverified. `export` is what to call.

    Args:
        path: a file or folder, alone in its folder; other files may be written beside it.
        model: see `export`; what `options.drop` names has been left out already.
        name: of the format.
        options: see `Options`.
        told: see `export`.

    Returns:
        What the user should know, a sentence each.

    Raises:
        UserError: the format cannot express the model.
    """
    if name == 'stablehlo':
        stablehlo.write(path, model, options, told)
        return []
    if name != 'onnx':
        return pytorch.write(path, model, to=name)
    from vit_jax.export import onnx  # needs packages that no other format needs

    return write_onnx(path, onnx.build(model, options, told), options)


def write_onnx(path: pathlib.Path, proto: Any, options: Options) -> list[str]:
    """Writes an ONNX graph in the type that was asked for; see `write`."""
    from vit_jax.export import onnx, onnx_quantize

    if options.dtype != 'int8' or options.weights_only:
        onnx.save(proto, path)
        return []
    full = onnx_quantize.quantize_dynamic(proto, path)
    return [f'{path.stat().st_size / 2**20:.1f} MiB, {full / 2**20:.1f} MiB before']


def in_words(name: Any, params: Any) -> str:
    """Name and size of a model."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f'{name or "a model of no known variant"}, {count:,} parameters'


def _files(made: pathlib.Path) -> list[pathlib.Path]:
    """Every file of an export: of its folder, or it and those beside it."""
    return sorted(
        p for p in (made.rglob('*') if made.is_dir() else made.parent.iterdir()) if p.is_file()
    )


def _description(
    made: pathlib.Path, format: str, options: Options, report: verify.Report
) -> dict[str, Any]:
    """What stands in <output>.verify.json."""
    text = io.StringIO()
    report.print(rich.console.Console(file=text, markup=False, width=120))
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
