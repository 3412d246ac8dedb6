"""Finds test images that are training images as well, under another name.

A model that has seen a test image in training looks better than it is. Training compares files for
ten seconds by itself; this command takes the time it needs. It prints a line for each copy, the
test image, a tab, and the training image; the exit status is 1 if there are any.

Examples:
    vit_jax find_copies photos/
    vit_jax find_copies photos/ --pixels --train 'train[:80%]' --test 'train[80%:]'
"""

import argparse
import sys

from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if there are copies."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('dataset', help=cli.DATASET)
    cli.add_data(parser)
    add('--train', default='', metavar='SPLIT', help='default: as training takes it')
    add('--test', default='', metavar='SPLIT', help='default: as training takes it')
    add(
        '--pixels',
        action='store_true',
        help='compare decoded pixels, which finds the same picture in another format, too; slower',
    )
    args = parser.parse_args()
    return cli.run(lambda: _find(args))


def _find(args: argparse.Namespace) -> int:
    from vit_jax.data import copies, sources
    from vit_jax.errors import UserError, printable

    train, test = sources.open_sources(
        args.dataset, train_split=args.train, test_split=args.test, **cli.data_of(args)
    )
    found = copies.find(train, test, pixels=args.pixels)
    if found is None:
        raise UserError(
            f'{args.dataset} is no folder or table of image files, so there are no files to compare'
        )
    for pair in found.pairs:
        print('\t'.join(map(printable, pair)))
    what = 'pixels' if args.pixels else 'bytes'
    print(
        f'{len(found.pairs):,} of the {len(test):,} test images have the {what} of one of the '
        f'{len(train):,} training images',
        file=sys.stderr,
    )
    return 1 if found.pairs else 0
