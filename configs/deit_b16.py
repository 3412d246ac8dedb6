"""Fine-tune DeiT-B/16 with its distillation token and two heads, at 224 px.

    python -m vit_jax.main --config configs/deit_b16.py --config.pretrained=FILE

FILE is the authors' `.pth` or timm's `deit_base_distilled_patch16_224` as `.safetensors`, or the
address of one: DeiT is not among the original release's weights, so without it training starts from
nothing. Both heads are trained, and their mean is the answer; there is no teacher.

Schedule and other datasets as in configs/b16.py. Time and accuracy: not yet measured.
"""

from vit_jax.configs import common

get_config = common.fine_tuning('DeiT-B_16', '', base_lr=0.01)
