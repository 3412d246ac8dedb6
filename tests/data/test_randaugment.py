"""RandAugment: TensorFlow's results, timm's by Pillow, and the same crops on any topology."""

import collections
import pathlib
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_jax import data
from vit_jax.data import host_augment, loader, own, pillow_operations, randaugment
from vit_jax.data.host_augment import HostAugment, TimmRandAugment, randaug_of
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.randaugment import OPERATIONS, RandAugment
from vit_jax.errors import UserError

STORED = np.load(pathlib.Path(__file__).parent.parent / 'fixtures/data/randaugment.npz')
IMAGE = STORED['image']
GREY = IMAGE[..., :1].copy()
PICTURE = Image.fromarray(IMAGE)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize('name', [name for name in STORED if name != 'image'])
def test_operations_give_what_tensorflow_gives(name):
    operation, argument = name.split()
    given = () if argument == 'None' else (float(argument) if '.' in argument else int(argument),)
    found = getattr(randaugment, operation)(IMAGE, *given)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, STORED[name])


# What big_vision's `level_to_arg` makes of magnitudes 0, 10, 15 and 20. Thresholds of 256, 384 and
# 512 are 0, 128 and 0 in the 8 bits that TensorFlow gives them.
ARGUMENTS = {
    'Posterize': ('posterize', (0, 4, 6, 8)),
    'Solarize': ('solarize', (0, 0, 128, 0)),
    'SolarizeAdd': ('solarize_add', (0, 110, 165, 220)),
    'Color': ('color', (0.1, 1.9, 2.8, 3.7)),
    'Contrast': ('contrast', (0.1, 1.9, 2.8, 3.7)),
    'Brightness': ('brightness', (0.1, 1.9, 2.8, 3.7)),
    'Sharpness': ('sharpness', (0.1, 1.9, 2.8, 3.7)),
    'Rotate': ('rotate', (0.0, 30.0, 45.0, 60.0)),
    'ShearX': ('shear_x', (0.0, 0.3, 0.45, 0.6)),
    'ShearY': ('shear_y', (0.0, 0.3, 0.45, 0.6)),
    'TranslateX': ('translate_x', (0.0, 100.0, 150.0, 200.0)),
    'TranslateY': ('translate_y', (0.0, 100.0, 150.0, 200.0)),
}
SIGNED = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')


@pytest.mark.parametrize('name', ARGUMENTS)
def test_magnitudes_are_those_of_big_vision(name, monkeypatch):
    function, expected = ARGUMENTS[name]
    seen = []
    monkeypatch.setattr(randaugment, function, lambda image, argument: seen.append(argument))
    generator = rng()
    for magnitude, argument in zip((0, 10, 15, 20), expected, strict=True):
        seen.clear()
        for _ in range(40):
            OPERATIONS[name](IMAGE, magnitude / 10, generator)
        signs = (1, -1) if name in SIGNED and argument else (1,)
        assert {round(value, 6) for value in seen} == {sign * argument for sign in signs}


def test_operations_without_magnitude_and_the_rest():
    for name, function in (
        ('AutoContrast', randaugment.autocontrast),
        ('Equalize', randaugment.equalize),
        ('Invert', randaugment.invert),
    ):
        np.testing.assert_array_equal(OPERATIONS[name](IMAGE, 2.0, rng()), function(IMAGE))
    assert set(OPERATIONS) == {*ARGUMENTS, 'AutoContrast', 'Equalize', 'Invert', 'Cutout'}


@pytest.mark.parametrize('magnitude', [0, 2, 20])
def test_cutout_is_the_padded_mask_of_big_vision(magnitude):
    generator = rng(magnitude)
    height, width = IMAGE.shape[:2]
    for _ in range(20):
        state = generator.bit_generator.state
        found = OPERATIONS['Cutout'](IMAGE, magnitude / 10, generator)
        generator.bit_generator.state = state
        y, x = generator.integers(height), generator.integers(width)
        half = int(magnitude / 10 * 40)
        lower, left = max(0, y - half), max(0, x - half)
        upper, right = max(0, height - y - half), max(0, width - x - half)
        mask = np.zeros((height - lower - upper, width - left - right))
        mask = np.pad(mask, [(lower, upper), (left, right)], constant_values=1)
        np.testing.assert_array_equal(found, np.where(mask[..., None] == 0, 128, IMAGE))


@pytest.mark.parametrize('name', OPERATIONS)
def test_a_grey_image_is_treated_as_one_of_three_equal_channels(name):
    three = OPERATIONS[name](np.repeat(GREY, 3, axis=2), 1.5, rng())
    one = OPERATIONS[name](GREY, 1.5, rng())
    np.testing.assert_array_equal(np.repeat(one, 3, axis=2), three)


