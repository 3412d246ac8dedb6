"""What stands between the encoder's tokens and the classification layer: pooling.

Shapes: B batch, N tokens, D width, M hidden width of the MLP.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import layers
from vit_jax.models.attention import MultiHeadDotProductAttention

CLASSIFIERS = (
    *('token', 'gap', 'max', 'avgmax', 'token_gap', 'map'),
    *('unpooled', 'token_unpooled'),
)


def pool(x: jax.Array, classifier: str, prefix: int) -> jax.Array:
    """Encoded tokens to what the head reads, but for 'map', which has parameters.

    Args:
      x: tokens [B, N, D].
      classifier: see `vit.VisionTransformer`.
      prefix: how many tokens stand in front of the patches, the class token first.

    Returns:
      [B, D]; [B, 2 D] of 'token_gap'; tokens of the unpooled ones.
    """
    patches = x[:, prefix:]
    if classifier == 'token':
        return x[:, 0]
    if classifier == 'gap':
        return jnp.mean(patches, axis=1)
    if classifier == 'max':
        return jnp.max(patches, axis=1)
    if classifier == 'avgmax':
        return (jnp.mean(patches, axis=1) + jnp.max(patches, axis=1)) / 2
    if classifier == 'token_gap':
        return jnp.concatenate([x[:, 0], jnp.mean(patches, axis=1)], axis=-1)
    if classifier == 'token_unpooled':
        return x if prefix == 1 else jnp.concatenate([x[:, :1], patches], axis=1)
    return patches


class MAPHead(nn.Module):
    """Attention pooling with one learned query, `probe` [1, 1, D], and an MLP behind it.

    Module and parameter names are big_vision's (https://arxiv.org/abs/2106.04560, section 3.2).

    Attributes:
      mlp_dim: M.
      num_heads: of the attention.
      dtype: type of activations and matrix products.
      act: activation function of the MLP, a name in `layers.ACTIVATIONS`.
      layer_norm_eps: what LayerNorm adds to the variance.
    """

    mlp_dim: int
    num_heads: int
    dtype: Any = jnp.float32
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens [B, N, D] to [B, D]."""
        shape = (1, 1, x.shape[-1])
        probe = self.param('probe', nn.initializers.xavier_uniform(), shape, jnp.float32)
        # On explicit axes, the probe has to be spread over devices as the tokens are.
        probe = probe.astype(self.dtype) + jnp.zeros_like(x[:, :1])
        attention = MultiHeadDotProductAttention(
            self.num_heads, dtype=self.dtype, name='MultiHeadDotProductAttention_0'
        )
        x = attention(x, deterministic=True, probe=probe)
        norm = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name='LayerNorm_0')
        mlp = layers.MlpBlock(self.mlp_dim, dtype=self.dtype, act=self.act, name='MlpBlock_0')
        return (x + mlp(norm(x), deterministic=True))[:, 0]
