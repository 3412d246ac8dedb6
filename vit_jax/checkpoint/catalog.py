"""The released weights: what they are called, where they are, how large and how good they are.

The table is `released.csv`. Its sizes are those of the buckets' listings; where a listing is not
known (`size_is_listed` is no), the size of the float32 weights. Its accuracies are published
figures: the README of the original release, "How to train your ViT?"
(https://arxiv.org/abs/2106.10270). AugReg released 52,268 files; in the table are the recommended
ones of the original's README, with their fine-tuning on ImageNet, and those that timm names. Of the
models trained with SAM and GSAM, those of GSAM have no class token.

`libraries.csv` lists weights of other families, which timm and Hugging Face distribute: where they
are, their licence, and the accuracy that their papers, DINOv2's README or timm's table of results
publish.
"""

import csv
import dataclasses
import difflib
import logging
import os
import pathlib
import re
import urllib.parse

from vit_jax import files
from vit_jax.checkpoint import download
from vit_jax.data import remote
from vit_jax.errors import UserError

_log = logging.getLogger(__name__)

BASE_URL = 'https://storage.googleapis.com'
BUCKET = 'vit_models'
AUGREG_DIR = f'gs://{BUCKET}/augreg'
_OTHER_BUCKETS = ('mixer_models/',)
_AUGREG_NAME = re.compile(r'\w[\w.+-]*', re.A)
_MAX_INDEX_BYTES = 256 << 20  # the real one has 52,268 lines and 20 MiB


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One released file.

    Attributes:
        address: 'gs://bucket/path'.
        variant: name from `models.variants.VARIANTS`.
        resolution: side of the images that the weights are for, pixels.
        num_classes: classes of the head.
        mib: size of the file, MiB.
        size_is_listed: whether `mib` is the size in the bucket's listing (to its rounding).
        accuracy: published accuracy, as text; '' where none is.
    """

    address: str
    variant: str
    resolution: int
    num_classes: int
    mib: float
    size_is_listed: bool = True
    accuracy: str = ''

    @property
    def name(self) -> str:
        """What `--config.pretrained` takes: the address without gs:// and without vit_models/."""
        return self.address.removeprefix('gs://').removeprefix(f'{BUCKET}/')


def _read_table() -> tuple[Checkpoint, ...]:
    with open(pathlib.Path(__file__).with_name('released.csv'), encoding='utf-8') as file:
        _, *rows = csv.reader(file)
    return tuple(
        Checkpoint(address, variant, int(size), int(classes), float(mib), listed == 'yes', accuracy)
        for address, variant, size, classes, mib, listed, accuracy in rows
    )


@dataclasses.dataclass(frozen=True)
class LibraryCheckpoint:
    """Weights of another library that are read here; they are not downloaded.

    Attributes:
        source: repository on Hugging Face's hub, whose folder is what to load.
        variant: name from `models.variants.VARIANTS`.
        resolution: side of the images that the weights are for, pixels.
        num_classes: classes of the head; 0 without one.
        licence: of the weights.
        accuracy: published accuracy, as text; '' where none is.
    """

    source: str
    variant: str
    resolution: int
    num_classes: int
    licence: str
    accuracy: str


def _read_libraries() -> tuple[LibraryCheckpoint, ...]:
    with open(pathlib.Path(__file__).with_name('libraries.csv'), encoding='utf-8') as file:
        return tuple(
            LibraryCheckpoint(
                row['source'],
                row['variant'],
                int(row['resolution']),
                int(row['num_classes']),
                row['licence'],
                row['accuracy'],
            )
            for row in csv.DictReader(file)
        )


LIBRARY_CHECKPOINTS = _read_libraries()
CHECKPOINTS = _read_table()
# Name -> size in MiB as the bucket's listing shows it; None where only the name is known.
RELEASED: dict[str, float | None] = {
    checkpoint.name: checkpoint.mib if checkpoint.size_is_listed else None
    for checkpoint in CHECKPOINTS
}


def is_name(text: str) -> bool:
    """Whether a text looks like a released name or an address; a path may do so, too."""
    return '://' in text or text.split('/')[0] in {name.split('/')[0] for name in RELEASED}


def resolve(pretrained: str, *, option: str = download.OPTION) -> pathlib.Path:
    """Finds a checkpoint, and downloads it to the cache if need be.

    The cache is the folder in the environment variable VIT_JAX_CACHE, else ~/.cache/vit_jax; files
    keep the path they have in their bucket. VIT_JAX_BASE_URL names a mirror of
    https://storage.googleapis.com.

    Args:
        pretrained: a file; a model folder; a folder of Hugging Face or timm; a released name, with
            or without '.npz' ('imagenet21k/ViT-B_16', 'augreg/<file name>'); or an address,
            'gs://bucket/path', 's3://bucket/path' or 'https://...'. A file in a bucket of gs:// is
            read without an account, unless the package gcsfs is there and it is no released one.
        option: how a user names a file instead, for messages.

    Returns:
        Path of a file on this machine.

    Raises:
        UserError: no such file or name (the nearest names are given), or it cannot be downloaded.
    """
    if _is_private(pretrained):
        path = remote.local_copy(pretrained, _log.info)
        return path / 'params.npz' if (path / 'params.npz').is_file() else path
    if '://' in pretrained:
        name = pretrained.removeprefix('gs://').removeprefix(f'{BUCKET}/')
        return _fetch(pretrained, RELEASED.get(name), option)
    path = files.expand(pretrained)
    files.recover(path)
    if (path / 'params.npz').is_file():
        return path / 'params.npz'
    library = any((path / name).is_file() for name in ('config.json', 'open_clip_config.json'))
    if path.is_file() or library:
        return path
    if path.is_dir():
        raise UserError(
            f'{path} is a folder without params.npz or config.json; expected a checkpoint, a model '
            'folder, or a folder of Hugging Face, timm or open_clip'
        )
    name = pretrained if pretrained.endswith('.npz') else f'{pretrained}.npz'
    if name in RELEASED or (name.startswith('augreg/') and name.count('-') > 1):
        bucket = '' if name.startswith(_OTHER_BUCKETS) else f'{BUCKET}/'
        return _fetch(f'gs://{bucket}{name}', RELEASED.get(name), option)
    near = difflib.get_close_matches(name, RELEASED, n=3, cutoff=0.5)
    hint = f'; nearest released names: {", ".join(near)}' if near else ''
    raise UserError(
        f'{pretrained!r} is neither a file here nor a released checkpoint{hint}. Expected a path, '
        'a released name such as imagenet21k/ViT-B_16.npz, or an address (gs:// or https://)'
    )


