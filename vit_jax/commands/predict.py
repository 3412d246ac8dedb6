"""Classifies images: the classes of a model with their probabilities, most probable first.

Of a model for which an image may have several classes, those that reach the threshold that was
chosen when it was trained; of a model of numbers, these in their units.

IMAGE is a file, a folder, a pattern in quotes ('photos/**/*.jpg'), or - for standard input: a list
of paths, one per line, or one image. Exit status: 0; 1 if an image could not be read (they are
named at the end, all others are done) or something is wrong; 2 for a mistake in the command line.

Examples:
    vit_jax predict --model runs/b16-tf_flowers/model photo.jpg photos/
    vit_jax predict --model flowers.onnx --format csv --output flowers.csv photos/
    find photos -newer last_run | vit_jax predict --model flowers.onnx --top_k 1 -
    vit_jax predict --model ViT-B_16.npz --labels imagenet1k --contact_sheet x.png photos/
"""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from vit_jax import cli

if TYPE_CHECKING:
    from vit_jax.inference.classifier import Classifier
    from vit_jax.inference.task import Task

FORMATS = ('table', 'csv', 'jsonl')
ALL_UP_TO = 20  # classes; of models with more, only the best are shown unless asked for
BEST = 5


def main() -> int:
    """Runs the command line; returns the exit status, 1 if an image could not be read."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(
        parser,
        'class names: imagenet1k, a file (one per line, or JSON), or none for numbers. '
        "Default: the model's own; for 1,000 classes without names imagenet1k, with a note",
    )
    add(
        '--top_k',
        type=int,
        metavar='K',
        help=f'show the K most probable classes (default: all of up to {ALL_UP_TO}, of more '
        f'classes the first {BEST})',
    )
    add(
        '--threshold',
        type=float,
        metavar='P',
        help='show classes of probability P or more (default: all; where an image may have several '
        "classes, the model's own threshold)",
    )
    add('--format', choices=FORMATS, default='table', help='default: table')
    add(
        '--escape_formulas',
        action='store_true',
        help="of csv: put a ' before texts that a spreadsheet would run (they begin with = + - @)",
    )
    add('--output', metavar='FILE', help='write to FILE; it appears once it is complete')
    add('--contact_sheet', metavar='PNG', help='draw images with their predictions')
    add('--overwrite', action='store_true', help='replace FILE and PNG if they exist')
    cli.add_batch(parser)
    cli.add_max_memory(parser)
    cli.add_image_files(parser, nargs='+')
    return parser


def _run(args: argparse.Namespace) -> int:
    from vit_jax import files
    from vit_jax.data.decode import BadImageError
    from vit_jax.errors import UserError
    from vit_jax.inference import classifier, contact_sheet, output, predict

    if args.batch < 1:
        raise UserError(f'--batch is the number of images at once, at least 1; got {args.batch}')
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f'--top_k is the number of classes to show, at least 1; got {args.top_k}')
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f'--threshold is a probability, from 0 to 1; got {args.threshold:g}')
    if args.escape_formulas and args.format != 'csv':
        raise UserError(f'--escape_formulas goes with --format csv, not {args.format}')
    for path, flag in ((args.output, '--output'), (args.contact_sheet, '--contact_sheet')):
        if path:
            files.check_output(path, overwrite=args.overwrite, flag=flag)
    cli.limit_memory(args.max_memory)
    model = classifier.open_classifier(
        args.model, variant=args.variant, labels=args.labels, **cli.input_of(args)
    )
    images = predict.find_images(args.images, stdin=sys.stdin.buffer, channels=model.channels)
    top_k, threshold = _how_many(args, len(model.class_names), model.task)
    unreadable: list[BadImageError] = []
    drawn: list[tuple[str, Any]] = []  # paths and probabilities
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(
            output.progress_bar(len(images), shares_terminal=not args.output)
        )
        file = sys.stdout  # Not before: the bar may have put one there that writes above it.
        if args.output:
            partial = stack.enter_context(files.atomic_file(args.output))
            file = stack.enter_context(
                open(partial, 'w', encoding='utf-8', newline='', errors='backslashreplace')
            )
        write = output.make_writer(
            file,
            args.format,
            model.class_names,
            top_k=top_k,
            threshold=threshold,
            escape_formulas=args.escape_formulas,
            task=model.task,
        )

        def note(error: BadImageError) -> None:
            write(error.key, error)
            unreadable.append(error)
            advance(1)

        found = predict.predict(model, images, batch=args.batch, on_error=note)
        for path, probabilities in found:
            write(path, probabilities)
            if args.contact_sheet and len(drawn) < contact_sheet.MAX_IMAGES:
                drawn.append((path, probabilities))
            advance(1)
    if args.contact_sheet:
        _draw(args, drawn, len(images) - len(unreadable), model, threshold)
    return output.report_unreadable(unreadable, len(images))


def _how_many(args: argparse.Namespace, classes: int, task: 'Task') -> tuple[int, float]:
    """(top_k, threshold) for a model of so many classes; says so if not all will be shown."""
    from vit_jax.errors import UserError
    from vit_jax.inference.task import NUMBERS, SEVERAL

    if task.kind == NUMBERS and (args.top_k is not None or args.threshold is not None):
        raise UserError('this model gives numbers: --top_k and --threshold are of classes')
    if task.kind == NUMBERS:
        return 0, 0.0
    if args.top_k is None and args.threshold is None and task.kind == SEVERAL:
        chosen = f', chosen on {task.chosen_on}' if task.chosen_on else ''
        print(
            f'Note: the classes of probability {task.threshold:g} or more{chosen} (--threshold 0 '
            'for all)',
            file=sys.stderr,
        )
        return 0, task.threshold
    if args.top_k is None and args.threshold is None and classes > ALL_UP_TO:
        print(
            f'Note: the {BEST} most probable of {classes:,} classes (--top_k {classes} for all)',
            file=sys.stderr,
        )
        return BEST, 0.0
    return args.top_k or 0, args.threshold or 0.0


def _draw(
    args: argparse.Namespace, drawn: list, readable: int, model: 'Classifier', threshold: float
) -> None:
    from vit_jax.inference import contact_sheet

    if not drawn:
        print(f'{args.contact_sheet} is not drawn: no image could be read', file=sys.stderr)
        return
    title = f'Predictions of {args.model}'
    if readable > len(drawn):
        note = f'the first {len(drawn)} of {readable} images'
        print(f'{args.contact_sheet} shows {note}', file=sys.stderr)
        title += f' ({note})'
    contact_sheet.save(
        args.contact_sheet,
        drawn,
        model.class_names,
        title=title,
        task=model.task,
        threshold=threshold,
    )
