"""The released weights: what they are called, where they are, how large they are."""

import csv
import difflib
import os
import pathlib
import urllib.parse

from vit_jax.checkpoint import download
from vit_jax.errors import UserError

BASE_URL = 'https://storage.googleapis.com'
BUCKET = 'vit_models'
AUGREG_DIR = f'gs://{BUCKET}/augreg'

# Name in the bucket -> size in MiB as the bucket's listing shows it; None where only the name is
# known.
RELEASED: dict[str, float | None] = {
    'imagenet21k/ViT-B_8.npz': 393.72,
    'imagenet21k/ViT-B_16.npz': 393.69,
    'imagenet21k/ViT-B_32.npz': 400.01,
    'imagenet21k/ViT-L_16.npz': 1.22 * 1024,
    'imagenet21k/ViT-L_32.npz': 1.23 * 1024,
    'imagenet21k/ViT-H_14.npz': 2.46 * 1024,
    'imagenet21k/R26+ViT-B_32.npz': 450.23,
    'imagenet21k/R50+ViT-B_16.npz': 439.85,
    'imagenet21k/R50+ViT-L_32.npz': 1.31 * 1024,
    'imagenet21k+imagenet2012/ViT-B_8.npz': 334.78,
    'imagenet21k+imagenet2012/ViT-B_16.npz': 331.40,
    'imagenet21k+imagenet2012/ViT-B_16-224.npz': 330.29,
    'imagenet21k+imagenet2012/ViT-B_32.npz': 336.89,
    'imagenet21k+imagenet2012/ViT-L_16.npz': 1.14 * 1024,
    'imagenet21k+imagenet2012/ViT-L_16-224.npz': None,
    'imagenet21k+imagenet2012/ViT-L_32.npz': None,
    'imagenet21k+imagenet2012/R50+ViT-B_16.npz': 377.57,
    'sam/ViT-S_16.npz': 252.57,  # three times the weights: an optimizer's state is in it, too
    'sam/ViT-B_16.npz': 330.3,
    'sam/ViT-B_32.npz': 336.6,
    'sam/ViT-L_16.npz': 1.13 * 1024,
    'sam/ViT-L_32.npz': 1.14 * 1024,
    'augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz': 37.2,
    'augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz': 115,
    'augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz': 118,
    'augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz': 391.4,
    'augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz': 40,
    'augreg/R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0.npz': 170,
    'augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0.npz': 1337,
}  # AugReg released 52,268 files; these are the recommended ones of each size.


def resolve(pretrained: str, *, cache_dir: str | os.PathLike[str] = '') -> pathlib.Path:
    """Finds a checkpoint, and downloads it to the cache if need be.

    Args:
        pretrained: a file; a model folder; a released name, with or without '.npz'
            ('imagenet21k/ViT-B_16', 'augreg/<file name>'); or an address, 'gs://bucket/path' or
            'https://...'.
        cache_dir: where downloads go, by the path they have in their bucket. Default: the
            environment variable VIT_JAX_CACHE, else ~/.cache/vit_jax. VIT_JAX_BASE_URL names a
            mirror of https://storage.googleapis.com.

    Returns:
        Path of a file on this machine.

    Raises:
        UserError: no such file or name (the nearest names are given), or it cannot be downloaded.
    """
    if '://' in pretrained:
        return _fetch(pretrained, None, cache_dir)
    path = pathlib.Path(pretrained).expanduser()
    if (path / 'params.npz').is_file():
        return path / 'params.npz'
    if path.is_dir():
        raise UserError(
            f'{path} is a folder without params.npz; expected a checkpoint or a model folder'
        )
    if path.is_file():
        return path
    name = pretrained if pretrained.endswith('.npz') else f'{pretrained}.npz'
    if name in RELEASED or (name.startswith('augreg/') and name.count('-') > 1):
        return _fetch(f'gs://{BUCKET}/{name}', RELEASED.get(name), cache_dir)
    near = difflib.get_close_matches(name, RELEASED, n=3, cutoff=0.5)
    hint = f'; nearest released names: {", ".join(near)}' if near else ''
    raise UserError(
        f'{pretrained!r} is no file here and no released checkpoint{hint}. Expected a path, a '
        'released name '
        'such as imagenet21k/ViT-B_16.npz, or an address (gs:// or https://)'
    )


def resolve_augreg(
    model_or_filename: str,
    *,
    pretrained_dir: str = '',
    cache_dir: str | os.PathLike[str] = '',
) -> pathlib.Path:
    """Finds an AugReg checkpoint ("How to train your ViT?", https://arxiv.org/abs/2106.10270).

    Args:
        model_or_filename: a model ('B_16', 'R_Ti_16'): then the ImageNet-21k checkpoint that is
            best in pre-training (`final_val` in index.csv); or the name of any file, with '-' in
            it.
        pretrained_dir: folder or address with the files and their index.csv; default
            gs://vit_models/augreg.
        cache_dir: see `resolve`.

    Returns:
        Path of a `.npz` file on this machine.

    Raises:
        UserError: no such model (the known ones are listed) or file, or it cannot be downloaded.
    """
    directory = (pretrained_dir or AUGREG_DIR).rstrip('/')

    def find(name: str) -> pathlib.Path:
        if '://' in directory:
            released = name if directory != AUGREG_DIR else f'augreg/{name}'
            return _fetch(f'{directory}/{name}', RELEASED.get(released), cache_dir)
        path = pathlib.Path(directory).expanduser() / name
        if not path.is_file():
            raise UserError(
                f'no file {path}; expected AugReg checkpoints and index.csv in {directory}'
            )
        return path

    if '-' in model_or_filename:
        return find(model_or_filename.removesuffix('.npz') + '.npz')
    return find(f'{_best_augreg(find("index.csv"), model_or_filename)}.npz')


def _best_augreg(index: pathlib.Path, model: str) -> str:
    """Returns the file name (without .npz) of the best ImageNet-21k checkpoint of a model."""
    best: dict[str, tuple[float, str]] = {}
    try:
        with open(index, newline='', encoding='utf-8') as f:
            for row in csv.DictReader(f):
                if row['ds'] == 'i21k':
                    name = row['filename'].split('-')[0]
                    candidate = (float(row['final_val']), row['filename'])
                    best[name] = max(best.get(name, candidate), candidate)
    except (KeyError, ValueError, TypeError) as e:
        raise UserError(f'{index} is no index of AugReg checkpoints ({e!r})') from e
    if model not in best:
        raise UserError(
            f'no AugReg model {model!r}; known: {", ".join(sorted(best))}. A file is named in full'
        )
    return best[model][1]


def _fetch(address: str, mib: float | None, cache_dir: str | os.PathLike[str]) -> pathlib.Path:
    parsed = urllib.parse.urlsplit(address)
    if parsed.scheme not in ('gs', 'http', 'https') or not parsed.netloc:
        raise UserError(
            f'cannot download {address}: expected gs://bucket/path or https://host/path'
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
    parts = [part for part in key.split('/') if part not in ('', '.', '..')]
    # Whole paths: SAM and GSAM files have the names of others, and only the folder tells them
    # apart.
    root = pathlib.Path(cache_dir or os.environ.get('VIT_JAX_CACHE') or '~/.cache/vit_jax')
    return download.fetch(url, root.expanduser().joinpath(*parts), published_mib=mib)
