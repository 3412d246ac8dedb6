"""What the classes of Hugging Face's transformers compute, by their `model_type`.

Source: transformers 5.23.0. A configuration leaves out what is the default of its class.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    Attributes:
        layer_norm_eps: default of its configuration.
        hidden_act: default of its configuration, the library's name.
        classifies: what the head of its classifier reads, see `models.VisionTransformer`.
        pools: what a model without a head gives of an image, the same.
        resizes: how it fits its positions to images of another size, '' where it refuses them;
            rotary ones fit any.
        num_heads: default of its configuration.
    """

    layer_norm_eps: float = 1e-12
    hidden_act: str = 'gelu'
    classifies: str = 'token'
    pools: str = 'token'
    resizes: str = ''
    num_heads: int = 12


_CLIP = Family(1e-5, 'quick_gelu', classifies='gap')
_SIGLIP = Family(1e-6, 'gelu_pytorch_tanh', classifies='gap', pools='map')
_IJEPA = Family(classifies='gap', pools='gap')
_DINOV2 = Family(1e-6, classifies='token_gap', resizes='bicubic')
_DINOV2_REGISTERS = dataclasses.replace(_DINOV2, resizes='bicubic, antialiased')
_DINOV3 = Family(1e-5, resizes='rotary', num_heads=6)

FAMILIES: Mapping[str, Family] = {
    'vit': Family(),
    'deit': Family(),
    'vit_msn': Family(1e-6),
    'vit_mae': Family(),
    'ijepa': _IJEPA,
    'dinov2': _DINOV2,
    'dinov2_with_registers': _DINOV2_REGISTERS,
    'dinov3_vit': _DINOV3,
    'clip': _CLIP,
    'clip_vision_model': _CLIP,
    'siglip': _SIGLIP,
    'siglip_vision_model': _SIGLIP,
}


def image_tower(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the image tower, which a model of image and text has inside its own."""
    return config.get('vision_config') or config


def settings(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the model that its class decides.

    Args:
        kind: the model type, a key of `FAMILIES`.
        config: the whole of config.json.

    Returns:
        Arguments of `models.VisionTransformer`; 'told_by_arrays' as in `arrays.Weights.settings`.
    """
    family, tower = FAMILIES[kind], image_tower(config)
    head = 'ForImageClassification' in str(config.get('architectures'))
    classifier = family.classifies if head else family.pools
    if family is _SIGLIP and not tower.get('vision_use_head', True):
        classifier = 'gap'
    found: dict[str, Any] = {}
    is_dinov2 = family in (_DINOV2, _DINOV2_REGISTERS)
    if is_dinov2 or family in (_CLIP, _SIGLIP, _IJEPA):
        found['classifier'] = classifier
    if family is _CLIP:
        found['representation_act'] = 'linear'  # of the projection
        # A classifier reads the patches as they leave the last block.
        found |= {'final_norm': False, 'class_token': True} if head else {}
    if is_dinov2:
        gated = bool(tower.get('use_swiglu_ffn', False))
        found |= {'act': 'silu'} if gated else {}  # whatever hidden_act says
        registers = tower.get('num_register_tokens', 4) if kind != 'dinov2' else 0
        found['told_by_arrays'] = {'gated_mlp': gated, 'registers': int(registers)}
    if family is _DINOV3:
        found |= _dinov3(tower)
    return found


def _dinov3(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ('proj_bias', 'mlp_bias'):
        if not config.get(name, True):
            raise UserError(f'a DINOv3 with {name}=false, which no model here computes')
    biases = {'query_bias': True, 'key_bias': False, 'value_bias': True}
    return {
        'rotary': {'form': 'dinov3', 'theta': float(config.get('rope_theta', 100.0))},
        'told_by_arrays': {
            'gated_mlp': bool(config.get('use_gated_mlp', False)),
            'registers': int(config.get('num_register_tokens', 0)),
            'qkv_bias': ''.join(k[0] for k, default in biases.items() if config.get(k, default)),
        },
    }
