"""Draws what a Vision Transformer attends to, and stores the arrays.

For each image: attention of the class token in every layer and head; attention rollout; relevance
of the image's parts for a class (gradient-weighted attention). Over all images: mean attention
distance of the heads. Of the model alone: principal components of its patch filters, similarity of
its position embeddings. Of a model without class token (classifier gap) rollout starts from the
mean of all tokens, which its head reads.

IMAGE is a file, a folder, a pattern in quotes ('photos/**/*.jpg'), or - for standard input; without
any, only what concerns the model alone is drawn. Exit status: 0; 1 if an image could not be read
(they are named at the end, all others are done) or something is wrong.

Examples:
    vit_jax attention --model runs/b16-tf_flowers/model photo.jpg
    vit_jax attention --model ViT-B_16.npz --what relevance --classes daisy \
        --output daisies photos/
    vit_jax attention --model ViT-B_16.npz --what class_token --layer -1 --output a x.jpg
    vit_jax attention --model ViT-L_32.npz --output input_layers
"""

import argparse
import pathlib
import sys

from vit_jax import cli

SHOWN_CLASSES = 2


def main() -> int:
    """Runs the command line; returns the exit status, 1 if an image could not be read."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args), go_on=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add(
        '--model',
        required=True,
        help='model folder, weights of any known kind, or a released name',
    )
    add('--variant', default='', help='architecture of weights, such as ViT-B_16, if not clear')
    add('--labels', default='', metavar='NAMES', help='class names, as of vit_jax predict')
    add(
        '--output',
        default='',
        metavar='FOLDER',
        help='is there when it is complete; must not exist, or be empty; default: '
        'attention-<name of the model>, with a number if that is there',
    )
    add(
        '--what',
        default='',
        metavar='KINDS',
        help='some of class_token,rollout,relevance,distance,filters,positions; default: all that '
        'the model has',
    )
    add('--layer', default='', metavar='L', help='layers of class_token: 0,5,-1; default: all')
    add('--head', default='', metavar='H', help='heads of class_token: 0,5,-1; default: all')
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--classes',
        action='append',
        default=[],
        metavar='NAME',
        help='class of relevance; give it once for each. Default: the most probable of each image',
    )
    which.add_argument(
        '--top_k', type=int, metavar='K', help='relevance of the K most probable (default: 3)'
    )
    cli.add_input(parser)
    cli.add_image_files(parser, nargs='*')
    return parser


def _run(args: argparse.Namespace) -> int:
    import dataclasses

    from vit_jax.analysis import attention, attention_output
    from vit_jax.errors import UserError
    from vit_jax.inference import contact_sheet, labels, model_folder, predict
    from vit_jax.inference import output as prediction_output

    folder = pathlib.Path(args.output or attention_output.default_folder(args.model))
    attention_output.check_folder(folder)
    kinds = _kinds(args)
    of_images = bool(set(kinds) & set(attention_output.OF_IMAGES))
    if args.images and not of_images:
        raise UserError(f'--what {args.what} is about the model alone; give no images')
    if args.model.lower().endswith('.onnx'):
        raise UserError(f'{args.model} is an ONNX file; give the model folder or the weights')
    model = model_folder.load(args.model, variant=args.variant, **cli.input_of(args))
    names = labels.choose(model.class_names, args.labels, args.model)
    model = dataclasses.replace(model, class_names=names)
    attention.check(model)
    images = []
    if of_images:
        images = predict.find_images(args.images, stdin=sys.stdin.buffer, channels=model.channels)
    encoder = model.model.transformer
    choice = attention_output.Choice(
        kinds,
        attention_output.parse_numbers(args.layer, encoder['num_layers'], '--layer'),
        attention_output.parse_numbers(args.head, encoder['num_heads'], '--head'),
        attention_output.find_labels(args.classes, names),
        args.top_k or attention_output.TOP_K,
    )
    with prediction_output.progress_bar(len(images)) as advance:
        drawn, unreadable = attention_output.write(
            folder,
            model,
            images,
            choice,
            title=contact_sheet.shorten(_short_name(args.model), 40),
            skip=None if args.what else _note,
            advance=advance,
        )
    _report(folder, drawn, names, model.task)
    return prediction_output.report_unreadable(unreadable, len(images))


def _kinds(args: argparse.Namespace) -> tuple[str, ...]:
    """What to draw; options that would have no effect are errors."""
    from vit_jax.analysis import attention_output
    from vit_jax.errors import UserError

    if args.what:
        kinds = attention_output.parse_kinds(args.what)
    else:
        kinds = attention_output.KINDS if args.images else attention_output.OF_MODEL
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f'--top_k is a number of classes, at least 1; got {args.top_k}')
    needs = {'layer': 'class_token', 'head': 'class_token'}
    needs |= {'classes': 'relevance', 'top_k': 'relevance'}
    for option, kind in needs.items():
        if getattr(args, option) and kind not in kinds:
            raise UserError(f'--{option} is for {kind}, which is not to be drawn; leave it out')
    return kinds


def _short_name(model: str) -> str:
    """`run/model` of a model folder, else the name of the file."""
    path = pathlib.Path(model)
    return '/'.join(path.absolute().parts[-2:]) if path.is_dir() else path.name


def _note(reason: str) -> None:
    print(f'Note: left out, {reason}', file=sys.stderr)


def _report(folder: pathlib.Path, drawn: list, class_names, task) -> None:
    """Says what is where."""
    from vit_jax.errors import printable
    from vit_jax.inference import predict

    for image in drawn:
        best = ''
        if image.probabilities is not None:
            values = image.probabilities
            labels = predict.choose_outputs(values, task, top_k=SHOWN_CLASSES)[:SHOWN_CLASSES]
            best = '  ' + ', '.join(f'{class_names[i]} {task.text(values[i], i)}' for i in labels)
        place = f' -> {folder / image.folder}/' if image.folder else ''
        print(printable(f'{image.path}{place}{best}'))
    if folder.is_dir():
        own = sorted(path.name for path in folder.iterdir() if path.is_file())
        print(f'{folder}: {", ".join(own) or "a folder for each image"}')
    else:
        print('nothing was drawn, so no folder was written', file=sys.stderr)
