"""Fine-tune Mixer-S/32 from the released ImageNet-1k weights (GSAM), at 224 px.

    python -m vit_jax.main --config configs/mixer_s32.py

A Mixer has weights for each token, which ties these to 224 px.

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('Mixer-S_32', 'gs://mixer_models/gsam/Mixer-S_32.npz', base_lr=0.01)