def resolve_augreg(model_or_filename: str, *, pretrained_dir: str = '') -> pathlib.Path:
    """Finds an AugReg checkpoint ("How to train your ViT?", https://arxiv.org/abs/2106.10270).

    Args:
        model_or_filename: a model ('B_16', 'R_Ti_16'): then the ImageNet-21k checkpoint that is
            best in pre-training (`final_val` in index.csv); or the name of any file, with '-' in
            it.
        pretrained_dir: folder or address with the files and their index.csv; default
            gs://vit_models/augreg.

    Returns:
        Path of a `.npz` file on this machine.

    Raises:
        UserError: no such model (the known ones are listed) or file, or it cannot be downloaded.
    """
    directory = (pretrained_dir or AUGREG_DIR).rstrip('/')
    if '-' in model_or_filename:
        if not _AUGREG_NAME.fullmatch(model_or_filename):
            raise UserError(
                f'{model_or_filename!r} is not a file name of AugReg: those have no paths'
            )
        return resolve(f'{directory}/{model_or_filename.removesuffix(".npz")}.npz')
    best = _best_augreg(resolve(f'{directory}/index.csv'), model_or_filename)
    return resolve(f'{directory}/{best}.npz')


def _best_augreg(index: pathlib.Path, model: str) -> str:
    """Returns the file name (without .npz) of the best ImageNet-21k checkpoint of a model."""
    best: dict[str, tuple[float, str]] = {}
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f'{index.stat().st_size:,} bytes')
        with open(index, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                if row['ds'] == 'i21k':
                    # The name becomes a path: an index from elsewhere must not choose the folder.
                    if not _AUGREG_NAME.fullmatch(row['filename']):
                        raise ValueError(f'{row["filename"]!r} is not a file name')
                    name = row['filename'].split('-')[0]
                    candidate = (float(row['final_val']), row['filename'])
                    best[name] = max(best.get(name, candidate), candidate)
    except (KeyError, ValueError, TypeError, OSError, csv.Error) as e:
        reason = ascii(str(e))[:200]
        raise UserError(
            f'{index} is not an index of AugReg checkpoints ({type(e).__name__}: {reason})'
        ) from e
    if model not in best:
        raise UserError(
            f'no AugReg model {model!r}; known: {", ".join(sorted(best))}. A file is named in full'
        )
    return best[model][1]


def _is_private(address: str) -> bool:
    """Whether an address is read with the account of the user, by the packages of `remote`."""
    scheme = remote.scheme_of(address)
    if scheme != 'gs':
        return scheme == 's3'
    bucket = address.split('://', 1)[1].split('/', 1)[0]
    public = bucket == BUCKET or f'{bucket}/' in _OTHER_BUCKETS
    return not public and 'VIT_JAX_BASE_URL' not in os.environ and remote.is_there(scheme)


def _fetch(address: str, mib: float | None, option: str) -> pathlib.Path:
    try:
        address.encode()  # what comes from a command line may hold bytes that are not text
        parsed = urllib.parse.urlsplit(address)
    except ValueError as e:
        raise UserError(f'cannot download {ascii(address)}: it is not an address ({e})') from e
    if parsed.scheme not in ('gs', 'http', 'https') or not parsed.netloc:
        raise UserError(
            f'cannot download {address}: expected gs://bucket/path, s3://bucket/path or '
            'https://host/path'
        )
    if parsed.scheme == 'gs':
        base = os.environ.get('VIT_JAX_BASE_URL', BASE_URL).rstrip('/')
        key = f'{parsed.netloc}{parsed.path}'
        url = f'{base}/{urllib.parse.quote(key)}'
    else:
        # The bucket's own address and gs:// are one file, so they are one file in the cache.
        key = f'{parsed.netloc}{urllib.parse.unquote(parsed.path)}'
        key = key.removeprefix(f'{urllib.parse.urlsplit(BASE_URL).netloc}/')
        url = address
    # Whole paths: SAM and GSAM files have the names of others, and only the folder differs.
    parts = [part for part in key.split('/') if part not in ('', '.', '..')]
    target = remote.cache_folder().joinpath(*parts)
    return download.fetch(url, target, published_mib=mib, option=option)
