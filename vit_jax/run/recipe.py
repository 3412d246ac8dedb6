"""What of a recipe depends on the examples or the model: duration, loss, optimizer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import ml_collections
import numpy as np
import optax

from vit_jax import config as config_lib
from vit_jax import groups, losses, models, optim
from vit_jax.configs import common
from vit_jax.data.dataset import Selection
from vit_jax.data.examples import CLASS_INDEX
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.inference.task import NUMBERS, ONE_CLASS, SEVERAL, Task, standardized
from vit_jax.run import trained_part

_OF_THE_LOSS = {
    'loss': '', 'label_smoothing': 0.0, 'class_weights': '', 'positive_weights': '',
    'standardize_targets': True,
}  # fmt: skip
_OF_NUMBERS = ('mse', 'huber')


def settle_duration(config: ml_collections.ConfigDict, train: Selection | BatchStream) -> None:
    """Turns `config.epochs` into steps, in place.

    Raises:
      UserError: there are no epochs, or they are too short, see `config.set_epochs`.
    """
    if not config.epochs:
        return
    if isinstance(train, BatchStream):
        raise UserError(
            f'config.epochs={config.epochs:g}: batches of an iterator do not tell how many '
            'examples there are; set config.total_steps or config.total_examples'
        )
    config_lib.set_epochs(config, len(train))


def describe_schedule(config: ml_collections.ConfigDict, train: Selection | BatchStream) -> str:
    """A line on how long is trained, and at which rate."""
    images = config.total_steps * config.batch
    told = f'{config.total_steps:,} steps, {images:,} images'
    if isinstance(train, Selection):
        told += f', {images / len(train):.1f} epochs'
    told += f'; learning rate up to {config.base_lr:g}, {config.decay_type}'
    for name in ('warmup_steps', 'cooldown_steps'):
        if config[name]:
            told += f', {config[name]:,} of them {name.removesuffix("_steps")}'
    usual = common.get_defaults().batch
    if config.batch != usual:
        told += (
            f'. It does not depend on the batch; if {config.base_lr:g} is for {usual} images, '
            f'linear scaling (https://arxiv.org/abs/1706.02677) gives '
            f'{config.base_lr * config.batch / usual:.3g} for {config.batch}'
        )
    return told


def check_depth(config: ml_collections.ConfigDict, model: nn.Module) -> None:
    """Checks that `config.stochastic_depth` has blocks to leave out.

    Raises:
      UserError: it has not.
    """
    if config.stochastic_depth and len(models.block_names(model)) < 2:
        raise UserError(
            f'config.stochastic_depth={config.stochastic_depth} leaves out branches of a '
            f"VisionTransformer's or an MlpMixer's blocks, never of the first one; this model, a "
            f'{type(model).__name__}, has no others: leave it out'
        )


def check_positions(shapes: Mapping[str, Any]) -> None:
    """Checks that `config.sincos_positions` has position embeddings to begin with.

    Args:
      shapes: of the parameters.

    Raises:
      UserError: there are none, or of a width that is no multiple of 4.
    """
    embedding = shapes.get('Transformer', {}).get('posembed_input', {}).get('pos_embedding')
    if embedding is None or embedding.shape[2] % 4 or embedding.shape[2] < 8:
        raise UserError(
            'config.sincos_positions=True is for a VisionTransformer with position embeddings, '
            'of a width that is a multiple of 4, at least 8; leave it out'
        )


def optimizer_of(
    config: ml_collections.ConfigDict,
    schedule: optax.Schedule | None,
    own: optax.GradientTransformation | None,
    names: Callable[[], list[str]],
) -> optax.GradientTransformation:
    """The optimizer: the config's, or the caller's, of the parameters that are trained.

    Args:
      config: resolved.
      schedule: the learning rate of the config's.
      own: the caller's.
      names: gives the names of all parameters.

    Raises:
      UserError: a setting has no effect, or does not fit the model.
    """
    grouped = {
        name: config[name]
        for name in ('lr_mults', 'wd_mults', 'layer_decay', 'gsam_rho_min')
        if config[name] != common.get_defaults()[name]
    }
    found = names() if grouped else []
    for knob, value in grouped.items():
        if own is not None:
            raise UserError(
                f'config.{knob}={value!r} has no effect on an optimizer of your own: leave out one '
                'of them'
            )
        if knob not in ('layer_decay', 'gsam_rho_min'):
            groups.check_patterns(f'config.{knob}', [pattern for pattern, _ in value], found)
    if 'wd_mults' in grouped and not config.weight_decay:
        raise UserError(
            f'config.wd_mults={config.wd_mults!r} are factors of config.weight_decay, which is 0: '
            'set both, or none'
        )
    factors = [groups.factor_of(config.lr_mults, 1.0)] if config.lr_mults else []
    if config.layer_decay:
        factors.append(groups.layer_decay(config.layer_decay, found))
    tx = own
    if tx is None:
        together = (lambda name: math.prod(f(name) for f in factors)) if factors else None
        tx = optim.create_optimizer(config, schedule, together)
    if config.ema_decay:
        tx = optim.with_average(tx, config.ema_decay, config.ema_warmup_steps)
    return optim.trained_only(tx, trained_part.frozen_of(config, names))


def losses_of(
    config: ml_collections.ConfigDict,
    train: Selection | BatchStream,
    own: losses.LossFn | None,
) -> tuple[losses.LossFn, losses.LossFn | None, Task]:
    """The losses of training and of evaluation, and what the model is to tell.

    Smoothing and weights are for training only. The loss of examples that have one class each is
    the plain cross-entropy of softmax in evaluation, whatever they are trained with.

    Args:
      config: resolved.
      train: the training examples.
      own: the caller's loss, which both are then.

    Returns:
      The loss of training; that of evaluation, None where the class is all that counts; the task,
      with mean and deviation of numbers, which the losses take in the same scale.

    Raises:
      UserError: a setting has no effect or does not fit the labels.
    """
    if own is not None:
        for name, off in _OF_THE_LOSS.items():
            if config[name] != off:
                raise UserError(
                    f'config.{name}={config[name]!r} has no effect on a loss_fn of your own: leave '
                    'out one of them'
                )
        return own, own, ONE_CLASS
    kind = config.loss or _loss_by_labels(train)
    if kind in _OF_NUMBERS:
        task = _task_of_numbers(config, train, kind)
        mean, deviation = task.scale(len(train.class_names))
        loss = losses.regression(kind, delta=config.huber_delta, mean=mean, deviation=deviation)
        return loss, loss, task
    classes = train.label_dtype == CLASS_INDEX
    if not classes and not train.label_dtype.shape:
        raise UserError(
            f'config.loss={kind!r}: these labels are numbers, one for each image, not classes: use '
            "--config.loss=mse or huber; or give whole numbers, the classes' indices"
        )
    task = Task(SEVERAL) if kind == 'sigmoid' and not classes else ONE_CLASS
    weights = {'class_weights': _class_weights(config, train) if config.class_weights else ()}
    if config.positive_weights:
        weights['positive_weights'] = _positive_weights(config, train, task)
    if not config.standardize_targets:
        raise UserError(
            'config.standardize_targets=False has no effect on classes: it is of numbers '
            "(config.loss='mse' or 'huber'); leave it out"
        )
    loss = losses.cross_entropy(kind, smoothing=config.label_smoothing, **weights)
    return loss, None if classes else losses.cross_entropy(kind), task


def _loss_by_labels(train: Selection | BatchStream) -> str:
    """The loss where the config names none.

    Raises:
      UserError: labels that could be several things.
    """
    if train.label_dtype == CLASS_INDEX:
        return 'softmax'
    if not train.label_dtype.shape:
        return 'mse'
    labels = None
    if isinstance(train, Selection):
        if train.several:
            return 'sigmoid'
        if train.units:
            return 'mse'
        labels = train.targets()
    if labels is not None and (labels >= 0).all():
        if np.allclose(labels.sum(axis=-1), 1, atol=1e-3):  # probabilities
            return 'softmax'
        if np.isin(labels, (0, 1)).all():
            return 'sigmoid'
    raise UserError(
        f'labels {train.label_dtype} may be several classes (--config.loss=sigmoid), numbers '
        '(--config.loss=mse or huber) or probabilities of classes (--config.loss=softmax): say '
        'which they are'
    )


def _task_of_numbers(
    config: ml_collections.ConfigDict, train: Selection | BatchStream, kind: str
) -> Task:
    """Regression; the scale is that of the training examples."""
    if train.label_dtype == CLASS_INDEX:
        raise UserError(
            f'config.loss={kind!r} compares numbers, and these labels are indices of classes: give '
            'floats, or leave it out'
        )
    for name, off in (*_OF_THE_LOSS.items(), ('mixup', 0.0), ('cutmix', 0.0)):
        if name not in ('loss', 'standardize_targets') and config[name] != off:
            why = 'the number of a mixed image is not the mean of the numbers'
            why = why if name in ('mixup', 'cutmix') else 'numbers have no classes'
            raise UserError(
                f'config.{name}={config[name]!r} goes with classes, not with config.loss={kind!r}: '
                f'{why}; leave it out'
            )
    units = train.units if isinstance(train, Selection) else ()
    if not config.standardize_targets:
        return Task(NUMBERS, units=units)
    if isinstance(train, BatchStream):
        raise UserError(
            'batches of an iterator do not tell the mean and deviation of all numbers: scale them '
            'yourself, and set --config.standardize_targets=False'
        )
    return standardized(every_label(train), train.class_names, units)


def every_label(train: Selection) -> np.ndarray:
    """Labels of all examples, [examples, ...]; read where they stand in the records."""
    labels = train.targets()
    if labels is None:
        labels = np.asarray([train[index].label for index in range(len(train))])
    return labels


def _class_weights(config: ml_collections.ConfigDict, train: Selection | BatchStream) -> np.ndarray:
    """[classes] float32, see `config.class_weights`."""
    text = config.class_weights
    if train.label_dtype != CLASS_INDEX:
        raise UserError(
            f'config.class_weights={text!r}: these labels are {train.label_dtype}, and only '
            'examples that have one class each have its weight; leave it out (where an image may '
            'have several classes, config.positive_weights weighs each)'
        )
    return _weights('class_weights', text, train, losses.balanced_weights)


def _positive_weights(
    config: ml_collections.ConfigDict, train: Selection | BatchStream, task: Task
) -> np.ndarray:
    """[classes] float32, see `config.positive_weights`."""
    text = config.positive_weights
    if task.kind != SEVERAL:
        raise UserError(
            f'config.positive_weights={text!r} weighs a class against its absence, where an image '
            'may have several; here each has one: use config.class_weights'
        )
    return _weights(
        'positive_weights', text, train, lambda labels, _: losses.balanced_positives(labels)
    )


def _weights(
    knob: str,
    text: str,
    train: Selection | BatchStream,
    balanced: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """What a knob says: 'balanced', or a number for each class."""
    names = train.class_names
    if text == 'balanced':
        if isinstance(train, BatchStream):
            raise UserError(
                f"config.{knob}='balanced' counts the examples of each class, which batches of an "
                'iterator do not tell: give a number for each class'
            )
        return balanced(every_label(train), len(names))
    try:
        weights = [float(part) for part in text.split(',')]
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(0 <= w < math.inf for w in weights):
        raise UserError(
            f"config.{knob}={text!r} is neither 'balanced' nor {len(names)} numbers from 0 "
            f'on with commas between them, one for each class: {", ".join(names[:10])}'
            f'{", ..." if len(names) > 10 else ""}'
        )
    return np.asarray(weights, np.float32)
