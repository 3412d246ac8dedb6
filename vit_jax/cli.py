"""What the commands have in common; imports nothing that takes time."""

import argparse
import pathlib
import re
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vit_jax.errors import UserError, printable
from vit_jax.run import streams

if TYPE_CHECKING:
    from vit_jax.data.dataset import Selection

# Help for the name of a dataset.
DATASET = 'folder of CLASS/*.jpg, table (.csv, .jsonl, .parquet), name of a TFDS set, or digits'

# What libraries say for lack of memory, in errors of many types.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|bad_alloc|(can't|cannot|failed to) (start new thread|allocate|map)"
    r'|insufficient memory|out of memory',
    re.I,
)


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


def add_model(parser: argparse.ArgumentParser, labels: str = '', *, required: bool = True) -> None:
    """Adds the options that `classifier.open_classifier` takes.

    They are --model, --variant, --labels, and those of `add_input`.

    Args:
      parser: of the command.
      labels: help for --labels; '' for a command that does not have it.
      required: whether there has to be a --model.
    """
    parser.add_argument(
        '--model',
        required=required,
        default='',
        metavar='MODEL',
        help='model folder (WORKDIR/model of a training run), exported .onnx file, or weights: '
        '.npz, .safetensors, .pth, folder of Hugging Face or timm, or a released name such as '
        'imagenet21k/ViT-B_16 (vit_jax list_models has them all)',
    )
    parser.add_argument(
        '--variant', default='', help='architecture of weights, such as ViT-B_16, if not clear'
    )
    if labels:
        parser.add_argument('--labels', default='', metavar='NAMES', help=labels)
    add_input(parser)


def size(text: str) -> int | tuple[int, int]:
    """The type of options for a size: '224' is a side, '32x128' height and width, pixels."""
    numbers = [int(number) for number in text.replace(',', 'x').split('x')]
    if len(numbers) > 2:
        raise ValueError(text)
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how a dataset is read; `data_of` reads them."""
    add = parser.add_argument
    add('--tfds_data_dir', default='', metavar='DIR', help='where TFDS sets are')
    add(
        '--columns',
        default='',
        metavar='ROLES',
        help='which column of a table is what: image=file,label=species; default: by their names',
    )
    add(
        '--image_root',
        default='',
        metavar='DIR',
        help='folder that the paths in a table start from; default: that of the table',
    )


def data_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_data` asked for: arguments of `sources.open_dataset`."""
    return {name: getattr(args, name) for name in ('tfds_data_dir', 'columns', 'image_root')}


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which images: IMAGE ..., or --dataset and what belongs to it."""
    add = parser.add_argument
    add('--dataset', default='', help=DATASET)
    add('--split', default='', help='of the dataset; default: all of it')
    add_data(parser)
    add_batch(parser)
    add_image_files(parser, nargs='*')


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Adds --batch."""
    parser.add_argument('--batch', type=int, default=32, help='images at once (default: 32)')


def add_image_files(parser: argparse.ArgumentParser, nargs: str) -> None:
    """Adds IMAGE ...; `nargs` is '+', or '*' where there may be none."""
    parser.add_argument(
        'images',
        nargs=nargs,
        metavar='IMAGE',
        help='file, folder, pattern, or - for standard input',
    )


def select(args: argparse.Namespace) -> 'Selection | None':
    """The dataset that `add_images` asked for; None where images were named.

    Raises:
      UserError: both or neither; no such dataset or split.
    """
    if bool(args.dataset) == bool(args.images):
        raise UserError('name either images or a --dataset')
    if args.images:
        return None
    from vit_jax.data import sources

    dataset = sources.open_dataset(args.dataset, **data_of(args))
    return dataset.select(args.split or '+'.join(dataset.splits))


def add_input(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what input a model takes; `input_of` reads them."""
    add_heads(parser)
    add = parser.add_argument_group(
        'input of the model', 'where its files do not tell, or to try another'
    ).add_argument
    add(
        '--normalization',
        default='',
        metavar='NAME',
        help='input that weights were trained with: half (to [-1, 1]), imagenet, clip, or mean and '
        'standard deviation of each channel of [0, 1], as 0.5,0.5,0.5/0.2,0.2,0.2; it is folded '
        'into the first layer',
    )
    add(
        '--eval',
        default='',
        metavar='FORM',
        help='what is seen of an image: squash (all of it, squashed), resize_crop (its centre, '
        'once the short side is --resize), squash_crop (its centre, once squashed to --resize)',
    )
    add('--resize', type=size, default=0, metavar='PIXELS', help='see --eval; 256, or 40x160')
    add(
        '--interpolation',
        default='',
        metavar='NAME',
        help='bilinear, bicubic, nearest, lanczos, box or hamming',
    )
    add(
        '--antialias',
        action=argparse.BooleanOptionalAction,
        default=None,
        help='resize (and decode) as Pillow does, and so timm and Hugging Face',
    )


def add_heads(parser: argparse.ArgumentParser) -> None:
    """Adds --num_heads."""
    parser.add_argument(
        '--num_heads',
        type=int,
        default=0,
        metavar='N',
        help='attention heads of weights, where their files do not tell',
    )


def input_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_input` asked for: arguments of opening a model.

    They are `num_heads`, `normalization` and `pixels`.
    """
    from vit_jax.data import normalization

    given = {name: getattr(args, name) for name in ('eval', 'resize', 'interpolation')}
    pixels = {name: value for name, value in given.items() if value}
    if args.antialias is not None:
        pixels['antialias'] = args.antialias
    return {
        'num_heads': args.num_heads,
        'normalization': normalization.parse(args.normalization),
        'pixels': pixels,
    }


def add_max_memory(parser: argparse.ArgumentParser) -> None:
    """Adds --max_memory, for `limit_memory`."""
    parser.add_argument(
        '--max_memory',
        type=float,
        metavar='GIB',
        help='end if the process takes more address space than so many GiB: for models from '
        'elsewhere (the process itself takes about 1 for .onnx, 2 for others on a CPU)',
    )


def limit_memory(gib: float | None) -> None:
    """Bounds the address space of this process (RLIMIT_AS); None for no bound."""
    if gib is None:
        return
    if not 0 < gib < 2**30:
        raise UserError(f'--max_memory is a number of GiB above 0; got {gib:g}')
    import resource

    _, highest = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(gib * 2**30)
    if highest != resource.RLIM_INFINITY:
        limit = min(limit, highest)
    resource.setrlimit(resource.RLIMIT_AS, (limit, highest))


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
    except Exception as error:
        if not (reason := lack_of_memory(error)):
            raise
        status = failure
    except KeyboardInterrupt:
        reason, status = 'interrupted', 128 + signal.SIGINT
    sys.stdout.flush()
    print(f'{program()}: {reason}', file=sys.stderr)
    return status


def lack_of_memory(error: Exception) -> str:
    """An error in a line, if it says that there is not enough memory; else ''."""
    if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
        return ''
    first = str(error).strip().partition('\n')[0][:300]
    return printable(f'not enough memory ({first or type(error).__name__})')
