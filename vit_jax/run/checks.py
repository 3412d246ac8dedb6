"""Whether the settings of a recipe make sense together; what needs no examples and no model."""

import math
import re
from typing import Any

import ml_collections

from vit_jax import variants
from vit_jax.data.host_augment import randaug_of
from vit_jax.errors import UserError

MAX_PROFILED = 100  # steps of a trace


def check_recipe(config: ml_collections.ConfigDict) -> None:
    """Checks augmentation, loss, distillation, optimizer and moving average.

    Raises:
      UserError: a value is impossible, or has no effect beside the others.
    """
    _check_loss(config)
    _check_mixing(config)
    _check_augmentation(config)
    _check_distillation(config)
    _check_training(config)
    _check_pairs(config)


def check_schedule(config: ml_collections.ConfigDict) -> None:
    """Checks what lies within the duration of the training, in steps.

    Raises:
      UserError: it does not.
    """
    total, warmup, cooldown = config.total_steps, config.warmup_steps, config.cooldown_steps
    if total < 1:
        raise UserError(f'config.total_steps={total} must be at least 1')
    if warmup >= total:
        raise UserError(
            f'config.warmup_steps={warmup} leaves nothing of config.total_steps={total}: '
            f'use --config.warmup_steps={total // 10}, or more steps'
        )
    if config.profile and profiled(config.profile)[1] > total:
        raise UserError(
            f'config.profile={config.profile!r} goes beyond the {total} steps of the run: choose '
            'earlier ones'
        )
    if warmup + cooldown > total:
        raise UserError(
            f'config.cooldown_steps={cooldown} and config.warmup_steps={warmup} are more than '
            f'config.total_steps={total}: use --config.cooldown_steps={(total - warmup) // 5}'
        )
    if config.ema_warmup_steps >= total:
        raise UserError(
            f'config.ema_warmup_steps={config.ema_warmup_steps} is not shorter than the '
            f'{total} steps of the run, so that nothing would be averaged: use fewer'
        )


def profiled(steps: str) -> tuple[int, int]:
    """The first and the last step that `config.profile` names.

    Raises:
      UserError: it names none, or too many for a trace that can be looked at.
    """
    found = re.fullmatch(r'(\d{1,9}):(\d{1,9})', steps)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last < first + MAX_PROFILED:
        raise UserError(
            f'config.profile={steps!r} is no range of steps: write 20:30 for steps 20 to 30, at '
            f'most {MAX_PROFILED}'
        )
    return first, last


def _check_loss(config: ml_collections.ConfigDict) -> None:
    if config.label_smoothing >= 1:
        raise UserError(
            f'config.label_smoothing={config.label_smoothing} leaves nothing of the labels: it is '
            'a share below 1, usually 0.1'
        )
    if not 0 < config.huber_delta < math.inf:
        raise UserError(f'config.huber_delta={config.huber_delta} must be above 0')
    if config.huber_delta != 1 and config.loss != 'huber':
        raise UserError(
            f'config.huber_delta={config.huber_delta} has no effect with config.loss='
            f"{config.loss!r}: set config.loss='huber', or leave it out"
        )


def _check_mixing(config: ml_collections.ConfigDict) -> None:
    mixes, repeats = config.mixup or config.cutmix, max(1, config.repeated_augmentation)
    if config.mix_per_example and not mixes:
        raise UserError(
            'config.mix_per_example=True has no effect without config.mixup or config.cutmix: set '
            'one of them, or leave it out'
        )
    if mixes and config.batch < 2 * repeats:
        raise UserError(
            f'config.mixup={config.mixup} and config.cutmix={config.cutmix} mix images of a batch, '
            f'and config.batch={config.batch} has only one'
            f'{f", {repeats} times" if repeats > 1 else ""}: use a larger batch'
        )


def _check_augmentation(config: ml_collections.ConfigDict) -> None:
    if config.random_erasing > 1:
        raise UserError(
            f'config.random_erasing={config.random_erasing} is a share of the images, at most 1'
        )
    repeats = max(1, config.repeated_augmentation)
    if config.batch % repeats:
        raise UserError(
            f'config.repeated_augmentation={repeats}: a batch of {config.batch} cannot have each '
            f'image {repeats} times; use --config.batch={-(-config.batch // repeats) * repeats}'
        )
    if config.balanced_sampling and config.class_weights == 'balanced':
        raise UserError(
            "config.balanced_sampling=True and config.class_weights='balanced' would both make up "
            'for the sizes of classes: leave out one of them'
        )
    if randaug_of(config.randaug) and config.three_augment:
        raise UserError(
            f'config.three_augment=True stands in place of RandAugment (config.randaug='
            f'{config.randaug!r}): leave out one of them'
        )


def _check_distillation(config: ml_collections.ConfigDict) -> None:
    if config.distillation and not config.teacher:
        raise UserError(
            f'config.distillation={config.distillation!r} needs a teacher: set config.teacher to a '
            'model folder, or to other weights with a head for the same classes'
        )
    if config.teacher and not config.distillation:
        raise UserError(
            f'config.teacher={config.teacher!r} teaches nothing without config.distillation: '
            "set it to 'hard', 'soft' or 'patient'"
        )
    if not 0 <= config.distillation_alpha <= 1:
        raise UserError(
            f'config.distillation_alpha={config.distillation_alpha} is a share, from 0 to 1'
        )
    if not 0 < config.distillation_temperature < math.inf:
        raise UserError(
            f'config.distillation_temperature={config.distillation_temperature} must be above 0'
        )
    if config.distillation == 'patient' and (config.label_smoothing or config.class_weights):
        raise UserError(
            "config.distillation='patient' asks the teacher and not the labels: "
            'config.label_smoothing and config.class_weights have no effect; leave them out'
        )


