"""A preset per dataset: its splits, and how long to fine-tune on it.

Steps are those of the ViT paper (https://arxiv.org/abs/2010.11929, Table 4) and of the original
release: small sets 500, CIFAR 10,000, ImageNet 20,000. Sets without a test split, or whose test
labels are to stay unseen, hold out the end of `train`. A dataset without an entry needs
`--config.pp.train` and `--config.pp.test`.
"""

import ml_collections


def _preset(train: str, test: str, total_steps: int, warmup_steps: int) -> dict:
    return dict(pp=dict(train=train, test=test), total_steps=total_steps, warmup_steps=warmup_steps)


PRESETS = {
    'tf_flowers': _preset('train[:90%]', 'train[90%:]', 500, 100),
    'oxford_flowers102': _preset('train+validation', 'test', 500, 100),
    'oxford_iiit_pet': _preset('train', 'test', 500, 100),
    'cifar10': _preset('train[:98%]', 'test', 10_000, 500),
    'cifar100': _preset('train[:98%]', 'test', 10_000, 500),
    'imagenet2012': _preset('train[:99%]', 'validation', 20_000, 500),
    'digits': _preset('train[:80%]', 'train[80%:]', 500, 100),
    'digits_captions': _preset('train[:80%]', 'train[80%:]', 500, 100),
    'coco_captions': _preset('train', 'val', 5_000, 500),
}


def get_preset(dataset: str) -> ml_collections.ConfigDict:
    """What is known of a dataset.

    Args:
      dataset: `config.dataset`; a version or builder config ('cifar10:3.0.2') does not matter here.

    Returns:
      Values in the shape of the config (pp.train, pp.test, total_steps, warmup_steps); empty for an
      unknown dataset.
    """
    return ml_collections.ConfigDict(PRESETS.get(dataset.split(':')[0].split('/')[0], {}))
