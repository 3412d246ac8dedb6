"""A page on which anybody can try a model: a folder of static files, computed in the browser.

ONNX Runtime Web runs the model. The page's own files are in `page/`; the runtime comes from npm, at
the version below, and is kept in the cache of downloads.
"""

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence

import rich.console

import vit_jax
from vit_jax import files, variants
from vit_jax.data import image_files, remote
from vit_jax.errors import UserError
from vit_jax.export import formats
from vit_jax.export.options import REPORT_SUFFIX, Options
from vit_jax.inference import model_folder

RUNTIME = 'onnxruntime-web'
RUNTIME_VERSION = '1.30.0'
# SHA-512 of its package, as `npm view onnxruntime-web dist.integrity` gives it.
_INTEGRITY = (
    'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
)
_WASM = 'ort-wasm-simd-threaded'
_RUNTIME_FILES = ('ort.wasm.min.mjs', f'{_WASM}.mjs', f'{_WASM}.wasm')
_WEBGPU_FILES = ('ort.webgpu.min.mjs', f'{_WASM}.asyncify.mjs', f'{_WASM}.asyncify.wasm')
_MAX_ATTENTION = 16 << 20  # numbers; a browser gets all of them
# What browsers read by themselves.
_EXAMPLES = {'JPEG': '.jpg', 'PNG': '.png', 'WEBP': '.webp', 'GIF': '.gif', 'AVIF': '.avif'}


def write(
    destination: str | os.PathLike[str],
    model: model_folder.Model,
    *,
    dtype: str = 'int8',
    title: str = '',
    examples: Sequence[str | os.PathLike[str]] = (),
    webgpu: bool = False,
    runtime: str | os.PathLike[str] = '',
    console: rich.console.Console | None = None,
) -> int:
    """Writes the page of a model, verified as an export is.

    Args:
        destination: a folder; must not exist. It appears when it is complete.
        model: what `model_folder.load` gives, with a head, for images of 3 channels.
        dtype: of the weights, see `Options.dtype`.
        title: what the page is called; default the name of the model.
        examples: photos that are shown on the page to try it with.
        webgpu: also take the runtime for WebGPU (27 MB), which a browser with an adapter loads.
        runtime: the file of npm's package of ONNX Runtime Web; default the one in the cache, which
            npm downloads once.
        console: for what happens; by default none of it is shown.

    Returns:
        Bytes that a browser without WebGPU loads before the first answer.

    Raises:
        UserError: the model has no classes or other channels, is not the same as ONNX, an example
            is no image, or the runtime cannot be had.
    """
    if not model.class_names:
        raise UserError('this model has no classes to show')
    if model.channels != 3:
        raise UserError(f'this model takes {model.channels} channels, and a browser gives 3')
    kept = [_example(path) for path in examples]
    names = (*_RUNTIME_FILES, *(_WEBGPU_FILES if webgpu else ()))
    package = pathlib.Path(runtime) if runtime else fetch_runtime()
    grid = _grid(model)
    options = Options(dtype=dtype, probabilities=True, attention=grid is not None)
    named = title or str(model.model_config.get('model_name') or 'Image classifier')
    with files.atomic_folder(destination) as folder:
        formats.export(
            model, folder / 'model.onnx', format='onnx', options=options, console=console
        )
        (folder / f'model.onnx{REPORT_SUFFIX}').unlink()  # it is shown, and not for visitors
        _unpack(package, folder, names)
        pages = pathlib.Path(__file__).with_name('page')
        for page in sorted(pages.iterdir()):
            shutil.copyfile(page, folder / page.name)
        for index, (content, suffix) in enumerate(kept, 1):
            (folder / f'example{index}{suffix}').write_bytes(content)
        about = {
            'title': named,
            'class_names': list(model.class_names),
            'preprocessing': dataclasses.asdict(model.preprocess),
            'attention': grid is not None,
            'grid': grid or (0, 0),
            'prefix': variants.prefix_tokens(model.model_config),
            'class_token': getattr(model.model, 'reads_class_token', False),
            'examples': [f'example{i}{suffix}' for i, (_, suffix) in enumerate(kept, 1)],
            'webgpu': webgpu,
            'footer': f'Made by vit_jax {vit_jax.__version__}; {RUNTIME} {RUNTIME_VERSION}, under '
            'the MIT licence (LICENSE.onnxruntime-web.txt).',
        }
        (folder / 'model.json').write_text(json.dumps(about, ensure_ascii=False), 'utf-8')
        first = ['model.onnx', 'model.json', *_RUNTIME_FILES]
        first += [page.name for page in pages.iterdir()]
        return sum((folder / name).stat().st_size for name in first)


