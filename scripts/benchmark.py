"""Times training steps and inference, ours beside every peer that is installed, in one run.

Contestants: vit_jax (ours; with options vit_jax:remat=full,accum_steps=4), original (the original
release's way of computing), timm and timm+compile, transformers, torchvision. Each has a process of
its own; every round times each of them once, in rotated order. Same function, same batch, SGD with
momentum and clipping, no dropout. Measure on a machine that does nothing else.

Examples:
    python scripts/benchmark.py --variants ViT-Ti_16 ViT-B_16 --batch 8 --output cpu.json
    python scripts/benchmark.py --variants ViT-B_16 --batch 512 --dtype bfloat16 --device h200
    python scripts/benchmark.py --variants ViT-B_32 --inference-only --contestants vit_jax original
    python scripts/benchmark.py --variants ViT-L_16 --largest-batch --batch 64 --dtype bfloat16
    python scripts/benchmark.py --table cpu.json --update README.md
"""

import argparse
import datetime
import pathlib
import sys
from typing import Any

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli

# Lines of a document between which --update writes.
MARKS = ('<!-- benchmark -->', '<!-- /benchmark -->')
CONTESTANTS = ('vit_jax', 'original', 'timm', 'timm+compile', 'transformers', 'torchvision')


def main() -> int:
    """Runs the command line; returns the exit status, 1 if a contestant failed."""
    parser = _parser()
    args = parser.parse_args()
    # Not at the top: they take seconds, and --help should not.
    from benchmarks import machine, results
    from vit_jax.errors import UserError

    try:
        if args.update and not args.table:
            raise UserError('--update goes with --table: which results should be written?')
        if args.table:
            read = (
                machine.read_json(p, 'benchmark.py', results.KIND, results.FORMAT)
                for p in args.table
            )
            text = _tables(list(read), 'markdown')
            if args.update:
                machine.update_document(args.update, MARKS, text)
            else:
                print(text)
            return 0
        if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
            raise UserError(f'the folder of {args.output} does not exist: make it first')
        result = _benchmark(args)
        if args.output:
            machine.write_json(args.output, result)
        print(_tables([result], 'terminal'))
        rows = [r for cell in result.get('cells', result.get('largest')) for r in cell['results']]
        failed = sum('error' in row for row in rows)
        if failed or not rows:
            raise UserError(f'{failed} of {len(rows)} measurements failed, see above')
    except UserError as error:
        print(f'benchmark.py: {error}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--variants', nargs='+', default=['ViT-B_16'], help='of list_models.py --variants')
    add('--image_size', type=int, nargs='+', default=[224], help='default: 224')
    add('--dtype', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    add('--batch', type=int, nargs='+', default=[8], help='images per step; default: 8')
    add('--modes', nargs='+', choices=('training', 'inference'), default=['training', 'inference'])
    add(
        '--contestants', nargs='+', default=list(CONTESTANTS), help='default: all of the list above'
    )
    add('--num_classes', type=int, default=1000, help='default: 1000')
    add('--data', default='', help='folder or dataset, read by our pipeline; default: made up')
    add('--rounds', type=int, help='timings of each contestant; default: 10')
    add('--steps', type=int, help='steps in a timing; default: what takes --seconds')
    add('--seconds', type=float, default=1.0, help='of one timing; default: 1')
    add('--warmup', type=int, help='steps that are not timed; default: 2')
    add('--cores', type=int, default=0, help='that each contestant may use; default: all')
    add('--device', default='', help='whose published peak to use (h200, rtx4090, ...)')
    add('--peak_tflops', type=float, help='peak of the device; default: of the table, or measured')
    add('--skip_warm_start', action='store_true', help='start each once, not twice (cold, warm)')
    add('--timeout', type=float, default=1800, help='seconds to wait for a contestant')
    add(
        '--inference-only', '--inference_only', action='store_true', dest='inference_only',
        help="the original's inference_time: 10 steps of warm-up, then 30, each timed alone",
    )  # fmt: skip
    add(
        '--largest-batch', '--largest_batch', action='store_true', dest='largest_batch',
        help='time nothing: try which batch still fits in memory, from --batch on',
    )  # fmt: skip
    add('--memory_gib', type=float, default=0, help='of a process in --largest-batch on a CPU')
    add('--output', help='write the result as JSON to this file')
    add('--table', nargs='+', metavar='FILE.json', help='only print results as Markdown tables')
    add('--update', metavar='FILE.md', help=f'put them between {MARKS[0]} and {MARKS[1]} of it')
    return parser


def _benchmark(args: argparse.Namespace) -> dict:
    """Measures every cell. The result is JSON."""
    from benchmarks import contestants, interleave, machine

    timing = _timing(args)
    if args.device:
        machine.stated_peak(args.device, 'float32')  # an unknown name is refused before measuring
    labels = contestants.parse(args.contestants)
    cells = _cells(args)
    if args.largest_batch:
        return _largest(args, cells, labels)
    hardware = machine.hardware()  # before the contestants make it busy
    done, left_out = [], {}
    for cell in cells:
        reasons = {c.label: c.reason_to_leave_out(cell.model_config, cell.dtype) for c in labels}
        left_out |= {f'{label}: {reason}': None for label, reason in reasons.items() if reason}
        takes_part = [c for c in labels if not reasons[c.label]]
        matmuls = [contestants.Contestant(name, name) for name in contestants.MATMULS]
        matmuls = [c for c in matmuls if not c.missing()]
        name = f'{cell.variant} {cell.image_size} px, {cell.dtype}, {cell.batch}, {cell.mode}'
        measured = interleave.measure(
            cell,
            takes_part + matmuls,
            timing,
            lambda text, name=name: print(f'{name}: {text}', file=sys.stderr, flush=True),
        )
        rows, products = measured[: len(takes_part)], measured[len(takes_part) :]
        done.append(_cell_result(args, cell, rows, products))
        _note_accelerator(hardware, rows)
    settings = {'inference_only': args.inference_only, **vars(timing)}
    return _result(hardware, list(left_out), settings=settings, cells=done)


def _result(hardware: dict, left_out: list[str], **measured: Any) -> dict:
    from benchmarks import machine, results

    return {
        'kind': results.KIND,
        'format': results.FORMAT,
        'date': datetime.date.today().isoformat(),
        'command': machine.command('benchmark.py', sys.argv[1:]),
        'hardware': hardware,
        'versions': machine.versions(),
        'left_out': left_out,
        **measured,
    }


def _largest(args: argparse.Namespace, cells: list, labels: list) -> dict:
    """Tries the largest batch of every cell, of which --batch is the first."""
    from benchmarks import largest, machine

    hardware, done, left_out = machine.hardware(), [], []
    for cell in cells:
        takes_part = []
        for contestant in labels:
            reason = contestant.reason_to_leave_out(cell.model_config, cell.dtype)
            if reason:
                left_out.append(f'{contestant.label}: {reason}')
            else:
                takes_part.append(contestant)
        name = f'{cell.variant} {cell.image_size} px, {cell.dtype}, {cell.mode}'
        rows = largest.measure(
            cell, takes_part, args.timeout, args.memory_gib,
            lambda text, name=name: print(f'{name}: {text}', file=sys.stderr, flush=True),
        )  # fmt: skip
        _note_accelerator(hardware, rows)
        done.append(
            {
                **{key: getattr(cell, key) for key in ('variant', 'image_size', 'dtype', 'mode')},
                'memory_gib': args.memory_gib,
                'results': rows,
            }
        )
    return _result(hardware, list(dict.fromkeys(left_out)), largest=done)


def _note_accelerator(hardware: dict, rows: list[dict]) -> None:
    for row in rows:
        if row.get('facts', {}).get('platform') == 'gpu':
            hardware['accelerator'] = row['facts']['device']


def _timing(args: argparse.Namespace):
    from benchmarks import interleave
    from vit_jax.errors import UserError

    rounds, steps, warmup = (30, 1, 10) if args.inference_only else (10, 0, 2)
    if args.inference_only and args.steps not in (None, 1):
        raise UserError('--inference-only times each step alone: leave --steps out')
    timing = interleave.Timing(
        rounds=rounds if args.rounds is None else args.rounds,
        steps=steps if args.steps is None else args.steps,
        seconds=args.seconds,
        warmup=warmup if args.warmup is None else args.warmup,
        warm_start=not args.skip_warm_start,
        timeout=args.timeout,
    )
    if timing.rounds < 1 or timing.steps < 0 or timing.warmup < 0:
        raise UserError('--rounds is at least 1, --steps and --warmup are at least 0')
    if not (timing.seconds > 0 and timing.timeout > 0):
        raise UserError('--seconds and --timeout are above 0')
    if args.cores < 0 or min(args.batch) < 1 or args.num_classes < 1:
        raise UserError('--batch and --num_classes are at least 1, --cores at least 0')
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UserError(f'--peak_tflops {args.peak_tflops:g}: expected a number above 0')
    return timing


def _cells(args: argparse.Namespace) -> list:
    """Everything that is asked for; wrong names and sizes are refused before measuring."""
    from benchmarks import interleave
    from vit_jax.analysis import subject

    modes = ['inference'] if args.inference_only else args.modes
    cells = []
    for variant in args.variants:
        for size in args.image_size:
            found = subject.open_subject(variant, None, args.num_classes, size)
            config = dict(found.model_config)
            if 'transformer' in config:
                # The peers have no dropout at the same places: none for anybody.
                config['transformer'] = config['transformer'] | {'dropout_rate': 0.0}
            cells += [
                interleave.Cell(
                    variant, config, args.num_classes, size, dtype, batch, mode, args.data,
                    args.cores,
                )
                for dtype in args.dtype
                for batch in args.batch
                for mode in modes
            ]  # fmt: skip
    return cells


def _cell_result(args, cell, rows: list[dict], products: list[dict]) -> dict:
    from vit_jax.analysis import counts
    from vit_jax.errors import UserError

    arguments = (cell.model_config, cell.num_classes, cell.image_size)
    training = cell.mode == 'training'
    macs = counts.training_macs(*arguments) if training else counts.forward_macs(*arguments)
    for row in rows:
        parameters = row.get('facts', {}).get('parameters')
        expected = sum(part.parameters for part in counts.parts(*arguments))
        if parameters not in (None, expected):
            raise UserError(
                f'{row["contestant"]} has {parameters:,} parameters, and {cell.variant} '
                f'{expected:,}: it would not be the same work'
            )
    return {
        'variant': cell.variant,
        'image_size': cell.image_size,
        'num_classes': cell.num_classes,
        'dtype': cell.dtype,
        'batch': cell.batch,
        'mode': cell.mode,
        'data': pathlib.Path(cell.data).name if cell.data else 'made up',
        'flops_per_image': 2 * macs,
        'peak': _peak(args, cell, rows, products),
        'results': rows,
        'matrix_products': products,
    }


def _peak(args, cell, rows: list[dict], products: list[dict]) -> dict | None:
    """FLOP/s that the share is of, and where that comes from."""
    from benchmarks import machine, results

    if args.peak_tflops:
        return {'flops': 1e12 * args.peak_tflops, 'source': 'as given'}
    if args.device:
        flops, source = machine.stated_peak(args.device, cell.dtype)
        return {'flops': flops, 'source': source}
    facts = [row['facts'] for row in rows if 'facts' in row]
    gpus = [f['device'] for f in facts if f['platform'] == 'gpu']
    if gpus:
        published = machine.published_peak(gpus[0], cell.dtype)
        return {'flops': published[0], 'source': published[1]} if published else None
    rates = {
        row['contestant']: row['facts']['flops'] / results.quartiles(row['seconds'])[1]
        for row in products
        if 'error' not in row
    }
    if not rates:
        return None
    best = max(rates, key=rates.get)
    library = 'PyTorch' if best == 'torch-matmul' else 'XLA'
    return {
        'flops': rates[best],
        'source': f'measured in the same run: a square matrix product of {library}, median',
    }


def _tables(found: list[dict], style: str) -> str:
    from benchmarks import results
    from vit_jax.analysis import tables

    return '\n'.join(tables.render(t, style) for result in found for t in results.tables(result))


if __name__ == '__main__':
    sys.exit(main())
