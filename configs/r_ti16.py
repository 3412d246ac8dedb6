"""Fine-tune R+ViT-Ti/16, a ViT on a ResNet's root, from AugReg's ImageNet-21k weights, 224 px.

    python -m vit_jax.main --config configs/r_ti16.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'R+ViT-Ti_16',
    'augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz',
    base_lr=0.01,
)
