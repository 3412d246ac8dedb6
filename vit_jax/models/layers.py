"""What the families share: types of intermediate results, the MLP, the head, rematerialisation."""

import functools
from collections.abc import Callable, Mapping, Sequence
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


class MlpBlock(nn.Module):
    """Two dense layers with GELU (tanh form) between them; as many outputs as inputs.

    Attributes:
      mlp_dim: width of the hidden layer.
      dropout_rate: dropout after each of the two layers.
      dtype: type of the matrix products.
      kernel_init: of both kernels [inputs, outputs].
      bias_init: of both biases [outputs].
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., jax.Array] = nn.initializers.normal(stddev=1e-6)

    @nn.compact
    def __call__(self, inputs: jax.Array, *, deterministic: bool) -> jax.Array:
        """[..., inputs] to [..., inputs], over the last axis."""
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        x = self.gelu(dense(self.mlp_dim, name='Dense_0')(inputs))
        x = nn.Dropout(self.dropout_rate, name='Dropout_0')(x, deterministic=deterministic)
        x = dense(inputs.shape[-1], name='Dense_1')(x)
        return nn.Dropout(self.dropout_rate, name='Dropout_1')(x, deterministic=deterministic)

    def gelu(self, x: jax.Array) -> jax.Array:
        """The tanh form of GELU (https://arxiv.org/abs/1606.08415), [..., M] to [..., M]."""
        return nn.gelu(x, approximate=True)


def rematerialised(
    block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """The class of a block that recomputes its activations in the backward pass.

    Args:
      block: class of the module.
      remat: a key of `REMAT_POLICIES`, or '' for `block` as it is.
      static_argnums: positions of the arguments of `__call__` that are not arrays; `self` is 0.

    Raises:
      ValueError: no such policy.
    """
    if not remat:
        return block
    if remat not in REMAT_POLICIES:
        raise ValueError(f'unknown remat {remat!r}: one of {", ".join(REMAT_POLICIES)}, or empty')
    return nn.remat(block, static_argnums=static_argnums, policy=REMAT_POLICIES[remat])


def check_patches(patch: Sequence[int], image: Sequence[int], features: Sequence[int]) -> None:
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


def patch_embedding(features: int, patch: tuple[int, int], *, name: str, dtype: Any) -> nn.Conv:
    """Cuts a map into patches and projects each: [B, h, w, C] to [B, h / P, w / P, features]."""
    return nn.Conv(features, patch, strides=patch, padding='VALID', dtype=dtype, name=name)


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
