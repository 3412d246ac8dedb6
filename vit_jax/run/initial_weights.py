"""The weights that a run starts from: the file that the config names, fitted to the model."""

import functools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from flax import traverse_util

from vit_jax import checkpoint, groups, models, variants
from vit_jax import config as config_lib
from vit_jax import state as state_lib
from vit_jax.checkpoint import adapt, catalog, infer
from vit_jax.errors import UserError
from vit_jax.models import lora, positions


def path_of(config: ml_collections.ConfigDict) -> pathlib.Path | None:
    """The file that the config names, downloaded if need be; None for no weights."""
    if config.pretrained:
        return catalog.resolve(config.pretrained)
    if config.model_or_filename:
        return catalog.resolve_augreg(
            config.model_or_filename, pretrained_dir=config.pretrained_dir
        )
    if config.pretrained_dir:
        name = variants.image_tower(config.model).model_name
        return catalog.resolve(f'{config.pretrained_dir.rstrip("/")}/{name}.npz')
    return None


def name_of(config: ml_collections.ConfigDict) -> str:
    """The weights as the config names them; '' for none."""
    return next((config[key] for key in config_lib.WEIGHT_KEYS if config[key]), '')


def open_named(config: ml_collections.ConfigDict) -> checkpoint.Weights | None:
    """The weights that the config names, not yet read; None for none."""
    path = path_of(config)
    if path is None:
        return None
    # PyTorch's files do not tell the number of heads; the model does.
    tower = variants.image_tower(config.model)
    num_heads = tower.get('transformer', {}).get('num_heads', 0)
    return checkpoint.open_weights(path, num_heads=num_heads)


def settle(config: ml_collections.ConfigDict, weights: checkpoint.Weights | None) -> None:
    """Fills in activation and epsilon of `config.model`, where it does not say, from the weights.

    What neither says is as the released models have it.

    Raises:
      UserError: the weights were trained with other rotary positions than the config has.
    """
    told = weights.settings if weights else {}
    _settle(config, told)
    found, ours = told.get('rotary'), variants.image_tower(config.model.to_dict()).get('rotary')
    if 'rotary' in told and found != ours:
        raise UserError(
            f'the weights were trained with rotary positions {found}, and the config says {ours}: '
            'take a config of their family, and --config.model.rotary.theta and grid as theirs'
        )


def settle_as_begun(config: ml_collections.ConfigDict, begun: Mapping[str, Any]) -> None:
    """`settle` of a run that goes on.

    Args:
      config: resolved; changed.
      begun: the settings that it began with, see `resume.read_config`.
    """
    tower = 'model.image' if variants.has_two_towers(config.model) else 'model'
    _settle(config, {name: begun.get(f'{tower}.{name}') for name in infer.EVERY_MODEL})


def _settle(config: ml_collections.ConfigDict, told: Mapping[str, Any]) -> None:
    with config.unlocked():
        tower = variants.image_tower(config.model)
        for name in infer.EVERY_MODEL:
            if tower.get(name) is None:
                found = told.get(name)
                default = getattr(models.VisionTransformer, name)
                tower[name] = default if found is None else found


