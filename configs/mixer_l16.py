"""Fine-tune Mixer-L/16 from the original release's ImageNet-21k weights, at 224 px.

    python -m vit_jax.main --config configs/mixer_l16.py

A Mixer has weights for each token, which ties these to 224 px.

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning(
    'Mixer-L_16', 'gs://mixer_models/imagenet21k/Mixer-L_16.npz', base_lr=0.01
)
