"""Images to another size: as TensorFlow does it, or as Pillow."""

import numpy as np

# Pillow's filters (https://pillow.readthedocs.io/en/stable/handbook/concepts.html#filters), by the
# number that Hugging Face's `resample` has for each.
INTERPOLATIONS = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming')


def can_alias(interpolation: str) -> bool:
    """Whether an interpolation has a form without antialiasing here."""
    return interpolation in ('nearest', 'bilinear', 'bicubic')


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    *,
    interpolation: str = 'bilinear',
    antialias: bool = False,
) -> np.ndarray:
    """An image, resized.

    Antialiased (and nearest) it is Pillow's resize, whose filters grow with the reduction: uint8
    images give whole grey levels. Without antialiasing a pixel is made of its 2 x 2 (bilinear) or
    4 x 4 (bicubic) nearest ones, whatever the reduction, in float32: TensorFlow's rules, of which
    the bicubic one has Pillow's kernel (Keys, a = -1/2), so that both agree where images grow.

    Args:
      image: uint8 or float32 [height, width, channels] in [0, 255].
      size: height and width of the result, pixels.
      interpolation: one of `INTERPOLATIONS`.
      antialias: whether a pixel of the result stands for all the pixels that it covers.

    Returns:
      float32 [*size, channels] in [0, 255].
    """
    if antialias or interpolation == 'nearest':
        return _by_pillow(image, size, interpolation)
    if interpolation == 'bilinear':
        return resize_bilinear(image, size)
    rows, columns = (_cubic(old, new) for old, new in zip(image.shape, size, strict=False))
    image = _weighted(image, *rows)
    image = _weighted(image.swapaxes(0, 1), *columns).swapaxes(0, 1)
    return np.clip(image, 0, 255)  # it overshoots at edges


def resize_bilinear(
    image: np.ndarray, size: int | tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
    """`tf.image.resize(image, size)`: bilinear, pixel centres at one half, no antialiasing.

    OpenCV in float32 is within 0.01 grey levels of TensorFlow; in uint8 it would round each pixel.

    Args:
      image: uint8 or float32 [height, width, channels] in [0, 255]; may be a slice of a larger one.
      size: height and width of the result, or its side, pixels.
      out: float32 [*size, channels] without gaps, where to put the result; default new memory.

    Returns:
      float32 [*size, channels] in [0, 255].
    """
    import cv2  # Here, because it takes a tenth of a second to import.

    height, width = (size, size) if isinstance(size, int) else size
    # Only the part that is wanted becomes float: four times the memory of a whole photo otherwise.
    image = image.astype(np.float32)
    resized = cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    return resized if resized.ndim == 3 else resized[..., None]  # of a single channel


def resize_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`tf.image.resize(image, size, 'area')`: the mean over what a pixel of the result covers.

    Args:
      image: uint8 or float32 [height, width, channels] in [0, 255].
      size: height and width of the result, pixels.

    Returns:
      float32 [*size, channels] in [0, 255].
    """
    import cv2

    image = image.astype(np.float32)
    if all(new <= old for new, old in zip(size, image.shape, strict=False)):
        resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        return resized if resized.ndim == 3 else resized[..., None]
    rows, columns = (_covered(old, new) for old, new in zip(image.shape, size, strict=False))
    return np.einsum('ij,jkc,lk->ilc', rows, image, columns, optimize=True)


def _covered(old: int, new: int) -> np.ndarray:
    """Which share of each of `new` pixels of an axis lies in each of the `old`, [new, old]."""
    borders, places = np.arange(new + 1) * (old / new), np.arange(old)
    low = np.maximum(borders[:-1, None], places)
    high = np.minimum(borders[1:, None], places + 1)
    return (np.maximum(high - low, 0) * (new / old)).astype(np.float32)


def _by_pillow(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """`resize` by Pillow, which has no images of any number of channels but 1 and 3."""
    from PIL import Image

    resample = Image.Resampling[interpolation.upper()]

    def resized(part: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(part))
        return np.asarray(picture.resize(size[::-1], resample), np.float32)

    if image.dtype == np.uint8 and image.shape[2] == 3:
        return resized(image)
    planes = [resized(image[..., channel]) for channel in range(image.shape[2])]
    return np.clip(np.stack(planes, axis=-1), 0, 255)  # of floats, nothing has clipped them


def _cubic(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `new` pixels of an axis the places of 4 of the `old` ones, and their weights.

    Keys 1981, https://doi.org/10.1109/TASSP.1981.1163711, equation 15.
    """
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    places = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
    distance = np.abs(centres[:, None] - places)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, far)
    weights = np.where((places >= 0) & (places < old), weights, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.clip(places, 0, old - 1), weights.astype(np.float32)


def _weighted(image: np.ndarray, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of rows: float32 [len(places), width, channels]."""
    out = np.zeros((len(places), *image.shape[1:]), np.float32)
    for tap in range(places.shape[1]):
        out += image[places[:, tap]] * weights[:, tap, None, None]
    return out
