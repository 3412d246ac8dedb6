"""Google's released weights: `.npz` files whose keys are the parameter paths, joined by '/'.

The files were written before Flax Linen, when a module numbered its unnamed children with *one*
counter, whatever their class; Linen counts per class. So an encoder block of a file reads
`LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3` and the same block of a
Linen model `LayerNorm_0`, `MultiHeadDotProductAttention_0`, `LayerNorm_1`, `MlpBlock_0`. `load`
accepts both and returns Linen names; `save` writes the published ones, because that is what every
other reader of these files (timm, for one) looks for. Scales and biases of GroupNorm have shape [1,
1, 1, channels] in the files and [channels] in the models.
"""

import contextlib
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vit_jax.errors import UserError

# Where some released files keep the weights beside an optimizer state (`sam/ViT-S_16.npz`) or in a
# collection of its own.
_PREFIXES = ('opt/target/', 'target/', 'params/')

_NUMBERED = re.compile(r'(.*)_(\d+)')
_GROUP_NORM = re.compile(r'(?:.*/)?(?:gn\d+|gn_root|gn_proj)/(?:scale|bias)')

# Linen -> published, for the one module whose numbers differ. The four are created in this order.
_ENCODER_BLOCK = {
    'LayerNorm_0': 'LayerNorm_0',
    'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
    'LayerNorm_1': 'LayerNorm_2',
    'MlpBlock_0': 'MlpBlock_3',
}


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a `.npz` checkpoint of either naming generation.

    Pickled objects are refused, so a file from an untrusted source can be read. The arrays are read
    one after the other straight into their final memory, and the zip checksum of each is verified.

    Args:
        path: a `.npz` file: the published (pre-Linen) naming, Linen names, or the weights under
            `params/` or `opt/target/` (then all else in the file, an optimizer's state, is left
            out).

    Returns:
        A nested dict with Linen names whose leaves are float32 NumPy arrays; GroupNorm's are
        [channels]. float16, float64 and bfloat16 (which NumPy stores as two raw bytes) are
        converted.

    Raises:
        UserError: there is no such file, it is not a `.npz`, is cut short or damaged, or holds
            something that is no weight.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f'{path} is a folder; expected a checkpoint file (.npz)')
    if not path.exists():
        raise UserError(f'no such checkpoint file: {path}')
    try:
        with zipfile.ZipFile(path) as archive:
            flat = dict(_read_arrays(archive, path))
    except OSError as e:
        raise UserError(f'cannot read the checkpoint {path}: {e}') from e
    except zipfile.BadZipFile as e:
        raise UserError(
            f'{path} is not a readable .npz file ({e}; {path.stat().st_size:,} bytes). It may be '
            'cut short, damaged, or a web '
            'page saved under this name: remove it and download it again'
        ) from e
    if not flat:
        raise UserError(f'{path} holds no arrays')
    tree = to_linen(_nest(flat, path))
    return _squeeze_group_norm(tree)


