"""Fine-tune ViT-H/14 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/h14.py
    python -m vit_jax.main --config configs/h14.py:oxford_flowers102
    python -m vit_jax.main --config configs/h14.py --config.dataset=/my/photos

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
    config.model = variants.get_config('ViT-H_14')
    config.pretrained = 'imagenet21k/ViT-H_14.npz'
    config.base_lr = 0.01
    return config
