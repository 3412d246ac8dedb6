"""The input pipeline by stage and by number of workers: the measurement of benchmark_data.py."""

import argparse
import contextlib
import functools
import pathlib
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import contestants, record, turns
from vit_jax.analysis.tables import Table
from vit_jax.errors import UserError

# The packages that each needs.
CONTESTANTS = {
    'vit_jax': (),
    'vit_jax:exact=False': (),
    'vit_jax:cache': (),
    'vit_jax:simulated': (),
    'torchvision': ('torch', 'torchvision'),
    'tf.data': ('tensorflow',),
}
WITHOUT_STAGES = ('vit_jax:cache', 'vit_jax:simulated')  # they have the stages of vit_jax
PEER = 'torchvision'


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Stages on one thread, then the whole with more and more workers.

    Args:
      args: options of scripts/benchmark_data.py.

    Returns:
      `stages` and `whole`, see `tables`, and what was measured, for JSON.

    Raises:
      UserError: too few images, or no contestant is installed.
    """
    from vit_jax.inference import predict

    files = predict.find_images([args.folder])
    random.Random(0).shuffle(files)
    # Whole batches, so that all contestants do the same number of images.
    count = min(args.images, len(files)) // args.batch * args.batch
    if not count:
        raise UserError(f'{len(files)} images are less than one batch: use a smaller --batch')
    files = [str(pathlib.Path(path).absolute()) for path in files[:count]]
    missing = {name: contestants.missing(CONTESTANTS[name]) for name in args.contestants}
    takes_part = [name for name, packages in missing.items() if not packages]
    if not takes_part:
        raise UserError('none of these contestants is installed')
    workers = args.workers
    if workers is None:
        workers = [2**i for i in range(16) if 2**i < record.cores()] + [record.cores()]
    with_stages = [name for name in takes_part if name not in WITHOUT_STAGES]
    return {
        'images': count,
        'image_size': args.image_size,
        'bytes_per_image': sum(pathlib.Path(f).stat().st_size for f in files) // count,
        'left_out': [f'{name}: not installed: {", ".join(p)}' for name, p in missing.items() if p],
        'stages': _time(args, files, with_stages, workers=0),
        'whole': [
            {'workers': number, 'results': _time(args, files, takes_part, number)}
            for number in workers
        ],
    }


def _time(
    args: argparse.Namespace, files: list[str], names: Sequence[str], workers: int
) -> list[dict[str, Any]]:
    """For each contestant `timed` of each round (seconds of what), or `error`."""
    setup = {'files': files, 'crop': args.image_size, 'batch': args.batch, 'workers': workers}
    tasks, errors = {}, {}
    with contextlib.ExitStack() as stack:
        for name in names:
            record.say(f'{name}, {workers or "stages"}: starts')
            told = setup | {'contestant': name}
            try:
                child = stack.enter_context(
                    turns.Child('benchmarks.input_stages', told, args.timeout)
                )
                tasks[name] = functools.partial(child.time, 1)
            except turns.ContestantError as error:
                errors[name] = str(error)
        answers, failed = turns.take_turns(tasks, args.rounds)
    errors |= failed
    return [
        {'contestant': name, 'timed': [answer['timed'] for answer in answers.get(name, ())]}
        | ({'error': errors[name]} if name in errors else {})
        for name in names
    ]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Milliseconds of an image in each stage; images per second of the whole."""
    return [_stages(result), _whole(result)]


KIND = record.Kind('benchmark_data.py', 'vit_jax benchmark of data', 2, tables)


def _done(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Mapping[str, Any], float]]:
    """Name -> (row, median of the seconds of the whole) of those that did not fail."""
    return {
        row['contestant']: (row, statistics.median(sum(timed.values()) for timed in row['timed']))
        for row in rows
        if 'error' not in row
    }


def _stages(result: Mapping[str, Any]) -> Table:
    done = _done(result['stages'])
    rows: list[list[str]] = []
    stages: tuple[str, ...] = ()
    for name, (row, seconds) in done.items():
        stages = tuple(row['timed'][0])
        medians = [statistics.median(timed[stage] for timed in row['timed']) for stage in stages]
        times = [f'{1e3 * median / result["images"]:.2f}' for median in medians]
        rows.append([name, *times, _rate(result, seconds), _beside_peer(done, seconds)])
    columns = ('ms an image, on one thread', *(f'{name}>' for name in stages))
    return Table('Input pipeline by stage', (*columns, 'images/s>', f'x {PEER}>'), rows)


def _whole(result: Mapping[str, Any]) -> Table:
    """Images per second, of all workers and of each core that they can keep busy."""
    rows = []
    for part in result['whole']:
        workers, done = part['workers'], _done(part['results'])
        for name in (row['contestant'] for row in part['results']):
            if name not in done:
                rows.append([str(workers), name, 'failed', '', '', ''])
                continue
            row, seconds = done[name]
            rates = sorted(result['images'] / sum(timed.values()) for timed in row['timed'])
            rows.append([
                str(workers),
                name,
                _rate(result, seconds),
                f'{rates[0]:.0f} to {rates[-1]:.0f}',
                _rate(result, seconds * min(workers, result['hardware']['cores'])),
                _beside_peer(done, seconds),
            ])  # fmt: skip
    columns = (
        'workers>', 'whole pipeline', 'images/s>', 'range>', 'images/s per core>', f'x {PEER}>'
    )  # fmt: skip
    notes = [
        'Workers are processes of torchvision, else threads; simulated: decoding sleeps.',
        f'{record.machine(result)}; {result["images"]} files of '
        f'{result["bytes_per_image"] / 1e3:.0f} kB on average; {result["image_size"]} px; medians.',
        *record.notes(result),
    ]
    return Table('Whole pipeline', columns, rows, notes)


def _beside_peer(done: Mapping[str, tuple[Mapping[str, Any], float]], seconds: float) -> str:
    return f'{done[PEER][1] / seconds:.2f}' if PEER in done else '-'


def _rate(result: Mapping[str, Any], seconds: float) -> str:
    rate = result['images'] / seconds if seconds else float('inf')
    return f'{rate:.0f}' if rate < 1e6 else '> 1e6'
