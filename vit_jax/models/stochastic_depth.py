"""Stochastic depth: in training, branches of blocks are left out at random, image by image.

"Deep Networks with Stochastic Depth" (https://arxiv.org/abs/1603.09382). What decides it comes from
outside, as the collection `stochastic_depth`, so that it may depend on the place of an image in the
global batch, and is the same on any devices. Without that collection, blocks are whole.

Shapes: B batch, L blocks.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

COLLECTION = 'stochastic_depth'
BRANCHES = 2  # of a block: attention (or the MLP over tokens), MLP


def drop(block: nn.Module, branch: int, x: jax.Array) -> jax.Array:
    """What a branch of a block gave, [B, ...], times the factor of each image, 0 if left out."""
    if not block.has_variable(COLLECTION, 'factor'):
        return x
    factors: Any = block.get_variable(COLLECTION, 'factor')
    return x * jnp.expand_dims(factors[:, branch].astype(x.dtype), range(1, x.ndim))


def rates(rate: float, blocks: int) -> np.ndarray:
    """[L] shares of the images for which a branch is left out: linear from 0 to `rate`."""
    return np.linspace(0, rate, blocks)


def factors(rate: float, names: list[tuple[str, ...]], draws: jax.Array) -> Any:
    """The collection for a batch.

    A branch that stays is divided by the probability that it does, so that its mean is what it is
    without.

    Args:
      rate: of the last block, in [0, 1).
      names: of the blocks in the tree of parameters, the first one first.
      draws: [B, L, BRANCHES] uniform in [0, 1).

    Returns:
      Nested dict, for each block `factor` [B, BRANCHES] float32.
    """
    collection: dict[str, Any] = {}
    for layer, share in enumerate(rates(rate, len(names))):
        place = collection
        for name in names[layer]:
            place = place.setdefault(name, {})
        stays = draws[:, layer] >= share
        place['factor'] = stays.astype(jnp.float32) / np.float32(1 - share)
    return collection
