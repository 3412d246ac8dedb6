"""Tables of an evaluation, its confusion matrix and reliability diagram."""

from typing import TYPE_CHECKING

import numpy as np

from vit_jax.errors import printable
from vit_jax.inference import contact_sheet
from vit_jax.inference.metrics import Metrics

if TYPE_CHECKING:
    import rich.console
    from matplotlib.figure import Figure

MAX_CLASSES = 40  # of a confusion matrix that can be read
MAX_ROWS = 30  # classes in the table
_NUMBERS_UP_TO = 20  # classes; with more, the counts would not fit into the fields


def tables(metrics: Metrics, *, title: str) -> 'rich.console.Group':
    """The metrics as tables that rich prints.

    Of more than `MAX_ROWS` classes, those of lowest F1 are shown, and a line says so; classes that
    have no images and were not predicted are left out.

    Args:
      metrics: of `metrics.compute`.
      title: first line.
    """
    from rich import box, console, table, text

    summary = table.Table(box=None, show_header=False, pad_edge=False)
    for name, value in summary_rows(metrics):
        summary.add_row(name, value)
    classes = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    classes.add_column('class', overflow='fold')
    for heading in ('precision', 'recall', 'F1', 'images'):
        classes.add_column(heading, justify='right')
    classes.add_column('most often taken for', overflow='fold')
    rows, note = class_rows(metrics)
    for name, *numbers, mistake in rows:
        classes.add_row(text.Text(name), *numbers, text.Text(mistake))
    return console.Group(
        text.Text(printable(title)), summary, *([text.Text(f'\n{note}')] if note else []), classes
    )


def class_rows(metrics: Metrics) -> tuple[list[tuple[str, ...]], str]:
    """The classes as rows of texts, and a line that says which they are where not all are there.

    Args:
      metrics: of `metrics.compute`.

    Returns:
      Rows of class, precision, recall, F1, images, and the class it is most often taken for; and
      the line, perhaps ''. See `tables` for the choice of classes.
    """
    taken = metrics.confusion.sum(axis=0)
    labels, note = np.flatnonzero((metrics.support > 0) | (taken > 0)), ''
    if len(labels) > MAX_ROWS:
        note = f'The {MAX_ROWS} of {len(labels):,} classes with the lowest F1:'
        labels = labels[np.argsort(metrics.f1[labels], kind='stable')[:MAX_ROWS]]
    rows = []
    for label in labels:
        shares = (metrics.precision[label], metrics.recall[label], metrics.f1[label])
        rows.append((
            printable(metrics.class_names[label]),
            *map(_percent, shares),
            f'{metrics.support[label]:,}',
            _commonest_mistake(metrics, int(label)),
        ))  # fmt: skip
    return rows, note


def draw_confusion(metrics: Metrics, *, title: str) -> 'Figure':
    """Draws the confusion matrix: each row the images of one class, by what they were taken for.

    Colours are shares of a row, numbers are images. Of more than `MAX_CLASSES` classes, those with
    the most mistakes are drawn, and the title says so; shares are of the whole row all the same.

    Args:
      metrics: of `metrics.compute`.
      title: first line of the picture.
    """
    chosen, note = _choose(metrics)
    counts = metrics.confusion[np.ix_(chosen, chosen)]
    total = metrics.confusion[chosen].sum(axis=1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    side = max(4.5, 0.42 * len(chosen) + 2.5)
    figure = contact_sheet.new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    names = [contact_sheet.shorten(metrics.class_names[i], 24) for i in chosen]
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('true class')
    axes.set_title(f'{printable(title)}\n{note}', fontsize=10, parse_math=False)
    figure.colorbar(picture, ax=axes, label='share of the true class', shrink=0.8)
    if len(names) <= _NUMBERS_UP_TO:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = 'white' if shares[row, column] > 0.5 else 'black'
                axes.text(column, row, f'{count:,}', ha='center', va='center', color=color)
    return figure


def draw_reliability(metrics: Metrics, *, title: str) -> 'Figure':
    """Draws the reliability diagram: accuracy against confidence, over a histogram of confidence.

    Args:
      metrics: of `metrics.compute`.
      title: first line of the picture.
    """
    calibration = metrics.calibration
    bins = len(calibration.count)
    left = np.arange(bins) / bins
    figure = contact_sheet.new_figure(5.5, 6.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    style = dict(width=0.95 / bins, align='edge')
    upper.bar(
        left, np.nan_to_num(calibration.accuracy), color='steelblue', label='accuracy', **style
    )
    upper.plot([0, 1], [0, 1], '--', color='gray', label='perfect calibration')
    upper.plot(
        calibration.confidence, calibration.accuracy, 'o', color='darkorange', markersize=4,
        label='mean confidence of the bin',
    )  # fmt: skip
    upper.set_ylabel('accuracy')
    upper.set_ylim(0, 1.02)
    # Not in the panel, where bars may be anywhere.
    figure.legend(loc='outside lower center', ncols=3, fontsize=8)
    upper.set_title(
        f'{printable(title)}\nexpected calibration error {100 * calibration.expected_error:.2f} % '
        f'({bins} bins, {calibration.count.sum():,} images)',
        fontsize=10,
        parse_math=False,
    )
    lower.bar(left, calibration.count, color='lightsteelblue', **style)
    lower.set_xlim(0, 1)
    lower.set_xlabel('confidence: probability of the predicted class')
    lower.set_ylabel('images')
    return figure


def summary_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """The metrics of all classes together: what it is, and its value as text."""
    rows = [('top-1 accuracy', _percent(metrics.accuracy))]
    if metrics.accuracy_top5 is not None:
        rows.append(('top-5 accuracy', _percent(metrics.accuracy_top5)))
    rows += [
        ('loss (cross-entropy)', f'{metrics.loss:.4f}'),
        ('mean over classes: precision', _percent(metrics.macro(metrics.precision))),
        ('mean over classes: recall', _percent(metrics.macro(metrics.recall))),
        ('mean over classes: F1', _percent(metrics.macro(metrics.f1))),
        (
            f'expected calibration error ({len(metrics.calibration.count)} bins)',
            _percent(metrics.calibration.expected_error),
        ),
        ('images', f'{metrics.count:,}'),
    ]
    if metrics.unreadable:
        rows.append(('of these unreadable, counted as wrong', f'{metrics.unreadable:,}'))
    return rows


def _percent(share: float) -> str:
    return '-' if np.isnan(share) else f'{100 * share:.2f} %'


def _commonest_mistake(metrics: Metrics, label: int) -> str:
    mistakes = metrics.confusion[label].copy()
    mistakes[label] = 0
    most = int(mistakes.argmax())
    return f'{printable(metrics.class_names[most])} ({mistakes[most]:,})' if mistakes[most] else ''


def _choose(metrics: Metrics) -> tuple[np.ndarray, str]:
    """Labels to draw, in label order, and a line that says what they are."""
    classes = len(metrics.class_names)
    summary = f'accuracy {100 * metrics.accuracy:.2f} % of {metrics.count:,} images'
    if classes <= MAX_CLASSES:
        return np.arange(classes), summary
    wrong = metrics.confusion - np.diag(np.diag(metrics.confusion))
    mistakes = wrong.sum(axis=0) + wrong.sum(axis=1)
    chosen = np.sort(np.argsort(-mistakes, kind='stable')[:MAX_CLASSES])
    return chosen, f'{summary}; the {MAX_CLASSES} of {classes:,} classes with most mistakes'
