"""The ResNet in front of hybrid models: weight-standardised convolutions and GroupNorm.

That of "Big Transfer" (https://arxiv.org/abs/1912.11370), with post-activation bottleneck units.
Names of modules and parameters, and both epsilons, are those of the released checkpoints.

Shapes: B batch, h and w positions of the feature map, F channels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.layers import at_least_float32, rematerialised

GROUPS = 32
STANDARDISATION_EPSILON = 1e-5  # added to the standard deviation, not to the variance
GROUP_NORM_EPSILON = 1e-6


class StdConv(nn.Module):
    """Convolution without bias whose kernel is standardised (https://arxiv.org/abs/1903.10520).

    Each output channel's weights, `kernel` [height, width, input, output], have their mean
    subtracted and are divided by their standard deviation + 1e-5, in float32 for any `dtype`.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: Sequence[int] = (1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, F] to [B, ceil(h / stride), ceil(w / stride), features] of `dtype`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape, jnp.float32)
        kernel = kernel.astype(at_least_float32(self.dtype))
        kernel = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
        kernel = kernel / (kernel.std(axis=(0, 1, 2), keepdims=True) + STANDARDISATION_EPSILON)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            'SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )


def _group_norm(**kwargs: Any) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=GROUPS, epsilon=GROUP_NORM_EPSILON, **kwargs)


class ResidualUnit(nn.Module):
    """Bottleneck unit: 1x1, 3x3 (with the stride), 1x1 to four times as many channels.

    Attributes:
      features: channels of the 3x3 convolution.
      strides: of the 3x3 convolution and of the projection of the shortcut.
      dtype: type of activations and convolutions; parameters stay float32.
    """

    features: int
    strides: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, F] to [B, ceil(h / stride), ceil(w / stride), 4 features]."""
        conv = functools.partial(StdConv, dtype=self.dtype)
        norm = functools.partial(_group_norm, dtype=self.dtype)
        features, strides = self.features, tuple(self.strides)

        shortcut = x
        if x.shape[-1] != 4 * features or strides != (1, 1):
            shortcut = conv(4 * features, (1, 1), strides, name='conv_proj')(x)
            shortcut = norm(name='gn_proj')(shortcut)
        y = nn.relu(norm(name='gn1')(conv(features, (1, 1), name='conv1')(x)))
        y = nn.relu(norm(name='gn2')(conv(features, (3, 3), strides, name='conv2')(y)))
        y = conv(4 * features, (1, 1), name='conv3')(y)
        # Zeros: a new unit starts as its shortcut.
        y = norm(name='gn3', scale_init=nn.initializers.zeros)(y)
        return nn.relu(shortcut + y)


class ResNetStage(nn.Module):
    """`block_size` residual units; the first may have a stride.

    Attributes:
      block_size: number of units, `unit1`, `unit2`, ...
      nout: channels of the 3x3 convolutions.
      first_stride: stride of the first unit.
      dtype: type of activations and convolutions.
      remat: see `ResNet.remat`.
    """

    block_size: int
    nout: int
    first_stride: tuple[int, int]
    dtype: Any = jnp.float32
    remat: str = ''

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, F] to [B, ceil(h / stride), ceil(w / stride), 4 nout]."""
        unit = rematerialised(ResidualUnit, self.remat)
        for i in range(self.block_size):
            strides = self.first_stride if i == 0 else (1, 1)
            x = unit(self.nout, strides, self.dtype, name=f'unit{i + 1}')(x)
        return x


def backbone(
    images: jax.Array,
    *,
    num_layers: Sequence[int],
    width_factor: float = 1,
    dtype: Any = jnp.float32,
    remat: str = '',
) -> jax.Array:
    """The ResNet of a hybrid; to be called in the hybrid's own compact method.

    Its modules, `conv_root`, `gn_root`, `block1`, `block2`, ..., become children of the caller, as
    the released checkpoints have them.

    Args:
      images: [B, height, width, 3].
      num_layers: units in each stage; none leaves the root: a convolution and a pooling, each of
        stride 2.
      width_factor: channels are 64 times this after the root (a multiple of 32), and double from
        stage to stage.
      dtype: type of activations and convolutions.
      remat: recompute activations of the units, see `layers.REMAT_POLICIES`.

    Returns:
      [B, ceil(height / s), ceil(width / s), F] of `dtype`, with s =
      `variants.resnet_stride(num_layers)`, F = 64
      width_factor for the root alone and 256 width_factor 2^(stages - 1) with stages.
    """
    width = int(64 * width_factor)
    x = StdConv(width, (7, 7), (2, 2), dtype, name='conv_root')(images)
    x = nn.relu(_group_norm(name='gn_root', dtype=dtype)(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
    for i, block_size in enumerate(num_layers):
        first_stride = (1, 1) if i == 0 else (2, 2)
        x = ResNetStage(block_size, width * 2**i, first_stride, dtype, remat, name=f'block{i + 1}')(
            x
        )
    return x
