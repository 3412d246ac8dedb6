"""Writes the features of images to a file, and finds the images that look most like one.

IMAGE is a file, a folder, a pattern in quotes, or - for a list of paths on standard input. The file
is a .npz with `features` float32 [N, D], `paths` [N], `fingerprint` of the model, and of a labelled
dataset `labels` [N] and `class_names`; or a .parquet with the columns path, features and label. It
appears once it is complete; until then, what is done is kept in FILE.parts, and the same command
goes on there.

Examples:
    vit_jax embed --model ViT-B_16.npz --output features.npz photos/
    vit_jax embed --model runs/x/model --layer 8 --pool mean --dataset tf_flowers --output f.parquet
    vit_jax embed --model runs/x/model --neighbors photo.jpg --contact_sheet x.png photos/
"""

import argparse
import sys

from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if an image could not be read."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args), go_on=bool(args.output))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(parser)
    add('--layer', default='', help="index of an encoder block, or 'encoded'; default: what the "
        'head reads')  # fmt: skip
    add('--pool', default='', choices=('class', 'mean', 'both'), help='of the tokens of a layer')
    add('--normalize', action='store_true', help='give the features of each image the length 1')
    add('--output', metavar='FILE', help='the .npz or .parquet file to write')
    add('--overwrite', action='store_true', help='replace FILE if it exists')
    add('--neighbors', metavar='PHOTO', help='print the images that are most like this one')
    add('--top_k', type=int, default=10, metavar='K', help='how many of them (default: 10)')
    add('--contact_sheet', metavar='PNG', help='draw them')
    cli.add_images(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    import shutil

    from vit_jax import files
    from vit_jax.errors import UserError, printable
    from vit_jax.inference import (
        contact_sheet,
        feature_files,
        features,
        model_folder,
        output,
        predict,
    )

    data = cli.select(args)
    if not args.output and not args.neighbors:
        raise UserError('say what to do: --output FILE, --neighbors PHOTO, or both')
    if args.contact_sheet and (data or not args.neighbors):
        raise UserError(
            '--contact_sheet draws what --neighbors found among images that are named, not those '
            'of a --dataset'
        )
    if args.contact_sheet:
        files.check_output(args.contact_sheet, overwrite=True, flag='--contact_sheet')
    parts = ''
    if args.output:
        feature_files.check_output(args.output, overwrite=args.overwrite)
        parts = f'{args.output}.parts'
    model = model_folder.load(args.model, variant=args.variant, **cli.input_of(args))
    source = data or predict.Images(
        predict.find_images(args.images, stdin=sys.stdin.buffer, channels=model.channels),
        model.channels,
    )
    options = {'layer': args.layer, 'pooling': args.pool, 'normalized': args.normalize}
    with output.progress_bar(len(source)) as advance:
        found, unreadable = features.extract(
            model, source, batch=args.batch, keep=parts, advance=advance, **options
        )
    if args.output:
        about = {'model': args.model, **features.about(model, **options)}
        names = source.class_names if args.dataset else None
        feature_files.write(args.output, found, about=about, class_names=names)
        shutil.rmtree(parts)
        count, width = found.values.shape
        print(f'{args.output}: {count:,} images, {width} features')
    if args.neighbors:
        query, _ = features.extract(
            model, predict.Images([args.neighbors], model.channels), **options
        )
        similar = features.cosines(query.values, found.values)[0]
        best = (-similar).argsort(kind='stable')[: args.top_k]
        for index in best:
            print(f'{similar[index]:.4f}  {printable(found.keys[index])}')
        if args.contact_sheet:
            images = [(found.keys[index], float(similar[index])) for index in best]
            contact_sheet.save_similar(args.contact_sheet, images, title=f'like {args.neighbors}')
    return output.report_unreadable(unreadable, len(source))
