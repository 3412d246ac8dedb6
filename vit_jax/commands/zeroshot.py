"""Classifies images by names of classes that it was not trained on, with an image-text model.

IMAGE is a file, a folder, a pattern in quotes, or - for a list of paths on standard input. With
--dataset, all images of a labelled set are classified, and the accuracy is said. With --query,
images are ranked by how well they fit a text.

Examples:
    vit_jax zeroshot --model LiT-L16L --classes 'rose,tulip,daisy' photos/
    vit_jax zeroshot --model LiT-B16B --classes pets.txt --prompts 'a photo of a {}, a pet' cat.jpg
    vit_jax zeroshot --model LiT-L16Ti --dataset tf_flowers --prompts clip80 --save_as flowers_zero/
    vit_jax zeroshot --model LiT-L16L --query 'a red tulip' --contact_sheet tulips.png photos/
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
        help='LiT-B16B, LiT-L16L, ...; a folder of such a model, of transformers (CLIP, SigLIP) '
        'or of open_clip; or a .npz of SigLIP of big_vision',
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
        help='names separated by commas, or a file (one per line, or JSON), or imagenet1k, the '
        '1,000 of ImageNet; default: those of the dataset',
    )
    add(
        '--prompts',
        default='',
        metavar='PROMPT',
        help='a text with {} in the place of the name, or a file of such texts, one per line, that '
        "are averaged; clip80: CLIP's 80 for ImageNet (default: 'a photo of a {}')",
    )
    add(
        '--cache',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='keep the embeddings of the texts in the cache folder (~/.cache/vit_jax, or '
        'VIT_JAX_CACHE) and take them from there (default: yes)',
    )
    add('--save_as', metavar='DIR', help='also write the classifier as a model folder')
    add(
        '--query', default='', metavar='TEXT', help='rank the images by how well they fit this text'
    )
    add('--top_k', type=int, default=0, metavar='K', help='show the K best (default: all)')
    add('--contact_sheet', metavar='PNG', help='with --query: draw the best images')
    cli.add_images(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    from vit_jax import files
    from vit_jax.errors import UserError
    from vit_jax.inference import class_texts, labels, two_tower

    if args.top_k < 0:
        raise UserError(f'--top_k is how many to show, at least 1; got {args.top_k}')
    data = cli.select(args)
    if args.save_as and pathlib.Path(args.save_as).exists():
        raise UserError(f'--save_as {args.save_as} exists; name another folder')
    if args.contact_sheet:
        files.check_output(args.contact_sheet, overwrite=True, flag='--contact_sheet')
    if args.query:
        return _rank(args, data)
    if args.contact_sheet:
        raise UserError('--contact_sheet shows what --query found')
    if args.images and not args.classes:
        raise UserError("--classes says what the images may show: --classes 'rose,tulip'")
    prompts = class_texts.read_prompts(args.prompts)
    names = labels.listed(args.classes)
    if data is None:
        towers = two_tower.load(args.model, args.vocabulary)
        model = two_tower.ZeroShotClassifier(towers, names, prompts, cache=args.cache)
        _save(args, towers, model)
        return _predict(args, model)
    names = names or tuple(name.replace('_', ' ') for name in data.class_names)
    if len(names) != len(data.class_names):
        raise UserError(
            f'--classes names {len(names)} classes, and {data} has {len(data.class_names)}: name '
            f'them in this order: {", ".join(data.class_names[:10])}'
        )
    towers = two_tower.load(args.model, args.vocabulary)
    model = two_tower.ZeroShotClassifier(towers, names, prompts, exclusive=True, cache=args.cache)
    _save(args, towers, model)
    return _evaluate(args, model, data)


def _save(args: argparse.Namespace, towers: Any, model: Any) -> None:
    """Does what --save_as asks for."""
    from vit_jax.errors import printable
    from vit_jax.inference import two_tower

    if args.save_as:
        two_tower.save_classifier(args.save_as, towers, model)
        print(f'{printable(args.save_as)}: a model folder', file=sys.stderr)


def _rank(args: argparse.Namespace, data: 'Selection | None') -> int:
    """Prints which images fit a text best; returns the exit status."""
    from vit_jax.errors import UserError, printable
    from vit_jax.inference import contact_sheet, output, predict, two_tower

    if not args.query.strip():
        raise UserError('--query has no word in it')
    if args.classes or args.prompts or args.save_as:
        raise UserError('--query takes a text as it is: no --classes, --prompts or --save_as')
    if args.contact_sheet and data:
        raise UserError('--contact_sheet draws images that are named, not those of a --dataset')
    towers = two_tower.load(args.model, args.vocabulary)
    source = data or predict.Images(predict.find_images(args.images, stdin=sys.stdin.buffer))
    with output.progress_bar(len(source)) as advance:
        found, unreadable = two_tower.rank(
            towers, args.query, source, batch=args.batch, cache=args.cache, advance=advance
        )
    found = found[: args.top_k or None]
    for path, cosine in found:
        print(f'{cosine:.4f}  {printable(path)}')
    if args.contact_sheet and found:
        contact_sheet.save_similar(args.contact_sheet, found, title=args.query)
        print(printable(args.contact_sheet), file=sys.stderr)
    return output.report_unreadable(unreadable, len(source))


def _predict(args: argparse.Namespace, model: Any) -> int:
    """Prints the classes of images; returns the exit status."""
    from vit_jax.data.decode import BadImageError
    from vit_jax.inference import output, predict

    images = predict.find_images(args.images, stdin=sys.stdin.buffer)
    write = output.make_writer(
        sys.stdout, 'table', model.class_names, top_k=args.top_k, task=model.task
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
    metrics = metrics_lib.measure(found, model.class_names, model.task)
    out.print(metrics_report.tables(metrics, title=f'{args.model}, zero-shot, on {data}'))
    return output.report_unreadable(unreadable, len(data))
