"""Fine-tune the hybrid R50+ViT-B/16 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/r50_b16.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('R50+ViT-B_16', 'imagenet21k/R50+ViT-B_16.npz', base_lr=0.01)
