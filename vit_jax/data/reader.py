"""The examples of a source as pixels, and a cache of them in memory."""

import os
import threading
from collections.abc import Callable

import numpy as np

from vit_jax.data import decode
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Example, Label, Source, channels_of, label_dtype_of, weights_of

# What Python needs to keep an image, beside its pixels. Bytes; 445 to 525 were measured.
_OVERHEAD = 640

OnBad = Callable[[BadImageError], None]


def default_threads() -> int:
    """Threads worth having: one for each processor this process may use, at most 16."""
    return min(
        16,
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1,
    )


def once_per_key(on_bad: OnBad) -> OnBad:
    """Passes on the first error of each key, one at a time, whichever thread meets it."""
    lock, known = threading.Lock(), set()

    def pass_on(error: BadImageError) -> None:
        with lock:
            if error.key not in known:
                known.add(error.key)
                on_bad(error)

    return pass_on


class ImageCache:
    """Room for decoded images, shared by readers and threads.

    Args:
      size: bytes that may be used.

    Attributes:
      size: the same.
      used: bytes given so far.
    """

    def __init__(self, size: int):
        self.size = size
        self.used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether so many bytes are left; if so, they are used from now on."""
        with self._lock:
            if self.used + size > self.size:
                return False
            self.used += size
            return True


class Reader:
    """Reads and decodes examples; itself a `Source`, safe to use from several threads.

    The cache keeps images in the order in which they are first read, until it is full, and evicts
    none: with a new permutation in every epoch, no other policy has more hits. Pixels are the same
    with and without it.

    Args:
      source: the examples.
      cache: room for decoded images; None for none. Pixels that the source itself holds in memory
        take nothing of it.

    Attributes:
      class_names: see `Source`.
      exif: see `Source`.
      channels: see `examples.channels_of`.
      weights: how much each example counts in training, float32 [examples] of mean 1; None for all
        alike.
    """

    def __init__(self, source: Source, cache: ImageCache | None = None):
        self.class_names = source.class_names
        self.exif = source.exif
        self.channels = channels_of(source)
        self.weights = weights_of(source)
        self._source = source
        self._cache = cache
        # By index, divisor, and whether JPEG is decoded accurately; with the labels.
        self._pixels: dict[tuple[int, int, bool], tuple[np.ndarray, Label]] = {}
        # Of the whole images, for `read_reduced`; None of other formats than JPEG.
        self._sizes: dict[int, decode.JpegSize | None] = {}
        self._label_dtype: np.dtype | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return self._source[index]

    @property
    def label_dtype(self) -> np.dtype:
        """See `examples.label_dtype_of`."""
        if self._label_dtype is None:
            self._label_dtype = label_dtype_of(self._source)
        return self._label_dtype

    def read(self, index: int, *, accurate: bool = False) -> tuple[np.ndarray, Label]:
        """Pixels, as `decode.decode` gives them, and label of an example.

        Args:
          index: of the example.
          accurate: see `decode.decode`.

        Raises:
          BadImageError: the image cannot be read; its `label` is set where it is known.
        """
        return self._decode((int(index), 1, accurate), None)

    def read_reduced(
        self, index: int, reduction: Callable[[int, int], int]
    ) -> tuple[np.ndarray, Label, tuple[int, int]]:
        """An example, decoded to a smaller size where its format has one.

        Args:
          index: of the example.
          reduction: from height and width of the whole image to the divisor of both, one of
            `preprocess.REDUCTIONS`; called once.

        Returns:
          Pixels and label as of `read`, and height and width of the whole image.

        Raises:
          BadImageError: as `read`.
        """
        index, example = int(index), None
        if index in self._sizes:
            size = self._sizes[index]
        else:
            example = self._source[index]
            size = decode.size_of_jpeg(example.image, exif=self.exif)
        divisor = min(reduction(size.height, size.width), size.most) if size else 1
        pixels, label = self._decode((index, divisor, False), example)
        if (index, divisor, False) in self._pixels:
            self._sizes[index] = size
        if size is not None:
            return pixels, label, (size.height, size.width)
        height, width = pixels.shape[:2]
        reduction(height, width)
        return pixels, label, (height, width)

    def _decode(
        self, key: tuple[int, int, bool], example: Example | None
    ) -> tuple[np.ndarray, Label]:
        """The pixels of a key of `_pixels`, kept or decoded, and the label."""
        kept = self._pixels.get(key)
        if kept is not None:
            return kept
        index, divisor, accurate = key
        example = example or self._source[index]
        if self._label_dtype is None:
            self._label_dtype = label_dtype_of(self._source, example.label)
        try:
            pixels = decode.decode(
                example.image,
                key=example.key,
                exif=self.exif,
                reduction=divisor,
                channels=self.channels,
                accurate=accurate,
            )
        except BadImageError as error:
            error.label = example.label
            raise
        kept = pixels, example.label
        if self._cache and not isinstance(example.image, np.ndarray):
            with self._lock:  # another thread may have been at the same image
                if key not in self._pixels and self._cache.take(pixels.nbytes + _OVERHEAD):
                    self._pixels[key] = kept
        return kept


def as_reader(source: Source | Reader) -> Reader:
    """The source as a reader, which it may be already."""
    return source if isinstance(source, Reader) else Reader(source)
