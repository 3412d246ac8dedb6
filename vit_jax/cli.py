"""What the commands have in common; imports nothing that takes time."""

import argparse
import pathlib
import signal
import sys
from collections.abc import Callable

from vit_jax import streams
from vit_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Prints help where a failure to print it is noticed, not when the process ends."""

    def _print_message(self, message, file=None):
        print(message, end='', file=file or sys.stderr, flush=True)


def program() -> str:
    """The name of the command, as it was started: 'vit_jax predict', 'predict.py'."""
    return pathlib.Path(sys.argv[0]).name


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser of a command line.

    Args:
      doc: the docstring of its module, shown by --help as it is.
    """
    streams.guard(go_on=False)
    return _Parser(
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


def run(work: Callable[[], int | None], *, failure: int = 1, go_on: bool = False) -> int:
    """Runs a command; the user's mistakes become one line on standard error.

    Args:
      work: does it, and returns the exit status (None for 0).
      failure: exit status after a `UserError`.
      go_on: what happens when nobody takes what is printed any more, see `streams.guard`.

    Returns:
      The exit status; 130 after Ctrl-C.
    """
    streams.guard(go_on=go_on)
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        reason, status = str(error), failure
    except MemoryError as error:
        reason, status = f'not enough memory ({error or "no more is given"})', failure
    except KeyboardInterrupt:
        reason, status = 'interrupted', 128 + signal.SIGINT
    sys.stdout.flush()
    print(f'{program()}: {reason}', file=sys.stderr)
    return status
