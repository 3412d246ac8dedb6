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
from vit_jax.models import cpu, heads, layers, resnet
from vit_jax.models.encoder import Encoder
from vit_jax.models.lora import Lora, adaptable
from vit_jax.models.rotary import Rotary


class IdentityLayer(nn.Module):
    """Returns its input; gives it a name in the module tree."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x`."""
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
        'max' (their maximum), 'avgmax' (the mean of both), 'token_gap' (class token and mean side
        by side, 2 D features), 'map' (attention pooling, see `heads.MAPHead`), 'unpooled' (all
        patch tokens), 'token_unpooled' (class token and all patch tokens).
      head_bias_init: initial value of the head's bias.
      head_zeroinit: whether the head's kernel is zero at first, as a classifier's; an embedding's
        is not, because it is divided by its length.
      encoder: the encoder's class. One of your own gets `transformer`, and of `dtype`, `attention`,
        `remat`, `scan_layers`, `act`, `layer_norm_eps`, `final_norm`, `rotary` and `outputs` (see
        `Encoder`) those that are attributes of it.
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
      scan_from: see `Encoder.scan_from`.
      both_heads: of a distilled model give the logits of both heads [B, 2, C], class token first,
        in place of their mean: for distillation.
      head_tokens_only: leave out, in the last block, all tokens but those that the head reads (with
        classifier 'token': class and distillation token), see `Encoder.outputs`. The logits are the
        same.
      cpu_training: on a CPU, compute forms of the layers that train faster, see `models.cpu`.
      act: activation function of the MLPs, a name in `layers.ACTIVATIONS`.
      layer_norm_eps: what LayerNorm adds to the variance.
      class_token: whether there is a class token; None for those classifiers only that read it.
      fc_norm: a LayerNorm of what the head reads, in place of the encoder's final one.
      representation_act: activation function of the `pre_logits` layer.
      multi_label: classes do not exclude each other: their probabilities are the sigmoids of the
        logits, not the softmax; not used in the computation.
      regression: the outputs are numbers, not scores of classes; not used in the computation.
      registers: how many learned tokens, `registers` [1, R, D], that no head reads, stand between
        the class token and the patches (https://arxiv.org/abs/2309.16588).
      register_positions: whether registers have position embeddings, too.
      patch_bias: whether the patch embedding has a bias.
      final_norm: whether there is a LayerNorm behind the encoder, or `fc_norm` in its place.
      unit_features: whether features are divided by their length in front of the head, as those
        that are compared with embeddings of texts.
      rotary: mapping with `form`, `theta` and `grid` of rotary positions, see `rotary.Rotary`; None
        for none. Learned position embeddings (`add_position_embedding` of the encoder) are beside
        them in EVA-02, and not in DINOv3.
      lora: low-rank adapters of the layers in the blocks, see `lora.Lora`; None for none. It takes
        no part in what a model folder describes: there, adapters are merged.
    """

    num_classes: int
    patches: Any
    transformer: Any
    hidden_size: int
    resnet: Any = None
    representation_size: int | None = None
    classifier: str = 'token'
    head_bias_init: float = 0.0
    head_zeroinit: bool = True
    encoder: type[nn.Module] = Encoder
    model_name: str | None = None
    distilled: bool = False
    mlp_head: bool = False
    dtype: Any = jnp.float32
    attention: str = 'auto'
    remat: str = ''
    scan_layers: bool = False
    scan_from: int = 0
    head_tokens_only: bool = False
    both_heads: bool = False
    cpu_training: bool = False
    act: str = 'gelu_tanh'
    layer_norm_eps: float = 1e-6
    class_token: bool | None = None
    fc_norm: bool = False
    representation_act: str = 'tanh'
    multi_label: bool = False
    regression: bool = False
    registers: int = 0
    register_positions: bool = False
    patch_bias: bool = True
    final_norm: bool = True
    unit_features: bool = False
    rotary: Any = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        """Makes the module hashable, as Flax and `jax.jit` (`static_argnames`) want it."""
        for name in ('patches', 'transformer', 'resnet', 'rotary'):
            object.__setattr__(self, name, layers.hashable(getattr(self, name)))
        if not isinstance(self.lora, Lora | None):  # a file may say anything
            raise TypeError(f'lora is a Lora or None, not {self.lora!r:.100}')
        super().__post_init__()

    @property
    def prefix_tokens(self) -> int:
        """How many tokens stand in front of the patches, see `variants.tokens_in_front`."""
        return variants.prefix_tokens(self._tokens)

    @property
    def prefix_positions(self) -> int:
        """How many of these, from the first, have a position embedding."""
        return variants.prefix_positions(self._tokens)

    @property
    def reads_class_token(self) -> bool:
        """Whether the head reads the class token; else it reads all patches."""
        return self.classifier.startswith('token')

    @property
    def _tokens(self) -> dict[str, Any]:
        """What of the architecture says which tokens there are."""
        names = ('classifier', 'class_token', 'distilled', 'registers', 'register_positions')
        return {name: getattr(self, name) for name in names}

    @nn.compact
    @adaptable
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
        _, rows, columns, _ = x.shape
        x = layers.as_tokens(x)
        if self.prefix_tokens:
            # Registers that are alike at first would stay so.
            init = {'registers': nn.initializers.normal(stddev=0.02)}
            learned = [
                self.param(
                    name,
                    init.get(name, nn.initializers.zeros),
                    (1, count, self.hidden_size),
                    jnp.float32,
                )
                for name, count in variants.tokens_in_front(self._tokens).items()
            ]
            tokens = jnp.concatenate(learned, axis=1).astype(self.dtype)
            # On explicit axes, the tokens have to be spread over devices as the images are.
            x = jnp.concatenate([tokens + jnp.zeros_like(x[:, :1]), x], axis=1)

        x = self._create_encoder((rows, columns))(x, train=train)
        self.sow('intermediates', 'encoded', x)

        x = self._pool(x)
        if self.fc_norm:
            x = nn.LayerNorm(self.layer_norm_eps, dtype=self.dtype, name='fc_norm')(x)
        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name='pre_logits')(x)
            x = layers.activation(self.representation_act)(x)
        else:
            x = IdentityLayer(name='pre_logits')(x)
        if self.unit_features:
            x = layers.unit_length(x)[0]
        self.sow('intermediates', 'features', x)  # `pre_logits` is the layer's own name

        if not self.num_classes:
            return x.mean(axis=1) if self.distilled else x
        return self._classify(x, train)

    def _create_encoder(self, grid: tuple[int, int]) -> nn.Module:
        names: tuple[str, ...] = ('dtype', 'attention', 'remat', 'scan_layers', 'scan_from')
        names += ('act', 'layer_norm_eps')
        ours = {name: getattr(self, name) for name in names}
        ours['final_norm'] = self.final_norm and not self.fc_norm
        if self.prefix_positions != self.prefix_tokens:
            ours['without_position'] = (self.prefix_positions, self.prefix_tokens)
        if self.rotary is not None:
            ours['rotary'] = Rotary(**self.rotary, shape=grid, prefix=self.prefix_tokens)
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
        if self.classifier == 'map':
            pool = heads.MAPHead(
                self.transformer['mlp_dim'],
                self.transformer['num_heads'],
                self.dtype,
                self.act,
                self.layer_norm_eps,
                name='MAPHead_0',
            )
            return pool(x[:, self.prefix_tokens :])
        return heads.pool(x, self.classifier, self.prefix_tokens)

    def _check(self) -> None:
        if self.classifier not in heads.CLASSIFIERS:
            raise ValueError(
                f'unknown classifier {self.classifier!r}: one of {", ".join(heads.CLASSIFIERS)}'
            )
        if self.class_token is False and self.reads_class_token:
            raise ValueError(
                f'classifier {self.classifier!r} reads a class token: class_token=False'
            )
        if self.distilled and (
            self.classifier != 'token' or self.representation_size is not None or self.mlp_head
        ):
            raise ValueError(
                "a distilled model has classifier 'token' and its own two heads: it takes neither "
                'representation_size nor mlp_head'
            )

    def _embed(self, images: jax.Array) -> jax.Array:
        """Images [B, height, width, 3] to a map of patches [B, rows, columns, D]."""
        x = images
        if self.resnet is not None:
            x = resnet.backbone(x, **self.resnet, dtype=self.dtype, remat=self.remat)
            self.sow('intermediates', 'resnet', x)
        patch = tuple(self.patches['size'])
        layers.check_patches(patch, images.shape[1:3], x.shape[1:3])
        x = layers.patch_embedding(
            self.hidden_size, patch, dtype=self.dtype, use_bias=self.patch_bias, name='embedding'
        )(x)
        self.sow('intermediates', 'patch_embedding', x)
        return x

    def _classify(self, x: jax.Array, train: bool) -> jax.Array:
        """Features [B, D] (or [B, N, D]; of a distilled model [B, 2, D]) to logits."""
        if self.mlp_head:
            x = nn.relu(nn.Dense(self.hidden_size, dtype=self.dtype, name='head_hidden')(x))
            default = getattr(self.encoder, 'dropout_rate', 0.0)
            rate = self.transformer.get('dropout_rate', default)
            x = nn.Dropout(rate)(x, deterministic=not train)
        head = functools.partial(
            layers.head,
            self.num_classes,
            dtype=self.dtype,
            bias_init=self.head_bias_init,
            zeros=self.head_zeroinit,
        )
        if self.distilled:
            both = head(name='head')(x[:, 0]), head(name='head_dist')(x[:, 1])
            return jnp.stack(both, axis=1) if self.both_heads else (both[0] + both[1]) / 2
        return head(name='head')(x)
