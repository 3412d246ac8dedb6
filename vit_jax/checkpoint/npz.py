"""Google's released weights: `.npz` files whose keys are the parameter paths, joined by '/'.

The files were written before Flax Linen, when a module numbered its unnamed children with *one*
counter, whatever their class; Linen counts per class. So an encoder block of a file reads
`LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3` and the same block of a
Linen model `LayerNorm_0`, `MultiHeadDotProductAttention_0`, `LayerNorm_1`, `MlpBlock_0`.
`open_file` accepts both and returns Linen names; `save` writes the published ones, because every
other reader of these files (timm, for one) expects them. Only blocks that have all four modules are
translated, so a part of a block keeps its names. Scales and biases of GroupNorm have shape
[1, 1, 1, channels] in the files and [channels] in the models.
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from vit_jax import files
from vit_jax.checkpoint import archives, big_vision
from vit_jax.checkpoint.arrays import (
    LazyArray,
    Weights,
    derive,
    from_file,
    is_shape_of_weights,
)
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

# Names joined by '/': no absolute path, no '..', nothing empty, not nested without end.
_NAME = re.compile(r'\w[\w.+-]*')
_MAX_DEPTH = 32
_KEY = re.compile(rf'{_NAME.pattern}(?:/{_NAME.pattern}){{0,{_MAX_DEPTH - 1}}}')
_GROUP_NORM = re.compile(r'(?:.*/)?(?:gn\d+|gn_root|gn_proj)/(?:scale|bias)')

_MAX_HEADER = 10_000  # bytes of a .npy header, NumPy's own limit
_MAX_EXPANSION = 32  # weights are noise: compressed files hold hardly more than their size
_SMALL = 64 << 20

# The comment of a zip file whose names would be taken for those of another layout: nothing is left
# out of it or moved.
_AS_NAMED = b'vit_jax: names as they are'
_SETTINGS = b'vit_jax settings: '  # in the comment, too: JSON

# Linen -> published, for the one module whose numbers differ. The four are created in this order.
_ENCODER_BLOCK = {
    'LayerNorm_0': 'LayerNorm_0',
    'MultiHeadDotProductAttention_0': 'MultiHeadDotProductAttention_1',
    'LayerNorm_1': 'LayerNorm_2',
    'MlpBlock_0': 'MlpBlock_3',
}
_TO_LINEN = {published: linen for linen, published in _ENCODER_BLOCK.items()}


def open_file(path: str | os.PathLike[str], *, whole: bool = False) -> Weights:
    """Recognises a `.npz` checkpoint; its arrays are read later, one by one.

    Pickled objects are refused, so a file from an untrusted source can be read. What the headers
    declare is held against the size of the file before any memory is taken. Reading verifies the
    zip checksum of each array.

    Args:
        path: a `.npz` file: the published (pre-Linen) naming, Linen names, or big_vision's (see
            `big_vision.to_vit`), at the top or under one of `PREFIXES` (then all else in the file,
            an optimizer's state or a text tower, is left out). What `save` wrote from names that
            look like these without being a whole model has them again.
        whole: leave nothing out, and take no part for the whole: of a file with two towers, both.

    Returns:
        The weights, Linen names; GroupNorm's are [channels]. float16, float64 and bfloat16 (which
        NumPy stores as two raw bytes) become float32.

    Raises:
        UserError: there is no such file, it is not a `.npz`, is cut short or damaged, or holds
            something that is not a weight; when it is read also for wrong checksums, NaN, infinity.
    """
    path = pathlib.Path(path)
    check_exists(path)
    try:
        archive = archives.open_zip(path)  # closed when the last array that reads from it is gone
        _check_sizes(archive.infolist(), path)
        members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
        as_named, settings = _read_comment(archive.comment, path)
        as_named |= whole
        prefix, left_out = ('', []) if as_named else big_vision.find_weights(list(members))
        flat = {
            name.removeprefix(prefix): _open_array(archive, info, path)
            for name, info in members.items()
            if name.startswith(prefix) and name not in left_out
        }
    except (MemoryError, UserError):
        raise
    except Exception as e:  # zipfile raises nearly anything for damage
        raise _unreadable(path, e) from e
    if not flat:
        raise UserError(f'{path} holds no arrays')
    weights = from_flat(flat, path, prefix, left_out, as_named=as_named)
    projects = prefix.endswith('img/') and 'head' in weights.params
    told = settings.pop('preprocessing', None)
    preprocess = Preprocess.from_dict(told) if told else None
    return dataclasses.replace(
        weights,
        settings=settings,
        projects=projects,
        image_size=preprocess.crop if preprocess else 0,
        preprocess=preprocess,
    )


def from_flat(
    flat: Mapping[str, Any],
    path: pathlib.Path,
    prefix: str = '',
    left_out: Sequence[str] = (),
    *,
    as_named: bool = False,
) -> Weights:
    """Gives arrays with keys such as 'head/bias' this package's names.

    Args:
        flat: key -> array (lazy or not), without `prefix`.
        path: where they come from.
        prefix: what the keys began with, for the notes.
        left_out: keys of arrays of the file that are not weights, for the notes.
        as_named: whether big_vision's layout is out of the question.

    Raises:
        UserError: a key is not a name, or the weights are of a kind that is not here.
    """
    flat = {name: _squeeze_group_norm(name, array) for name, array in flat.items()}
    tree = to_linen(nest(flat, path))
    published = any(
        'MultiHeadDotProductAttention_1' in key and '/encoderblock_0/' in key for key in flat
    )
    tree, notes = (tree, []) if as_named else big_vision.to_vit(tree, path)
    kind = 'big_vision .npz' if notes else 'Google .npz' if published else '.npz'
    if prefix:
        notes.insert(0, f'the weights are those under {prefix}')
    if left_out:
        groups = dict.fromkeys('/'.join(key.split('/')[:2]) for key in left_out)
        shown = ', '.join(list(groups)[:4]) + (', ...' if len(groups) > 4 else '')
        notes.append(f'{len(left_out)} other arrays are left out ({shown})')
    return Weights(str(path), kind, tree, tuple(notes))


def _read_comment(comment: bytes, path: pathlib.Path) -> tuple[bool, dict[str, Any]]:
    """What `save` wrote into the comment of the archive: (as named, settings)."""
    as_named = comment.startswith(_AS_NAMED)
    text = comment.removeprefix(_AS_NAMED)
    if not text.startswith(_SETTINGS):
        return as_named, {}
    settings = files.parse_json(text.removeprefix(_SETTINGS).decode())
    if not isinstance(settings, dict):
        raise ValueError('its settings are no object')
    return as_named, settings


def save(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes parameters, of a whole model or of any part of one, as a `.npz` file.

    `load` gives the same tree back, as float32. In the file, whole blocks of an encoder have the
    published names, which every reader of Google's files expects. The file is uncompressed (as
    Google's are), appears under its name only when it is complete and on disk, and is the same byte
    for byte for the same parameters. One array at a time is copied to the host.

    Args:
        path: the file to write; its folder must exist. An older file there is replaced.
        params: nested dict (or FrozenDict) with Linen (or published) names; leaves are NumPy or JAX
            arrays of a float type, or Python floats. They are written as float32, the only type
            that the published format has; GroupNorm's [channels] as [1, 1, 1, channels]. Of
            variables, {'params': ...} and nothing else, the parameters are written.
        settings: arguments of the model that neither its arrays tell nor are the released models',
            and how its images become pixels (`infer.settings`); they go into the comment of the
            zip archive.

    Raises:
        UserError: the file cannot be written (no such folder, disk full, no permission); or `load`
            would refuse it: a name with other characters than letters, digits, '_', '.', '+', '-',
            an array without elements. (NaN and infinity are written, and refused by `load`.)
        TypeError: a leaf is not an array of floats (a list, an integer, None), a key is no text, or
            a dict is empty.
    """
    if set(params) == {'params'} and isinstance(params['params'], Mapping):
        params = params['params']
    flat = dict(_leaves(to_published(params)))
    with files.atomic_file(path) as part, zipfile.ZipFile(part, 'w') as archive:
        if _looks_like_another_layout(to_linen(params), pathlib.Path(path)):
            archive.comment = _AS_NAMED
        if settings:
            archive.comment += _SETTINGS + json.dumps(settings, sort_keys=True).encode()
        for name in sorted(flat):
            _write_array(archive, name, flat[name])


