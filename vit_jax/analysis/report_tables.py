"""The tables of a report: numbers formatted for people, from what the run wrote."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.analysis.report_settings import NONE, cut
from vit_jax.analysis.run_files import MODEL_FOLDER, Run
from vit_jax.analysis.tables import Table
from vit_jax.data import splits
from vit_jax.errors import UserError
from vit_jax.inference import description, retrieval
from vit_jax.inference import metrics_report as classification_report
from vit_jax.run.telemetry import format_duration, format_rate

if TYPE_CHECKING:
    from vit_jax.analysis.report_examples import Predictions
    from vit_jax.inference.metrics import AnyMetrics, Metrics

MAX_EVENTS = 200


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the cost of training depends on beside the model, with the limits of a description."""

    crop: description.Side | tuple[description.Side, description.Side]
    batch: int
    remat: str
    channels: int = 3


def state(run: Run) -> str:
    """How far a run is."""
    of = f' of {run.total_steps:,}' if run.total_steps else ''
    if run.finished:
        return f'finished, {run.steps:,}{of} steps'
    if run.stopped:
        return f'stopped, {run.steps:,}{of} steps done; it can go on'
    return f'not finished, {run.steps:,}{of} steps so far: it is under way, or was ended'


def summary(runs: Sequence[Run]) -> Table:
    """The latest values of each run, a column for each."""
    texts: dict[str, Callable[[Run], str]] = {
        'Training steps': lambda run: f'{run.steps:,}',
        'Validation accuracy, last': lambda run: _share(run.last('accuracy_val')),
        'Validation accuracy, best': lambda run: _best(run, 'accuracy_val'),
        'Validation loss, last': lambda run: _loss(run.last('loss_val')),
        'Test accuracy, last': lambda run: _share(run.last('accuracy_test')),
        'Test accuracy, best': lambda run: _best(run, 'accuracy_test'),
        'Mean average precision, validation': lambda run: _share(
            run.last('mean_average_precision_val')
        ),
        'Mean average precision, test': lambda run: _share(run.last('mean_average_precision_test')),
        'Mean absolute error, validation': lambda run: _number(run.last('mae_val')),
        'Mean absolute error, test': lambda run: _number(run.last('mae_test')),
        'Root mean squared error, test': lambda run: _number(run.last('rmse_test')),
        'R2, test': lambda run: _number(run.last('r2_test')),
        **{
            f'{retrieval.words(direction).capitalize()}, recall at '
            f'{" / ".join(map(str, retrieval.RECALLS))}, {words}': functools.partial(
                _recalls, direction=direction, split=split
            )
            for split, words in (('val', 'validation'), ('test', 'test'))
            for direction in retrieval.DIRECTIONS
        },
        'Top-5 test accuracy, last': lambda run: _share(run.last('accuracy_top5_test')),
        'Test loss, last': lambda run: _loss(run.last('loss_test')),
        'Training loss, last batch': lambda run: _loss(run.last('train_loss')),
        'Training accuracy, last batch': lambda run: _share(run.last('accuracy_train')),
        'Training speed, median (images/s per device)': _speed,
        'Compiling and first step': lambda run: _duration(run.last('first_step_s')),
        'Time from first to last event': lambda run: _duration(run.wall_seconds()),
    }
    rows = [(name, *map(text, runs)) for name, text in texts.items()]
    kept = [row for row in rows if any(value != NONE for value in row[1:])]
    return Table('Results', ('', *(f'{run.name}>' for run in runs)), kept)


def _recalls(run: Run, direction: str, split: str) -> str:
    """The last recalls of a direction, and the median rank."""
    values = [run.last(f'{direction}_recall{first}_{split}') for first in retrieval.RECALLS]
    if None in values:
        return NONE
    median = _number(run.last(f'{direction}_median_rank_{split}'))
    return f'{" / ".join(map(_share, values))} (median rank {median})'


