"""Times the input pipeline alone: images per second by stage, and how it grows with workers.

Stages on one thread: read, decode, crop, resize, batch, transfer to the device; then the whole
pipeline with more and more threads, and processes. Beside it the same work in torchvision with
Pillow (DataLoader workers) and in tf.data, where they are installed; each in a process of its own,
turn about. Ours comes as it is, with config.pp.exact=False, with the images in config.cache, and
with config.data_processes.

Examples:
    python scripts/benchmark_data.py --folder photos/ --output data.json
    python scripts/benchmark_data.py --folder photos/ --image_size 384 --images 256 --workers 1 2 4
    python scripts/benchmark_data.py --table data.json
"""

import argparse
import datetime
import pathlib
import random
import statistics
import sys

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli

# What each needs; those of ours that have no stages of their own are in the second table only.
CONTESTANTS = {
    'vit_jax': (),
    'vit_jax:exact=False': (),
    'vit_jax:processes': (),
    'vit_jax:cache': (),
    'torchvision': ('torch', 'torchvision'),
    'tf.data': ('tensorflow',),
}
WITHOUT_STAGES = ('vit_jax:processes', 'vit_jax:cache')
PEER = 'torchvision'
KIND = 'vit_jax benchmark of data'
FORMAT = 2


def main() -> int:
    """Runs the command line; returns the exit status, 1 if a contestant failed."""
    parser = _parser()
    args = parser.parse_args()
    if not args.table and not args.folder:
        parser.error('--folder says which photos to read (or --table which result to print)')
    if min(args.images, args.image_size, args.batch, args.rounds, *(args.workers or [1])) < 1:
        parser.error('--images, --image_size, --batch, --rounds and --workers are at least 1')

    # Not at the top: they take time, and --help should not.
    from benchmarks import machine
    from vit_jax.errors import UserError

    try:
        if args.table:
            for path in args.table:
                _print(machine.read_json(path, 'benchmark_data.py', KIND, FORMAT), 'markdown')
            return 0
        if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
            raise UserError(f'the folder of {args.output} does not exist: make it first')
        result = _benchmark(args)
        if args.output:
            machine.write_json(args.output, result)
        _print(result, args.format)
        failed = [f'{r["contestant"]}: {r["error"]}' for r in _all_rows(result) if 'error' in r]
        if failed:
            raise UserError('; '.join(failed))
    except UserError as error:
        print(f'benchmark_data.py: {error}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--folder', help='of photos, with whatever folders are in it')
    add('--images', type=int, default=128, help='of the folder, drawn at random; default: 128')
    add('--image_size', type=int, default=224, help='side of the crops, pixels; default: 224')
    add('--batch', type=int, default=32, help='default: 32')
    add(
        '--workers', type=int, nargs='*',
        help='threads or processes; none: the stages alone; default: 1, 2, 4, ... to all cores',
    )  # fmt: skip
    add('--contestants', nargs='+', choices=tuple(CONTESTANTS), default=list(CONTESTANTS))
    add('--rounds', type=int, default=5, help='timings of each; default: 5')
    add('--timeout', type=float, default=600, help='seconds to wait for a contestant')
    add('--format', choices=('terminal', 'markdown', 'csv'), default='terminal')
    add('--output', help='write the result as JSON to this file')
    add('--table', nargs='+', metavar='FILE.json', help='only print results as Markdown tables')
    return parser


def _benchmark(args: argparse.Namespace) -> dict:
    """Stages on one thread, then the whole with more and more workers. The result is JSON."""
    import importlib.util

    from benchmarks import machine
    from vit_jax.errors import UserError
    from vit_jax.inference import predict

    files = predict.find_images([args.folder])
    random.Random(0).shuffle(files)
    # Whole batches, so that all contestants do the same number of images.
    count = min(args.images, len(files)) // args.batch * args.batch
    if not count:
        raise UserError(f'{len(files)} images are less than one batch: use a smaller --batch')
    files = [str(pathlib.Path(path).absolute()) for path in files[:count]]
    missing = {
        name: [p for p in needs if importlib.util.find_spec(p) is None]
        for name, needs in CONTESTANTS.items()
        if name in args.contestants
    }
    takes_part = [name for name, packages in missing.items() if not packages]
    if not takes_part:
        raise UserError('none of these contestants is installed')
    hardware = machine.hardware()
    cores = hardware['cores']
    workers = args.workers
    if workers is None:
        workers = [2**i for i in range(16) if 2**i < cores] + [cores]
    with_stages = [name for name in takes_part if name not in WITHOUT_STAGES]
    return {
        'kind': KIND,
        'format': FORMAT,
        'date': datetime.date.today().isoformat(),
        'command': machine.command('benchmark_data.py', sys.argv[1:]),
        'hardware': hardware,
        'versions': machine.versions(),
        'images': count,
        'image_size': args.image_size,
        'bytes_per_image': sum(pathlib.Path(f).stat().st_size for f in files) // count,
        'left_out': [f'{name}: not installed: {", ".join(p)}' for name, p in missing.items() if p],
        'stages': _measure(args, files, with_stages, workers=0),
        'whole': [
            {'workers': number, 'results': _measure(args, files, takes_part, number)}
            for number in workers
        ],
    }


