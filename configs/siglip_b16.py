"""Fine-tune SigLIP's (or SigLIP 2's) image tower ViT-B/16 at 224 px, with its attention pooling.

    python -m vit_jax.main --config configs/siglip_b16.py --config.pretrained=PATH

PATH is the folder of `google/siglip-base-patch16-224`, `google/siglip2-base-patch16-224` or of
`timm/vit_base_patch16_siglip_224.webli`, or big_vision's `.npz`. Of image and text, the text tower
is left out. Input is [-1, 1], as these weights want it. Hugging Face's classifier of this family
reads the mean of the tokens instead: `--config.model.classifier=gap` trains what can be written for
it. Time and accuracy: not yet measured (the weights cannot be downloaded where this was written).
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'vit_base_patch16_siglip_224', '', optimizer='adamw', base_lr=3e-5, weight_decay=0.05
)
