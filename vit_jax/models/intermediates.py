"""Reads what a forward pass computes on its way to the logits."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from vit_jax.models.mixer import MlpMixer
from vit_jax.models.vit import VisionTransformer


def apply_with_intermediates(
    model: VisionTransformer | MlpMixer,
    params: Mapping[str, Any],
    images: jax.Array,
    *,
    attention_weights: bool = False,
    attention_offsets: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits and everything in between.

    Args:
      model: a module of this package; with `head_tokens_only`, the last block has fewer tokens.
      params: its parameters.
      images: [B, height, width, 3] float32 in [-1, 1].
      attention_weights: also return attention weights, [B, H, N, N] float32 for every block,
        for any attention implementation of the model.
      attention_offsets: only with `attention_weights`: what to add to the weights of every block,
        by the names they have in what is returned. With zeros, the gradient with respect to them is
        that with respect to the attention weights.

    Returns:
      Logits, and a flat dict: 'patch_embedding' [B, h, w, D]; 'Transformer/with_position_embedding'
      [B, N, D]; 'Transformer/encoderblock_0/tokens' (after the block), '/self_attention' and '/mlp'
      (what each half added) [B, N, D]; 'encoded' [B, N, D]; 'pre_logits', what the head reads, [B,
      D] (of a distilled model [B, 2, D]: class token, distillation token); of a hybrid 'resnet',
      the ResNet's features; and on request 'Transformer/encoderblock_0/attention_weights'. A Mixer
      has 'MixerBlock_0/tokens', '/tokens_mlp' and '/channels_mlp' instead of the encoder's. Inside
      `jax.jit`, what is not used costs nothing.

    Raises:
      ValueError: attention weights of an MLP-Mixer, which has none.
    """
    if attention_weights and isinstance(model, MlpMixer):
        raise ValueError('an MLP-Mixer has no attention, and so no attention weights')
    if attention_weights:  # which neither a fused kernel nor the forms for training give
        model = model.clone(attention='xla', cpu_training=False)
    collections = ['intermediates'] + (['attention_weights'] if attention_weights else [])
    variables = {'params': params}
    if attention_offsets is not None:
        variables['attention_offsets'] = traverse_util.unflatten_dict(
            {
                (*name.split('/')[:-1], 'MultiHeadDotProductAttention_0', 'weights'): offset
                for name, offset in attention_offsets.items()
            }
        )
    logits, state = model.apply(variables, images, train=False, mutable=collections)
    out: dict[str, jax.Array] = {}
    for collection in collections:
        for path, leaf in jax.tree_util.tree_flatten_with_path(state[collection])[0]:
            names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            if collection == 'attention_weights':
                # .../MultiHeadDotProductAttention_0/weights
                names = names[:-2] + ['attention_weights']
            out['pre_logits' if names == ['features'] else '/'.join(names)] = leaf
    return logits, out
