"""Averages the weights of fine-tuned models: greedy model soups, and WiSE-FT.

Several models, fine-tuned from the same weights with other settings or seeds, are averaged: from
the best one on, each is taken up that makes the mean no worse on validation images (Wortsman et al.
2022, arXiv 2203.05482). With --start, the result, or a single model, is interpolated with the
weights it was fine-tuned from, which makes it stronger on images from elsewhere (arXiv 2109.01903);
the share is the best on validation images, or --share. The result is a model folder.

Validation images are those that the first model's run held out (config.pp.val), or --split of
--dataset. What models were trained on is refused, and what they are to be tested on is warned of.

Examples:
    vit_jax soup runs/a/model runs/b/model runs/c/model --output soup
    vit_jax soup runs/a/model --start ViT-B_16.npz --share 0.5 --output wise
    vit_jax soup runs/*/model --dataset photos/ --split 'train[90%:]' --output soup
"""

import argparse
import math
import os
from typing import TYPE_CHECKING, Any

from vit_jax import cli

if TYPE_CHECKING:
    from vit_jax.data.dataset import Selection


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('models', nargs='+', metavar='MODEL', help='model folders of one architecture')
    add('--output', required=True, metavar='DIR', help='the model folder to write')
    add('--start', default='', metavar='WEIGHTS', help='what the models were fine-tuned from')
    add(
        '--share',
        type=float,
        default=math.nan,
        help='of the fine-tuned model, with --start; default: the best of 0, 0.1, ..., 1',
    )
    add('--uniform', action='store_true', help='average all models, without choosing')
    add('--dataset', default='', help=f'{cli.DATASET}; default: that of the first model')
    add('--split', default='', help='to choose on; default: what training held out to validate')
    cli.add_data(parser)
    add('--batch', type=int, default=32, help='images at once (default: 32)')
    args = parser.parse_args()
    return cli.run(lambda: _run(args), go_on=True)


def _run(args: argparse.Namespace) -> None:
    import dataclasses

    from vit_jax import files
    from vit_jax.errors import UserError, printable
    from vit_jax.inference import model_folder, soup
    from vit_jax.run import choice

    def say(text: str) -> None:
        print(printable(text), flush=True)

    files.refuse_address(args.output, '--output')
    if os.path.lexists(files.expand(args.output)):
        raise UserError(f'--output {args.output} exists; name another folder')
    if len(args.models) == 1 and not args.start:
        raise UserError('one model is no soup: name several, or --start')
    given = not math.isnan(args.share)
    if given and not args.start:
        raise UserError(f'--share {args.share:g} is of the way from --start, which is not given')
    if given and not 0 <= args.share <= 1:
        raise UserError(f'--share {args.share:g} is not from 0 to 1')
    models = [model_folder.load(path) for path in args.models]
    soup.check(models, args.models)
    whole, told = models[0], dict[str, Any]()
    start = own_head = None
    if args.start:
        loaded = model_folder.load(args.start)
        start, own_head = soup.as_start(loaded, whole, args.start)
    greedy = len(models) > 1 and not args.uniform
    score = None
    if greedy or (start and not given):
        chosen_on = _open(args, [model.source for model in models])
        say(f'chosen on {chosen_on}')
        if len(chosen_on) < choice.FEW:
            say(f'WARNING: {len(chosen_on)} images are few to choose by: luck has a large part')
        score = soup.scorer(chosen_on, whole, args.batch)
        told['chosen_on'] = chosen_on.spec
    if greedy and score:
        found = soup.greedy(models, score, names=args.models, say=say)
        whole, taken = found.model, [args.models[index] for index in found.taken]
        say(f'soup of {len(taken)} of {len(models)}: {found.score:.4f}')
    else:
        taken = args.models
        params = soup.average([model.params for model in models])
        whole = dataclasses.replace(whole, params=params)
    told['soup'] = taken
    if start:
        share = args.share
        if score and not given:
            whole, share, _ = soup.best_share(start, whole, score, say=say)
        else:
            whole = soup.interpolate(start, whole, share)
        told |= {'start': args.start, 'share': share}
        head = '' if own_head else '; its head is that of the fine-tuned model'
        say(f'{share:g} of the fine-tuned model, {1 - share:g} of {args.start}{head}')
    source = {name: whole.source[name] for name in whole.source if name not in ('steps', 'metrics')}
    model_folder.save_new(args.output, dataclasses.replace(whole, source={**source, **told}))
    say(f'model folder: {args.output}')


def _open(args: argparse.Namespace, origins: list[Any]) -> 'Selection':
    """The validation images."""
    from vit_jax.data import sources
    from vit_jax.errors import UserError
    from vit_jax.inference import description

    trained = [description.read(description.TrainingData, origin) for origin in origins]
    first = trained[0]
    name = sources.lasting_name(args.dataset) if args.dataset else first.dataset
    spec = args.split or (first.val if name == first.dataset else '')
    if not name or not spec:
        raise UserError(
            'the first model tells of no validation images: name --dataset and --split, of images '
            'that no model was trained on; or train with --config.pp.val=10%'
        )
    told = cli.data_of(args)
    if name == first.dataset:
        for key in ('columns', 'image_root'):
            told[key] = told[key] or getattr(first, key)
        told['group'] = first.group
    dataset = sources.open_dataset(name, **told)
    chosen = dataset.select(spec)
    for path, each in zip(args.models, trained, strict=True):
        if each.dataset != name:
            continue
        if each.train and (common := chosen.overlap(dataset.select(each.train))):
            raise UserError(
                f'{path} was trained on {common:,} of the {len(chosen):,} images of {chosen}: '
                'choose on others'
            )
        if each.test and (common := chosen.overlap(dataset.select(each.test))):
            print(
                f'WARNING: {common:,} of the {len(chosen):,} images of {chosen} are test images of '
                f'{path}: the test accuracy of what is chosen on them flatters'
            )
    return chosen
