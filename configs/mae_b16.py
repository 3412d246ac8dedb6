"""Fine-tune MAE's ViT-B/16 at 224 px.

    python -m vit_jax.main --config configs/mae_b16.py --config.pretrained=PATH

PATH is the folder of `facebook/vit-mae-base`, whole, or the authors' `mae_pretrain_vit_base.pth`:
decoder and mask token are left out. Activation and epsilon are those that the folder states (of the
`.pth`: GELU in its erf form). Its ImageNet mean and deviation are folded into the first layer; for
the `.pth` say so when it is converted (`vit_jax convert --normalization imagenet`). The position
embeddings are fixed sine-cosine ones in pre-training, and are trained here. Time and accuracy: not
yet measured (the weights cannot be downloaded where this was written).
"""

from vit_jax.configs import common

get_config = common.fine_tuning('ViT-B_16', '', optimizer='adamw', base_lr=5e-4, weight_decay=0.05)
