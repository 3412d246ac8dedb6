"""Train ViT-S/16 from scratch on ImageNet, as "Better plain ViT baselines for ImageNet-1k".

    python -m vit_jax.main --config configs/scratch_s16_imagenet.py

The settings of https://arxiv.org/abs/2205.01580 (big_vision's vit_s16_i1k.py). Published: 76.5 %
after 90 epochs, 80.0 % after 300 (--config.epochs=300). Average pooling in place of the class
token, fixed sine-cosine positions, RandAugment and mixup 0.2; --config.model.classifier=map pools
by attention. imagenet2012 needs its archives, see config.tfds_manual_dir. Time and accuracy with
this code: not measured.
"""

import ml_collections

from vit_jax.configs import common


def get_config(dataset: str = 'imagenet2012') -> ml_collections.ConfigDict:
    config = common.pretraining('ViT-S_16', dataset, batch=1024, epochs=90.0)
    config.model.classifier = 'gap'
    config.model.representation_size = 384
    config.sincos_positions = True
    config.frozen = 'Transformer/posembed_input/.*'
    config.randaug = '2,10'
    config.mixup = 0.2
    return config
