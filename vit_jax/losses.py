"""Losses of the training step, and what one's own looks like.

Shapes: B examples of a micro-batch, N tokens, C classes or outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vit_jax import sharding
from vit_jax.errors import UserError
from vit_jax.models.layers import at_least_float32

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# A loss is a function (logits, batch, params) -> (loss, metrics) of the model's output, what the
# batch holds (`image`, mirrored, in [0, 255]; `label`; of weighted examples `weight`, of mean 1
# over the training set; ...) and the parameters, of one micro-batch:
# the share of one device, cut into `accum_steps`. The loss is a scalar, and metrics a dict of
# scalars. Of each the step takes the mean over micro-batches and devices, all of the same number of
# examples. So what is a mean over examples becomes the mean over the whole batch, a term of the
# parameters alone (weight decay) stays what it is, and what compares examples with each other
# compares those of one micro-batch, unless it asks for `sharding.whole_batch`.
LossFn = Callable[[Any, Batch, Any], tuple[jax.Array, Metrics]]


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
        loss = _mean(optax.softmax_cross_entropy_with_integer_labels(logits, label), batch)
        right = jnp.argmax(logits, axis=-1) == label
        return loss, {'accuracy_train': jnp.mean(right, dtype=jnp.float32)}
    _check_shape(label, logits.shape)
    return _mean(optax.softmax_cross_entropy(logits, label.astype(logits.dtype)), batch), {}


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
    return _mean(losses.sum(axis=-1), batch), {}


def cross_entropy(
    kind: str = 'softmax',
    *,
    smoothing: float = 0.0,
    class_weights: Sequence[float] | np.ndarray = (),
    positive_weights: Sequence[float] | np.ndarray = (),
) -> LossFn:
    """Builds the cross-entropy of a recipe.

    The label y, a class or probabilities [C], becomes y (1 - smoothing) + smoothing / C, see
    "Rethinking the Inception Architecture" (https://arxiv.org/abs/1512.00567). The loss of an
    example counts times its class's weight, of probabilities their mean weight, taken before
    smoothing. The sum over a batch is divided by the number of examples, not by their weights.

    Where classes do not exclude each other, class c's loss -(y log p + (1 - y) log(1 - p)) becomes
    -(w y log p + (1 - y) log(1 - p)) with its positive weight w, as PyTorch's `pos_weight`.

    Args:
      kind: 'softmax', or 'sigmoid': the binary cross-entropy, summed over classes
        (https://arxiv.org/abs/2006.07159).
      smoothing: in [0, 1).
      class_weights: [C]; empty for 1 each.
      positive_weights: [C], of 'sigmoid'; empty for 1 each.

    Returns:
      A loss of logits [..., C] and labels, integers [...] or of the shape of the logits; with
      `accuracy_train`, share in [0, 1], for integers.
    """
    if kind == 'softmax' and not smoothing and not len(class_weights):
        return softmax_cross_entropy
    weights = np.asarray(class_weights, np.float32)
    positive = np.asarray(positive_weights, np.float32)

    def loss_fn(logits: jax.Array, batch: Batch, params: Any) -> tuple[jax.Array, Metrics]:
        del params
        label, logits, metrics = batch['label'], at_least_float(logits), {}
        if jnp.issubdtype(label.dtype, jnp.integer):
            _check_shape(label, logits.shape[:-1])
            right = jnp.argmax(logits, axis=-1) == label
            metrics['accuracy_train'] = jnp.mean(right, dtype=jnp.float32)
            label = jax.nn.one_hot(label, logits.shape[-1])
        _check_shape(label, logits.shape)
        label = label.astype(logits.dtype)
        smooth = optax.smooth_labels(label, smoothing)
        if kind == 'sigmoid':
            losses = _binary(logits, smooth, positive).sum(axis=-1)
        else:
            losses = optax.softmax_cross_entropy(logits, smooth)
        if weights.size:
            losses *= label @ jnp.asarray(weights, logits.dtype)
        return _mean(losses, batch), metrics

    return loss_fn


def _binary(logits: jax.Array, label: jax.Array, positive: np.ndarray) -> jax.Array:
    """Binary cross-entropy of each class, with the weights of its positives, [..., C]."""
    if not positive.size:
        return optax.sigmoid_binary_cross_entropy(logits, label)
    weights = jnp.asarray(positive.reshape((1,) * (label.ndim - 1) + (-1,)), logits.dtype)
    there = weights * label * jax.nn.log_sigmoid(logits)
    return -(there + (1 - label) * jax.nn.log_sigmoid(-logits))


def distillation(
    base: LossFn, kind: str, *, alpha: float = 0.5, temperature: float = 1.0
) -> LossFn:
    """Builds the loss of a student that learns from a teacher.

    With the student's logits s, the teacher's t, the temperature T, and KL = sum over classes of
    softmax(t / T) * (log_softmax(t / T) - log_softmax(s / T)), means over examples of:

    - 'hard': (1 - alpha) * base + alpha * cross-entropy of s and the teacher's class;
    - 'soft': (1 - alpha) * base + alpha * T^2 * KL / classes;
    - 'patient': T^2 * KL.

    The first two are DeiT's (https://arxiv.org/abs/2012.12877; its code divides by the number of
    classes): base sees the logits of the class token, the teacher teaches the distillation token.
    The last one is big_vision's (https://arxiv.org/abs/2106.05237), in which labels have no say.

    Args:
      base: the loss of the labels.
      kind: 'hard', 'soft' or 'patient'.
      alpha: share of the teacher, in [0, 1].
      temperature: T.

    Returns:
      A loss of logits [B, 2, C] (of 'patient' [B, C]), that of the class token first, and a batch
      with `teacher`, the teacher's logits [B, C]; its metrics are those of `base`.
    """

    def divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
        ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (student, teacher))
        return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()

    def loss_fn(logits: jax.Array, batch: Batch, params: Any) -> tuple[jax.Array, Metrics]:
        logits, teacher = at_least_float(logits), at_least_float(batch['teacher'])
        if kind == 'patient':
            return divergence(logits, teacher), base(logits, batch, params)[1]
        of_labels, metrics = base(logits[:, 0], batch, params)
        if kind == 'hard':
            right = jnp.argmax(teacher, axis=-1)
            told = optax.softmax_cross_entropy_with_integer_labels(logits[:, 1], right).mean()
        else:
            told = divergence(logits[:, 1], teacher) / teacher.shape[-1]
        return (1 - alpha) * of_labels + alpha * told, metrics

    return loss_fn


# What `models.LitModel` gives for pairs of an image and a text.
Embeddings = tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]


def contrastive(mesh: Mesh | None = None) -> LossFn:
    """Builds the softmax loss of pairs: an image is to find its text in the batch, and vice versa.

    With the temperature t and unit embeddings x of images and y of texts, the mean over all pairs i
    of the *global* batch of -(log softmax_j(t x_i y_j)[i] + log softmax_j(t y_i x_j)[i]) / 2; CLIP
    (https://arxiv.org/abs/2103.00020, figure 3), LiT (https://arxiv.org/abs/2111.07991).

    Args:
      mesh: that the batch is spread over, see `sharding.mean_over_batch`; no accumulation.

    Returns:
      A loss of the three outputs of `models.LitModel`; metrics `accuracy_train` (share of the
      images whose own text fits best of the batch) and `temperature`.
    """

    def loss_fn(outputs: Embeddings, batch: Batch, params: Any) -> tuple[jax.Array, Metrics]:
        del batch, params
        images, texts, out = outputs
        all_images, first = sharding.whole_batch(images, mesh)
        all_texts, _ = sharding.whole_batch(texts, mesh)
        own = first + jnp.arange(len(images))
        to_texts = out['t'][0] * _products(images, all_texts)
        to_images = out['t'][0] * _products(texts, all_images)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits, own).mean()
            for logits in (to_texts, to_images)
        ]
        right = jnp.argmax(to_texts, axis=-1) == own
        metrics = {'accuracy_train': jnp.mean(right, dtype=jnp.float32)}
        return (losses[0] + losses[1]) / 2, metrics | {'temperature': out['t'][0]}

    return loss_fn


def pairwise_sigmoid(mesh: Mesh | None = None, chunk: int = 1024) -> LossFn:
    """Builds SigLIP's loss of pairs: of each image and each text, whether they belong together.

    With temperature t, bias b, and z_ij = 1 for i = j, else -1, the mean over all images i of the
    *global* batch of -sum_j log sigmoid(z_ij (t x_i y_j + b)); https://arxiv.org/abs/2303.15343,
    section 3. Logits exist for `chunk` texts at a time, also in the backward pass.

    Args:
      mesh: see `contrastive`.
      chunk: texts.

    Returns:
      A loss of the three outputs of a `models.LitModel` with a bias; metrics `temperature`, `bias`.
    """

    def loss_fn(outputs: Embeddings, batch: Batch, params: Any) -> tuple[jax.Array, Metrics]:
        del batch, params
        images, texts, out = outputs
        all_texts, first = sharding.whole_batch(texts, mesh)
        own, count = first + jnp.arange(len(images)), len(all_texts)
        chunks = -(-count // chunk)
        places = jnp.arange(chunks * -(-count // chunks)).reshape(chunks, -1)
        padded = jnp.pad(all_texts, ((0, places.size - count), (0, 0)))

        @jax.checkpoint
        def of_chunk(texts: jax.Array, places: jax.Array) -> jax.Array:
            logits = out['t'][0] * _products(images, texts) + out['b'][0]
            sign = jnp.where(own[:, None] == places[None], 1, -1)
            losses = jax.nn.log_sigmoid(sign * logits)
            return -jnp.sum(losses, where=(places < count)[None])

        parts = padded.reshape(*places.shape, -1)
        loss = jax.lax.map(lambda part: of_chunk(*part), (parts, places)).sum() / len(images)
        return loss, {'temperature': out['t'][0], 'bias': out['b'][0]}

    return loss_fn


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
    """[n, m] of [n, C] and [m, C]. A GPU's short numbers would be wrong by the temperature more."""
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def balanced_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights that make all classes count alike: examples / (classes * examples of the class).

    Args:
      labels: integers [examples] in [0, classes).
      classes: C.

    Returns:
      float32 [C]; their mean over the examples is 1. A class without examples counts as if it had
      one.
    """
    counts = np.maximum(1, np.bincount(labels, minlength=classes))
    return (len(labels) / (classes * counts)).astype(np.float32)


def balanced_positives(labels: np.ndarray) -> np.ndarray:
    """Weights that make the positives of a class count as much as its negatives.

    Args:
      labels: 0 or 1, [examples, C].

    Returns:
      float32 [C]: negatives / positives; 1 for a class that has no negative or no positive.
    """
    positives = np.sum(labels, axis=0, dtype=np.float64)
    weights = (len(labels) - positives) / np.maximum(1, positives)
    return np.where(positives * weights, weights, 1).astype(np.float32)


def regression(
    kind: str = 'mse',
    *,
    delta: float = 1.0,
    mean: Sequence[float] | np.ndarray = (0.0,),
    deviation: Sequence[float] | np.ndarray = (1.0,),
) -> LossFn:
    """Builds the loss of numbers: the outputs are compared with (number - mean) / deviation.

    Args:
      kind: 'mse', the squared error; or 'huber', 0.5 e**2 where the error e is at most delta, else
        delta (|e| - 0.5 delta) (Huber 1964, https://doi.org/10.1214/aoms/1177703732).
      delta: of 'huber', above 0, in deviations.
      mean: [C] or [1].
      deviation: [C] or [1].

    Returns:
      A loss of outputs [..., C] and labels of the same shape, or [...] where C is 1: the mean over
      all axes. No metrics.
    """
    center, scale = (np.asarray(value, np.float32) for value in (mean, deviation))

    def loss_fn(logits: jax.Array, batch: Batch, params: Any) -> tuple[jax.Array, Metrics]:
        target, outputs = batch['label'], at_least_float(logits)
        if target.ndim == outputs.ndim - 1 and outputs.shape[-1] == 1:
            target = target[..., None]
        _check_shape(target, outputs.shape)
        shape = (1,) * (outputs.ndim - 1) + (-1,)
        target = target.astype(outputs.dtype) - center.reshape(shape)
        target = target / scale.reshape(shape)
        if kind == 'huber':
            return _mean(optax.huber_loss(outputs, target, delta=delta), batch), {}
        return squared_error(outputs, {**batch, 'label': target}, params)

    return loss_fn


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
    return _mean((outputs - target.astype(outputs.dtype)) ** 2, batch), {}


def _mean(losses: jax.Array, batch: Batch) -> jax.Array:
    """The mean over all axes, of each example times its weight if the batch has `weight`, [B]."""
    if 'weight' in batch:
        shape = (-1,) + (1,) * (losses.ndim - 1)
        losses = losses * batch['weight'].astype(losses.dtype).reshape(shape)
    return losses.mean()


def at_least_float(x: Any) -> jax.Array:
    """`x` as floats of at least 32 bits."""
    return jnp.asarray(x, at_least_float32(jnp.result_type(x)))


def _check_shape(label: jax.Array, expected: tuple[int, ...]) -> None:
    if label.shape != expected:
        raise UserError(
            f'labels {label.dtype} {list(label.shape)} do not fit the logits: this loss takes '
            f'{list(expected)}; give others, or another loss_fn'
        )
