"""Fine-tune ViT-B/16 with a hidden layer in front of the head, at 224 px.

    python -m vit_jax.main --config configs/b16_mlp_head.py

The classifier of the PaddleViT course: dense, ReLU, dropout, dense, 87,158,248 parameters at 1000
classes. The original release's ImageNet-21k weights; the hidden layer and the head start new.

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('ViT-B_16-mlp-head', 'imagenet21k/ViT-B_16.npz', base_lr=0.01)
