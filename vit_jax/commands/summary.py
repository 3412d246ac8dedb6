"""Lists the layers of a model: output shape, parameters, FLOPs, one by one and in total.

The table is made from the real module, without weights. FLOPs are those of convolutions and matrix
products in the forward pass of one image, two per multiply-accumulate. The line of a block holds
what is in it. --style torchsummary prints the table that tutorials show for the PyTorch model.

Examples:
    vit_jax summary --variant ViT-B_16 --num_classes 5
    vit_jax summary --variant R50+ViT-B_16 --image_size 384 --format markdown
    vit_jax summary --variant ViT-B_16 --num_classes 5 --style torchsummary --format csv
    vit_jax summary --model runs/b16-tf_flowers/model
"""

import argparse

from vit_jax import cli

STYLES = ('jax', 'torchsummary')
FORMATS = ('terminal', 'markdown', 'csv')


def main() -> int:
    """Runs the command line; returns the exit status: 1 if the model does not exist."""
    parser = cli.make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--variant', help='a name of vit_jax list_models --variants')
    what.add_argument('--model', help='model folder, weights of any known kind, or a released name')
    parser.add_argument('--num_classes', type=int, help='default: 1000, or those of --model')
    parser.add_argument(
        '--image_size',
        type=cli.size,
        help='side, or height x width (32x128); default: 224, or that of --model',
    )
    parser.add_argument('--style', choices=STYLES, default='jax', help='default: jax')
    parser.add_argument('--format', choices=FORMATS, default='terminal', help='default: terminal')
    parser.add_argument('--expand', action='store_true', help='every layer of every block')
    args = parser.parse_args()
    return cli.run(lambda: print(_run(args), end=''))


def _run(args: argparse.Namespace) -> str:
    from vit_jax import models
    from vit_jax.analysis import architecture, summary, tables
    from vit_jax.errors import UserError

    of = architecture.find(args.variant, args.model, args.num_classes, args.image_size)
    if args.style == 'torchsummary':
        if of.channels != 3:
            raise UserError('the ViT that torchsummary shows takes 3 channels: --style jax')
        table = summary.torchsummary(
            of.model_config, of.num_classes, of.image_size, title=str(of), style=args.format
        )
    else:
        model = models.from_config(of.model_config, num_classes=of.num_classes)
        layers = summary.layers(model, of.image_size, of.channels)
        table = summary.table(layers, title=str(of), style=args.format, expand=args.expand)
    return tables.render(table, args.format)
