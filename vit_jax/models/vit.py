"""The Vision Transformer of "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929).

Module and parameter names are those of the released checkpoints, so a `.npz` of the original
release is this module's parameter tree. Numerics are the release's as well: tanh-form GELU,
LayerNorm epsilon 1e-6, zero-initialised head.

Shapes in comments and docstrings:
    B batch    N tokens    D width (hidden_size)    H heads    K head size (D / H)    P patch size
    C classes

What can be read out of a forward pass (see `models.apply_with_intermediates`): every block's tokens
and the features in front of the head, in the collection `intermediates`; attention weights, only
when the collection `attention_weights` is requested, since they take B*H*N*N numbers per block.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

CLASSIFIERS = ('token', 'gap', 'unpooled', 'token_unpooled')
ATTENTION_IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')
REMAT_POLICIES: Mapping[str, Callable | None] = {
    'full': None,  # keep nothing of a block but its input
    # Keep what matrix products with parameters gave.
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _at_least_float32(dtype: Any) -> jnp.dtype:
    """What softmax and logits are computed in: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


class IdentityLayer(nn.Module):
    """Returns its input; gives it a name in the module tree."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x`."""
        return x


class AddPositionEmbs(nn.Module):
    """Adds learned position embeddings, `pos_embedding` [1, N, D] float32, to the tokens."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] of `dtype` out."""
        if inputs.ndim != 3:
            raise ValueError(
                f'position embeddings are added to [batch, tokens, width], not to {inputs.shape}'
            )
        shape = (1, inputs.shape[1], inputs.shape[2])
        embedding = self.param('pos_embedding', nn.initializers.normal(stddev=0.02), shape)
        return inputs.astype(self.dtype) + embedding.astype(self.dtype)


class MlpBlock(nn.Module):
    """Two dense layers with GELU (tanh form) between them: D -> mlp_dim -> D."""

    mlp_dim: int
    dropout_rate: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: jax.Array, *, deterministic: bool) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out."""
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(stddev=1e-6),
        )
        x = dense(self.mlp_dim, name='Dense_0')(inputs)
        x = nn.gelu(x, approximate=True)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = dense(inputs.shape[-1], name='Dense_1')(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)


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
    def __call__(self, inputs: jax.Array, *, deterministic: bool) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out."""
        batch, tokens, width = inputs.shape
        if width % self.num_heads:
            raise ValueError(f'hidden_size {width} is not divisible by num_heads {self.num_heads}')
        heads, head_size = self.num_heads, width // self.num_heads
        query, key, value = (
            self._project(name, inputs, (width, heads, head_size))
            for name in ('query', 'key', 'value')
        )

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
            weights = jax.nn.softmax(logits.astype(_at_least_float32(self.dtype)), axis=-1)
            if record:
                self.sow('attention_weights', 'weights', weights)
            weights = nn.Dropout(drop)(weights.astype(self.dtype), deterministic=deterministic)
            x = jnp.einsum('bhqn,bhnk->bhqk', weights, value)
        else:
            raise ValueError(
                f'unknown attention {self.implementation!r}: '
                f'one of {", ".join(ATTENTION_IMPLEMENTATIONS)}'
            )

        kernel, bias = HeadProjection((heads, head_size, width), (width,), 2, name='out')()
        x = x.swapaxes(1, 2).reshape(batch * tokens, width)
        x = x @ kernel.reshape(width, width).astype(self.dtype) + bias.astype(self.dtype)[None]
        return x.reshape(batch, tokens, width)

    def _project(self, name: str, inputs: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
        """Tokens [B, N, D] to queries, keys or values [B, H, N, K]."""
        batch, tokens, width = inputs.shape
        kernel, bias = HeadProjection(shape, shape[1:], 1, name=name)()
        x = inputs.astype(self.dtype).reshape(batch * tokens, width)
        x = x @ kernel.reshape(width, width).astype(self.dtype) + bias.reshape(1, width).astype(
            self.dtype
        )
        return x.reshape(batch, tokens, *shape[1:]).swapaxes(1, 2)


class Encoder1DBlock(nn.Module):
    """One pre-norm encoder block: x += attention(LayerNorm(x)); x += mlp(LayerNorm(x))."""

    mlp_dim: int
    num_heads: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    attention: str = 'auto'

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out."""
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='LayerNorm_0')(inputs)
        x = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            dtype=self.dtype,
            implementation=self.attention,
            name='MultiHeadDotProductAttention_0',
        )(x, deterministic=deterministic)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        self.sow('intermediates', 'self_attention', x)
        x = x + inputs

        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='LayerNorm_1')(x)
        y = MlpBlock(self.mlp_dim, self.dropout_rate, self.dtype, name='MlpBlock_0')(
            y, deterministic=deterministic
        )
        self.sow('intermediates', 'mlp', y)
        x = x + y
        self.sow('intermediates', 'tokens', x)
        return x


class Encoder(nn.Module):
    """Position embeddings, `num_layers` blocks, and the final LayerNorm.

    Attributes:
      num_layers, mlp_dim, num_heads: size of the encoder.
      dropout_rate: dropout after the position embeddings and in every block.
      attention_dropout_rate: dropout of the attention weights.
      add_position_embedding: whether to add learned position embeddings.
      dtype: type of activations and matrix products; parameters stay float32.
      attention: see `MultiHeadDotProductAttention.implementation`.
      remat: '' keeps all activations for the backward pass; 'dots' keeps results of matrix products
        and recomputes the rest; 'full' keeps only each block's input. Less memory, up to a third
        more work.
    """

    num_layers: int
    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    add_position_embedding: bool = True
    dtype: Any = jnp.float32
    attention: str = 'auto'
    remat: str = ''

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Tokens [B, N, D] in, normalised tokens [B, N, D] out."""
        if self.add_position_embedding:
            x = AddPositionEmbs(self.dtype, name='posembed_input')(x)
            self.sow('intermediates', 'with_position_embedding', x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)

        block = Encoder1DBlock
        if self.remat:
            if self.remat not in REMAT_POLICIES:
                raise ValueError(
                    f'unknown remat {self.remat!r}: one of {", ".join(REMAT_POLICIES)}, or empty'
                )
            block = nn.remat(block, static_argnums=(2,), policy=REMAT_POLICIES[self.remat])
        for layer in range(self.num_layers):
            x = block(
                mlp_dim=self.mlp_dim,
                num_heads=self.num_heads,
                dtype=self.dtype,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                attention=self.attention,
                name=f'encoderblock_{layer}',
            )(x, not train)
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='encoder_norm')(x)


