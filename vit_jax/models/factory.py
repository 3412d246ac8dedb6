"""Makes models: from a name, from a description of the architecture, for a purpose."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from vit_jax import variants
from vit_jax.models.encoder import Encoder
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.two_tower import LitModel
from vit_jax.models.vit import VisionTransformer


def from_config(
    config: Mapping[str, Any], **overrides: Any
) -> VisionTransformer | MlpMixer | LitModel:
    """The module that an architecture (`variants.get_config`) describes.

    Args:
      config: the keys of `variants.get_config`, or of `variants.two_towers`, as a `ConfigDict` or
        any mapping, also one that has been through JSON.
      **overrides: further or other arguments of the module, such as `num_classes`, `dtype`,
        `attention` and `scan_layers` (which a Mixer does not have: the defaults, 'auto' and False,
        are accepted, others are errors). Of two towers, all but `dtype` are the image tower's.

    Returns:
      The module, unbound: `model.init`, `model.apply`.

    Raises:
      ValueError: an attention implementation or `scan_layers` was given for a Mixer.
    """
    config = config.to_dict() if hasattr(config, 'to_dict') else config
    if variants.has_two_towers(config):
        dtype = {'dtype': overrides.pop('dtype')} if 'dtype' in overrides else {}
        overrides.pop('num_classes', None)
        image = {**config['image'], **overrides}
        image = {name: value for name, value in image.items() if value is not None}
        return LitModel(**{**config, 'image': image}, **dtype)
    arguments = {**config, **overrides}
    for name in ('act', 'layer_norm_eps'):  # None: not decided, so that the default counts
        if arguments.get(name, '') is None:
            del arguments[name]
    if not variants.is_mixer(arguments):
        return VisionTransformer(**arguments)
    attention = arguments.pop('attention', 'auto')
    if attention != 'auto':
        raise ValueError(f'attention {attention!r}: an MLP-Mixer has no attention')
    if arguments.pop('scan_layers', False):
        raise ValueError('scan_layers: an MLP-Mixer does not have it')
    return MlpMixer(**arguments)


def get_model(name: str, **overrides: Any) -> VisionTransformer | MlpMixer | LitModel:
    """The module of a named variant: `get_model('ViT-B_16', num_classes=5)`.

    Args:
      name: see `variants.VARIANTS`, and `variants.TWO_TOWERS` for image and text: 'LiT-B16B'.
      **overrides: `num_classes` (required, but of two towers), and any other argument of the
        module.

    Raises:
      ValueError: no such variant.
    """
    if name in variants.TWO_TOWERS:
        return LitModel(**{**variants.TWO_TOWERS[name], **overrides})
    return from_config(variants.get_config(name), **overrides)


def for_inference(model: nn.Module) -> nn.Module:
    """The model, computing no tokens of the last block that its head does not read.

    Args:
      model: a module of this package; another is returned as it is.
    """
    if isinstance(model, LitModel):
        return model.clone(image={**model.image, 'head_tokens_only': True})
    if isinstance(model, VisionTransformer):
        return model.clone(head_tokens_only=True)
    return model


def for_training(model: nn.Module) -> nn.Module:
    """As `for_inference`, and in the forms that train faster on a CPU, see `models.cpu`.

    Forward-mode differentiation (`jax.jvp`) works with the model that is given, not with this one.
    """
    model = for_inference(model)
    if isinstance(model, LitModel):
        return model.clone(image={**model.image, 'cpu_training': True})
    if isinstance(model, VisionTransformer | MlpMixer):
        return model.clone(cpu_training=True)
    return model


def block_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Where the blocks of a model are in its tree of parameters, the first one first.

    Empty for a model of another package, or with an encoder of one's own.
    """
    if isinstance(model, MlpMixer):
        return [(f'MixerBlock_{i}',) for i in range(model.num_blocks)]
    if isinstance(model, VisionTransformer) and model.encoder is Encoder:
        count = model.transformer['num_layers']
        return [('Transformer', f'encoderblock_{i}') for i in range(count)]
    return []
