"""Classifies images by names of classes that it was not trained on, with an image-text model.

IMAGE is a file, a folder, a pattern in quotes, or - for a list of paths on standard input. With
--dataset, all images of a labelled set are classified, and the accuracy is said.

Examples:
    vit_jax zeroshot --model LiT-L16L --classes 'rose,tulip,daisy' photos/
    vit_jax zeroshot --model LiT-B16B --classes pets.txt --prompts 'a photo of a {}, a pet' cat.jpg
    vit_jax zeroshot --model LiT-L16Ti --dataset tf_flowers
    vit_jax zeroshot --model clip-vit-base-patch32/ --classes 'cat,dog' photos/
"""

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from vit_jax import cli

if TYPE_CHECKING:
    from vit_jax.data.dataset import Selection


def main() -> int:
    """Runs the command line; returns the exit status, 1 if an image could not be read."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add(
        '--model',
        required=True,
        help='LiT-B16B, LiT-L16L, ...; a folder of such a model, or of CLIP or SigLIP of '
        'transformers; or a .npz of SigLIP of big_vision',
    )
    add(
        '--vocabulary',
        default='',
        metavar='FILE',
        help="the tokenizer of a .npz: a SentencePiece model, or Gemma's tokenizer.json",
    )
    add(
        '--classes',
        default='',
        metavar='NAMES',
        help='names separated by commas, or a file (one per line, or JSON); default: those of the '
        'dataset',
    )
    add(
        '--prompts',
        default='',
        metavar='PROMPT',
        help='a text with {} in the place of the name, or a file of such texts, one per line, that '
        "are averaged (default: 'a photo of a {}')",
    )
    add('--top_k', type=int, default=0, metavar='K', help='show the K most probable (default: all)')
    cli.add_images(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    from vit_jax.errors import UserError
    from vit_jax.inference import two_tower

    data = cli.select(args)
    if args.images and not args.classes:
        raise UserError("--classes says what the images may show: --classes 'rose,tulip'")
    prompts = _prompts(args.prompts) or two_tower.PROMPTS
    names = _classes(args.classes)
    if data is None:
        towers = two_tower.load(args.model, args.vocabulary)
        return _predict(args, two_tower.ZeroShotClassifier(towers, names, prompts))
    names = names or tuple(name.replace('_', ' ') for name in data.class_names)
    if len(names) != len(data.class_names):
        raise UserError(
            f'--classes names {len(names)} classes, and {data} has {len(data.class_names)}: name '
            f'them in this order: {", ".join(data.class_names[:10])}'
        )
    towers = two_tower.load(args.model, args.vocabulary)
    model = two_tower.ZeroShotClassifier(towers, names, prompts, exclusive=True)
    return _evaluate(args, model, data)


def _predict(args: argparse.Namespace, model: Any) -> int:
    """Prints the classes of images; returns the exit status."""
    from vit_jax.data.decode import BadImageError
    from vit_jax.inference import output, predict

    images = predict.find_images(args.images, stdin=sys.stdin.buffer)
    write = output.make_writer(
        sys.stdout, 'table', model.class_names, top_k=args.top_k, threshold=0.0
    )
    unreadable: list[BadImageError] = []

    def note(error: BadImageError) -> None:
        write(error.key, error)
        unreadable.append(error)

    for path, probabilities in predict.predict(model, images, batch=args.batch, on_error=note):
        write(path, probabilities)
    return output.report_unreadable(unreadable, len(images))


def _evaluate(args: argparse.Namespace, model: Any, data: 'Selection') -> int:
    """Prints how many images of a labelled set are recognised; returns the exit status."""
    from rich import console

    from vit_jax.inference import metrics as metrics_lib
    from vit_jax.inference import metrics_report, output

    with output.progress_bar(len(data)) as advance:
        found, unreadable = metrics_lib.collect(
            model, data, model_labels=range(len(model.class_names)), batch=args.batch,
            advance=advance,
        )  # fmt: skip
    out = console.Console(highlight=False)
    if not out.is_terminal:
        out.width = 120
    metrics = metrics_lib.compute(found, model.class_names)
    out.print(metrics_report.tables(metrics, title=f'{args.model}, zero-shot, on {data}'))
    return output.report_unreadable(unreadable, len(data))


def _classes(names: str) -> tuple[str, ...]:
    """What --classes names."""
    from vit_jax.inference import labels

    if names and (pathlib.Path(names).is_file() or pathlib.Path(names).suffix in ('.txt', '.json')):
        return tuple(labels.read(names))
    return tuple(name.strip() for name in names.split(',')) if names else ()


def _prompts(prompts: str) -> tuple[str, ...]:
    """What --prompts names."""
    from vit_jax import files

    if prompts and '{}' not in prompts:
        lines = files.read_text(prompts).splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    return (prompts,) if prompts else ()
