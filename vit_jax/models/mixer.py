"""MLP-Mixer: "An all-MLP Architecture for Vision" (https://arxiv.org/abs/2105.01601).

Parameter names and numerics are those of the released checkpoints. The MLPs over tokens make the
number of tokens, and so the image size, a part of the architecture.

Shapes: B batch, N tokens, D width (hidden_dim), P patch size, C classes.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import cpu, layers, stochastic_depth
from vit_jax.models.lora import Lora, adaptable


class MixerBlock(nn.Module):
    """One block: an MLP over the tokens, then an MLP over the channels, both residual."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: Any = jnp.float32
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out."""
        norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_eps, dtype=self.dtype)
        mlp = functools.partial(
            layers.MlpBlock,
            dtype=self.dtype,
            act=self.act,
            kernel_init=nn.initializers.lecun_normal(),
            bias_init=nn.initializers.zeros,
        )
        y = norm(name='LayerNorm_0')(x).swapaxes(1, 2)
        y = mlp(self.tokens_mlp_dim, name='token_mixing')(y, deterministic=True).swapaxes(1, 2)
        self.sow('intermediates', 'tokens_mlp', y)
        x = x + stochastic_depth.drop(self, 0, y)

        y = norm(name='LayerNorm_1')(x)
        y = mlp(self.channels_mlp_dim, name='channel_mixing')(y, deterministic=True)
        self.sow('intermediates', 'channels_mlp', y)
        x = x + stochastic_depth.drop(self, 1, y)
        self.sow('intermediates', 'tokens', x)
        return x


class MlpMixer(nn.Module):
    """MLP-Mixer with the original release's arguments, and our own at the end.

    Attributes:
      patches: mapping with `size`, (P, P).
      num_classes: C; 0 leaves the head out and returns features.
      num_blocks: number of blocks.
      hidden_dim: D.
      tokens_mlp_dim: width of the MLPs over tokens.
      channels_mlp_dim: width of the MLPs over channels.
      model_name: the variant's name; not used in the computation.
      dtype: type of activations and matrix products, float32 or bfloat16; parameters stay float32.
      remat: recompute activations of the blocks, see `layers.REMAT_POLICIES`; '' keeps them.
      act: activation function of the MLPs, a name in `layers.ACTIVATIONS`.
      layer_norm_eps: what LayerNorm adds to the variance.
      cpu_training: on a CPU, compute forms of the layers that train faster, see `models.cpu`.
      multi_label: see `VisionTransformer.multi_label`.
      regression: see `VisionTransformer.regression`.
      lora: see `VisionTransformer.lora`.
    """

    patches: Any
    num_classes: int
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    model_name: str | None = None
    dtype: Any = jnp.float32
    remat: str = ''
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6
    cpu_training: bool = False
    multi_label: bool = False
    regression: bool = False
    lora: Lora | None = None

    def __post_init__(self) -> None:
        """Makes the module hashable, as Flax and `jax.jit` (`static_argnames`) want it."""
        object.__setattr__(self, 'patches', layers.hashable(self.patches))
        if not isinstance(self.lora, Lora | None):  # a file may say anything
            raise TypeError(f'lora is a Lora or None, not {self.lora!r:.100}')
        super().__post_init__()

    @nn.compact
    @adaptable
    @cpu.switchable
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits.

        Args:
          inputs: floats [B, height, width, 3] in [-1, 1]; height and width are multiples of P, and
            N = height * width / P^2 is what the parameters were made for.
          train: as for the other families; a Mixer has no dropout, so it changes nothing.

        Returns:
          Logits [B, C] float32. With num_classes=0 the features [B, D] in `dtype`.

        Raises:
          ValueError: the images are of another shape or type, or not a whole number of patches; or
            unknown `remat`.
        """
        del train
        layers.check_images(inputs)
        patch = tuple(self.patches['size'])
        layers.check_patches(patch, inputs.shape[1:3], inputs.shape[1:3])
        x = layers.patch_embedding(self.hidden_dim, patch, dtype=self.dtype, name='stem')(inputs)
        self.sow('intermediates', 'patch_embedding', x)  # [B, height / P, width / P, D]
        x = layers.as_tokens(x)

        block = functools.partial(
            layers.rematerialised(MixerBlock, self.remat),
            self.tokens_mlp_dim,
            self.channels_mlp_dim,
            self.dtype,
            act=self.act,
            layer_norm_eps=self.layer_norm_eps,
        )
        for i in range(self.num_blocks):
            x = block(name=f'MixerBlock_{i}')(x)
        x = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name='pre_head_layer_norm')(x)
        self.sow('intermediates', 'encoded', x)
        x = jnp.mean(x, axis=1)
        self.sow('intermediates', 'features', x)
        if not self.num_classes:
            return x
        return layers.head(self.num_classes, name='head', dtype=self.dtype)(x)
