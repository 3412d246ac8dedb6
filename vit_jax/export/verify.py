"""Compares an exported model with JAX: loaded by its own runtime, in a separate process.

The images are real photographs. The exported model runs them at batch 1, 2 and 7 (a graph that has
one batch size built in, or mixes images, shows there), and all of them at 7; JAX computes the same
in exact float32, and `analysis/compare.py` has the limits of what may differ.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

from vit_jax import files
from vit_jax.analysis import compare
from vit_jax.data.batches import eval_batches
from vit_jax.data.examples import Example, Source
from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.errors import extra, printable
from vit_jax.export.expressible import in_units
from vit_jax.export.options import DEFAULT, FORMATS, Options
from vit_jax.export.outputs import forward
from vit_jax.inference import model_folder, predict
from vit_jax.run import child

VERIFIED, FAILED, NOT_VERIFIED = 'verified', 'failed', 'not verified'

# The largest batch an export is run at; fewer images are repeated to fill it.
BATCH = 7
# Batches of one and of two; whole ones follow.
_SMALL = ((0, 1), (1, 3))

# Of the photographs in scikit-learn (427 x 640 pixels): y, x, height, width.
_CROPS = (
    ('china.jpg', (0, 0, 427, 640)),
    ('flower.jpg', (0, 0, 427, 640)),
    ('china.jpg', (0, 0, 427, 427)),
    ('flower.jpg', (0, 213, 427, 427)),
    ('china.jpg', (127, 240, 300, 400)),
    ('flower.jpg', (60, 100, 240, 240)),
    ('china.jpg', (200, 0, 160, 213)),
)

_ROOT = pathlib.Path(__file__).parents[2]
_CHILD = pathlib.Path(__file__).with_name('runtimes.py')


@dataclasses.dataclass
class Report:
    """What a verification found.

    Attributes:
        status: VERIFIED, FAILED or NOT_VERIFIED.
        dtype: of the exported model, whose limits hold.
        reasons: why it is not verified, or failed, a sentence each.
        images: what it ran on.
        unit: what one of them is.
        rows: the comparisons.
        own: how far its logits are from JAX's where the library computes in its own form.
        facts: what the runtime reported: `runtime` (what ran it, with versions), `own_form`, ...
    """

    status: str
    dtype: str
    reasons: list[str] = dataclasses.field(default_factory=list)
    images: str = ''
    unit: str = 'images'
    rows: list[compare.ExportRow] = dataclasses.field(default_factory=list)
    own: compare.Difference = dataclasses.field(default_factory=compare.Difference)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def own_form(self) -> str:
        """What the library computes in its own form ('erf GELU'), or ''."""
        return self.facts.get('own_form', '')

    def set(self, status: str, reason: str) -> None:
        """Notes that it is not verified, or failed, and why."""
        self.status = status
        self.reasons.append(reason)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        own = {'form': self.own_form, 'logits': self.own.to_dict()} if self.own_form else None
        return {
            'status': self.status,
            'reasons': self.reasons,
            'runtime': self.facts.get('runtime', ''),
            'images': self.images,
            'dtype': self.dtype,
            'comparisons': [row.to_dict(self.dtype) for row in self.rows],
            'librarys_own_form': own,
            'facts': dict(self.facts),
        }

    def own_line(self) -> str:
        """What the library's own form costs, in a sentence."""
        own = self.own
        return (
            f'Compared with {self.own_form} set to the form of this package. As the library '
            f'computes it, logits differ by {own.max:.1e} at most, {own.mean:.1e} on average, and '
            f'the most probable class is the same for {own.agree} of {own.vectors} images'
        )

    def print(self, console: rich.console.Console) -> None:
        """Prints it."""
        if self.rows:
            console.print(f'Run by {self.facts["runtime"]}')
            console.print(f'on {printable(self.images)}; compared with JAX, exact float32\n')
            console.print(_table(self.rows, self.dtype, self.unit))
            console.print(f'\nAsked for: {compare.LIMITS[self.dtype]}')
        if self.own_form:
            console.print(self.own_line())
        listed = [entry for row in self.rows for entry in row.close]
        if self.dtype == 'float16' and listed:
            console.print('Another class, the two closer in JAX than the rounding of float16:')
            for key, ours, theirs in dict.fromkeys(listed):
                console.print(printable(f'  {key}: {ours} in JAX, {theirs} here'))
        console.print(self.verdict())

    def verdict(self) -> str:
        """The last line."""
        return f'{self.status}: {"; ".join(self.reasons)}' if self.reasons else self.status


def outputs_of(model: model_folder.Model, format: str, options: Options) -> tuple[str, ...]:
    """Names of what an exported model gives.

    Where the logits prove nothing (there is no head, or it is all zeros), the libraries' models are
    asked for their features, too.

    Args:
        model: the model.
        format: a key of `options.FORMATS`.
        options: as exported.
    """
    if 'features' in FORMATS[format].options:
        return options.outputs(model.model.num_classes)
    if not model.model.num_classes:
        return ('features',)
    return ('logits', 'features') if compare.zero_head(model.params) else ('logits',)


