"""Traces steps of a model and prints where their time goes, the ten longest first.

By kind of work (matrix products, softmax, layer norm, ...), by part of the model (forward and
backward apart) and by operation of the compiled program. What the compiler has fused counts as
what most of it is, with a matrix product in it as that. The trace itself can be opened in Perfetto
or TensorBoard's profiler: --output keeps it.

Examples:
    python scripts/profile_step.py --variant ViT-Ti_16 --batch 8
    python scripts/profile_step.py --variant ViT-B_16 --batch 512 --dtype bfloat16 --output trace/
    python scripts/profile_step.py --variant ViT-S_16 --mode inference --top 20
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
import time

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if something is not possible."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--variant', default='ViT-B_16', help='of list_models.py --variants; default: ViT-B_16')
    add('--image_size', type=int, default=224, help='default: 224')
    add('--num_classes', type=int, default=1000, help='default: 1000')
    add('--batch', type=int, default=8, help='images per step; default: 8')
    add('--dtype', choices=('float32', 'bfloat16'), default='float32')
    add('--mode', choices=('training', 'inference'), default='training')
    add('--attention', default='auto', help='implementation, see configs/common.py')
    add('--remat', default='', help="'dots' or 'full'")
    add('--accum_steps', type=int, default=1, help='micro-batches; default: 1')
    add('--steps', type=int, default=5, help='to trace; default: 5')
    add('--top', type=int, default=10, help='lines of each table; default: 10')
    add('--format', choices=('terminal', 'markdown', 'csv'), default='terminal')
    add('--output', help='folder to keep the trace in')
    args = parser.parse_args()
    if min(args.steps, args.top, args.batch, args.num_classes, args.accum_steps) < 1:
        parser.error('--steps, --top, --batch, --num_classes and --accum_steps are at least 1')

    # Not at the top: they take seconds, and --help should not.
    from vit_jax.errors import UserError

    try:
        _profile(args)
    except (UserError, ValueError) as error:  # ValueError: the model refuses attention or remat
        print(f'profile_step.py: {error}', file=sys.stderr)
        return 1
    return 0


def _profile(args: argparse.Namespace) -> None:
    import jax

    from benchmarks import contestants, interleave, jax_workload, trace
    from vit_jax.analysis import subject
    from vit_jax.errors import UserError

    if args.output and pathlib.Path(args.output).exists():
        raise UserError(f'{args.output} is there already: name a new folder')
    found = subject.open_subject(args.variant, None, args.num_classes, args.image_size)
    options = {key: str(getattr(args, key)) for key in ('attention', 'remat', 'accum_steps')}
    cell = interleave.Cell(
        found.name, found.model_config, args.num_classes, args.image_size, args.dtype, args.batch,
        args.mode,
    )  # fmt: skip
    ours = contestants.Contestant(contestants.OURS, contestants.OURS, options)
    workload = jax_workload.Ours(cell.setup(ours), {})
    workload.run(2)
    start = time.perf_counter()
    workload.run(args.steps)
    untraced = (time.perf_counter() - start) / args.steps
    known = trace.operations(workload.hlo())
    with contextlib.ExitStack() as stack:
        folder = args.output or stack.enter_context(tempfile.TemporaryDirectory())
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            workload.run(args.steps)
            traced = (time.perf_counter() - start) / args.steps
        times = trace.read(folder, known)
    _print(args, known, times, untraced, traced)


def _print(args, known: dict, times: dict, untraced: float, traced: float) -> None:
    from benchmarks import trace
    from vit_jax.analysis import tables

    busy = sum(seconds for seconds, _ in times.values()) / args.steps
    labels = {
        'kind of work': {name: known[name].work for name in times},
        'part of the model': {name: known[name].part for name in times},
        'operation': {name: f'{known[name].kind} {name}: {known[name].part}' for name in times},
    }
    notes = [
        f'One step: {1e3 * untraced:.1f} ms, {1e3 * traced:.1f} ms while traced; the operations '
        f'together {1e3 * busy:.1f} ms (more than the step where several run at a time; less where '
        'the device waits).'
    ]
    for what, label in labels.items():
        shares = trace.top(trace.rank(times, label, args.steps), args.top)
        rows = [
            [s.name, f'{1e3 * s.seconds:.2f}', f'{s.count:.0f}', f'{100 * s.share:.1f} %']
            for s in shares
        ]
        title = (
            f'{args.variant}, {args.image_size} px, {args.dtype}, batch {args.batch}, '
            f'{args.mode}: time by {what}'
        )
        table = tables.Table(title, (what, 'ms a step>', 'times>', 'share>'), rows, notes)
        print(tables.render(table, args.format))
        notes = []


if __name__ == '__main__':
    sys.exit(main())
