"""Writes the report of a training run, or of several beside each other, as one HTML file.

Curves of loss, accuracy, learning rate and speed (all runs in one chart), final metrics, confusion
matrix, best and worst predictions, attention, class balance, configuration, environment, cost, and
what happened on the way. The file needs no network and nothing beside it. Training writes one to
WORKDIR/report.html when it ends; this does so at any time, also for a run that is under way.

Examples:
    vit_jax report runs/b16-tf_flowers
    vit_jax report runs/a runs/b runs/c --output compared.html
"""

import argparse

from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if no report could be written."""
    args = _parser().parse_args()
    return cli.run(lambda: _run(args), go_on=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('workdirs', nargs='+', metavar='WORKDIR', help='the --workdir of a run')
    add(
        '--output',
        metavar='FILE',
        help='where to write; default for a single run: WORKDIR/report.html, replaced if there',
    )
    add('--overwrite', action='store_true', help='replace FILE, if it is there')
    add(
        '--images',
        type=int,
        metavar='N',
        help='predict at most N test images of each run, 0 for none; default: 2,000, and on a CPU '
        'as many as a model of that size can be expected to do in half a minute, at least 64',
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    # Not at the top: they take seconds, and --help should not.
    from vit_jax import files
    from vit_jax.analysis import report
    from vit_jax.errors import UserError

    if args.images is not None and args.images < 0:
        raise UserError(f'--images {args.images}: expected a number of images, 0 for none')
    if args.output:
        files.check_output(args.output, overwrite=args.overwrite, flag='--output')
    print(f'written: {report.write(args.workdirs, args.output, images=args.images)}')
