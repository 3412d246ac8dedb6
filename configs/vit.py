"""The original release's fine-tuning settings under its own spelling, vit.py:MODEL,DATASET.

    python -m vit_jax.main --workdir=/tmp/vit --config configs/vit.py:b16,cifar10 \
        --config.pretrained_dir=gs://vit_models/imagenet21k

Published for ViT-B/16 from imagenet21k (8 V100 or A100, the release's README): CIFAR-10 99.02 %,
CIFAR-100 92.06 %, ImageNet 84.53 %. With this code: not yet measured.
"""

import re

import ml_collections

from vit_jax import variants
from vit_jax.configs import common


def _spelling(name: str) -> str:
    """'ViT-B_16' -> 'b16', 'R50+ViT-B_16' -> 'r50_b16', 'ViT-S_16-gap-norep' -> 's16_gap_norep'."""
    size = re.sub(r'([A-Za-z])_(\d)', r'\1\2', name.replace('ViT-', ''))
    return re.sub(r'[+-]', '_', size).lower()


_MODELS = {_spelling(name): name for name in variants.VARIANTS}
_DATASETS = ('cifar10', 'cifar100', 'imagenet2012')  # their splits and steps stand in `datasets.py`


def get_config(argument: str) -> ml_collections.ConfigDict:
    """`argument` is 'MODEL,DATASET': 'b16,cifar10', 'r50_b16,cifar100', 'l32,imagenet2012'."""
    model, _, dataset = argument.partition(',')
    if model not in _MODELS:
        raise ValueError(f'unknown model {model!r} in {argument!r}: one of {", ".join(_MODELS)}')
    if dataset not in _DATASETS:
        raise ValueError(
            f'unknown dataset {dataset!r} in {argument!r}: one of {", ".join(_DATASETS)}'
        )

    config = common.get_config()
    config.dataset = dataset
    config.model = variants.get_config(_MODELS[model])
    config.pretrained_dir = '.'
    # 384 is no multiple of 14: the original silently cut such images to these 27 x 27 patches.
    config.pp.crop = 378 if model == 'h14' else 384
    if variants.is_mixer(config.model):
        config.pp.crop = 224  # what a Mixer's weights are made for
    if model == 'b16':
        config.dataset_presets.cifar10 = ml_collections.ConfigDict(dict(base_lr=0.01))
    return config
