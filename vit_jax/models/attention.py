"""Multi-head self-attention with the released parameter tree.

Shapes: B batch, N tokens, D width, H heads, K head size (D / H).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.layers import affine, at_least_float32

ATTENTION_IMPLEMENTATIONS = ('auto', 'xla', 'chunked', 'cudnn')

# Most attention weights of a chunk: 2 MB in float32. Found with ViT-B/16 at batch 8 (465,708 an
# image).
CHUNK = 2**19


def choose_attention(implementation: str, dropout: float, platform: str) -> str:
    """What 'auto' stands for: 'chunked' on a CPU without attention dropout, else 'xla'.

    Args:
      implementation: one of `ATTENTION_IMPLEMENTATIONS`; all but 'auto' are returned.
      dropout: rate of the attention weights.
      platform: 'cpu' or 'gpu', see `jax.default_backend`.

    Raises:
      ValueError: no such implementation, or it has no dropout.
    """
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f'unknown attention {implementation!r}: one of {", ".join(ATTENTION_IMPLEMENTATIONS)}'
        )
    if implementation == 'auto':
        return 'chunked' if platform == 'cpu' and not dropout else 'xla'
    if implementation != 'xla' and dropout:
        raise ValueError(
            f'attention {implementation!r} has no dropout: '
            "use 'xla' with attention_dropout_rate > 0"
        )
    return implementation


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    change: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """softmax(query key^T / sqrt(K)) value, of each head.

    Source: https://arxiv.org/abs/1706.03762. In between, heads lie in front of tokens, which makes
    plain batched matrix products of the products over tokens: a training step of Ti/16 on a CPU is
    1.5 times as fast as with heads after tokens.

    Args:
      query: [B, Q, H, K].
      key: [B, N, H, K] of the same type.
      value: [B, N, H, K] of the same type.
      change: what is done to the weights [B, H, Q, N], at least float32, each row of which sums
        to 1.

    Returns:
      [B, Q, H, K] of the same type.
    """
    dtype = query.dtype
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    logits = jnp.einsum('bhqk,bhnk->bhqn', query * query.shape[-1] ** -0.5, key)
    weights = change(jax.nn.softmax(logits.astype(at_least_float32(dtype)), axis=-1))
    return jnp.einsum('bhqn,bhnk->bhqk', weights.astype(dtype), value).swapaxes(1, 2)


@jax.custom_vjp
def chunked_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`dot_product_attention` that keeps no weights for its backward pass.

    That computes them once more, of few images at a time, so that they stay in a CPU's cache.
    Source: https://arxiv.org/abs/2112.05682.
    """
    return dot_product_attention(query, key, value)


def _chunked_forward(*arrays):
    return dot_product_attention(*arrays), arrays


def _chunked_backward(kept, grad):
    query, key, _ = kept
    batch, queries, heads, _ = query.shape
    # A batch that is spread over devices stays so: a chunk has images of each.
    devices = math.gcd(batch, jax.device_count())
    images = batch // devices
    largest = max(1, CHUNK // (queries * heads * key.shape[1]))
    chunks = next(n for n in range(1, images + 1) if images % n == 0 and images // n <= largest)

    def split(x):
        return x.reshape(devices, chunks, -1, *x.shape[1:])

    def backward(index, over):
        *chunk, chunk_grad = (
            jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False).reshape(-1, *x.shape[3:])
            for x in (*over, grads)
        )
        found = jax.vjp(dot_product_attention, *chunk)[1](chunk_grad)
        return [
            jax.lax.dynamic_update_index_in_dim(
                x, new.reshape(devices, -1, *new.shape[1:]), index, axis=1
            )
            for x, new in zip(over, found, strict=True)
        ]

    # Gradients are written over what they belong to: a loop that collects its results would have
    # to clear memory for them first.
    *arrays, grads = map(split, (*kept, grad))
    found = jax.lax.fori_loop(0, chunks, backward, arrays)
    return tuple(x.reshape(-1, *x.shape[3:]) for x in found)


chunked_attention.defvjp(_chunked_forward, _chunked_backward)


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
    Softmax is computed in float32.

    Attributes:
      num_heads: H; must divide the width.
      dropout_rate: dropout of the attention weights (0 in all released models).
      dtype: type of the matrix products.
      implementation: 'xla' (`dot_product_attention`), 'chunked' (`chunked_attention`: less memory,
        no attention dropout), 'cudnn' (NVIDIA's fused kernel: 16-bit types on a GPU, no attention
        dropout), or 'auto', see `choose_attention`: not measured on a GPU yet.
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
        x = self._attend(deterministic)(query, key, value)

        kernel, bias = HeadProjection((heads, head_size, width), (width,), 2, name='out')()
        x = affine(
            x.reshape(-1, width),
            kernel.reshape(width, width).astype(self.dtype),
            bias.astype(self.dtype),
        )
        return x.reshape(batch, -1, width)

    def _attend(self, deterministic: bool) -> Callable[..., jax.Array]:
        """The function of queries, keys and values."""
        drop = 0.0 if deterministic else self.dropout_rate
        record = self.is_mutable_collection('attention_weights') and not self.is_initializing()
        chosen = choose_attention(self.implementation, drop, jax.default_backend())
        if chosen == 'xla' or record:
            return functools.partial(
                dot_product_attention, change=lambda weights: self._change(weights, drop, record)
            )
        if chosen == 'chunked':
            return chunked_attention
        if jax.default_backend() != 'gpu' or jnp.dtype(self.dtype).itemsize != 2:
            raise ValueError(
                "attention 'cudnn' runs on NVIDIA GPUs, in 16-bit types: use 'auto' or 'xla'"
            )
        return functools.partial(jax.nn.dot_product_attention, implementation='cudnn')

    def _change(self, weights: jax.Array, drop: float, record: bool) -> jax.Array:
        """Weights [B, H, Q, N], float32, in and, recorded and dropped, out."""
        if record:
            # Adds what the caller gave for this place, if anything: the gradient with respect to
            # it is that with respect to the weights.
            weights = self.perturb('weights', weights, collection='attention_offsets')
            self.sow('attention_weights', 'weights', weights)
        return nn.Dropout(drop)(weights, deterministic=False) if drop else weights

    def _project(self, name: str, inputs: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Tokens [B, N, D] to queries, keys or values [B, N, H, K]."""
        batch, tokens, width = inputs.shape
        kernel, bias = HeadProjection(shape, shape[1:], 1, name=name)()
        x = affine(
            inputs.astype(self.dtype).reshape(batch * tokens, width),
            kernel.reshape(width, width).astype(self.dtype),
            bias.reshape(width).astype(self.dtype),
        )
        return x.reshape(batch, tokens, *shape[1:])
