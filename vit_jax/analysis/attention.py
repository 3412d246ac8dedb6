"""What a Vision Transformer attends to: attention maps, rollout, distance, relevance of a class.

Everything is computed from the attention weights after softmax, which every block gives on request
whatever kernel it normally runs (`models.apply_with_intermediates`), and is laid out on the grid of
patches; the other tokens (class token, distillation token) take part in the computation but have no
place in a map.

Shapes: B images, L layers (blocks), H heads, N tokens, C classes, K chosen classes, [h, w] the grid
of patches; a map's [0, 0] is the patch at the top left.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models, variants
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError, extra
from vit_jax.inference import model_folder

_EXACT = jax.lax.Precision.HIGHEST  # products of attention matrices, also where TF32 is the default
_OPACITY = 0.6  # of the colours over the brightness of an image


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The attention of a model on images, float32 NumPy arrays.

    Attributes:
      class_token: [B, L, H, h, w] share of the class token's attention that goes to each patch, in
        [0, 1]; the rest of it goes to the class token itself (and the distillation token). Of a
        model that pools its patches (classifier 'gap') the mean over all patches as queries.
      rollout: [B, h, w] attention rollout, see `rollout`, from the class token to each patch; of a
        model without class token from the mean of the tokens, which is what its head reads.
      mean_distance: [B, L, H] pixels of the model's input, see `mean_distance`.
      logits: [B, C] scores of the classes.
    """

    class_token: np.ndarray
    rollout: np.ndarray
    mean_distance: np.ndarray
    logits: np.ndarray


def check(model: model_folder.Model) -> models.VisionTransformer:
    """Returns the module; `UserError` if it has no attention, or gives scores for every token."""
    if not isinstance(model.model, models.VisionTransformer):
        raise UserError(
            'an MLP-Mixer has no attention: its tokens are mixed with fixed weights, the same for '
            'every image; give a ViT, a hybrid or a DeiT'
        )
    if model.model.classifier not in ('token', 'gap'):
        raise UserError(
            f'a model with classifier {model.model.classifier!r} gives a result for every token; '
            "attention is shown for models with classifier 'token' or 'gap'"
        )
    return model.model


def maps(model: model_folder.Model, pixels: np.ndarray) -> AttentionMaps:
    """Attention maps, rollout and mean attention distance of images.

    Args:
      model: what `model_folder.load` gives.
      pixels: float32 [B, height, width, 3] in [0, 255], as `Preprocess.evaluate` gives. It
        is compiled for each B; all images are computed at once.

    Raises:
      UserError: see `check`.
    """
    return AttentionMaps(*map(np.asarray, _maps(check(model), model.params, pixels)))


