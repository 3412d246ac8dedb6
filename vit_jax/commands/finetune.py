"""From a folder of photos to the best model that there is time for, and how good it is.

PHOTOS is a folder of CLASS/*.jpg, a table, or the name of a set. Images are held out to choose by
and to test on. A classifier on frozen features comes first; with the rest of the time weights are
trained, short runs before a long one. The model that is best on the validation images is kept, and
tested once. What training does is told as commands of `vit_jax.main`.

The same command goes on where it stopped (Ctrl-C), with the time that is left. --plan does what an
earlier run did, step by step, however long it takes.

Examples:
    vit_jax finetune photos/
    vit_jax finetune photos/ --minutes 30 --weights ViT-B_16.npz --output flowers
    vit_jax finetune photos/ --plan finetuned/photos/plan.json --output again
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from vit_jax import cli

if TYPE_CHECKING:
    from vit_jax.inference.model_folder import Model
    from vit_jax.run.finetuning.finetune import Finetune
    from vit_jax.run.finetuning.look import Parts
    from vit_jax.run.finetuning.plans import Plan

_STARTED = time.monotonic()


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args), go_on=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('photos', nargs='?', default='', metavar='PHOTOS', help=cli.DATASET)
    add('--dataset', default='', help='the same as PHOTOS')
    cli.add_data(parser)
    add('--minutes', type=float, default=10.0, help='that it may take in all (default: 10)')
    add(
        '--weights',
        default='',
        metavar='MODEL',
        help='to start from: what --model of other commands takes; default: ViT-Ti/16, on a GPU '
        'ViT-B/16, of ImageNet-21k',
    )
    add('--variant', default='', help='architecture of weights, such as ViT-B_16, if not clear')
    cli.add_input(parser)
    add('--seed', type=int, default=0, help='of everything that is drawn (default: 0)')
    add('--plan', metavar='JSON', help='do what plan.json of an earlier run says')
    add('--output', default='', metavar='DIR', help='default: finetuned/<name of PHOTOS>')
    return parser


def _run(args: argparse.Namespace) -> int:
    # Not at the top: they take seconds, and --help should not.
    from absl import logging

    from vit_jax import files
    from vit_jax import main as training
    from vit_jax.analysis import finetune_report
    from vit_jax.configs import common
    from vit_jax.errors import UserError
    from vit_jax.run import preemption, resume
    from vit_jax.run.finetuning import finetune

    if bool(args.photos) == bool(args.dataset):
        raise UserError('name the photos: a folder of CLASS/*.jpg, a table, or a set')
    if not 0 < args.minutes < 10**6:
        raise UserError(f'--minutes is a number above 0; got {args.minutes:g}')
    if args.seed < 0:
        raise UserError(f'--seed is a number from 0 on; got {args.seed}')
    name = args.photos or args.dataset
    default = pathlib.Path('finetuned') / (pathlib.Path(name).absolute().name.split(':')[0])
    folder = pathlib.Path(args.output or default)
    files.refuse_address(folder, '--output')
    logging.set_verbosity(logging.WARNING)
    preemption.keep_interrupts()
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        training.use_compile_cache(common.get_defaults().compile_cache, asked=False)
    try:
        with resume.locked(folder):
            under_way = _open(args, name, folder)
            if under_way is None:
                return 0
            work, parts, model = under_way
            outcome = work.run(parts, model)
            page = finetune_report.write(outcome)
    except preemption.PreemptedError as stopped:
        print('stopped; the same command goes on', file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print('\nstopped; the same command goes on', file=sys.stderr)
        return 130
    print(f'report: {page}')
    print(f'model: {folder / finetune.MODEL}')
    print(finetune_report.last_line(outcome.state))
    return 0


def _open(
    args: argparse.Namespace, name: str, folder: pathlib.Path
) -> 'tuple[Finetune, Parts, Model] | None':
    """The work that is left, with its images and model; None where all is done."""
    import jax

    from vit_jax import files
    from vit_jax.analysis import finetune_report
    from vit_jax.configs import b16, ti16
    from vit_jax.data import sources
    from vit_jax.errors import UserError
    from vit_jax.inference import features, model_folder, probes
    from vit_jax.run.finetuning import finetune, look, plans

    if sources.is_path(name) and '://' not in name:
        name = str(files.expand(name).absolute())
    plan = _plan(args, name, folder / finetune.PLAN_FILE)
    if plan and (told := _result(folder)):
        print(
            f'{folder}: this is done; its model is {folder / finetune.MODEL}. For another one use '
            'another --output'
        )
        print(finetune_report.last_line(told))
        return None
    config = (ti16 if jax.default_backend() == 'cpu' else b16).get_config()
    weights = args.weights or (plan.weights if plan else config.pretrained)
    if '://' not in weights and files.expand(weights).exists():
        weights = str(files.expand(weights).absolute())
    model = model_folder.load(weights, variant=args.variant, **cli.input_of(args))
    probes.check_head(model)
    data = dict(plan.data) if plan else {}
    data |= {key: value for key, value in cli.data_of(args).items() if value}
    if plan is None:
        parts = look.open_parts(name, data, model.channels)
        plan = plans.new_plan(parts, name, data, weights, model, args.seed)
    else:
        specs = plan.train, plan.val, plan.test
        parts = look.open_parts(name, data, model.channels, specs)
    if plan.fingerprint != features.fingerprint(model):
        raise UserError(f'{weights} are other weights than those of the plan, {plan.weights}')
    if plan.pixels != plans.pixels_of(model):
        raise UserError(
            f'the plan is for other pixels, {plan.pixels}: give the options for the input of the '
            'model (--eval, --resize, ...) as before'
        )
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder / finetune.PLAN_FILE)
    work = finetune.Finetune(
        folder,
        plan,
        replay=bool(args.plan),
        minutes=args.minutes,
        started=_STARTED,
        say=lambda line: print(line, flush=True),
    )
    return work, parts, model


def _result(folder: pathlib.Path) -> 'dict[str, Any] | None':
    """What `finetune.json` holds, once all is done."""
    from vit_jax import files
    from vit_jax.run.finetuning import finetune

    path = folder / finetune.STATE_FILE
    told = files.read_json(path) if path.exists() else {}
    return told if told.get('result') and (folder / finetune.REPORT_FILE).exists() else None


def _plan(args: argparse.Namespace, name: str, mine: pathlib.Path) -> 'Plan | None':
    """The plan that was asked for, or of what was begun; None for neither.

    Args:
      args: of the command line.
      name: of the set, as the plan has it.
      mine: where the plan of the folder is, or will be.
    """
    from vit_jax.errors import UserError
    from vit_jax.run.finetuning import plans

    begun = plans.read(mine) if mine.exists() else None
    asked = begun
    if args.plan:
        plan = plans.read(pathlib.Path(args.plan))
        asked = dataclasses.replace(plan, dataset=name)
    if begun and (begun != asked or begun.dataset != name or args.seed not in (0, begun.seed)):
        raise UserError(
            f'{mine.parent} holds another fine-tuning (of {begun.dataset}, seed {begun.seed}; see '
            f'{mine}): use another --output, or the command of before'
        )
    return asked
