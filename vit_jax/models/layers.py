"""What the families share: types of intermediate results, the head, rematerialisation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT_POLICIES: Mapping[str, Callable | None] = {
    'full': None,  # keep nothing of a block but its input
    # Keep what matrix products with parameters gave.
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def at_least_float32(dtype: Any) -> jnp.dtype:
    """What softmax, weight standardisation and logits are computed in.

    float32 for all 16- and 32-bit types, float64 in a float64 model.
    """
    return jnp.promote_types(dtype, jnp.float32)


def rematerialised(
    block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """The class of a block that recomputes its activations in the backward pass.

    Args:
      block: class of the module.
      remat: a key of `REMAT_POLICIES`, or '' for `block` as it is.
      static_argnums: arguments of `__call__` that are no arrays; `self` is number 0.

    Raises:
      ValueError: no such policy.
    """
    if not remat:
        return block
    if remat not in REMAT_POLICIES:
        raise ValueError(f'unknown remat {remat!r}: one of {", ".join(REMAT_POLICIES)}, or empty')
    return nn.remat(block, static_argnums=static_argnums, policy=REMAT_POLICIES[remat])


def check_patches(
    patch: tuple[int, int], image: tuple[int, int], features: tuple[int, int]
) -> None:
    """Checks that a map of features is a whole number of patches.

    Args:
      patch: height and width of a patch, in positions of the map.
      image: height and width of the image, pixels.
      features: height and width of the map: the image itself, or what a ResNet made of it.

    Raises:
      ValueError: it is not.
    """
    if features[0] % patch[0] or features[1] % patch[1]:
        of = '' if image == features else f' ({features[0]} x {features[1]} after the ResNet)'
        raise ValueError(
            f'an image of {image[0]} x {image[1]} pixels{of} is not a whole number of '
            f'{patch[0]} x {patch[1]} patches'
        )


def head(num_classes: int, *, name: str, dtype: Any, bias_init: float = 0.0) -> nn.Dense:
    """The classification layer, initialised to zeros: features [..., D] to logits [..., C].

    Operands are in `dtype`, logits at least in float32: rounding them to bfloat16 would round the
    loss.
    """
    return nn.Dense(
        num_classes,
        dtype=dtype,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias_init),
        dot_general=functools.partial(
            jax.lax.dot_general, preferred_element_type=at_least_float32(dtype)
        ),
        name=name,
    )
