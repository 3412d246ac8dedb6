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
from vit_jax.checkpoint import archives, flax_msgpack, pytorch, state_dicts
from vit_jax.checkpoint.arrays import LazyArray, from_file
from vit_jax.errors import UserError

_PICKLES = ('.pth', '.pt', '.bin', '.tar')
OPEN_CLIP_FILES = ('open_clip_model.safetensors', 'open_clip_pytorch_model.bin')
# What folders of Hugging Face, timm and open_clip call their weights, best first.
_FOLDER_FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
    'flax_model.msgpack',
    *OPEN_CLIP_FILES,
)
# A file beside the index, no path.
_SHARD_NAME = re.compile(r'\w[\w.+-]{0,199}', re.A)
_MAX_SHARDS = 1000
_MAX_HEADER = 8 << 20  # bytes of a safetensors file, for more than 50,000 tensors
# Beginnings of files that hold weights, or once did, in forms that are not read here.
_OTHER_KINDS = {
    b'\x89HDF': 'an HDF5 file (.h5, of Keras or TensorFlow); save the model for PyTorch, or as '
    '.safetensors',
    b'GGUF': 'a GGUF file (of llama.cpp); use the weights that it was made from',
    b'\x1f\x8b': 'compressed with gzip; unpack it (gunzip)',
    b'\x93NUMPY': 'a single NumPy array; a checkpoint is a .npz file of all arrays',
    b'version https://git-lfs': 'a pointer of Git LFS, not the file itself; git lfs pull gets it',
}
_FOLDERS = {
    'adapter_config.json': 'an adapter (LoRA), which changes the weights of another model; vit_jax '
    'convert BASE DST --to model --adapter FOLDER merges it into that',
    'saved_model.pb': "TensorFlow's SavedModel; save the model for PyTorch, or as .safetensors",
    'tf_model.h5': 'TensorFlow weights alone; save the model for PyTorch, or as .safetensors',
    '_CHECKPOINT_METADATA': 'an Orbax checkpoint; of a run, the model is in WORKDIR/model',
}


def open_tensors(
    path: pathlib.Path,
) -> tuple[dict[str, LazyArray], dict[str, str], list[str]]:
    """Lists the tensors of a file; they are read later, one by one.

    Args:
        path: a `.safetensors` file or a PyTorch checkpoint.

    Returns:
        (name -> array, the metadata of a safetensors file, what was done: a sentence each).

    Raises:
        UserError: not such a file, damaged, or holding something that is not a weight.
    """
    what = kind(path)
    if what == 'safetensors':
        return *_open_safetensors(path), []
    if what == 'msgpack':
        return flax_msgpack.open_file(path), {}, []
    arrays, notes = pytorch.open_file(path)
    return arrays, {}, notes


def kind(path: pathlib.Path) -> str:
    """'npz', 'safetensors', 'pickle' (PyTorch) or 'msgpack' (Flax): by the content.

    By the name if that is damaged.

    Args:
        path: an existing file, whatever its name.

    Raises:
        UserError: it is of another kind, which is named.
    """
    if archives.is_zip(path):
        try:
            with archives.open_zip(path) as archive:
                names = archive.namelist()
        except MemoryError:
            raise
        except Exception:  # zipfile raises nearly anything for damage; reading it will name it
            return 'pickle' if path.suffix in _PICKLES else 'npz'
        if any(name.endswith('/constants.pkl') for name in names):
            raise UserError(
                f'{path} is a TorchScript program; save its weights: '
                'torch.save(torch.jit.load(FILE).state_dict(), ...)'
            )
        if 'model.weights.h5' in names:
            raise UserError(f'{path} is a Keras model; save it for PyTorch, or as .safetensors')
        return 'pickle' if any(name.lower().endswith('data.pkl') for name in names) else 'npz'
    try:
        with open(path, 'rb') as f:
            start = f.read(32)
    except OSError as e:
        raise UserError(f'cannot read {path}: {e}') from e
    for magic, words in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise UserError(f'{path} is {words}')
    if path.suffix == '.onnx':
        raise UserError(
            f'{path} is an ONNX file, which predict and evaluate run; what reads weights needs '
            'those that it was made from'
        )
    if path.suffix == '.msgpack':
        return 'msgpack'
    if start[8:9] == b'{' or path.suffix == '.safetensors':
        return 'safetensors'
    if start[:1] == b'\x80' or path.suffix in _PICKLES:
        return 'pickle'
    return 'npz'


def check_folder(folder: pathlib.Path) -> None:
    """Raises `UserError` for a folder of another kind, which is named."""
    if any((folder / name).is_file() for name in _FOLDER_FILES):
        return
    for name, words in _FOLDERS.items():
        if (folder / name).is_file():
            raise UserError(f'{folder} is {words}')


def find_in_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights of a folder (Hugging Face or timm): one, or all shards of an index.

    Raises:
        UserError: there is none, or a shard is missing.
    """
    check_folder(folder)
    for name in _FOLDER_FILES:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith('.json'):
            return [file]
        shards = files.read_json(file).get('weight_map')
        named = isinstance(shards, dict) and all(isinstance(s, str) for s in shards.values())
        if not (shards and named):
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

    with open(path, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
    if path.stat().st_size > length > _MAX_HEADER:
        raise UserError(f'{path}: its header has {length:,} bytes, more than {_MAX_HEADER:,}')
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
        if state_dicts.BUFFERS.fullmatch(name):
            continue
        stored = {'BF16': 'bfloat16'}.get(dtype, dtype.replace('F', 'float'))
        read = functools.partial(file.get_tensor, name)
        arrays[name] = from_file(path, name, shape, stored, read)
    return arrays, metadata
