"""Text towers, with the parameter trees of the released LiT checkpoints.

Shapes: B batch, L tokens of a text, D width, H heads, K head size (D / H), C size of the embedding,
V size of the vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.attention import dot_product_attention
from vit_jax.models.layers import ACTIVATIONS
from vit_jax.models.vit import Encoder

# BERT's sizes (https://arxiv.org/abs/1810.04805, section 3).
BERT_SIZES: Mapping[str, Mapping[str, int]] = {
    'base': dict(hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12),
    'large': dict(hidden_size=1024, mlp_dim=4096, num_layers=24, num_heads=16),
}

_init = nn.initializers.truncated_normal(stddev=0.02)


class BertModel(nn.Module):
    """BERT, of which the token at position 0 is read: https://arxiv.org/abs/1810.04805.

    Post-norm blocks, one segment; tokens of value 0 are padding and are not looked at. There is no
    pooler.

    Attributes:
      num_classes: C, size of the embedding; None leaves the head out.
      config: 'base' or 'large', for the four sizes; '' where they are given.
      hidden_size: D.
      mlp_dim: width of the hidden layers.
      num_layers: blocks.
      num_heads: H.
      vocab_size: V.
      max_length: how many position embeddings there are.
      num_segments: how many segment embeddings there are; the first is used.
      act: activation function of the MLPs, a name in `layers.ACTIVATIONS`. LiT's BERT has
        'gelu_tanh', that of Hugging Face 'gelu'.
      layer_norm_eps: what LayerNorm adds to the variance.
      dtype: type of activations and matrix products; parameters are float32.
    """

    num_classes: int | None = None
    config: str = ''
    hidden_size: int = 0
    mlp_dim: int = 0
    num_layers: int = 0
    num_heads: int = 0
    vocab_size: int = 30_522
    max_length: int = 512
    num_segments: int = 2
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-12
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool = False,
        out: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Token ids [B, L] to embeddings [B, C] (without a head: features [B, D]).

        Args:
          tokens: integers.
          train: without effect, as there is no dropout.
          out: is given what the original release returns beside the result: `transformed`
            [B, L, D], `pre_logits` [B, D], and with a head `logits` [B, C].
        """
        del train
        names = ('hidden_size', 'mlp_dim', 'num_layers', 'num_heads')
        sizes = {name: getattr(self, name) for name in names}
        if self.config:
            if self.config not in BERT_SIZES:
                known = ', '.join(BERT_SIZES)
                raise ValueError(f'unknown size of BERT {self.config!r}: one of {known}')
            sizes = dict(BERT_SIZES[self.config])
        _check_length(tokens, self.max_length)
        vocabularies = (self.vocab_size, self.max_length, self.num_segments)
        style = _Style(self.act, self.layer_norm_eps, self.dtype)
        out = {} if out is None else out
        x = _BertEncoder(*vocabularies, **sizes, style=style, name='BertEncoder_0')(tokens)
        out['transformed'] = x
        return _head(x[:, 0], self.num_classes or None, self.dtype, out)


