"""Multi-head self-attention with the released parameter tree.

Shapes: B batch, N tokens, Q of them that ask (queries), D width, H heads, K head size (D / H).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.layers import at_least_float32
from vit_jax.models.rotary import Rotary

ATTENTION_IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    transform: Callable[[jax.Array], jax.Array] = lambda weights: weights,
    mask: jax.Array | None = None,
) -> jax.Array:
    """softmax(query key^T / sqrt(K)) value, of each head.

    Source: https://arxiv.org/abs/1706.03762. In between, heads lie in front of tokens, which makes
    plain batched matrix products of the products over tokens: a training step of Ti/16 on a CPU is
    1.5 times as fast as with heads after tokens.

    Args:
      query: [B, Q, H, K].
      key: [B, N, H, K] of the same type.
      value: [B, N, H, K] of the same type.
      transform: applied to the weights [B, H, Q, N], at least float32, each row of which sums
        to 1.
      mask: bool [B, N], which tokens there are to look at, or [B or 1, Q, N], which each query
        looks at; None for all.

    Returns:
      [B, Q, H, K] of the same type.
    """
    dtype = query.dtype
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    logits = jnp.einsum('bhqk,bhnk->bhqn', query * query.shape[-1] ** -0.5, key)
    logits = logits.astype(at_least_float32(dtype))
    if mask is not None:  # not -inf, which gives NaN where there is no token at all
        logits = jnp.where(_for_heads(mask), logits, jnp.finfo(logits.dtype).min)
    weights = transform(jax.nn.softmax(logits, axis=-1))
    return jnp.einsum('bhqn,bhnk->bhqk', weights.astype(dtype), value).swapaxes(1, 2)


def _for_heads(mask: jax.Array) -> jax.Array:
    """A mask [B, N] or [B or 1, Q, N], for logits [B, H, Q, N]."""
    return mask[:, None, None] if mask.ndim == 2 else mask[:, None]


class MultiHeadDotProductAttention(nn.Module):
    """Multi-head self-attention with the parameter tree of the Flax module of this name.

    Parameters are `query`, `key`, `value` [D, H, K] and `out` [H, K, D], as in the released files.
    Softmax is computed in float32. The weights [B, H, Q, N] are sown as `weights` in the collection
    `attention_weights`, except by 'cudnn', which never has them; what the collection
    `attention_offsets` holds under the same name is added to them first, so that the gradient with
    respect to it is that with respect to the weights.

    Attributes:
      num_heads: H; must divide the width.
      dropout_rate: dropout of the attention weights (0 in all released models).
      dtype: type of the matrix products.
      implementation: 'xla' (`dot_product_attention`), 'cudnn' (NVIDIA's fused kernel: 16-bit types
        on a GPU, no attention dropout), or 'auto': 'xla', and in training on CPUs attention in
        chunks, see `models.cpu`. Not measured on a GPU yet.
      norm: makes the normalisation of queries and keys, `query_ln` and `key_ln`, from a name; None
        for none.
      out_norm: makes that of what the heads give, [B, Q, D] in front of `out`, `out_ln`; the same.
      biases: which of query, key and value have a bias, by their first letters.
      rotary: turns queries and keys by the places of their patches; None for no turning.
    """

    num_heads: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    implementation: str = 'auto'
    norm: Callable[..., nn.Module] | None = None
    out_norm: Callable[..., nn.Module] | None = None
    biases: str = 'qkv'
    rotary: Rotary | None = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool,
        queries: int | None = None,
        mask: jax.Array | None = None,
        probe: jax.Array | None = None,
    ) -> jax.Array:
        """Lets the first tokens look at all.

        Args:
          inputs: tokens [B, N, D].
          deterministic: no dropout.
          queries: Q, how many tokens, from the first, are computed; None for all.
          mask: bool [B, N] or [B or 1, Q, N], which tokens are looked at; None for all.
          probe: [B, Q, D], what looks at the tokens in place of themselves.

        Returns:
          Tokens [B, Q, D].
        """
        width = inputs.shape[-1]
        if width % self.num_heads:
            raise ValueError(f'hidden_size {width} is not divisible by num_heads {self.num_heads}')
        dense = functools.partial(
            nn.DenseGeneral, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform()
        )
        heads = (self.num_heads, width // self.num_heads)
        query, key, value = (
            dense(heads, name=name, use_bias=name[0] in self.biases)(x)
            for name, x in (
                ('query', inputs[:, :queries] if probe is None else probe),
                ('key', inputs),
                ('value', inputs),
            )
        )
        if self.norm is not None:
            query, key = self.norm(name='query_ln')(query), self.norm(name='key_ln')(key)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        dropout_rate = 0.0 if deterministic else self.dropout_rate
        x = self.attend(query, key, value, dropout_rate=dropout_rate, mask=mask)
        if self.out_norm is not None:
            x = self.out_norm(name='out_ln')(x.reshape(*x.shape[:2], width)).reshape(x.shape)
        return dense(width, axis=(-2, -1), name='out')(x)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        dropout_rate: float,
        mask: jax.Array | None,
    ) -> jax.Array:
        """[B, Q, H, K], [B, N, H, K], [B, N, H, K] to [B, Q, H, K]."""
        if self.implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f'unknown attention {self.implementation!r}: '
                f'one of {", ".join(ATTENTION_IMPLEMENTATIONS)}'
            )
        if self.implementation == 'cudnn':
            if dropout_rate:
                raise ValueError(
                    "attention 'cudnn' has no dropout: use 'xla' with attention_dropout_rate > 0"
                )
            if jax.default_backend() != 'gpu' or jnp.dtype(self.dtype).itemsize != 2:
                raise ValueError(
                    "attention 'cudnn' runs on NVIDIA GPUs, in 16-bit types: use 'auto' or 'xla'"
                )
            if mask is not None:
                mask = _for_heads(mask)
            return jax.nn.dot_product_attention(
                query, key, value, mask=mask, implementation='cudnn'
            )

        def record_and_drop(weights: jax.Array) -> jax.Array:
            if self.has_variable('attention_offsets', 'weights'):
                weights += self.get_variable('attention_offsets', 'weights')
            if not self.is_initializing():
                self.sow('attention_weights', 'weights', weights)
            if dropout_rate:
                weights = nn.Dropout(dropout_rate)(weights, deterministic=False)
            return weights

        return dot_product_attention(query, key, value, record_and_drop, mask)
