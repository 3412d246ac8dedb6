"""Resizing as Pillow, and as TensorFlow, on made-up and real images."""

import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import decode
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.resample import INTERPOLATIONS, resize

FORMS = [
    Preprocess(224, interpolation='bicubic', antialias=True),
    Preprocess((32, 128), interpolation='bilinear', antialias=True),
    *(
        Preprocess(224, 256, eval=form, interpolation=interpolation, antialias=True)
        for form, interpolation in itertools.product(
            ('resize_crop', 'squash_crop'), ('bilinear', 'bicubic')
        )
    ),
    Preprocess(64, 73, eval='resize_crop', antialias=True, centre='half_even'),
]


def pillow_pixels(picture, pp):
    """What Hugging Face and torchvision make of a picture, by Pillow alone."""
    height, width = pp.size
    whole = (width, height)
    if pp.eval == 'squash_crop':
        whole = (pp.resize, pp.resize)
    elif pp.eval == 'resize_crop':
        long = int(pp.resize * max(picture.size) / min(picture.size))
        whole = (pp.resize, long) if picture.width <= picture.height else (long, pp.resize)
    picture = picture.resize(whole, INTERPOLATIONS.index(pp.interpolation))
    x, y = ((a - b) / 2 for a, b in zip(whole, (width, height), strict=True))
    x, y = (int(x), int(y)) if pp.centre == 'down' else (round(x), round(y))
    return np.asarray(picture.crop((x, y, x + width, y + height)), np.float32)


@pytest.mark.parametrize('pp', FORMS, ids=lambda pp: pp.describe())
def test_pixels_are_pillows_on_real_photos(shared_dir, pp):
    files = sorted((shared_dir / 'data/flowers_folder').glob('*/*/*.jpg'))
    assert len(files) == 260
    for path in files[::20]:  # all 260 were checked once: 0 grey levels apart
        ours = pp.evaluate(decode(path.read_bytes(), key=str(path), accurate=pp.accurate))
        np.testing.assert_array_equal(ours, pillow_pixels(Image.open(path), pp))


@pytest.mark.parametrize('pp', FORMS, ids=lambda pp: pp.describe())
@pytest.mark.parametrize('size', [(300, 401), (401, 300), (20, 333), (230, 230)])
def test_pixels_are_pillows(pp, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    np.testing.assert_array_equal(pp.evaluate(image), pillow_pixels(Image.fromarray(image), pp))


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
@pytest.mark.parametrize('channels', [1, 4, 13])
def test_any_number_of_channels_and_floats(interpolation, channels):
    # Not to the ends of the range, which Pillow cuts off bytes half way.
    image = np.random.default_rng(1).integers(70, 186, (40, 31, channels), np.uint8)
    found = resize(image, (16, 24), interpolation=interpolation, antialias=True)
    assert found.shape == (16, 24, channels) and found.dtype == np.float32
    for channel in range(channels):
        alone = Image.fromarray(image[..., channel]).resize(
            (24, 16), INTERPOLATIONS.index(interpolation)
        )
        np.testing.assert_array_equal(found[..., channel], alone)
    # Of floats nothing is rounded, and nothing leaves the range.
    floats = resize(image.astype(np.float32), (16, 24), interpolation=interpolation, antialias=True)
    assert 0 <= floats.min() <= floats.max() <= 255
    assert np.abs(floats - found).max() < 1.5  # Pillow rounds bytes twice


def test_bicubic_without_antialiasing():
    image = np.random.default_rng(2).integers(0, 256, (20, 30, 3)).astype(np.float32)
    larger = resize(image, (50, 64), interpolation='bicubic')
    pillows = resize(image, (50, 64), interpolation='bicubic', antialias=True)
    np.testing.assert_allclose(larger, pillows, atol=1e-2)  # where images grow, nothing can alias
    # A reduction by 4 reads the 4 x 4 pixels around each centre: weights -1/16, 9/16, 9/16, -1/16.
    image = np.random.default_rng(3).integers(0, 256, (32, 32, 1)).astype(np.float32)
    weights = np.array([-1, 9, 9, -1]) / 16
    near = image.reshape(8, 4, 8, 4).transpose(0, 2, 1, 3)
    expected = np.clip(np.einsum('yxab,a,b->yx', near, weights, weights), 0, 255)
    found = resize(image, (8, 8), interpolation='bicubic')[..., 0]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    flat = np.full((9, 7, 2), 200, np.uint8)
    np.testing.assert_allclose(resize(flat, (5, 4), interpolation='bicubic'), 200, atol=1e-4)


def test_pillow_decodes_as_accurately(shared_dir):
    path = pathlib.Path(sorted((shared_dir / 'data/flowers_folder').glob('*/*/*.jpg'))[0])
    fast, accurate = (decode(path.read_bytes(), key='x', accurate=a) for a in (False, True))
    np.testing.assert_array_equal(accurate, np.asarray(Image.open(path).convert('RGB')))
    assert 0 < np.abs(fast.astype(int) - accurate).max() <= 20
