"""Fine-tune DINOv3 ViT-S/16 at 256 px: the head reads the class token.

    python -m vit_jax.main --config configs/dinov3_s16.py --config.pretrained=PATH

PATH is the folder of `facebook/dinov3-vits16-pretrain-lvd1689m` (config.json and weights; its
ImageNet mean and deviation are folded into the first layer). The authors' own `.pth` does not tell
the normalisation: `vit_jax convert FILE OUTPUT.npz --to npz --normalization imagenet` first. Its
positions are rotary: nothing is resized for images of another size. Larger ones, up to ViT-7B:
`--config.model` of `vit_jax list_models --variants dinov3`, as in this file; timm's folders without
biases are the variants without `_qkvb`. The licence of the weights is DINOv3's own. Time and
accuracy: not yet measured (the weights cannot be downloaded where this was written).
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'vit_small_patch16_dinov3_qkvb',
    '',
    pp=dict(crop=256),
    optimizer='adamw',
    base_lr=1e-4,
    weight_decay=0.05,
)
