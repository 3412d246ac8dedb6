"""The original release's way of computing, as the point that all else is compared with.

Same parameters and same logits as `vit_jax.models`, computed as google-research/vision_transformer
did: Flax's own attention (tokens as [B, N, H, K]), float32 throughout, softmax over the whole
[B, H, N, N], labels as one-hot vectors over all classes; of the training state only the parameters
are donated, the optimizer's state is copied; programs are not kept on disk.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax.models.layers import MlpBlock
from vit_jax.models.vit import AddPositionEmbs


class OriginalBlock(nn.Module):
    """`Encoder1DBlock` with Flax's own attention; same parameter tree.

    Attributes:
      mlp_dim: hidden width of the MLP.
      num_heads: H.
      dropout_rate: after attention and in the MLP.
      attention_dropout_rate: of attention weights.
    """

    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, inputs: jax.Array, *, deterministic: bool) -> jax.Array:
        """Tokens [B, N, D] in, tokens [B, N, D] out."""
        x = nn.LayerNorm(epsilon=1e-6, name='LayerNorm_0')(inputs)
        x = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            kernel_init=nn.initializers.xavier_uniform(),
            broadcast_dropout=False,
            deterministic=deterministic,
            dropout_rate=self.attention_dropout_rate,
            name='MultiHeadDotProductAttention_0',
        )(x, x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic) + inputs
        y = nn.LayerNorm(epsilon=1e-6, name='LayerNorm_1')(x)
        mlp = MlpBlock(self.mlp_dim, self.dropout_rate, name='MlpBlock_0')
        return x + mlp(y, deterministic=deterministic)


class OriginalEncoder(nn.Module):
    """`Encoder` of the original's blocks; same parameter tree.

    Attributes:
      num_layers: blocks.
      mlp_dim: see `OriginalBlock`, as the next three.
      num_heads: H.
      dropout_rate: also after the position embeddings.
      attention_dropout_rate: of attention weights.
      add_position_embedding: whether to add learned position embeddings.
    """

    num_layers: int
    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    add_position_embedding: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Tokens [B, N, D] in, normalised tokens [B, N, D] out."""
        if self.add_position_embedding:
            x = AddPositionEmbs(name='posembed_input')(x)
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        for layer in range(self.num_layers):
            x = OriginalBlock(
                mlp_dim=self.mlp_dim,
                num_heads=self.num_heads,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                name=f'encoderblock_{layer}',
            )(x, deterministic=not train)
        return nn.LayerNorm(epsilon=1e-6, name='encoder_norm')(x)


def make_train_step(
    model: nn.Module, tx: optax.GradientTransformation, num_classes: int
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """The original's update, for one device.

    Args:
      model: with `encoder=OriginalEncoder`.
      tx: the optimizer.
      num_classes: C.

    Returns:
      A jitted function (params, opt_state, images float32 [B, S, S, 3] in [-1, 1], labels float32
      [B, C], one-hot, key) -> (params, opt_state, loss). Only the parameters are donated.
    """

    def update(params, opt_state, images, labels, key):
        def loss_fn(params):
            logits = model.apply({'params': params}, images, train=True, rngs={'dropout': key})
            return -jnp.mean(jnp.sum(nn.log_softmax(logits) * labels, axis=-1))

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(update, donate_argnums=0)


def make_predict(model: nn.Module) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """The original's inference.

    Returns:
      A jitted function (params, images float32 [B, S, S, 3] in [-1, 1]) -> logits [B, C] float32.
    """
    return jax.jit(lambda params, images: model.apply({'params': params}, images, train=False))
