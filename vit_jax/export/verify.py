"""Holds an exported model against JAX: loaded by its own runtime, in a process of its own.

The images are real photographs. The exported model runs them at batch 1, 2 and 7 (a graph that has
one batch size built in, or mixes images, shows there), and all of them at 7; JAX computes the same
in exact float32 (see `reference.py`), and `judge.py` says what may differ.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.analysis import compare as parity
from vit_jax.errors import UserError
from vit_jax.export import formats, judge, reference, runtimes, samples
from vit_jax.inference import model_folder

VERIFIED, FAILED, NOT_VERIFIED = 'verified', 'failed', 'not verified'

# Batches of one and of two; whole ones follow.
_SMALL = ((0, 1), (1, 3))

_ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Report:
    """What a verification found.

    Attributes:
        status: VERIFIED, FAILED or NOT_VERIFIED.
        dtype: of the exported model, whose bounds hold.
        reasons: why it is not verified, or failed, a sentence each.
        runtime: what ran it, with versions.
        images: what it ran on.
        rows: the comparisons.
        own_form: what the library computes in a form of its own ('erf GELU'), or ''.
        own: how far its logits are from JAX's with that.
        facts: what else the runtime told.
    """

    status: str
    dtype: str
    reasons: list[str] = dataclasses.field(default_factory=list)
    runtime: str = ''
    images: str = ''
    rows: list[judge.Row] = dataclasses.field(default_factory=list)
    own_form: str = ''
    own: parity.Difference = dataclasses.field(default_factory=parity.Difference)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        own = {'form': self.own_form, 'logits': self.own.to_dict()} if self.own_form else None
        return {
            'status': self.status,
            'reasons': self.reasons,
            'runtime': self.runtime,
            'images': self.images,
            'dtype': self.dtype,
            'comparisons': [row.to_dict(self.dtype) for row in self.rows],
            'librarys_own_form': own,
            'facts': dict(self.facts),
        }

    def own_line(self) -> str:
        """What the library's own form costs, in a sentence; '' where it has none."""
        if not self.own_form:
            return ''
        own = self.own
        return (
            f'Compared with {self.own_form} set to the form of this package. As the library '
            f'computes it, logits differ by {own.max:.1e} at most, {own.mean:.1e} on average, and '
            f'the most probable class is the same for {own.agree} of {own.vectors} images'
        )

    def print(self, console: Any) -> None:
        """Prints it on a `rich.console.Console`."""
        if self.rows:
            console.print(f'Run by {self.runtime}')
            console.print(f'on {self.images}; compared with JAX, exact float32\n')
            console.print(judge.table(self.rows, self.dtype))
            console.print(f'\nAsked for: {judge.bound(self.dtype)}')
        if self.own_form:
            console.print(self.own_line())
        listed = [entry for row in self.rows for entry in row.close]
        if self.dtype == 'float16' and listed:
            console.print('Another class, the two closer in JAX than the rounding of float16:')
            for key, ours, theirs in dict.fromkeys(listed):
                console.print(f'  {key}: {ours} in JAX, {theirs} here')
        console.print(self.verdict())

    def verdict(self) -> str:
        """The last line."""
        return f'{self.status}: {"; ".join(self.reasons)}' if self.reasons else self.status


def verify(
    model: model_folder.Model,
    path: str | os.PathLike[str],
    *,
    format: str,
    options: formats.Options = formats.DEFAULT,
    images: samples.Samples | None = None,
) -> Report:
    """Runs an exported model and compares.

    Args:
        model: what was exported (without what `options.drop` names).
        path: the file or folder.
        format: a key of `formats.FORMATS`.
        options: as it was exported.
        images: what to run it on; default `samples.of(model)`.

    Returns:
        The report. A model that cannot be loaded or run at all has FAILED; NOT_VERIFIED is one
        whose runtime is not installed, or whose outputs are the same whatever it computes.

    Raises:
        UserError: an image cannot be read.
    """
    images = samples.of(model) if images is None else images
    outputs = formats.outputs_of(model, format, options)
    report = Report(VERIFIED, options.dtype, images=images.description)
    with tempfile.TemporaryDirectory(prefix='vit_jax-verify-') as name:
        folder = pathlib.Path(name)
        batches = _write_images(folder / 'images.npy', images, model.image_size, options)
        request = {
            'format': format,
            'path': os.path.abspath(path),
            'outputs': outputs,
            'batches': batches,
            'model_config': dict(model.model_config),
        }
        (folder / 'request.json').write_text(json.dumps(request), encoding='utf-8')
        _run(folder, format, report)
        if report.status == VERIFIED:
            _compare(folder, model, outputs, batches, images.keys, options, report)
    if report.status == VERIFIED:
        _check_names(model, report)
        _judge(model, report)
    return report


