"""Fine-tune ViT-B/32 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/b32.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('ViT-B_32', 'imagenet21k/ViT-B_32.npz', base_lr=0.01)
