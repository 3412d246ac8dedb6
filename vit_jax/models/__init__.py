"""Models: Flax Linen modules whose parameter trees equal the released checkpoints'."""

from collections.abc import Mapping
from typing import Any

import jax

from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer

__all__ = ['VisionTransformer', 'apply_with_intermediates', 'from_config', 'get_model', 'variants']


def from_config(config: Mapping[str, Any], **overrides: Any) -> VisionTransformer:
    """The module that an architecture (`variants.get_config`) describes.

    Args:
      config: the keys of `variants.get_config`, as a `ConfigDict` or any mapping.
      **overrides: further or other arguments of the module, such as `num_classes`, `dtype`,
        `attention`.

    Returns:
      The module, unbound: `model.init`, `model.apply`.
    """
    config = config.to_dict() if hasattr(config, 'to_dict') else dict(config)
    return VisionTransformer(**{**config, **overrides})


def get_model(name: str, **overrides: Any) -> VisionTransformer:
    """The module of a named variant: `get_model('ViT-B_16', num_classes=5)`.

    Args:
      name: see `variants.VARIANTS`.
      **overrides: `num_classes` (required), and any other argument of the module.

    Raises:
      ValueError: no such variant.
    """
    return from_config(variants.get_config(name), **overrides)


def apply_with_intermediates(
    model: VisionTransformer,
    params: Mapping[str, Any],
    images: jax.Array,
    *,
    attention_weights: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and everything in between.

    Args:
      model: a module of this package.
      params: its parameters.
      images: [B, height, width, 3] float32 in [-1, 1].
      attention_weights: also return attention weights, [B, H, N, N] float32 for every block,
        whatever attention implementation the model uses.

    Returns:
      Logits, and a flat dict: 'patch_embedding' [B, h, w, D]; 'Transformer/with_position_embedding'
      [B, N, D]; 'Transformer/encoderblock_0/tokens' (after the block), '/self_attention' and '/mlp'
      (what each half added) [B, N, D]; 'encoded' [B, N, D]; 'pre_logits', what the head reads, [B,
      D]; and on request 'Transformer/encoderblock_0/attention_weights'. Inside `jax.jit`, what is
      not used costs nothing.
    """
    collections = ['intermediates'] + (['attention_weights'] if attention_weights else [])
    logits, state = model.apply({'params': params}, images, train=False, mutable=collections)
    out: dict[str, jax.Array] = {}
    for collection in collections:
        for path, leaf in jax.tree_util.tree_flatten_with_path(state[collection])[0]:
            names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            if collection == 'attention_weights':
                names = names[:-2] + [
                    'attention_weights'
                ]  # .../MultiHeadDotProductAttention_0/weights
            out['pre_logits' if names == ['features'] else '/'.join(names)] = leaf
    return logits, out
