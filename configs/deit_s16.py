"""Fine-tune DeiT-S/16 with its distillation token and two heads, at 224 px.

    python -m vit_jax.main --config configs/deit_s16.py --config.pretrained=FILE

configs/deit_b16.py says what FILE is and how both heads are trained. Schedule and other datasets as
in configs/b16.py. Time and accuracy: not yet measured.
"""

from configs import common


def get_config(dataset: str = 'tf_flowers'):
    return common.fine_tune('DeiT-S_16', '', dataset, base_lr=0.01)
