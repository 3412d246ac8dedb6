"""Exports a model for the runtime that will use it, and proves that it still computes the same.

The exported file is loaded by that runtime (ONNX Runtime, JAX without this package, timm,
transformers, torchvision) in a separate process and run on photographs at batch 1, 2 and 7;
what it computes is compared with JAX in exact float32. The table is printed and stored beside the
file, in <output>.verify.json. If the model is not the same, no file is left.

(To turn one file of weights into another, of any size and without running it: vit_jax convert.)

Formats:
    onnx         for ONNX Runtime, TensorRT, ...: any batch size; metadata with class names,
                 preprocessing and value range
    stablehlo    for JAX without this package, on CPU and NVIDIA GPU: any batch size; the same
                 metadata in <output>.json
    timm, huggingface, torchvision
                 a folder for these libraries of PyTorch
    npz          the weights alone, in the naming of Google's released files

Of a model of images and texts (LiT, CLIP, SigLIP), --tower says which half: images or tokens of
texts in, embeddings of length 1 out, by onnx or stablehlo. (Its classes as a plain classifier:
vit_jax zeroshot --save_as. Both towers for transformers: vit_jax convert --to huggingface.)

Examples:
    vit_jax export --model runs/x/model --format onnx --output x.onnx
    vit_jax export --model runs/x/model --format onnx --dtype float16 --output x16.onnx
    vit_jax export --model runs/x/model --format timm --output x_timm --images photos/
    vit_jax export --model LiT-L16Ti --tower text --format onnx --output texts.onnx

Exit status: 0 if the file was written and verified, or could not be verified because its runtime
is not installed (the last lines say "not verified" and what to install); 1 if there is an error,
or the model is not the same.
"""

import argparse
import dataclasses
import os
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any

from vit_jax import cli
from vit_jax.export import options

if TYPE_CHECKING:
    from vit_jax.export import verify


def main() -> int:
    """Runs the command line; returns the exit status."""
    args = _parse()
    signal.signal(signal.SIGTERM, _terminate)  # as Ctrl-C: what is half done is removed
    # An export needs no accelerator, and is compared with what a CPU computes.
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

    def work() -> int:
        try:
            return _export(args)
        except KeyboardInterrupt as interrupt:
            left = 'was written' if os.path.exists(args.output) else 'was not written'
            print(f'{cli.program()}: interrupted; {args.output} {left}', file=sys.stderr)
            return interrupt.args[0] if interrupt.args else 128 + signal.SIGINT

    return cli.run(work, go_on=True)


def _export(args: argparse.Namespace) -> int:
    # Checks of the command line come first: the other imports take seconds.
    fields = dataclasses.fields(options.Options)
    chosen = options.Options(**{field.name: getattr(args, field.name) for field in fields})
    options.check(args.format, chosen, args.output)

    import rich.console

    from vit_jax.errors import printable
    from vit_jax.export import verify

    width = max(100, shutil.get_terminal_size().columns)  # the table needs 90
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True, width=width)
    report = _write(
        args,
        format=args.format,
        options=chosen,
        verified=args.verify,
        images=args.images,
        console=console,
    )
    verified = report is not None and report.status == verify.VERIFIED
    state = 'verified' if verified else 'not verified'
    console.print(printable(f'{args.output}: written, {state}'))
    return 0


def _write(args: argparse.Namespace, **how: Any) -> 'verify.Report | None':
    """Exports a model, or one tower of it."""
    from vit_jax import variants
    from vit_jax.errors import UserError
    from vit_jax.export import formats, tower
    from vit_jax.inference import model_folder, two_tower

    if args.tower:
        tower.check_options(args.tower, how['format'], how['options'], how['images'])
        towers = two_tower.load(args.model, args.vocabulary)
        return tower.export(towers, args.output, tower=args.tower, **how)
    if args.vocabulary:
        raise UserError('--vocabulary goes with --tower')
    if args.model in variants.TWO_TOWERS or two_tower.is_folder(args.model):
        raise UserError(
            f'{args.model} has two towers: --tower image or --tower text says which to export'
        )
    model = model_folder.load(args.model, variant=args.variant, **cli.input_of(args))
    return formats.export(model, args.output, **how)


def _parse() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add('--model', required=True, help='model folder, file of weights, or released name')
    add('--format', required=True, help=', '.join(options.FORMATS))
    add('--output', required=True, metavar='PATH', help='file or folder to write; must not exist')
    add('--variant', default='', help='architecture of a file, where its arrays do not tell')
    add(
        '--verify',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='run the exported model and compare it with JAX (default: yes)',
    )
    add('--images', nargs='+', default=(), metavar='PATH', help='images and folders to verify on')
    cli.add_input(parser)
    graph = parser.add_argument_group('onnx and stablehlo')
    add = graph.add_argument
    add('--tower', choices=options.TOWERS, help='of a model of images and texts')
    add(
        '--vocabulary',
        default='',
        metavar='FILE',
        help='of a .npz of SigLIP, the file of its tokenizer',
    )
    add('--layout', choices=options.LAYOUTS, help='of the input (default: NHWC)')
    add('--probabilities', action='store_true', help='softmax of each image instead of logits')
    add('--features', action='store_true', help='give the features that the head reads, too')
    add('--attention', action='store_true', help='give the attention weights of all blocks, too')
    add(
        '--preprocessing',
        action='store_true',
        help='take uint8 images in [0, 255] (of the size of the model) and normalise them inside',
    )
    add = parser.add_argument_group('onnx').add_argument
    add('--opset', type=int, choices=options.OPSETS, help='version of the operators (default: 20)')
    add(
        '--dtype',
        choices=options.DTYPES,
        help='of weights and products (default: float32); int8: dynamic quantisation',
    )
    add(
        '--weights_only',
        action='store_true',
        help='--dtype is how weights are stored; computed in float32, alike on every processor',
    )
    add = parser.add_argument_group('timm, huggingface, torchvision and npz').add_argument
    add(
        '--drop',
        nargs='+',
        metavar='LAYER',
        help='leave this layer out where the format has no place for it: pre_logits',
    )
    parser.set_defaults(**dataclasses.asdict(options.DEFAULT))
    args = parser.parse_args()
    args.drop = tuple(args.drop)
    return args


def _terminate(signum: int, _frame: object) -> None:
    raise KeyboardInterrupt(128 + signum)
