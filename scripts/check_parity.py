"""Proves a model against PyTorch: same weights, same images, number by number.

A folder of Hugging Face or timm is run by that library, exactly as the folder says. For other
weights the reference is the ViT of Hugging Face transformers, where it has the model (Vision
Transformers with a class token), else the independent implementation of
benchmarks/torch_reference.py; timm too, if it is installed. They are told what our side assumed,
which is printed. Both sides run in float32 and in float64, which shows which side rounds; and where
the model has the tanh form of GELU, PyTorch once more with its default erf form, for which these
weights were not trained.

Examples:
    python scripts/check_parity.py --model ViT-B_16.npz
    python scripts/check_parity.py --model runs/flowers/model --images photos/
    python scripts/check_parity.py --model ViT-B_16.npz --perturb head/bias      # must fail
    python scripts/check_parity.py --self-test

Exit status: 0 if the logits agree; 1 if they differ by more than 1e-4 and by more than twice the
distance of PyTorch's float32 from its own float64 (--tolerance sets another limit); 2 if no
comparison was possible. Blocks hold values of 30 and more, so their rows are compared with twice
their own distance from float64 only: a row beyond it is marked ("more than rounding"), which shows
where a difference begins and does not by itself fail the check. Where the head is all zeros
(weights for fine-tuning), what the head reads decides instead.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli
from vit_jax.errors import UserError

REFERENCES = ('auto', 'transformers', 'torch_reference', 'timm')


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = _parse()
    return cli.run(lambda: _check(args), failure=2)


def _check(args: argparse.Namespace) -> int:
    for module in ('torch', 'jax'):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f'{module} is not installed. `bash scripts/setup.sh --test` installs what is '
                'needed (requirements-test.txt)'
            )
    from benchmarks import parity  # takes seconds, and --help should not

    options = vars(args)
    of_input = cli.input_of(args)
    for name in ('num_heads', 'normalization', 'eval', 'resize', 'interpolation', 'antialias'):
        del options[name]
    as_json = options.pop('json')
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    if options.pop('self_test'):
        from benchmarks import parity_self_test

        return 0 if parity_self_test.run(say) else 1
    result = parity.check(**options, **of_input, say=say)
    if as_json:
        print(json.dumps(result, indent=1))
    return 0 if result['passed'] else 1


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--model', help='model folder, file of weights, or released name')
    what.add_argument(
        '--self-test',
        action='store_true',
        help='check the check: made-up folders whose settings are ignored on our side must fail',
    )
    add('--images', nargs='+', default=[], metavar='DIR', help='images (default: 8 made-up ones)')
    add('--limit', type=int, default=0, metavar='N', help='use the first N images (default: all)')
    add('--variant', default='', help='architecture of a file, where its arrays do not tell')
    cli.add_input(parser)
    add('--tolerance', type=float, metavar='X', help='how far logits may differ')
    add(
        '--reference',
        choices=REFERENCES,
        default='auto',
        help='compare with this one only (default: as described above)',
    )
    add(
        '--perturb',
        default='',
        metavar='NAME',
        help='make this array 1 %% larger on the PyTorch side',
    )
    add('--batch', type=int, default=4, metavar='N', help='images at once (default: 4)')
    add('--json', action='store_true', help='print the result as JSON, the rest to standard error')
    args = parser.parse_args()
    if args.tolerance is not None and not args.tolerance >= 0:
        parser.error(f'--tolerance: expected a number of at least 0, got {args.tolerance}')
    if args.limit < 0 or args.batch < 1:
        parser.error('--limit is a number of images, or 0 for all; --batch is at least 1')
    return args


if __name__ == '__main__':
    sys.exit(main())
