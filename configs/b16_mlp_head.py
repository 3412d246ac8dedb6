"""Fine-tune ViT-B/16 with a hidden layer in front of the head, at 224 px.

    python -m vit_jax.main --config configs/b16_mlp_head.py
    python -m vit_jax.main --config configs/b16_mlp_head.py:oxford_flowers102
    python -m vit_jax.main --config configs/b16_mlp_head.py --config.dataset=/my/photos

The classifier of the PaddleViT course: dense, ReLU, dropout, dense, 87,158,248 parameters at 1000
classes. The original release's ImageNet-21k weights; the hidden layer starts anew, with the head.

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
    config.model = variants.get_config('ViT-B_16-mlp-head')
    config.pretrained = 'imagenet21k/ViT-B_16.npz'
    config.base_lr = 0.01
    return config
