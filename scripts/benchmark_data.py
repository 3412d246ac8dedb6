"""Times the input pipeline alone: images per second by stage, and how it grows with threads.

Stages on one thread: read, decode, crop, resize, batch, transfer to the device; then the whole
pipeline with more and more threads. Beside it the same work in torchvision with Pillow (DataLoader
workers) and in tf.data, where they are installed; each in a process of its own, turn about.

Examples:
    python scripts/benchmark_data.py --folder photos/ --output data.json
    python scripts/benchmark_data.py --folder photos/ --image_size 384 --images 256 --threads 1 2 4
"""

import argparse
import datetime
import pathlib
import random
import sys

CONTESTANTS = {
    'vit_jax': (),
    'torchvision': ('torch', 'torchvision'),
    'tf.data': ('tensorflow',),
}


def main() -> int:
    """Runs the command line; returns the exit status, 1 if a contestant failed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--folder', required=True, help='of photos, with whatever folders are in it')
    add('--images', type=int, default=128, help='of the folder, drawn at random; default: 128')
    add('--image_size', type=int, default=224, help='side of the crops, pixels; default: 224')
    add('--batch', type=int, default=32, help='default: 32')
    add('--threads', type=int, nargs='+', help='default: 1, 2, 4, ... to all cores')
    add('--contestants', nargs='+', choices=tuple(CONTESTANTS), default=list(CONTESTANTS))
    add('--rounds', type=int, default=5, help='timings of each; default: 5')
    add('--timeout', type=float, default=600, help='seconds to wait for a contestant')
    add('--format', choices=('terminal', 'markdown', 'csv'), default='terminal')
    add('--output', help='write the result as JSON to this file')
    args = parser.parse_args()
    if min(args.images, args.image_size, args.batch, args.rounds, *(args.threads or [1])) < 1:
        parser.error('--images, --image_size, --batch, --rounds and --threads are at least 1')

    # Not at the top: they take time, and --help should not.
    from vit_jax.benchmark import machine
    from vit_jax.errors import UserError

    try:
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


def _benchmark(args: argparse.Namespace) -> dict:
    """Stages on one thread, then the whole with more and more threads. The result is JSON."""
    import importlib.util

    from vit_jax import predict
    from vit_jax.benchmark import machine
    from vit_jax.errors import UserError

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
    threads = args.threads
    if not threads:
        threads = [2**i for i in range(16) if 2**i < hardware['cores']] + [hardware['cores']]
    return {
        'kind': 'vit_jax benchmark of data',
        'format': 1,
        'date': datetime.date.today().isoformat(),
        'command': machine.command('benchmark_data.py', sys.argv[1:]),
        'hardware': hardware,
        'versions': machine.versions(),
        'images': count,
        'bytes_per_image': sum(pathlib.Path(f).stat().st_size for f in files) // count,
        'left_out': [f'{name}: not installed: {", ".join(p)}' for name, p in missing.items() if p],
        'stages': _measure(args, files, takes_part, threads=0),
        'whole': [
            {'threads': number, 'results': _measure(args, files, takes_part, number)}
            for number in threads
        ],
    }


def _measure(
    args: argparse.Namespace, files: list[str], names: list[str], threads: int
) -> list[dict]:
    """Turn about; for each contestant `seconds` of each round, of stages `stages`, or `error`."""
    import contextlib

    from vit_jax.benchmark import interleave

    script = pathlib.Path(__file__).with_name('input_stages.py')
    command = [sys.executable, str(script)]
    setup = {'files': files, 'crop': args.image_size, 'batch': args.batch, 'threads': threads}
    rows = {name: {'contestant': name, 'seconds': [], 'stages': []} for name in names}
    with contextlib.ExitStack() as stack:
        children = {}
        for name in names:
            print(f'{name}, {threads or "stages"}: starts', file=sys.stderr, flush=True)
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
                rows[name]['seconds'].append(answer['seconds'])
                rows[name]['stages'].append(answer.get('stages'))
    return list(rows.values())


def _all_rows(result: dict) -> list[dict]:
    return result['stages'] + [row for part in result['whole'] for row in part['results']]


def _print(result: dict, style: str) -> None:
    import statistics

    from vit_jax.analysis import tables

    count, hardware = result['images'], result['hardware']
    rows = []
    for row in result['stages']:
        if 'error' in row:
            continue
        names = list(row['stages'][0])
        medians = [statistics.median(r[name] for r in row['stages']) for name in names]
        total = statistics.median(row['seconds'])
        rates = [_rate(count, seconds) for seconds in (*medians, total)]
        rows.append([row['contestant'], *rates])
    columns = (
        'images/s on one thread', *(f'{n}>' for n in ('read', 'decode', 'crop', 'resize', 'batch',
                                                    'transfer', 'all stages')),
    )  # fmt: skip
    notes = [
        f'`{result["command"]}`; {result["date"]}; {hardware["processor"]}; load average at the '
        f'start {hardware["load_average"]}; {count} files of {result["bytes_per_image"] / 1e3:.0f} '
        'kB on average; medians.',
        *(f'Left out: {text}.' for text in result['left_out']),
    ]
    print(tables.render(tables.Table('Input pipeline by stage', columns, rows), style))
    names = [row['contestant'] for row in result['stages']]
    rows = []
    for part in result['whole']:
        found = {r['contestant']: r for r in part['results'] if 'error' not in r}
        cells = [
            _rate(count, statistics.median(found[n]['seconds'])) if n in found else 'failed'
            for n in names
        ]
        rows.append([str(part['threads']), *cells])
    title = 'Whole pipeline, images/s'
    columns = ('threads (torchvision: processes)>', *(f'{n}>' for n in names))
    print(tables.render(tables.Table(title, columns, rows, notes), style))


def _rate(count: int, seconds: float) -> str:
    rate = count / seconds if seconds else float('inf')
    return f'{rate:.0f}' if rate < 1e6 else '> 1e6'


if __name__ == '__main__':
    sys.exit(main())
