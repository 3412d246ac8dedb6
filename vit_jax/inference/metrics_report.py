"""Tables and pictures of an evaluation: confusion matrix, reliability diagram, and others."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.errors import printable
from vit_jax.inference import contact_sheet, task_reports
from vit_jax.inference.metrics import AnyMetrics, Metrics
from vit_jax.inference.regression import NumberMetrics
from vit_jax.inference.several import SeveralMetrics
from vit_jax.inference.task_reports import Detail, percent

if TYPE_CHECKING:
    import rich.console
    from matplotlib.figure import Figure

MAX_CLASSES = 120  # of a confusion matrix that can be read
MAX_ROWS = 30  # classes in the table
MAX_PAIRS = 10  # of confused classes in the table
LARGE = 40  # classes; with more, the fields are smaller, and the worst come first
_NUMBERS_UP_TO = 20  # classes; with more, the counts would not fit into the fields


def tables(metrics: AnyMetrics, *, title: str, subtitle: str = '') -> 'rich.console.Group':
    """The metrics as tables that rich prints.

    Of more than `MAX_ROWS` classes, those of lowest F1 are shown, and a line says so; classes that
    have no images and were not predicted are left out.

    Args:
      metrics: of `metrics.measure`.
      title: first line.
      subtitle: second line.
    """
    from rich import box, console, table, text

    total = table.Table(box=None, show_header=False, pad_edge=False)
    for name, value in summary(metrics):
        total.add_row(name, value)
    parts: list[console.RenderableType] = [
        *(text.Text(printable(line)) for line in (title, subtitle) if line), total
    ]  # fmt: skip
    for detail in details(metrics):
        drawn = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in detail.columns:
            right = heading.endswith('>')
            drawn.add_column(
                heading.removesuffix('>'),
                justify='right' if right else 'left',
                overflow='ellipsis' if right else 'fold',
            )
        for row in detail.rows:
            drawn.add_row(*map(text.Text, row))
        parts += [text.Text(f'\n{detail.note}')] if detail.note else []
        parts += [drawn] if detail.rows or detail.title == 'classes' else []
    return console.Group(*parts)


def summary(metrics: AnyMetrics) -> list[tuple[str, str]]:
    """The metrics of all classes, or numbers, together: what it is, and its value as text."""
    if isinstance(metrics, SeveralMetrics):
        return task_reports.several_summary(metrics)
    if isinstance(metrics, NumberMetrics):
        return task_reports.number_summary(metrics)
    return summary_rows(metrics)


def details(metrics: AnyMetrics) -> list[Detail]:
    """Tables with a row for each class, number, or pair of confused classes."""
    if isinstance(metrics, SeveralMetrics):
        return task_reports.several_detail(metrics)
    if isinstance(metrics, NumberMetrics):
        return task_reports.number_detail(metrics)
    rows, note = class_rows(metrics)
    heads = ('class', 'precision>', 'recall>', 'F1>', 'images>', 'most often taken for')
    pairs = ('class', 'often taken for', 'images>', 'share of the class>')
    return [
        Detail('classes', heads, rows, note),
        Detail('most confused', pairs, confused_rows(metrics)),
    ]


def pictures(metrics: AnyMetrics) -> 'dict[str, Callable[[str], Figure]]':
    """File names of the pictures of an evaluation, and what draws each with a title."""
    if isinstance(metrics, SeveralMetrics):
        return task_reports.several_pictures(metrics)
    if isinstance(metrics, NumberMetrics):
        return task_reports.number_pictures(metrics)
    return {
        'confusion_matrix.png': lambda title: draw_confusion(metrics, title=title),
        'reliability.png': lambda title: draw_reliability(metrics, title=title),
    }


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
            *map(percent, shares),
            f'{metrics.support[label]:,}',
            _commonest_mistake(metrics, int(label)),
        ))  # fmt: skip
    return rows, note


def confused_rows(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    """Rows of class, the class it is often taken for, images, and their share of the class."""
    return [
        (
            printable(metrics.class_names[right]),
            printable(metrics.class_names[predicted]),
            f'{images:,}',
            percent(images / metrics.support[right]),
        )
        for right, predicted, images in metrics.confused(MAX_PAIRS)
    ]


def draw_confusion(metrics: Metrics, *, title: str) -> 'Figure':
    """Draws the confusion matrix: each row the images of one class, by what they were taken for.

    Colours are shares of a row, numbers are images. Many classes are drawn with the most mistakes
    first; of more than `MAX_CLASSES`, these alone, and a last column for what went to others.

    Args:
      metrics: of `metrics.compute`.
      title: first line of the picture.
    """
    chosen, note = _choose(metrics)
    rows = metrics.confusion[chosen]
    total = np.maximum(np.asarray(rows.sum(axis=1)), 1)[:, None]
    counts = rows[:, chosen].toarray()
    names = [contact_sheet.shorten(metrics.class_names[i], 28) for i in chosen]
    columns = list(names)
    if len(chosen) < len(metrics.class_names):
        others = np.asarray(rows.sum(axis=1))[:, None] - counts.sum(axis=1, keepdims=True)
        counts = np.concatenate([counts, others], axis=1)
        columns.append('(other classes)')
    shares = counts / total
    large = len(names) > LARGE
    side = max(4.5, (0.2 if large else 0.42) * len(columns) + 2.5)
    figure = contact_sheet.new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    size = 6.5 if large else None
    axes.set_xticks(range(len(columns)), columns, rotation=90, parse_math=False, fontsize=size)
    axes.set_yticks(range(len(names)), names, parse_math=False, fontsize=size)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('true class')
    if large:  # to follow a row or column
        axes.set_xticks(np.arange(len(columns)) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(names)) - 0.5, minor=True)
        axes.grid(True, which='minor', color='gainsboro', linewidth=0.3)
        axes.tick_params(which='minor', length=0)
    # A large picture is often looked at whole, and then small.
    contact_sheet.set_title(figure, f'{printable(title)}\n{note}', max(10, side))
    aspect, fraction = (50, 0.02) if large else (20, 0.15)
    figure.colorbar(
        picture, ax=axes, label='share of the true class', shrink=0.8, aspect=aspect,
        fraction=fraction,
    )  # fmt: skip
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
    contact_sheet.set_title(
        figure,
        f'{printable(title)}\nexpected calibration error {100 * calibration.expected_error:.2f} % '
        f'({bins} bins, {calibration.count.sum():,} images)',
    )
    lower.bar(left, calibration.count, color='lightsteelblue', **style)
    lower.set_xlim(0, 1)
    lower.set_xlabel('confidence: probability of the predicted class')
    lower.set_ylabel('images')
    return figure


def summary_rows(metrics: Metrics) -> list[tuple[str, str]]:
    """The metrics of all classes together: what it is, and its value as text."""
    rows = [('top-1 accuracy', percent(metrics.accuracy))]
    if metrics.accuracy_top5 is not None:
        rows.append(('top-5 accuracy', percent(metrics.accuracy_top5)))
    rows += [
        ('loss (cross-entropy)', f'{metrics.loss:.4f}'),
        ('mean over classes: precision', percent(metrics.macro(metrics.precision))),
        ('mean over classes: recall', percent(metrics.macro(metrics.recall))),
        ('mean over classes: F1', percent(metrics.macro(metrics.f1))),
        (
            f'expected calibration error ({len(metrics.calibration.count)} bins)',
            percent(metrics.calibration.expected_error),
        ),
        ('images', f'{metrics.count:,}'),
    ]
    if metrics.unreadable:
        rows.append(('of these unreadable, counted as wrong', f'{metrics.unreadable:,}'))
    return rows


def _commonest_mistake(metrics: Metrics, label: int) -> str:
    mistakes = metrics.confusion[[label]].toarray()[0]
    mistakes[label] = 0
    most = int(mistakes.argmax())
    return f'{printable(metrics.class_names[most])} ({mistakes[most]:,})' if mistakes[most] else ''


def _choose(metrics: Metrics) -> tuple[np.ndarray, str]:
    """Labels to draw, in their order in the picture, and a line that says what they are."""
    classes = len(metrics.class_names)
    summary = f'accuracy {100 * metrics.accuracy:.2f} % of {metrics.count:,} images'
    if classes <= LARGE:
        return np.arange(classes), summary
    right = metrics.confusion.diagonal()
    mistakes = metrics.confusion.sum(axis=0) + metrics.confusion.sum(axis=1) - 2 * right
    chosen = np.argsort(-mistakes, kind='stable')[:MAX_CLASSES]
    first = 'those with most mistakes first'
    if classes > MAX_CLASSES:
        first = f'the {MAX_CLASSES} of {classes:,} classes with most mistakes, the worst first'
    return chosen, f'{summary}; {first}'