def test_each_layer_draws_from_all_operations(monkeypatch):
    seen = collections.Counter()

    def count(name):
        def operation(image, share, generator):
            seen[name] += 1
            assert share == 1.5
            return image

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, count(name))
    generator = rng()
    for _ in range(1600):
        RandAugment(2, 15)(IMAGE, generator)
    assert seen.total() == 3200 and len(seen) == 16
    assert all(150 < times < 250 for times in seen.values())  # 200 +- 13.7


def pillow(name, share, sign):
    """timm's formulas at a magnitude of 10 times `share`."""
    enhanced = max(0.1, 1.0 + sign * share * 0.9)
    table = [min(255, i + int(share * 110)) if i < 128 else i for i in range(256)] * 3
    grey = {'fillcolor': (128,) * 3, 'resample': Image.BICUBIC}
    shear, move = sign * share * 0.3, sign * share * 0.45
    width, height = PICTURE.size
    made = {
        'AutoContrast': lambda: ImageOps.autocontrast(PICTURE),
        'Equalize': lambda: ImageOps.equalize(PICTURE),
        'Invert': lambda: ImageOps.invert(PICTURE),
        'Rotate': lambda: PICTURE.rotate(sign * share * 30, **grey),
        'PosterizeIncreasing': lambda: PICTURE.point(
            [i & ~(2 ** (4 + int(share * 4)) - 1) for i in range(256)] * 3
        ),
        'SolarizeIncreasing': lambda: ImageOps.solarize(PICTURE, 256 - int(share * 256)),
        'SolarizeAdd': lambda: PICTURE.point(table),
        'ShearX': lambda: PICTURE.transform(PICTURE.size, 0, (1, shear, 0, 0, 1, 0), **grey),
        'ShearY': lambda: PICTURE.transform(PICTURE.size, 0, (1, 0, 0, shear, 1, 0), **grey),
        'TranslateXRel': lambda: PICTURE.transform(
            PICTURE.size, 0, (1, 0, move * width, 0, 1, 0), **grey
        ),
        'TranslateYRel': lambda: PICTURE.transform(
            PICTURE.size, 0, (1, 0, 0, 0, 1, move * height), **grey
        ),
    }
    if name.removesuffix('Increasing') in ('Color', 'Contrast', 'Brightness', 'Sharpness'):
        return getattr(ImageEnhance, name.removesuffix('Increasing'))(PICTURE).enhance(enhanced)
    return made[name]()


@pytest.mark.parametrize('name', pillow_operations.OPERATIONS)
def test_operations_of_timm_give_what_pillow_gives(name):
    for share in (0.0, 0.3, 0.9, 1.0):
        for sign in (1, -1):
            found = pillow_operations.OPERATIONS[name](PICTURE, share, sign)
            np.testing.assert_array_equal(found, np.asarray(pillow(name, share, sign)))
    grey = Image.fromarray(GREY[..., 0])
    assert pillow_operations.OPERATIONS[name](grey, 0.9, 1).mode == 'L'


@pytest.mark.parametrize('name', pillow_operations.OPERATIONS)
def test_operations_are_those_of_timm_itself(name, monkeypatch):
    timm = pytest.importorskip('timm.data.auto_augment', reason='timm is not installed')
    for sign in (1, -1):
        # timm negates where a random number is above one half.
        monkeypatch.setattr(random, 'random', lambda sign=sign: 0.25 if sign == 1 else 0.75)
        hparams = {'img_mean': (128,) * 3, 'interpolation': Image.BICUBIC}
        theirs = timm.AugmentOp(name, prob=1.0, magnitude=9, hparams=hparams)(PICTURE)
        ours = pillow_operations.OPERATIONS[name](PICTURE, 0.9, sign)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert list(pillow_operations.OPERATIONS) == timm._RAND_INCREASING_TRANSFORMS


def test_layers_of_timm_are_done_by_chance_with_a_strength_that_varies(monkeypatch):
    seen = []
    for name in pillow_operations.OPERATIONS:
        monkeypatch.setitem(
            pillow_operations.OPERATIONS, name,
            lambda picture, share, sign: seen.append((share, sign)) or picture,
        )  # fmt: skip
    made, generator = TimmRandAugment(magnitude=9, layers=3, std=0.5), rng()
    for _ in range(500):
        np.testing.assert_array_equal(made(IMAGE, generator), IMAGE)
    shares, signs = np.array(seen).T
    assert 650 < len(seen) < 850 and abs(signs.mean()) < 0.15
    assert 0.88 < shares.mean() < 0.91 and 0.03 < shares.std() < 0.06 and shares.max() == 1.0


