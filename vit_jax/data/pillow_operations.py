"""Operations on Pillow images: timm's RandAugment, 3-Augment, colour jitter."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_jax.data.randaugment import FILL

MAX_BLUR = 2.0  # standard deviation, pixels

Change = Callable[[Image.Image, np.random.Generator], Image.Image]
# Given an image, the share of full strength, and a sign.
Operation = Callable[[Image.Image, float, int], Image.Image]
_ENHANCEMENTS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def change(image: np.ndarray, how: Change, rng: np.random.Generator) -> np.ndarray:
    """What a function of Pillow images makes of an array.

    Args:
      image: uint8 [height, width, 1 or 3].
      how: keeps size and mode.
      rng: its second argument.
    """
    grey = image.shape[2] == 1
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
    return np.asarray(how(picture, rng)).reshape(image.shape)


def grey_solarized_or_blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of the three, drawn: 3-Augment, as DeiT III has it."""
    which, radius = int(rng.integers(3)), float(rng.uniform(0.1, MAX_BLUR))
    if which == 0:
        return picture.convert('L').convert(picture.mode)
    if which == 1:
        return ImageOps.solarize(picture)
    return picture.filter(ImageFilter.GaussianBlur(radius))


def color_jitter(amount: float) -> Change:
    """Brightness, contrast, saturation times factors in [1 - amount, 1 + amount], in any order."""

    def jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        factors = rng.uniform(max(0.0, 1 - amount), 1 + amount, size=3)
        for index in rng.permutation(3):
            picture = _ENHANCEMENTS[index](picture).enhance(float(factors[index]))
        return picture

    return jitter


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """By at most 0.9 more or less."""
    return lambda picture, share, sign: kind(picture).enhance(max(0.1, 1 + sign * share * 0.9))


def _posterize(picture: Image.Image, share: float, sign: int) -> Image.Image:
    bits = 4 - int(share * 4)
    # New versions of Pillow refuse 0 bits, of which older ones made black.
    return ImageOps.posterize(picture, bits) if bits else picture.point(lambda level: 0)


def _solarize_add(picture: Image.Image, share: float, sign: int) -> Image.Image:
    added = int(share * 110)
    table = [min(255, level + added) if level < 128 else level for level in range(256)]
    return picture.point(table * len(picture.getbands()))


def _fill(picture: Image.Image) -> int | tuple[int, ...]:
    return FILL if picture.mode == 'L' else (FILL,) * 3


def _rotate(picture: Image.Image, share: float, sign: int) -> Image.Image:
    return picture.rotate(sign * share * 30, Image.Resampling.BICUBIC, fillcolor=_fill(picture))


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Operation:
    """An affine map, of the share of full strength with its sign, and of width and height."""

    def apply(picture: Image.Image, share: float, sign: int) -> Image.Image:
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix(sign * share, *picture.size),
            Image.Resampling.BICUBIC,
            fillcolor=_fill(picture),
        )

    return apply


# timm's, of which each gets stronger with the magnitude: full strength is magnitude 10.
OPERATIONS: dict[str, Operation] = {
    'AutoContrast': lambda picture, share, sign: ImageOps.autocontrast(picture),
    'Equalize': lambda picture, share, sign: ImageOps.equalize(picture),
    'Invert': lambda picture, share, sign: ImageOps.invert(picture),
    'Rotate': _rotate,
    'PosterizeIncreasing': _posterize,
    'SolarizeIncreasing': lambda p, share, sign: ImageOps.solarize(p, 256 - int(share * 256)),
    'SolarizeAdd': _solarize_add,
    'ColorIncreasing': _enhance(ImageEnhance.Color),
    'ContrastIncreasing': _enhance(ImageEnhance.Contrast),
    'BrightnessIncreasing': _enhance(ImageEnhance.Brightness),
    'SharpnessIncreasing': _enhance(ImageEnhance.Sharpness),
    'ShearX': _affine(lambda by, width, height: (1, 0.3 * by, 0, 0, 1, 0)),
    'ShearY': _affine(lambda by, width, height: (1, 0, 0, 0.3 * by, 1, 0)),
    'TranslateXRel': _affine(lambda by, width, height: (1, 0, 0.45 * by * width, 0, 1, 0)),
    'TranslateYRel': _affine(lambda by, width, height: (1, 0, 0, 0, 1, 0.45 * by * height)),
}
NAMES = tuple(OPERATIONS)
