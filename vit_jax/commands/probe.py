"""Measures how well frozen features tell the classes of a dataset apart, and saves the best head.

k-nearest neighbours, nearest class mean, ridge and logistic regression on what the model's head
reads. Settings are chosen among the training images, by cross-validation in five parts (on a tenth,
where that has 500 images, and 50 of each class); the test images are looked at once, in the end.
Few-shot: ridge regression on K images of each class, as in the ViT paper. With --output, the linear
probe that was best becomes the head of a model folder, which predict, evaluate, export and report
take; its probabilities are calibrated on the validation images. --folds 10 tests on each tenth of
the training images, in turns.

Examples:
    vit_jax probe --model ViT-B_16.npz --dataset tf_flowers --output flowers_probe
    vit_jax probe --model ti16.npz --dataset photos/ --shots 1 5 10 25 --seeds 3
    vit_jax probe --model ti16.npz --dataset tf_flowers --train train --folds 10 --features f/
"""

import argparse
import pathlib
from typing import TYPE_CHECKING, Any

from vit_jax import cli

if TYPE_CHECKING:
    from vit_jax.inference.features import Features


def main() -> int:
    """Runs the command line; returns the exit status, 1 if an image could not be read."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args), go_on=bool(args.output))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(parser)
    add('--dataset', required=True, help=cli.DATASET)
    add('--train', default='', metavar='SPLIT', help='default: what training would train on')
    add('--test', default='', metavar='SPLIT', help='default: what training would hold out')
    cli.add_data(parser)
    add(
        '--shots',
        type=int,
        nargs='*',
        default=[1, 5, 10, 25],
        metavar='K',
        help='few-shot, of K images of each class (default: 1 5 10 25; none: leave it out)',
    )
    add('--seeds', type=int, default=3, help='draws of the few-shot images (default: 3)')
    cli.add_batch(parser)
    add('--folds', type=int, default=0, metavar='N', help='cross-validate on the training images')
    add(
        '--features',
        metavar='DIR',
        help='keep the features in this folder: what was killed goes on there, and another probe '
        'of the same images is quick',
    )
    add('--output', metavar='DIR', help='write the best head, with the model, to this folder')
    add('--metrics', metavar='FILE.json', help='write what is printed to this file, too')
    return parser


def _run(args: argparse.Namespace) -> int:
    from vit_jax import files
    from vit_jax.configs import datasets
    from vit_jax.data import sources
    from vit_jax.data.examples import CLASS_INDEX
    from vit_jax.errors import UserError
    from vit_jax.inference import features, model_folder, output, probe_choice, probes

    _check(args)
    dataset = sources.open_dataset(args.dataset, **cli.data_of(args))
    if dataset.label_dtype != CLASS_INDEX:
        raise UserError(f'the labels of {args.dataset} are not a class each, as is needed here')
    preset = {} if sources.is_path(args.dataset) else datasets.get_preset(args.dataset)
    # Not asked for before it is needed: where nothing can be held out to test on, folds may do.
    specs = [preset.get('pp', {}).get(name, '') for name in ('train', 'test')]
    given = [args.train or specs[0], args.test or specs[1]]
    if not all(given):
        given = [a or b for a, b in zip(given, dataset.default_specs(), strict=True)]
    train, test = dataset.select(given[0]), dataset.select(given[1])
    if shared := not args.folds and train.overlap(test):
        raise UserError(f'{shared:,} images are in both {train} and {test}: set --train and --test')
    if (labels := train.labels()) is not None:
        probe_choice.check_labels(labels, train.class_names)
    model = model_folder.load(args.model, variant=args.variant, **cli.input_of(args))
    probes.check_head(model)
    parts = {'train': train} if args.folds else {'train': train, 'test': test}
    with output.progress_bar(sum(map(len, parts.values()))) as advance:
        found = {
            name: features.extract(
                model,
                part,
                batch=args.batch,
                keep=args.features and pathlib.Path(args.features) / name,
                advance=advance,
            )
            for name, part in parts.items()
        }
    fitting, classes = found['train'][0], len(train.class_names)
    probe_choice.check_labels(fitting.label, train.class_names)
    groups = train.groups()
    groups = None if groups is None else groups[fitting.index]
    if args.folds:
        right = probe_choice.cross_validate(
            fitting.values, fitting.label, classes, args.folds, groups
        )
        print(f'{args.model}, frozen: {args.folds} folds of {train}')
        for name, (hits, counts) in right.items():
            print(_folds_row(name, hits, counts))
        told = {'folds': {name: {'right': r, 'images': n} for name, (r, n) in right.items()}}
    else:
        told = _compare(args, model, train, test, fitting, found['test'][0], groups)
    if args.metrics:
        facts = {
            'model': args.model,
            'dataset': args.dataset,
            'train': train.spec,
            'train_images': len(fitting.label),
            'features': fitting.values.shape[1],
            'classes': classes,
        }
        files.write_json(args.metrics, facts | told)
    bad = [error for _, errors in found.values() for error in errors]
    return output.report_unreadable(bad, sum(map(len, parts.values())))


def _check(args: argparse.Namespace) -> None:
    from vit_jax import files
    from vit_jax.errors import UserError

    if args.folds:
        if args.folds < 2:
            raise UserError(f'--folds {args.folds}: two at least')
        if args.output or args.test:
            raise UserError(
                '--folds tests on each part of the training images, with a head of its own for '
                'each: leave out --output and --test'
            )
    for path, flag in ((args.output, '--output'), (args.metrics, '--metrics')):
        if path:
            files.check_output(path, overwrite=False, flag=flag)
    if args.seeds < 1 or any(shots < 1 for shots in args.shots):
        raise UserError('--seeds and --shots are numbers from 1 on')


def _compare(
    args: argparse.Namespace,
    model: Any,
    train: Any,
    test: Any,
    fitting: 'Features',
    testing: 'Features',
    groups: Any,
) -> dict[str, Any]:
    """Chooses on the training images, tells what comes out on the test images, writes the best.

    Returns:
      What it told, for JSON.
    """
    from vit_jax.inference import probe_choice, probes

    classes = len(train.class_names)
    results = probe_choice.choose(fitting.values, fitting.label, classes, groups=groups)
    print(f'{args.model}, frozen: {train} to {test}')
    told: dict[str, Any] = {
        'test': test.spec, 'images': len(testing.label), 'probes': [], 'few_shot': {},
    }  # fmt: skip
    for result in results:
        name, setting = result.chosen.name, result.chosen.setting
        right = int((result.probe.predict(testing.values) == testing.label).sum())
        print(_row(name, setting, result.validation, right, testing))
        told['probes'].append({
            'name': name, 'setting': setting, 'accuracy_val': result.validation,
            'accuracy_test': right / len(testing.label),
        })  # fmt: skip
    for shots in args.shots:
        shares = [
            probe_choice.few_shot(fitting, testing, classes, shots=shots, seed=seed)
            for seed in range(args.seeds)
        ]
        told['few_shot'][str(shots)] = shares
        each = ', '.join(f'{100 * share:.1f}' for share in shares)
        low, high = probes.mean_interval(shares)
        print(
            f'{shots}-shot ridge: mean {100 * sum(shares) / len(shares):.1f} % ({100 * low:.1f} to '
            f'{100 * high:.1f}) of {args.seeds} draws: {each}'
        )
    if args.output:
        best, head = next((r, r.probe) for r in results if isinstance(r.probe, probes.Linear))
        source = {
            'probe': f'{best.chosen.name} {best.chosen.setting}'.strip(),
            'features_of': args.model,
            'dataset': args.dataset,
            'train': train.spec,
            'test': test.spec,
            'train_fingerprint': train.fingerprint(),
        }
        probes.save(args.output, model, head, train.class_names, source)
        print(f'{args.output}: the model with this head, {source["probe"]}')
    return told


def _folds_row(name: str, right: list[int], count: list[int]) -> str:
    from vit_jax.inference import probes

    shares = [hits / images for hits, images in zip(right, count, strict=True)]
    low, high = probes.mean_interval(shares)
    mean = 100 * sum(shares) / len(shares)
    each = ', '.join(f'{100 * share:.1f}' for share in shares)
    return (
        f'{name:<21} mean of folds {mean:5.1f} % ({100 * low:.1f} to {100 * high:.1f}) of '
        f'{sum(count):,}: {each}'
    )


def _row(name: str, setting: str, validation: float, right: int, test: 'Features') -> str:
    from vit_jax.inference import probes

    low, high = probes.interval(right, len(test.label))
    return (
        f'{name:<21} {setting:<15} validation {100 * validation:5.1f} %   test '
        f'{100 * right / len(test.label):5.1f} % of {len(test.label):,} ({100 * low:.1f} to '
        f'{100 * high:.1f})'
    )
