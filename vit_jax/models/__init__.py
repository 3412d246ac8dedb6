"""Models: Flax Linen modules whose parameter trees equal the released checkpoints'."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from vit_jax import variants
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.vit import VisionTransformer

__all__ = [
    'MlpMixer',
    'VisionTransformer',
    'apply_with_intermediates',
    'for_inference',
    'for_training',
    'from_config',
    'get_model',
    'variants',
]


def from_config(config: Mapping[str, Any], **overrides: Any) -> VisionTransformer | MlpMixer:
    """The module that an architecture (`variants.get_config`) describes.

    Args:
      config: the keys of `variants.get_config`, as a `ConfigDict` or any mapping, also one that
        has been through JSON.
      **overrides: further or other arguments of the module, such as `num_classes`, `dtype`,
        `attention` (which a Mixer does not have: 'auto' is accepted, another is an error).

    Returns:
      The module, unbound: `model.init`, `model.apply`.

    Raises:
      ValueError: an attention implementation was given for a Mixer, which has no attention.
    """
    config = config.to_dict() if hasattr(config, 'to_dict') else config
    arguments = {**_with_tuples(config), **overrides}
    if not variants.is_mixer(arguments):
        return VisionTransformer(**arguments)
    attention = arguments.pop('attention', 'auto')
    if attention != 'auto':
        raise ValueError(f'attention {attention!r}: an MLP-Mixer has no attention')
    return MlpMixer(**arguments)


def _with_tuples(config: Any) -> Any:
    """A config whose lists are tuples: JSON has no tuples, and equal models should be equal."""
    if isinstance(config, Mapping):
        return {key: _with_tuples(value) for key, value in config.items()}
    return tuple(config) if isinstance(config, list) else config


def get_model(name: str, **overrides: Any) -> VisionTransformer | MlpMixer:
    """The module of a named variant: `get_model('ViT-B_16', num_classes=5)`.

    Args:
      name: see `variants.VARIANTS`.
      **overrides: `num_classes` (required), and any other argument of the module.

    Raises:
      ValueError: no such variant.
    """
    return from_config(variants.get_config(name), **overrides)


def for_inference(model: nn.Module) -> nn.Module:
    """The model, computing no tokens of the last block that its head does not read.

    Args:
      model: a module of this package; another is returned as it is.
    """
    if isinstance(model, VisionTransformer):
        return model.clone(head_tokens_only=True)
    return model


def for_training(model: nn.Module) -> nn.Module:
    """As `for_inference`, and in the forms that train faster on a CPU, see `models.cpu`.

    Forward-mode differentiation (`jax.jvp`) works with the model that is given, not with this one.
    """
    model = for_inference(model)
    if isinstance(model, VisionTransformer | MlpMixer):
        return model.clone(cpu_training=True)
    return model


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
