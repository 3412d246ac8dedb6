"""Files of tensors: safetensors and PyTorch's `.pth`, alone or as the shards of a folder.

safetensors files are read by the package of that name, without PyTorch. A `.pth` file is a pickle:
PyTorch reads it, with `weights_only`, which builds tensors and nothing else, so no code of the file
runs.
"""

import functools
import json
import mmap
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import files
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
# Python objects that PyTorch makes of any file and that can take memory without end: a byte array
# as long as a number says, and text encoded again and again. No weights need them.
_BOMBS = (b'bytearray', b'_codecs')
# Of what a file's tensors may take when read: some share one stored array (tied weights), not many.
_MAX_EXPANSION = 8
# Where training scripts keep the state dict in their checkpoints; averaged weights first.
_STATE_DICTS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'module')
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
    if kind(path) == 'safetensors':
        return _open_safetensors(path)
    return _open_pickle(path), {}


def kind(path: pathlib.Path) -> str:
    """'npz', 'safetensors' or 'pickle' (PyTorch): by the content; by the name if that is damaged.

    Args:
        path: an existing file, whatever its name.
    """
    if _is_zip(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except MemoryError:
            raise
        except Exception:  # zipfile raises nearly anything for damage; reading it will name it
            return 'pickle' if path.suffix in _PICKLES else 'npz'
        return 'pickle' if any(name.endswith('data.pkl') for name in names) else 'npz'
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


def _is_zip(path: pathlib.Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one in several parts
        return True


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

    return _unwrap(
        {
            name: from_file(
                path,
                name,
                shape,
                {'BF16': 'bfloat16'}.get(dtype, dtype.replace('F', 'float')),
                functools.partial(file.get_tensor, name),
            )
            for name, (shape, dtype) in shapes.items()
        }
    ), metadata


def _open_pickle(path: pathlib.Path) -> dict[str, LazyArray]:
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f'{path} is a PyTorch file, and reading those needs PyTorch: pip install torch (its '
            'CPU build is enough). .safetensors files of the same weights need nothing'
        ) from e
    _refuse_bombs(path)
    try:
        with warnings.catch_warnings():
            # It warns of odd or old pickles, which end in an error below or do not matter.
            warnings.simplefilter('ignore')
            if _is_zip(path) and path.suffix != '.safetensors':
                content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            else:  # by its name PyTorch would take a renamed file for what it is not
                with open(path, 'rb') as f:
                    content = torch.load(f, map_location='cpu', weights_only=True)
    except Exception as e:  # damage shows as anything: pickle, zip, runtime, safetensors errors
        raise UserError(
            f'{path} cannot be read safely as PyTorch weights: it is damaged, no PyTorch file, or '
            'has other Python objects than tensors in it, which could run code. Save the state '
            f'dict alone (torch.save(model.state_dict(), ...)), or use .safetensors. PyTorch: '
            f'{str(e).splitlines()[0] if str(e) else type(e).__name__}'
        ) from e
    for key in _STATE_DICTS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f'{path} holds a {type(content).__name__}; expected a state dict')

    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f'{path}: the entry {name!r} is a {type(tensor).__name__}, not a tensor; expected '
                'a state dict'
            )
        if tensor.layout != torch.strided or tensor.device.type != 'cpu':
            raise UserError(
                f'{path}: the tensor {name!r} is stored as {tensor.layout} on {tensor.device}; '
                'expected plain tensors'
            )
    if sum(t.numel() * t.element_size() for t in content.values()) > (
        _MAX_EXPANSION * path.stat().st_size
    ):  # repeated rows of a few stored bytes
        raise UserError(
            f'{path}: its tensors would take {_MAX_EXPANSION} times the size of the file'
        )

    def read(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().float().numpy().copy()  # a copy: its memory is the file's (mmap)

    return _unwrap(
        {
            str(name): from_file(
                path,
                str(name),
                tensor.shape,
                str(tensor.dtype).removeprefix('torch.'),
                functools.partial(read, tensor),
            )
            for name, tensor in content.items()
        }
    )


def _refuse_bombs(path: pathlib.Path) -> None:
    """Refuses what PyTorch would make of a pickle before anyone can look at it.

    Its unpickler knows the names of Python objects only as plain text, so looking for the text is
    enough.
    """
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [info for info in archive.infolist() if info.filename.endswith('.pkl')]
                if sum(info.file_size for info in pickles) > files.MAX_JSON_BYTES:
                    raise UserError(
                        f'{path}: its pickle has more than {files.MAX_JSON_BYTES:,} bytes'
                    )
                found = any(bomb in archive.read(info) for info in pickles for bomb in _BOMBS)
        elif path.stat().st_size:
            with (
                open(path, 'rb') as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            ):
                found = any(view.find(bomb) >= 0 for bomb in _BOMBS)
        else:
            found = False
    except (MemoryError, UserError):
        raise
    except Exception as e:  # whatever zipfile raises for damage
        raise UserError(f'{path} is damaged ({e}): download it again') from e
    if found:
        raise UserError(
            f'{path} has other Python objects than tensors in it (bytes), which could take all '
            'memory. Save the state dict alone (torch.save(model.state_dict(), ...)), or use '
            '.safetensors'
        )


def _unwrap(tensors: dict[str, LazyArray]) -> dict[str, LazyArray]:
    if all(_WRAPPERS.match(name) for name in tensors):
        return {_WRAPPERS.sub('', name): array for name, array in tensors.items()}
    return tensors
