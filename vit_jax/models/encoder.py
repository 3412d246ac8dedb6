"""The encoder of a Vision Transformer: position embeddings, blocks, final norm.

Module and parameter names are those of the released checkpoints.

Shapes: B batch, N tokens, D width, H heads.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import layers, stochastic_depth
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.rotary import Rotary


class AddPositionEmbs(nn.Module):
    """Adds learned position embeddings, `pos_embedding` [1, N, D] float32, to the tokens.

    Attributes:
      dtype: of the result.
      without: (first, end) of tokens that have no position; `pos_embedding` is that of the others.
    """

    dtype: Any = jnp.float32
    without: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] of `dtype` out."""
        if inputs.ndim != 3:
            raise ValueError(
                f'position embeddings are added to [batch, tokens, width], not to {inputs.shape}'
            )
        first, end = self.without
        shape = (1, inputs.shape[1] - (end - first), inputs.shape[2])
        normal = nn.initializers.normal(stddev=0.02)
        embedding = self.param('pos_embedding', normal, shape, jnp.float32)
        if first != end:
            zeros = jnp.zeros((1, end - first, inputs.shape[2]), jnp.float32)
            embedding = jnp.concatenate([embedding[:, :first], zeros, embedding[:, first:]], axis=1)
        return inputs.astype(self.dtype) + embedding.astype(self.dtype)


