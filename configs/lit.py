r"""LiT: tune a text tower to a locked image tower, on images with captions.

    python -m vit_jax.main --config configs/lit.py --config.vocabulary=vocab.txt \
        --config.dataset=photos/
    python -m vit_jax.main --config configs/lit.py --config.pretrained_text=bert-base-uncased/
    python -m vit_jax.main --config configs/lit.py:ViT-L_16 ...

"Zero-Shot Transfer with Locked-image text Tuning" (https://arxiv.org/abs/2111.07991): ViT-B/16 of
ImageNet-21k, which stays as it is, and a BERT that learns to say what the images show. The images
are embedded once. `photos/` has `captions.csv` with the columns image and caption, see docs/lit.md.
To train both towers: `--config.frozen= --config.cache_features=False`. Time and results with these
weights: not yet measured (they cannot be downloaded where this was written).
"""

import ml_collections

from vit_jax import variants
from vit_jax.configs import common


def get_config(image: str = 'ViT-B_16') -> ml_collections.ConfigDict:
    config = common.get_config()
    width = variants.get_config(image).hidden_size
    config.model = variants.two_towers(image, 'bert', dict(config='base'), (None, width))
    config.dataset = 'coco_captions'
    config.pretrained = f'imagenet21k/{image}.npz'
    config.frozen = 'img/.*'
    config.cache_features = True
    config.pp.inception_crop = False
    config.pp.flip = False
    config.batch = 512
    config.accum_steps = 1
    config.optimizer = 'adamw'
    config.base_lr = 0.001
    config.weight_decay = 0.01
    return config
