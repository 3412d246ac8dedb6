"""Times the input pipeline alone: images per second by stage, and how it grows with workers.

Stages on one thread: read, decode, crop, resize, batch, transfer to the device; then the whole
pipeline with more and more threads. Beside it the same work in torchvision with Pillow (DataLoader
workers) and in tf.data, where they are installed; each in a separate process, one after the other.
Ours comes as it is, with config.pp.exact=False, with the images in config.cache, and simulated:
decoding is a sleep as long, which shows what more threads would give if each had a core.

Examples:
    python scripts/benchmark_data.py --folder photos/ --output data.json
    python scripts/benchmark_data.py --folder photos/ --image_size 384 --images 256 --workers 1 2 4
    python scripts/benchmark_data.py --table data.json
"""

import pathlib
import sys

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import input_pipeline, record
from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if a contestant failed."""
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
    names = list(input_pipeline.CONTESTANTS)
    add('--contestants', nargs='+', choices=names, default=names)
    add('--rounds', type=int, default=5, help='timings of each; default: 5')
    add('--timeout', type=float, default=600, help='seconds to wait for a contestant')
    record.add_options(parser)
    args = parser.parse_args()
    if not args.table and not args.folder:
        parser.error('--folder says which photos to read (or --table which result to print)')
    if min(args.images, args.image_size, args.batch, args.rounds, *(args.workers or [1])) < 1:
        parser.error('--images, --image_size, --batch, --rounds and --workers are at least 1')
    return cli.run(
        lambda: record.run(args, input_pipeline.KIND, lambda: input_pipeline.measure(args))
    )


if __name__ == '__main__':
    sys.exit(main())
