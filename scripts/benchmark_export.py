"""Times our ONNX graph beside that of the same model exported from transformers by torch.onnx.

Both files are made here from the same weights, run by onnxruntime on the CPU in one process, in
turn, and have to give the same logits. Needs onnxruntime, torch, transformers and onnxscript.

Examples:
    python scripts/benchmark_export.py
    python scripts/benchmark_export.py --model ViT-B_16.npz --batch 1 8 --output benchmark.json
    python scripts/benchmark_export.py --variant ViT-S_16 --int8
"""

import pathlib
import sys

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import record
from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if there is no result."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--model', help='model folder or weights of a ViT; default: made-up weights')
    add('--variant', default='ViT-Ti_16', help='of the made-up weights')
    add('--opset', type=int, default=20, choices=(17, 20), help='of our file')
    add('--batch', type=int, nargs='+', default=[8], help='images at once')
    add('--runs', type=int, default=20, help='timed runs of each file')
    add('--threads', type=int, default=2, help='of onnxruntime')
    add('--int8', action='store_true', help='time our int8 file, too')
    record.add_options(parser)
    args = parser.parse_args()
    if min(*args.batch, args.runs, args.threads) < 1:
        parser.error('--batch, --runs and --threads are at least 1')

    def run() -> None:
        from benchmarks import onnx_files  # takes seconds, and --help should not

        record.run(args, onnx_files.KIND, lambda: onnx_files.measure(args))

    return cli.run(run)


if __name__ == '__main__':
    sys.exit(main())
