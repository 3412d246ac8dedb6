"""Lists the released checkpoints: variant, size, resolution, classes, name, published accuracy.

A name is what --config.pretrained takes. It is downloaded from https://storage.googleapis.com/ +
vit_models/ + name (with the bucket in the name, as mixer_models/..., without vit_models/). Weights
of other libraries, which have no .npz in their names, are repositories of https://huggingface.co:
download the folder yourself, and name it.

Examples:
    vit_jax list_models
    vit_jax list_models B_16 imagenet21k        # those with both words
    vit_jax list_models --variants              # the models themselves
"""

import argparse
import sys

from vit_jax import cli


def main() -> int:
    """Runs the command line; returns the exit status, 1 if nothing was found."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('words', nargs='*', metavar='WORD', help='only what has all these words')
    parser.add_argument('--addresses', action='store_true', help='print addresses for download')
    parser.add_argument('--variants', action='store_true', help='list the models that are known')
    args = parser.parse_args()
    return cli.run(lambda: _list(args))


def _list(args: argparse.Namespace) -> int:
    rows = _variants() if args.variants else _checkpoints(args.addresses)
    words = [word.lower() for word in args.words]
    found = [row for row in rows[1:] if all(word in '\n'.join(row).lower() for word in words)]
    if not found:
        print(f'{cli.program()}: nothing has {" and ".join(args.words)}', file=sys.stderr)
        return 1
    widths = [max(len(row[i]) for row in [rows[0], *found]) for i in range(len(rows[0]))]
    for row in [rows[0], *found]:
        print(
            '  '.join(f'{cell:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    if not args.variants and any('~' in cell for row in found for cell in row):
        print('~ size of the float32 weights; that of the file is not known')
    return 0


def _checkpoints(addresses: bool) -> list[tuple[str, ...]]:
    from vit_jax import variants
    from vit_jax.analysis import counts
    from vit_jax.checkpoint import catalog

    header = ('VARIANT', 'MIB', 'PIXELS', 'CLASSES', 'NAME', 'LICENCE', 'PUBLISHED ACCURACY')
    rows: list[tuple[str, ...]] = [header]
    for c in catalog.CHECKPOINTS:
        size = f'{"" if c.size_is_listed else "~"}{c.mib:.0f}'
        name = f'{catalog.BASE_URL}/{c.address.removeprefix("gs://")}' if addresses else c.name
        numbers = size, str(c.resolution), str(c.num_classes)
        rows.append((c.variant, *numbers, name, 'Apache-2.0', c.accuracy))
    for other in catalog.LIBRARY_CHECKPOINTS:
        config = variants.VARIANTS[other.variant]
        count = counts.parameters(config, other.num_classes, other.resolution)
        numbers = f'~{4 * count / 2**20:.0f}', str(other.resolution), str(other.num_classes)
        name = f'https://huggingface.co/{other.source}' if addresses else other.source
        rows.append((other.variant, *numbers, name, other.licence, other.accuracy))
    return rows


def _variants() -> list[tuple[str, ...]]:
    from vit_jax import variants

    rows: list[tuple[str, ...]] = [('VARIANT', 'PIXELS PER TOKEN', 'WIDTH', 'BLOCKS')]
    for name, config in variants.VARIANTS.items():
        mixer = variants.is_mixer(config)
        width = config['hidden_dim' if mixer else 'hidden_size']
        blocks = config['num_blocks'] if mixer else config['transformer']['num_layers']
        rows.append((name, str(variants.token_stride(config)[0]), str(width), str(blocks)))
    return rows
