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
import pathlib
import sys

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli
from vit_jax.analysis import tables
from vit_jax.errors import UserError


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
    add('--format', choices=tables.FORMATS, default='terminal')
    add('--output', help='folder to keep the trace in')
    args = parser.parse_args()
    if min(args.steps, args.top, args.batch, args.num_classes, args.accum_steps) < 1:
        parser.error('--steps, --top, --batch, --num_classes and --accum_steps are at least 1')

    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from benchmarks import trace  # takes seconds, and --help should not

    try:
        found = trace.profile(args)
    except ValueError as error:  # the model refuses attention or remat
        raise UserError(str(error)) from error
    for table in found:
        print(tables.render(table, args.format))


if __name__ == '__main__':
    sys.exit(main())
