"""Images of every kind to pixels, on the host.

JPEG is decoded with the inverse transform TensorFlow uses (libjpeg-turbo's "fast" one), so that the
pixels are bit-equal to `tf.io.decode_jpeg` and the published accuracies hold, or with the accurate
one, as by Pillow, for models that see the world that way; everything else (png, webp, bmp, ...)
goes through Pillow. Arrays and PIL images become the same kind of pixels.
"""

import errno
import io
import os
import stat
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg

from vit_jax.data import image_files, jpeg_files, webp_files
from vit_jax.data.examples import Label
from vit_jax.data.preprocess import REDUCTIONS, Preprocess
from vit_jax.errors import UserError, printable

if TYPE_CHECKING:
    from PIL import Image

# Larger images are refused before memory for their pixels is asked for: a file of some kilobytes
# can claim gigabytes. The value is the one above which Pillow warns of a decompression bomb.
MAX_PIXELS = 89_478_485
# Enough for so many pixels of any format; no image file is larger.
MAX_BYTES = 1 << 30

# Errors of the machine as it is now, not of the file.
_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
_LAST_ROW_FIRST = (3, 4, 7, 8)  # that, after this, turn it upside down
_LAST_LEFT = (2, 3, 6, 7)  # that mirror it
_STRAY = 'extraneous bytes'  # in what libjpeg says of bytes between segments
# A PIL image reads its file when it is first needed, which two threads must not do at once.
_LOADING = threading.Lock()