def as_settled(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    """The model with the activation and epsilon that `settle` filled in."""
    tower = variants.image_tower(config.model.to_dict())
    found: dict[str, Any] = {name: tower[name] for name in infer.EVERY_MODEL}
    if isinstance(model, models.LitModel):
        found = {'image': {**model.image, **found}}
    return model.clone(**found)


def initial_params(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    shapes: Mapping[str, Any],
    channels: int = 3,
    frozen: str = '',
) -> tuple[Mapping[str, Any], str]:
    """Parameters of a model of images to start from.

    Args:
      config: resolved.
      model: the module.
      shapes: of its parameters.
      channels: of the images.
      frozen: pattern of the parameters that stay as they are; '' for none.

    Returns:
      The parameters, on the host, and where they come from, in words; of those that are frozen it
      says which are new.

    Raises:
      UserError: the weights cannot be read, or do not fit.
    """
    init = functools.partial(
        state_lib.init_params, model, config.pp.crop, config.seed, channels=channels
    )
    weights = open_named(config)
    adapters = [name for name in groups.names_of(shapes) if name.endswith(lora.ARRAYS)]
    shapes = lora.without(shapes)
    if weights is None:
        params = jax.device_get(init())
        if config.sincos_positions:
            grid = infer.token_grid(shapes, config_lib.preprocess_of(config).crop)
            params = positions.with_sincos(params, grid) if grid else params
        return params, 'new weights (no pretrained ones were asked for)'
    params, report, told = fitted(config, weights, model, shapes)
    if new_names := [*report.initialised, *adapters]:
        params = lora.started(with_new(params, init(only=new_names)))
    return params, '\n  '.join([told, *new_and_frozen(report.initialised, frozen)])


def fitted(
    config: ml_collections.ConfigDict,
    weights: checkpoint.Weights,
    model: nn.Module,
    shapes: Mapping[str, Any],
    keep_head: bool = False,
) -> tuple[Mapping[str, Any], adapt.Report, str]:
    """Weights of an image model at these shapes, what was done to them, and all of it in words."""
    ours = isinstance(model, models.VisionTransformer)
    grid = infer.token_grid(shapes, config_lib.preprocess_of(config).crop) if ours else None
    source_grid, assumed = _source_grid(weights, grid)
    params, report = adapt.adapt(
        weights.params,
        shapes,
        grid=grid,
        source_grid=source_grid,
        classifier=variants.image_tower(config.model).get('classifier', 'gap'),
        keep_head=keep_head or config.keep_head,
        patch_resize=config.patch_resize,
        source=f'{weights.path} ({weights.format})',
    )
    other = [
        f'the weights were trained with {name} {told}, and this run computes {ours}'
        for name, told in weights.settings.items()
        if name in (*infer.EVERY_MODEL, 'classifier')
        and (ours := getattr(model, name, told)) != told
    ]
    notes = [*weights.notes, *assumed, *other, *_other_pixels(weights, config)]
    return params, report, '\n  '.join([str(report), *notes])


def new_and_frozen(new: Iterable[str], frozen: str) -> list[str]:
    """A warning, if some of the new parameters stay as they are."""
    stay = [name for name in new if frozen and re.fullmatch(frozen, name)]
    return [f'WARNING: new, and not trained: {adapt.shorten(stay, 4)}'] if stay else []


def with_new(params: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters, and new ones in the places that they leave."""
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(jax.device_get(new))
    return traverse_util.unflatten_dict(flat)


def _source_grid(
    weights: checkpoint.Weights, grid: adapt.Grid | None
) -> tuple[adapt.Grid | None, list[str]]:
    """(rows, columns) of the weights' patches, None where their number tells; and what is assumed.

    Args:
      weights: to start from.
      grid: of the model's patches.
    """
    if weights.image_size:
        return infer.token_grid(weights.params, weights.image_size), []
    square = infer.square_grid(weights.params)
    if not grid or not square or grid == square or grid[0] * grid[1] != square[0] ** 2:
        return None, []
    return square, [
        f'their {square[0] ** 2} positions are taken for a square of {square[0]} x {square[0]} '
        f'patches, not for {grid[0]} x {grid[1]}: nothing tells'
    ]


def _other_pixels(weights: checkpoint.Weights, config: ml_collections.ConfigDict) -> list[str]:
    """A sentence on the pixels that the weights were made for, if evaluation sees others."""
    ours, theirs = config_lib.preprocess_of(config), weights.preprocess
    evaluates = f'this run evaluates {ours.describe()}'
    if weights.refused:
        return [f'the weights were made for {weights.refused}; {evaluates}']
    if theirs is None or theirs.at(ours.crop).describe() == ours.describe():
        return []
    theirs = theirs.at(ours.crop)
    flags = [
        f'--config.pp.{name}={getattr(theirs, name)}'
        for name in ('eval', 'resize', 'interpolation', 'antialias')
        if getattr(theirs, name) != getattr(ours, name)
    ]
    return [
        f'the weights were made for other pixels: {theirs.describe()}; {evaluates}. For theirs: '
        + ' '.join(flags)
    ]
