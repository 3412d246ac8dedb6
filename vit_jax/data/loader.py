"""Training batches: decoded, cropped and read ahead in threads, by Grain.

A batch is a pure function of (seed, step): `train_dataset(...)[s]` is the batch of step s, whatever
was read before it, on however many processes. So the state of the input is the step number, and
resuming is `start=step`.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from vit_jax.data import workers
from vit_jax.data.batches import Batch
from vit_jax.data.dataset import Source
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import CropBox, Preprocess
from vit_jax.data.reader import OnBad, OncePerKey, Reader, as_reader, default_threads
from vit_jax.data.sampler import BatchSampler, Item
from vit_jax.errors import UserError

# Draws for a substitute of an unreadable image. Where half of a set is unreadable, one place in
# 2**100 finds none.
MAX_DRAWS = 100
_COLUMNS = ('label', 'position', 'example', 'replaced')
# Host memory for batches that wait for the device. Grain's own default is 500 batches: 150 GB at
# batch 512 and 224 px.
MAX_BUFFER_BYTES = 8 << 30


def train_dataset(
    source: Source | Reader,
    preprocess: Preprocess,
    *,
    batch: int,
    seed: int,
    exact: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    on_bad: OnBad | None = None,
) -> 'TrainDataset':
    """An endless sequence of training batches; element s belongs to step s.

    Each pass over the source is a new permutation of it. A batch may cross from one pass to the
    next, and a source smaller than a batch is passed over more than once in it.

    With `on_bad`, another example takes the place of one that cannot be read, drawn from the whole
    source by seed and place alone: the same one on any number of processes, and after resuming.

    Args:
      source: the examples; a `Reader` to keep images in memory.
      preprocess: its crops are drawn with a random generator that depends on seed and place in the
        sequence alone.
      batch: examples in the global batch, over all processes.
      seed: of the order and of the crops.
      exact: whether the pixels are those of the original release. Else the same crops are made
        from images that were decoded to a smaller size where that leaves enough pixels, in whole
        grey levels.
      process_index: this process gets the examples at positions process_index, process_index +
        process_count, ... of each global batch.
      process_count: processes that share the work.
      on_bad: called with the error of each unreadable image that this process meets, once for each
        key (an `OncePerKey` also once over several calls), from the threads that read, one at a
        time; what it raises ends the reading. None: the first such image is an error.

    Returns:
      A dataset whose element s (0-based) is a dict with, for b = batch / process_count:
        image: float32 [b, crop, crop, 3] in [0, 255], or uint8 if not `exact`;
        label: int32 [b];
        position: int32 [b], place in the global batch;
        example: int32 [b], index in `source`, of the substitute where there is one;
        replaced: int32 [b], 1 for a substitute, else 0.

    Raises:
      UserError: an empty source, or a batch that the processes cannot share equally.
      BadImageError: on access, an image that cannot be read, naming it: without `on_bad`, or when
        `MAX_DRAWS` substitutes could not be read either.
    """
    if not len(source):
        raise UserError('the training set is empty')
    if batch < 1 or batch % process_count:
        raise UserError(
            f'batch={batch} must be a multiple of the number of processes ({process_count})'
        )
    order = BatchSampler(len(source), batch, seed, process_index, process_count)
    load = BatchLoader(as_reader(source), preprocess, exact, on_bad is not None)
    return TrainDataset(order, load, None if on_bad is None else OncePerKey(on_bad))


@contextlib.contextmanager
def train_batches(
    dataset: 'TrainDataset', *, start: int, threads: int | None = None, processes: int = 0
) -> Iterator[Iterator[Batch]]:
    """Reads batches ahead of the training loop, in threads.

    Args:
      dataset: what `train_dataset` gave.
      start: the first step to deliver.
      threads: how many batches are worked on at a time; default `default_threads()`.
      processes: over which the threads are spread; 0: they belong to this process. Python runs
        one thread of a process at a time, except while it decodes or resizes. `on_bad` is then
        called by the thread that takes the batches.

    Yields:
      An iterator over the batches of steps start, start + 1, ... The threads end when the context
      is left.

    Raises:
      BadImageError: from `next`, an image that cannot be read, naming it (see `train_dataset`).
      UserError: from `next`, a process has died.
    """
    threads = threads or default_threads()
    if processes:
        ahead = batches_ahead(dataset.image_bytes, max(threads, processes))
        batches = workers.read_ahead(dataset, start, threads, processes, ahead)
    else:
        batches = read_ahead(dataset.batches, start, threads)
    with contextlib.closing(batches) as iterator:
        yield iterator


def read_ahead(dataset: grain.MapDataset, start: int, threads: int) -> Iterator[Batch]:
    """Batches start, start + 1, ..., worked on ahead in threads as far as memory allows."""
    import cv2

    # Threads share the processors by images; OpenCV's own ones would only get in their way. Holds
    # for the process.
    cv2.setNumThreads(0)
    # The first batch tells how large they are. It would not come sooner from one of many threads.
    first = dataset[start]
    buffer = batches_ahead(sum(array.nbytes for array in first.values()), threads)
    options = grain.ReadOptions(num_threads=min(threads, buffer), prefetch_buffer_size=buffer)
    iterator = iter(dataset[start + 1 :].to_iter_dataset(options))
    try:
        iterator.start_prefetch()
        yield first
        del first
        yield from iterator
    finally:
        iterator.close()


def batches_ahead(batch_bytes: int, threads: int) -> int:
    """How many batches are read ahead: two for each thread, as far as memory allows.

    That is a quarter of the machine's memory, at most `MAX_BUFFER_BYTES`.
    """
    try:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 4
    except (AttributeError, ValueError):  # Not on every system.
        memory = MAX_BUFFER_BYTES
    return max(1, min(2 * threads, min(memory, MAX_BUFFER_BYTES) // batch_bytes))


class TrainDataset:
    """An endless sequence of training batches, see `train_dataset`.

    Pickled, it loses `on_bad`: the other process sends the errors back.

    Args:
      order: which examples.
      load: makes the batch of them.
      on_bad: see `train_dataset`.
    """

    def __init__(self, order: BatchSampler, load: 'BatchLoader', on_bad: OnBad | None):
        self._order = order
        self._plan = order.plan()
        self._load = load
        self.on_bad = on_bad
        self.batches = self._plan.map(lambda items: load(items, on_bad))

    def __getitem__(self, step: int) -> Batch:
        return self.batches[step]

    def __reduce__(self):
        return TrainDataset, (self._order, self._load, None)

    def batch_and_errors(
        self, step: int, empty: Callable[..., np.ndarray]
    ) -> tuple[Batch, list[BadImageError]]:
        """A batch, and the errors that `on_bad` is to get, instead of giving them to it.

        Args:
          step: of the batch.
          empty: makes the array of the images, as `np.empty`.
        """
        errors: list[BadImageError] = []
        return self._load(self._plan[step], errors.append, empty), errors

    @property
    def image_bytes(self) -> int:
        """Bytes of the images of one batch."""
        size = self._order.batch // self._order.process_count
        return self._load.image_bytes(size)


@dataclasses.dataclass(frozen=True)
class BatchLoader:
    """Makes a batch.

    Attributes:
      reader: of the examples.
      preprocess: what is made of them.
      exact: see `train_dataset`.
      substitute: whether other examples take the place of unreadable ones.
    """

    reader: Reader
    preprocess: Preprocess
    exact: bool
    substitute: bool

    def image_bytes(self, size: int) -> int:
        """Bytes of so many images."""
        return size * self.preprocess.crop**2 * 3 * (4 if self.exact else 1)

    def __call__(
        self,
        items: Sequence[Item],
        on_bad: OnBad | None,
        empty: Callable[..., np.ndarray] = np.empty,
    ) -> Batch:
        """The batch of these examples.

        Args:
          items: of `BatchSampler.plan`.
          on_bad: gets the errors of unreadable images; needed to `substitute`.
          empty: makes the array of the images.
        """
        shape = (len(items), self.preprocess.crop, self.preprocess.crop, 3)
        out = {'image': empty(shape, np.float32 if self.exact else np.uint8)}
        out |= {name: np.zeros(len(items), np.int32) for name in _COLUMNS}
        rng = np.random.Generator(np.random.Philox(0))
        for row, (position, index, key) in enumerate(items):
            try:
                label = self._show(index, _begin(rng, key), out['image'][row])
            except BadImageError as error:
                if not self.substitute:
                    raise
                on_bad(error)
                index, label = self._substitute(rng, key, error, on_bad, out['image'][row])
                out['replaced'][row] = 1
            out['label'][row], out['position'][row], out['example'][row] = label, position, index
        return out

    def _show(self, index: int, rng: np.random.Generator, out: np.ndarray) -> int:
        """Writes a random crop of an example, drawn by `rng`; returns the label."""
        if self.exact:
            pixels, label = self.reader.read(index)
            self.preprocess.train(pixels, rng, out)
            return label
        drawn: list[CropBox] = []

        def reduction(height: int, width: int) -> int:
            drawn.append(self.preprocess.draw_box(height, width, rng))
            return drawn[0].reduction()

        pixels, label, size = self.reader.read_reduced(index, reduction)
        self.preprocess.render_uint8(pixels, drawn[0], size, out)
        return label

    def _substitute(
        self,
        rng: np.random.Generator,
        key: np.ndarray,
        error: BadImageError,
        on_bad: OnBad,
        out: np.ndarray,
    ) -> tuple[int, int]:
        """Index and label of an example that can be read, drawn by the key of the place."""
        # The same key as the crop's; the counter begins elsewhere, so the numbers are others.
        draw = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        for _ in range(MAX_DRAWS):
            index = int(draw.integers(len(self.reader)))
            try:
                # The crop comes from the place alone, whichever image is there.
                return index, self._show(index, _begin(rng, key), out)
            except BadImageError as another:
                on_bad(another)
        raise BadImageError(
            error.key,
            f'{error.reason}; and none of {MAX_DRAWS} others drawn to take its place can be used: '
            'is the folder or disk still there?',
            error.label,
        ) from error


def _begin(rng: np.random.Generator, key: np.ndarray) -> np.random.Generator:
    """Sets a Philox generator to the beginning of a key's sequence: quicker than a new one."""
    rng.bit_generator.state = {
        'bit_generator': 'Philox',
        'state': {'counter': np.zeros(4, np.uint64), 'key': key},
        'buffer': np.zeros(4, np.uint64),
        'buffer_pos': 4,
        'has_uint32': 0,
        'uinteger': 0,
    }
    return rng
