"""Models: Flax Linen modules whose parameter trees equal the released checkpoints'."""

from vit_jax import variants
from vit_jax.models.factory import (
    block_names,
    for_inference,
    for_training,
    from_config,
    get_model,
)
from vit_jax.models.intermediates import apply_with_intermediates
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.positions import for_image_size
from vit_jax.models.two_tower import LitModel
from vit_jax.models.vit import VisionTransformer

__all__ = [
    'LitModel',
    'MlpMixer',
    'VisionTransformer',
    'apply_with_intermediates',
    'block_names',
    'for_image_size',
    'for_inference',
    'for_training',
    'from_config',
    'get_model',
    'variants',
]
