"""From decoded images to what the model sees: the original release's preprocessing.

One `Preprocess` object describes the input of a model; training, evaluation, prediction and export
all use it, and it is stored with the model, so they cannot drift apart.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError

# tf.image.sample_distorted_bounding_box as the original calls it: shares of the area from its code,
# the rest TensorFlow's defaults (aspect: width / height, the largest excluded).
MIN_AREA, MAX_AREA = 0.05, 1.0
MIN_ASPECT, MAX_ASPECT = 0.75, 1.33
TRIES = 100

# Divisors of height and width by which JPEG files can be decoded to smaller images quickly.
REDUCTIONS = (1, 2, 4, 8)

_F32 = np.float32


class CropBox(NamedTuple):
    """Which part of an image the model sees, and how large.

    Attributes:
      y: first row of the box that is cut out, pixels of the whole image.
      x: first column.
      height: of the box, pixels.
      width: of the box, pixels.
      side: of the square that the box is resized to, pixels.
      top: first row of the final crop in that square.
      left: first column.
    """

    y: int
    x: int
    height: int
    width: int
    side: int
    top: int = 0
    left: int = 0

    def reduction(self) -> int:
        """By how much (1, 2, 4 or 8) the image may be reduced before, and have enough pixels."""
        most = min(self.height, self.width) // self.side
        return max(k for k in REDUCTIONS if k <= max(1, most))

    def part(self, image: np.ndarray) -> np.ndarray:
        """The box, not yet resized, of [height, width, channels]."""
        return image[self.y : self.y + self.height, self.x : self.x + self.width]

    def cut(self, square: np.ndarray, crop: int) -> np.ndarray:
        """The final crop, [crop, crop, channels], of the square."""
        return square[self.top : self.top + crop, self.left : self.left + crop]


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of a model.

    Attributes:
      crop: side of the square the model sees, pixels.
      resize: 0, or with `inception_crop=False` the side of the square to which training images are
        squashed before a random crop of `crop` x `crop` is taken from it (the original's earlier
        `resize 448, crop 384`); at least `crop`.
      inception_crop: whether training takes a random crop of 5 to 100 % of the area and of varying
        aspect ratio (Szegedy et al., https://arxiv.org/abs/1409.4842), resized to `crop` x `crop`.

    Raises:
      UserError: sizes that do not fit each other.
    """

    crop: int
    resize: int = 0
    inception_crop: bool = True

    def __post_init__(self):
        if self.crop < 1:
            raise UserError(
                f"pp.crop is the side of the model's input in pixels, at least 1; got {self.crop}"
            )
        if self.resize < 0 or (not self.inception_crop and 0 < self.resize < self.crop):
            raise UserError(
                f'pp.resize={self.resize} must be 0 (off) or at least pp.crop={self.crop}, '
                'which is cut from it'
            )

    def train(
        self, image: np.ndarray, rng: np.random.Generator, out: np.ndarray | None = None
    ) -> np.ndarray:
        """A random crop of an image.

        Args:
          image: uint8 or float32 [height, width, channels] in [0, 255].
          rng: where the crop comes from.
          out: where to put the result; default new memory.

        Returns:
          float32 [crop, crop, channels] in [0, 255], not rounded to whole grey levels. Without
          `inception_crop` and `resize` this is `evaluate(image)`.
        """
        return self.render(image, self.draw_box(image.shape[0], image.shape[1], rng), out)

    def draw_box(self, height: int, width: int, rng: np.random.Generator) -> CropBox:
        """Draws what training sees of an image.

        Args:
          height: of the image, pixels.
          width: of the image, pixels.
          rng: where the randomness comes from.
        """
        if self.inception_crop:
            return CropBox(*sample_inception_box(height, width, rng), self.crop)
        if not self.resize:
            return CropBox(0, 0, height, width, self.crop)
        top, left = rng.integers(self.resize - self.crop + 1, size=2)
        return CropBox(0, 0, height, width, self.resize, int(top), int(left))

    def render(self, image: np.ndarray, box: CropBox, out: np.ndarray | None = None) -> np.ndarray:
        """The crop of an image, resized.

        Args:
          image: uint8 or float32 [height, width, channels] in [0, 255].
          box: in an image of that size.
          out: where to put the result; default new memory.

        Returns:
          float32 [crop, crop, channels] in [0, 255], not rounded to whole grey levels.
        """
        part = box.part(image)
        if box.side == self.crop:
            return resize_bilinear(part, self.crop, out)
        shape = (self.crop, self.crop, image.shape[2])
        out = np.empty(shape, np.float32) if out is None else out
        out[...] = box.cut(resize_bilinear(part, box.side), self.crop)
        return out

    def render_uint8(
        self, image: np.ndarray, box: CropBox, size: tuple[int, int], out: np.ndarray
    ) -> np.ndarray:
        """`render` in whole grey levels, from an image that may have been reduced.

        Args:
          image: uint8 or float32 [height / k, width / k, channels] in [0, 255], rounded up, k of
            `REDUCTIONS`; float32 only whole.
          box: in the whole image.
          size: height and width of the whole image, pixels.
          out: uint8 [crop, crop, channels], where to put the result.

        Returns:
          `out`, in [0, 255]. Of a reduced image, pixels that straddle the edge of the box count in
          part.
        """
        import cv2

        if image.dtype != np.uint8:
            out[...] = np.rint(self.render(image, box))
            return out
        if image.shape[:2] == size:
            direct = out if box.side == self.crop else None
            square = cv2.resize(
                box.part(image), (box.side, box.side), dst=direct, interpolation=cv2.INTER_LINEAR
            )
            if direct is None:
                out[...] = box.cut(square, self.crop)
            return out
        # The last row and column of a reduced image may stand for less than k of the whole one.
        k = next(k for k in REDUCTIONS if max(image.shape[:2]) == -(-max(size) // k))
        # From a pixel of the output to a place in the image; pixel centres are at one half.
        across, down = box.width / box.side / k, box.height / box.side / k
        left = box.x / k + across * (box.left + 0.5) - 0.5
        top = box.y / k + down * (box.top + 0.5) - 0.5
        cv2.warpAffine(
            image,
            np.array([[across, 0, left], [0, down, top]]),
            (self.crop, self.crop),
            dst=out,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return out

    def evaluate(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The whole image squashed to the model's square, whatever its aspect ratio.

        Args:
          image: uint8 or float32 [height, width, channels] in [0, 255].
          out: where to put the result; default new memory.

        Returns:
          float32 [crop, crop, channels] in [0, 255].
        """
        return resize_bilinear(image, self.crop, out)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON object; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> 'Preprocess':
        """Rebuilds what `to_dict` gave.

        Raises:
          UserError: settings that are missing or that this version does not know.
        """
        # Folders of earlier versions have it; only the training step mirrors (config.pp.flip).
        settings = {key: value for key, value in settings.items() if key != 'flip'}
        known = {field.name for field in dataclasses.fields(cls)}
        if set(settings) - known or 'crop' not in settings:
            raise UserError(
                f'preprocessing settings must be among {sorted(known)}, with crop; '
                f'got {sorted(settings)}'
            )
        return cls(**settings)


def normalize(pixels: Any) -> Any:
    """Grey levels to the range of the published models.

    Args:
      pixels: NumPy or JAX array of any shape, in [0, 255].

    Returns:
      The same shape, in [-1, 1]; float32 for float32 or uint8 input.
    """
    # Without the explicit float32, NumPy would make float64 of uint8.
    return (pixels - np.float32(127.5)) / np.float32(127.5)


def resize_bilinear(image: np.ndarray, side: int, out: np.ndarray | None = None) -> np.ndarray:
    """`tf.image.resize(image, (side, side))`: bilinear, pixel centres at one half, no antialiasing.

    OpenCV in float32 is within 0.01 grey levels of TensorFlow; in uint8 it would round each pixel.

    Args:
      image: uint8 or float32 [height, width, channels] in [0, 255]; may be a slice of a larger one.
      side: height and width of the result, pixels.
      out: float32 [side, side, channels] without gaps, where to put the result; default new memory.

    Returns:
      float32 [side, side, channels] in [0, 255].
    """
    import cv2  # Here, because it takes a tenth of a second to import.

    # Only the part that is wanted becomes float: four times the memory of a whole photo otherwise.
    image = image.astype(np.float32)
    resized = cv2.resize(image, (side, side), dst=out, interpolation=cv2.INTER_LINEAR)
    return resized if resized.ndim == 3 else resized[..., None]  # of a single channel


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
