"""Train an image and a text tower from scratch on coloured digits: no download, CPU is enough.

    python -m vit_jax.main --config configs/lit_digits.py

1,797 digits of scikit-learn in six colours, each with the captions 'a red three' and 'the digit 3
in red'; 80 % train, 20 % test. Time and results: see docs/lit.md.
"""

import ml_collections

from vit_jax.configs import digits


def get_config(dataset: str = 'digits_captions') -> ml_collections.ConfigDict:
    config = digits.get_config(dataset)
    image = config.model
    image.transformer.dropout_rate = 0.0
    config.model = ml_collections.ConfigDict(
        dict(
            model_name='ViT-digits with bert',
            text_model='bert',
            text=dict(hidden_size=96, mlp_dim=192, num_layers=2, num_heads=4, max_length=16),
            out_dim=64,
            pp=dict(tokenizer_name='bert', max_len=8),
            temperature_init=10.0,
        )
    )
    config.model.image = image
    config.vocabulary = 'digits'
    config.dataset_presets.any = ml_collections.ConfigDict(dict(total_steps=1000, warmup_steps=100))
    config.base_lr = 0.003
    return config
