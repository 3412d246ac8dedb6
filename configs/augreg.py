r"""Fine-tune an AugReg checkpoint ("How to train your ViT?", https://arxiv.org/abs/2106.10270).

    python -m vit_jax.main --config configs/augreg.py:R_Ti_16 \
        --config.dataset=oxford_iiit_pet --config.pp.train='train[:90%]' --config.base_lr=0.01

A model's name takes the ImageNet-21k checkpoint that its authors' index.csv says is best in
pre-training. A file's name takes that file, pre-trained or already fine-tuned:

    --config configs/augreg.py:R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0

The original release's settings: no dropout, 384 px, 500 steps, learning rate 0.03. Its published
run on tf_flowers (this model, 224 px, 100 steps, rate 0.01): 95.0 %. With this code: not yet
measured.
"""

import ml_collections

from vit_jax import variants
from vit_jax.configs import common

_MODELS = {
    name.replace('ViT-', '').replace('+', '_'): name
    for name in (
        'ViT-Ti_16', 'ViT-S_16', 'ViT-S_32', 'ViT-B_8', 'ViT-B_16', 'ViT-B_32', 'ViT-L_16',
        'R+ViT-Ti_16', 'R26+ViT-S_32', 'R50+ViT-L_32',
    )
}  # fmt: skip


def get_config(model_or_filename: str) -> ml_collections.ConfigDict:
    """`model_or_filename` is 'R_Ti_16', or the name of a file of the release."""
    model = model_or_filename.split('-')[0]
    if model not in _MODELS:
        raise ValueError(
            f'unknown AugReg model {model!r} in {model_or_filename!r}: one of {", ".join(_MODELS)}'
        )

    config = common.get_config()
    config.model = variants.get_config(_MODELS[model])
    config.model.transformer.dropout_rate = 0.0
    config.pretrained_dir = 'gs://vit_models/augreg'
    config.model_or_filename = model_or_filename
    config.pp.crop = 384
    config.base_lr = 0.03
    steps = dict(total_steps=500, warmup_steps=100)
    config.dataset_presets.any = ml_collections.ConfigDict(steps)
    # The original trains on the whole of `train` here; other sets keep their own splits.
    for dataset in ('cifar10', 'cifar100', 'oxford_flowers102', 'oxford_iiit_pet'):
        splits = dict(pp=dict(train='train', test='test'))
        config.dataset_presets[dataset] = ml_collections.ConfigDict(splits)
    return config