def folds(runs: Sequence[Run]) -> Table | None:
    """Mean, deviation and 95 % interval over the folds of a cross-validation; None of other runs.

    The interval is Student's t of independent values, which folds are not quite.
    """
    found = [_fold(run) for run in runs]
    numbers = {fold[1] for fold in found if fold}
    if len(runs) < 2 or None in found or len(numbers) > 1:
        return None
    from scipy import stats

    number, seen = max(numbers), [fold[0] for fold in found if fold]
    notes = [
        'The last test of each fold. Folds share training images, so that the interval is narrower '
        'than that of independent runs would be.'
    ]
    if missing := sorted(set(range(1, number + 1)) - set(seen)):
        notes.append(f'Folds that are not here: {", ".join(map(str, missing))}.')
    if len(seen) > len(set(seen)):
        notes.append('A fold is here more than once, and counts as often.')
    if unfinished := [run.name for run in runs if not run.finished]:
        notes.append(f'Not finished: {", ".join(unfinished)}.')
    order = np.argsort(seen, kind='stable').tolist()
    rows = []
    for name, (key, shown) in _OF_FOLDS.items():
        values = [runs[place].last(key) for place in order]
        known = np.array([np.nan if value is None else value for value in values])
        known = known[np.isfinite(known)]
        if not len(known):
            continue
        deviation = float(known.std(ddof=1)) if len(known) > 1 else math.nan
        half = stats.t.ppf(0.975, len(known) - 1) * deviation / math.sqrt(len(known))
        ends = [shown(float(known.mean() + sign * half)) for sign in (-1, 1)]
        interval = ' to '.join(ends) if len(known) > 1 else NONE
        spread = shown(deviation) if len(known) > 1 else NONE
        rows.append((name, shown(float(known.mean())), spread, interval, *map(shown, values)))
    heads = (f'Fold {seen[place]}/{number}>' for place in order)
    columns = ('', 'Mean>', 'Deviation>', '95 % interval>', *heads)
    return Table('Cross-validation', columns, rows, notes)


def _fold(run: Run) -> tuple[int, int] | None:
    """(2, 5) of a run on the second of five folds."""
    text = run.config.get('fold')
    try:
        return splits.fold_of(text) if isinstance(text, str) and text else None
    except UserError:  # config.json may come from anywhere
        return None


