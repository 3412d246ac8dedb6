"""Multi-head self-attention with the released parameter tree.

Shapes: B batch, N tokens, D width, H heads, K head size (D / H).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.layers import affine, at_least_float32

ATTENTION_IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')


class HeadProjection(nn.Module):
    """Holds the kernel and bias of one attention projection in the released shapes.

    The kernel is initialised as the matrix it is: `xavier_uniform` over (inputs, outputs), then
    given its shape.
    """

    kernel_shape: tuple[int, int, int]
    bias_shape: tuple[int, ...]
    input_dims: int  # how many leading axes of the kernel are inputs

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns kernel and bias, float32, in `kernel_shape` and `bias_shape`."""

        def kernel_init(key, shape):
            inputs = 1
            for size in shape[: self.input_dims]:
                inputs *= size
            outputs = shape[0] * shape[1] * shape[2] // inputs
            return nn.initializers.xavier_uniform()(key, (inputs, outputs)).reshape(shape)

        kernel = self.param('kernel', kernel_init, self.kernel_shape)
        bias = self.param('bias', nn.initializers.zeros, self.bias_shape)
        return kernel, bias


class MultiHeadDotProductAttention(nn.Module):
    """Multi-head self-attention with the parameter tree of the Flax module of this name.

    Parameters are `query`, `key`, `value` [D, H, K] and `out` [H, K, D], as in the released files.
    Between the projections the tokens lie as [B, H, N, K], which makes the products over tokens
    plain batched matrix products: a training step of Ti/16 on a CPU is 1.5 times as fast as with
    [B, N, H, K]. Softmax is computed in float32.

    Attributes:
      num_heads: H; must divide the width.
      dropout_rate: dropout of the attention weights (0 in all released models).
      dtype: type of the matrix products.
      implementation: 'xla' (matrix products and a softmax), 'cudnn' (NVIDIA's fused kernel: 16-bit
        types on a GPU, no attention dropout), or 'auto', which is 'xla' on every device until a
        measurement says otherwise.
    """

    num_heads: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    implementation: str = 'auto'

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, deterministic: bool, queries: int | None = None
    ) -> jax.Array:
        """Lets the first tokens look at all.

        Args:
          inputs: tokens [B, N, D].
          deterministic: no dropout.
          queries: of how many tokens, from the first, the result is wanted; None for all.

        Returns:
          Tokens [B, queries or N, D].
        """
        batch, _, width = inputs.shape
        if width % self.num_heads:
            raise ValueError(f'hidden_size {width} is not divisible by num_heads {self.num_heads}')
        heads, head_size = self.num_heads, width // self.num_heads
        shape = (width, heads, head_size)
        query = self._project('query', inputs[:, :queries], shape)
        key, value = (self._project(name, inputs, shape) for name in ('key', 'value'))

        drop = 0.0 if deterministic else self.dropout_rate
        record = self.is_mutable_collection('attention_weights') and not self.is_initializing()
        if self.implementation == 'cudnn' and not record:
            if drop:
                raise ValueError(
                    "attention 'cudnn' has no dropout: use 'xla' with attention_dropout_rate > 0"
                )
            x = jax.nn.dot_product_attention(
                *(t.swapaxes(1, 2) for t in (query, key, value)), implementation='cudnn'
            ).swapaxes(1, 2)
        elif self.implementation in ATTENTION_IMPLEMENTATIONS:
            logits = jnp.einsum('bhqk,bhnk->bhqn', query * head_size**-0.5, key)
            weights = jax.nn.softmax(logits.astype(at_least_float32(self.dtype)), axis=-1)
            if record:
                # Adds what the caller gave for this place, if anything: the gradient with respect
                # to it is that with respect to the weights.
                weights = self.perturb('weights', weights, collection='attention_offsets')
                self.sow('attention_weights', 'weights', weights)
            weights = nn.Dropout(drop)(weights.astype(self.dtype), deterministic=deterministic)
            x = jnp.einsum('bhqn,bhnk->bhqk', weights, value)
        else:
            raise ValueError(
                f'unknown attention {self.implementation!r}: '
                f'one of {", ".join(ATTENTION_IMPLEMENTATIONS)}'
            )

        kernel, bias = HeadProjection((heads, head_size, width), (width,), 2, name='out')()
        x = affine(
            x.swapaxes(1, 2).reshape(-1, width),
            kernel.reshape(width, width).astype(self.dtype),
            bias.astype(self.dtype),
        )
        return x.reshape(batch, -1, width)

    def _project(self, name: str, inputs: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Tokens [B, N, D] to queries, keys or values [B, H, N, K]."""
        batch, tokens, width = inputs.shape
        kernel, bias = HeadProjection(shape, shape[1:], 1, name=name)()
        x = affine(
            inputs.astype(self.dtype).reshape(batch * tokens, width),
            kernel.reshape(width, width).astype(self.dtype),
            bias.reshape(width).astype(self.dtype),
        )
        return x.reshape(batch, tokens, *shape[1:]).swapaxes(1, 2)
