"""Fine-tune ViT-H/14 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/h14.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('ViT-H_14', 'imagenet21k/ViT-H_14.npz', base_lr=0.01)
