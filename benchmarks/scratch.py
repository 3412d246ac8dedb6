"""Trains small models from nothing, with a recipe and without, and makes a table of it.

    python -m benchmarks.scratch digits
    python -m benchmarks.scratch tf_flowers --tfds_data_dir tensorflow_datasets
    python -m benchmarks.scratch --table --update docs/recipes.md

On digits, and on tf_flowers at 64 px: a recipe, and the rate of the plain run, are chosen on
validation images (40 % of the training images, fewer steps); then both, and the plain run as the
config has it, are trained with seeds 0 to 2, and tested once each, at their end. All runs of a set
see the same number of images, and a recipe that was chosen before candidates were added stays in
the table.
What a run gave is a record in the results file; the same command leaves it out, and goes on with
the run that was under way. A run takes some minutes on two cores.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import flowers, flowers_rows, flowers_tables, record
from benchmarks.flowers_rows import Recipe, Run, Stage, Start
from benchmarks.flowers_tables import Records
from vit_jax import cli
from vit_jax.analysis.tables import Table, render
from vit_jax.errors import UserError
from vit_jax.run import preemption, resume

RESULTS = 'benchmarks/results/accuracy'
MARKS = ('<!-- scratch -->', '<!-- /scratch -->')
SEEDS = 3
_SELDOM = ('--config.checkpoint_every=100',)
_CHOOSE = ('--config.pp.val=40%', '--config.test_at_end=False', *_SELDOM)


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, and what is tried on it.

    Attributes:
      name: of the data set.
      config: file of settings.
      images: of each run, through the forward and the backward pass.
      tried_on: of each run of the choice.
      crop: pixels.
      candidates: settings, all of what is ever changed; those of a plain run begin with 'plain'.
    """

    name: str
    config: str
    images: int
    tried_on: int
    crop: int
    candidates: Mapping[str, Recipe]

    @property
    def choice(self) -> Stage:
        """Runs on validation images."""
        return Stage('choice', self.tried_on, self.crop, _CHOOSE)

    @property
    def test(self) -> Stage:
        """Runs that are tested."""
        return Stage('test', self.images, self.crop, _SELDOM)

    def tried(self) -> list[Run]:
        """The runs to choose by."""
        return [Run(self.choice, name, each) for name, each in self.candidates.items()]

    def chosen(self, records: Records, plain: bool) -> Run:
        """The best of the plain candidates, or of the others, see `flowers_rows.best`."""
        runs = [run for run in self.tried() if run.name.startswith('plain') == plain]
        return flowers_rows.best(records, runs, self.name)

    def tested(self, records: Records, seeds: int) -> Iterator[Run]:
        """Recipe, the best of plain, and plain as the config has it, in turns, seed by seed."""
        runs = [self.chosen(records, plain) for plain in (False, True)]
        runs += [run for run in self.tried() if run.name == 'plain' and run not in runs]
        for seed in range(seeds):
            for run in runs:
                yield dataclasses.replace(run, stage=self.test, seed=seed)


_OFF = {'optimizer': 'adamw', 'mixup': 0.0, 'label_smoothing': 0.0}


def _recipe(batch: int = 128, **knobs: Any) -> Recipe:
    """What it does not use stands in it as well."""
    return Recipe({**_OFF, **knobs}, batch)


def _averaged(batch: int = 128, **knobs: Any) -> Recipe:
    """The same, with an average of the weights."""
    return dataclasses.replace(_recipe(batch, **knobs), averaged=True)


# timm's, of which shifts (a pixel or two of 16), shears and turns (9 degrees) are a third.
_GENTLE = 'rand-m3-mstd0.5-inc1'

TASKS = (
    Task(
        'tf_flowers', 'scratch_flowers', 38_400, 12_800, 64,
        {
            'plain': _recipe(base_lr=0.003),
            'plain, rate 0.001': _recipe(base_lr=0.001),
            'muon': _recipe(optimizer='muon', base_lr=0.003),
            'muon, smoothing 0.1': _recipe(optimizer='muon', base_lr=0.003, label_smoothing=0.1),
            'plain, batch 64': _recipe(64, base_lr=0.003),
            'plain, batch 32': _recipe(32, base_lr=0.003),
            'muon, batch 64': _recipe(64, optimizer='muon', base_lr=0.003),
            'muon, batch 32': _recipe(32, optimizer='muon', base_lr=0.003),
        },
    ),
    # As long as the config has it; in the choice, as many epochs.
    Task(
        'digits', 'digits', 76_800, 46_080, 16,
        {
            'plain': _recipe(),
            'plain, rate 0.001': _recipe(base_lr=0.001),
            'plain, rate 0.004': _recipe(base_lr=0.004),
            'plain, rate 0.008': _recipe(base_lr=0.008),
            'muon, shifts, average': _averaged(optimizer='muon', **{'pp.resize_small': 18}),
            'muon, rate 0.004, RandAugment, average': _averaged(
                optimizer='muon', base_lr=0.004, randaug=_GENTLE
            ),
        },
    ),
)  # fmt: skip