def _measure(
    args: argparse.Namespace, files: list[str], names: list[str], workers: int
) -> list[dict]:
    """Turn about; for each contestant `timed` of each round (seconds of what), or `error`."""
    import contextlib

    from benchmarks import interleave

    command = [sys.executable, '-m', 'benchmarks.input_stages']
    setup = {'files': files, 'crop': args.image_size, 'batch': args.batch, 'workers': workers}
    rows = {name: {'contestant': name, 'timed': []} for name in names}
    with contextlib.ExitStack() as stack:
        children = {}
        for name in names:
            print(f'{name}, {workers or "stages"}: starts', file=sys.stderr, flush=True)
            try:
                child = interleave.Child(command, setup | {'contestant': name}, '', args.timeout)
            except interleave.ContestantError as error:
                rows[name]['error'] = str(error)
                continue
            children[name] = child
            stack.callback(child.close)
        for number in range(args.rounds):
            turn = number % max(1, len(children))
            for name in [*children][turn:] + [*children][:turn]:
                if 'error' in rows[name]:
                    continue
                try:
                    answer = children[name].time(1)
                except interleave.ContestantError as error:
                    rows[name]['error'] = str(error)
                    continue
                rows[name]['timed'].append(answer['timed'])
    return list(rows.values())


def _all_rows(result: dict) -> list[dict]:
    return result['stages'] + [row for part in result['whole'] for row in part['results']]


def _seconds(row: dict) -> float:
    """Median of the whole, of all rounds."""
    return statistics.median(sum(timed.values()) for timed in row['timed'])


def _print(result: dict, style: str) -> None:
    from vit_jax.analysis import tables

    hardware = result['hardware']
    notes = [
        f'`{result["command"]}`; {result["date"]}; {hardware["processor"]}, {hardware["cores"]} '
        f'cores; load average at the start {hardware["load_average"]}; {result["images"]} files of '
        f'{result["bytes_per_image"] / 1e3:.0f} kB on average; {result["image_size"]} px; medians.',
        *(f'Left out: {text}.' for text in result['left_out']),
    ]
    print(tables.render(_stages_table(result), style))
    print(tables.render(_whole_table(result, notes), style))


def _stages_table(result: dict):
    """Milliseconds of an image in each stage, and images per second of all."""
    from vit_jax.analysis.tables import Table

    done = {row['contestant']: row for row in result['stages'] if 'error' not in row}
    rows, stages = [], ()
    for name, row in done.items():
        stages = tuple(row['timed'][0])
        medians = [statistics.median(timed[stage] for timed in row['timed']) for stage in stages]
        rows.append([
            name,
            *(f'{1e3 * seconds / result["images"]:.2f}' for seconds in medians),
            _rate(result, _seconds(row)),
            f'{_seconds(done[PEER]) / _seconds(row):.2f}' if PEER in done else '-',
        ])  # fmt: skip
    columns = (
        'ms an image, on one thread', *(f'{name}>' for name in stages), 'images/s>', f'x {PEER}>'
    )  # fmt: skip
    return Table('Input pipeline by stage', columns, rows)


def _whole_table(result: dict, notes: list[str]):
    """Images per second, of all workers and of each core that they can keep busy."""
    from vit_jax.analysis.tables import Table

    rows = []
    for part in result['whole']:
        done = {row['contestant']: row for row in part['results'] if 'error' not in row}
        busy = min(part['workers'], result['hardware']['cores'])
        for row in part['results']:
            name = row['contestant']
            if name not in done:
                rows.append([str(part['workers']), name, 'failed', '', '', ''])
                continue
            rates = sorted(result['images'] / sum(timed.values()) for timed in done[name]['timed'])
            rows.append([
                str(part['workers']),
                name,
                _rate(result, _seconds(row)),
                f'{rates[0]:.0f} to {rates[-1]:.0f}',
                _rate(result, _seconds(row) * busy),
                f'{_seconds(done[PEER]) / _seconds(row):.2f}' if PEER in done else '-',
            ])  # fmt: skip
    columns = (
        'workers>', 'whole pipeline', 'images/s>', 'range>', 'images/s per core>', f'x {PEER}>'
    )  # fmt: skip
    what = 'Workers are processes of torchvision and of vit_jax:processes, else threads.'
    return Table('Whole pipeline', columns, rows, [what, *notes])


def _rate(result: dict, seconds: float) -> str:
    rate = result['images'] / seconds if seconds else float('inf')
    return f'{rate:.0f}' if rate < 1e6 else '> 1e6'


if __name__ == '__main__':
    sys.exit(main())