def _grid(model: model_folder.Model) -> tuple[int, int] | None:
    """(rows, columns) of the patches, where the page can show the attention to them."""
    config = model.model_config
    if variants.is_mixer(config) or config.get('distilled'):
        return None
    rows, columns = variants.token_grid(config, model.preprocess.crop)
    encoder = config['transformer']
    tokens = rows * columns + variants.prefix_tokens(config)
    numbers = encoder['num_layers'] * encoder['num_heads'] * tokens**2
    return (rows, columns) if numbers <= _MAX_ATTENTION else None


def _example(path: str | os.PathLike[str]) -> tuple[bytes, str]:
    """Content and suffix of a photo."""
    try:
        content = files.expand(path).read_bytes()
        picture = image_files.open_image(content)
        picture.load()
    except Exception as error:  # nearly any, of Pillow
        raise UserError(f'{path} is not an image that can be shown: {error}') from error
    if picture.format not in _EXAMPLES:
        raise UserError(f'{path} is {picture.format}; browsers read {", ".join(_EXAMPLES)}')
    return content, _EXAMPLES[picture.format]


def fetch_runtime() -> pathlib.Path:
    """The package of ONNX Runtime Web, in the cache; npm downloads it the first time.

    Raises:
        UserError: there is no npm, it fails, or what it brings is another package.
    """
    name = f'{RUNTIME}-{RUNTIME_VERSION}.tgz'
    path = remote.cache_folder() / 'npm' / name
    if path.is_file():
        return path
    if shutil.which('npm') is None:
        raise UserError(
            f'{RUNTIME} {RUNTIME_VERSION} comes from npm, which is not installed: install Node.js, '
            f'or give the file {name} with --runtime'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = ['npm', 'pack', f'{RUNTIME}@{RUNTIME_VERSION}', '--pack-destination', folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        made = pathlib.Path(folder, name)
        if done.returncode or not made.is_file():
            said = ' '.join(done.stderr.split())[-300:]
            raise UserError(
                f'npm could not download {RUNTIME} {RUNTIME_VERSION} ({said}): try again with a '
                f'network, or give the file {name} with --runtime'
            )
        _check_integrity(made)
        os.replace(made, path)
    return path


def _check_integrity(package: pathlib.Path) -> None:
    try:
        digest = hashlib.sha512(package.read_bytes()).digest()
    except OSError as error:
        raise UserError(f'--runtime {package} cannot be read ({error.strerror})') from error
    if base64.b64encode(digest).decode() != _INTEGRITY:
        raise UserError(
            f"{package} is not npm's package {RUNTIME} {RUNTIME_VERSION} (its SHA-512 differs); "
            'remove it, and it is downloaded again'
        )


def _unpack(package: pathlib.Path, folder: pathlib.Path, names: Sequence[str]) -> None:
    """Takes these files out of the package."""
    _check_integrity(package)
    with tarfile.open(package) as archive:
        for name in names:
            source = archive.extractfile(f'package/dist/{name}')
            assert source is not None  # the package is known
            with source, open(folder / name, 'wb') as target:
                shutil.copyfileobj(source, target)
