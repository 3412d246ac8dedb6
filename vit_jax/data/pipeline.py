"""Batches for training and evaluation, by Grain.

A batch of training is a pure function of (seed, step): `train_dataset(...)[s]` is the batch of step
s, whatever was read before it, on however many processes. So the state of the input is the step
number, and resuming is `start=step`.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

import grain
import numpy as np

from vit_jax.data import workers
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reader import Reader
from vit_jax.data.sources import Source
from vit_jax.data.training import Batch, Load, OnBad, Order, TrainDataset
from vit_jax.errors import UserError

# Host memory for batches that wait for the device. Grain's own default is 500 batches: 150 GB at
# batch 512 and 224 px.
MAX_BUFFER_BYTES = 8 << 30


class OncePerKey:
    """Passes on the first error of each key, one at a time, whichever thread meets it.

    Args:
      on_bad: gets the errors.
    """

    def __init__(self, on_bad: OnBad):
        self._on_bad = on_bad
        self._lock = threading.Lock()
        self._known: set[str] = set()

    def __call__(self, error: BadImageError) -> None:
        """Takes an error of any key."""
        with self._lock:
            if error.key not in self._known:
                self._known.add(error.key)
                self._on_bad(error)


def default_threads() -> int:
    """Threads worth having: one for each processor this process may use, at most 16."""
    return min(
        16,
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1,
    )


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
) -> TrainDataset:
    """An endless sequence of training batches; element s belongs to step s.

    Each pass over the source is a new permutation of it. A batch may cross from one pass to the
    next, and a source smaller than a batch is passed over more than once in it.

    With `on_bad`, another example takes the place of one that cannot be read, drawn from the whole
    source by seed and place alone: the same one on any number of processes, and after resuming.

    Args:
      source: the examples; a `Reader` to keep images in memory.
      preprocess: its views are drawn with a random generator that depends on seed and place in the
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
        `training.MAX_DRAWS` substitutes could not be read either.
    """
    if not len(source):
        raise UserError('the training set is empty')
    if batch < 1 or batch % process_count:
        raise UserError(
            f'batch={batch} must be a multiple of the number of processes ({process_count})'
        )
    order = Order(len(source), batch, seed, process_index, process_count)
    load = Load(_reader(source), preprocess, exact, on_bad is not None)
    return TrainDataset(order, load, None if on_bad is None else OncePerKey(on_bad))


@contextlib.contextmanager
def train_batches(
    dataset: TrainDataset, *, start: int, threads: int | None = None, processes: int = 0
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
        batches = _read_ahead(dataset.batches, start, threads)
    with contextlib.closing(batches) as iterator:
        yield iterator


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
    """All examples once, in batches of one shape; the last ones are filled up with masked padding.

    Every process gets the same number of batches, as collective operations need it.

    Args:
      source: the examples.
      preprocess: its `evaluate` is applied.
      batch: examples in the global batch, over all processes; any size.
      process_index: this process gets the examples process_index, process_index +
        process_count, ...
      process_count: processes that share the work.
      threads: as for `train_batches`.
      on_bad: as for `train_dataset`. None: an image that cannot be read is an error.

    Yields:
      dicts with, for b = batch / process_count, rounded up:
        image: float32 [b, crop, crop, 3] in [0, 255], zeros in padding and where unreadable;
        label: int32 [b], 0 in padding, and where an unreadable record held the label, too;
        mask: float32 [b], 1 for an example, readable or not, 0 for padding;
        readable: float32 [b], 1 for an example whose image could be read, else 0;
        example: int32 [b], index in `source`, -1 in padding.

    Raises:
      UserError: an empty source or batch.
      BadImageError: without `on_bad`, an image that cannot be read, naming it.
    """
    if not len(source):
        raise UserError('the set to evaluate is empty')
    if batch < 1:
        raise UserError(f'the batch to evaluate must have at least 1 example; got {batch}')
    local = -(-batch // process_count)
    count = -(-len(source) // (local * process_count))

    report = None if on_bad is None else OncePerKey(on_bad)
    reader = _reader(source)

    def load(number: int) -> Batch:
        first = number * local * process_count + process_index
        out = {
            'image': np.empty((local, preprocess.crop, preprocess.crop, 3), np.float32),
            'label': np.zeros(local, np.int32),
        }
        indices = range(first, len(source), process_count)[:local]
        padding = local - len(indices)
        mask = np.pad(np.ones(len(indices), np.float32), (0, padding))
        readable = mask.copy()
        for row, index in enumerate(indices):
            try:
                pixels, out['label'][row] = reader.read(index)
            except BadImageError as error:
                if report is None:
                    raise
                report(error)
                out['image'][row], readable[row] = 0, 0
                out['label'][row] = 0 if error.label is None else error.label
            else:
                preprocess.evaluate(pixels, out=out['image'][row])
        out['image'][len(indices) :] = 0
        example = np.int32([*indices, *[-1] * padding])
        return out | {'mask': mask, 'readable': readable, 'example': example}

    dataset = grain.MapDataset.range(count).map(load)
    with contextlib.closing(_read_ahead(dataset, 0, threads or default_threads())) as iterator:
        yield from iterator


def _reader(source: Source | Reader) -> Reader:
    return source if isinstance(source, Reader) else Reader(source)


def _read_ahead(dataset: grain.MapDataset, start: int, threads: int) -> Iterator[Batch]:
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