class BadImageError(UserError):
    """An image that cannot be read or decoded.

    Attributes:
      key: the path of the file, or dataset, split and index (`tf_flowers:train/17`); the message
        names it too.
      reason: what was wrong with the image.
      label: of the example, where it is known.
    """

    def __init__(self, key: str, reason: str, label: Label | None = None):
        super().__init__(f'cannot use image {printable(key)}: {printable(reason)}')
        self.key = key
        self.reason = reason
        self.label = label


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Args:
      path: of the file; its text is the error's key.

    Returns:
      The whole file, at most `MAX_BYTES`.

    Raises:
      BadImageError: the file is gone, may not be read, is not a regular file (a pipe or a device
        would block, or never end), or is larger.
      OSError: this process has no memory or no more files for it; says nothing about the image.
    """
    key = os.fspath(path)
    try:
        # A pipe without a writer would block `open` itself.
        descriptor = os.open(key, os.O_RDONLY | os.O_CLOEXEC | getattr(os, 'O_NONBLOCK', 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                what = 'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'
                raise BadImageError(key, f'it is {what}')
            if status.st_size > MAX_BYTES:
                raise BadImageError(
                    key, f'{status.st_size:,} bytes are more than {MAX_BYTES:,}, too many to read'
                )
            with open(descriptor, 'rb', closefd=False) as file:
                return file.read(status.st_size)  # a larger number would be allocated first
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _NOT_THE_FILE:
            raise
        raise BadImageError(key, f'the file cannot be read ({error.strerror})') from error
    except ValueError as error:
        raise BadImageError(key, f'that is not a file name ({error})') from error  # a null byte


def load_image(
    image: 'str | os.PathLike[str] | bytes | np.ndarray | Image.Image',
    preprocess: Preprocess,
    *,
    key: str = '',
    exif: bool = True,
    channels: int = 3,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """An image as the model sees it: decoding and preprocessing in one.

    Args:
      image: the path of a file, or what `decode` takes.
      preprocess: of the model; its `evaluate` is applied.
      key: as for `decode`; of a file its path.
      exif: as for `decode`.
      channels: as for `decode`.
      out: float32 [*preprocess.size, channels], where to put the result; default new memory.

    Returns:
      float32 [*preprocess.size, channels] in [0, 255]; `preprocess.normalize` gives the range of
      the model.

    Raises:
      BadImageError: as `read_file` and `decode`.
    """
    if isinstance(image, str | os.PathLike):
        key = os.fspath(image)
        image = read_file(key)
    pixels = decode(image, key=key, exif=exif, channels=channels, accurate=preprocess.accurate)
    return preprocess.evaluate(pixels, out)


class JpegSize(NamedTuple):
    """What is known of a JPEG file's picture without decoding it.

    Attributes:
      height: pixels.
      width: pixels.
      most: the largest `reduction` for `decode`. The last row and column of a reduced picture may
        stand for fewer pixels than the others; where EXIF turns these to the first place, only a
        divisor of that side keeps all where they are.
    """

    height: int
    width: int
    most: int


def size_of_jpeg(
    image: 'bytes | np.ndarray | Image.Image', *, exif: bool = False
) -> JpegSize | None:
    """Height and width of a JPEG file's picture, pixels, without decoding it.

    Args:
      image: as for `decode`.
      exif: as for `decode`.

    Returns:
      None for what is no file, other formats, and files whose header cannot be read; `decode`
      tells.
    """
    if not isinstance(image, bytes) or image[:2] != b'\xff\xd8':
        return None
    try:
        jpeg_files.check(image)
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        except ValueError as error:
            if _STRAY not in str(error):
                raise
            clean = jpeg_files.without_stray_bytes(image)
            height, width, _, _ = simplejpeg.decode_jpeg_header(clean)
    except ValueError:
        return None
    orientation = _jpeg_orientation(image) if exif else 1
    if orientation in _TURNED:
        height, width = width, height
    sides = [height] * (orientation in _LAST_ROW_FIRST) + [width] * (orientation in _LAST_LEFT)
    most = max(k for k in REDUCTIONS if not any(side % k for side in sides))
    return JpegSize(height, width, most)


def decode(
    image: 'bytes | np.ndarray | Image.Image',
    *,
    key: str,
    exif: bool = False,
    reduction: int = 1,
    channels: int = 3,
    accurate: bool = False,
) -> np.ndarray:
    """Decodes one image, to RGB by default.

    Grey images get three equal channels, palettes are looked up, CMYK is converted, an alpha
    channel is dropped (what `tf.io.decode_image(channels=3)` does: the colours stored under
    transparent pixels show), 16-bit channels keep their high byte (again as TensorFlow's png
    decoder). Only the first frame of an animation is used.

    Args:
      image: an encoded file of a format in `image_files.FORMATS`, a PIL image, or an array (also
        as a .npy file), see `pixels_of`.
      key: what a person calls the image (its path, or `tf_flowers:train/17`), for the error
        message.
      exif: whether to turn the image upright as its EXIF orientation says. Photo folders need that;
        TFDS sets do not, because the original release ignores EXIF.
      reduction: 1, or 2, 4 or 8: a JPEG file comes out at so much smaller a size, sooner; other
        formats do not change.
      channels: of the result: 3 (RGB), 1 (grey: of colours the luma, as Pillow's mode L), or
        others, only for arrays and .npy files.
      accurate: JPEG by libjpeg's accurate inverse transform, which Pillow has, and not by the fast
        one, which TensorFlow has: up to 20 grey levels apart at single pixels.

    Returns:
      uint8 [height, width, channels] in [0, 255]; of an array of floats float32. Of a JPEG file,
      height and width are divided by `reduction`, rounded up.

    Raises:
      BadImageError: no image, an empty, truncated or corrupt one, one of more than `MAX_PIXELS`
        pixels, or an array that `pixels_of` refuses.
    """
    if channels == 3 and isinstance(image, bytes) and image[:2] == b'\xff\xd8':
        pixels = _decode_jpeg(image, key, reduction, fast=not accurate)
        return _upright(pixels, _jpeg_orientation(image)) if exif else pixels
    if isinstance(image, np.ndarray):
        return pixels_of(image, key=key, channels=channels)
    if isinstance(image, bytes) and image.startswith(np.lib.format.MAGIC_PREFIX):
        return pixels_of(_array_of(image, key), key=key, channels=channels)
    if channels == 1:
        from PIL import Image

        rgb = decode(image, key=key, exif=exif, reduction=reduction, accurate=accurate)
        return np.array(Image.fromarray(rgb).convert('L'))[..., None]
    if channels != 3:
        raise BadImageError(
            key, f'an image of {channels} channels has to be an array, or a .npy file'
        )
    if not isinstance(image, bytes):
        return _from_pillow(image, key, exif)
    if not image:
        raise BadImageError(key, 'the file is empty')
    try:
        picture = image_files.open_image(image)
    except Exception as error:
        raise _pillows(error, key) from error
    return _from_pillow(picture, key, exif, image)


def _array_of(file: bytes, key: str) -> np.ndarray:
    """The array of a .npy file."""
    try:
        return np.load(io.BytesIO(file), allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header as Python's literals: nearly any error
        raise BadImageError(key, f'not a .npy file of plain numbers ({error})') from error


def pixels_of(image: np.ndarray, *, key: str, channels: int = 3) -> np.ndarray:
    """An array as pixels.

    What is done to files, see `decode`, is done to arrays: one channel becomes three equal ones, of
    four the last (alpha) is dropped, if there are to be 3; of 16 bits the high byte stays. Floats
    are in [0, 1]; what is outside is refused, since it may be anything.

    Args:
      image: [height, width, channels], or [height, width] for one channel, or [channels, height,
        width] where nothing else can be meant; uint8, uint16, or floats in [0, 1].
      key: as for `decode`.
      channels: of the result.

    Returns:
      [height, width, channels] in [0, 255]: uint8, or float32 for floats, not rounded. RGB uint8 is
      returned as it is.

    Raises:
      BadImageError: another shape, type or range of values.
    """
    known = (1, 3, 4) if channels == 3 else (channels,)
    shape = image.shape
    if image.ndim == 2:
        image = image[..., None]
    elif image.ndim == 3 and shape[2] not in known and shape[0] in known:
        image = np.moveaxis(image, 0, -1)
    if image.ndim != 3 or 0 in shape or image.shape[2] not in known:
        more = ' (channels=C for images of C channels)' if channels == 3 else ''
        raise BadImageError(
            key, f'pixels must be [height, width, {channels}], got {list(shape)}{more}'
        )
    if image.shape[2] != channels:
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3]
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        if 0 < image.max() < 256:
            raise BadImageError(
                key, 'as an image of 16 bits, of values up to 65535, it is black; make it uint8'
            )
        return (image >> 8).astype(np.uint8)
    if image.dtype.kind != 'f':
        raise BadImageError(
            key, f'pixels must be uint8, uint16 or floats in [0, 1], got {image.dtype}'
        )
    low, high = image.min(), image.max()
    if not 0 <= low <= high <= 1:  # so that NaN fails
        raise BadImageError(
            key, f'floats must be in [0, 1], where 1 is white, and these are in [{low:g}, {high:g}]'
        )
    return image.astype(np.float32) * np.float32(255)


def _decode_jpeg(image: bytes, key: str, reduction: int, fast: bool) -> np.ndarray:
    options: dict[str, int] = {}
    try:
        jpeg_files.check(image)
        height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        _check_size(height, width, key)
        if jpeg_files.has_too_many_scans(image, height * width):
            raise BadImageError(key, 'it has more scans than any picture needs')
        if reduction > 1:
            options = {'min_height': -(-height // reduction), 'min_width': -(-width // reduction)}
        return simplejpeg.decode_jpeg(image, 'RGB', fastdct=fast, **options)
    except ValueError as error:
        reason = str(error)
    if _STRAY in reason and (clean := jpeg_files.without_stray_bytes(image)) != image:
        return _decode_jpeg(clean, key, reduction, fast)
    try:
        # libjpeg's warnings are errors to simplejpeg but not to TensorFlow (stray bytes between
        # markers are common in photos from the web), except where pixels are missing: a file that
        # only lacks its end marker is clean once it has one, a file cut inside the picture is not.
        if 'Premature end' in reason:
            return simplejpeg.decode_jpeg(image + b'\xff\xd9', 'RGB', fastdct=fast, **options)
        if 'Corrupt JPEG data' in reason and 'premature end' not in reason:
            return simplejpeg.decode_jpeg(image, 'RGB', fastdct=fast, strict=False, **options)
    except ValueError as error:
        reason = f'{reason}; {error}'
    raise BadImageError(key, f'not a complete JPEG file ({reason})')


def _from_pillow(
    picture: 'Image.Image', key: str, exif: bool, file: bytes | None = None
) -> np.ndarray:
    """Pixels of a picture that `open_image` opened from this file, or that somebody else made."""
    try:
        _check_size(picture.height, picture.width, key)
        pixels = None
        if file is None:
            with _LOADING:
                image_files.check_picture(picture)
                picture.load()
        elif picture.format == 'WEBP' and not getattr(picture, 'is_animated', False):
            pixels = webp_files.decode(file, *picture.size)
        if pixels is None:
            picture.load()
        # After loading, by which Pillow turns TIFF files.
        orientation = image_files.exif_of(picture).get(_EXIF_ORIENTATION, 1) if exif else 1
        if pixels is None:
            pixels = _to_rgb(picture)
    except Exception as error:
        raise _pillows(error, key) from error
    return _upright(pixels, orientation)


def _pillows(error: Exception, key: str) -> BadImageError:
    """What Pillow raised, as one error; its decoders raise almost anything."""
    from PIL import Image

    if isinstance(error, BadImageError):
        return error
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadImageError(key, f'more than {MAX_PIXELS:,} pixels')
    return BadImageError(key, f'not an image that can be read ({error})')


def _to_rgb(picture) -> np.ndarray:
    """PIL image of any mode to uint8 [height, width, 3]."""
    if picture.mode.startswith('I'):  # 16-bit grey: 'I;16', 'I;16B', and 'I' from older Pillow
        grey = np.asarray(picture).astype(np.int64)
        return np.repeat((np.clip(grey, 0, 65535) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode == 'F':
        raise ValueError('pixels are floating point numbers without a known range')
    if 'transparency' in picture.info:  # Pillow would warn that palettes lose it.
        picture = picture.copy()
        del picture.info['transparency']
    if picture.mode != 'RGB':
        picture = picture.convert('RGB')
    pixels = np.frombuffer(picture.tobytes(), np.uint8)  # sooner than np.array(picture)
    return pixels.reshape(picture.height, picture.width, 3).copy()


def _check_size(height: int, width: int, key: str) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(key, f'{width} x {height} is more than {MAX_PIXELS:,} pixels')


def _jpeg_orientation(image: bytes) -> int:
    """EXIF orientation (1 to 8) of a JPEG file; 1, upright, if there is none."""
    if not jpeg_files.has_exif(image):  # Saves Pillow's parsing for the many files without it.
        return 1
    try:
        if image[2] != 0xFF:  # where Pillow sees no JPEG file
            image = jpeg_files.without_stray_bytes(image)
        return image_files.exif_of(image_files.open_image(image)).get(_EXIF_ORIENTATION, 1)
    except Exception:  # Damaged metadata of a picture that did decode: as it is stored.
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (EXIF 2.32, section 4.6.4 A, tag 0x0112), 1 to 8."""
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _LAST_ROW_FIRST:
        pixels = pixels[::-1]
    if orientation in _LAST_LEFT:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
