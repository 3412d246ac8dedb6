"""Files that PyTorch wrote (`.pth`, `.pt`, `.bin`): the only module that imports it.

Such a file is a pickle: PyTorch reads it, with `weights_only`, which builds tensors and nothing
else, so no code of the file runs.
"""

import argparse
import codecs
import contextlib
import functools
import io
import itertools
import mmap
import pathlib
import pickletools
import re
import struct
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import numpy as np

from vit_jax.checkpoint import archives, state_dicts
from vit_jax.checkpoint.arrays import LazyArray, from_file
from vit_jax.errors import UserError

# Python objects that PyTorch makes of any file and that can take memory without end: a byte array
# as long as a number says, and text encoded again and again. Only NumPy's numbers need the second,
# of a few letters, as Latin-1.
_BYTE_ARRAY, _ENCODE = b'bytearray', b'_codecs'
_MAX_TEXT = 1000
# Steps of the pickles in a file, each of which may make an object; a tensor takes about 40.
_MAX_STEPS = 1_000_000
_PICKLES = 5  # of the older format: magic number, version, machine, content, names of storages
# Of what a file's tensors may take when read: some share one stored array (tied weights), not many.
_MAX_EXPANSION = 8
# Where training scripts keep the state dict in their checkpoints; averaged weights first.
_STATE_DICTS = (
    *('state_dict_ema', 'model_ema', 'teacher', 'target_encoder', 'state_dict', 'model', 'module'),
    *('student', 'encoder'),
)


class _Ignored:
    """Takes the place of what training scripts put beside the weights; it holds nothing."""

    def __new__(cls, *args: Any) -> '_Ignored':
        """Ignores the arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


# Arguments of the script, and numbers of NumPy with their types.
_BESIDE_WEIGHTS = (
    f'{argparse.Namespace.__module__}.{argparse.Namespace.__qualname__}',
    *('numpy.dtype', 'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'),
)


def open_file(path: pathlib.Path) -> tuple[dict[str, LazyArray], list[str]]:
    """Lists the tensors of a PyTorch checkpoint; they are read later, one by one.

    Args:
        path: the file, a zip archive or a bare pickle; of a training checkpoint the state dict is
            taken, averaged weights first.

    Returns:
        (name -> array, what was taken of the file: a sentence each).

    Raises:
        UserError: PyTorch is not installed; the file is damaged, or holds something that is not a
            weight or that could run code or take unbounded memory.
    """
    content, notes = _load_state_dict(path)
    import torch

    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f'{path}: the entry {name!r} is a {type(tensor).__name__}, not a tensor; expected '
                'a state dict'
            )
        what = 'a nested tensor' if tensor.is_nested else str(tensor.layout)
        if what != 'torch.strided' or tensor.is_quantized or tensor.device.type != 'cpu':
            what = 'a quantised tensor' if tensor.is_quantized else what
            raise UserError(
                f'{path}: the tensor {str(name)[:200]!r} is stored as {what} on {tensor.device}; '
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

    arrays = {}
    for name, tensor in content.items():
        if state_dicts.BUFFERS.fullmatch(str(name)):
            continue
        stored = str(tensor.dtype).removeprefix('torch.')
        reader = functools.partial(read, tensor)
        arrays[str(name)] = from_file(path, str(name), tensor.shape, stored, reader)
    return arrays, notes


def _load_state_dict(path: pathlib.Path) -> tuple[Mapping[Any, Any], list[str]]:
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f'{path} is a PyTorch file, and reading those needs PyTorch: pip install torch (its '
            'CPU build is enough). .safetensors files of the same weights need nothing'
        ) from e
    _refuse_bombs(path)
    try:
        allowed = [(type('Ignored', (_Ignored,), {}), name) for name in _BESIDE_WEIGHTS]
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            # It warns of odd or old pickles, which end in an error below or do not matter.
            warnings.simplefilter('ignore')
            if archives.is_zip(path) and path.suffix != '.safetensors':
                content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            else:  # by its name PyTorch would take a renamed file for what it is not
                with open(path, 'rb') as f:
                    content = torch.load(f, map_location='cpu', weights_only=True)
    except Exception as e:  # damage shows as anything: pickle, zip, runtime, safetensors errors
        advice = (
            'Save the state dict alone (torch.save(model.state_dict(), ...)), or use .safetensors'
        )
        if objects := re.search(r'GLOBAL (\S+)', str(e)):
            raise UserError(
                f'{path} cannot be read safely as PyTorch weights: it has the Python object '
                f'{objects[1][:200]} in it, which could run code. {advice}'
            ) from e
        raise UserError(
            f'{path} cannot be read safely as PyTorch weights: it is damaged, no PyTorch file, or '
            f'has other Python objects than tensors in it, which could run code. {advice}. '
            f'PyTorch: {str(e).splitlines()[0] if str(e) else type(e).__name__}'
        ) from e
    notes = []
    for key in _STATE_DICTS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            if key not in ('state_dict', 'model'):
                notes.append(f'the weights are those under {key!r}')
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f'{path} holds a {type(content).__name__}; expected a state dict')
    return content, notes


def _refuse_bombs(path: pathlib.Path) -> None:
    """Refuses what PyTorch would make of a file before anyone can look at it."""
    try:
        if archives.is_zip(path):
            with archives.open_zip(path) as archive:
                members = archive.infolist()
                archives.check_stored(members, path)
                for info in members:
                    if info.filename.lower().endswith('.pkl'):  # in any case, as for PyTorch
                        data = archive.read(info)
                        _check_pickles(data, io.BytesIO(data), path)
        elif path.stat().st_size:
            with (
                open(path, 'rb') as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            ):
                _check_pickles(view, cast('BinaryIO', view), path)
    except (MemoryError, UserError):
        raise
    except Exception as e:  # whatever zipfile raises for damage
        raise UserError(f'{path} is damaged ({e}): download it again') from e


def _check_pickles(data: bytes | mmap.mmap, file: BinaryIO, path: pathlib.Path) -> None:
    """Looks at the first pickles of a file without executing them.

    PyTorch's unpickler knows the names of Python objects only as plain text, so looking for the
    text is enough.
    """
    bomb = data.find(_BYTE_ARRAY) >= 0
    encodes = data.find(_ENCODE) >= 0
    with contextlib.suppress(ValueError, struct.error):  # damage, which PyTorch will name
        pickles = itertools.chain.from_iterable(pickletools.genops(file) for _ in range(_PICKLES))
        count = 0
        for _, argument, _ in itertools.islice(pickles, _MAX_STEPS + 1):
            count += 1
            bomb |= encodes and isinstance(argument, str | bytes) and _may_grow(argument)
        if count > _MAX_STEPS:
            raise UserError(
                f'{path}: its pickle has more than {_MAX_STEPS:,} steps, which could take all '
                'memory. Save the state dict alone (torch.save(model.state_dict(), ...))'
            )
    if bomb:
        raise UserError(
            f'{path} has other Python objects than tensors in it (bytes), which could take all '
            'memory. Save the state dict alone (torch.save(model.state_dict(), ...)), or use '
            '.safetensors'
        )


def _may_grow(text: str | bytes) -> bool:
    """Whether a text of a pickle that encodes is long, or names an encoding but Latin-1."""
    if len(text) > _MAX_TEXT:
        return True
    name = text.decode('latin1') if isinstance(text, bytes) else text
    try:
        return codecs.lookup(name).name != 'iso8859-1'
    except (LookupError, ValueError):  # no encoding
        return False
