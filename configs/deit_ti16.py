"""Fine-tune DeiT-Ti/16 with its distillation token and two heads, at 224 px.

    python -m vit_jax.main --config configs/deit_ti16.py --config.pretrained=FILE
    python -m vit_jax.main --config configs/deit_ti16.py:oxford_flowers102 --config.pretrained=FILE

FILE is the authors' `.pth` or timm's `deit_tiny_distilled_patch16_224` as `.safetensors`, or the
address of one: DeiT is not among the original release's weights, so without it training starts from
nothing. Both heads are trained, and their mean is the answer; there is no teacher.

The ViT paper's transfer schedule for small sets: SGD with momentum, 500 steps of 512 images, cosine
decay from 0.01. Time and accuracy: not yet measured.
"""

import ml_collections

from configs import common
from vit_jax import variants


def get_config(dataset: str = 'tf_flowers') -> ml_collections.ConfigDict:
    config = common.get_config()
    config.dataset = dataset
    config.model = variants.get_config('DeiT-Ti_16')
    config.pretrained = ''
    config.base_lr = 0.01
    return config
