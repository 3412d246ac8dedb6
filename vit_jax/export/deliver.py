"""A model to a file that its runtime can use: written, verified, and only then there.

Everything is made in a hidden folder beside the place it is for, and moved when it is verified, so
that neither a failure nor an interruption leaves half of anything.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

import vit_jax
from vit_jax import models
from vit_jax.checkpoint import npz
from vit_jax.errors import UserError
from vit_jax.export import formats, reference, samples, verify
from vit_jax.export import pytorch as library_export
from vit_jax.inference import model_folder


def export(
    model: model_folder.Model,
    output: str | os.PathLike[str],
    *,
    format: str,
    options: formats.Options = formats.DEFAULT,
    verified: bool = True,
    images: Sequence[str] = (),
    console: Any = None,
) -> verify.Report | None:
    """Exports a model.

    Beside `output` stands `<output>.verify.json`, what the verification found, also as text.

    Args:
        model: what `model_folder.load` gives.
        output: the file or folder to write; must not exist, its folder must.
        format: a key of `formats.FORMATS`.
        options: see `formats.Options`.
        verified: whether to run the exported model and compare; without it nothing is promised.
        images: files and folders of images to verify on; default photographs of scikit-learn's.
        console: a `rich.console.Console` for what happens; default none of it is shown.

    Returns:
        The report; None if not `verified`.

    Raises:
        UserError: the format or an option cannot express the model, or the output cannot be
            written.
        VerificationError: the exported model is not the model. Nothing was written.
    """
    output = pathlib.Path(output)
    formats.check(format, options, output)
    formats.check_place(output)
    if format in ('onnx', 'stablehlo'):
        reference.check(model.model, formats.outputs_of(model, format, options))
    chosen = samples.of(model, images) if verified else None
    say = console.print if console else lambda *_: None
    model, notes = _without(model, options.drop)
    with _staging(output) as staging:
        made = staging / output.name
        notes += formats.write(made, model, format, options)
        for line in [_described(model, options, made), *notes]:
            say(f'  {line}' if line in notes else line)
        if not verified:
            say('not verified (--no-verify)')
            _move(staging, output)
            return None
        report = verify.verify(model, made, format=format, options=options, images=chosen)
        if console:
            report.print(console)
        if report.status == verify.FAILED:
            raise verify.VerificationError(
                f'{output} was not written: {"; ".join(report.reasons)}', report
            )
        _note_own_form(made, report)
        _write_report(
            staging / f'{output.name}{formats.REPORT_SUFFIX}', made, format, options, report
        )
        _move(staging, output)
    return report


@contextlib.contextmanager
def _staging(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder beside `output`, gone in the end."""
    staging = output.with_name(f'.{output.name}.{os.getpid()}.part')
    try:
        staging.mkdir()
        yield staging
    except OSError as e:
        raise UserError(f'cannot write {output}: {e}') from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move(staging: pathlib.Path, output: pathlib.Path) -> None:
    """Moves everything beside the output, and the output itself last."""
    formats.check_place(output)  # it took a while
    made = sorted(staging.iterdir(), key=lambda path: path.name == output.name)
    done: list[pathlib.Path] = []
    try:
        for path in made:
            place = output.with_name(path.name)
            done.append(place)
            os.rename(path, place)
    except BaseException:  # an interruption, too
        for place in done:
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        raise


def _without(
    model: model_folder.Model, drop: Sequence[str]
) -> tuple[model_folder.Model, list[str]]:
    """The model without the layers in `drop`, and what to say about it."""
    if not drop:
        return model, []
    flat, config, notes = library_export.drop_layers(
        npz.flatten(model.params), model.model_config, drop
    )
    module = models.from_config(config, num_classes=model.model.num_classes)
    params = npz.nest(flat, pathlib.Path('the model'))
    return dataclasses.replace(model, model=module, params=params, model_config=config), notes


def _described(model: model_folder.Model, options: formats.Options, made: pathlib.Path) -> str:
    name = model.model_config.get('model_name') or 'a model of no known variant'
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    size = sum(entry['bytes'] for entry in _files(made, checksums=False).values()) / 2**20
    return (
        f'{name}, {count:,} parameters, {model.image_size} px, {len(model.class_names)} classes: '
        f'{size:.1f} MiB, {options.dtype}'
    )


def _files(made: pathlib.Path, *, checksums: bool = True) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of every file of an export: of its folder, or it and beside it."""
    if made.is_dir():
        paths = sorted(path for path in made.rglob('*') if path.is_file())
    else:
        paths = sorted(made.parent.iterdir())
    found = {}
    for path in paths:
        name = str(path.relative_to(made.parent))
        found[name] = {'bytes': path.stat().st_size}
        if checksums:
            with open(path, 'rb') as f:
                found[name]['sha256'] = hashlib.file_digest(f, 'sha256').hexdigest()
    return found


def _note_own_form(made: pathlib.Path, report: verify.Report) -> None:
    """Adds what was measured of the library's own form to the page in the folder."""
    if not report.own_form:
        return
    page = next(page for name in ('NOTE.md', 'README.md') if (page := made / name).is_file())
    with open(page, 'a', encoding='utf-8') as f:
        f.write(f'\n## Measured when this was written\n\n{report.own_line()} ({report.images}).\n')


def _write_report(
    path: pathlib.Path,
    made: pathlib.Path,
    format: str,
    options: formats.Options,
    report: verify.Report,
) -> None:
    import io

    import rich.console

    text = io.StringIO()
    report.print(rich.console.Console(file=text, width=120))
    content = {
        'output': made.name,
        'format': format,
        'options': dataclasses.asdict(options),
        **report.to_dict(),
        'text': text.getvalue().splitlines(),
        'files': _files(made),
        'versions': {
            'vit_jax': vit_jax.__version__,
            'jax': jax.__version__,
            'numpy': np.__version__,
        },
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
