"""Fine-tune ViT-B/8 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/b8.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('ViT-B_8', 'imagenet21k/ViT-B_8.npz', base_lr=0.01)
