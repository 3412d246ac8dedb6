"""Preprocessing against TensorFlow's answers, stored in tests/fixtures/data (make_fixtures.py)."""

import hashlib
import pathlib
import runpy

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vit_jax.data import resample
from vit_jax.data.decode import decode
from vit_jax.data.inception_crop import sample_inception_box
from vit_jax.data.preprocess import CropBox, Preprocess, normalize
from vit_jax.data.resample import resize_bilinear
from vit_jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
PHOTOS = sorted((FIXTURES / 'photos').glob('*.jpg'))
SIZES = [(500, 333), (333, 500), (600, 100), (32, 32), (10, 10)]
SAMPLES = 20_000

cells = runpy.run_path(str(FIXTURES / 'inception_cells.py'))['cells']


@pytest.mark.parametrize('path', PHOTOS, ids=lambda path: path.stem)
def test_resize_is_within_a_hundredth_of_a_grey_level_of_tensorflow(path):
    golden = np.load(FIXTURES / 'pixels.npz')
    pixels = decode(path.read_bytes(), key=str(path))
    y, x, height, width = golden[f'{path.stem}/box']
    whole = Preprocess(crop=32).evaluate(pixels)
    part = resize_bilinear(pixels[y : y + height, x : x + width], 32)
    assert whole.dtype == part.dtype == np.float32
    np.testing.assert_allclose(whole, golden[f'{path.stem}/resized'], rtol=0, atol=1e-2)
    np.testing.assert_allclose(part, golden[f'{path.stem}/cropped'], rtol=0, atol=1e-2)
    # Rounding to whole grey levels on the way would show.
    assert np.abs(np.rint(whole) - golden[f'{path.stem}/resized']).max() > 0.4


def boxes_of(height, width, seed=0, sample=sample_inception_box):
    rng = np.random.default_rng(seed)
    return np.array([sample(height, width, rng) for _ in range(SAMPLES)])


def agreement(boxes, golden, width, height):
    """p-value of the hypothesis that boxes and TensorFlow's boxes have one distribution."""
    names, counts = golden[f'{width}x{height}/cells'], golden[f'{width}x{height}/counts']
    ours = {}
    for cell in map(tuple, cells(boxes, height, width)):
        ours[cell] = ours.get(cell, 0) + 1
    table = np.array(
        [[ours.pop(tuple(name), 0), count] for name, count in zip(names, counts, strict=True)]
    )
    # What TensorFlow never drew in 400,000 goes together with what it hardly drew.
    expected = table[:, 1] * (SAMPLES / counts.sum())
    rare = expected < 8
    merged = np.vstack([table[~rare], table[rare].sum(0) + [sum(ours.values()), 0]])
    return stats.chi2_contingency(merged[merged.sum(1) > 0]).pvalue


@pytest.mark.parametrize(('width', 'height'), SIZES)
def test_crops_have_tensorflows_distribution(width, height):
    golden = np.load(FIXTURES / 'inception_crop.npz')
    boxes = boxes_of(height, width)
    assert agreement(boxes, golden, width, height) > 1e-3
    if (width, height) == (10, 10):  # cell by cell: not one box that TensorFlow never draws
        assert set(map(tuple, boxes)) <= set(map(tuple, golden['10x10/cells']))


def torchvision_box(height, width, rng):
    """What RandomResizedCrop(scale=(0.05, 1), ratio=(0.75, 1.33)) draws."""
    for _ in range(10):
        area = height * width * rng.uniform(0.05, 1)
        aspect = np.exp(rng.uniform(np.log(0.75), np.log(1.33)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
    return 0, 0, height, width


def last_place_too(height, width, rng):
    _, _, h, w = sample_inception_box(height, width, rng)
    return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w


@pytest.mark.parametrize('wrong', [torchvision_box, last_place_too])
def test_the_distribution_test_can_fail(wrong):
    golden = np.load(FIXTURES / 'inception_crop.npz')
    assert agreement(boxes_of(32, 32, sample=wrong), golden, 32, 32) < 1e-9


@pytest.mark.parametrize(
    ('width', 'height', 'mean'),
    [(500, 333, 0.311), (333, 500, 0.296), (600, 100, 0.105), (32, 32, 0.378)],
)
def test_mean_area_of_crops(width, height, mean):
    boxes = boxes_of(height, width, seed=1)
    share = boxes[:, 2] * boxes[:, 3] / (width * height)
    assert abs(share.mean() - mean) < 3.5 * share.std() / SAMPLES**0.5 + 5e-4
    if (width, height) == (500, 333):
        quantiles = np.quantile(share, [0.05, 0.5, 0.95])
        np.testing.assert_allclose(quantiles, [0.064, 0.275, 0.679], atol=0.012)
        assert abs((boxes[:, 3] / boxes[:, 2]).mean() - 1.04) < 0.006


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_crops_lie_inside_any_image(height, width, seed):
    y, x, h, w = sample_inception_box(height, width, np.random.default_rng(seed))
    assert 0 <= y <= y + h <= height and 0 <= x <= x + w <= width and h >= 1 and w >= 1


def test_train_depends_on_the_generator_alone():
    image = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)
    pp = Preprocess(crop=24)
    first, again, other = (pp.train(image, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.shape == (24, 24, 3) and first.dtype == np.float32
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    y, x, h, w = sample_inception_box(50, 70, np.random.default_rng(3))
    assert np.array_equal(first, resize_bilinear(image[y : y + h, x : x + w], 24))


def test_without_inception_crop():
    image = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)
    plain = Preprocess(crop=24, inception_crop=False)
    assert np.array_equal(plain.train(image, np.random.default_rng(0)), plain.evaluate(image))
    squashed = resize_bilinear(image, 26)
    pp = Preprocess(crop=24, resize=26, inception_crop=False)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(100):
        seen_part = pp.train(image, rng)
        places = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if np.array_equal(seen_part, squashed[y : y + 24, x : x + 24])
        ]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 9
    assert np.array_equal(pp.evaluate(image), plain.evaluate(image))


@pytest.mark.parametrize(
    'options', [{}, {'inception_crop': False}, {'inception_crop': False, 'resize': 30}]
)
def test_results_can_be_written_in_place(options):
    image = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)
    pp = Preprocess(crop=24, **options)
    out = np.full((3, 24, 24, 3), -1, np.float32)
    assert pp.train(image, np.random.default_rng(0), out=out[1]).base is out
    assert np.array_equal(out[1], pp.train(image, np.random.default_rng(0)))
    assert (out[[0, 2]] == -1).all()
    pp.evaluate(image, out=out[2])
    assert np.array_equal(out[2], pp.evaluate(image)) and (out[0] == -1).all()


