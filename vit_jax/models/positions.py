"""Position embeddings for images of another size than a model was trained with."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import variants
from vit_jax.models import layers
from vit_jax.models.vit import VisionTransformer


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed position embeddings of MoCo v3 (Chen et al. 2021), big_vision's `sincos2d`.

    A quarter of the width each: sine and cosine of x, sine and cosine of y, at wavelengths from 2
    pi to 10,000 * 2 pi.

    Args:
      rows: of patches.
      columns: of patches.
      width: D, a multiple of 4, at least 8.

    Returns:
      [rows * columns, D] float32.
    """
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def with_sincos(params: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, Any]:
    """Parameters whose patches have the positions of `sincos_2d`.

    Args:
      params: of a VisionTransformer with position embeddings, on the host.
      grid: rows and columns of its patches.
    """
    old = np.asarray(params['Transformer']['posembed_input']['pos_embedding'])
    patches = sincos_2d(*grid, old.shape[2])
    table = np.concatenate([old[0, : old.shape[1] - len(patches)], patches])[None]
    transformer = {**params['Transformer'], 'posembed_input': {'pos_embedding': table}}
    return {**params, 'Transformer': transformer}


def for_image_size(
    model: VisionTransformer,
    params: Mapping[str, Any],
    image_size: tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Parameters for images of another size: position embeddings are resized, bilinearly.

    With the corners aligned, as `checkpoint.load_pretrained` does. A pure function of `params`,
    differentiable, for use inside `jax.jit`:

        params = models.for_image_size(model, params, images.shape[1:3])
        logits = model.apply({'params': params}, images, train=False)

    Args:
      model: its module.
      params: of the model, in JAX or NumPy.
      image_size: height and width, pixels; a whole number of patches.
      grid: rows and columns of the position embeddings in `params`; None for a square.

    Returns:
      A tree of the same leaves, but for the position embeddings [1, N, D] of that size.

    Raises:
      ValueError: the model has no position embeddings, their number does not fit `grid`, or the
        image is not a whole number of patches.
    """
    own = isinstance(model, VisionTransformer)
    if own and model.rotary is not None and 'posembed_input' not in params['Transformer']:
        _patch_grid(model, image_size)
        return dict(params)  # rotary positions follow the image
    if not own or 'posembed_input' not in params['Transformer']:
        raise ValueError('the model has no position embeddings that could be resized')
    embedding = jnp.asarray(params['Transformer']['posembed_input']['pos_embedding'])
    prefix = model.prefix_positions
    count = embedding.shape[1] - prefix
    grid = grid or (math.isqrt(count),) * 2
    if grid[0] * grid[1] != count:
        raise ValueError(
            f'{count} position embeddings of patches are not a grid of {grid[0]} x {grid[1]}: '
            'say grid=(rows, columns)'
        )
    wide = layers.at_least_float32(embedding.dtype)
    rows, columns = map(_interpolation, grid, _patch_grid(model, image_size))
    patches = jnp.einsum(
        'yr,xc,rcd->yxd',
        jnp.asarray(rows, wide),
        jnp.asarray(columns, wide),
        embedding[0, prefix:].reshape(*grid, -1).astype(wide),
        precision=jax.lax.Precision.HIGHEST,
    )
    patches = layers.as_tokens(patches[None]).astype(embedding.dtype)
    embedding = jnp.concatenate([embedding[:, :prefix], patches], axis=1)
    encoder = {**params['Transformer'], 'posembed_input': {'pos_embedding': embedding}}
    return {**params, 'Transformer': encoder}


def _patch_grid(model: VisionTransformer, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches."""
    stride = 1 if model.resnet is None else variants.resnet_stride(model.resnet['num_layers'])
    rows, columns = (-(-side // stride) for side in image_size)
    patch = model.patches['size']
    layers.check_patches(patch, image_size, (rows, columns))
    return rows // patch[0], columns // patch[1]


@functools.lru_cache
def _interpolation(old: int, new: int) -> np.ndarray:
    """[new, old] float64: linear interpolation, the first and last positions aligned."""
    place = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(old)[None]))
