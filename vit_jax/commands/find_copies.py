"""Finds test images that are training images as well, or look like one.

A model that has seen a test image in training looks better than it is. Training compares files for
ten seconds by itself; this command takes the time it needs. It prints a line for each copy, the
test image, a tab, and the training image; the exit status is 1 if there are any.

With --model it compares what a model makes of the images (cosine of its features, which the third
column tells): the same photo in another size, cut or lighter, and photos of one scene. Which of
them are copies is for you to see: --contact_sheet draws them.

Examples:
    vit_jax find_copies photos/
    vit_jax find_copies photos/ --pixels --train 'train[:80%]' --test 'train[80%:]'
    vit_jax find_copies tf_flowers --model ViT-B_16.npz --above 0.95 --contact_sheet copies.png
"""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from vit_jax import cli

if TYPE_CHECKING:
    from vit_jax.data.dataset import Selection

_INPUT = ('normalization', 'eval', 'resize', 'interpolation', 'antialias', 'num_heads', 'variant')


def main() -> int:
    """Runs the command line; returns the exit status, 1 if there are copies."""
    args = _parser().parse_args()
    return cli.run(lambda: _find(args))


def _parser() -> argparse.ArgumentParser:
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
    cli.add_model(parser, required=False)
    add(
        '--above',
        type=float,
        default=0.95,
        metavar='COSINE',
        help='with --model: the least cosine that counts (default: 0.95)',
    )
    add('--batch', type=int, default=32, help='with --model: images at once (default: 32)')
    add('--features', metavar='DIR', help='with --model: keep the features here, as probe does')
    add('--contact_sheet', metavar='PNG', help='with --model: draw the pairs that are most alike')
    return parser


def _find(args: argparse.Namespace) -> int:
    from vit_jax import files
    from vit_jax.data import copies, sources
    from vit_jax.errors import UserError, printable

    if args.contact_sheet:
        files.check_output(args.contact_sheet, overwrite=True, flag='--contact_sheet')
    if not args.model and (
        args.contact_sheet or args.features or any(getattr(args, name) for name in _INPUT)
    ):
        raise UserError('what belongs to a model needs one: add --model MODEL')
    if args.model and args.pixels:
        raise UserError('--pixels and --model are two ways to compare: leave out one of them')
    train, test = sources.open_sources(
        args.dataset, train_split=args.train, test_split=args.test, **cli.data_of(args)
    )
    if args.model:
        return _find_alike(args, train, test)
    found = copies.find(train, test, pixels=args.pixels)
    if found is None:
        raise UserError(
            f'{args.dataset} is no folder or table of image files, so there are no files to '
            'compare; --model MODEL compares what a model makes of them'
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


def _find_alike(args: argparse.Namespace, train: 'Selection', test: 'Selection') -> int:
    """Compares features."""
    from vit_jax.errors import UserError, printable
    from vit_jax.inference import contact_sheet, features, model_folder, output

    if not 0 < args.above <= 1:
        raise UserError(f'--above is a cosine above 0, at most 1; got {args.above:g}')
    model = model_folder.load(args.model, variant=args.variant, **cli.input_of(args))
    with output.progress_bar(len(train) + len(test)) as advance:
        (trained, bad), (tested, worse) = (
            features.extract(
                model,
                part,
                batch=args.batch,
                keep=args.features and pathlib.Path(args.features) / name,
                advance=advance,
            )
            for name, part in (('train', train), ('test', test))
        )
    images: dict[str, Any] = {}
    pairs = []
    for place, other, cosine in features.near_copies(tested.values, trained.values, args.above):
        names = tested.keys[place], trained.keys[other]
        if names[0] == names[1]:  # is in both, which `Selection.overlap` counts
            continue
        print(*map(printable, names), f'{cosine:.4f}', sep='\t')
        pairs.append((*names, f'{cosine:.3f}'))
        images[names[0]] = test, int(tested.index[place])
        images[names[1]] = train, int(trained.index[other])
    print(
        f'{len(pairs):,} of the {len(test):,} test images have a cosine of {args.above:g} or more '
        f'with one of the {len(train):,} training images',
        file=sys.stderr,
    )
    if args.contact_sheet and pairs:
        contact_sheet.save_pairs(
            args.contact_sheet,
            pairs,
            lambda name: _pixels(*images[name]),
            title=f'{args.dataset}: test image and training image, cosine of {args.model}',
        )
    output.report_unreadable([*bad, *worse], len(train) + len(test))
    return 1 if pairs else 0


def _pixels(source: 'Selection', index: int) -> Any:
    """An image of a source, upright: uint8 [height, width, 3]."""
    from vit_jax.data.decode import decode

    example = source[index]
    return decode(example.image, key=example.key, exif=source.exif)
