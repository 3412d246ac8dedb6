"""From decoded images to what the model sees: the original release's preprocessing.

One `Preprocess` object describes the input of a model; training, evaluation, prediction and export
all use it, and it is stored with the model, so they cannot drift apart.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import resample
from vit_jax.data.inception_crop import sample_inception_box
from vit_jax.errors import UserError
from vit_jax.variants import in_words, sides

# Of an image that keeps its aspect ratio, the middle part that is no longer than this is resized.
MAX_ASPECT_SEEN = 100
# Pixels; a file must not say how much memory is taken.
MAX_RESIZE = 8192
# What evaluation sees, see `Preprocess.eval`.
EVALS = ('squash', 'squash_crop', 'resize_crop')
_CHOICES = {
    'eval': EVALS,
    'interpolation': resample.INTERPOLATIONS,
    'centre': ('down', 'half_even'),
}

# Divisors of height and width by which JPEG files can be decoded to smaller images quickly.
REDUCTIONS = (1, 2, 4, 8)


class CropBox(NamedTuple):
    """Which part of an image the model sees, and how large.

    Attributes:
      y: first row of the box that is cut out, pixels of the whole image.
      x: first column.
      height: of the box, pixels.
      width: of the box, pixels.
      size: height and width that the box is resized to, pixels.
      top: first row of the final crop in that.
      left: first column.
    """

    y: int
    x: int
    height: int
    width: int
    size: tuple[int, int]
    top: int = 0
    left: int = 0

    def reduction(self) -> int:
        """By how much (1, 2, 4 or 8) the image may be reduced before, and have enough pixels."""
        most = min(self.height // self.size[0], self.width // self.size[1])
        return max(k for k in REDUCTIONS if k <= max(1, most))

    def part(self, image: np.ndarray) -> np.ndarray:
        """The box, not yet resized, of [height, width, channels]."""
        return image[self.y : self.y + self.height, self.x : self.x + self.width]

    def cut(self, resized: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The final crop, [*size, channels], of the box that was resized."""
        return resized[self.top : self.top + size[0], self.left : self.left + size[1]]


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of a model.

    Attributes:
      crop: what the model sees, pixels: the side of a square, or (height, width).
      resize: what an image is resized to before `crop` is cut out of it, pixels: a side, or
        (height, width), at least `crop`. 0: straight to `crop`. Evaluation with 'squash' does
        without it, as the original release (`resize 448, crop 384`), and so does `inception_crop`.
      inception_crop: whether training takes a random crop of 5 to 100 % of the area and of varying
        aspect ratio (Szegedy et al., https://arxiv.org/abs/1409.4842), resized to `crop`.
      eval: what evaluation sees, one of `EVALS`. 'squash': the whole image, squashed to `crop`.
        'squash_crop': the centre of the whole image squashed to `resize`. 'resize_crop': the centre
        of the image that keeps its aspect ratio and just covers `resize`. Without
        `inception_crop` it is the same in training, but for a random place instead of the centre.
      interpolation: of evaluation, one of `resample.INTERPOLATIONS`.
      antialias: whether evaluation resizes as Pillow does, see `resample.resize`.
      centre: how half a pixel beside the centre crop is rounded: 'down' (Hugging Face), or
        'half_even' (torchvision, and so timm).
      whole_levels: whether evaluation does as the original release's image-text models: it cuts
        off fractions of a grey level, and a long side is rounded to the nearest pixel and not down.
      resize_small: what the short side of training images is resized to (by area) before a random
        crop, pixels: big_vision's `resize_small(256)|random_crop(224)`. 0: not done so.

    Raises:
      UserError: settings that do not exist, or do not fit each other.
    """

    crop: int | tuple[int, int]
    resize: int | tuple[int, int] = 0
    inception_crop: bool = True
    eval: str = 'squash'
    interpolation: str = 'bilinear'
    antialias: bool = False
    centre: str = 'down'
    whole_levels: bool = False
    resize_small: int = 0

    def __post_init__(self):
        for name in ('crop', 'resize'):
            object.__setattr__(self, name, _size(getattr(self, name), name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                words = ', '.join(repr(choice) for choice in choices)
                raise UserError(f'pp.{name}={getattr(self, name)!r} is not one of {words}')
        for name in ('inception_crop', 'antialias', 'whole_levels'):
            if type(getattr(self, name)) is not bool:
                raise UserError(f'pp.{name}={getattr(self, name)!r} is neither True nor False')
        if self.resize_small:
            if type(self.resize_small) is not int or not (
                max(self.size) <= self.resize_small <= MAX_RESIZE
            ):
                raise UserError(
                    f'pp.resize_small={self.resize_small} must be 0 (off), or from pp.crop='
                    f'{self.crop}, which is cut from it, to {MAX_RESIZE}'
                )
            if self.inception_crop:
                raise UserError(
                    f'pp.resize_small={self.resize_small} and pp.inception_crop=True both say how '
                    'training images are cropped: leave out one of them'
                )
        if self.resize and (self.eval != 'squash' or not self.inception_crop):
            if any(a < b for a, b in zip(sides(self.resize), self.size, strict=True)):
                raise UserError(
                    f'pp.resize={self.resize} must be 0 (off) or at least pp.crop={self.crop}, '
                    'which is cut from it'
                )
        if not self.antialias and not resample.can_alias(self.interpolation):
            raise UserError(
                f'pp.interpolation={self.interpolation!r} is always antialiased: set '
                "pp.antialias=True, or use 'bilinear' or 'bicubic'"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model sees, pixels."""
        return sides(self.crop)

    @property
    def accurate(self) -> bool:
        """Whether evaluation decodes JPEG files as Pillow does, too, see `decode.decode`."""
        return self.antialias

    def train(
        self, image: np.ndarray, rng: np.random.Generator, out: np.ndarray | None = None
    ) -> np.ndarray:
        """A random crop of an image.

        Args:
          image: uint8 or float32 [height, width, channels] in [0, 255].
          rng: where the crop comes from.
          out: where to put the result; default new memory.

        Returns:
          float32 [*size, channels] in [0, 255], not rounded to whole grey levels. Without
          `inception_crop` and `resize` it is the whole image, squashed, as `evaluate` has it by
          default.
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
            return CropBox(*sample_inception_box(height, width, rng), self.size)
        whole = self._small(height, width) if self.resize_small else self._whole(height, width)
        if whole.size == self.size:
            return whole
        top, left = (
            int(rng.integers(all_ - part + 1))
            for all_, part in zip(whole.size, self.size, strict=True)
        )
        return whole._replace(top=top, left=left)

    def render(self, image: np.ndarray, box: CropBox, out: np.ndarray | None = None) -> np.ndarray:
        """The crop of an image, resized.

        Args:
          image: uint8 or float32 [height, width, channels] in [0, 255].
          box: in an image of that size.
          out: where to put the result; default new memory.

        Returns:
          float32 [*size, channels] in [0, 255], not rounded to whole grey levels.
        """
        part = box.part(image)
        if self.resize_small:
            return _put(box.cut(resample.resize_area(part, box.size), self.size), out)
        if box.size == self.size:
            return resample.resize_bilinear(part, self.size, out)
        return _put(box.cut(resample.resize_bilinear(part, box.size), self.size), out)

    def render_uint8(
        self, image: np.ndarray, box: CropBox, size: tuple[int, int], out: np.ndarray
    ) -> np.ndarray:
        """`render` in whole grey levels, from an image that may have been reduced.

        Args:
          image: uint8 or float32 [height / k, width / k, channels] in [0, 255], rounded up, k of
            `REDUCTIONS`; float32 only whole.
          box: in the whole image.
          size: height and width of the whole image, pixels.
          out: uint8 [*size, channels], where to put the result.

        Returns:
          `out`, in [0, 255]. Of a reduced image, pixels that straddle the edge of the box count in
          part.
        """
        import cv2

        if image.dtype != np.uint8 or (self.resize_small and image.shape[:2] == size):
            out[...] = np.rint(self.render(image, box))
            return out
        if image.shape[:2] == size:
            direct = out if box.size == self.size else None
            resized = cv2.resize(
                box.part(image), box.size[::-1], dst=direct, interpolation=cv2.INTER_LINEAR
            )
            if direct is None:
                out[...] = box.cut(resized.reshape(*box.size, -1), self.size)
            return out
        # The last row and column of a reduced image may stand for less than k of the whole one.
        k = next(k for k in REDUCTIONS if max(image.shape[:2]) == -(-max(size) // k))
        # From a pixel of the output to a place in the image; pixel centres are at one half.
        across, down = box.width / box.size[1] / k, box.height / box.size[0] / k
        left = box.x / k + across * (box.left + 0.5) - 0.5
        top = box.y / k + down * (box.top + 0.5) - 0.5
        cv2.warpAffine(
            image,
            np.array([[across, 0, left], [0, down, top]]),
            self.size[::-1],
            dst=out,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        return out

    def evaluate(self, image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """What evaluation sees of an image, see `eval`; the same in every call.

        Args:
          image: uint8 or float32 [height, width, channels] in [0, 255].
          out: float32 [*size, channels] without gaps, where to put the result; default new memory.

        Returns:
          float32 [*size, channels] in [0, 255].
        """
        pixels = self._evaluate(image, out)
        return np.floor(pixels, out=out) if self.whole_levels else pixels

    def _evaluate(self, image: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        if self.eval == 'squash' and (self.interpolation, self.antialias) == ('bilinear', False):
            return resample.resize_bilinear(image, self.size, out)
        how: dict[str, Any] = {
            'interpolation': self.interpolation,
            'antialias': self.antialias,
        }
        if self.eval == 'squash':
            return _put(resample.resize(image, self.size, **how), out)
        whole = self._whole(*image.shape[:2])
        top, left = (self._half(a - b) for a, b in zip(whole.size, self.size, strict=True))
        resized = resample.resize(whole.part(image), whole.size, **how)
        return _put(whole._replace(top=top, left=left).cut(resized, self.size), out)

    def seen(self, image: np.ndarray) -> np.ndarray:
        """The part of an image that evaluation sees, at the image's own resolution.

        Args:
          image: [height, width, channels].

        Returns:
          A view of it; where the part ends between pixels, of the nearest ones.
        """
        if self.eval == 'squash':
            return image
        whole = self._whole(*image.shape[:2])
        part, cut = whole.part(image), []
        for old, new, crop in zip(part.shape, whole.size, self.size, strict=False):
            start = self._half(new - crop)
            cut.append(slice(round(start * old / new), max(1, round((start + crop) * old / new))))
        return part[cut[0], cut[1]]

    def _whole(self, height: int, width: int) -> CropBox:
        """An image that is resized and then cropped, before the crop."""
        target = sides(self.resize or self.crop)
        if self.eval != 'resize_crop':
            return CropBox(0, 0, height, width, target)
        y, x, height, width = _middle(height, width)
        if target[0] == target[1] and self.whole_levels:
            size = _cover(height, width, target[0])
        elif target[0] == target[1]:  # as torchvision and Hugging Face: the long side rounds down
            long = int(target[0] * max(height, width) / min(height, width))
            size = (target[0], long) if height <= width else (long, target[0])
        else:  # as timm, ResizeKeepRatio
            ratio = min(height / target[0], width / target[1])
            size = max(target[0], round(height / ratio)), max(target[1], round(width / ratio))
        return CropBox(y, x, height, width, size)

    def _small(self, height: int, width: int) -> CropBox:
        """An image of which the short side is resized, before the crop; as big_vision rounds."""
        y, x, height, width = _middle(height, width)
        return CropBox(y, x, height, width, _cover(height, width, self.resize_small))

    def _half(self, pixels: int) -> int:
        return pixels // 2 if self.centre == 'down' else round(pixels / 2)

    def at(self, crop: int | tuple[int, int]) -> 'Preprocess':
        """The same for a model of another size: `resize` grows with `crop`.

        Args:
          crop: side or (height, width) of what that model sees, pixels.
        """
        (height, width), (rows, columns) = sides(crop), sides(self.resize)
        resize = round(rows * height / self.size[0]), round(columns * width / self.size[1])
        small = math.ceil(self.resize_small * max(height, width) / max(self.size))
        return dataclasses.replace(self, crop=crop, resize=resize, resize_small=small)

    def but(self, changes: Mapping[str, Any]) -> 'Preprocess':
        """The same with other settings of evaluation.

        Args:
          changes: of `eval`, `resize`, `interpolation`, `antialias`.

        Raises:
          UserError: they do not fit, or have no effect.
        """
        new = dataclasses.replace(self, **changes)
        if changes.get('resize') and new.eval == 'squash':
            raise UserError(
                f'--resize {in_words(new.resize)} has no effect on images that are squashed: add '
                '--eval resize_crop, or --eval squash_crop'
            )
        return new

    def describe(self) -> str:
        """What evaluation sees, in words: 'short side 256, bicubic, ..., centre crop 224'."""
        crop, resize = (in_words(size) for size in (self.crop, self.resize or self.crop))
        how = self.interpolation + (', antialiased' if self.antialias else ', not antialiased')
        how += ', cut to whole grey levels' if self.whole_levels else ''
        if self.eval == 'squash':
            return f'the whole image squashed to {crop}, {how}'
        what = 'squashed to' if self.eval == 'squash_crop' else 'short side'
        if self.eval == 'resize_crop' and isinstance(self.resize, tuple):
            what = 'scaled to cover'
        return f'{what} {resize}, {how}, centre crop {crop}'

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON object; `from_dict` is its inverse.

        Those of evaluation only where they are not the defaults, so that earlier versions read it.
        """
        settings = dataclasses.asdict(self)
        for field in dataclasses.fields(self)[3:]:
            if settings[field.name] == field.default:
                del settings[field.name]
        return settings

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


def _size(size: Any, name: str) -> int | tuple[int, int]:
    """A side or (height, width), in the one form that each size has: an int for squares."""
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    least, most = (1, math.inf) if name == 'crop' else (0, MAX_RESIZE)
    if len(pair) != 2 or not all(type(side) is int and least <= side <= most for side in pair):
        what = "the model's input" if name == 'crop' else 'the image that the crop is cut from'
        limit = f', at most {most:,}' if name == 'resize' else ''
        raise UserError(
            f'pp.{name} is the side of {what} in pixels, or its (height, width), at least {least}'
            f'{limit}; got {size!r}'
        )
    return pair[0] if pair[0] == pair[1] else pair


def _middle(height: int, width: int) -> tuple[int, int, int, int]:
    """The part (y, x, height, width) of an image that is resized to a short side.

    Nothing beyond is seen; resized, it could be of any size.
    """
    most = MAX_ASPECT_SEEN * min(height, width)
    y, x = max(0, height - most) // 2, max(0, width - most) // 2
    return y, x, min(height, most), min(width, most)


def _cover(height: int, width: int, side: int) -> tuple[int, int]:
    """The size of an image whose short side becomes `side`, rounded as the original release does.

    (`preprocess.py`, `_resize_small`: in float32, to the nearest; so does big_vision.)
    """
    factor = np.float32(side) / np.float32(min(height, width))
    return int(np.rint(np.float32(height) * factor)), int(np.rint(np.float32(width) * factor))


def _put(pixels: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return pixels
    out[...] = pixels
    return out
