"""Measures how well frozen features tell the classes of a dataset apart, and saves the best head.

k-nearest neighbours, nearest class mean, ridge and logistic regression on what the model's head
reads. Settings are chosen among the training images, by cross-validation in five parts (of 5,000
images and more, on a tenth); the test images are looked at once, in the end. With --output, the
linear probe that was best becomes the head of a model folder, which predict, evaluate, export and
report take.

Examples:
    vit_jax probe --model ViT-B_16.npz --dataset tf_flowers --output flowers_probe
    vit_jax probe --model ti16.npz --dataset photos/ --shots 1 5 10 25 --seeds 3
"""

import argparse
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
    add('--shots', type=int, nargs='*', default=[], metavar='K', help='also few-shot, of K images')
    add('--seeds', type=int, default=3, help='draws of the few-shot images (default: 3)')
    add('--batch', type=int, default=32, help='images at once (default: 32)')
    add('--output', metavar='DIR', help='write the best head, with the model, to this folder')
    return parser


def _run(args: argparse.Namespace) -> int:
    from vit_jax.configs import datasets
    from vit_jax.data import sources
    from vit_jax.data.dataset import CLASS_INDEX
    from vit_jax.errors import UserError
    from vit_jax.inference import features, model_folder, output, probes

    if args.output:
        from vit_jax import files

        files.check_output(args.output, overwrite=False, flag='--output')
    dataset = sources.open_dataset(args.dataset, **cli.data_of(args))
    if dataset.label_dtype != CLASS_INDEX:
        raise UserError(f'the labels of {args.dataset} are not a class each, as is needed here')
    preset = {} if sources.is_path(args.dataset) else datasets.get_preset(args.dataset)
    specs = [preset.get('pp', {}).get(name, '') for name in ('train', 'test')]
    specs = [a or b for a, b in zip(specs, dataset.default_specs(), strict=True)]
    train, test = dataset.select(args.train or specs[0]), dataset.select(args.test or specs[1])
    if shared := train.overlap(test):
        raise UserError(f'{shared:,} images are in both {train} and {test}: set --train and --test')
    model = model_folder.load(args.model, variant=args.variant, **cli.input_of(args))
    if getattr(model.model, 'distilled', False) or getattr(model.model, 'mlp_head', False):
        raise UserError('the head of this model is not a linear layer on one vector')
    with output.progress_bar(len(train) + len(test)) as advance:
        (fitting, bad), (testing, worse) = (
            features.extract(model, part, batch=args.batch, advance=advance)
            for part in (train, test)
        )
    classes = len(train.class_names)
    results = probes.choose(fitting.values, fitting.label, classes)
    print(f'{args.model}, frozen: {train} to {test}')
    for result in results:
        right = int((result.probe.predict(testing.values) == testing.label).sum())
        print(_row(result.chosen.name, result.chosen.setting, result.validation, right, testing))
    for shots in args.shots:
        shares = [
            probes.few_shot(fitting, testing, classes, shots=shots, seed=seed)
            for seed in range(args.seeds)
        ]
        each = ', '.join(f'{100 * share:.1f}' for share in shares)
        print(f'{shots}-shot ridge: mean {100 * sum(shares) / len(shares):.1f} % ({each})')
    if args.output:
        best = next(r for r in results if isinstance(r.probe, probes.Linear))
        source = {
            'probe': f'{best.chosen.name} {best.chosen.setting}'.strip(),
            'features_of': args.model,
            'dataset': args.dataset,
            'train': train.spec,
            'test': test.spec,
            'train_fingerprint': train.fingerprint(),
        }
        _save(args.output, model, best.probe, train.class_names, source)
        print(f'{args.output}: the model with this head, {source["probe"]}')
    return output.report_unreadable([*bad, *worse], len(train) + len(test))


def _row(name: str, setting: str, validation: float, right: int, test: 'Features') -> str:
    from vit_jax.inference import probes

    low, high = probes.interval(right, len(test.label))
    return (
        f'{name:<21} {setting:<15} validation {100 * validation:5.1f} %   test '
        f'{100 * right / len(test.label):5.1f} % of {len(test.label):,} ({100 * low:.1f} to '
        f'{100 * high:.1f})'
    )


def _save(folder: str, model: Any, probe: Any, names: Any, source: dict[str, str]) -> None:
    """The model with the probe in the place of its head."""
    from vit_jax.inference import model_folder

    model_folder.save(
        folder,
        {**model.params, 'head': {'kernel': probe.kernel, 'bias': probe.bias}},
        model_config=model.model_config,
        class_names=names,
        preprocess=model.preprocess,
        source=source,
    )
