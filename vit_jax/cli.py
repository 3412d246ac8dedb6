"""What the commands have in common; imports nothing that takes time."""

import argparse
import pathlib
import signal
import sys
from collections.abc import Callable

from vit_jax.errors import UserError


def program() -> str:
    """The name of the command, as it was started: 'vit_jax predict', 'predict.py'."""
    return pathlib.Path(sys.argv[0]).name


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser of a command line.

    Args:
      doc: the docstring of its module, shown by --help as it is.
    """
    return argparse.ArgumentParser(
        prog=program(),
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_model(parser: argparse.ArgumentParser, labels: str) -> None:
    """Adds the options that `classifier.open_classifier` takes: --model, --variant, --labels.

    Args:
      parser: of the command.
      labels: help for --labels.
    """
    parser.add_argument(
        '--model',
        required=True,
        metavar='MODEL',
        help='model folder (WORKDIR/model of a training run), exported .onnx file, or weights: '
        '.npz, .safetensors, .pth, folder of Hugging Face or timm, or a released name such as '
        'imagenet21k/ViT-B_16 (vit_jax list_models has them all)',
    )
    parser.add_argument(
        '--variant', default='', help='architecture of weights, such as ViT-B_16, if not clear'
    )
    parser.add_argument('--labels', default='', metavar='NAMES', help=labels)


def run(work: Callable[[], int | None], *, failure: int = 1) -> int:
    """Runs a command; the user's mistakes become one line on standard error.

    Args:
      work: does it, and returns the exit status (None for 0).
      failure: exit status after a `UserError`.

    Returns:
      The exit status; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # not where a test has put another stream
            stream.reconfigure(errors='backslashreplace')  # names of files may be no text
    try:
        return work() or 0
    except UserError as error:
        sys.stdout.flush()
        print(f'{program()}: {error}', file=sys.stderr)
        return failure
    except KeyboardInterrupt:
        print(f'{program()}: interrupted', file=sys.stderr)
        return 128 + signal.SIGINT


def end_on_closed_pipe() -> None:
    """Lets `command | head` end the command, quietly, once `head` has enough.

    Not for a command that has files to complete.
    """
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
