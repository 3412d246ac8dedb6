"""Fine-tune Mixer-S/16 from the released ImageNet-1k weights (GSAM), at 224 px.

    python -m vit_jax.main --config configs/mixer_s16.py
    python -m vit_jax.main --config configs/mixer_s16.py:oxford_flowers102
    python -m vit_jax.main --config configs/mixer_s16.py --config.dataset=/my/photos

The ViT paper's transfer schedule for small sets: SGD with momentum, 500 steps of 512 images, cosine
decay from 0.01. A Mixer has weights for each token, which ties these to 224 px. Time and accuracy
with these weights: not yet measured (they cannot be downloaded where this was written).
"""

import ml_collections

from configs import common
from vit_jax import variants


def get_config(dataset: str = 'tf_flowers') -> ml_collections.ConfigDict:
    config = common.get_config()
    config.dataset = dataset
    config.model = variants.get_config('Mixer-S_16')
    config.pretrained = 'gs://mixer_models/gsam/Mixer-S_16.npz'
    config.base_lr = 0.01
    return config
