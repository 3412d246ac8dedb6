"""Tables of the records of `flowers`, and what documents show of them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from benchmarks import record
from vit_jax import files
from vit_jax.analysis.tables import Table
from vit_jax.analysis.tables import render as render_table
from vit_jax.errors import UserError

Records = Sequence[Mapping[str, Any]]
# Between the first marks of a document come the tables, between the others a line.
TABLES = ('<!-- flowers -->', '<!-- /flowers -->')
LINE = ('<!-- flowers in a line -->', '<!-- /flowers in a line -->')


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the differences of pairs, and its 95 % interval by Student's t distribution.

    Args:
      first: at least two numbers.
      second: their partners.

    Returns:
      (mean of second - first, low, high).
    """
    found = stats.ttest_rel(second, first).confidence_interval(0.95)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return statistics.fmean(differences), float(found.low), float(found.high)


def accuracies(records: Records, name: str) -> dict[int, float]:
    """Test accuracy of a row by seed, in percent."""
    return {
        row['seed']: 100 * row['accuracy_test']
        for row in sorted(records, key=lambda row: row['seed'])
        if row['stage'] == 'test' and row['name'] == name
    }


def tables(records: Records) -> list[Table]:
    """The recipe beside plain runs, seed by seed; training less; the choices."""
    return [_seeds(records), _less(records), _choice(records)]


def render(records: Records) -> str:
    """The result, and the tables that have rows, as Markdown."""
    shown = [render_table(table, 'markdown') for table in tables(records) if table.rows]
    return '\n'.join([f'Recipe and plain: {line(records)}.\n', *shown])


def line(records: Records) -> str:
    """The result in a sentence."""
    plain, recipe = accuracies(records, 'plain'), accuracies(records, 'recipe')
    seeds = sorted(plain.keys() & recipe.keys())
    if not seeds:
        return 'no seed was run yet'
    images = next(
        row['images'] for row in records if row['stage'] == 'test' and row['name'] == 'recipe'
    )
    means = [statistics.fmean(row[seed] for seed in seeds) for row in (plain, recipe)]
    text = (
        f'means of {len(seeds)} seeds {means[1]:.2f} and {means[0]:.2f} % of {images} test images'
    )
    return f'{text}; {_difference(plain, recipe)}'


def update(path: str, records: Records) -> None:
    """Writes tables or the sentence into a document, as its marks say.

    Raises:
      UserError: it has no marks, or cannot be written.
    """
    text = files.read_text(path)
    known = {TABLES: render(records), LINE: f'Recipe and plain: {line(records)}.'}
    wanted = [marks for marks in known if marks[0] in text]
    if not wanted:
        raise UserError(f'{path}: expected a line {TABLES[0]} or a line {LINE[0]}')
    for marks in wanted:
        record.update_document(path, known[marks], marks)


def _choice(records: Records) -> Table:
    runs = [row for row in records if row['stage'] == 'choice']
    rows = [
        [
            row['name'],
            f'{100 * row["accuracy_val"]:.2f} %',
            f'{row["loss_val"]:.4f}',
            f'{row["cpu_seconds"] / 60:.1f}',
        ]
        for row in runs
    ]
    columns = ('candidate', 'validation accuracy>', 'loss>', 'CPU minutes>')
    notes = []
    if runs:
        notes = [
            f'Accuracy on {runs[0]["images"]:,} images that were held out of training, at 112 px, '
            'after 3,200 images in batches of 64, seed 0. adamw: rate 0.001, layer_decay 0.75, a '
            'moving average in the second half; gentle crops: resize_small of 8/7 of the crop. '
            f'{record.machine(runs[0])}.'
        ]
    return Table('The choice, on validation images', columns, rows, notes)


