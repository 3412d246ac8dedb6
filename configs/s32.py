"""Fine-tune ViT-S/32 from AugReg's recommended ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/s32.py

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'ViT-S_32', 'augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz', base_lr=0.01
)
