"""Tries settings, chooses the best on validation images, and tests that one.

Every trial is a training run in a process of its own. Words that this command does not know go to
all runs, see `vit_jax train --help`. Validation images are held out of training (config.pp.val); no
trial predicts a test image. The best settings are trained again, on training and validation images,
with each of the seeds, and tested once. The same command goes on where it stopped.

Examples:
    vit_jax sweep --config b16 --grid config.base_lr=0.001,0.003,0.01,0.03
    vit_jax sweep --config b16 --grid config.base_lr=0.01,0.03 --grid config.epochs=5,10
    vit_jax sweep --config b16 --trials 30 --range config.base_lr=0.001:0.1:log
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status."""
    args, words = _parser().parse_known_args()
    return cli.run(lambda: _run(args, words), go_on=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--workdir', default='', metavar='DIR', help='default: sweeps/<config>-<dataset>')
    add(
        '--grid',
        action='append',
        default=[],
        metavar='KNOB=A,B,C',
        help='values to try; several times for several knobs: all combinations',
    )
    add(
        '--trials',
        type=int,
        default=0,
        metavar='N',
        help='so many trials, chosen by Optuna from the values of --grid and --range, in place of '
        'all combinations',
    )
    add(
        '--range',
        action='append',
        default=[],
        metavar='KNOB=LOW:HIGH[:log]',
        help='numbers to choose from, with --trials; whole ones if both ends are; log: evenly in '
        'the logarithm',
    )
    add(
        '--seeds',
        type=int,
        default=3,
        metavar='N',
        help='train and test the best settings with seeds 0 to N-1 (default: 3)',
    )
    yes_or_no = argparse.BooleanOptionalAction
    add(
        '--retrain',
        action=yes_or_no,
        default=True,
        help='train the best settings on training and validation images (default)',
    )
    add(
        '--prune',
        action=yes_or_no,
        default=True,
        help='end trials early that are below the median of the others (default)',
    )
    return parser


def _run(args: argparse.Namespace, words: list[str]) -> int:
    # Not at the top: they take seconds, and --help should not.
    from vit_jax import config as config_lib
    from vit_jax import files
    from vit_jax import main as training
    from vit_jax.analysis import sweep_report
    from vit_jax.errors import UserError
    from vit_jax.run import preemption, sweep, sweep_plan

    sys.path.insert(0, '')  # as `python -m` does: a config file imports what lies in this folder
    plan = sweep_plan.Plan(
        tuple(words),
        dict(map(sweep_plan.parse_grid, args.grid)),
        dict(map(sweep_plan.parse_range, args.range)),
        args.trials,
        args.seeds,
        args.retrain,
        args.prune,
    )
    plan.check()
    configs = training.check_settings(words, list(plan.corners()))
    if plan.retrain and any(config.keep_best or config.patience for config in configs):
        raise UserError(
            'config.keep_best and config.patience choose on validation images, of which training '
            'on all leaves none: add --no-retrain, or leave them out'
        )
    if configs[0].fold:
        raise UserError(
            f'config.fold={configs[0].fold!r} is cross-validation, and trials have one validation '
            'part: leave it out'
        )
    default = config_lib.default_workdir(training.config_file(), configs[0].dataset)
    folder = pathlib.Path(args.workdir or pathlib.Path('sweeps') / default.name)
    files.refuse_address(folder, '--workdir')
    print(f'sweep: {folder}', flush=True)
    try:
        result = sweep.run(plan, folder, lambda line: print(line, flush=True))
    except preemption.PreemptedError as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    finally:
        if (folder / sweep.STORAGE_FILE).exists():
            print(f'report: {sweep_report.write(folder)}', flush=True)
    _print_result(result)
    return 0


def _print_result(result: Mapping[str, Any]) -> None:
    seeds = result['seeds']
    for name in [name for name in (seeds[0] if seeds else ()) if name.endswith('_test')]:
        values = [each[name] for each in seeds]
        spread = f' +- {statistics.stdev(values):.4f}' if len(values) > 1 else ''
        print(f'{name}: {statistics.mean(values):.4f}{spread} ({len(values)} seeds)')
