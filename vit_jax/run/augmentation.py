"""What a recipe does with training images: how they are drawn, changed and mixed."""

import ml_collections
import numpy as np

from vit_jax.data import augment
from vit_jax.data.dataset import Selection
from vit_jax.data.examples import CLASS_INDEX
from vit_jax.data.host_augment import CHANNELS, HostAugment, randaug_of
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.run.recipe import every_label

_ON_THE_HOST = ('randaug', 'three_augment', 'color_jitter')


def check(config: ml_collections.ConfigDict, train: Selection | BatchStream) -> None:
    """Checks that all of it can be done with these examples.

    Raises:
      UserError: it cannot.
    """
    host_augment_of(config, train)
    balance_of(config, train)


def describe(config: ml_collections.ConfigDict) -> str:
    """What is done to training images beside cropping and mirroring; '' for nothing."""
    names = (
        *_ON_THE_HOST, 'random_erasing', 'mixup', 'cutmix', 'repeated_augmentation',
        'balanced_sampling',
    )  # fmt: skip
    told = ', '.join(f'{name}={config[name]}' for name in names if config[name])
    return f'{told} (AugReg {config.augreg})' if config.augreg else told


def mix_of(config: ml_collections.ConfigDict, train: Selection | BatchStream) -> augment.Mix:
    """Mixup and CutMix as the config asks for them."""
    classes = len(train.class_names) if train.label_dtype == CLASS_INDEX else 0
    return augment.Mix(config.mixup, config.cutmix, config.mix_per_example, classes)


def host_augment_of(
    config: ml_collections.ConfigDict, train: Selection | BatchStream
) -> HostAugment:
    """What is done to crops on the host, as the config asks for it.

    Raises:
      UserError: it cannot be done to these images.
    """
    made = HostAugment(randaug_of(config.randaug), config.three_augment, config.color_jitter)
    names = ', '.join(f'config.{name}={config[name]!r}' for name in _ON_THE_HOST if config[name])
    if made and isinstance(train, BatchStream):
        raise UserError(
            f'{names}: the images of {train!r} are augmented by whoever makes them; leave it out'
        )
    if made and train.channels not in CHANNELS:
        raise UserError(
            f'{names}: these images have {train.channels} channels, and it is for grey images (1) '
            'and colours (3); leave it out'
        )
    return made


def balance_of(
    config: ml_collections.ConfigDict, train: Selection | BatchStream
) -> np.ndarray | None:
    """Classes of all examples, int [examples], if they are to be equally frequent; else None.

    Raises:
      UserError: these examples cannot be drawn so.
    """
    for name in ('repeated_augmentation', 'balanced_sampling'):
        if config[name] and isinstance(train, BatchStream):
            raise UserError(
                f'config.{name}={config[name]}: whoever makes {train!r} draws the examples; leave '
                'it out'
            )
    if not config.balanced_sampling or isinstance(train, BatchStream):
        return None
    if train.label_dtype != CLASS_INDEX:
        raise UserError(
            f'config.balanced_sampling=True: these labels are {train.label_dtype}, and only '
            'examples that have one class each can be drawn by it; leave it out'
        )
    return every_label(train)