def _write_images(
    path: pathlib.Path, images: samples.Samples, size: int, options: formats.Options
) -> list[tuple[int, int]]:
    """Writes the input, [n, ...] in the model's layout and type; returns the batches to run."""
    nchw = options.layout == 'NCHW'
    shape = (3, size, size) if nchw else (size, size, 3)
    dtype = np.uint8 if options.preprocessing else np.float32
    count = len(images)
    stored = np.lib.format.open_memmap(path, mode='w+', dtype=dtype, shape=(count, *shape))
    for i, pixels in enumerate(images):
        image = samples.to_input(pixels, preprocessing=options.preprocessing)
        stored[i] = image.transpose(2, 0, 1) if nchw else image
    stored.flush()
    whole = [(i, min(i + samples.BATCH, count)) for i in range(0, count, samples.BATCH)]
    return [*_SMALL, *whole]


def _run(folder: pathlib.Path, format: str, report: Report) -> None:
    """Runs the child process; what it says goes into the report."""
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
    if format == 'npz':
        env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_ROOT), env.get('PYTHONPATH')]))
    done = subprocess.run(
        [sys.executable, '-P', runtimes.__file__, str(folder)],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors='replace',
    )
    packages = formats.FORMATS[format].packages
    if done.returncode == runtimes.NOT_INSTALLED:
        missing = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
        report.status = NOT_VERIFIED
        report.reasons.append(
            f'{missing["missing"]} is not installed ({missing["why"]}). To run and verify this '
            f'format: pip install {packages}'
        )
    elif done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        how = lines[-1] if lines else f'it ended with status {done.returncode}'
        if done.returncode < 0:
            how = f'it was killed by signal {-done.returncode}'
        report.status = FAILED
        report.reasons.append(f'it cannot be loaded and run ({packages}): {how}')
    else:
        report.facts = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
        report.runtime = report.facts['runtime']
        report.own_form = report.facts.get('own_form', '')


def _compare(
    folder: pathlib.Path,
    model: model_folder.Model,
    outputs: Sequence[str],
    batches: Sequence[tuple[int, int]],
    keys: Sequence[str],
    options: formats.Options,
    report: Report,
) -> None:
    """Fills the rows; an output of another name, shape or type is a failure."""
    needed = dict.fromkeys([*outputs, *(['logits'] if 'probabilities' in outputs else [])])
    compute = reference.runner(model.model, model.params, list(needed))
    stored = np.load(folder / 'images.npy', mmap_mode='r')
    rows: dict[tuple[str, int], judge.Row] = {}
    ours: Mapping[str, np.ndarray] = {}
    chunk = -1
    for i, (first, end) in enumerate(batches):
        with np.load(folder / f'outputs-{i}.npz') as file:
            found = dict(file)
        own = {name: found.pop(name) for name in list(found) if name.startswith('own/')}
        if found.keys() != set(outputs):
            report.reasons.append(
                f'its outputs are {", ".join(sorted(found))}; expected {", ".join(outputs)}'
            )
            break
        if first // samples.BATCH != chunk:
            chunk = first // samples.BATCH
            start = chunk * samples.BATCH
            ours = _reference(compute, stored[start : start + samples.BATCH], options)
        wanted = {name: array[first - start : end - start] for name, array in ours.items()}
        with np.errstate(invalid='ignore', over='ignore'):  # not finite is told by the rows
            report.reasons += judge.compare(rows, wanted, found, keys[first:end])
            if 'own/logits' in own and i >= len(_SMALL):
                report.own.add(wanted['logits'], own['own/logits'])
    report.rows = list(rows.values())
    if report.reasons:
        report.status = FAILED


def _reference(compute, stored: np.ndarray, options: formats.Options) -> Mapping[str, np.ndarray]:
    """JAX's outputs for a batch of stored input, always computed at one batch size."""
    images = np.array(stored)
    if options.layout == 'NCHW':
        images = images.transpose(0, 2, 3, 1)
    if options.preprocessing:
        images = samples.to_input(images.astype(np.float32), preprocessing=False)
    count = len(images)
    padding = np.zeros((samples.BATCH - count, *images.shape[1:]), np.float32)
    outputs = compute(np.concatenate([images, padding]))
    return {name: array[:count] for name, array in outputs.items()}


def _check_names(model: model_folder.Model, report: Report) -> None:
    """Class names that the format keeps have to be the model's."""
    names, found = model_folder.own_class_names(model), report.facts.get('class_names')
    if names and found is not None and tuple(found) != names:
        report.status = FAILED
        report.reasons.append(f'its class names are {found[:5]}..., expected {list(names[:5])}...')


def _judge(model: model_folder.Model, report: Report) -> None:
    far = {row.output for row in report.rows if not row.passed(report.dtype)}
    if far and report.status == VERIFIED:
        report.status = FAILED
        report.reasons.append(f'{", ".join(sorted(far))} too far from JAX')
    proves = {row.output for row in report.rows} - set(judge.SCORES)
    if report.status == VERIFIED and formats.zero_head(model) and not proves:
        report.status = NOT_VERIFIED
        report.reasons.append(
            'the head is all zeros (weights for fine-tuning), so every logit is 0 whatever the '
            'rest computes; with --features there is something to compare'
        )


class VerificationError(UserError):
    """An exported model does not compute what the model computes.

    Attributes:
        report: what was found.
    """

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report
