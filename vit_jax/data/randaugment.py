"""RandAugment as big_vision and AugReg have it: TensorFlow's operations, in NumPy and OpenCV.

"RandAugment" (https://arxiv.org/abs/1909.13719); "How to train your ViT?"
(https://arxiv.org/abs/2106.10270). Formulas: big_vision, pp/archive/autoaugment.py, and TensorFlow
Addons, whose transformations take the nearest pixel. Images are uint8 [height, width, 1 or 3]; of
one channel, the grey image is the image.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

MAX_LEVEL = 10.0
FILL = 128  # grey level of what comes from outside the image
_F32 = np.float32
_LUMA = np.array([0.2989, 0.5870, 0.1140], _F32)  # tf.image.rgb_to_grayscale

# Layers and magnitude of each of AugReg's settings, and its mixup.
AUGREG = {
    'none': ('', 0.0),
    'light1': ('2,0', 0.0),  # not nothing: brightness, for one, falls to a tenth
    'light2': ('2,10', 0.2),
    'medium1': ('2,15', 0.2),
    'medium2': ('2,15', 0.5),
    'strong1': ('2,20', 0.5),
    'strong2': ('2,20', 0.8),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """A few operations, each drawn from all of them, one after the other.

    Attributes:
      layers: how many.
      magnitude: how strong they are, 0 to 20; 10 is what each operation calls its full strength.
    """

    layers: int
    magnitude: float

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another image of the same size and type.

        Args:
          image: uint8 [height, width, 1 or 3].
          rng: where the randomness comes from.
        """
        for _ in range(self.layers):
            name = NAMES[rng.integers(len(NAMES))]
            image = OPERATIONS[name](image, self.magnitude / MAX_LEVEL, rng)
        return image


