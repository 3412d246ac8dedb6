"""The teacher of a run, and what its student is trained with."""

import dataclasses
import hashlib
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vit_jax import config as config_lib
from vit_jax import losses, models
from vit_jax.data.dataset import Selection
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.inference import model_folder
from vit_jax.inference.task import ONE_CLASS, Task


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that a student learns from.

    Attributes:
      model: gives logits [B, C] for what the student sees.
      params: its parameters, on the host.
      description: a line on it.
      fingerprint: tells it from any other model, and from itself with other weights.
    """

    model: nn.Module
    params: Any
    description: str
    fingerprint: str


def teacher_of(
    config: ml_collections.ConfigDict, train: Selection | BatchStream, task: Task, own_loss: bool
) -> Teacher | None:
    """Reads the teacher that the config names; None where there is to be none.

    Args:
      config: resolved.
      train: the training examples.
      task: what the student is to tell.
      own_loss: whether the loss is the caller's.

    Raises:
      UserError: it cannot be read, or does not fit images or classes.
    """
    if not config.distillation:
        return None
    what = f'config.distillation={config.distillation!r}'
    if own_loss:
        raise UserError(f'{what} has no effect on a loss_fn of your own: leave out one of them')
    if task != ONE_CLASS:
        raise UserError(f'{what} goes with images that have one class each; leave it out')
    opened = model_folder.load(config.teacher)
    name = f'the teacher {config.teacher}'
    crop, channels = config_lib.preprocess_of(config).crop, opened.channels
    if opened.image_size != crop:
        raise UserError(
            f'{name} sees {opened.image_size} px, and the student {crop}: both are shown the same '
            f'images; use --config.pp.crop={opened.image_size}, or another teacher'
        )
    if channels != train.channels:
        raise UserError(f'{name} sees {channels} channels, and these images have {train.channels}')
    names, theirs = train.class_names, opened.class_names
    if opened.task != ONE_CLASS or len(theirs) != len(names):
        raise UserError(
            f'{name} tells {len(theirs)} {"classes" if opened.task == ONE_CLASS else "numbers"}, '
            f'and the student is to tell {len(names)} classes: they have to be the same'
        )
    known = model_folder.own_class_names(opened)
    if known and tuple(known) != tuple(names):
        wrong = next(i for i, (a, b) in enumerate(zip(known, names, strict=True)) if a != b)
        raise UserError(
            f'{name} calls class {wrong} {known[wrong]!r}, and this data {names[wrong]!r}: the '
            'classes have to be the same, in the same order'
        )
    if not any(np.any(leaf) for leaf in jax.tree.leaves(opened.params.get('head', {}))):
        raise UserError(f'{name} has a head of zeros: fine-tune it first')
    dtype = jnp.dtype(config_lib.compute_dtype(config, jax.default_backend()))
    count = sum(leaf.size for leaf in jax.tree.leaves(opened.params))
    return Teacher(
        models.for_inference(opened.model.clone(dtype=dtype)),
        opened.params,
        f'{config.teacher}, {count:,} parameters; {what}',
        _fingerprint(opened),
    )


def _fingerprint(model: model_folder.Model) -> str:
    """SHA-256 of architecture and parameters, wherever they were read."""
    described = json.dumps(model.model_config, sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        array = np.asarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.shape} {array.dtype}'.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def student_of(config: ml_collections.ConfigDict, model: nn.Module) -> nn.Module:
    """The model as it is trained: with DeiT's losses it gives the logits of both heads.

    Raises:
      UserError: it has only one.
    """
    if config.distillation not in ('hard', 'soft'):
        return model
    if not getattr(model, 'distilled', False):
        raise UserError(
            f'config.distillation={config.distillation!r} teaches a distillation token, which this '
            'model does not have: use --config.model.distilled=True (configs/deit_ti16.py), or '
            "config.distillation='patient'"
        )
    return model.clone(both_heads=True)


def loss_of(config: ml_collections.ConfigDict, base: losses.LossFn) -> losses.LossFn:
    """The loss of training, `base` if there is no teacher."""
    if not config.distillation:
        return base
    return losses.distillation(
        base,
        config.distillation,
        alpha=config.distillation_alpha,
        temperature=config.distillation_temperature,
    )
