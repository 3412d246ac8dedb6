"""Mixup, CutMix and random erasing: beside timm's formulas, and the same on any topology."""

import functools
import math

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
    batch['weight'] = RNG.uniform(size=8).astype(np.float32)
    found, _ = mixed(Mix(mixup=0.5), batch)
    share = (found['image'][1] - batch['image'][0].astype(np.float32)).sum()
    share /= (batch['image'][1].astype(np.float32) - batch['image'][0]).sum()
    expected = share * batch['label'] + (1 - share) * np.roll(batch['label'], 1, axis=0)
    np.testing.assert_allclose(found['label'], expected, atol=1e-3)
    expected = share * batch['weight'] + (1 - share) * np.roll(batch['weight'], 1)
    np.testing.assert_allclose(found['weight'], expected, atol=1e-3)
    assert found['image'].dtype == np.float32


def test_without_settings_nothing_is_mixed():
    assert not Mix() and not Mix(per_example=True, classes=3) and Mix(mixup=0.1)


def timm_box(draws, height, width):
    """timm's `RandomErasing._erase`, with the random numbers given."""
    box = np.zeros((height, width))
    for area, aspect, top, left in np.asarray(draws, np.float64):
        target = (0.02 + (1 / 3 - 0.02) * area) * height * width
        ratio = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * aspect)
        h, w = int(round(math.sqrt(target * ratio))), int(round(math.sqrt(target / ratio)))
        if w < width and h < height:
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            box[y : y + h, x : x + w] = 1
            break
    return box


@pytest.mark.parametrize(('height', 'width'), [(224, 224), (12, 20), (40, 5), (1, 1)])
def test_boxes_of_random_erasing_are_those_of_timm(height, width):
    box_of = jax.jit(augment.erasing_box, static_argnums=(1, 2))
    draws = np.random.default_rng(0).random((50, augment.ERASING_TRIES, 4), np.float32)
    areas = []
    for one in draws:
        found = np.asarray(box_of(one, height, width))
        np.testing.assert_array_equal(found, timm_box(one, height, width))
        areas.append(found.mean())
    if height == 224:
        assert min(areas) > 0.015 and max(areas) < 0.34
    if height == 1:
        assert max(areas) == 0


def erased(images, share, step=0, devices=1, fsdp=1):
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    key = augment.step_key(0, step, augment.ERASE)
    run = jax.jit(lambda b: augment.random_erasing(b['image'], b['position'], key, share))
    position = np.arange(len(images), dtype=np.int32)
    put = sharding.put_batch({'image': images, 'position': position}, mesh)
    return np.asarray(run(put))


def test_a_box_of_some_images_is_noise():
    images = np.full((400, 24, 24, 3), 77, np.uint8)
    found = erased(images, 0.25)
    changed = (found != 77).any(-1)
    share = changed.any((1, 2)).mean()
    assert 0.18 < share < 0.32 and found.dtype == np.float32
    noise = found[changed]
    assert abs(noise.mean() - 127.5) < 5 and abs(noise.std() - 127.5) < 5  # 0 and 1 for the model
    boxes = changed[changed.any((1, 2))]
    for box in boxes[:20]:  # full rectangles
        rows, columns = box.any(1), box.any(0)
        np.testing.assert_array_equal(box, rows[:, None] & columns[None])
    assert (erased(images, 1.0) != 77).any((1, 2, 3)).all()
    assert (erased(images, 0.25, step=1) != found).any()


def test_erasing_is_the_same_on_any_topology():
    images = np.zeros((8, 12, 20, 3), np.float32)
    one = erased(images, 0.5)
    for devices, fsdp in ((2, 1), (4, 1), (4, 4)):
        other = erased(images, 0.5, devices=devices, fsdp=fsdp)
        np.testing.assert_array_equal(one == 0, other == 0)
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_images_are_mirrored_and_turned_upside_down_independently():
    images = np.arange(400 * 4 * 6 * 1, dtype=np.float32).reshape(400, 4, 6, 1)
    position = np.arange(400, dtype=np.int32)
    key_of = functools.partial(augment.step_key, 0, 3)

    def done(**settings):
        off = {'flip': False, 'flip_vertical': False, 'erasing': 0.0}
        return np.asarray(augment.each(images, position, key_of, **(off | settings)))

    across = (done(flip=True) != images).any((1, 2, 3))
    down = (done(flip_vertical=True) != images).any((1, 2, 3))
    both = done(flip=True, flip_vertical=True)
    for row in range(400):
        expected = images[row, :, ::-1] if across[row] else images[row]
        np.testing.assert_array_equal(both[row], expected[::-1] if down[row] else expected)
    assert 160 < across.sum() < 240 and 160 < down.sum() < 240
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.15