def to_linen(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Renames modules from the published (pre-Linen) numbering to Linen's.

    Only the encoder blocks of a Vision Transformer (and of a text tower) differ; a tree with Linen
    names comes back as it is, and so does a part of a block.

    Args:
        tree: nested dict of arrays (any shapes).

    Returns:
        The same arrays in a new nested dict of plain dicts.
    """
    return _rename(tree, _TO_LINEN)


def to_published(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Renames modules from Linen's numbering to the published one: the inverse of `to_linen`.

    A tree that has the published names already comes back as it is.

    Args:
        tree: nested dict of arrays (any shapes).

    Returns:
        The same arrays in a new nested dict of plain dicts.
    """
    return _rename(tree, _ENCODER_BLOCK)


def _rename(tree: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Renames the children of every group that has all old `names` and no new one."""
    new = set(names.values()) - names.keys()
    here = names if tree.keys() >= names.keys() and new.isdisjoint(tree) else {}
    return {
        here.get(name, name): _rename(child, names) if isinstance(child, Mapping) else child
        for name, child in tree.items()
    }


def _leaves(tree: Mapping[str, Any], group: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields (name joined by '/', leaf) of what a file can hold, as `save` describes it."""
    where = '/'.join(group) or 'the tree'
    if not tree:
        raise TypeError(f'{where} is an empty dict; a file holds arrays only: leave it out')
    if len(group) == _MAX_DEPTH:
        raise UserError(f'{where} is nested deeper than {_MAX_DEPTH} levels; save a part of it')
    for key, child in tree.items():
        if not isinstance(key, str):
            raise TypeError(f'{where} has the key {key!r}; expected a text, a name')
        if not _NAME.fullmatch(key):
            raise UserError(
                f"{where} has the key {key!r}; expected a name of letters, digits, '_', '.', '+', "
                "'-'. Rename it"
            )
        path = (*group, key)
        if isinstance(child, Mapping):
            yield from _leaves(child, path)
            continue
        name, dtype = '/'.join(path), getattr(child, 'dtype', None)
        if not hasattr(child, '__array__') and not isinstance(child, float):
            raise TypeError(f'{name} is {type(child).__name__}; expected an array of floats')
        if dtype is not None and dtype != ml_dtypes.bfloat16 and getattr(dtype, 'kind', '') != 'f':
            raise TypeError(f'{name} has type {dtype}; expected an array of floats')
        if not is_shape_of_weights(np.shape(child)):
            raise UserError(f'{name} has shape {np.shape(child)}, which no weights have')
        yield name, child


def _looks_like_another_layout(tree: Mapping[str, Any], path: pathlib.Path) -> bool:
    """Whether `open_file` would leave out, move or refuse some of these arrays."""
    if big_vision.find_weights(list(flatten(tree))) != ('', []):
        return True
    try:
        return bool(big_vision.to_vit(tree, path)[1])
    except UserError:  # of a layout that is not read; under its own names it can be
        return True


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a nested dict, in its order: {'head': {'bias': x}} becomes {'head/bias': x}."""
    return traverse_util.flatten_dict(tree, sep='/')


def check_exists(path: pathlib.Path) -> None:
    """Raises `UserError` if `path` is not a regular file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:  # ValueError: a null byte
        reason = '' if isinstance(e, FileNotFoundError) else f' ({e})'
        raise UserError(f'no such checkpoint file: {path}{reason}') from e
    if stat.S_ISDIR(mode):
        raise UserError(f'{path} is a folder; expected a checkpoint file (.npz)')
    if not stat.S_ISREG(mode):  # a pipe would be waited for, a device might never end
        raise UserError(f'{path} is not a regular file; expected a checkpoint file (.npz)')


def _unreadable(path: pathlib.Path, reason: Any) -> UserError:
    return UserError(
        f'{path} is not a readable .npz file ({reason}; {path.stat().st_size:,} bytes). It may be '
        'cut short, damaged, or a web page saved under this name: remove it and download it again'
    )


def _check_sizes(members: Sequence[zipfile.ZipInfo], path: pathlib.Path) -> None:
    """Refuses zip bombs: members that share their bytes, or expand beyond what weights would."""
    size = path.stat().st_size
    if sum(info.compress_size for info in members) > size:
        raise _unreadable(path, 'its members are larger than the file')
    if sum(info.file_size for info in members) > max(_SMALL, _MAX_EXPANSION * size):
        raise _unreadable(path, f'its contents are more than {_MAX_EXPANSION} times its size')


def _open_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: pathlib.Path) -> LazyArray:
    """Reads the header of an array and checks that the file can hold what it declares."""
    name = info.filename.removesuffix('.npy')
    if not info.filename.endswith('.npy'):
        raise UserError(
            f'{path} is a zip file but not a .npz checkpoint: it holds {info.filename!r}'
        )
    try:
        with archive.open(info) as member:
            start = io.BytesIO(member.read(_MAX_HEADER + 16))  # whatever length it claims
        version = np.lib.format.read_magic(start)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f'version {version} of the .npy format holds no weights')
        shape, _, dtype = read_header(start)
        if dtype.hasobject:
            raise ValueError('it has pickled Python objects, which could run code')
    except (MemoryError, zipfile.BadZipFile):
        raise
    except Exception as e:  # NumPy evaluates the header as Python's literals: nearly any error
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise UserError(
            f'{path}: cannot read the array {name!r} ({reason}). Expected plain arrays of weights: '
            'download the file again, or save it again with vit_jax.checkpoint.save'
        ) from e

    def read() -> np.ndarray:
        try:
            with archive.open(info) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read()  # the end, where zipfile compares the checksum
        except MemoryError:
            raise
        except Exception as e:  # zipfile and the decompressors raise nearly anything for damage
            raise _unreadable(path, e) from e
        return array

    array = from_file(path, name, shape, dtype.name if dtype.kind in 'fV' else str(dtype), read)
    declared = start.tell() + math.prod(shape) * dtype.itemsize
    stored = info.compress_type == zipfile.ZIP_STORED
    # Deflate makes nothing smaller than 1 / 1032; a header that promises more than that lies.
    held = info.compress_size if stored else min(info.file_size, 1032 * info.compress_size)
    if declared != info.file_size or declared > held or info.compress_size > path.stat().st_size:
        raise UserError(
            f'{path}: the array {name!r} declares {declared:,} bytes (shape {shape}, {dtype}) and '
            f'the file holds {held:,}: it is cut short or damaged. Download it again'
        )
    return array