class Encoder1DBlock(nn.Module):
    """One pre-norm encoder block: x += attention(LayerNorm(x)); x += mlp(LayerNorm(x))."""

    mlp_dim: int
    num_heads: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    attention: str = 'auto'
    outputs: int | None = None
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6
    layer_scale: bool = False
    gated_mlp: bool = False
    qk_norm: bool = False
    mlp_norm: bool = False
    attention_norm: bool = False
    qkv_bias: str = 'qkv'
    rotary: Rotary | None = None

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out, or of them the first `outputs`.

        `mask`, bool [B, N] or [B or 1, N, N], says which tokens are looked at.
        """
        norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_eps, dtype=self.dtype)
        x = norm(name='LayerNorm_0')(inputs)
        x = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            dtype=self.dtype,
            implementation=self.attention,
            norm=norm if self.qk_norm else None,
            out_norm=norm if self.attention_norm else None,
            biases=self.qkv_bias,
            rotary=self.rotary,
            name='MultiHeadDotProductAttention_0',
        )(x, deterministic=deterministic, queries=self.outputs, mask=mask)
        if self.layer_scale:
            x = layers.LayerScale(self.dtype, name='LayerScale_0')(x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        self.sow('intermediates', 'self_attention', x)
        x = stochastic_depth.drop(self, 0, x) + inputs[:, : self.outputs]

        mlp = layers.MlpBlock(
            self.mlp_dim,
            self.dropout_rate,
            self.dtype,
            self.act,
            self.gated_mlp,
            norm if self.mlp_norm else None,
            name='MlpBlock_0',
        )
        y = mlp(norm(name='LayerNorm_1')(x), deterministic=deterministic)
        if self.layer_scale:
            y = layers.LayerScale(self.dtype, name='LayerScale_1')(y)
        self.sow('intermediates', 'mlp', y)
        x = x + stochastic_depth.drop(self, 1, y)
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
      outputs: how many tokens, from the first, the last block computes; None for all. It leaves out
        what nothing depends on: of Ti/16 to B/16, with 12 blocks, 7 % of the work.
      scan_layers: trace and compile one block for all but the last, over which `jax.lax.scan`
        loops; parameters, and what can be read out, stay the same. Dropout draws other masks.
      scan_from: with `scan_layers` a second loop begins with this block. A loop has a backward pass
        through all of its blocks or none, and so that below the lowest trained block is apart.
      act: activation function of the MLPs, a name in `layers.ACTIVATIONS`.
      layer_norm_eps: what LayerNorm adds to the variance.
      final_norm: whether there is a final LayerNorm.
      pre_norm: a LayerNorm in front of the first block, as in CLIP.
      layer_scale: see `layers.LayerScale`; of what each half of a block adds.
      gated_mlp: see `layers.MlpBlock.gated`.
      qk_norm: a LayerNorm of each head's queries and keys (https://arxiv.org/abs/2302.05442).
      without_position: (first, end) of tokens that get no position embedding.
      mlp_norm: a LayerNorm in front of each MLP's second layer, as in EVA-02.
      attention_norm: a LayerNorm in front of each attention's last layer, as in EVA-02's CLIP.
      qkv_bias: which of query, key and value have a bias, by their first letters.
      rotary: rotary positions of the patches; None for none.
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
    outputs: int | None = None
    scan_layers: bool = False
    scan_from: int = 0
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6
    final_norm: bool = True
    pre_norm: bool = False
    layer_scale: bool = False
    gated_mlp: bool = False
    qk_norm: bool = False
    without_position: tuple[int, int] = (0, 0)
    mlp_norm: bool = False
    attention_norm: bool = False
    qkv_bias: str = 'qkv'
    rotary: Rotary | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Tokens [B, N, D] to normalised tokens.

        Args:
          x: tokens [B, N, D].
          train: whether dropout is active.
          mask: bool [B, N], which tokens there are, where sequences of several lengths are padded
            to N; None for all. The others change nothing of these; what comes out in their places
            has no meaning. Or bool [B or 1, N, N], which tokens (last axis) each token looks at.

        Returns:
          [B, outputs or N, D].
        """
        if self.add_position_embedding:
            x = AddPositionEmbs(self.dtype, self.without_position, name='posembed_input')(x)
            self.sow('intermediates', 'with_position_embedding', x)
        if self.pre_norm:
            x = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name='pre_norm')(x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)

        block = functools.partial(
            layers.rematerialised(Encoder1DBlock, self.remat, static_argnums=(2,)),
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dtype=self.dtype,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            attention=self.attention,
            act=self.act,
            layer_norm_eps=self.layer_norm_eps,
            layer_scale=self.layer_scale,
            gated_mlp=self.gated_mlp,
            qk_norm=self.qk_norm,
            mlp_norm=self.mlp_norm,
            attention_norm=self.attention_norm,
            qkv_bias=self.qkv_bias,
            rotary=self.rotary,
        )
        last = self.num_layers - 1
        names = [f'encoderblock_{layer}' for layer in range(self.num_layers)]
        if self.scan_layers and last > 1 and not self.is_initializing():
            looped, names = names[:last], names[last:]
            for part in filter(None, (looped[: self.scan_from], looped[self.scan_from :])):
                x = self._scan(block(parent=None), part, x, not train, mask)
        for name in names:
            outputs = self.outputs if name == f'encoderblock_{last}' else None
            x = block(outputs=outputs, name=name)(x, not train, mask)
        if not self.final_norm:
            return x
        return nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name='encoder_norm')(x)

    def _scan(
        self,
        block: nn.Module,
        names: list[str],
        x: jax.Array,
        deterministic: bool,
        mask: jax.Array | None,
    ) -> jax.Array:
        """Blocks of these names, one after the other, as a loop over their stacked variables."""
        layers_of = [
            {kind: tree[name] for kind, tree in self.variables.items() if name in tree}
            for name in names
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers_of)
        keys = None
        if self.has_rng('dropout'):
            keys = jax.random.split(self.make_rng('dropout'), len(names))
        sown = list(filter(self.is_mutable_collection, ('intermediates', 'attention_weights')))

        def body(x, layer):
            variables, key = layer
            rngs = None if key is None else {'dropout': key}
            return block.apply(variables, x, deterministic, mask, rngs=rngs, mutable=sown)

        x, state = jax.lax.scan(body, x, (stacked, keys))
        for kind, tree in state.items():
            for index, name in enumerate(names):
                part = jax.tree.map(lambda leaf, index=index: leaf[index], tree)
                self.put_variable(kind, name, part)
        return x
