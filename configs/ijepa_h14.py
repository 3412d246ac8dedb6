"""Fine-tune I-JEPA's ViT-H/14 at 224 px: the head reads the mean of the patches, no class token.

    python -m vit_jax.main --config configs/ijepa_h14.py --config.pretrained=PATH

PATH is the folder of `facebook/ijepa_vith14_1k` or of
`timm/vit_huge_patch14_gap_224.in1k_ijepa`; its ImageNet mean and deviation are folded into the
first layer. Time and accuracy: not yet measured (the weights cannot be downloaded where this was
written).
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'vit_huge_patch14_gap_224', '', optimizer='adamw', base_lr=1e-4, weight_decay=0.05
)
