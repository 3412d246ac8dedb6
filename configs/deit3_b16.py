"""Fine-tune DeiT III ViT-B/16 at 224 px.

    python -m vit_jax.main --config configs/deit3_b16.py --config.pretrained=FOLDER

FOLDER is that of `timm/deit3_base_patch16_224.fb_in22k_ft_in1k` or another of its size, config.json
and weights: their ImageNet mean and deviation are folded into the first layer. The class token has
no position embedding there: zeros are put in its place. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'deit3_base_patch16_224', '', optimizer='adamw', base_lr=1e-4, weight_decay=0.05
)
