"""One way in for every kind of weights: recognises what it is given and says so."""

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.checkpoint import (
    adapt,
    big_vision,
    download,
    eva_names,
    infer,
    key_tables,
    library_configs,
    model_input,
    npz,
    open_clip_configs,
    state_dicts,
    tensors,
)
from vit_jax.checkpoint.arrays import Weights, derive
from vit_jax.checkpoint.library_configs import DEFAULTS
from vit_jax.checkpoint.model_input import ModelInput
from vit_jax.data.normalization import HALF, IMAGENET, Normalization
from vit_jax.errors import UserError, printable

_log = logging.getLogger(__name__)

__all__ = ['HALF', 'IMAGENET', 'Normalization', 'load', 'load_pretrained', 'open_weights']

# What PyTorch files do not tell: heads by width. Nearly all models have these.
_HEADS = {
    **{width: width // 64 for width in (128, 192, 256, 320, 384, 512, 640, 768, 832, 896, 1024)},
    **dict.fromkeys((1152, 1280, 1408, 1664), 16),
    1536: 24,
    4096: 32,
}

_NO_INPUT_NOTE = (
    'taken as made for input in [-1, 1] and whole images, squashed: a file without configuration '
    "does not tell. DeiT's, DINO's, MAE's and torchvision's own weights are made for ImageNet's "
    'mean and deviation: --normalization imagenet (normalization=IMAGENET)'
)


def load(
    path: str | os.PathLike[str],
    *,
    variant: str = '',
    num_heads: int = 0,
    normalization: Normalization | None = None,
) -> dict[str, Any]:
    """Loads weights of any known kind, and logs (INFO) what they were recognised as.

    Args:
        path: file or folder; see `open_weights`, also for the other arguments.
        variant: name from `models.variants.VARIANTS`.
        num_heads: number of attention heads.
        normalization: (mean, standard deviation) that the model was trained with.

    Returns:
        Nested dict with Linen names of float32 NumPy arrays.

    Raises:
        UserError: see `open_weights`; also for damaged arrays, NaN and infinity.
    """
    weights = open_weights(path, variant=variant, num_heads=num_heads, normalization=normalization)
    _log.info('%s', weights)
    return weights.read()


def load_pretrained(
    *,
    pretrained_path: str | os.PathLike[str],
    init_params: Mapping[str, Any],
    model_config: Mapping[str, Any],
    keep_head: bool = False,
    grid: adapt.Grid | None = None,
    image_size: int | tuple[int, int] | None = None,
    source_grid: adapt.Grid | None = None,
    allow_new: Sequence[str] = (),
    patch_resize: str = 'pseudo-inverse',
) -> Mapping[str, Any]:
    """Loads a released checkpoint for fine-tuning, as the original release's function of this name.

    The head is always newly initialised, also where the classes agree (`keep_head` keeps one that
    fits), `pre_logits` is kept only if the model has it, position embeddings are resized. What was
    loaded, resized, newly initialised and ignored, and which grids of tokens were assumed, is
    logged (INFO); `adapt.adapt` returns it.

    Parameters tell how many tokens a model has, not in how many rows: for images that are not
    square give `image_size` or `grid`. Without, a square is assumed, and the report says so.

    Args:
        pretrained_path: weights of any kind that `load` knows.
        init_params: the model's newly initialised parameters (nested dict of arrays).
        model_config: the model's config, a dict or ConfigDict; 'classifier' is read ('token' if it
            is not there).
        keep_head: take the checkpoint's head if it fits.
        grid: (rows, columns) of the model's tokens. Without effect where there are no position
            embeddings (Mixers), as the other two.
        image_size: the same, told as (height, width) of the model's images in pixels, or the side
            of square ones.
        source_grid: (rows, columns) of the checkpoint's tokens, where its images were not square.
        allow_new: what names of parameters begin with that the checkpoint need not have, and that
            keep their initial values ('Transformer/registers'); * stands for anything ('*/lora_a').
        patch_resize: see `adapt.adapt`.

    Returns:
        Parameters with the structure, shapes and dtypes of `init_params`.

    Raises:
        UserError: the file cannot be read, its arrays do not fit the model (all that do not are
            listed), or the grid of tokens is not square and was not given.
    """
    if image_size is not None:
        if grid is not None:
            raise UserError(f'grid={grid} and image_size={image_size} say the same: give one')
        grid = infer.token_grid(init_params, image_size)
    params, report = adapt.adapt(
        load(pretrained_path),
        init_params,
        classifier=model_config.get('classifier', 'token'),
        keep_head=keep_head,
        source=os.fspath(pretrained_path),
        grid=grid,
        source_grid=source_grid,
        allow_new=allow_new,
        patch_resize=patch_resize,
    )
    _log.info('%s', report)
    return params


def open_weights(
    path: str | os.PathLike[str],
    *,
    variant: str = '',
    num_heads: int = 0,
    normalization: Normalization | None = None,
) -> Weights:
    """Recognises weights; their arrays are read later, one by one.

    - `.npz`: Google's (published or Linen names) and big_vision's.
    - `.safetensors`, `.pth` (`.pt`, `.bin`): state dicts of timm (ViT, hybrids, Mixer, DeiT),
      Hugging Face (ViT and DeiT, names before and since version 5) and torchvision.
    - a folder of Hugging Face or timm (config.json and weights, in one file or in shards), or of
      open_clip (open_clip_config.json; the image tower is read). Its configuration gives heads,
      class names and normalisation; a normalisation other than this package's (to [-1, 1]) is
      folded into the patch embedding.

    Args:
        path: file or folder.
        variant: name from `models.variants.VARIANTS`, for the number of heads where neither file
            nor width tells it.
        num_heads: the same as a number. Where the file tells it, another one is an error.
        normalization: (mean, standard deviation) of red, green and blue that the model was trained
            with, in [0, 1], where no configuration tells: `IMAGENET` for DeiT and torchvision's own
            weights. Default: what the folder says, else `HALF`.

    Returns:
        The weights; `str` of it says what they are.

    Raises:
        UserError: not there, of no known kind, damaged, or of a model that is not here.
    """
    path = files.expand(path)
    config: dict[str, Any] = {}
    if path.is_dir():
        if open_clip_configs.is_folder(path):
            config = open_clip_configs.read(path)
        elif not (path / 'config.json').is_file():
            tensors.check_folder(path)
            raise UserError(
                f'{path} is a folder without config.json; expected a checkpoint file, or a folder '
                'of Hugging Face, timm or open_clip'
            )
        else:
            config = library_configs.read(path)
        paths = tensors.find_in_folder(path)
    else:
        npz.check_exists(path)
        paths = [path]
        if tensors.kind(path) == 'npz':
            weights = _with_source(npz.open_file(path), path)
            return _normalize(weights, normalization) if normalization else weights
    found: dict[str, Any] = {}
    for file in paths:
        arrays, metadata, done = tensors.open_tensors(file)
        found |= arrays
    for theirs, ours in config.get('renamed', {}).items():
        found = {re.sub(f'^{re.escape(theirs)}', ours, name): found[name] for name in found}
    found, cleaned = state_dicts.clean(found, path)
    ours = library_configs.from_metadata(metadata)
    config = {**ours, **config}
    if ours and config['input'] != ours['input']:
        config['input'] = model_input.exact(config['input'], ours['input'])
    weights = _recognise(path, found, variant, num_heads, config)
    told = config.get('input', ModelInput())
    notes = told.notes
    if not (normalization or told.normalization or '/' in next(iter(found))):
        notes = (*notes, _NO_INPUT_NOTE)
    weights = dataclasses.replace(
        weights,
        image_size=told.image_size,
        preprocess=told.preprocess,
        refused=told.refused,
        resizes=told.resizes,
        notes=(*done, *cleaned, *weights.notes, *notes),
    )
    weights = _with_source(weights, path)
    return _normalize(weights, normalization or told.normalization or HALF)


def _with_source(weights: Weights, path: pathlib.Path) -> Weights:
    """Adds the note where a file was downloaded from, if it was."""
    source = download.source_of(path)
    return dataclasses.replace(weights, notes=(*weights.notes, source)) if source else weights


def _recognise(
    path: pathlib.Path,
    found: Mapping[str, Any],
    variant: str,
    num_heads: int,
    config: Mapping[str, Any],
) -> Weights:
    library = key_tables.recognise(found)
    if not library:
        if any('/' in name for name in found):
            return npz.from_flat(found, path)
        some = ', '.join(list(found)[:4])
        raise UserError(
            f'{path} is of no known kind: {len(found)} tensors ({some}, ...). Known: Google and '
            'big_vision .npz; ViT, hybrid, Mixer and DeiT of timm, Hugging Face and torchvision'
        )
    stated = config.get('num_heads', 0) or eva_names.num_heads(found)
    heads, said = _heads(path, library, found, variant, num_heads, stated)
    flat, notes = key_tables.to_params(found, library, heads, path)
    notes += said
    assumed = [] if variant or num_heads else said
    tree = npz.nest(flat, path)
    size = config['input'].image_size if 'input' in config else 0
    grid = infer.token_grid(tree, size) if size and 'embedding' in tree else None
    notes += big_vision.with_class_position(tree, grid)
    settings = config.get('settings')
    if settings is None:
        settings = next(DEFAULTS[name] for name in DEFAULTS if library.startswith(name))
        assumed = [
            *assumed,
            f'activation {settings["act"]} and LayerNorm epsilon {settings["layer_norm_eps"]:g} '
            f'are assumed, the defaults of {library}: a file without configuration does not tell',
        ]
        notes.append(assumed[-1])
        if settings.get('rotary'):
            assumed.append(f'rotary positions {settings["rotary"]} are assumed, those of {library}')
            notes.append(assumed[-1])
    if 'head' in tree and config.get('of_classifier'):
        settings = {**settings, **config['of_classifier']}
    notes += _drop_unused(tree, settings)
    if not size and settings.get('rotary') and 'posembed_input' not in tree['Transformer']:
        assumed = [*assumed, f'images of {infer.ANY_SIZE} pixels assumed: it takes any size']
        notes.append(assumed[-1])
    return Weights(
        str(path),
        library,
        tree,
        tuple(notes),
        tuple(assumed),
        tuple(map(printable, config.get('class_names', ()))),
        settings=settings,
    )


def _drop_unused(tree: dict[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Leaves out what a library's class has and does not compute; what that was."""
    encoder, dropped = tree.get('Transformer', {}), []
    if settings.get('classifier', 'map') != 'map' and tree.pop('MAPHead_0', None):
        dropped.append('attention pooling')
    if settings.get('final_norm') is False and encoder.pop('encoder_norm', None):
        dropped.append('final norm')
    words = f'{" and ".join(dropped)}, which the classifier does not use: left out'
    return [words] if dropped else []


def _heads(
    path: pathlib.Path,
    library: str,
    found: Mapping[str, Any],
    variant: str,
    num_heads: int,
    stated: int,
) -> tuple[int, list[str]]:
    """The number of heads, which the shapes of PyTorch's tensors do not tell; and what was guessed.

    Args:
        path: see `_recognise`, as the next three.
        library: which has a table of names.
        found: the tensors.
        variant: name of a variant, or ''.
        num_heads: what the caller says, or 0.
        stated: what the file or its configuration says, or 0.
    """
    if library == 'timm Mixer':
        return 0, []
    named = infer.find_variant(variant).get('transformer', {}).get('num_heads', 0) if variant else 0
    asked = num_heads or named
    if stated:
        if asked not in (0, stated):
            raise UserError(f'{path} states {stated} attention heads, and not {asked}')
        return stated, []
    if asked:
        return asked, [f'{asked} heads, as asked for: files of this kind do not tell']
    widths = {array.shape[-1] for name, array in found.items() if name.endswith('cls_token')}
    widths |= {array.shape[-1] for name, array in found.items() if 'pos' in name}
    width = widths.pop() if widths else 0
    if width not in _HEADS:
        raise UserError(
            f'{path}: {library} weights do not tell the number of attention heads, and no known '
            f'model is {width} wide: say it (num_heads, --num_heads)'
        )
    heads = 20 if 'DINOv3' in library and width == 1280 else _HEADS[width]
    return heads, [f'{heads} heads assumed: files of this kind do not tell; --num_heads']


def _normalize(weights: Weights, normalization: Normalization) -> Weights:
    """Folds the model's own normalisation of its input into its first layer.

    A model that takes (p - mean) / std with p in [0, 1] gets 2 p - 1 here, so its kernel is divided
    by 2 std, and (1 / 2 - mean) / std of it goes to the bias. Exact: that layer has no padding.
    """
    try:
        mean, std = (np.asarray(values, np.float64) for values in normalization)
        if not (mean.size and std.size):
            raise ValueError('there is none')
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and np.all(std > 0)):
            raise ValueError('not finite, or no deviation')
    except (ValueError, TypeError, OverflowError) as e:
        raise UserError(
            f'{weights.path}: mean and standard deviation should be three numbers each, of red, '
            f'green and blue; got {str(normalization)[:200]} ({e})'
        ) from e
    if mean.shape == std.shape and (mean == 0.5).all() and (std == 0.5).all():
        return weights
    params, channels = dict(weights.params), infer.channels(weights.params)
    if mean.shape == std.shape == (1,) or (np.ptp(mean) == 0 and np.ptp(std) == 0):
        mean, std = np.full(channels, mean.flat[0]), np.full(channels, std.flat[0])
    layer = 'stem' if 'stem' in params else 'embedding'
    fits = mean.shape == std.shape == (channels,)
    if 'conv_root' in params or layer not in params or not fits:
        raise UserError(
            f'{weights.path} takes input normalised with mean {mean.tolist()} and standard '
            f'deviation {std.tolist()}, which cannot be folded into its first layer; this package '
            'gives [-1, 1]'
        )

    def offset(kernel: np.ndarray) -> np.ndarray:
        return np.einsum('hwcd,c->d', kernel, (0.5 - mean) / std)

    old = params[layer]
    new = {'kernel': derive(lambda kernel: kernel / (2 * std)[None, None, :, None], old['kernel'])}
    if 'bias' in old:
        new['bias'] = derive(lambda bias, kernel: bias + offset(kernel), old['bias'], old['kernel'])
    elif (mean != 0.5).any():  # what is added to every patch
        tokens = adapt.prefix_positions(npz.flatten(params))

        def add(rows: np.ndarray, kernel: np.ndarray) -> np.ndarray:
            patches = rows[:, tokens:] + offset(kernel)[None, None]
            return np.concatenate([rows[:, :tokens], patches], axis=1)

        encoder = params['Transformer']
        rows = derive(add, encoder['posembed_input']['pos_embedding'], old['kernel'])
        params['Transformer'] = {**encoder, 'posembed_input': {'pos_embedding': rows}}
        layer += ' and position embeddings'
    params[layer.split()[0]] = new
    note = (
        f'normalisation (mean {", ".join(f"{m:g}" for m in mean)}, standard deviation '
        f'{", ".join(f"{s:g}" for s in std)}) was folded into {layer}: input is [-1, 1] now'
    )
    return dataclasses.replace(weights, params=params, notes=(*weights.notes, note))
