"""Writes a page on which anybody can try a model, in the browser, without a server.

DIR gets static files that any web server hands out (python -m http.server --directory DIR): drop
photos, choose them, or use the camera, and see probabilities and where the model looks. With a
model of images and texts (LiT, CLIP, SigLIP) visitors type the classes, or what to search their
photos for. ONNX Runtime Web computes it on the visitor's device; no photo is sent anywhere. Its
package comes from npm once and is kept in the cache (VIT_JAX_CACHE).

Examples:
    vit_jax web --model runs/x/model --output site/
    vit_jax web --model runs/x/model --output site/ --title 'Flowers' --examples rose.jpg tulip.jpg
    vit_jax web --model runs/x/model --output site/ --serve
    vit_jax web --model LiT-L16Ti --output site/ --classes 'rose,tulip,daisy' --serve
"""

import argparse
import dataclasses
import os
import shutil
from typing import Any

from vit_jax import cli
from vit_jax.export import options


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args()
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # as an export
    return cli.run(lambda: _run(args), go_on=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(parser)
    add('--output', required=True, metavar='DIR', help='folder to write; must not exist')
    add('--dtype', choices=options.DTYPES, default='int8', help='of the weights (default: int8)')
    add('--labels', default='', help='class names, as of vit_jax predict: imagenet1k, or a file')
    add(
        '--classes',
        default='',
        metavar='NAMES',
        help='of a model of images and texts: what the page begins with, as of vit_jax zeroshot',
    )
    add(
        '--vocabulary',
        default='',
        metavar='FILE',
        help='of a .npz of SigLIP, the file of its tokenizer',
    )
    add('--title', default='', help='of the page (default: the name of the model)')
    add('--examples', nargs='+', default=(), metavar='PHOTO', help='photos to try the model with')
    add(
        '--webgpu',
        action='store_true',
        help='also take the runtime for WebGPU, 27 MB that a browser with an adapter loads',
    )
    add('--runtime', default='', metavar='FILE', help="npm's package of ONNX Runtime Web, if here")
    add(
        '--serve',
        nargs='?',
        type=int,
        const=8000,
        metavar='PORT',
        help='then hand the page out on this machine alone (default port: 8000; 0: any free one)',
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    import rich.console

    from vit_jax.errors import printable
    from vit_jax.export import web
    from vit_jax.inference import labels

    width = max(100, shutil.get_terminal_size().columns)  # as export
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True, width=width)
    weight = web.write(
        args.output,
        _model(args),
        classes=labels.listed(args.classes),
        dtype=args.dtype,
        title=args.title,
        examples=args.examples,
        webgpu=args.webgpu,
        runtime=args.runtime,
        console=console,
    )
    console.print(
        printable(
            f'{args.output}: written; a browser loads {weight / 1e6:.1f} MB before it answers'
        )
    )
    if args.serve is None:
        console.print(printable(f'To see it: python -m http.server --directory {args.output}'))
        return
    _serve(args.output, args.serve)


def _model(args: argparse.Namespace) -> Any:
    """The model of --model, of either kind."""
    from vit_jax.errors import UserError
    from vit_jax.inference import labels, model_folder, two_tower

    if args.vocabulary or two_tower.is_one(args.model):
        if args.labels:
            raise UserError('visitors type the classes of this model: no --labels; see --classes')
        return two_tower.load(args.model, args.vocabulary)
    model = model_folder.load(args.model, variant=args.variant, **cli.input_of(args))
    names = labels.choose(model.class_names, args.labels, args.model)
    return dataclasses.replace(model, class_names=names)


def _serve(folder: str, port: int) -> None:
    """Hands the folder out on this machine until Ctrl-C."""
    import functools
    import http.server

    from vit_jax.errors import UserError

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    try:
        server = http.server.ThreadingHTTPServer(('127.0.0.1', port), handler)
    except OSError as error:
        raise UserError(f'--serve {port}: {error.strerror}; name another port') from error
    with server:
        print(f'http://localhost:{server.server_address[1]}/  (Ctrl-C ends it)', flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