def relevance(model: model_folder.Model, pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How relevant each patch is for the score of a class: gradient-weighted attention.

    From Chefer, Gur, Wolf: Generic Attention-model Explainability (https://arxiv.org/abs/2103.15679),
    equations 5 and 6 for self-attention alone: R starts as the identity and becomes R + mean over
    heads of relu(gradient * A) R in each block, with the attention weights A after softmax and the
    gradient of the class's logit with respect to them. The result is the row of R of what the head
    reads: the class token; of a DeiT the mean of class and distillation token, since its logit is
    the mean of two heads; without class token the mean of all rows. The identity itself
    is left out.

    Args:
      model: what `model_folder.load` gives, with a head.
      pixels: see `maps`.
      classes: int [B, K], for each image the labels to explain.

    Returns:
      float32 [B, K, h, w], at least 0, without unit: compare patches, not classes.

    Raises:
      UserError: see `check`; a model without head; a label that the model does not have.
    """
    module = check(model)
    count = len(model.class_names)
    if not count:
        raise UserError('this model has no classification head, so there is no class to explain')
    classes = np.asarray(classes)
    if classes.ndim != 2 or len(classes) != len(pixels):
        raise ValueError(f'classes must be [{len(pixels)}, K], got {list(classes.shape)}')
    if classes.size and not (0 <= classes.min() and classes.max() < count):
        raise UserError(f'labels of this model are 0 to {count - 1}')
    return np.asarray(_relevance(module, model.params, pixels, classes.astype(np.int32)))


def rollout(layers: Sequence[jax.Array], start: jax.Array) -> jax.Array:
    """Attention rollout: how attention passes information on from layer to layer.

    Abnar and Zuidema: Quantifying Attention Flow in Transformers (https://arxiv.org/abs/2005.00928):
    in each layer 0.5 A + 0.5 I, with the mean A over heads and the identity I for the residual
    connection, rows normalised to sum 1; the product over layers, last layer leftmost.

    Args:
      layers: [B, H, N, N] attention weights of each block, the first block first.
      start: [N] weights of the rows of the product to sum up, such as 1 for the class token.

    Returns:
      [B, N] that row, or mix of rows.
    """
    row = jnp.broadcast_to(start, (len(layers[0]), len(start)))
    identity = jnp.eye(len(start))
    for layer in reversed(layers):  # A row times matrices: N times less work than their product.
        mixed = 0.5 * layer.mean(axis=1) + 0.5 * identity[None]
        mixed = mixed / mixed.sum(axis=-1, keepdims=True)
        row = jnp.einsum('bn,bnm->bm', row, mixed, precision=_EXACT)
    return row


def mean_distance(
    layer: jax.Array, grid: tuple[int, int], stride: tuple[float, float]
) -> jax.Array:
    """Mean attention distance of each head.

    Dosovitskiy et al.: An Image is Worth 16x16 Words (https://arxiv.org/abs/2010.11929), figure 7
    and appendix D.7: the distance between the query's patch and the patch it attends to, weighted
    by attention, averaged over all queries. Class and distillation token have no place and are left
    out; the attention that is left is normalised to sum 1, so that a head does not look local
    because it attends to the class token.

    Args:
      layer: [B, H, N, N] attention weights; the last h * w tokens are the patches.
      grid: (h, w).
      stride: distance of neighbouring patches down and across, pixels.

    Returns:
      [B, H] pixels, between the centres of patches.
    """
    count = grid[0] * grid[1]
    between = layer[:, :, -count:, -count:]
    # Not a division by 0 where a head gives all it has to the class token.
    between = between / jnp.maximum(
        between.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny
    )
    rows, columns = (
        (axis * size).reshape(-1)
        for axis, size in zip(jnp.indices(grid, dtype=jnp.float32), stride, strict=True)
    )
    distance = jnp.hypot(rows[:, None] - rows[None], columns[:, None] - columns[None])
    return jnp.einsum('bhqk,qk->bhq', between, distance, precision=_EXACT).mean(axis=-1)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels to show: RGB as they are, of any other number of channels the mean, in grey.

    Args:
      pixels: [height, width, channels] in [0, 255].

    Returns:
      uint8 [height, width, 3].
    """
    if pixels.shape[2] != 3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return np.rint(pixels).astype(np.uint8)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Colours over an image: dark where a map has its minimum, bright yellow at its maximum.

    A map covers what the model sees (`Preprocess.seen`: by default the whole image, squashed), at
    any resolution and aspect ratio: patch [i, j] of [h, w] lies over rows i / h to (i + 1) / h.

    Args:
      image: [height, width, 3], uint8 or float, in [0, 255].
      heat: [h, w] finite numbers, no unit; scaled to its own range, enlarged bilinearly with each
        value at the centre of its patch. A constant map is all minimum.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: other shapes, or numbers that are not finite.
    """
    import cv2

    with extra('report'):
        import matplotlib

    heat = np.asarray(heat, np.float32)
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[2] != 3 or heat.ndim != 2:
        raise ValueError(
            f'expected image [height, width, 3], heat [h, w]; got {image.shape}, {heat.shape}'
        )
    if not np.isfinite(heat).all():
        raise ValueError('the map to draw has NaN or infinite values')
    span = float(np.ptp(heat))
    scaled = (heat - heat.min()) / span if span else np.zeros_like(heat)
    scaled = cv2.resize(scaled, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = 255 * matplotlib.colormaps['inferno'](scaled)[..., :3]
    grey = image.mean(axis=-1, keepdims=True)  # Colours of the image would mix with the map's.
    return np.rint(_OPACITY * colours + (1 - _OPACITY) * grey).clip(0, 255).astype(np.uint8)


def _read(
    model: models.VisionTransformer,
    params,
    pixels: jax.Array,
    offsets: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Logits [B, C], attention weights [B, H, N, N] of each block, patches [B, h, w, D]."""
    logits, out = models.apply_with_intermediates(
        model, params, normalize(pixels), attention_weights=True, attention_offsets=offsets
    )
    layers = [out[_name(layer)] for layer in range(model.transformer['num_layers'])]
    return logits, layers, out['patch_embedding']


def _name(layer: int) -> str:
    return f'Transformer/encoderblock_{layer}/attention_weights'


def _on_grid(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[..., N] to [..., h, w]: the patches are the last tokens."""
    return tokens[..., -grid[0] * grid[1] :].reshape(*tokens.shape[:-1], *grid)


def _mean_of(tokens: slice, count: int) -> jax.Array:
    """[count] weights that average over some of the tokens."""
    chosen = jnp.zeros(count).at[tokens].set(1.0)
    return chosen / chosen.sum()


@functools.partial(jax.jit, static_argnums=0)
def _maps(model, params, pixels):
    logits, layers, patches = _read(model, params, pixels)
    grid = patches.shape[1:3]
    tokens = layers[0].shape[-1]
    cls = model.reads_class_token
    start = _mean_of(slice(1) if cls else slice(model.prefix_tokens, None), tokens)
    # A query's row of attention, or the mean of all; a sum of products would round.
    rows = [
        layer[:, :, 0] if cls else layer[:, :, model.prefix_tokens :].mean(axis=2)
        for layer in layers
    ]
    hybrid = model.resnet and variants.resnet_stride(model.resnet['num_layers'])
    stride = tuple(float(side * (hybrid or 1)) for side in model.patches['size'])
    return (
        _on_grid(jnp.stack(rows, axis=1), grid),
        _on_grid(rollout(layers, start), grid),
        jnp.stack([mean_distance(layer, grid, stride) for layer in layers], axis=1),
        logits.astype(jnp.float32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _relevance(model, params, pixels, classes):
    def forward(offsets):
        logits, layers, _ = _read(model, params, pixels, offsets)
        return logits, layers

    _, shapes, patches = jax.eval_shape(lambda: _read(model, params, pixels))
    grid = patches.shape[1:3]
    zeros = {_name(i): jnp.zeros(x.shape, x.dtype) for i, x in enumerate(shapes)}
    logits, pull_back, layers = jax.vjp(forward, zeros, has_aux=True)
    # The tokens that the head reads.
    cls = slice(2 if model.distilled else 1)
    read = cls if model.reads_class_token else slice(model.prefix_tokens, None)
    start = _mean_of(read, layers[0].shape[-1])

    def of_class(labels):  # [B] -> [B, h, w]
        (gradients,) = pull_back(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))
        # One row (or mix of rows) of R = (I + A_L) ... (I + A_1), less that of the identity,
        # which without class token is the same for every patch, and much larger than the rest.
        added = jnp.zeros((len(labels), len(start)))
        for layer in reversed(range(len(layers))):
            weighted = jax.nn.relu(gradients[_name(layer)] * layers[layer]).mean(axis=1)
            row = start[None] + added
            added += jnp.einsum('bn,bnm->bm', row, weighted, precision=_EXACT)
        return _on_grid(added, grid)

    # One class after another: the gradients of all at once may not fit.
    return jax.lax.map(of_class, classes.T).swapaxes(0, 1)