def test_three_augment_is_grey_solarized_or_blurred():
    made, generator, kinds = HostAugment(three_augment=True), rng(), collections.Counter()
    grey = np.asarray(PICTURE.convert('L').convert('RGB'))
    negative = np.asarray(ImageOps.solarize(PICTURE, 128))
    for _ in range(90):
        state = generator.bit_generator.state
        found = IMAGE.astype(np.float32)
        made(found, generator)
        generator.bit_generator.state = state
        generator.integers(3)
        radius = generator.uniform(0.1, 2.0)
        blurred = np.asarray(PICTURE.filter(ImageFilter.GaussianBlur(radius)))
        [kind] = [
            name
            for name, expected in (('grey', grey), ('negative', negative), ('blurred', blurred))
            if np.array_equal(found, expected)
        ]
        kinds[kind] += 1
    assert len(kinds) == 3 and min(kinds.values()) > 15


def test_color_jitter_is_that_of_torchvision_with_the_factors_drawn():
    made, generator, orders = HostAugment(color_jitter=0.3), rng(), set()
    for _ in range(20):
        state = generator.bit_generator.state
        found = IMAGE.copy()
        made(found, generator)
        generator.bit_generator.state = state
        factors, order = generator.uniform(0.7, 1.3, size=3), generator.permutation(3)
        picture = PICTURE
        for index in order:  # brightness, contrast, saturation
            enhancement = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            picture = enhancement[index](picture).enhance(factors[index])
        np.testing.assert_array_equal(found, np.asarray(picture))
        orders.add(tuple(order))
    assert len(orders) > 3


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('', None),
        ('2,15', RandAugment(2, 15)),
        ('2, 10', RandAugment(2, 10)),
        ('1,7.5', RandAugment(1, 7.5)),
        ('rand-m9-mstd0.5-inc1', TimmRandAugment(9, 2, 0.5, 0.5)),
        ('rand-m7-n3-p0.8-inc1', TimmRandAugment(7, 3, 0.0, 0.8)),
    ],
)
def test_both_spellings_are_read(text, expected):
    assert randaug_of(text) == expected


@pytest.mark.parametrize(
    'text',
    ['2', '0,10', '2,31', '99,1', '2,-1', 'rand', 'rand-m9', 'rand-m11-inc1', 'rand-m9-inc0',
     'rand-m9-w1-inc1', 'augmix-m3', '2,10,1'],
)  # fmt: skip
def test_other_spellings_are_refused(text):
    with pytest.raises(UserError, match=r"neither 'LAYERS,MAGNITUDE' .* nor one of timm's"):
        randaug_of(text)


EACH = [
    HostAugment(RandAugment(2, 15)),
    HostAugment(TimmRandAugment(9, 2, 0.5)),
    HostAugment(three_augment=True, color_jitter=0.3),
]


@pytest.mark.parametrize('augment', EACH, ids=['big_vision', 'timm', 'deit3'])
def test_crops_are_augmented_by_seed_and_place_alone(augment):
    pixels = rng().integers(0, 256, (26, 12, 10, 3)).astype(np.uint8)
    source = own.as_selection(data.from_arrays(pixels, np.arange(26) % 2, ('a', 'b')), 'train')

    def dataset(index, count, **options):
        return loader.BatchLoader(
            source, Preprocess(crop=8), batch=12, seed=3,
            process_index=index, process_count=count, **options,
        )  # fmt: skip

    def equal(a, b):
        return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)

    for step in (0, 7):
        alone = dataset(0, 1, augment=augment)[step]
        parts = [dataset(index, 3, augment=augment)[step] for index in range(3)]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert equal(joined, alone)
        plain = dataset(0, 1)[step]
        np.testing.assert_array_equal(plain['example'], alone['example'])
        changed = [
            not np.array_equal(a, np.floor(b))
            for a, b in zip(alone['image'], plain['image'], strict=True)
        ]
        assert sum(changed) >= 5
        assert (alone['image'] == np.floor(alone['image'])).all()
    # Crops are the same as without; an operation that does nothing shows it.
    nothing = HostAugment(TimmRandAugment(share=0.0))
    np.testing.assert_array_equal(
        dataset(0, 1, augment=nothing)[0]['image'], np.floor(dataset(0, 1)[0]['image'])
    )
    fast = dataset(0, 1, augment=augment, exact=False)
    assert fast[0]['image'].dtype == np.uint8 and equal(fast[2], fast[2])


def test_without_settings_nothing_is_augmented():
    assert not HostAugment() and all(EACH) and host_augment.CHANNELS == (1, 3)
