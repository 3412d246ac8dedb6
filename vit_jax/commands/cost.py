"""What a model costs: parameters, FLOPs, memory, the largest batch that fits, images per second.

All by formula, at once; --xla compiles the real training step beside it (for the devices at hand,
without running it) and shows what XLA counts. --all lists the largest batch of every variant.
Peaks and memory of devices are published figures; the rate is a prediction at --utilisation.

Examples:
    vit_jax cost --variant ViT-L_16 --batch 256 --dtype bfloat16 --optimizer adamw
    vit_jax cost --variant ViT-B_16 --num_classes 5 --batch 64 --device rtx4090 --xla
    vit_jax cost --all --device h200 --image_size 224 384 --format markdown
"""

import argparse
import dataclasses

from vit_jax import cli

FORMATS = ('terminal', 'markdown', 'csv')


def main() -> int:
    """Runs the command line; returns the exit status, 1 if something is not possible."""
    parser = _parser()
    args = parser.parse_args()
    if sum(map(bool, (args.variant, args.model, args.all))) != 1:
        parser.error('give one of --variant, --model and --all')
    if args.xla and args.all:
        parser.error('--xla goes with one model, not with --all')
    return cli.run(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--variant', default='', help='a name of vit_jax list_models --variants')
    add(
        '--model',
        default='',
        help='model folder, weights of any known kind, or a released name',
    )
    add('--all', action='store_true', help='every variant: the largest batch that fits')
    add('--num_classes', type=int, help='default: 1000, or those of --model')
    add(
        '--image_size',
        type=cli.size,
        nargs='+',
        help='side, or height x width (32x128); default: 224, or that of --model',
    )
    add('--batch', type=int, default=256, help='images per step, over all devices; default: 256')
    add('--accum_steps', type=int, default=1, help='micro-batches per device; default: 1')
    add('--dtype', choices=('float32', 'bfloat16'), default='bfloat16', help='default: bfloat16')
    add('--optimizer', choices=('sgd', 'adamw'), default='sgd', help='default: sgd')
    add('--optim_dtype', choices=('bfloat16', 'float32'), default='bfloat16', help='of momentum')
    add('--remat', choices=('', 'dots', 'full'), default='', help='default: none')
    add('--devices', type=int, default=1, help='how many share the batch; default: 1')
    add('--fsdp', type=int, default=1, help='how many of them share the parameters; default: 1')
    add('--device', default='', help='such as h200, a100, l4, rtx4090; default: h200')
    add('--memory_gib', type=float, help='memory of a device that is not in the table, GiB')
    add('--peak_tflops', type=float, help='its peak rate at --dtype, TFLOP/s')
    add('--memory_fraction', type=float, default=0.75, help='what JAX takes of it; default: 0.75')
    add('--utilisation', type=float, default=0.4, help='share of the peak reached; default: 0.4')
    add('--platform', choices=('gpu', 'cpu'), default='gpu', help='whose compiler; default: gpu')
    add('--xla', action='store_true', help="compile the training step and show XLA's own counts")
    add('--format', choices=FORMATS, default='terminal', help='default: terminal')
    return parser


def _run(args: argparse.Namespace) -> None:
    from vit_jax.analysis import architecture, cost, cost_report, devices, tables

    fields = (field.name for field in dataclasses.fields(cost.Plan))
    plan = cost.Plan(**{name: getattr(args, name) for name in fields if hasattr(args, name)})
    device = devices.choose(args.device, args.memory_gib, args.peak_tflops, args.dtype)
    target = cost_report.Target(device, args.memory_fraction, args.utilisation)
    cost_report.check(plan, target)
    if args.all:
        classes = 1000 if args.num_classes is None else args.num_classes
        table = cost_report.largest_batches(plan, target, classes, args.image_size or [224])
        print(tables.render(table, args.format), end='')
        return
    for size in args.image_size or [None]:
        of = architecture.find(args.variant, args.model, args.num_classes, size)
        for table in cost_report.report(of, plan, target):
            print(tables.render(table, args.format), flush=True)
        if args.xla:
            print(tables.render(cost_report.beside_xla(of, plan), args.format))