def _seeds(records: Records) -> Table:
    plain, recipe = accuracies(records, 'plain'), accuracies(records, 'recipe')
    rows = [
        [
            str(seed),
            f'{plain[seed]:.2f}' if seed in plain else '',
            f'{recipe[seed]:.2f}' if seed in recipe else '',
            f'{recipe[seed] - plain[seed]:+.2f}' if seed in plain and seed in recipe else '',
        ]
        for seed in sorted(plain.keys() | recipe.keys())
    ]
    both = sorted(plain.keys() & recipe.keys())
    columns = [[values[seed] for seed in both] for values in (plain, recipe)]
    columns.append([b - a for a, b in zip(*columns, strict=True)])
    if both:
        rows.append(['mean', *(f'{statistics.fmean(values):.2f}' for values in columns)])
    if len(both) > 1:
        rows.append(['deviation', *(f'{statistics.stdev(values):.2f}' for values in columns)])
    notes = []
    runs = [row for row in records if row['stage'] == 'test']
    if runs:
        times = [
            f'{name} {statistics.fmean(minutes):.1f}'
            for name in ('plain', 'recipe')
            if (minutes := [row['cpu_seconds'] / 60 for row in runs if row['name'] == name])
        ]
        notes = [
            f'Percent of {runs[0]["images"]} test images, which each run predicts once, at its '
            f'end; {_difference(plain, recipe)}. CPU minutes of a run: {", ".join(times)} '
            f'({record.machine(runs[0])}). Mean and deviation are of the seeds that both have.'
        ]
    title = f'Test accuracy, {len(both)} of 5 seeds'
    return Table(title, ('seed', 'plain>', 'recipe>', 'difference>'), rows, notes)


def _less(records: Records) -> Table:
    """Full training beside training less, and classifiers on frozen features."""
    tested = [row for row in records if row['stage'] == 'test']
    rows = []
    for name in dict.fromkeys(row['name'] for row in tested):
        runs = sorted((r for r in tested if r['name'] == name), key=lambda row: row['seed'])
        cost = [
            f'{runs[0]["trainable_parameters"]:,}',
            f'{statistics.fmean(run["cpu_seconds"] for run in runs) / 60:.1f}',
            f'{max(run["peak_memory"] for run in runs) / 2**30:.2f}',
        ]
        if 'accuracy_test' in runs[0]:
            shares = list(accuracies(records, name).values())
            rows.append(['full' if name == 'plain' else name, *_mean(shares), *cost])
        for probe in runs[0].get('probes', ()):
            what = f'{probe["name"]} {probe["setting"]}'.strip()
            rows.append([what, *_mean([100 * probe['accuracy_test']]), *cost])
        for shots, shares in runs[0].get('few_shot', {}).items():
            rows.append([f'{shots}-shot ridge', *_mean([100 * s for s in shares]), *cost])
        for kind, counts in runs[0].get('folds', {}).items():
            shares = [100 * r / n for r, n in zip(counts['right'], counts['images'], strict=True)]
            rows.append([f'{kind}, 10 folds of all images', *_mean(shares), *cost])
    columns = (
        'what is trained', 'accuracy>', 'each', 'parameters>', 'CPU minutes>', 'memory, GiB>',
    )  # fmt: skip
    notes = [
        'Each: of seeds, of draws of the few images, or of folds. Minutes and memory of probes are '
        'those of the command that fits all of them, with the features. Settings of all but full '
        'are chosen without test images.'
    ]
    return Table('Training less', columns, rows, notes)


def _mean(shares: Sequence[float]) -> list[str]:
    """Mean and deviation, and each."""
    spread = f' ± {statistics.stdev(shares):.1f}' if len(shares) > 1 else ''
    each = ', '.join(f'{share:.1f}' for share in shares) if len(shares) > 1 else ''
    return [f'{statistics.fmean(shares):.1f}{spread}', each]


def _difference(plain: Mapping[int, float], recipe: Mapping[int, float]) -> str:
    both = sorted(plain.keys() & recipe.keys())
    if len(both) < 2:
        return 'the difference has no interval yet'
    mean, low, high = paired([plain[s] for s in both], [recipe[s] for s in both])
    return f'difference {mean:+.2f} (95 % interval, paired by seed: {low:+.2f} to {high:+.2f})'
