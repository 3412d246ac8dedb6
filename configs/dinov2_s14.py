"""Fine-tune DINOv2 ViT-S/14 at 224 px, with a head on class token and mean of the patches.

    python -m vit_jax.main --config configs/dinov2_s14.py --config.pretrained=FOLDER

FOLDER is that of `facebook/dinov2-small` or of `timm/vit_small_patch14_dinov2.lvd142m`, config.json
and weights: their ImageNet mean and deviation are folded into the first layer, their position
embeddings (37 x 37) resized. Other sizes, and those with registers: `--config.model` of
`vit_jax list_models --variants dinov2`, as in this file. The head is the one that Hugging Face's
class has, so that `vit_jax convert --to huggingface` writes the result. Time and accuracy: not yet
measured (the weights cannot be downloaded where this was written).
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'vit_small_patch14_dinov2',
    '',
    model=dict(classifier='token_gap'),
    optimizer='adamw',
    base_lr=1e-4,
    weight_decay=0.05,
)