class Images(NamedTuple):
    """Images to verify on, at least `BATCH`: what reads them, a name of each, and all in words."""

    source: Source
    keys: Sequence[str]
    description: str


class _Examples(list[Example]):
    """Examples in memory, as a `Source`."""

    class_names: tuple[str, ...] = ()
    exif = False
    channels = 3


def images_for(paths: Sequence[str] = (), *, channels: int = 3) -> Images:
    """The user's images, or photographs that are always at hand.

    Args:
        paths: image files and folders of them; fewer than `BATCH` images are repeated. None: seven
            crops of the two photographs that scikit-learn has for such purposes (a temple, a
            flower), whose colours are repeated where there are to be more channels.
        channels: that the model takes.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    if not paths:
        with extra('export'):
            import sklearn.datasets  # here, because it takes a second to import

        found = sklearn.datasets.load_sample_images()
        names = [pathlib.Path(name).name for name in found.filenames]
        examples = _Examples()
        examples.channels = channels
        for name, (y, x, height, width) in _CROPS:
            photo = found.images[names.index(name)]
            key = f'{name} {height}x{width}+{y}+{x}'
            part = photo[y : y + height, x : x + width, np.arange(channels) % 3]
            examples.append(Example(part, 0, key))
        keys = [example.key for example in examples]
        return Images(examples, keys, "7 crops of scikit-learn's sample photographs")
    listed = predict.find_images(paths, channels=channels)
    keys = [listed[i % len(listed)] for i in range(max(BATCH, len(listed)))]
    repeated = '' if len(keys) == len(listed) else f', repeated to make {len(keys)}'
    return Images(
        predict.Images(keys, channels), keys, f'{len(listed)} images of --images{repeated}'
    )


def verify(
    model: model_folder.Model,
    path: str | os.PathLike[str],
    *,
    format: str,
    options: Options = DEFAULT,
    images: Images | None = None,
) -> Report:
    """Runs an exported model and compares.

    Args:
        model: what was exported.
        path: the file or folder.
        format: a key of `options.FORMATS`.
        options: as exported.
        images: what to run it on; default `images_for()`.

    Returns:
        The report. A model that cannot be loaded or run at all has FAILED; NOT_VERIFIED is one
        whose runtime is not installed, or whose outputs are the same whatever it computes.

    Raises:
        UserError: an image cannot be read.
    """
    model, images = in_units(model), images or images_for(channels=model.channels)
    outputs = outputs_of(model, format, options)
    report = Report(VERIFIED, options.dtype, images=images.description)
    pixels = functools.partial(_pixels, images.source, model.preprocess, options)
    request = {
        'format': format,
        'path': os.path.abspath(path),
        'outputs': outputs,
        'model_config': dict(model.model_config),
    }

    def expected() -> Iterator[Mapping[str, np.ndarray]]:
        needed = dict.fromkeys([*outputs, *(['logits'] if 'probabilities' in outputs else [])])
        compute = compare.compiled(forward(model.model, list(needed)), model.params)
        return (compute(normalize(batch)) for batch in pixels())

    def write(path: pathlib.Path) -> None:
        _write_images(path, pixels(), len(images.keys), options)

    run_and_compare(report, request, images.keys, write, expected)
    if report.status == VERIFIED:
        _conclude(model, report)
    return report


def run_and_compare(
    report: Report,
    request: Mapping[str, Any],
    keys: Sequence[str],
    write: Callable[[pathlib.Path], None],
    expected: Callable[[], Iterator[Mapping[str, np.ndarray]]],
) -> None:
    """Runs an exported model of any input at batch 1, 2 and `BATCH`, and compares.

    Args:
        report: gets status, rows and facts.
        request: see `runtimes.py`; `batches` are added.
        keys: names of the inputs, at least `BATCH`.
        write: writes all inputs into a `.npy` file.
        expected: gives JAX's outputs, `BATCH` inputs at a time; called when the model has run.
    """
    count = len(keys)
    batches = [*_SMALL, *((i, min(i + BATCH, count)) for i in range(0, count, BATCH))]
    with tempfile.TemporaryDirectory(prefix='vit_jax-verify-') as name:
        folder = pathlib.Path(name)
        write(folder / 'inputs.npy')
        files.write_json(folder / 'request.json', {**request, 'batches': batches})
        _run(folder, request['format'], report)
        if report.status == VERIFIED:
            _compare(folder, expected(), request['outputs'], batches, keys, report)
        far = {row.output for row in report.rows if not row.passed(report.dtype)}
        if report.status == VERIFIED and far:
            report.set(FAILED, f'{", ".join(sorted(far))} too far from JAX')


def _pixels(source: Source, preprocess: Preprocess, options: Options) -> Iterator[np.ndarray]:
    """Batches [BATCH, S, S, 3] float32 in [0, 255], rounded where the input is uint8."""
    for data in eval_batches(source, preprocess, batch=BATCH):
        yield np.rint(data['image']) if options.preprocessing else data['image']


def _write_images(
    path: pathlib.Path, batches: Iterable[np.ndarray], count: int, options: Options
) -> None:
    """Writes the input, [count, ...] in the layout and type of the exported model."""
    stored: Any = None
    for i, pixels in enumerate(batches):
        pixels = pixels.astype(np.uint8) if options.preprocessing else normalize(pixels)
        pixels = pixels.transpose(0, 3, 1, 2) if options.layout == 'NCHW' else pixels
        if stored is None:
            shape = (count, *pixels.shape[1:])
            stored = np.lib.format.open_memmap(path, 'w+', pixels.dtype, shape)
        stored[i * BATCH : (i + 1) * BATCH] = pixels[: count - i * BATCH]
    stored.flush()


def _run(folder: pathlib.Path, format: str, report: Report) -> None:
    """Runs the child process and fills in what it reports."""
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
    if format == 'npz':
        env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_ROOT), env.get('PYTHONPATH')]))
    done = child.run(
        [str(_CHILD), str(folder)],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors='replace',
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        how = lines[-1] if lines else f'it ended with status {done.returncode}'
        if done.returncode < 0:
            how = f'it was killed by signal {-done.returncode}'
        report.set(FAILED, f'it cannot be loaded and run ({FORMATS[format].packages}): {how}')
        return
    result = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
    if 'missing' in result:
        report.set(
            NOT_VERIFIED,
            f'{result["missing"]} is not installed ({result["why"]}). To run and verify this '
            f'format: pip install {FORMATS[format].packages}',
        )
        return
    report.facts = result


def _compare(
    folder: pathlib.Path,
    expected: Iterator[Mapping[str, np.ndarray]],
    outputs: Sequence[str],
    batches: Sequence[tuple[int, int]],
    keys: Sequence[str],
    report: Report,
) -> None:
    """Fills the rows; an output of another name, shape or type is a failure.

    `expected` are JAX's outputs, of `BATCH` images each, the last ones of padding.
    """
    rows: dict[tuple[str, int], compare.ExportRow] = {}
    chunks = itertools.groupby(enumerate(batches), lambda item: item[1][0] // BATCH)
    for (chunk, members), whole in zip(chunks, expected, strict=True):
        for i, (first, end) in members:
            with np.load(folder / f'outputs-{i}.npz') as file:
                found = dict(file)
            own = found.pop('own/logits', None)
            if found.keys() != set(outputs):
                names = ', '.join(sorted(found))
                report.set(FAILED, f'its outputs are {names}; expected {", ".join(outputs)}')
                return
            part = slice(first - chunk * BATCH, end - chunk * BATCH)
            ours = {name: array[part] for name, array in whole.items()}
            for problem in compare.add_export(rows, ours, found, keys[first:end]):
                report.set(FAILED, problem)
            if own is not None and i >= len(_SMALL):
                report.own.add(own, ours['logits'])
    report.rows = list(rows.values())


def _conclude(model: model_folder.Model, report: Report) -> None:
    """Compares class names, and says where the logits prove nothing."""
    names, found = model_folder.own_class_names(model), report.facts.get('class_names')
    if names and found is not None and tuple(found) != names:
        report.set(FAILED, f'its class names are {found[:5]}..., expected {list(names[:5])}...')
    elif compare.zero_head(model.params) and not (
        {row.output for row in report.rows} - set(compare.SCORES)
    ):
        report.set(
            NOT_VERIFIED,
            'the head is all zeros (weights for fine-tuning), so every logit is 0 whatever the '
            'rest computes; with --features there is something to compare',
        )


def _table(rows: Sequence[compare.ExportRow], dtype: str, unit: str) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        found, has_class = row.difference, row.output in compare.SCORES
        last = {'cosine': f'{found.lowest_cosine:.6f}', 'mean': f'{found.mean_cosine:.6f}'}
        cells = {
            'output': row.output,
            'batch': str(row.batch),
            unit: str(found.images),
            'largest': f'{found.largest:.3g}',
            'max diff': f'{found.max:.1e}',
            'mean diff': f'{found.mean:.1e}',
            'same top-1': f'{found.agree} of {found.vectors}' if has_class else '',
            **({'limit': f'{row.float32_limit:.1e}'} if dtype == 'float32' else last),
            '': 'ok' if row.passed(dtype) else 'TOO FAR',
        }
        if not table.columns:
            table.add_column('output', no_wrap=True)
            for name in [*cells][1:]:
                table.add_column(name, justify='right', no_wrap=True)
        table.add_row(*cells.values())
    return table
