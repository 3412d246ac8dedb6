"""Fills tables on tf_flowers with a trained ViT-Ti/16: each run once, over days if need be.

    python -m benchmarks.flowers --weights deit_ti16_imagenet1k.npz
    python -m benchmarks.flowers --table --update docs/recipes.md README.md

The first chooses a recipe on validation images, and then trains it and the plain one with seeds 0
to 4, and tests each of these runs once, at its end. Probes, LoRA and other ways to train less are
chosen and tested in the same way. All runs see the same number of images. What a run gave is a
record in the results file; the same command leaves it out, and goes on with the run
that was under way from its checkpoint. A run takes a quarter of an hour on two cores. The second
prints the tables, and writes them into documents.
"""

import argparse
import datetime
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks import flowers_tables, record
from benchmarks.flowers_rows import LESS, Folds, Probes, Run, Start, choice, tested
from vit_jax import cli, files
from vit_jax.errors import UserError
from vit_jax.run import preemption, resume, sweep, telemetry

RESULTS = 'benchmarks/results/accuracy/flowers_runs.json'
SEEDS = 5
_SAMPLE_SECONDS = 2.0
_STOPPED_SECONDS = 30.0  # without a sample: this process was stopped, or the machine slept


class Table:
    """Runs, their records, and the folder where they are at work.

    Args:
      results: file of the records.
      workdir: folder for the runs, of which models and checkpoints are removed in the end.
      start: config file, weights, data.
      say: gets lines for people.
    """

    def __init__(
        self,
        results: pathlib.Path,
        workdir: pathlib.Path,
        start: Start,
        say: Callable[[str], None] = record.say,
    ):
        self._results, self._workdir = results, workdir
        self._start, self._say = start, say

    def records(self) -> list[dict[str, Any]]:
        """What is known."""
        return read(self._results) if self._results.exists() else []

    def fill(self, run: Run | Probes, signals: preemption.StopSignals) -> None:
        """Does a run that has no record, or goes on with it, and adds its record.

        Raises:
          UserError: the run fails, or its record is of other settings.
          PreemptedError: a signal came; the same call goes on.
        """
        known = self.records()
        told = f'{run.stage.name}: {run.name}, seed {run.seed}'
        for row in known:
            if (row['stage'], row['name'], row['seed']) == (run.stage.name, run.name, run.seed):
                if row['words'] != run.words():
                    raise UserError(
                        f'{self._results}: {told} is of other settings: take its record out, or '
                        'use another --results'
                    )
                return
        self._say(f'{told} ...')
        stem = ''.join(c if c.isalnum() or c == '.' else '_' for c in run.name)
        workdir = self._workdir / run.stage.name / f'{stem}-{run.seed}'
        hardware = record.describe_hardware()
        cost = Cost(workdir.with_name(f'{workdir.name}.cost.json'))
        command = run.command(self._start)
        log = workdir.with_name(f'{workdir.name}.log')
        words = [*command, *run.where(workdir)]
        if reason := sweep.run_program(words, log, signals, cost.sample):
            raise UserError(f'{told}: {reason}')
        made = {
            'stage': run.stage.name,
            'name': run.name,
            'seed': run.seed,
            **run.measured(workdir),
            **cost.spent,
            'words': run.words(),
            'command': ' '.join(['python', *map(_without_folder, command)]),
            'date': datetime.date.today().isoformat(),
            'hardware': hardware,
            'versions': record.versions(),
        }
        files.write_json(self._results, {'kind': 'flowers', 'records': [*known, made]})
        for name in ('checkpoints', 'model'):
            shutil.rmtree(workdir / name, ignore_errors=True)
        for split in ('val', 'test'):
            if accuracy := made.get(f'accuracy_{split}'):
                told += f', {split} {100 * accuracy:.2f} %'
        self._say(f'{told}: done in {telemetry.format_duration(made["seconds"])}')


class Cost:
    """What a run has cost so far, over all the times that it was at work.

    Args:
      path: where that is kept.

    Attributes:
      spent: `seconds` of wall time, without those in which this process was stopped; `cpu_seconds`
        of the run; `peak_memory`, bytes that were resident at a time.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.spent = {'seconds': 0.0, 'cpu_seconds': 0.0, 'peak_memory': 0}
        if path.exists():
            self.spent = files.read_json(path)
        self._cpu_before = self.spent['cpu_seconds']
        self._last = time.monotonic()

    def sample(self) -> bool:
        """Looks at the children of this process, at times; never asks for an end."""
        now = time.monotonic()
        if now - self._last < _SAMPLE_SECONDS or not self._path.parent.exists():
            return False
        cpu, memory = 0.0, 0
        for process in psutil.Process().children(recursive=True):
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    cpu += times.user + times.system
                    memory += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        if now - self._last < _STOPPED_SECONDS:
            self.spent['seconds'] += now - self._last
        self.spent['cpu_seconds'] = max(self.spent['cpu_seconds'], self._cpu_before + cpu)
        self.spent['peak_memory'] = max(self.spent['peak_memory'], memory)
        self._last = now
        files.write_json(self._path, self.spent)
        return False


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The records of a results file.

    Raises:
      UserError: it cannot be read, or is of another kind.
    """
    result = files.read_json(path)
    if result.get('kind') != 'flowers':
        raise UserError(f'{path} is not a results file of benchmarks.flowers')
    return result['records']


def _without_folder(word: str) -> str:
    """Of a path only its last part, which does not name the machine."""
    name, equals, value = word.rpartition('=')
    return f'{name}{equals}{pathlib.Path(value).name}' if '/' in value else word


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--weights', help='a trained ViT-Ti/16, config.pretrained of all runs')
    add('--tfds_data_dir', default='', help='where tf_flowers is; default: where TFDS keeps sets')
    add('--results', type=pathlib.Path, default=RESULTS, help=f'default: {RESULTS}')
    add('--workdir', type=pathlib.Path, default='runs/flowers', help='default: runs/flowers')
    add('--seeds', type=int, default=SEEDS, help=f'default: {SEEDS}')
    add('--table', action='store_true', help='only print what is known')
    add('--update', nargs='+', default=(), metavar='FILE.md', help='with --table: write it there')
    args = parser.parse_args()
    if bool(args.weights) == args.table or (args.update and not args.table):
        parser.error('give --weights, to train; or --table, with or without --update')
    return cli.run(lambda: _run(args), go_on=True)


def _run(args: argparse.Namespace) -> int:
    if args.table:
        records = read(args.results)
        print(flowers_tables.render(records))
        for path in args.update:
            flowers_tables.update(path, records)
        return 0
    folder = args.tfds_data_dir
    start = Start(
        (
            '--config=ti16',
            f'--config.pretrained={args.weights}',
            *([f'--config.tfds_data_dir={folder}'] if folder else []),
        ),
        (
            *('--model', args.weights, '--dataset', 'tf_flowers'),
            *(['--tfds_data_dir', folder] if folder else []),
        ),
    )
    table = Table(args.results, args.workdir, start)
    try:
        with resume.locked(args.workdir), preemption.StopSignals() as signals:
            for row, seeds in {'recipe': args.seeds, **LESS}.items():
                for run in choice(row):
                    table.fill(run, signals)
                if row == 'recipe':
                    table.fill(Probes(), signals)
                    table.fill(Folds(), signals)
                for run in tested(table.records(), row, seeds):
                    table.fill(run, signals)
    except preemption.PreemptedError as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    return 0


if __name__ == '__main__':
    sys.exit(main())
