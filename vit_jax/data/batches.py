"""Batches for evaluation and inference: every example once, in order."""

import collections
import concurrent.futures
import contextlib
import functools
import math
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Label, Source
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reader import OnBad, Reader, as_reader, default_threads
from vit_jax.errors import UserError

READ_AHEAD = 2  # batches that are read while one is used

Batch = dict[str, np.ndarray]
Item = TypeVar('Item')
Result = TypeVar('Result')


def eval_batches(
    source: Source | Reader,
    preprocess: Preprocess,
    *,
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Batch]:
    """All examples once, in batches of one shape; the last ones are filled up with padding.

    Every process gets the same number of batches, as collective operations need it, and a block of
    consecutive examples of each. At most `READ_AHEAD` batches are in memory beside the one given.

    Args:
      source: the examples.
      preprocess: its `evaluate` is applied.
      batch: examples in the global batch, over all processes; any size.
      process_index: of this process.
      process_count: processes that share the work.
      threads: that read; default `default_threads()`.
      on_bad: called with the error of each image that cannot be read, in their order, when the
        batch is given. None: such an image is an error.

    Returns:
      An iterator over dicts with, for b = batch / process_count, rounded up:
        image: float32 [b, *preprocess.size, channels] in [0, 255]. In the place of an image that
          cannot be read is a copy of another one: it changes nothing, not even in int8 models,
          whose scales depend on all images of a batch. Zeros in padding, and where none of the
          batch can be read.
        label: int32 [b], 0 in padding, -1 where an unreadable record held the label, too; of other
          labels than classes float32 [b] or [b, ...]; of captions the token ids of the first;
        readable: bool [b], whether the image could be read; of padding, False;
        example: int32 [b], index in `source`, -1 in padding.

    Raises:
      UserError: an empty source or batch.
      BadImageError: from the iterator, without `on_bad`: an image that cannot be read, naming it.
    """
    if not len(source):
        raise UserError('the set to evaluate is empty')
    if batch < 1:
        raise UserError(f'batch is the number of images at once, at least 1; got {batch}')
    local = -(-batch // process_count)
    reader = as_reader(source)
    buffers = Buffers((local, *preprocess.size, reader.channels), np.float32)

    def read(index: int, out: np.ndarray) -> tuple[Label, BadImageError | None]:
        try:
            pixels, label = reader.read(index, accurate=preprocess.accurate)
            preprocess.evaluate(pixels, out)
            return label, None
        except BadImageError as error:
            return -1 if error.label is None else error.label, error

    def start(pool: concurrent.futures.Executor, first: int) -> Callable[[], Batch]:
        indices = range(first, min(first + local, len(source)))
        images = buffers.take()
        tasks = [pool.submit(read, index, images[row]) for row, index in enumerate(indices)]

        def finish() -> Batch:
            found = [task.result() for task in tasks]
            label, readable = np.zeros(local, reader.label_dtype), np.zeros(local, bool)
            for row, (known, error) in enumerate(found):
                label[row] = known[0] if np.ndim(known) > label.ndim - 1 else known
                readable[row] = error is None
                if error is not None:
                    if on_bad is None:
                        raise error
                    on_bad(error)
            images[~readable] = images[readable.argmax()] if readable.any() else 0
            images[len(indices) :] = 0
            example = np.array([*indices, *[-1] * (local - len(indices))], np.int32)
            return {'image': images, 'label': label, 'readable': readable, 'example': example}

        return finish

    def batches() -> Iterator[Batch]:
        everywhere = local * process_count
        firsts = range(
            process_index * local, -(-len(source) // everywhere) * everywhere, everywhere
        )
        with reading_threads(threads) as pool:
            yield from in_order(functools.partial(start, pool), firsts, READ_AHEAD)

    return batches()


class Buffers:
    """Memory for the images of batches, used again once nobody holds the batch any more.

    New memory costs a quarter of the time of a batch: the system fills each page with zeros first.

    Args:
      shape: of the images.
      dtype: of the images.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike):
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._free: list[mmap.mmap] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the images of one batch."""
        return math.prod(self._shape) * self._dtype.itemsize

    def take(self) -> np.ndarray:
        """An array whose content is arbitrary."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, self.nbytes)
        # Whatever is made of it, a view or an array of JAX, refers to this one.
        array = np.frombuffer(memory, self._dtype)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(self._shape)


@contextlib.contextmanager
def reading_threads(threads: int | None = None) -> Iterator[concurrent.futures.Executor]:
    """Threads that read images; what they have not begun when the context is left is dropped.

    Args:
      threads: how many; default `default_threads()`.
    """
    import cv2

    # Threads share the processors by images; OpenCV's own ones would only get in their way. Holds
    # for the process.
    cv2.setNumThreads(0)
    pool = concurrent.futures.ThreadPoolExecutor(threads or default_threads(), 'read-images')
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    start: Callable[[Item], Callable[[], Result]], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Results of work that goes on in the background, in the order of the items.

    Args:
      start: starts the work on an item, and returns a function that waits for its result.
      items: to work on.
      ahead: how many more items are started before a result is waited for.
    """
    started: collections.deque[Callable[[], Result]] = collections.deque()
    for item in items:
        started.append(start(item))
        if len(started) > ahead:
            yield started.popleft()()
    while started:
        yield started.popleft()()
