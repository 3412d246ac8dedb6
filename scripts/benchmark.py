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

import pathlib
import sys

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import contestants, record
from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if a contestant failed."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--variants', nargs='+', default=['ViT-B_16'], help='of list_models.py --variants')
    add('--image_size', type=int, nargs='+', default=[224], help='default: 224')
    add('--dtype', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    add('--batch', type=int, nargs='+', default=[8], help='images per step; default: 8')
    add('--modes', nargs='+', choices=('training', 'inference'), default=['training', 'inference'])
    add(
        '--contestants', nargs='+', default=list(contestants.DEFAULT),
        help='default: all of the list above',
    )  # fmt: skip
    add('--num_classes', type=int, default=1000, help='default: 1000')
    add('--data', default='', help='folder or dataset, read by our pipeline; default: made up')
    add('--rounds', type=int, help='timings of each contestant; default: 10')
    add('--steps', type=int, help='steps in a timing; default: what takes --seconds')
    add('--seconds', type=float, default=1.0, help='of one timing; default: 1')
    add('--warmup', type=int, help='steps that are not timed; default: 2')
    add('--cores', type=int, default=0, help='that each contestant may use; default: all')
    add('--device', default='', help='whose published peak to use (h200, rtx4090, ...)')
    add('--peak_tflops', type=float, help='peak of the device; default: of the table, or measured')
    add(
        '--skip_warm_start', action='store_false', dest='warm_start',
        help='start each once, not twice (cold, warm)',
    )  # fmt: skip
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
    record.add_options(parser)
    args = parser.parse_args()

    def run() -> None:
        from benchmarks import steps  # takes seconds, and --help should not

        record.run(args, steps.KIND, lambda: steps.measure(args))

    return cli.run(run)


if __name__ == '__main__':
    sys.exit(main())
