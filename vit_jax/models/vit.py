"""The Vision Transformer of "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929).

Module and parameter names are those of the released checkpoints, so a `.npz` of the original
release is this module's parameter tree. Numerics are the release's as well, unless arguments say
something else: tanh-form GELU, LayerNorm epsilon 1e-6, zero-initialised head.

Shapes in comments and docstrings:
    B batch    N tokens    D width (hidden_size)    H heads    K head size (D / H)    P patch size
    C classes

What can be read out of a forward pass (see `models.apply_with_intermediates`): every block's tokens
and the features in front of the head, in the collection `intermediates`; attention weights, only
when the collection `attention_weights` is requested, since they take B*H*N*N numbers per block.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax import variants
from vit_jax.models import cpu, layers, resnet
from vit_jax.models.attention import MultiHeadDotProductAttention

CLASSIFIERS = ('token', 'gap', 'max', 'avgmax', 'unpooled', 'token_unpooled')


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
        normal = nn.initializers.normal(stddev=0.02)
        embedding = self.param('pos_embedding', normal, shape, jnp.float32)
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

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out, or of them the first `outputs`.

        `mask`, bool [B, N], says which tokens are looked at.
        """
        norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_eps, dtype=self.dtype)
        x = norm(name='LayerNorm_0')(inputs)
        x = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            dtype=self.dtype,
            implementation=self.attention,
            name='MultiHeadDotProductAttention_0',
        )(x, deterministic=deterministic, queries=self.outputs, mask=mask)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        self.sow('intermediates', 'self_attention', x)
        x = x + inputs[:, : self.outputs]

        mlp = layers.MlpBlock(
            self.mlp_dim, self.dropout_rate, self.dtype, self.act, name='MlpBlock_0'
        )
        y = mlp(norm(name='LayerNorm_1')(x), deterministic=deterministic)
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
      outputs: how many tokens, from the first, the last block computes; None for all. It leaves out
        what nothing depends on: of Ti/16 to B/16, with 12 blocks, 7 % of the work.
      scan_layers: trace and compile one block for all but the last, over which `jax.lax.scan`
        loops; parameters, and what can be read out, stay the same. Dropout draws other masks.
      act: activation function of the MLPs, a name in `layers.ACTIVATIONS`.
      layer_norm_eps: what LayerNorm adds to the variance.
      final_norm: whether there is a final LayerNorm.
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
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6
    final_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Tokens [B, N, D] to normalised tokens.

        Args:
          x: tokens [B, N, D].
          train: whether dropout is active.
          mask: bool [B, N], which tokens there are, where sequences of several lengths are padded
            to N; None for all. The others change nothing of these; what comes out in their places
            has no meaning.

        Returns:
          [B, outputs or N, D].
        """
        if self.add_position_embedding:
            x = AddPositionEmbs(self.dtype, name='posembed_input')(x)
            self.sow('intermediates', 'with_position_embedding', x)
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
        )
        last = self.num_layers - 1
        names = [f'encoderblock_{layer}' for layer in range(self.num_layers)]
        if self.scan_layers and last > 1 and not self.is_initializing():
            x = self._scan(block(parent=None), names[:last], x, not train, mask)
            names = names[last:]
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


class VisionTransformer(nn.Module):
    """Vision Transformer with the original release's arguments, and others of our own at the end.

    A plain ViT; a hybrid (`resnet`), whose patches are cut from the features of a ResNet; or a
    DeiT (`distilled`).

    Attributes:
      num_classes: C; 0 leaves the head out and returns features.
      patches: mapping with `size`, (P, P): pixels, or positions of the ResNet's feature map.
      transformer: mapping with the arguments of `Encoder` (num_layers, mlp_dim, num_heads, dropout
        rates).
      hidden_size: D.
      resnet: mapping with `num_layers` (residual units in each stage; none for the root alone) and
        `width_factor`, see `resnet.backbone`; None for a plain ViT.
      representation_size: width of the `pre_logits` layer (dense + tanh); None for none.
      classifier: what the head reads: 'token' (class token), 'gap' (mean of all patch tokens),
        'max' (their maximum), 'avgmax' (the mean of both), 'unpooled' (all patch tokens),
        'token_unpooled' (class token and all patch tokens).
      head_bias_init: initial value of the head's bias.
      encoder: the encoder's class. One of your own gets `transformer`, and of `dtype`, `attention`,
        `remat`, `scan_layers`, `act`, `layer_norm_eps`, `final_norm` and `outputs` (see `Encoder`)
        those that are attributes of it.
      model_name: the variant's name; not used in the computation.
      distilled: a second token `dist` beside the class token and a second head, `head_dist`, that
        reads it, as in DeiT (https://arxiv.org/abs/2012.12877). The logits are the mean of both
        heads', also in training: there is no teacher here.
      mlp_head: a hidden layer in front of the head, `head_hidden` (dense of width D, ReLU, dropout
        at the encoder's rate).
      dtype: type of activations and matrix products, float32 or bfloat16; parameters stay float32.
      attention: see `MultiHeadDotProductAttention.implementation`.
      remat: see `Encoder.remat`.
      scan_layers: see `Encoder.scan_layers`.
      head_tokens_only: leave out, in the last block, all tokens but those that the head reads (with
        classifier 'token': class and distillation token), see `Encoder.outputs`. The logits are the
        same.
      cpu_training: on a CPU, compute forms of the layers that train faster, see `models.cpu`.
      act: activation function of the MLPs, a name in `layers.ACTIVATIONS`.
      layer_norm_eps: what LayerNorm adds to the variance.
      class_token: whether there is a class token; None for those classifiers only that read it.
      fc_norm: a LayerNorm of what the head reads, in place of the encoder's final one.
      representation_act: activation function of the `pre_logits` layer.
    """

    num_classes: int
    patches: Any
    transformer: Any
    hidden_size: int
    resnet: Any = None
    representation_size: int | None = None
    classifier: str = 'token'
    head_bias_init: float = 0.0
    encoder: type[nn.Module] = Encoder
    model_name: str | None = None
    distilled: bool = False
    mlp_head: bool = False
    dtype: Any = jnp.float32
    attention: str = 'auto'
    remat: str = ''
    scan_layers: bool = False
    head_tokens_only: bool = False
    cpu_training: bool = False
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6
    class_token: bool | None = None
    fc_norm: bool = False
    representation_act: str = 'tanh'

    def __post_init__(self) -> None:
        """Makes the module hashable, as Flax and `jax.jit` (`static_argnames`) want it."""
        for name in ('patches', 'transformer', 'resnet'):
            object.__setattr__(self, name, layers.hashable(getattr(self, name)))
        super().__post_init__()

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand in front of the patches: class and distillation token."""
        names = ('classifier', 'class_token', 'distilled')
        return variants.prefix_tokens({name: getattr(self, name) for name in names})

    @nn.compact
    @cpu.switchable
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits.

        Args:
          inputs: floats [B, height, width, 3] in [-1, 1]; height and width are multiples of P (of a
            hybrid: those of the feature map are).
          train: whether dropout is active (then `apply` needs `rngs={'dropout': key}`).

        Returns:
          Logits [B, C] float32; [B, N, C] for 'unpooled' and 'token_unpooled'. With num_classes=0
          the features [B, D] (or [B, N, D]) in `dtype`; of a distilled model the mean of both
          tokens' features.

        Raises:
          ValueError: the images are of another shape or type, or not a whole number of patches; the
            classifier is unknown; or a distilled model is given another classifier or head.
        """
        self._check()
        layers.check_images(inputs)
        x = self._embed(inputs.astype(self.dtype))
        if self.prefix_tokens:
            names = ('cls', 'dist')[: self.prefix_tokens]
            shape = (1, 1, self.hidden_size)
            zeros = nn.initializers.zeros
            learned = [self.param(name, zeros, shape, jnp.float32) for name in names]
            tokens = jnp.concatenate(learned, axis=1).astype(self.dtype)
            # On explicit axes, the tokens have to be spread over devices as the images are.
            x = jnp.concatenate([tokens + jnp.zeros_like(x[:, :1]), x], axis=1)

        x = self._create_encoder()(x, train=train)
        self.sow('intermediates', 'encoded', x)

        x = self._pool(x)
        if self.fc_norm:
            x = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name='fc_norm')(x)
        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name='pre_logits')(x)
            x = layers.activation(self.representation_act)(x)
        else:
            x = IdentityLayer(name='pre_logits')(x)
        self.sow('intermediates', 'features', x)  # `pre_logits` is the layer's own name

        if not self.num_classes:
            return x.mean(axis=1) if self.distilled else x
        return self._classify(x, train)

    def _create_encoder(self) -> nn.Module:
        names = ('dtype', 'attention', 'remat', 'scan_layers', 'act', 'layer_norm_eps')
        ours = {name: getattr(self, name) for name in names} | {'final_norm': not self.fc_norm}
        known = {field.name for field in dataclasses.fields(self.encoder)}
        for name, value in ours.items():
            if name not in known and value != getattr(Encoder, name):
                raise ValueError(f'{name}={value!r}: {self.encoder.__name__} has no such attribute')
        if self.head_tokens_only and self.classifier == 'token':
            ours['outputs'] = 2 if self.distilled else 1
        ours = {name: value for name, value in ours.items() if name in known}
        return self.encoder(name='Transformer', **self.transformer, **ours)

    def _pool(self, x: jax.Array) -> jax.Array:
        """Encoded tokens [B, N, D] to what the head reads, see `classifier`."""
        if self.distilled:
            return x[:, :2]
        if self.classifier == 'token':
            return x[:, 0]
        if self.classifier == 'token_unpooled':
            return x
        x = x[:, self.prefix_tokens :]
        if self.classifier == 'gap':
            return jnp.mean(x, axis=1)
        if self.classifier == 'max':
            return jnp.max(x, axis=1)
        return (jnp.mean(x, axis=1) + jnp.max(x, axis=1)) / 2 if self.classifier == 'avgmax' else x

    def _check(self) -> None:
        if self.class_token is False and self.classifier in ('token', 'token_unpooled'):
            raise ValueError(
                f'classifier {self.classifier!r} reads a class token: class_token=False'
            )
        if self.classifier not in CLASSIFIERS:
            raise ValueError(
                f'unknown classifier {self.classifier!r}: one of {", ".join(CLASSIFIERS)}'
            )
        if self.distilled and (
            self.classifier != 'token' or self.representation_size is not None or self.mlp_head
        ):
            raise ValueError(
                "a distilled model has classifier 'token' and its own two heads: it takes neither "
                'representation_size nor mlp_head'
            )

    def _embed(self, images: jax.Array) -> jax.Array:
        """Images [B, height, width, 3] to patch tokens [B, N, D]."""
        x = images
        if self.resnet is not None:
            x = resnet.backbone(x, **self.resnet, dtype=self.dtype, remat=self.remat)
            self.sow('intermediates', 'resnet', x)
        patch = tuple(self.patches['size'])
        layers.check_patches(patch, images.shape[1:3], x.shape[1:3])
        x = layers.patch_embedding(self.hidden_size, patch, dtype=self.dtype, name='embedding')(x)
        self.sow('intermediates', 'patch_embedding', x)
        return layers.as_tokens(x)

    def _classify(self, x: jax.Array, train: bool) -> jax.Array:
        """Features [B, D] (or [B, N, D]; of a distilled model [B, 2, D]) to logits."""
        if self.mlp_head:
            x = nn.relu(nn.Dense(self.hidden_size, dtype=self.dtype, name='head_hidden')(x))
            default = getattr(self.encoder, 'dropout_rate', 0.0)
            rate = self.transformer.get('dropout_rate', default)
            x = nn.Dropout(rate)(x, deterministic=not train)
        head = functools.partial(
            layers.head, self.num_classes, dtype=self.dtype, bias_init=self.head_bias_init
        )
        if self.distilled:
            return (head(name='head')(x[:, 0]) + head(name='head_dist')(x[:, 1])) / 2
        return head(name='head')(x)