def _check_training(config: ml_collections.ConfigDict) -> None:
    if config.stochastic_depth >= 1:
        raise UserError(
            f'config.stochastic_depth={config.stochastic_depth} would leave out the last block '
            'always: it is a share below 1, usually 0.1'
        )
    if config.ema_decay >= 1:
        raise UserError(
            f'config.ema_decay={config.ema_decay} would leave the average where it begins: it is '
            'below 1, 0.9999 or 0.99'
        )
    if config.ema_warmup_steps and not config.ema_decay:
        raise UserError(
            f'config.ema_warmup_steps={config.ema_warmup_steps} has no effect without '
            'config.ema_decay: set it, or leave out both'
        )
    for key in ('gsam_alpha', 'gsam_rho_min'):
        if config[key] and not config.sam_rho:
            raise UserError(
                f'config.{key}={config[key]} has no effect without config.sam_rho: set it, or '
                'leave out both'
            )
    if config.gsam_rho_min > config.sam_rho:
        raise UserError(
            f'config.gsam_rho_min={config.gsam_rho_min} is the least radius, and config.sam_rho='
            f'{config.sam_rho} the largest: use less'
        )
    if config.layer_decay > 1:
        raise UserError(
            f'config.layer_decay={config.layer_decay} would give the first layers the largest '
            'rates: it is at most 1, usually 0.75'
        )
    for key in ('wd_mults', 'lr_mults'):
        for pair in config[key]:
            if not _is_factor(pair):
                raise UserError(
                    f'config.{key}: {pair!r} is no pair of a regular expression and a number from '
                    f"0 on; write (('head/.*', 10.0), ('.*/bias', 2.0))"
                )


def _is_factor(pair: Any) -> bool:
    """Whether this is (text, finite number from 0 on)."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
        return False
    return isinstance(pair[1], int | float) and 0 <= pair[1] < math.inf


# What is of classes, or of one tower.
_NOT_OF_PAIRS = (
    'label_smoothing', 'class_weights', 'positive_weights', 'balanced_sampling', 'mixup', 'cutmix',
    'teacher', 'keep_head', 'repeated_augmentation', 'stochastic_depth', 'layer_decay',
    'sincos_positions',
)  # fmt: skip
_CHANGE_PIXELS = (
    'randaug', 'three_augment', 'color_jitter', 'random_erasing', 'pp.flip', 'pp.flip_vertical',
    'pp.inception_crop', 'pp.resize_small',
)  # fmt: skip


def _check_pairs(config: ml_collections.ConfigDict) -> None:
    """Checks what goes with two towers and a loss of pairs, and what goes with them only."""
    of_pairs = config.loss in ('contrastive', 'pairwise_sigmoid')
    if not variants.has_two_towers(config.model):
        for key in ('vocabulary', 'pretrained_text', 'cache_features'):
            if config[key]:
                raise UserError(
                    f'config.{key}={config[key]!r} is of a text tower, which config.model does not '
                    'have: use configs/lit.py, or leave it out'
                )
        if of_pairs:
            raise UserError(
                f'config.loss={config.loss!r} compares images with texts, and config.model has no '
                'text tower: use configs/lit.py'
            )
        return
    for key in _NOT_OF_PAIRS:
        if config[key]:
            why = {
                'repeated_augmentation': 'an image would be in a batch with two of its texts',
                'keep_head': 'a projection of the weights is kept wherever it fits',
                'stochastic_depth': 'it is of the blocks of one tower',
                'layer_decay': 'it goes from block to block of one tower',
                'sincos_positions': 'it is of one tower',
            }.get(key, 'pairs of images and texts have no classes')
            raise UserError(f'config.{key}={config[key]!r}: {why}; leave it out')
    if config.loss and not of_pairs:
        raise UserError(
            f'config.loss={config.loss!r} is of labels; pairs of images and texts have '
            "'contrastive' or 'pairwise_sigmoid'"
        )
    if config.accum_steps > 1:
        raise UserError(
            f'config.accum_steps={config.accum_steps}: each pair is compared with all others of '
            'the batch, and of micro-batches none sees another. Use --config.accum_steps=1 and, '
            'for memory, a smaller batch, config.cache_features or more devices'
        )
    if config.pp.channels != 3:
        raise UserError(f'config.pp.channels={config.pp.channels}: image-text models see colours')
    on = [key for key in _CHANGE_PIXELS if _value(config, key)]
    if config.pp.eval == 'squash' and config.pp.resize:  # then it crops at random
        on.append('pp.resize')
    if config.cache_features and on:
        settings = ', '.join(f'config.{key}={_value(config, key)!r}' for key in on)
        raise UserError(
            'config.cache_features=True keeps one embedding of each image, as evaluation sees it, '
            f'and with {settings} the images change from step to step: leave out one or the other'
        )


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a dotted name."""
    group, _, name = key.rpartition('.')
    return config[group][name] if group else config[name]
