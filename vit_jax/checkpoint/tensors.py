"""Files of tensors: safetensors and PyTorch's `.pth`, alone or as the shards of a folder.

safetensors files are read by the package of that name, without PyTorch.
"""

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.checkpoint import archives, pytorch
from vit_jax.checkpoint.arrays import LazyArray, from_file
from vit_jax.errors import UserError

_PICKLES = ('.pth', '.pt', '.bin', '.tar')
# What folders of Hugging Face and of timm call their weights, best first.
_FOLDER_FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
# A file beside the index, no path.
_SHARD_NAME = re.compile(r'\w[\w.+-]{0,199}', re.A)
_MAX_SHARDS = 1000
# What wrappers (DistributedDataParallel, torch.compile) put in front of every name.
_WRAPPERS = re.compile(r'^(?:module\.|_orig_mod\.)+')


def open_tensors(path: pathlib.Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """Lists the tensors of a file; they are read later, one by one.

    Args:
        path: a `.safetensors` file or a PyTorch checkpoint.

    Returns:
        (name -> array, the metadata of a safetensors file).

    Raises:
        UserError: not such a file, damaged, or holding something that is not a weight.
    """
    metadata: dict[str, str] = {}
    if kind(path) == 'safetensors':
        arrays, metadata = _open_safetensors(path)
    else:
        arrays = pytorch.open_file(path)
    if all(_WRAPPERS.match(name) for name in arrays):
        arrays = {_WRAPPERS.sub('', name): array for name, array in arrays.items()}
    return arrays, metadata


def kind(path: pathlib.Path) -> str:
    """'npz', 'safetensors' or 'pickle' (PyTorch): by the content; by the name if that is damaged.

    Args:
        path: an existing file, whatever its name.
    """
    if archives.is_zip(path):
        try:
            with archives.open_zip(path) as archive:
                names = archive.namelist()
        except MemoryError:
            raise
        except Exception:  # zipfile raises nearly anything for damage; reading it will name it
            return 'pickle' if path.suffix in _PICKLES else 'npz'
        return 'pickle' if any(name.lower().endswith('data.pkl') for name in names) else 'npz'
    try:
        with open(path, 'rb') as f:
            start = f.read(10)
    except OSError as e:
        raise UserError(f'cannot read {path}: {e}') from e
    if start[8:9] == b'{' or path.suffix == '.safetensors':
        return 'safetensors'
    if start[:1] == b'\x80' or path.suffix in _PICKLES:
        return 'pickle'
    return 'npz'


def find_in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights of a folder (Hugging Face or timm): one, or all shards of an index.

    Raises:
        UserError: there is none, or a shard is missing.
    """
    for name in _FOLDER_FILES:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith('.json'):
            return [file]
        shards = files.read_json(file).get('weight_map')
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise UserError(f'{file} has no weight_map of names to files; copy the folder again')
        names = sorted(set(shards.values()))
        if bad := [name for name in names if not _SHARD_NAME.fullmatch(name)]:
            raise UserError(f'{file} names {ascii(bad[0])[:99]}, which is not in the folder')
        if len(names) > _MAX_SHARDS:
            raise UserError(f'{file} names {len(names):,} files, more than {_MAX_SHARDS}')
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f'{file} names {name!r}, which is not in the folder')
        return [folder / name for name in names]
    raise UserError(f'{folder} has no weights: none of {", ".join(_FOLDER_FILES)} is there')


def save_safetensors(
    path: pathlib.Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes float32 tensors, one at a time.

    (The safetensors package wants them all in memory. The format: eight bytes with the length of a
    JSON header, the header, the data.)

    Args:
        path: the file; written in place, so give the name of a temporary one.
        tensors: name -> array, lazy or not; they are written in the order of their names.
        metadata: texts for the header.
    """
    header: dict[str, Any] = {'__metadata__': {'format': 'pt', **metadata}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + 4 * int(np.prod(tensors[name].shape, dtype=np.int64))
        header[name] = {
            'dtype': 'F32',
            'shape': list(tensors[name].shape),
            'data_offsets': [begin, end],
        }
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for name in sorted(tensors):
            f.write(np.ascontiguousarray(tensors[name], '<f4').data)


def _open_safetensors(path: pathlib.Path) -> tuple[dict[str, LazyArray], dict[str, str]]:
    import safetensors

    try:
        file = safetensors.safe_open(path, framework='numpy', backend='pread')
        metadata = file.metadata() or {}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: (piece.get_shape(), piece.get_dtype()) for name, piece in slices.items()}
    except MemoryError:
        raise
    except Exception as e:  # its own errors, the system's, undecodable text
        raise UserError(
            f'{path} is not a readable .safetensors file ({e}). It may be cut short, damaged, or '
            'renamed: download it again'
        ) from e

    arrays = {}
    for name, (shape, dtype) in shapes.items():
        stored = {'BF16': 'bfloat16'}.get(dtype, dtype.replace('F', 'float'))
        read = functools.partial(file.get_tensor, name)
        arrays[name] = from_file(path, name, shape, stored, read)
    return arrays, metadata
