"""Fine-tune ViT-S/32 from AugReg's recommended ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/s32.py
    python -m vit_jax.main --config configs/s32.py:oxford_flowers102
    python -m vit_jax.main --config configs/s32.py --config.dataset=/my/photos

The ViT paper's transfer schedule for small sets: SGD with momentum, 500 steps of 512 images, cosine
decay from 0.01. Time and accuracy with these weights: not yet measured (they cannot be downloaded
where this was written).
"""

import ml_collections

from configs import common
from vit_jax import variants


def get_config(dataset: str = 'tf_flowers') -> ml_collections.ConfigDict:
    config = common.get_config()
    config.dataset = dataset
    config.model = variants.get_config('ViT-S_32')
    config.pretrained = 'augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz'
    config.base_lr = 0.01
    return config
