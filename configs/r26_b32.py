"""Fine-tune the hybrid R26+ViT-B/32 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/r26_b32.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('R26+ViT-B_32', 'imagenet21k/R26+ViT-B_32.npz', base_lr=0.01)
