"""Measures a model on labelled images: accuracy, per class and overall, and calibration.

Top-1 and top-5 accuracy, loss, precision and recall of each class, the confusion matrix and the
calibration; where an image may have several classes, average precision of each, and F1 at the
model's threshold; of numbers, mean absolute and squared errors and R2. Every image counts; one that
cannot be read counts as wrong, is named at the end, and makes the exit status 1. Classes of model
and data are matched by their names.

Examples:
    vit_jax evaluate --model runs/b16-tf_flowers/model --dataset tf_flowers
    vit_jax evaluate --model flowers.onnx --dataset photos/ --output evaluation
    vit_jax evaluate --model ViT-B_16.npz --labels imagenet1k --dataset imagenet2012
"""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit_jax import cli

if TYPE_CHECKING:
    from vit_jax.data.dataset import Dataset, Selection
    from vit_jax.inference.description import TrainingData

RESULT = 'evaluation.json'


def main() -> int:
    """Runs the command line; returns the exit status, 1 if an image could not be read."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args), go_on=bool(args.output))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(
        parser,
        "names of the model's classes: imagenet1k, a file (one per line, or JSON), or none "
        "for numbers, in the order of the data. Default: the model's own",
    )
    add(
        '--dataset',
        default='',
        help=f'{cli.DATASET}; default: the one that the model was trained on',
    )
    add(
        '--split',
        default='',
        help='such as test or train[90%%:]; default: the test part of the dataset; without one, '
        'what the training of the model held out of it, or all of it if that was on other data',
    )
    add(
        '--class_map',
        default='',
        metavar='FILE',
        help='which class of the model each class of the data is, where names do not tell: lines '
        "of the data's name, a tab, and the model's name or label; or a class map of timm or Keras",
    )
    cli.add_data(parser)
    cli.add_batch(parser)
    cli.add_max_memory(parser)
    add('--output', metavar='DIR', help=f'write {RESULT} and pictures to this new folder')
    add(
        '--predictions',
        metavar='FILE',
        help='write what each image was taken for to this new file, NAME.csv or NAME.parquet',
    )
    add('--overwrite', action='store_true', help='replace FILE, and an earlier evaluation in DIR')
    return parser


def _run(args: argparse.Namespace) -> int:
    from rich import console

    from vit_jax.evaluate import Outcomes
    from vit_jax.inference import classifier, labels, metrics_report, output
    from vit_jax.inference import metrics as metrics_lib

    if args.output:
        _check_output(pathlib.Path(args.output), args.overwrite)
    if args.predictions:
        output.check_outcomes(args.predictions, overwrite=args.overwrite)
    cli.limit_memory(args.max_memory)
    model = classifier.open_classifier(
        args.model, variant=args.variant, labels=args.labels, **cli.input_of(args)
    )
    source, reason = _open_source(args, model.source, model.channels)
    class_map = labels.read_class_map(args.class_map, source.class_names) if args.class_map else {}
    to_model = labels.remap(source.class_names, model.class_names, str(source), class_map)
    in_order = to_model == tuple(range(len(to_model)))
    if in_order and labels.numbered(len(to_model)) == model.class_names:
        model.class_names = tuple(source.class_names)
    with output.progress_bar(len(source)) as advance:
        recorded = metrics_lib.Recorded(source)
        found, unreadable = metrics_lib.collect(
            model, recorded, model_labels=to_model, batch=args.batch, advance=advance
        )
    names, task = model.class_names, model.task
    if not isinstance(found, Outcomes):  # those of the data alone
        names, task = tuple(names[i] for i in to_model), task.pick(to_model)
    metrics = metrics_lib.measure(found, names, task)
    out = console.Console(highlight=False)
    if not out.is_terminal:
        out.width = 120  # A pipe has no width; 80 columns would fold long names of classes.
    title = f'{args.model} on {source}'
    split = f'split: {source.spec}, {reason}'
    out.print(metrics_report.tables(metrics, title=title, subtitle=split))
    if args.predictions:
        output.write_outcomes(args.predictions, recorded.keys, found, names, task)
        print(f'written to {args.predictions}: what each image was taken for')
    if args.output:
        described = {
            'model': args.model,
            'data': str(source),
            'split': source.spec,
            'split_is': reason,
            'model_source': dict(model.source),
            'labels_of_data_in_model': list(to_model),
            **metrics.to_dict(),
            'unreadable_images': [
                {'image': error.key, 'error': error.reason} for error in unreadable
            ],
        }
        pictures = metrics_report.pictures(metrics)
        _write(pathlib.Path(args.output), described, pictures, title)
        print(f'written to {args.output}: {", ".join([RESULT, *pictures])}')
    return output.report_unreadable(unreadable, len(source))


def _open_source(
    args: argparse.Namespace, source: Mapping[str, Any], channels: int
) -> 'tuple[Selection, str]':
    """The labelled images to evaluate on, and why these."""
    from vit_jax.data import sources
    from vit_jax.errors import UserError
    from vit_jax.inference import description

    try:
        trained = description.read(description.TrainingData, source)
    except UserError as error:
        raise UserError(f'what {args.model} tells of its training is damaged: {error}') from error
    name = args.dataset or trained.dataset
    if not name:
        raise UserError('the model does not tell what it was trained on: name a --dataset')
    told = cli.data_of(args)
    if _same(name, trained.dataset):  # what training was told holds here, too
        for key in ('columns', 'image_root'):
            told[key] = told[key] or getattr(trained, key)
        told['group'] = trained.group
    dataset = sources.open_dataset(name, channels=channels, **told)
    spec, reason = (args.split, 'as --split says') if args.split else choose_split(dataset, trained)
    return dataset.select(spec), reason


def choose_split(dataset: 'Dataset', trained: 'TrainingData') -> tuple[str, str]:
    """The split to evaluate on where the user names none, and why this one.

    Args:
        dataset: to evaluate on.
        trained: what the model tells of its training.

    Returns:
        Its specification. Of a folder, the test part, unless it was trained or chosen on; else what
        the training held out, if it was on this dataset; of TFDS, what its preset holds out; else
        all.
    """
    from vit_jax.configs import datasets
    from vit_jax.data import sources

    folder = sources.is_path(dataset.name)
    seen = _trained_on(dataset, trained)
    used = [each for each in (seen, seen and _select(dataset, trained.val)) if each]
    part = next((name for name in ('test', 'validation') if name in dataset.splits), '')
    if folder and part and not any(each.overlap(dataset.select(part)) for each in used):
        return part, 'the test part of the dataset'
    if seen and _select(dataset, trained.test):
        return trained.test, 'what the training of the model held out'
    everything = '+'.join(dataset.splits)
    if seen:
        return everything, 'all of it, WHICH THE MODEL WAS TRAINED ON'
    if trained.train_fingerprint and _same(dataset.name, trained.dataset):
        return dataset.default_specs()[1], (
            'what training on it would hold out now; it has changed since the model was trained on '
            'it, so that THE MODEL MAY KNOW SOME OF THESE IMAGES'
        )
    preset = '' if folder else datasets.get_preset(dataset.name).get('pp', {}).get('test', '')
    if preset or part:
        return preset or part, 'the test part of the dataset'
    return everything, 'all of it: the model tells of no training on it'


def _trained_on(dataset: 'Dataset', trained: 'TrainingData') -> 'Selection | None':
    """The images of this dataset that the model was trained on, if it was on this dataset."""
    seen = _select(dataset, trained.train)
    if seen and trained.train_fingerprint:  # which models of earlier versions do not have
        return seen if seen.fingerprint() == trained.train_fingerprint else None
    return seen if _same(dataset.name, trained.dataset) else None


def _select(dataset: 'Dataset', spec: str) -> 'Selection | None':
    """The images of a split, or None where there is no such split."""
    from vit_jax.errors import UserError

    try:
        return dataset.select(spec) if spec else None
    except UserError:
        return None


def _same(name: str, other: str) -> bool:
    """Whether two names of datasets are those of one set or one folder."""
    from vit_jax import files
    from vit_jax.data import sources

    if not sources.is_path(name) or not other:
        return name == other
    return files.expand(name).resolve() == files.expand(other).resolve()


def _check_output(folder: pathlib.Path, overwrite: bool) -> None:
    from vit_jax import files
    from vit_jax.errors import UserError

    files.refuse_address(folder, '--output')
    if folder.exists():
        if not overwrite:
            raise UserError(f'--output {folder} exists; name another folder, or add --overwrite')
        if not (folder / RESULT).is_file():
            raise UserError(
                f'--output {folder} is not an earlier evaluation (it has no {RESULT}), so it '
                'stays; name another folder'
            )
    if not folder.absolute().parent.is_dir():
        raise UserError(f'--output {folder}: there is no folder {folder.parent}; make it first')


def _write(
    folder: pathlib.Path, described: Mapping[str, Any], pictures: Mapping[str, Any], title: str
) -> None:
    """Writes all files, or none; an earlier evaluation is replaced."""
    from vit_jax import files
    from vit_jax.inference import contact_sheet

    with files.atomic_folder(folder, exists='replace') as part:
        text = json.dumps(described, indent=1, ensure_ascii=False, allow_nan=False)
        files.write_text(part / RESULT, text + '\n')
        for name, draw in pictures.items():
            contact_sheet.save_figure(draw(title), part / name, dpi=120)
