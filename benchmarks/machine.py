"""What a measurement was taken on: hardware, versions, and no names of machines or folders."""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.analysis import devices
from vit_jax.errors import UserError

PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'torchvision', 'timm', 'transformers',
    'simplejpeg', 'opencv-python-headless', 'pillow', 'grain', 'tensorflow-cpu', 'tensorflow',
)  # fmt: skip


def hardware() -> dict:
    """Processor, cores that this process may use, memory, and how busy the machine is."""
    name = platform.processor()
    cpuinfo = pathlib.Path('/proc/cpuinfo')
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(':', 1)[1].strip() for x in lines if x.startswith('model name')), name)
    return {
        'processor': name,
        'cores': cores(),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'load_average': round(os.getloadavg()[0], 2),
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Python, ours, and those packages that are installed."""
    import vit_jax

    found = {'python': sys.version.split()[0], 'vit_jax': vit_jax.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command(script: str, arguments: Sequence[str]) -> str:
    """The command line, of absolute paths only the last part."""
    words = [pathlib.Path(a).name if os.path.isabs(a) else a for a in arguments]
    return ' '.join([f'python scripts/{script}', *words])


def published_peak(kind: str, dtype: str) -> tuple[float, str] | None:
    """The peak rate of an accelerator that calls itself `kind`.

    Args:
      kind: such as 'NVIDIA H200'.
      dtype: 'float32' or 'bfloat16'.

    Returns:
      FLOP/s and where the figure comes from; None for a device that is not in the table.
    """
    plain = kind.lower().replace('nvidia', '').replace('geforce', '').replace(' ', '-').strip('-')
    # The longest name that fits: 'a100-40gb' rather than 'a100'.
    name = max((n for n in devices.DEVICES if n in plain or n in plain.replace('-', '')),
               key=len, default=None)  # fmt: skip
    if name is None:
        return None
    return stated_peak(name, dtype)


def stated_peak(name: str, dtype: str) -> tuple[float, str]:
    """The peak of a device of the table: FLOP/s, source.

    Raises:
      UserError: it is not in the table.
    """
    try:
        device = devices.get(name)
    except UserError as error:
        raise UserError(str(error).replace('--memory_gib and ', '')) from error
    peak = device.peak_float32 if dtype == 'float32' else device.peak_16bit
    return 1e12 * peak, device.source


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """Writes JSON, complete or not at all.

    Raises:
      UserError: it cannot be written.
    """
    _write(pathlib.Path(path), json.dumps(result, indent=1) + '\n')


def read_json(path: str, script: str, kind: str, version: int) -> dict[str, Any]:
    """A result that was written before.

    Args:
      path: of the file.
      script: that wrote it, for the error.
      kind: what its `kind` is to be.
      version: what its `format` is to be.

    Raises:
      UserError: the file cannot be read, or is none of this kind and format.
    """
    try:
        result = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error
    except ValueError as error:
        raise UserError(f'{path} is no JSON: {error}') from error
    if not isinstance(result, dict) or result.get('kind') != kind:
        raise UserError(f'{path} is no result of scripts/{script} --output')
    if result.get('format') != version:
        raise UserError(
            f'{path} has format {result.get("format")!r}, and this version reads {version}: '
            'measure again'
        )
    return result


def update_document(path: str, marks: tuple[str, str], text: str) -> None:
    """Replaces what is between two lines of a document, or leaves it as it is.

    Args:
      path: of a text file in UTF-8.
      marks: the lines, each there once and in this order; they stay.
      text: what comes between them, with an empty line before and after.

    Raises:
      UserError: the document cannot be read or written, or the lines are not in it.
    """
    target = pathlib.Path(path)
    try:
        lines = target.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read {path}: {error}') from error
    places = [number for number, line in enumerate(lines) if line.strip() in marks]
    if [lines[number].strip() for number in places] != list(marks):
        raise UserError(f'{path}: expected a line {marks[0]} and after it a line {marks[1]}, once')
    first, last = places
    lines[first + 1 : last] = ['', text.strip(), '']
    _write(target, '\n'.join(lines) + '\n')


def _write(target: pathlib.Path, text: str) -> None:
    partial = target.with_name(f'.{target.name}.{os.getpid()}.part')
    try:
        partial.write_text(text, encoding='utf-8')
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f'cannot write {target}: {error}') from error
    finally:
        partial.unlink(missing_ok=True)
