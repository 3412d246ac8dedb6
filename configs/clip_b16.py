"""Fine-tune CLIP's image tower ViT-B/16 of OpenAI at 224 px.

    python -m vit_jax.main --config configs/clip_b16.py --config.pretrained=PATH

PATH is the folder of `openai/clip-vit-base-patch16` or of
`timm/vit_base_patch16_clip_quickgelu_224.openai`; its mean and deviation are folded into the first
layer and the position embeddings (there is no bias). Of image and text, the text tower is left out,
and so is the projection. The weights of LAION and DataComp have GELU in its erf form: what a folder
or `--config.model.act=gelu` states is computed. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'vit_base_patch16_clip_quickgelu_224', '', optimizer='adamw', base_lr=3e-5, weight_decay=0.05
)
