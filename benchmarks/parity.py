"""Our models beside PyTorch's: same weights, same images, number by number.

The comparison of scripts/check_parity.py; `vit_jax.analysis.compare` has its limits.
"""

import collections
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
import torch

from benchmarks import torch_libraries, torch_reference
from vit_jax import files, models, variants
from vit_jax.analysis import compare
from vit_jax.checkpoint import library_configs, npz
from vit_jax.data.batches import eval_batches
from vit_jax.data.normalization import Normalization
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.export import expressible
from vit_jax.inference import model_folder, predict
from vit_jax.variants import in_words

_TOKENS = re.compile(r'(?:Transformer/)?((?:encoderblock|MixerBlock)_\d+)/tokens')

Outputs = Mapping[str, np.ndarray]
Run = Callable[[np.ndarray], Outputs]


def check(
    model: str,
    *,
    images: Sequence[str] = (),
    limit: int = 0,
    variant: str = '',
    num_heads: int = 0,
    tolerance: float | None = None,
    reference: str = 'auto',
    perturb: str = '',
    batch: int = 4,
    normalization: Normalization | None = None,
    pixels: Mapping[str, Any] | None = None,
    ours: model_folder.Model | None = None,
    say: Callable[[Any], None] = print,
) -> dict[str, Any]:
    """Compares a model with PyTorch.

    Args:
        model: model folder, file of weights, or name of a released checkpoint.
        images: image files and folders of them; default 8 made-up ones.
        limit: how many of them to use at most; 0 for all.
        variant: architecture of a file, where its arrays do not tell.
        num_heads: see `model_folder.load`.
        tolerance: how far logits may differ; default see `compare.parity_verdict`.
        reference: 'transformers', 'torch_reference', 'timm', or 'auto'.
        perturb: array that is 1 % larger on the PyTorch side, so that the check fails.
        batch: images at once.
        normalization: see `model_folder.load`.
        pixels: see `model_folder.load`.
        ours: what is compared in place of `model` as this package loads it (for a self-test).
        say: shows a line to the user.

    Returns:
        What was found, as JSON; 'passed' says whether the logits agree.

    Raises:
        UserError: no comparison was possible.
    """
    opened = ours or model_folder.load(
        model, variant=variant, num_heads=num_heads, normalization=normalization, pixels=pixels
    )
    path = files.expand(model)
    if not path.exists():  # a released name, whose file was downloaded
        path = pathlib.Path(opened.source['file'])
    weights, reader = _reference_weights(path, opened)
    library = '' if perturb else _library_of(path)
    if perturb:
        weights = _perturb(weights, perturb)
    elif library and reference in ('auto', library):
        reader = f'by {library} itself, with the settings in {path / "config.json"}'
    zero_head = compare.zero_head(opened.params)
    batches, described = _images(opened, images, limit, batch)
    found = {
        'model': str(path),
        'variant': opened.model_config.get('model_name'),
        'num_parameters': sum(leaf.size for leaf in jax.tree.leaves(opened.params)),
        'image_size': opened.image_size,
        'images': described,
        'weights_read': reader,
        'perturbed': perturb or None,
        'zero_head': zero_head,
        'notes': list(opened.source.get('notes', ())),
    }
    _introduce(found, say)
    mine = [layers_of(opened.model, opened.params, t) for t in (np.float32, np.float64)]
    results = []
    if library and reference in ('auto', library):
        references = [_of_folder(library, path, normalization)]
    else:
        references = _references(reference, opened, weights)
    for title, make in references:
        title = f'{title}, PyTorch {torch.__version__}'
        say(f'\nReference: {title}')
        try:
            theirs = [_runner(make(), t) for t in (torch.float32, torch.float64)]
            erf = None
            if isinstance(make, functools.partial) and make.keywords.get('act') == 'gelu_tanh':
                erf = _runner(make(act='gelu'), torch.float32)
        except (KeyError, ValueError, RuntimeError, OSError) as e:
            raise UserError(f'{path}: {title} cannot be built with these weights: {e}') from e
        try:
            rows, erf_rows = _compare(batches(), mine, theirs, erf)
        except (ValueError, RuntimeError, AssertionError) as e:
            raise UserError(f'{path}: {title} does not take our input or output: {e}') from e
        verdict = compare.parity_verdict(rows, zero_head=zero_head, tolerance=tolerance)
        results.append(_report(title, rows, verdict, erf_rows.get(verdict.output), say))
    return found | {'references': results, 'passed': all(r['passed'] for r in results)}


