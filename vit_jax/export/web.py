"""A page on which anybody can try a model: a folder of static files, computed in the browser.

ONNX Runtime Web runs the model, and tokenizers.js divides texts. The page's own files are in
`page/`; the packages come from npm, at the versions below, and are kept in the cache of downloads.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import rich.console

import vit_jax
from vit_jax import files, variants
from vit_jax.data import image_files
from vit_jax.errors import UserError
from vit_jax.export import formats, npm, page_tokenizer, tower
from vit_jax.export.options import REPORT_SUFFIX, Options
from vit_jax.inference import class_texts, model_folder, two_tower

RUNTIME = npm.Package(
    'onnxruntime-web',
    '1.30.0',
    'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==',
    '--runtime',
)
TOKENIZERS = npm.Package(
    '@huggingface/tokenizers',
    '0.2.0',
    'LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==',
)
_WASM = 'ort-wasm-simd-threaded'
_RUNTIME_FILES = ('ort.wasm.min.mjs', f'{_WASM}.mjs', f'{_WASM}.wasm')
_WEBGPU_FILES = ('ort.webgpu.min.mjs', f'{_WASM}.asyncify.mjs', f'{_WASM}.asyncify.wasm')
_TOKENIZERS_FILES = {
    'dist/tokenizers.min.mjs': 'tokenizers.min.mjs',
    'LICENSE': 'LICENSE.tokenizers.txt',
}
_PAGE = pathlib.Path(__file__).with_name('page')
_OF_TEXTS = ('texts.js', 'tokenizer.js')  # files of the page for a model with a text tower
_MAX_ATTENTION = 16 << 20  # numbers; a browser gets all of them
# What browsers read by themselves.
_EXAMPLES = {'JPEG': '.jpg', 'PNG': '.png', 'WEBP': '.webp', 'GIF': '.gif', 'AVIF': '.avif'}


def write(
    destination: str | os.PathLike[str],
    model: model_folder.Model | two_tower.TwoTowers,
    *,
    dtype: str = 'int8',
    title: str = '',
    examples: Sequence[str | os.PathLike[str]] = (),
    classes: Sequence[str] = (),
    webgpu: bool = False,
    runtime: str | os.PathLike[str] = '',
    console: rich.console.Console | None = None,
) -> int:
    """Writes the page of a model, verified as an export is.

    Args:
        destination: a folder; must not exist. It appears when it is complete.
        model: what `model_folder.load` gives, with a head, for images of 3 channels; or what
            `two_tower.load` gives: then visitors type classes, and what to search for.
        dtype: of the weights; the page computes in float32, see `Options.weights_only`.
        title: what the page is called; default the name of the model.
        examples: photos that are shown on the page to try it with.
        classes: of a two-tower model, those that the page begins with.
        webgpu: also take the runtime for WebGPU (27 MB), which a browser with an adapter loads.
        runtime: the file of npm's package of ONNX Runtime Web; default the one in the cache, which
            npm downloads once.
        console: for what happens; by default none of it is shown.

    Returns:
        Bytes that a browser without WebGPU loads before the first answer.

    Raises:
        UserError: the model has no classes or other channels, is not the same as ONNX, has a
            tokenizer that the page has not, an example is no image, or a package cannot be had.
    """
    towers = model if isinstance(model, two_tower.TwoTowers) else None
    image = two_tower.image_tower(model) if isinstance(model, two_tower.TwoTowers) else model
    if not image.class_names and not towers:
        raise UserError('this model has no classes to show')
    if classes and not towers:
        raise UserError('this model has classes of its own: no --classes')
    if image.channels != 3:
        raise UserError(f'this model takes {image.channels} channels, and a browser gives 3')
    kept = [_example(path) for path in examples]
    package = pathlib.Path(runtime) if runtime else RUNTIME.fetch()
    told = page_tokenizer.describe(towers.tokenizer) if towers else None
    grid = _grid(image)
    weights = {'dtype': dtype, 'weights_only': dtype != 'float32'}
    settings: dict[str, Any] = {'attention': grid is not None, **weights}
    options = Options(**settings, probabilities=not towers, features=bool(towers))
    with files.atomic_folder(destination) as folder:
        _export(image, towers, folder, options, console)
        names = (*_RUNTIME_FILES, *(_WEBGPU_FILES if webgpu else ()))
        RUNTIME.unpack(package, folder, {f'dist/{name}': name for name in names})
        pages = sorted(p.name for p in _PAGE.iterdir() if towers or p.name not in _OF_TEXTS)
        for name in pages:
            shutil.copyfile(_PAGE / name, folder / name)
        first = ['model.onnx', 'model.json', *_RUNTIME_FILES, *pages]
        if towers:
            TOKENIZERS.unpack(TOKENIZERS.fetch(), folder, _TOKENIZERS_FILES)
            (folder / 'tokenizer.json').write_text(json.dumps(told), 'utf-8')
            first += ['text.onnx', 'tokenizer.json', 'tokenizers.min.mjs']
        for index, (content, suffix) in enumerate(kept, 1):
            (folder / f'example{index}{suffix}').write_bytes(content)
        shown = [f'example{i}{suffix}' for i, (_, suffix) in enumerate(kept, 1)]
        about = {
            'title': title or _name(image, towers),
            'class_names': list(image.class_names),
            'preprocessing': dataclasses.asdict(image.preprocess),
            'attention': grid is not None,
            'grid': grid or (0, 0),
            'prefix': variants.prefix_tokens(image.model_config),
            'class_token': getattr(image.model, 'reads_class_token', False),
            'examples': shown,
            'webgpu': webgpu,
            'towers': _towers(towers, classes),
            'footer': _footer(towers is not None),
        }
        (folder / 'model.json').write_text(json.dumps(about, ensure_ascii=False), 'utf-8')
        return sum((folder / name).stat().st_size for name in first)


def _name(model: model_folder.Model, towers: two_tower.TwoTowers | None) -> str:
    """What a page is called that was given no title."""
    named = towers.model.model_name if towers else model.model_config.get('model_name')
    return str(named or ('Photos and texts' if towers else 'Image classifier'))


def _towers(towers: two_tower.TwoTowers | None, classes: Sequence[str]) -> dict[str, Any] | None:
    """What the page has to know of a two-tower model."""
    if towers is None:
        return None
    return {
        'temperature': towers.temperature,
        'bias': towers.bias,
        'prompt': class_texts.PROMPTS[0],
        'classes': list(classes),
    }


def _footer(texts: bool) -> str:
    told = (
        f'Made by vit_jax {vit_jax.__version__}; {RUNTIME.name} {RUNTIME.version}, under the MIT '
        'licence (LICENSE.onnxruntime-web.txt)'
    )
    if texts:
        told += (
            f'; {TOKENIZERS.name} {TOKENIZERS.version}, under the Apache licence '
            '(LICENSE.tokenizers.txt)'
        )
    return f'{told}.'


def _export(
    model: model_folder.Model,
    towers: two_tower.TwoTowers | None,
    folder: pathlib.Path,
    options: Options,
    console: rich.console.Console | None,
) -> None:
    """Writes model.onnx, and of a two-tower model text.onnx, both verified as they are run."""
    parts = {'image': (folder / 'model.onnx', options)}
    if towers:
        text = Options(dtype=options.dtype, weights_only=options.weights_only)
        parts['text'] = (folder / 'text.onnx', text)
    for name, (path, chosen) in parts.items():
        how: dict[str, Any] = {
            'format': 'onnx',
            'options': chosen,
            'console': console,
        }
        if towers:
            tower.export(towers, path, tower=name, **how)
        else:
            formats.export(model, path, **how)
        path.with_name(f'{path.name}{REPORT_SUFFIX}').unlink()  # it is shown, not for visitors
    for vocabulary in folder.glob('text.onnx.*'):
        vocabulary.unlink()  # the page has its own form of it


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