def tables(known: Mapping[str, Records]) -> list[Table]:
    """The choice on validation images, and the test accuracies.

    Args:
      known: records of each task, by its name.
    """
    rows: dict[str, list[list[str]]] = {'choice': [], 'test': []}
    notes = []
    for task in TASKS:
        records = known.get(task.name, ())
        for row in (row for row in records if row['stage'] == 'choice'):
            share, loss = f'{100 * row["accuracy_val"]:.1f} %', f'{row["loss_val"]:.3f}'
            rows['choice'].append([task.name, row['name'], share, loss, str(row['images'])])
        tested = dict.fromkeys(row['name'] for row in records if row['stage'] == 'test')
        for name in sorted(tested, key=lambda name: not name.startswith('plain')):
            shares = flowers_tables.accuracies(records, name)
            values = ', '.join(f'{shares[seed]:.1f}' for seed in sorted(shares))
            mean, spread = _mean_and_spread(records, name)
            rows['test'].append([task.name, name, values, f'{mean:.1f} %', f'{spread:.1f}'])
        if tested:
            notes.append(_note(task, records))
    columns = ('set', 'candidate', 'validation accuracy>', 'loss>', 'images>')
    choice = Table('From scratch: the choice, seed 0', columns, rows['choice'], [])
    columns = ('set', 'trained with', 'test accuracy by seed>', 'mean>', 'spread>')
    return [choice, Table('From scratch: test accuracy', columns, rows['test'], notes)]


def _mean_and_spread(records: Records, name: str) -> tuple[float, float]:
    shares = flowers_tables.accuracies(records, name).values()
    return statistics.fmean(shares), max(shares) - min(shares)


def _note(task: Task, records: Records) -> str:
    runs = [row for row in records if row['stage'] == 'test']
    minutes = statistics.fmean(row['cpu_seconds'] for row in runs) / 60
    text = (
        f'{task.name}: {task.images:,} images through the model, {runs[0]["images"]} test images, '
        f'{minutes:.1f} CPU minutes a run. {record.machine(runs[0])}.'
    )
    if {run.name for run in task.tried()} - {row['name'] for row in records}:
        return text
    recipe = task.chosen(records, plain=False).name
    for plain in dict.fromkeys((task.chosen(records, plain=True).name, 'plain')):
        if {plain, recipe} <= {row['name'] for row in runs}:
            (low, one), (high, other) = (_mean_and_spread(records, n) for n in (plain, recipe))
            spread = max(one, other)
            text += (
                f' {recipe!r}, the best on validation images, gains {high - low:+.1f} over '
                f'{plain!r}, {"more" if high - low > spread else "not more"} than the larger '
                f'spread over seeds, {spread:.1f}.'
            )
    return text


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--tfds_data_dir', default='', help='where tf_flowers is; default: where TFDS keeps sets')
    add(
        'tasks', nargs='*', metavar='SET', help=f'default: {", ".join(each.name for each in TASKS)}'
    )
    add('--results', type=pathlib.Path, default=RESULTS, help=f'folder; default: {RESULTS}')
    add('--workdir', type=pathlib.Path, default='runs/scratch', help='default: runs/scratch')
    add('--seeds', type=int, default=SEEDS, help=f'default: {SEEDS}')
    add('--table', action='store_true', help='only print what is known')
    add('--update', metavar='FILE.md', help='with --table: write it there')
    args = parser.parse_args()
    if args.update and not args.table:
        parser.error('--update goes with --table')
    return cli.run(lambda: _run(args), go_on=True)


def _run(args: argparse.Namespace) -> int:
    if args.table:
        known = {
            task.name: flowers.read(_file(args, task))
            for task in TASKS
            if _file(args, task).exists()
        }
        text = '\n'.join(render(table, 'markdown') for table in tables(known))
        print(text)
        if args.update:
            record.update_document(args.update, text, MARKS)
        return 0
    try:
        with preemption.StopSignals() as signals:
            for task in _named(args.tasks):
                with resume.locked(args.workdir / task.name):
                    _fill(args, task, signals)
    except preemption.PreemptedError as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    return 0


def _fill(args: argparse.Namespace, task: Task, signals: preemption.StopSignals) -> None:
    words = (f'--config={task.config}', f'--config.tfds_data_dir={args.tfds_data_dir}')
    table = flowers.Table(_file(args, task), args.workdir / task.name, Start(words))
    for run in task.tried():
        table.fill(run, signals)
    for run in task.tested(table.records(), args.seeds):
        table.fill(run, signals)


def _file(args: argparse.Namespace, task: Task) -> pathlib.Path:
    return args.results / f'scratch_{task.name}.json'


def _named(names: Sequence[str]) -> list[Task]:
    if unknown := set(names) - {task.name for task in TASKS}:
        raise UserError(f'no set {unknown.pop()!r}: {", ".join(task.name for task in TASKS)}')
    return [task for task in TASKS if not names or task.name in names]


if __name__ == '__main__':
    sys.exit(main())