def _introduce(found: Mapping[str, Any], say: Callable[[Any], None]) -> None:
    """Says what is compared."""
    say(
        f'{found["variant"] or "a model of no known variant"}, {found["num_parameters"]:,} '
        f'parameters, {in_words(found["image_size"])} px: {found["model"]}'
    )
    say(f'PyTorch reads the weights {found["weights_read"]}')
    for note in found['notes']:
        say(f'  {note}')
    say(found['images'])
    if found['perturbed']:
        say(f'{found["perturbed"]} is 1 % larger on the PyTorch side: the check should fail')
    if found['zero_head']:
        say(
            'The head is all zeros, as in weights for fine-tuning only: all logits are 0 and prove '
            'nothing. The final features (pre_logits) are compared'
        )


def _report(
    title: str,
    rows: Mapping[str, compare.ParityRow],
    verdict: compare.Verdict,
    erf: compare.Difference | None,
    say: Callable[[Any], None],
) -> dict[str, Any]:
    """Shows the comparison with one reference; returns it for JSON."""
    say(_table(rows))
    if erf is not None:
        times = ''
        if verdict.passed and verdict.difference:
            times = f', {erf.max / verdict.difference:.0f} times as much'
        say(
            f"With PyTorch's default erf GELU instead of tanh, its {verdict.output} would differ "
            f'by {erf.max:.1e} (mean {erf.mean:.1e}){times}; argmax agrees in {erf.agree} of '
            f'{erf.vectors}'
        )
    say(verdict)
    return {
        'name': title,
        'passed': verdict.passed,
        'verdict': dataclasses.asdict(verdict) | {'text': str(verdict)},
        'rows': {key: row.to_dict() for key, row in rows.items()},
        'erf_gelu': erf and erf.to_dict(),
    }


def _compare(
    batches: Iterator[np.ndarray], ours: Sequence[Run], theirs: Sequence[Run], erf: Run | None
) -> tuple[dict[str, compare.ParityRow], dict[str, compare.Difference]]:
    """The rows of two sides, each in float32 and float64; and PyTorch with erf GELU from tanh."""
    rows = collections.defaultdict[str, compare.ParityRow](compare.ParityRow)
    erf_rows = collections.defaultdict[str, compare.Difference](compare.Difference)
    for pixels in batches:
        mine, mine64, other, other64 = (run(pixels) for run in (*ours, *theirs))
        for key, array in other.items():
            rows[key].add(mine[key], array, mine64[key], other64[key])
        if erf is not None:
            for key, array in erf(pixels).items():
                if key in ('logits', 'pre_logits'):
                    erf_rows[key].add(array, other[key])
    return dict(rows), dict(erf_rows)


