"""Mixup and CutMix: beside timm's formulas, and the same on any topology."""

import jax
import numpy as np
import pytest

from vit_jax import sharding
from vit_jax.data import augment
from vit_jax.data.augment import Mix

RNG = np.random.default_rng(0)
SETTINGS = {
    'mixup': Mix(mixup=0.3, classes=5),
    'cutmix': Mix(cutmix=1.0, classes=5),
    'each': Mix(mixup=0.5, cutmix=1.0, per_example=True, classes=5),
}


def make_batch(count=8):
    return {
        'image': RNG.uniform(0, 255, (count, 12, 20, 3)).astype(np.float32),
        'label': RNG.integers(0, 5, count).astype(np.int32),
        'position': np.arange(count, dtype=np.int32),
    }


def mixed(mix, batch, step=0, devices=1, fsdp=1):
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    key = augment.step_key(0, step, augment.MIX)
    run = jax.jit(lambda batch: mix(batch, key, lambda x: sharding.previous(x, mesh)))
    put = sharding.put_batch(batch, mesh)
    return jax.device_get(run(put)), run.lower(put).compile().as_text()


def bounding_box(height, width, share, row, column):
    """timm's `rand_bbox`, with the centre given."""
    ratio = np.sqrt(1 - share)
    cut_h, cut_w = int(height * ratio), int(width * ratio)
    top, bottom = (np.clip(row + s * (cut_h // 2), 0, height) for s in (-1, 1))
    left, right = (np.clip(column + s * (cut_w // 2), 0, width) for s in (-1, 1))
    return top, bottom, left, right


@pytest.mark.parametrize(('height', 'width'), [(12, 20), (17, 17)])
def test_boxes_are_those_of_timm(height, width):
    box_of = jax.jit(augment.cutmix_box, static_argnums=(2, 3))
    for share, row, column in [
        (0.5, 6, 10), (0.9, 0, 0), (0.1, 11, 16), (0.0, 6, 7), (1.0, 3, 3), (0.31, 2, 15),
    ]:  # fmt: skip
        centre = np.float32([(row + 0.5) / height, (column + 0.5) / width])
        found = box_of(np.float32(share), centre, height, width)
        top, bottom, left, right = bounding_box(height, width, share, row, column)
        expected = np.zeros((height, width))
        expected[top:bottom, left:right] = 1
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('name', SETTINGS)
def test_images_and_labels_are_mixed_by_the_formulas(name):
    mix, batch = SETTINGS[name], make_batch()
    found, _ = mixed(mix, batch)
    key = augment.step_key(0, 0, augment.MIX)
    weights, shares = (np.asarray(x) for x in mix.draw(key, 8, 12, 20))
    assert len(weights) == len(shares) == (8 if mix.per_example else 1)
    kinds = set()
    for row in range(8):
        weight, share = weights[row % len(weights)], shares[row % len(shares)]
        kinds.add('blend' if weight.min() == weight.max() else 'box')
        mine, theirs = batch['image'][row].astype(np.float64), batch['image'][row - 1]
        if weight.min() == weight.max():  # timm: x * lam + x_flipped * (1 - lam)
            np.testing.assert_allclose(weight, share)
            expected = mine * share + theirs * (1 - share)
        else:  # timm: x[:, :, yl:yh, xl:xh] = x_flipped[...]; lam is the area that is left
            assert set(np.unique(weight)) == {0, 1}
            np.testing.assert_allclose(share, weight.mean(), rtol=1e-6)
            expected = np.where(weight[..., None] == 1, mine, theirs)
        np.testing.assert_allclose(found['image'][row], expected, atol=1e-4)
        label = np.eye(5)[batch['label'][row]] * share
        label = label + np.eye(5)[batch['label'][row - 1]] * (1 - share)
        np.testing.assert_allclose(found['label'][row], label, atol=1e-6)
        np.testing.assert_allclose(found['label'][row].sum(), 1, rtol=1e-6)
    assert len(kinds) == (2 if name == 'each' else 1)
    np.testing.assert_array_equal(found['position'], batch['position'])


@pytest.mark.parametrize('name', SETTINGS)
def test_partners_shares_boxes_and_labels_are_the_same_on_any_topology(name):
    batch = make_batch()
    one, _ = mixed(SETTINGS[name], batch)
    for devices, fsdp in ((2, 1), (4, 1), (4, 4)):
        found, text = mixed(SETTINGS[name], batch, devices=devices, fsdp=fsdp)
        assert found['label'].tobytes() == one['label'].tobytes()
        np.testing.assert_allclose(found['image'], one['image'], atol=1e-4, rtol=0)
        assert 'collective-permute' in text and 'all-gather' not in text


def test_shares_are_drawn_from_the_beta_distribution_and_differ_by_step():
    mix = Mix(mixup=0.5, per_example=True)
    _, shares = mix.draw(augment.step_key(0, 7, augment.MIX), 4000, 1, 1)
    np.testing.assert_allclose(shares.mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(shares.var(), 1 / (4 * (2 * 0.5 + 1)), atol=0.01)
    assert abs(np.corrcoef(shares[1:], shares[:-1])[0, 1]) < 0.05
    both = Mix(mixup=1.0, cutmix=1.0, per_example=True)
    weights, _ = both.draw(augment.step_key(0, 7, augment.MIX), 2000, 2, 2)
    boxes = ((weights == 0) | (weights == 1)).all((1, 2))
    assert 0.45 < boxes.mean() < 0.55
    batch = make_batch()
    first, again, other = (mixed(SETTINGS['mixup'], batch, step)[0]['label'] for step in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize('dtype', [np.float32, np.uint8])
def test_labels_that_are_vectors_and_images_of_8_bits(dtype):
    batch = make_batch()
    batch['image'] = batch['image'].astype(dtype)
    batch['label'] = RNG.uniform(size=(8, 3)).astype(np.float32)
    found, _ = mixed(Mix(mixup=0.5), batch)
    share = (found['image'][1] - batch['image'][0].astype(np.float32)).sum()
    share /= (batch['image'][1].astype(np.float32) - batch['image'][0]).sum()
    expected = share * batch['label'] + (1 - share) * np.roll(batch['label'], 1, axis=0)
    np.testing.assert_allclose(found['label'], expected, atol=1e-3)
    assert found['image'].dtype == np.float32


def test_without_settings_nothing_is_mixed():
    assert not Mix() and not Mix(per_example=True, classes=3) and Mix(mixup=0.1)