def save(path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Writes parameters as a `.npz` file in the published naming.

    The file is uncompressed (as Google's are), appears under its name only when it is complete and
    on disk, and is the same byte for byte for the same parameters. One array at a time is copied to
    the host.

    Args:
        path: the file to write; its folder must exist. An older file there is replaced.
        params: nested dict with Linen (or published) names; leaves are NumPy or JAX arrays of a
            float type. They are written as float32, the only type that the published format has;
            GroupNorm's [channels] as [1, 1, 1, channels].

    Raises:
        UserError: the file cannot be written (no such folder, disk full, no permission).
        TypeError: a leaf is no array of floats.
    """
    path = pathlib.Path(path)
    flat = dict(sorted(flatten(to_published(params)).items()))
    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        with _removed_on_error(partial):
            with open(partial, 'wb') as f:
                with zipfile.ZipFile(f, 'w', zipfile.ZIP_STORED) as archive:
                    for name, leaf in flat.items():
                        _write_array(archive, name, leaf)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
    except OSError as e:
        raise UserError(f'cannot write {path}: {e}') from e


def to_linen(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Renames modules from the published (pre-Linen) numbering to Linen's.

    Among the children of one parent, those named `<class>_<number>` are taken in the order of their
    numbers and numbered again from 0 for each class. A tree with Linen names comes back as it is.

    Args:
        tree: nested dict of arrays (any shapes).

    Returns:
        The same arrays in a new nested dict of plain dicts.
    """
    numbered = sorted((int(m[2]), m[1], name) for name in tree if (m := _NUMBERED.fullmatch(name)))
    counts: dict[str, int] = {}
    new_name = {}
    for _, prefix, name in numbered:
        new_name[name] = f'{prefix}_{counts.setdefault(prefix, 0)}'
        counts[prefix] += 1
    return {
        new_name.get(name, name): to_linen(child) if isinstance(child, Mapping) else child
        for name, child in tree.items()
    }


def to_published(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Renames modules from Linen's numbering to the published one: the inverse of `to_linen`.

    Only the encoder blocks of a Vision Transformer (and of a text tower) differ; a tree that has
    the published names already comes back as it is.

    Args:
        tree: nested dict of arrays (any shapes).

    Returns:
        The same arrays in a new nested dict of plain dicts.
    """
    new_name = _ENCODER_BLOCK if _ENCODER_BLOCK.keys() <= tree.keys() else {}
    return {
        new_name.get(name, name): to_published(child) if isinstance(child, Mapping) else child
        for name, child in tree.items()
    }


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Flattens a nested dict: {'head': {'bias': x}} becomes {'head/bias': x}.

    Args:
        tree: nested dict; any leaves.
        prefix: goes in front of every key.

    Returns:
        A flat dict in the tree's order.
    """
    flat = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            flat.update(flatten(child, f'{prefix}{name}/'))
        else:
            flat[prefix + name] = child
    return flat


def _read_arrays(archive: zipfile.ZipFile, path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (key, float32 array) of the weights in `archive`."""
    members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in members)), '')
    for name, info in members.items():
        if not name.startswith(prefix):
            continue  # the optimizer's state
        if not info.filename.endswith('.npy'):
            raise UserError(
                f'{path} is a zip file but no .npz checkpoint: it holds {info.filename!r}'
            )
        try:
            with archive.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise UserError(
                f'{path}: cannot read the array {name!r} ({e}). Expected plain arrays of weights, '
                'no pickled objects; '
                'download the file again, or save it anew with vit_jax.checkpoint.save'
            ) from e
        yield name.removeprefix(prefix), _as_float32(array, name, path)


def _as_float32(array: np.ndarray, name: str, path: pathlib.Path) -> np.ndarray:
    if array.dtype == np.dtype('V2'):  # NumPy has no bfloat16: the two bytes come back as 'void'
        array = array.view(ml_dtypes.bfloat16)
    elif array.dtype.kind != 'f':
        raise UserError(
            f'{path}: the array {name!r} has type {array.dtype}; expected weights, of a float type'
        )
    # np.load keeps Fortran order where a file has it; models and checksums want the one layout.
    return np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape)


def _nest(flat: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, array in flat.items():
        *parents, name = key.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(
                    f'{path}: the key {key!r} goes through {parent!r}, which is an array itself'
                )
        if name in node:
            raise UserError(
                f'{path}: the key {key!r} is there both as an array and as a group of arrays'
            )
        node[name] = array
    return tree


def _squeeze_group_norm(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    squeezed = {}
    for name, child in tree.items():
        key = prefix + name
        if isinstance(child, Mapping):
            squeezed[name] = _squeeze_group_norm(child, f'{key}/')
        elif _GROUP_NORM.fullmatch(key) and child.ndim == 4 and child.shape[:3] == (1, 1, 1):
            squeezed[name] = child.reshape(child.shape[3])
        else:
            squeezed[name] = child
    return squeezed


def _write_array(archive: zipfile.ZipFile, name: str, leaf: Any) -> None:
    array = np.asarray(leaf)
    if array.dtype != ml_dtypes.bfloat16 and array.dtype.kind != 'f':
        raise TypeError(f'{name} has type {array.dtype}; expected an array of floats')
    array = np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape)
    if _GROUP_NORM.fullmatch(name) and array.ndim == 1:
        array = array.reshape(1, 1, 1, -1)
    # A fixed time stamp (the earliest that zip knows, ZipInfo's default) makes equal parameters
    # equal files.
    with archive.open(zipfile.ZipInfo(f'{name}.npy'), 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


@contextlib.contextmanager
def _removed_on_error(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