class VisionTransformer(nn.Module):
    """Vision Transformer with the original release's arguments, and three of our own at the end.

    Attributes:
      num_classes: C; 0 leaves the head out and returns features.
      patches: mapping with `size`, (P, P).
      transformer: mapping with the arguments of `Encoder` (num_layers, mlp_dim, num_heads, dropout
        rates).
      hidden_size: D.
      representation_size: width of the `pre_logits` layer (dense + tanh); None for none.
      classifier: 'token' (class token), 'gap' (mean of all tokens, no class token), 'unpooled' (all
        patch tokens), 'token_unpooled' (class token and all patch tokens).
      head_bias_init: initial value of the head's bias.
      encoder: the encoder's class.
      model_name: the variant's name; not used in the computation.
      dtype: type of activations and matrix products, float32 or bfloat16; parameters stay float32.
      attention: see `MultiHeadDotProductAttention.implementation`.
      remat: see `Encoder.remat`.
    """

    num_classes: int
    patches: Any
    transformer: Any
    hidden_size: int
    representation_size: int | None = None
    classifier: str = 'token'
    head_bias_init: float = 0.0
    encoder: type[nn.Module] = Encoder
    model_name: str | None = None
    dtype: Any = jnp.float32
    attention: str = 'auto'
    remat: str = ''

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits.

        Args:
          inputs: [B, height, width, 3] in [-1, 1]; height and width are multiples of P.
          train: whether dropout is active (then `apply` needs `rngs={'dropout': key}`).

        Returns:
          Logits [B, C] float32; [B, N, C] for 'unpooled' and 'token_unpooled'. With num_classes=0
          the features [B, D] (or [B, N, D]) in `dtype`.

        Raises:
          ValueError: the image is not a whole number of patches, or the classifier is unknown.
        """
        if self.classifier not in CLASSIFIERS:
            raise ValueError(
                f'unknown classifier {self.classifier!r}: one of {", ".join(CLASSIFIERS)}'
            )
        patch = tuple(self.patches['size'])
        height, width = inputs.shape[1:3]
        if height % patch[0] or width % patch[1]:
            raise ValueError(
                f'an image of {height} x {width} pixels is not a whole number of '
                f'{patch[0]} x {patch[1]} patches'
            )

        x = nn.Conv(
            self.hidden_size,
            patch,
            strides=patch,
            padding='VALID',
            dtype=self.dtype,
            name='embedding',
        )(inputs.astype(self.dtype))
        self.sow('intermediates', 'patch_embedding', x)  # [B, height / P, width / P, D]
        x = x.reshape(x.shape[0], -1, x.shape[-1])

        if self.classifier in ('token', 'token_unpooled'):
            cls = self.param('cls', nn.initializers.zeros, (1, 1, self.hidden_size))
            cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, self.hidden_size))
            x = jnp.concatenate([cls, x], axis=1)

        x = self.encoder(
            name='Transformer',
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            **self.transformer,
        )(x, train=train)
        self.sow('intermediates', 'encoded', x)

        if self.classifier == 'token':
            x = x[:, 0]
        elif self.classifier == 'gap':
            x = jnp.mean(x, axis=1)

        if self.representation_size is not None:
            x = nn.tanh(nn.Dense(self.representation_size, dtype=self.dtype, name='pre_logits')(x))
        else:
            x = IdentityLayer(name='pre_logits')(x)
        self.sow('intermediates', 'features', x)  # `pre_logits` is the layer's own name

        if not self.num_classes:
            return x
        return nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.head_bias_init),
            # Operands in `dtype`, logits in float32: rounding them to bfloat16 would round the
            # loss.
            dot_general=functools.partial(
                jax.lax.dot_general, preferred_element_type=_at_least_float32(self.dtype)
            ),
            name='head',
        )(x)
