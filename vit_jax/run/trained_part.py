"""Which part of a model is trained: `config.train_only`, `config.frozen`, and adapters."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import ml_collections

from vit_jax import groups, models
from vit_jax.configs import common
from vit_jax.errors import UserError
from vit_jax.models import lora

ALL_BUT_HEAD = "'(?!head/).*'"
_NAMED = "'head', 'last:3', 'bias', 'norm'"
_OF_LORA = ('lora_targets', 'lora_alpha', 'lora_dropout', 'dora')


def check(config: ml_collections.ConfigDict) -> None:
    """Checks what no model is needed for.

    Raises:
      UserError: settings that contradict each other, or have no effect.
    """
    given = [name for name in ('train_only', 'frozen') if config[name]]
    if len(given) == 2:
        raise UserError(
            f'config.train_only={config.train_only!r} says what is trained, and config.frozen='
            f'{config.frozen!r} what is not: leave out one of them'
        )
    if config.lora_rank and given:
        raise UserError(
            f'config.lora_rank={config.lora_rank} trains adapters and the head, and nothing else, '
            f'whatever config.{given[0]}={config[given[0]]!r} says: leave out one of them'
        )
    for name in _OF_LORA:
        if not config.lora_rank and config[name] != common.get_defaults()[name]:
            raise UserError(
                f'config.{name}={config[name]!r} has no effect without config.lora_rank: set it, '
                'usually to 8, or leave out both'
            )
    if config.lora_dropout >= 1:
        raise UserError(
            f'config.lora_dropout={config.lora_dropout} would leave nothing of what the adapters '
            'see: it is a share below 1, usually 0.1'
        )
    _targets(config.lora_targets)


def _targets(text: str) -> dict[str, tuple[str, ...]]:
    """The layers that each word of `config.lora_targets` stands for."""
    each = {layer: (layer,) for layers in lora.GROUPS.values() for layer in layers}
    known, words = {**lora.GROUPS, **each}, [word.strip() for word in text.split(',')]
    for word in words:
        if word not in known:
            raise UserError(
                f'config.lora_targets={text!r}: {word!r} is not one of {", ".join(known)}; several '
                'have commas between them'
            )
    return {word: known[word] for word in words}


def adapted(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    """The model with the adapters that the config asks for; as it is, if for none.

    Raises:
      UserError: it is none that can have adapters.
    """
    if not config.lora_rank:
        return model
    if not isinstance(model, models.VisionTransformer | models.MlpMixer):
        raise UserError(
            f'config.lora_rank={config.lora_rank} gives adapters to a VisionTransformer or an '
            f'MlpMixer of vit_jax.models, and the model is a {type(model).__name__}: leave it out'
        )
    layers = _targets(config.lora_targets).values()
    targets = dict.fromkeys(name for part in layers for name in part)
    settings = lora.Lora(
        rank=config.lora_rank,
        targets=tuple(targets),
        alpha=config.lora_alpha or None,
        dropout=config.lora_dropout,
        dora=config.dora,
    )
    return model.clone(lora=settings)


def names_of(config: ml_collections.ConfigDict, init: Callable[[], Any]) -> list[str]:
    """Names of all parameters.

    Args:
      config: resolved.
      init: gives shapes of the parameters.

    Raises:
      UserError: the adapters do not fit the model.
    """
    try:
        names = groups.names_of(init())
    except ValueError as error:
        if not config.lora_rank or 'rank' not in str(error):
            raise
        raise UserError(f'config.lora_rank={config.lora_rank}: {error}; use less') from error
    for word, layers in _targets(config.lora_targets).items() if config.lora_rank else ():
        if not any(name.split('/')[-2:] == [layer, lora.A] for name in names for layer in layers):
            raise UserError(
                f'config.lora_targets={config.lora_targets!r}: no block of '
                f'{config.model.model_name} has a layer of {word!r}'
                f'{" (a Mixer has mlp)" if "stem/kernel" in names else ""}'
            )
    return names


def frozen_of(config: ml_collections.ConfigDict, names: Callable[[], Sequence[str]]) -> str:
    """The pattern of the parameters that stay as they are, see `groups.partition`; '' for none.

    Args:
      config: resolved.
      names: gives those of all parameters.

    Raises:
      UserError: a pattern fits nothing, or leaves nothing to train.
    """
    if not (config.frozen or config.train_only or config.lora_rank):
        return ''
    frozen, asked, found = config.frozen, f'config.frozen={config.frozen!r}', names()
    if config.lora_rank:
        return groups.all_but(rf'.*/(?:{"|".join(lora.ARRAYS)})', groups.HEAD)
    if config.train_only:
        asked = f'config.train_only={config.train_only!r}'
        frozen = _all_but(config.train_only, found)
        if not any(re.fullmatch(frozen, name) for name in found):
            raise UserError(f'{asked} trains all parameters: leave it out')
    else:
        groups.check_patterns('config.frozen', [frozen], found)
    if all(re.fullmatch(frozen, name) for name in found):
        raise UserError(
            f'{asked} leaves no parameter to train; all but the head are {ALL_BUT_HEAD}'
        )
    kept = 'head/kernel' in found and re.fullmatch(frozen, 'head/kernel')
    if kept and not config.keep_head:
        raise UserError(
            f'{asked} leaves the head as it is, and a new one is all zeros, so that nothing could '
            'be learned: train head/.* too, or start from weights that have a head for these '
            'classes with --config.keep_head=True'
        )
    return frozen


def _all_but(trained: str, names: Sequence[str]) -> str:
    """The pattern of what `config.train_only` leaves as it is."""
    if trained == 'head':
        return groups.all_but(groups.HEAD)
    if trained == 'bias':
        return groups.all_but(r'(?:.*/)?bias', groups.HEAD)
    if trained == 'norm':
        norms = groups.norms(names)
        if not norms:
            raise UserError("config.train_only='norm': this model has no layer with a scale")
        return groups.all_but(norms, groups.HEAD)
    if trained.startswith('last:'):
        return groups.below_last(trained, names)
    groups.check_patterns(f'config.train_only (other than {_NAMED})', [trained], names)
    return groups.all_but(trained)
