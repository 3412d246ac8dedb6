"""Fine-tune DeiT-S/16 with its distillation token and two heads, at 224 px.

    python -m vit_jax.main --config configs/deit_s16.py --config.pretrained=FILE

configs/deit_b16.py says what FILE is and how both heads are trained. Schedule and other datasets as
in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('DeiT-S_16', '', base_lr=0.01)
