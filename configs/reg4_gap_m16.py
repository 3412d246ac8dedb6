"""Fine-tune timm's ViT-Medium/16 with four registers and average pooling, at 256 px.

    python -m vit_jax.main --config configs/reg4_gap_m16.py --config.pretrained=FOLDER

FOLDER is that of `timm/vit_medium_patch16_reg4_gap_256.sbb_in1k` or another of its size,
config.json and weights. The head reads the mean of the patches behind a norm (`fc_norm`). Time and
accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'vit_medium_patch16_reg4_gap_256',
    '',
    pp=dict(crop=256),
    optimizer='adamw',
    base_lr=1e-4,
    weight_decay=0.05,
)
