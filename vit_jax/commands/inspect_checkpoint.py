"""Tells what a file of weights is: format, variant, image size, classes, arrays, what is unusual.

Reads every format that can be loaded: .npz of Google and big_vision, .safetensors and .pth of timm,
Hugging Face and torchvision, folders of Hugging Face and timm, and model folders.

Examples:
    vit_jax inspect_checkpoint ViT-B_16.npz
    vit_jax inspect_checkpoint runs/flowers/model --brief
"""

import argparse
import sys

from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if something cannot be used."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('files', nargs='+', metavar='FILE', help='file or folder of weights')
    parser.add_argument('--variant', default='', help='architecture, where the arrays do not tell')
    cli.add_heads(parser)
    parser.add_argument('--brief', action='store_true', help='leave out the table of arrays')
    args = parser.parse_args()
    return cli.run(lambda: _inspect(args))


def _inspect(args: argparse.Namespace) -> int:
    # Not at the top: they take seconds, and --help should not.
    from vit_jax.checkpoint import inspection
    from vit_jax.errors import UserError

    status = 0
    for file in args.files:
        try:
            found = inspection.inspect(file, variant=args.variant, num_heads=args.num_heads)
        except UserError as error:
            print(f'{cli.program()}: {error}', file=sys.stderr)
            status = 1
            continue
        print(found)
        if not args.brief:
            print(f'\n{found.table()}')
        if any(array.problem for array in found.arrays):
            status = 1
    return status