def layers_of(model: Any, params: Mapping[str, Any], dtype: Any = np.float32) -> Run:
    """A function that computes what is compared.

    Args:
        model: a Flax module of `vit_jax.models`; its own dtype does not matter.
        params: its parameters, nested dict of arrays.
        dtype: float32 or float64, see `compare.compiled`.

    Returns:
        A function of images [B, height, width, 3] in [-1, 1] that returns 'resnet' (of hybrids) [B,
        h, w, F], 'patch_embedding' [B, N, D], the tokens after each block ('encoderblock_0' or
        'MixerBlock_0', ...) [B, N, D], 'pre_logits' (what the head reads) and, if there is a head,
        'logits', all of `dtype`.
    """
    model = model.clone(dtype=np.dtype(dtype))

    def compute(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        logits, found = models.apply_with_intermediates(model, params, images)
        patches = found['patch_embedding']
        outputs = {'patch_embedding': patches.reshape(len(patches), -1, patches.shape[-1])}
        outputs |= {name: found[name] for name in ('resnet', 'pre_logits') if name in found}
        outputs |= {m[1]: found[name] for name in found if (m := _TOKENS.fullmatch(name))}
        return outputs | ({'logits': logits} if model.num_classes else {})

    return compare.compiled(compute, params, dtype)


def made_up_images(
    count: int, size: int | tuple[int, int], seed: int = 0, channels: int = 3
) -> np.ndarray:
    """Random images with coarse and fine structure that fill the range of values.

    Args:
        count: number of images.
        size: side, or (height, width), pixels.
        seed: any integer; the same gives the same images.
        channels: of the images.

    Returns:
        float32 [count, height, width, channels] in [-1, 1], multiples of a grey level apart.
    """
    rng = np.random.default_rng(seed)
    areas = rng.uniform(0, 255, (count, 7, 7, channels))
    height, width = variants.sides(size)
    rows, columns = (np.arange(side) * 7 // side for side in (height, width))
    pixels = areas[:, rows][:, :, columns] + rng.normal(0, 30, (count, height, width, channels))
    return normalize(np.clip(np.rint(pixels), 0, 255).astype(np.float32))


def _images(
    model: model_folder.Model, paths: Sequence[str], limit: int, batch: int
) -> tuple[Callable[[], Iterator[np.ndarray]], str]:
    """A function that gives batches of inputs, [B, size, size, 3] in [-1, 1], and their name."""
    found = predict.find_images(paths)[: limit or None] if paths else []
    count = len(found) if paths else limit or 8

    def batches() -> Iterator[np.ndarray]:
        if paths:
            source = predict.Images(found, model.channels)
            for data in eval_batches(source, model.preprocess, batch=batch):
                yield normalize(data['image'][data['readable']])
            return
        made_up = made_up_images(count, model.preprocess.size, channels=model.channels)
        yield from (made_up[first : first + batch] for first in range(0, count, batch))

    kind = f'images from {" ".join(paths)}' if paths else 'made-up images'
    height, width = model.preprocess.size
    return batches, f'{count} {kind}, {height} x {width} pixels'


def _reference_weights(path: pathlib.Path, model: model_folder.Model) -> tuple[Outputs, str]:
    """The weights under published names, and how they were read."""
    file = path / 'params.npz' if path.is_dir() else path
    if file.suffix == '.npz' and file.is_file():
        weights = torch_reference.read_weights(file)
        if any(name in weights for name in ('head/bias', 'embedding/bias', 'stem/bias')):
            return weights, 'from the file, by code of its own'
    weights = {k: np.asarray(v) for k, v in npz.flatten(npz.to_published(model.params)).items()}
    return weights, 'as vit_jax read them (only the computation is compared, not the reading)'


def _library_of(path: pathlib.Path) -> str:
    """The library whose folder it is, and which so runs it: 'transformers', 'timm' or ''."""
    if not (path / 'config.json').is_file() or (path / model_folder.MODEL_FILE).is_file():
        return ''
    config = files.read_json(path / 'config.json')
    return 'timm' if 'architecture' in config else 'transformers' if 'model_type' in config else ''


def _perturb(weights: Outputs, name: str) -> Outputs:
    # A file may number modules in the published way, while vit_jax inspect_checkpoint shows
    # Linen's names.
    keys = flax.traverse_util.unflatten_dict({key: key for key in weights}, sep='/')
    name = npz.flatten(npz.to_linen(keys)).get(name, name)
    if name not in weights:
        near = difflib.get_close_matches(name, weights, n=3, cutoff=0.0)
        raise UserError(f'--perturb: there is no array {name}; nearest: {", ".join(near)}')
    if not weights[name].any():
        raise UserError(f'--perturb: {name} is all zeros, so 1 % of it is nothing; name another')
    return {**weights, name: weights[name] * np.float32(1.01)}


def _references(
    chosen: str, model: model_folder.Model, weights: Outputs
) -> list[tuple[str, Callable[..., torch.nn.Module]]]:
    """(name, what makes it) of each implementation to compare with, of weights alone.

    They are told what our model was told: activation, epsilon and pooling.
    """
    _check_pieces(model.model_config)
    classifier, size = model.model_config.get('classifier', ''), model.preprocess.size
    settings = {name: getattr(model.model, name) for name in ('act', 'layer_norm_eps')}
    pooler = {'representation_act': getattr(model.model, 'representation_act', 'tanh')}
    special = ('conv_root/kernel', 'dist', 'head_hidden/kernel', 'fc_norm/scale')
    is_plain = classifier == 'token' and not any(name in weights for name in special)
    if chosen == 'transformers' and not is_plain:
        raise UserError('--reference: transformers has only Vision Transformers with a class token')
    timm_name = torch_libraries.timm_name(model.model_config.get('model_name') or '')
    if 'pre_logits/bias' in weights or settings['layer_norm_eps'] != 1e-6:
        timm_name = ''
    if chosen == 'timm' and not timm_name:
        raise UserError('--reference: timm has no such model')

    found: list[tuple[str, Callable[..., torch.nn.Module]]] = []
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
    library = _library('transformers', chosen) if is_plain else None
    more: dict[str, Any] = settings | pooler
    if library:
        make = functools.partial(torch_libraries.transformers_model, weights, size, **more)
        found.append((f'ViT of transformers {library.__version__}', make))
    elif chosen in ('auto', 'torch_reference'):
        more |= {'classifier': classifier, 'image_size': size}
        make_ours = functools.partial(torch_reference.build, weights, **more)
        found.append(('benchmarks/torch_reference.py', make_ours))
    if timm_name and (library := _library('timm', chosen)):
        make_timm = functools.partial(
            torch_libraries.timm_model, timm_name, weights, size, act=settings['act']
        )
        found.append((f'{timm_name} of timm {library.__version__}', make_timm))
    return found


def _check_pieces(config: Mapping[str, Any]) -> None:
    """Refuses what no implementation of weights alone has, and arrays may not tell."""
    found = {} if variants.is_mixer(config) else expressible.pieces(config)
    lacking = ('rotary', 'mlp_norm', 'attention_norm', 'qkv_bias', 'add_position_embedding')
    if words := [found[name] for name in lacking if name in found]:
        raise UserError(
            f'nothing in PyTorch here has {", ".join(words)}, of weights alone: write them for '
            'timm or Hugging Face (vit_jax convert MODEL FOLDER --to timm), and check that folder'
        )


def _of_folder(
    name: str, folder: pathlib.Path, normalization: Normalization | None
) -> tuple[str, Callable[..., torch.nn.Module]]:
    """The library whose folder it is, and what loads the model: for input in [-1, 1].

    Args:
        name: of the library.
        folder: that it loads.
        normalization: that the caller says; it counts where the folder tells none.
    """
    title = f'{name} {_library(name, name).__version__}'
    if name == 'timm':
        return title, lambda: torch_libraries.timm_folder(folder)
    assumed = normalization or library_configs.read(folder)['input'].normalization
    return title, lambda: torch_libraries.transformers_folder(folder, assumed)


def _library(name: str, chosen: str) -> Any:
    """The library, or None if it is not chosen or installed; an error if it was chosen by name."""
    if chosen not in ('auto', name):
        return None
    if importlib.util.find_spec(name) is None:
        if chosen == name:
            raise UserError(f'--reference: {name} is not installed: pip install {name}')
        return None
    try:
        return importlib.import_module(name)
    except Exception as e:  # an installation that does not fit PyTorch's fails in any way it likes
        if chosen == name:
            raise UserError(f'--reference: {name} is installed but cannot be imported: {e}') from e
        print(f'{name} is installed but cannot be imported ({e}); left out', file=sys.stderr)
        return None


def _runner(module: torch.nn.Module, dtype: torch.dtype) -> Run:
    module = module.to(dtype)

    def run(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(images).to(dtype))
        return {name: output.numpy() for name, output in outputs.items()}

    return run


def _table(rows: Mapping[str, compare.ParityRow]) -> str:
    """The rows as text, a line each."""
    lines = [
        f'{"":16} {"largest":>8} | {"ours - PyTorch, float32":^26} | {"from own float64":^19} '
        f'| {"both in":^9}',
        f'{"":16} {"value":>8} | {"max":>8} {"mean":>8} {"argmax":>8} | {"ours":>9} {"PyTorch":>9} '
        f'| {"float64":>9}',
    ]
    for name, row in rows.items():
        same = row.float32
        mark = '' if row.is_rounding else '  more than rounding'
        lines.append(
            f'{name:16} {row.float64.largest:8.3g} | {same.max:8.1e} {same.mean:8.1e} '
            f'{100 * same.agree / same.vectors:7.5g}% | {row.ours.max:9.1e} {row.theirs.max:9.1e} '
            f'| {row.float64.max:9.1e}{mark}'
        )
    return '\n'.join(lines)
