"""What a recipe does with training images, and where it cannot."""

import numpy as np
import pytest
import small

from vit_jax import data
from vit_jax.data import augment, host_augment, own, randaugment
from vit_jax.errors import UserError
from vit_jax.run import augmentation


def test_crops_are_augmented_on_the_host_where_that_can_be():
    config = small.knobs(randaug='2,10', color_jitter=0.3)
    made = augmentation.host_augment_of(config, small.images([0]))
    assert made == host_augment.HostAugment(randaugment.RandAugment(2, 10), False, 0.3)
    assert not augmentation.host_augment_of(small.knobs(), small.images([0]))
    with pytest.raises(UserError, match="config.randaug='2,10', .*by whoever makes them"):
        augmentation.host_augment_of(config, small.stream())
    pixels = np.zeros((1, 8, 8, 4), np.uint8)
    four = own.as_selection(data.from_arrays(pixels, [0], ('a', 'b'), channels=4), 'train')
    with pytest.raises(UserError, match='these images have 4 channels'):
        augmentation.host_augment_of(config, four)


def test_augmentation_is_told():
    assert augmentation.describe(small.knobs()) == ''
    config = small.knobs(augreg='light2', randaug='2,10', mixup=0.2, random_erasing=0.25)
    told = augmentation.describe(config)
    assert told == 'randaug=2,10, random_erasing=0.25, mixup=0.2 (AugReg light2)'
    assert 'repeated_augmentation=3' in augmentation.describe(small.knobs(repeated_augmentation=3))


def test_labels_are_mixed_as_classes_or_as_vectors():
    config = small.knobs(mixup=0.2, mix_per_example=True)
    assert augmentation.mix_of(config, small.images([0, 1, 2])) == augment.Mix(0.2, 0.0, True, 3)
    assert augmentation.mix_of(config, small.images(np.eye(3, dtype=np.float32))).classes == 0
    assert not augmentation.mix_of(small.knobs(), small.images([0]))


def test_classes_are_balanced_where_each_example_has_one():
    assert augmentation.balance_of(small.knobs(), small.images([0, 1])) is None
    config = small.knobs(balanced_sampling=True)
    assert augmentation.balance_of(config, small.images([0, 2, 2])).tolist() == [0, 2, 2]
    with pytest.raises(UserError, match='only examples that have one class'):
        augmentation.check(config, small.images(np.eye(3, dtype=np.float32)))
    for knobs in ({'balanced_sampling': True}, {'repeated_augmentation': 3}):
        with pytest.raises(UserError, match='draws the examples; leave it out'):
            augmentation.check(small.knobs(**knobs), small.stream())