@pytest.mark.parametrize('k', [1, 2, 4, 8])
@pytest.mark.parametrize(('height', 'width'), [(301, 406), (400, 296)])
def test_a_crop_of_a_reduced_image_is_in_the_same_place(k, height, width):
    """On a smooth image, where antialiasing makes no difference, means of k x k pixels show it."""
    y, x = np.mgrid[: -(-height // k) * k, : -(-width // k) * k].astype(np.float32)
    image = np.stack([x / 2, y / 2, 127 + 60 * np.sin(x / 40) * np.cos(y / 50)], axis=-1)
    reduced = image.reshape(len(y) // k, k, -1, k, 3).mean(axis=(1, 3))
    image, reduced = (np.rint(a).astype(np.uint8) for a in (image[:height, :width], reduced))
    for options in ({'crop': 16}, {'crop': 12, 'resize': 16, 'inception_crop': False}):
        pp = Preprocess(**options)
        for seed in range(6):
            box = pp.draw_box(height, width, np.random.default_rng(seed))
            out = np.empty((pp.crop, pp.crop, 3), np.uint8)
            assert pp.render_uint8(reduced, box, (height, width), out) is out
            # Measured: at most 0.384 in the mean, most of it rounding, and 1.5 at a pixel. Half a
            # pixel of the reduced image to the side would be k / 4.
            difference = np.abs(out - pp.render(image, box))
            assert difference.mean() < 0.4 and difference.max() < 1.6


def test_reductions_leave_enough_pixels():
    for height, width, side, expected in (
        (448, 500, 224, 2), (447, 500, 224, 1), (10, 10, 224, 1), (900, 896, 224, 4),
        (5000, 1791, 224, 4), (5000, 1792, 224, 8), (9000, 9000, 224, 8),
    ):  # fmt: skip
        assert CropBox(3, 4, height, width, (side, side)).reduction() == expected


def test_normalize_numpy_and_jax():
    pixels = np.array([0, 127.5, 255], np.float32)
    assert normalize(pixels).tolist() == [-1, 0, 1]
    assert normalize(np.array([0, 255], np.uint8)).dtype == np.float32
    on_device = normalize(jax.numpy.asarray(pixels))
    assert on_device.dtype == np.float32 and on_device.tolist() == [-1, 0, 1]


def test_settings_are_checked_and_kept():
    pp = Preprocess(crop=384, resize=448, inception_crop=False)
    assert Preprocess.from_dict(pp.to_dict()) == pp
    # Model folders of earlier versions say whether training mirrored.
    assert Preprocess.from_dict(pp.to_dict() | {'flip': False}) == pp and not hasattr(pp, 'flip')
    with pytest.raises(UserError, match='at least pp.crop=224'):
        Preprocess(crop=224, resize=200, inception_crop=False)
    with pytest.raises(UserError, match='pp.crop'):
        Preprocess(crop=0)
    with pytest.raises(UserError, match='sharpen'):
        Preprocess.from_dict({'crop': 1, 'sharpen': True})


@pytest.mark.parametrize('form', ['resize_crop', 'squash_crop'])
def test_training_without_inception_crop_sees_what_evaluation_sees_elsewhere(form):
    image = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)
    pp = Preprocess((20, 24), 26, inception_crop=False, eval=form)
    whole = resize_bilinear(image, (26, 36) if form == 'resize_crop' else 26)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        box = pp.draw_box(50, 70, rng)
        seen.add((box.top, box.left))
        part = pp.render(image, box)
        expected = whole[box.top : box.top + 20, box.left : box.left + 24]
        np.testing.assert_array_equal(part, expected)
        out = np.empty((20, 24, 3), np.uint8)
        assert np.abs(pp.render_uint8(image, box, (50, 70), out) - part).max() <= 1
    assert len(seen) > 15
    top, left = 3, (whole.shape[1] - 24) // 2
    np.testing.assert_array_equal(pp.evaluate(image), whole[top : top + 20, left : left + 24])


def test_long_images_take_no_more_memory():
    image = np.full((1, 300_000, 3), 9, np.uint8)  # whole, at short side 64: 3.7 GB
    for options in ({}, {'antialias': True}):
        pp = Preprocess(48, 64, inception_crop=False, eval='resize_crop', **options)
        assert (pp.evaluate(image) == 9).all()
        assert (pp.train(image, np.random.default_rng(0)) == 9).all()


def test_another_size_keeps_the_proportions():
    pp = Preprocess(224, 256, eval='resize_crop')
    assert pp.at(448) == Preprocess(448, 512, eval='resize_crop')
    assert pp.at((112, 224)).resize == (128, 256)
    assert Preprocess(224).at((32, 48)) == Preprocess((32, 48))
    assert Preprocess((32, 32), [40, 40], inception_crop=False).to_dict() == {
        'crop': 32, 'resize': 40, 'inception_crop': False
    }  # fmt: skip
    wide = Preprocess((32, 48), antialias=True)
    assert Preprocess.from_dict(wide.to_dict()) == wide and wide.size == (32, 48)
    for wrong in (
        {'crop': (1, 2, 3)}, {'crop': '224'}, {'crop': 2.0}, {'crop': 8, 'eval': 'centre'},
        {'crop': 8, 'interpolation': 'lanczos'}, {'crop': 8, 'resize': 7, 'eval': 'resize_crop'},
    ):  # fmt: skip
        with pytest.raises(UserError, match='pp.(crop|eval|interpolation|resize)'):
            Preprocess(**wrong)


def test_full_size_photos_are_decoded_and_resized_as_by_tensorflow(shared_dir):
    golden = np.load(FIXTURES / 'shared_pixels.npz')
    names = sorted({key.split(':')[0] for key in golden.files})
    assert len(names) == 15
    for name in names:
        path = shared_dir / 'data/flowers_folder' / name
        pixels = decode(path.read_bytes(), key=name)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == str(golden[f'{name}:sha256']), name
        resized = Preprocess(crop=16).evaluate(pixels)
        np.testing.assert_allclose(resized, golden[f'{name}:resized'], rtol=0, atol=1e-2)


def area_mean(image, size):
    """What TensorFlow's method 'area' computes, pixel by pixel."""
    out = np.zeros((*size, image.shape[2]))
    for row in range(size[0]):
        for column in range(size[1]):
            shares = []
            for index, old, new in (
                (row, image.shape[0], size[0]),
                (column, image.shape[1], size[1]),
            ):
                low, high = index * old / new, (index + 1) * old / new
                inside = [max(0.0, min(high, j + 1) - max(low, j)) for j in range(old)]
                shares.append(np.array(inside) / (high - low))
            out[row, column] = np.einsum('i,j,ijc->c', *shares, image)
    return out


@pytest.mark.parametrize('size', [(20, 15), (13, 9), (31, 40), (10, 40)])
def test_resizing_by_area_is_the_mean_over_what_a_pixel_covers(size):
    image = np.random.default_rng(0).integers(0, 256, (20, 23, 3)).astype(np.uint8)
    found = resample.resize_area(image, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, area_mean(image, size), atol=0.01)
    np.testing.assert_allclose(
        resample.resize_area(image[..., :1], size), area_mean(image[..., :1], size), atol=0.01
    )


@pytest.mark.parametrize(('height', 'width'), [(30, 47), (47, 30), (11, 8)])
def test_training_crops_of_images_whose_short_side_is_resized(height, width):
    preprocess = Preprocess(crop=8, resize_small=12, inception_crop=False)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    factor = 12 / min(height, width)
    size = round(height * factor), round(width * factor)
    assert min(size) == 12
    whole, corners = resample.resize_area(image, size), set()
    for seed in range(40):
        box = preprocess.draw_box(height, width, np.random.default_rng(seed))
        found = preprocess.train(image, np.random.default_rng(seed))
        expected = whole[box.top : box.top + 8, box.left : box.left + 8]
        np.testing.assert_array_equal(found, expected)
        fast = np.empty((8, 8, 3), np.uint8)
        preprocess.render_uint8(image, box, (height, width), fast)
        np.testing.assert_array_equal(fast, np.rint(expected))
        corners.add((box.top, box.left))
    assert {top for top, _ in corners} == set(range(size[0] - 7)) or size[0] > 14
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert preprocess.at(16).resize_small == 24
