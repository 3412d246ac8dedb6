r"""Pre-train a ViT on ImageNet-21k, as AugReg ("How to train your ViT?").

    python -m vit_jax.main --config configs/scratch_imagenet21k.py:B_16 \
        --config.dataset=/data/imagenet21k --config.pp.train='train' --config.pp.test='test'

The settings of https://arxiv.org/abs/2106.10270 and of big_vision's vit_i21k.py: 300 epochs, the
sigmoid loss over 21,843 classes with a head that begins at -10, and for each model the augmentation
that its authors found best on average. The set is not in TFDS: give a folder, and its splits. Time
and accuracy with this code: not measured; the weights that came out are in configs/augreg.py.
"""

import ml_collections

from vit_jax.configs import common

_AUGREG = {
    'Ti_16': 'none', 'S_32': 'none', 'S_16': 'light1', 'B_32': 'light2', 'B_16': 'light2',
    'L_16': 'medium2',
}  # fmt: skip


def get_config(model: str = 'B_16') -> ml_collections.ConfigDict:
    """`model` is one of those in AugReg's figure 4: 'B_16'."""
    if model not in _AUGREG:
        raise ValueError(f'unknown model {model!r}: one of {", ".join(_AUGREG)}')
    config = common.pretraining(f'ViT-{model}', 'imagenet21k', batch=4096, epochs=300.0)
    config.model.head_bias_init = -10.0
    config.loss = 'sigmoid'
    config.augreg = _AUGREG[model]
    return config
