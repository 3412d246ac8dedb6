"""Fine-tune ViT-B/16 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/b16.py
    python -m vit_jax.main --config configs/b16.py:oxford_flowers102
    python -m vit_jax.main --config configs/b16.py --config.dataset=/my/photos

The ViT paper's transfer schedule for small sets: SGD with momentum, 500 steps of 512 images, cosine
decay from 0.01. Time and accuracy with these weights: not yet measured (they cannot be downloaded
where this was written).
"""

from vit_jax.configs import common

get_config = common.fine_tuning('ViT-B_16', 'imagenet21k/ViT-B_16.npz', base_lr=0.01)
