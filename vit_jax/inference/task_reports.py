"""Tables and pictures of an evaluation on several classes, or on numbers; see `metrics_report`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vit_jax.errors import printable
from vit_jax.inference import contact_sheet
from vit_jax.inference.regression import NumberMetrics
from vit_jax.inference.several import SeveralMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 30  # classes in the table
MAX_BARS = 60  # classes in the picture
_MAX_PANELS = 12  # numbers in the picture


class Detail(NamedTuple):
    """A table: what its rows are, heads (those that end in '>' are aligned to the right), rows.

    `note` is a line on which rows these are, where not all are there.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ''


def percent(share: float) -> str:
    """A share for people; '-' of NaN."""
    return '-' if np.isnan(share) else f'{100 * share:.2f} %'


def several_summary(metrics: SeveralMetrics) -> list[tuple[str, str]]:
    """All classes together: what it is, and its value as text."""
    chosen = f'chosen on {metrics.chosen_on}' if metrics.chosen_on else 'not chosen on any data'
    shares = ('precision', 'recall', 'F1')
    macro = [metrics.macro(getattr(metrics, name.lower())) for name in shares]
    return [
        ('mean average precision', percent(metrics.mean_average_precision)),
        ('loss (binary cross-entropy, summed)', f'{metrics.loss:.4f}'),
        ('threshold', f'{metrics.threshold:.2f} ({printable(chosen)})'),
        *((f'mean over classes: {n}', percent(v)) for n, v in zip(shares, macro, strict=True)),
        *((f'all pairs: {n}', percent(v)) for n, v in zip(shares, metrics.micro, strict=True)),
        ('images whose classes are all right', percent(metrics.exact)),
        *_counts(metrics.count, metrics.unreadable, 'nothing found on them'),
    ]


def several_detail(metrics: SeveralMetrics) -> list[Detail]:
    """A row for each class that has images or was found; of many, the worst."""
    labels, note = np.flatnonzero((metrics.support > 0) | (metrics.found > 0)), ''
    if len(labels) > MAX_ROWS:
        note = f'The {MAX_ROWS} of {len(labels):,} classes with the lowest average precision:'
        order = np.argsort(np.nan_to_num(metrics.average_precision[labels], nan=2), kind='stable')
        labels = labels[order[:MAX_ROWS]]
    shares = (metrics.average_precision, metrics.precision, metrics.recall, metrics.f1)
    rows = [
        (
            printable(metrics.class_names[label]),
            *(percent(values[label]) for values in shares),
            f'{metrics.support[label]:,}',
            f'{metrics.found[label]:,}',
        )
        for label in labels.tolist()
    ]
    columns = ('class', 'average precision>', 'precision>', 'recall>', 'F1>', 'images>', 'found>')
    return [Detail('classes', columns, rows, note)]


def several_pictures(metrics: SeveralMetrics) -> dict[str, Callable[[str], 'Figure']]:
    """File names, and what draws them with a title."""

    def bars(title: str) -> 'Figure':
        known = np.flatnonzero(metrics.support > 0)
        labels = known[np.argsort(metrics.average_precision[known], kind='stable')]
        note = f'mean average precision {percent(metrics.mean_average_precision)}'
        if len(labels) > MAX_BARS:
            note += f'; the {MAX_BARS} worst of {len(labels):,} classes'
            labels = labels[:MAX_BARS]
        figure = contact_sheet.new_figure(7, 1.6 + 0.24 * len(labels))
        axes, places = figure.subplots(), np.arange(len(labels))
        values = np.nan_to_num(metrics.average_precision[labels])
        axes.barh(places, values, color='lightsteelblue', label='average precision')
        axes.plot(
            np.nan_to_num(metrics.f1[labels]), places, 'o', color='darkorange', markersize=4,
            label=f'F1 at {metrics.threshold:.2f}',
        )  # fmt: skip
        axes.plot(
            metrics.support[labels] / metrics.count, places, '|', color='gray', markersize=9,
            markeredgewidth=2, label='share of the images, which chance has',
        )  # fmt: skip
        names = [contact_sheet.shorten(metrics.class_names[i], 28) for i in labels.tolist()]
        axes.set_yticks(places, names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        figure.legend(loc='outside lower center', ncols=3, fontsize=8)
        contact_sheet.set_title(figure, f'{printable(title)}\n{note}')
        return figure

    return {'average_precision.png': bars}


def number_summary(metrics: NumberMetrics) -> list[tuple[str, str]]:
    """All numbers together."""
    rows = _counts(metrics.count, metrics.unreadable, 'left out')
    if len(metrics.names) > 1:
        rows.insert(0, ('mean over the numbers: R2', f'{np.mean(metrics.r2):.4f}'))
    return rows


def number_detail(metrics: NumberMetrics) -> list[Detail]:
    """A row for each number."""
    rows = [
        (
            printable(name),
            printable(metrics.units[i]) or '-',
            *(f'{v[i]:.5g}' for v in (metrics.mae, metrics.rmse)),
            '-' if np.isnan(metrics.r2[i]) else f'{metrics.r2[i]:.4f}',
            f'{metrics.target[:, i].mean():.5g}',
            f'{metrics.target[:, i].std():.5g}',
        )
        for i, name in enumerate(metrics.names)
    ]
    columns = ('number', 'unit', 'mean absolute error>', 'root mean squared error>', 'R2>',
               'mean of targets>', 'their deviation>')  # fmt: skip
    return [Detail('numbers', columns, rows)]


def number_pictures(metrics: NumberMetrics) -> dict[str, Callable[[str], 'Figure']]:
    """File names, and what draws them with a title."""

    def scatter(title: str) -> 'Figure':
        shown = min(len(metrics.names), _MAX_PANELS)
        across = min(shown, 3)
        down = -(-shown // across)
        figure = contact_sheet.new_figure(max(5.0, 3.6 * across), 3.6 * down + 0.9)
        panels = figure.subplots(down, across, squeeze=False).flat
        for i, axes in enumerate(panels):
            if i >= shown:
                axes.axis('off')
                continue
            target, predicted = metrics.target[:, i], metrics.predicted[:, i]
            ends = [target.min(), target.max()]
            axes.plot(ends, ends, '--', color='gray')
            axes.plot(target, predicted, 'o', color='steelblue', markersize=3, alpha=0.6)
            unit = f' ({metrics.units[i]})' if metrics.units[i] else ''
            name = contact_sheet.shorten(f'{metrics.names[i]}{unit}', 30)
            axes.set_title(name, fontsize=9, parse_math=False)
            axes.set_xlabel('true')
            axes.set_ylabel('predicted')
        note = f'{len(metrics.target):,} images; on the line, both are the same'
        if shown < len(metrics.names):
            note += f'; the first {shown} of {len(metrics.names)} numbers'
        contact_sheet.set_title(figure, f'{printable(title)}\n{note}')
        return figure

    return {'predicted.png': scatter}


def _counts(count: int, unreadable: int, means: str) -> list[tuple[str, str]]:
    rows = [('images', f'{count:,}')]
    return rows + ([(f'of these unreadable, {means}', f'{unreadable:,}')] if unreadable else [])
