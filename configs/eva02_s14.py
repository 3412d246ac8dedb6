"""Fine-tune EVA-02 ViT-S/14 at 336 px: the head reads the mean of the patches behind a norm.

    python -m vit_jax.main --config configs/eva02_s14.py --config.pretrained=FOLDER

FOLDER is that of `timm/eva02_small_patch14_224.mim_in22k` or of another of its size, config.json
and weights: CLIP's mean and deviation are folded into the first layer, learned position embeddings
resized; rotary positions count the patches of larger images as if they were the 16 x 16 of
pre-training. Other sizes: `--config.model` of `vit_jax list_models --variants eva02`, as in this
file. Time and accuracy: not yet measured (the weights cannot be downloaded where this was written).
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'eva02_small_patch14_224',
    '',
    pp=dict(crop=336),
    optimizer='adamw',
    base_lr=1e-4,
    weight_decay=0.05,
)