def blend(other: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """`other` at factor 0, `image` at 1, else on the line through both; cut off to uint8."""
    if factor in (0.0, 1.0):
        return image if factor else other
    base = other.astype(_F32)
    return np.clip(base + _F32(factor) * (image.astype(_F32) - base), 0, 255).astype(np.uint8)


def grey(image: np.ndarray) -> np.ndarray:
    """Its brightness, uint8 [height, width, 1], as `tf.image.rgb_to_grayscale`."""
    if image.shape[-1] == 1:
        return image
    shares = image.astype(_F32) * _F32(1 / 255)
    return (shares @ _LUMA * _F32(255.5)).astype(np.uint8)[..., None]


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Colours weaker (below 1) or stronger."""
    return blend(np.broadcast_to(grey(image), image.shape), image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Nearer to its mean brightness, or farther from it."""
    return blend(np.full_like(image, int(grey(image).mean())), image, factor)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Darker, or brighter."""
    return blend(np.zeros_like(image), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Nearer to its smoothed version, or farther from it; the outermost pixels stay."""
    height, width = image.shape[:2]
    if min(height, width) < 3:
        return image
    pixels, total = (
        image.astype(np.float64),
        np.zeros((height - 2, width - 2, image.shape[2]), _F32),
    )
    for y in range(3):
        for x in range(3):
            weight = np.float64(_F32(5 if y == x == 1 else 1) / _F32(13))
            # Rounded once, after product and sum, as TensorFlow's convolution does: a sum just
            # below a whole grey level is cut off to the one below.
            total = (total + weight * pixels[y : y + height - 2, x : x + width - 2]).astype(_F32)
    smooth = image.copy()
    smooth[1:-1, 1:-1] = np.clip(total, 0, 255)
    return blend(smooth, image, factor)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Each channel stretched, so that its darkest pixel is 0 and its brightest 255."""
    low, high = (f(image, axis=(0, 1)).astype(_F32) for f in (np.min, np.max))
    scale = _F32(255) / np.where(high > low, high - low, 1)
    stretched = np.clip(image.astype(_F32) * scale + -low * scale, 0, 255).astype(np.uint8)
    return np.where(high > low, stretched, image)


def equalize(image: np.ndarray) -> np.ndarray:
    """Each channel with grey levels that are about equally frequent."""
    out = image.copy()
    for channel in range(image.shape[2]):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        if step:
            table = np.concatenate([[0], (np.cumsum(counts)[:-1] + step // 2) // step])
            out[..., channel] = np.clip(table, 0, 255).astype(np.uint8)[image[..., channel]]
    return out


def invert(image: np.ndarray) -> np.ndarray:
    """Its negative."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Grey levels of so many bits; of none it is 1, as TensorFlow's shift has it."""
    shift = np.uint8(min(max(8 - bits, 0), 7))
    return image >> shift << shift


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """The negative of what is not below the threshold."""
    return np.where(image < threshold, image, 255 - image)


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Brighter where it is darker than 128."""
    return np.where(image < 128, np.minimum(image.astype(int) + addition, 255), image).astype(
        np.uint8
    )


def transform(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Each pixel from the place that an affine map gives, the nearest there.

    Args:
      image: uint8 [height, width, channels].
      matrix: (a, b, c, d, e, f): pixel (x, y) comes from (a x + b y + c, d x + e y + f).
    """
    import cv2

    height, width = image.shape[:2]
    a, b, c, d, e, f = (_F32(value) for value in matrix)
    x, y = np.arange(width, dtype=_F32), np.arange(height, dtype=_F32)[:, None]
    places = np.stack([a * x + b * y + c, d * x + e * y + f], axis=-1).astype(np.float64)
    # Halves are rounded away from 0, as `std::round`; OpenCV has its own, coarser fractions.
    places = np.copysign(np.floor(np.abs(places) + 0.5), places)
    nearest = np.clip(places, -(2**15), 2**15 - 1).astype(np.int16)
    fill = (FILL,) * image.shape[2]
    moved = cv2.remap(
        image,
        nearest,
        np.empty(0),
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )
    return moved.reshape(image.shape)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turned about its centre."""
    height, width = (_F32(side - 1) for side in image.shape[:2])
    angle = _F32(degrees) * _F32(np.pi / 180)
    cos, sin = np.cos(angle), np.sin(angle)
    right = (width - (cos * width - sin * height)) / _F32(2)
    down = (height - (sin * width + cos * height)) / _F32(2)
    return transform(image, (cos, -sin, right, sin, cos, down))


def shear_x(image: np.ndarray, factor: float) -> np.ndarray:
    """Rows moved, each by `factor` pixels more than the one above."""
    return transform(image, (1, factor, 0, 0, 1, 0))


def shear_y(image: np.ndarray, factor: float) -> np.ndarray:
    """Columns moved, each by `factor` pixels more than the one before."""
    return transform(image, (1, 0, 0, factor, 1, 0))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moved to the left."""
    return transform(image, (1, 0, pixels, 0, 1, 0))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moved up."""
    return transform(image, (1, 0, 0, 0, 1, pixels))


def cutout(image: np.ndarray, half: int, rng: np.random.Generator) -> np.ndarray:
    """Grey in a square of twice `half` pixels around a random pixel."""
    y, x = (int(rng.integers(side)) for side in image.shape[:2])
    out = image.copy()
    out[max(0, y - half) : y + half, max(0, x - half) : x + half] = FILL
    return out


def _either_way(level: float, rng: np.random.Generator) -> float:
    """The level, or as often its negative."""
    return level if rng.random() < 0.5 else -level


def _enhanced(share: float) -> float:
    return share * 1.8 + 0.1


Operation = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

# Each is given an image, the share of full strength (magnitude / 10), and randomness. Sides and
# distances are in pixels of a 224 px image, whatever the image.
OPERATIONS: dict[str, Operation] = {
    'AutoContrast': lambda image, share, rng: autocontrast(image),
    'Equalize': lambda image, share, rng: equalize(image),
    'Invert': lambda image, share, rng: invert(image),
    'Rotate': lambda image, share, rng: rotate(image, _either_way(share * 30, rng)),
    'Posterize': lambda image, share, rng: posterize(image, int(share * 4)),
    # A threshold of 256 is 0 for TensorFlow, where it is an 8-bit number, as the image.
    'Solarize': lambda image, share, rng: solarize(image, int(share * 256) % 256),
    'Color': lambda image, share, rng: color(image, _enhanced(share)),
    'Contrast': lambda image, share, rng: contrast(image, _enhanced(share)),
    'Brightness': lambda image, share, rng: brightness(image, _enhanced(share)),
    'Sharpness': lambda image, share, rng: sharpness(image, _enhanced(share)),
    'ShearX': lambda image, share, rng: shear_x(image, _either_way(share * 0.3, rng)),
    'ShearY': lambda image, share, rng: shear_y(image, _either_way(share * 0.3, rng)),
    'TranslateX': lambda image, share, rng: translate_x(image, _either_way(share * 100, rng)),
    'TranslateY': lambda image, share, rng: translate_y(image, _either_way(share * 100, rng)),
    'Cutout': lambda image, share, rng: cutout(image, int(share * 40), rng),
    'SolarizeAdd': lambda image, share, rng: solarize_add(image, int(share * 110)),
}
NAMES = tuple(OPERATIONS)
