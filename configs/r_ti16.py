"""Fine-tune R+ViT-Ti/16, a ViT on a ResNet's root, from AugReg's ImageNet-21k weights, 224 px.

    python -m vit_jax.main --config configs/r_ti16.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from configs import common


def get_config(dataset: str = 'tf_flowers'):
    weights = 'augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz'
    return common.fine_tune('R+ViT-Ti_16', weights, dataset, base_lr=0.01)