class TextTransformer(nn.Module):
    """Pre-norm text transformer: the text tower of LiT, SigLIP and, with `causal`, CLIP.

    https://arxiv.org/abs/2111.07991, https://arxiv.org/abs/2303.15343,
    https://arxiv.org/abs/2103.00020. Padding is no different from other tokens.

    Attributes:
      num_classes: C, size of the embedding; None leaves the head out.
      width: D.
      num_layers, mlp_dim, num_heads, dropout_rate: of the encoder.
      vocab_size: V.
      causal: whether a token looks only at itself and those before it; else all look at all.
      end_token: the first token with this id is read (the first token of all where there is none);
        None for the last token of all.
      act: activation function of the MLPs, a name in `layers.ACTIVATIONS`.
      layer_norm_eps: what LayerNorm adds to the variance.
      dtype: type of activations and matrix products; parameters are float32.
    """

    num_classes: int | None = None
    width: int = 512
    num_layers: int = 12
    mlp_dim: int = 2048
    num_heads: int = 8
    dropout_rate: float = 0.0
    vocab_size: int = 32_000
    causal: bool = False
    end_token: int | None = None
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        train: bool = False,
        out: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Token ids [B, L] to embeddings [B, C] (without a head: features [B, D]).

        Args:
          tokens: integers.
          train: whether dropout is active.
          out: is given what the original release returns beside the result: `embedded` [B, L, D],
            `pre_logits` [B, D], and with a head `logits` [B, C].
        """
        out = {} if out is None else out
        length = tokens.shape[1]
        normal = nn.initializers.normal(stddev=self.width**-0.5)
        shape = (1, length, self.width)
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name='Embed_0')(tokens)
        out['embedded'] = x
        x += self.param('pos_embedding', normal, shape, jnp.float32).astype(self.dtype)
        encoder = Encoder(
            num_layers=self.num_layers,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=0.0,
            add_position_embedding=False,
            act=self.act,
            layer_norm_eps=self.layer_norm_eps,
            dtype=self.dtype,
            name='Encoder_0',
        )
        mask = jnp.tril(jnp.ones((1, length, length), bool)) if self.causal else None
        x = encoder(x, train=train, mask=mask)
        if self.end_token is None:
            x = x[:, -1]
        else:
            end = jnp.argmax(tokens == self.end_token, axis=1)
            x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return _head(x, self.num_classes, self.dtype, out)


def _head(x: jax.Array, size: int | None, dtype: Any, out: dict[str, jax.Array]) -> jax.Array:
    """Features [B, D] to embeddings [B, C]."""
    out['pre_logits'] = x
    if size is None:
        return x
    out['logits'] = nn.Dense(size, dtype=dtype, name='head')(x)
    return out['logits']


def _check_length(tokens: jax.Array, longest: int) -> None:
    if tokens.ndim != 2 or tokens.shape[1] > longest:
        raise ValueError(
            f'token ids are [batch, length] with a length of at most {longest}, not '
            f'{list(tokens.shape)}'
        )


class _Style(NamedTuple):
    """What all blocks of BERT have in common, see `BertModel`."""

    act: str
    layer_norm_eps: float
    dtype: Any

    def norm(self, x: jax.Array) -> jax.Array:
        """The one LayerNorm of the module that calls it."""
        return nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name='layer_norm')(x)


class _BertEncoder(nn.Module):
    """Token ids [B, L] to features [B, L, D]; 0 is padding."""

    vocab_size: int
    max_length: int
    num_segments: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    style: _Style

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        sizes = (self.vocab_size, self.max_length, self.num_segments)
        x = _Embedder(*sizes, self.hidden_size, self.style.dtype, name='embedder')(tokens)
        x = self.style.norm(x)
        blocks = functools.partial(
            _Blocks, self.num_layers, self.num_heads, self.mlp_dim, self.style
        )
        return _Level('layer_sequence', blocks, name='encoder_block')(x, tokens > 0)


class _Level(nn.Module):
    """A level of names that the checkpoints have, and nothing else: one module, called `inside`."""

    inside: str
    module: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        return self.module(name=self.inside)(*inputs)


class _Embedder(nn.Module):
    """The sum of the embeddings of a token, its position, and its segment, always the first."""

    vocab_size: int
    max_length: int
    num_segments: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        def embed(kind: str, size: int, ids: jax.Array) -> jax.Array:
            name = f'embedders_{kind}_ids'
            return nn.Embed(size, self.width, self.dtype, embedding_init=_init, name=name)(ids)

        position = jnp.arange(tokens.shape[1])[None]
        return (
            embed('token', self.vocab_size, tokens)
            + embed('position', self.max_length, position)
            + embed('segment', self.num_segments, jnp.zeros_like(position))
        )


class _Blocks(nn.Module):
    """Post-norm blocks: x = LayerNorm(x + attention(x)); x = LayerNorm(x + mlp(x))."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    style: _Style

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Tokens [B, L, D] in and out; mask, bool [B, L], says which are looked at."""
        for layer in range(self.num_layers):
            x = _Block(self.num_heads, self.mlp_dim, self.style, name=f'layers_{layer}')(x, mask)
        return x


class _Block(nn.Module):
    num_heads: int
    mlp_dim: int
    style: _Style

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = _AttentionBlock(self.num_heads, self.style, name='attention_block')(x, mask)
        return _MlpBlock(self.mlp_dim, self.style, name='mlp_block')(x)


class _AttentionBlock(nn.Module):
    num_heads: int
    style: _Style

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = _Attention(self.num_heads, self.style.dtype, name='attention_layer')(x, mask)
        return _project_and_add(x, y, self.style)


class _Attention(nn.Module):
    """Attention of each head, without the projection that follows; kernels are [D, D]."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, width = x.shape

        def project(name: str) -> jax.Array:  # to [B, L, H, K]
            y = nn.Dense(width, dtype=self.dtype, kernel_init=_init, name=name)(x)
            return y.reshape(batch, length, self.num_heads, width // self.num_heads)

        y = dot_product_attention(project('query'), project('key'), project('value'), mask=mask)
        return y.reshape(batch, length, width)


class _MlpBlock(nn.Module):
    mlp_dim: int
    style: _Style

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, self.mlp_dim, dtype=self.style.dtype, kernel_init=_init)
        y = ACTIVATIONS[self.style.act](_Level('dense_layer', dense, name='mlp')(x))
        return _project_and_add(x, y, self.style)


def _project_and_add(x: jax.Array, y: jax.Array, style: _Style) -> jax.Array:
    """LayerNorm(x + dense(y)), the end of each half of a block."""
    y = nn.Dense(x.shape[-1], dtype=style.dtype, kernel_init=_init, name='dense_layer')(y)
    return style.norm(x + y)
