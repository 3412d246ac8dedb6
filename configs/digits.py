"""Train a small ViT from scratch on scikit-learn's handwritten digits: no download, CPU is enough.

    python -m vit_jax.main --config configs/digits.py

1,797 images of 8 x 8 pixels, enlarged to 16 x 16; 80 % (stratified) train, 20 % test. No crops and
no mirror images: part of a digit, or its mirror image, is another digit or none. Time and accuracy:
see README, "Results".
"""

import ml_collections

from vit_jax.configs import common


def get_config(dataset: str = 'digits') -> ml_collections.ConfigDict:
    config = common.get_config()
    config.dataset = dataset

    config.model = ml_collections.ConfigDict(
        dict(
            model_name='ViT-digits',
            patches=dict(size=(4, 4)),
            hidden_size=96,
            transformer=dict(
                mlp_dim=192, num_heads=4, num_layers=4, attention_dropout_rate=0.0, dropout_rate=0.1
            ),
            classifier='gap',
            representation_size=ml_collections.config_dict.placeholder(int),
        )
    )
    config.pretrained = ''

    config.pp.crop = 16
    config.pp.inception_crop = False
    config.pp.flip = False

    config.batch = 128
    config.accum_steps = 1
    config.dataset_presets.any = ml_collections.ConfigDict(dict(total_steps=600, warmup_steps=60))
    config.optimizer = 'adamw'
    config.base_lr = 0.002
    config.weight_decay = 0.05
    config.optim_dtype = 'float32'
    return config
