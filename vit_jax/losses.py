"""Losses of the training step, and what one's own looks like.

Shapes: B examples of a micro-batch, N tokens, C classes or outputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.models.layers import at_least_float32

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# A loss is a function (logits, batch, params) -> (loss, metrics) of the model's output, what the
# batch holds (`image`, mirrored, in [0, 255]; `label`; ...) and the parameters, of one micro-batch:
# the share of one device, cut into `accum_steps`. The loss is a scalar, and metrics a dict of
# scalars. Of each the step takes the mean over micro-batches and devices, all of the same number of
# examples. So what is a mean over examples becomes the mean over the whole batch, a term of the
# parameters alone (weight decay) stays what it is, and what compares examples with each other
# (contrastive losses) compares those of one micro-batch.
LossFn = Callable[[jax.Array, Batch, Any], tuple[jax.Array, Metrics]]


def softmax_cross_entropy(
    logits: jax.Array, batch: Batch, params: Any
) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy of one right class, or of a distribution over classes.

    Args:
      logits: [B, C]; [B, N, C] of a model that classifies tokens.
      batch: `label`, integers [B] or [B, N]; or probabilities of the shape of `logits` (mixup,
        distillation).
      params: not used.

    Returns:
      Loss, at least float32; and for integer labels `accuracy_train`, share in [0, 1], float32.

    Raises:
      UserError: labels of another shape.
    """
    del params
    label, logits = batch['label'], at_least_float(logits)
    if jnp.issubdtype(label.dtype, jnp.integer):
        _check_shape(label, logits.shape[:-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        right = jnp.argmax(logits, axis=-1) == label
        return loss, {'accuracy_train': jnp.mean(right, dtype=jnp.float32)}
    _check_shape(label, logits.shape)
    return optax.softmax_cross_entropy(logits, label.astype(logits.dtype)).mean(), {}


def sigmoid_cross_entropy(
    logits: jax.Array, batch: Batch, params: Any
) -> tuple[jax.Array, Metrics]:
    """Binary cross-entropy, summed over classes, of examples with any number of right classes.

    Args:
      logits: [..., C].
      batch: `label` of the same shape, 0 or 1, or probabilities.
      params: not used.

    Returns:
      Mean over all axes but the last, at least float32; no metrics.

    Raises:
      UserError: labels of another shape.
    """
    del params
    label, logits = batch['label'], at_least_float(logits)
    _check_shape(label, logits.shape)
    losses = optax.sigmoid_binary_cross_entropy(logits, label.astype(logits.dtype))
    return losses.sum(axis=-1).mean(), {}


def squared_error(logits: jax.Array, batch: Batch, params: Any) -> tuple[jax.Array, Metrics]:
    """Mean squared error of real-valued targets.

    Args:
      logits: [..., C], the outputs.
      batch: `label` of the same shape.
      params: not used.

    Returns:
      Mean over all axes, at least float32; no metrics.

    Raises:
      UserError: targets of another shape.
    """
    del params
    target, outputs = batch['label'], at_least_float(logits)
    _check_shape(target, outputs.shape)
    return jnp.mean((outputs - target.astype(outputs.dtype)) ** 2), {}


def at_least_float(x: Any) -> jax.Array:
    """`x` as floats of at least 32 bits."""
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))


def _check_shape(label: jax.Array, expected: tuple[int, ...]) -> None:
    if label.shape != expected:
        raise UserError(
            f'labels {label.dtype} {list(label.shape)} do not fit the logits: this loss takes '
            f'{list(expected)}; give others, or another loss_fn'
        )
