"""The random crop of training: the distribution of TensorFlow's sampler."""

import math

import numpy as np

# tf.image.sample_distorted_bounding_box as the original calls it: shares of the area from its code,
# the rest TensorFlow's defaults (aspect: width / height, the largest excluded).
MIN_AREA, MAX_AREA = 0.05, 1.0
MIN_ASPECT, MAX_ASPECT = 0.75, 1.33
TRIES = 100

_F32 = np.float32


def sample_inception_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws the box of an inception crop by TensorFlow's rule.

    The distribution of `tf.image.sample_distorted_bounding_box` with `min_object_covered=0` and no
    bounding boxes, including its rounding (float32, half to even), which matters for small images,
    and its habit of never drawing the last possible position. It is another distribution than
    torchvision's: the aspect ratio is uniform (not log-uniform), then the height uniform among
    those that the area allows (not the area). Source: TensorFlow,
    core/kernels/image/sample_distorted_bounding_box_op.cc.

    Args:
      height: of the image, pixels, at least 1.
      width: of the image, pixels, at least 1.
      rng: where the randomness comes from.

    Returns:
      (y, x, box_height, box_width), pixels; the box lies inside the image. The whole image if none
      of `TRIES` boxes fits.
    """
    area = _F32(width) * _F32(height)
    bounds = _F32(MIN_AREA) * area, _F32(MAX_AREA) * area
    for _ in range(TRIES):
        aspect = rng.random(dtype=_F32) * (_F32(MAX_ASPECT) - _F32(MIN_ASPECT)) + _F32(MIN_ASPECT)
        size = _sample_size(height, width, aspect, bounds, rng)
        if size is not None:
            box_height, box_width = size
            y = int(rng.integers(height - box_height)) if box_height < height else 0
            x = int(rng.integers(width - box_width)) if box_width < width else 0
            return y, x, box_height, box_width
    return 0, 0, height, width


def _sample_size(
    height: int,
    width: int,
    aspect: np.float32,
    bounds: tuple[np.float32, np.float32],
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """Height and width of a box of this aspect ratio and an area in `bounds`; None if it fails."""
    # Python's round is half to even, as lrintf; products and roots stay in float32 until they are
    # rounded.
    lowest = round(float(np.sqrt(bounds[0] / aspect)))
    highest = round(float(np.sqrt(bounds[1] / aspect)))
    if round(float(_F32(highest) * aspect)) > width:
        highest = math.floor((_F32(width) + _F32(0.5) - _F32(1e-7)) / aspect)
        if round(float(_F32(highest) * aspect)) > width:
            highest -= 1
    highest = min(highest, height)
    lowest = min(lowest, highest)
    box_height = lowest
    if lowest < highest:
        box_height += int(rng.integers(highest - lowest + 1))
    box_width = round(float(_F32(box_height) * aspect))
    if _F32(box_height * box_width) < bounds[0]:
        box_height += 1
        box_width = round(float(_F32(box_height) * aspect))
    if _F32(box_height * box_width) > bounds[1]:
        box_height -= 1
        box_width = round(float(_F32(box_height) * aspect))
    box_area = _F32(box_height * box_width)
    fits = 1 <= box_height <= height and 1 <= box_width <= width
    return (box_height, box_width) if fits and bounds[0] <= box_area <= bounds[1] else None