def costs(run: Run) -> Table:
    """What the model and its training take, by formula, beside what was measured."""
    title, columns = 'Cost', ('', '>')
    if run.of_pairs:
        return Table(title, columns, (), ('Left out: it is counted for models of one tower.',))
    try:
        rows, notes = _costs(run)
    except (UserError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = cut(str(error) if isinstance(error, UserError) else repr(error))
        return Table(title, columns, (), (f'Left out: config.json does not tell it ({reason}).',))
    return Table(title, columns, rows, notes)


def classes(metrics: 'Metrics') -> Table:
    """How each class did."""
    rows, note = classification_report.class_rows(metrics)
    columns = ('Class', 'Precision>', 'Recall>', 'F1>', 'Images>', 'Most often taken for')
    return Table('Classes', columns, rows, (note,) if note else ())


def confused(metrics: 'Metrics') -> Table:
    """The classes most often taken for another."""
    rows = [
        (f'{right} → {taken}', *numbers)
        for right, taken, *numbers in classification_report.confused_rows(metrics)
    ]
    return Table('Most confused', ('Class → taken for', 'Images>', 'Share of the class>'), rows)


def details(metrics: 'AnyMetrics') -> list[Table]:
    """How each class, or number, did."""
    return [
        Table(
            detail.title.capitalize(),
            [heading[0].upper() + heading[1:] for heading in detail.columns],
            detail.rows,
            (detail.note,) if detail.note else (),
        )
        for detail in classification_report.details(metrics)
    ]


def results(found: 'Predictions', run: Run) -> Table:
    """All classes together."""
    metrics = found.metrics
    rows = [(name[0].upper() + name[1:], v) for name, v in classification_report.summary(metrics)]
    if metrics.count < found.available:
        which, last = f'a fixed random sample of {metrics.count:,} of the {found.available:,}', ''
    else:
        which = f'all {metrics.count:,}'
        given = [(text(run.last(name)), words) for name, text, words in _LAST]
        told = next((f'{shown}{words}' for shown, words in given if shown != NONE), NONE)
        last = f' The last evaluation of the run itself gave {told}.'
    note = (
        f'Predicted again for this page, by the model in {run.chosen}/, {which} test images: '
        f'{found.source}.{last}'
    )
    return Table('Test images', ('', '>'), rows, (note,))


def happened(run: Run) -> Table:
    """Counts of what did not go as planned."""
    resumed, unreadable = 'not known', 'not known'
    if run.events is not None:
        resumed = ', '.join(f'{step:,}' for step in run.resumes())
        resumed = cut(f'from step {resumed}') if resumed else 'no'
        unreadable = f'{run.unreadable():,}'
    not_finite = np.isnan(run.series('train_loss')[1]).sum()
    rows = [
        ('Resumed', resumed),
        ('Unreadable images named in the log', unreadable),
        ('Training images replaced by others', _count(run.last('replaced_images'))),
        ('Unreadable test images, last evaluation', _count(run.last('unreadable_test'))),
        ('Updates skipped (loss or gradient not finite)', _count(run.last('skipped_steps'))),
        ('Logged steps whose loss was not finite', f'{not_finite:,}'),
    ]
    return Table('What happened', ('', '>'), rows)


def events(run: Run) -> list[tuple[str, str]]:
    """(time, text) of the entries to show; long texts, and the middle of a long list, are cut."""
    # The curves show the evaluations.
    shown = [event for event in run.events or () if event['event'] != 'evaluated']
    found = [(cut(event['time']), cut(event['text'])) for event in shown]
    half = MAX_EVENTS // 2
    if len(found) > MAX_EVENTS:
        gap = f'… {len(found) - 2 * half:,} more events in events.jsonl …'
        found[half:-half] = [('', gap)]
    return found


def _costs(run: Run) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows and notes; raises nearly anything where the configuration is damaged."""
    from vit_jax.analysis import counts

    model, num_classes = description.architecture(
        {'config': run.config['model'], 'num_classes': len(run.data['class_names'])}
    )
    settings = description.read(_Settings, {**run.config, **run.config['pp']})
    size, channels = settings.crop, settings.channels
    forward = counts.forward_macs(model, num_classes, size, channels)
    training = counts.training_macs(model, num_classes, size, settings.remat, channels)
    images = run.steps * settings.batch
    rows = [
        ('Parameters', f'{counts.parameters(model, num_classes, size, channels):,}'),
        ('Forward, one image (GFLOPs)', f'{2 * forward / 1e9:,.4g}'),
        ('Training, one image (GFLOPs)', f'{2 * training / 1e9:,.4g}'),
        ('Images trained on', f'{images:,}'),
        ('Training so far (PFLOPs)', f'{2 * training * images / 1e15:,.4g}'),
    ]
    notes = ['Parameters and FLOPs by formula (see vit_jax cost), memory by the compiler.']
    speed = _speeds(run)
    if speed:
        rate = statistics.median(speed) * 2 * training / 1e12
        rows.append(('Reached on each device, median (TFLOP/s)', f'{rate:,.4g}'))
    compiled = run.happened('compiled')
    for part in ('parameters', 'gradients', 'optimizer', 'inputs', 'activations', 'total'):
        taken = compiled[-1].get(part) if compiled else None
        if type(taken) is int and 0 <= taken < 2**60:
            shown = f'{taken / 2**20:,.1f}'
            rows.append((f'Memory of training, {part} (MiB per device)', shown))
    if not compiled:
        notes.append('No memory: events.jsonl does not tell what the compiled training step takes.')
    peak = run.last('device_memory_peak')
    if peak is not None and math.isfinite(peak):
        rows.append(('Memory of training, measured peak (MiB)', f'{peak / 2**20:,.1f}'))
    params = run.workdir / MODEL_FOLDER / 'params.npz'
    if params.is_file():
        rows.append(('Model file (MiB)', f'{params.stat().st_size / 2**20:,.1f}'))
    return rows, notes


def _share(value: float | None) -> str:
    return NONE if value is None else 'not finite' if math.isnan(value) else f'{100 * value:.2f} %'


def _loss(value: float | None) -> str:
    return NONE if value is None else 'not finite' if math.isnan(value) else f'{value:.4f}'


def _number(value: float | None) -> str:
    return NONE if value is None else 'not finite' if math.isnan(value) else f'{value:.5g}'


def _count(value: float | None) -> str:
    return '0' if value is None or math.isnan(value) else f'{value:,.0f}'


# What the note on the test images tells of the run's own evaluation, the first that there is.
_LAST: tuple[tuple[str, Callable[[float | None], str], str], ...] = (
    ('accuracy_test', _share, ''),
    ('mean_average_precision_test', _share, ' mean average precision'),
    ('r2_test', _number, ' R2'),
)
# What folds are compared by: the metric, and how it is shown.
_OF_FOLDS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    'Test accuracy': ('accuracy_test', _share),
    'Top-5 test accuracy': ('accuracy_top5_test', _share),
    'Mean average precision': ('mean_average_precision_test', _share),
    'Mean recall': ('mean_recall_test', _share),
    'Mean absolute error': ('mae_test', _number),
    'Root mean squared error': ('rmse_test', _number),
    'R2': ('r2_test', _number),
    'Test loss': ('loss_test', _loss),
}


def _best(run: Run, name: str) -> str:
    steps, values = run.series(name)
    if name == 'accuracy_test' and 'val' in run.data:
        return NONE  # there is one only
    if not np.isfinite(values).any():
        return NONE
    place = int(np.nanargmax(values))
    return f'{_share(values[place])} (step {steps[place]:,})'


def _speeds(run: Run) -> list[float]:
    _, values = run.series('img_sec_core_train')
    return values[np.isfinite(values)].tolist()


def _speed(run: Run) -> str:
    values = _speeds(run)
    return format_rate(statistics.median(values)) if values else NONE


def _duration(seconds: float | None) -> str:
    return NONE if seconds is None else format_duration(seconds)