def nest(flat: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Nests a flat dict: {'head/bias': x} becomes {'head': {'bias': x}}.

    Args:
        flat: key -> array (lazy or not).
        path: where they come from, for errors.

    Raises:
        UserError: a key is not a path of names, or is both an array and a group.
    """
    for key in flat:
        if not _KEY.fullmatch(key):
            raise UserError(
                f'{path}: {key!r} is not the name of an array; expected names such as '
                'head/kernel. This is not a checkpoint, or not one to trust'
            )
        names = key.split('/')
        for end in range(1, len(names)):
            if (group := '/'.join(names[:end])) in flat:
                raise UserError(
                    f'{path}: the key {key!r} is in the group {group!r}, which is an array itself'
                )
    return traverse_util.unflatten_dict(flat, sep='/')


def _squeeze_group_norm(name: str, array: Any) -> Any:
    if _GROUP_NORM.fullmatch(name) and array.ndim == 4 and array.shape[:3] == (1, 1, 1):
        return derive(np.ravel, array)
    return array


def _write_array(archive: zipfile.ZipFile, name: str, leaf: Any) -> None:
    array = np.asarray(leaf)
    array = np.ascontiguousarray(array, dtype=np.float32).reshape(array.shape)
    if _GROUP_NORM.fullmatch(name) and array.ndim == 1:
        array = array.reshape(1, 1, 1, -1)
    # A fixed time stamp (the earliest that zip knows, ZipInfo's default) makes equal parameters
    # equal files.
    with archive.open(zipfile.ZipInfo(f'{name}.npy'), 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
