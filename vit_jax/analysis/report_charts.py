"""The charts of a report, as SVG that takes its colours from the page: light, dark, or printed.

Matplotlib draws with the stand-in colours of `report.mplstyle` and of `SERIES`, which `to_svg`
replaces by CSS: `currentColor` for lines and text, `--grid` and `--series-1` ... for the rest.
Names of runs are not in the SVG but in a legend of the page.
"""

import dataclasses
import io
import pathlib
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.analysis.run_files import Run
from vit_jax.errors import extra
from vit_jax.inference import contact_sheet, retrieval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_RUNS = 8  # colours that can be told apart
MAX_POINTS = 1000  # of a curve; the eye sees no more
MAX_CLASSES = 40  # bars that can be read
MAX_TARGETS = 12  # histograms of numbers

_INK, _GRID = '#0a0b0c', '#0a0b0d'
SERIES = tuple(f'#0a0c0{i}' for i in range(1, MAX_RUNS + 1))
_CSS = {_INK: 'currentColor', _GRID: 'var(--grid)'} | {
    color: f'var(--series-{i})' for i, color in enumerate(SERIES, start=1)
}


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of a legend: `series` from 1 (its colour), a `label`, whether it has `points`."""

    series: int
    label: str
    points: bool


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart: its SVG, the legend, and a note."""

    svg: str
    legend: tuple[Key, ...]
    note: str


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A metric in a chart: name, label in legends, points or a line, factor."""

    name: str
    label: str = ''  # where it is the only one, the title says what it is
    points: bool = False
    scale: float = 1.0


# Title, unit of the vertical axis, and curves.
_CHARTS: tuple[tuple[str, str, list[_Curve]], ...] = (
    (
        'Loss',
        'cross-entropy (nats)',
        [
            _Curve('train_loss', 'training batch'),
            _Curve('loss_test', 'test set', points=True),
            _Curve('loss_val', 'validation set', points=True),
        ],
    ),
    (
        'Accuracy',
        'accuracy (%)',
        [
            _Curve('accuracy_train', 'training batch', scale=100),
            _Curve('accuracy_test', 'test set', points=True, scale=100),
            _Curve('accuracy_val', 'validation set', points=True, scale=100),
        ],
    ),
    (
        'Mean average precision',
        'mean average precision (%)',
        [
            _Curve('mean_average_precision_test', 'test set', points=True, scale=100),
            _Curve('mean_average_precision_val', 'validation set', points=True, scale=100),
        ],
    ),
    (
        'Retrieval',
        'recall at 1 (%)',
        [
            _Curve(f'{name}_recall1_{split}', f'{retrieval.words(name)}, {words}', True, 100)
            for split, words in (('test', 'test set'), ('val', 'validation set'))
            for name in retrieval.DIRECTIONS
        ],
    ),
    ('Temperature', 'temperature of the logits', [_Curve('temperature')]),
    (
        'Mean absolute error',
        'in the unit of the labels',
        [
            _Curve('mae_test', 'test set', points=True),
            _Curve('mae_val', 'validation set', points=True),
        ],
    ),
    ('Learning rate', 'learning rate', [_Curve('lr')]),
    ('Training speed', 'images/s per device', [_Curve('img_sec_core_train')]),
    ('Norm of the gradient', 'norm, before clipping', [_Curve('gradient_norm')]),
    ('Waiting for data', 'share of the time (%)', [_Curve('data_wait', scale=100)]),
)


def curves(runs: Sequence[Run]) -> list[Chart]:
    """One chart for each kind of metric that a run has, all runs in each.

    Args:
      runs: at most `MAX_RUNS`, each in its own colour. Of a single run, the metrics of a chart have
        different colours.
    """
    numbers = any(run.last(name) is not None for run in runs for name in ('mae_test', 'mae_val'))
    found = []
    for title, unit, plan in _CHARTS:
        unit = 'loss' if title == 'Loss' and numbers else unit
        found.append(_chart(title, unit, plan, runs))
    return [chart for chart in found if chart is not None]


def targets(names: Sequence[str], values: dict[str, np.ndarray]) -> 'Figure':
    """Histograms of numbers that are to be predicted.

    Args:
      names: of the C numbers; the first `MAX_TARGETS` are drawn.
      values: for each split, 'training' and 'test', float [examples] or [examples, C].
    """
    shown = names[:MAX_TARGETS]
    figure = contact_sheet.new_figure(5.6, 0.6 + 1.5 * len(shown))
    panels = figure.subplots(len(shown), len(values), sharex='row', squeeze=False)
    for column, (color, (split, found)) in enumerate(zip(SERIES, values.items(), strict=False)):
        found = found.reshape(len(found), -1)
        panels[0][column].set_title(f'{split}: {len(found):,} images', fontsize=9)
        for row, name in enumerate(shown):
            panels[row][column].hist(found[:, row], bins=20, color=color)
            panels[row][column].set_xlabel(contact_sheet.shorten(name, 24), parse_math=False)
        panels[0][column].locator_params(axis='y', integer=True)
    return figure


def class_balance(
    class_names: Sequence[str],
    counts: dict[str, np.ndarray],
    sizes: dict[str, int] | None = None,
) -> 'Figure':
    """Bars: how many images each class has.

    Args:
      class_names: C names, in label order.
      counts: for each split, 'training' and 'test', int [C].
      sizes: how many images each split has, where they are in several classes or in none.
    """
    labels, note = np.arange(len(class_names)), ''
    if len(labels) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        order = np.argsort(-next(iter(counts.values())), kind='stable')
        labels = np.concatenate([order[:half], order[-half:]])
        note = f'the {half} largest and {half} smallest of {len(order):,} classes'
    names = [contact_sheet.shorten(class_names[label], 24) for label in labels.tolist()]
    figure = contact_sheet.new_figure(5.6, 1.3 + 0.22 * len(labels))
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for panel, color, (split, values) in zip(panels, SERIES, counts.items(), strict=False):
        panel.barh(range(len(labels)), values[labels], color=color)
        total = values.sum() if sizes is None else sizes[split]
        panel.set_title(f'{split}: {total:,} images', fontsize=9)
        panel.set_xlabel('images')
        panel.locator_params(axis='x', nbins=4, integer=True)
    panels[0].set_yticks(range(len(labels)), names, parse_math=False)
    panels[0].set_ylabel('class')
    panels[0].invert_yaxis()
    figure.suptitle('Class balance' + (f'\n{note}' if note else ''), fontsize=10)
    return figure


def themed() -> AbstractContextManager[None]:
    """Makes the figures that are drawn inside use the stand-in colours."""
    with extra('report'):
        import matplotlib

    return matplotlib.rc_context(fname=pathlib.Path(__file__).with_name('report.mplstyle'))


def to_svg(figure: 'Figure', name: str) -> str:
    """An `<svg>` element for a page, from a figure that was drawn inside `themed`.

    Args:
      figure: drawn.
      name: of letters and digits, unlike any other on the page: ids begin with it.
    """
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': name}), warnings.catch_warnings():
        # Only for measuring: the browser brings the fonts.
        warnings.filterwarnings('ignore', message='Glyph .* missing from', category=UserWarning)
        metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
        figure.savefig(out, format='svg', metadata=metadata)
    svg = out.getvalue()
    svg = svg[svg.index('<svg') :]
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    # The page decides how wide it is; it knows the figure's own width as --width.
    head, body = svg.split('>', 1)
    width = round(72 * figure.get_figwidth())
    head = re.sub(r' (?:width|height)="[^"]*"', '', head)
    svg = f'{head} role="img" style="--width: {width}px">{body}'
    return re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', svg)


def _chart(title: str, unit: str, lines: Sequence[_Curve], runs: Sequence[Run]) -> Chart | None:
    single, several = len(runs) == 1, len(lines) > 1
    legend, longest = [], 1
    figure = contact_sheet.new_figure(5.0, 3.0)
    axes = figure.subplots()
    for place, run in enumerate(runs):
        for number, curve in enumerate(lines):
            steps, values = run.series(curve.name)
            if not np.isfinite(values).any():
                continue
            steps, values, group = thin(steps, curve.scale * values)
            longest = max(longest, group)
            series = number if single else place
            # Test results of several runs differ from those of training by the points alone.
            marker = 'o' if curve.points or len(values) == 1 else ''
            alpha = 0.55 if not curve.points and several else 1
            axes.plot(steps, values, marker=marker, color=SERIES[series], alpha=alpha)
            names = [curve.label] if single else [run.name, curve.label]
            legend.append(Key(series + 1, ', '.join(filter(None, names)), curve.points))
    if not legend:
        return None
    axes.set_title(title, fontsize=11)
    axes.set(xlabel='training step', ylabel=unit, axisbelow=True)
    axes.grid(True)
    axes.set_xlim(left=0)
    if not several:  # losses and accuracies have their own range
        axes.set_ylim(bottom=0)
    note = f'Each point is the mean of {longest} values or fewer.' if longest > 1 else ''
    svg = to_svg(figure, 'curve' + re.sub(r'\W', '', title))
    return Chart(svg, () if single and not several else tuple(legend), note)


def thin(
    steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, int]:
    """Means of neighbouring points where a curve has more than can be seen.

    Args:
      steps: int [n].
      values: float [n]; NaN does not count in the mean of its group.
      most: points to give.

    Returns:
      Steps and values, float [m] with m at most `most`, and how many points there are to a mean.
    """
    group = -(-len(steps) // most)
    if group <= 1:
        return steps, values, 1
    edges = np.arange(0, len(steps), group)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, edges, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, values, 0), edges)
    size = np.diff(np.append(edges, len(steps)))
    with np.errstate(invalid='ignore'):
        return np.add.reduceat(steps, edges) / size, total / count, group
