"""Training batches: decoded, cropped and read ahead in threads."""

import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Generator

import numpy as np

from vit_jax.data import captions
from vit_jax.data.batches import Batch, Buffers, in_order, reading_threads
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Label, Source
from vit_jax.data.host_augment import HostAugment
from vit_jax.data.preprocess import CropBox, Preprocess
from vit_jax.data.reader import OnBad, Reader, as_reader, default_threads, once_per_key
from vit_jax.data.sampler import Sampler
from vit_jax.errors import UserError

# Draws for a substitute of an unreadable image. Where half of a set is unreadable, one place in
# 2**100 finds none.
MAX_DRAWS = 100
_COLUMNS = ('position', 'example', 'replaced')
# Host memory for batches that wait for the device.
MAX_BUFFER_BYTES = 8 << 30


class BatchLoader:
    """An endless sequence of training batches: `loader[step]` is a function of seed and step alone.

    So the state of the input is the step number, whatever was read before, on however many
    processes. For the order see `Sampler`.

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
      process_index: of this process; its examples are the block at places process_index * b,
        process_index * b + 1, ... of each global batch, with b = batch / process_count.
      process_count: processes that share the work.
      augment: changes each crop, by seed and place in the sequence alone, too.
      repeats: how often an example is in its batch, see `Sampler`.
      balance: classes of the examples, to be equally frequent, see `Sampler`; None for not so.
      on_bad: called with the error of each unreadable image that this process meets, once for each
        key (a `once_per_key` also once over several calls), from the threads that read, one at a
        time; what it raises ends the reading. None: the first such image is an error.

    Raises:
      UserError: an empty source, or a batch that the processes cannot share equally.
    """

    def __init__(
        self,
        source: Source | Reader,
        preprocess: Preprocess,
        *,
        batch: int,
        seed: int,
        exact: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        augment: HostAugment | None = None,
        repeats: int = 1,
        balance: np.ndarray | None = None,
        on_bad: OnBad | None = None,
    ):
        if not len(source):
            raise UserError('the training set is empty')
        if batch < 1 or batch % process_count:
            raise UserError(
                f'batch={batch} must be a multiple of the number of processes ({process_count})'
            )
        self._sampler = Sampler(len(source), batch, seed, repeats=repeats, balance=balance)
        size = batch // process_count
        self._places = range(process_index * size, (process_index + 1) * size)
        self._reader = as_reader(source)
        self._preprocess = preprocess
        self._exact = exact
        self._augment = augment
        self._on_bad = None if on_bad is None else once_per_key(on_bad)
        shape = (size, *preprocess.size, self._reader.channels)
        self._buffers = Buffers(shape, np.float32 if exact else np.uint8)

    def from_step(self, start: int, *, threads: int | None = None) -> Generator[Batch]:
        """Batches start, start + 1, ..., made ahead in threads until the iterator is closed.

        Args:
          start: the first step.
          threads: how many batches are worked on at a time; default `default_threads()`.

        Raises:
          BadImageError: see `__getitem__`.
        """
        threads = threads or default_threads()
        ahead = batches_ahead(self._buffers.nbytes, threads)

        def begin(pool: concurrent.futures.Executor, step: int) -> Callable[[], Batch]:
            return pool.submit(self.__getitem__, step).result

        with reading_threads(min(threads, ahead)) as pool:
            yield from in_order(functools.partial(begin, pool), itertools.count(start), ahead)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, 0-based.

        Returns:
          A dict with, for b = batch / process_count:
            image: float32 [b, *preprocess.size, channels] in [0, 255], or uint8 if not `exact`;
            label: int32 [b]; of other labels than classes float32 [b] or [b, ...]; of captions
              token ids, int32 [b, L], of one that seed and place in the sequence choose;
            position: int32 [b], place in the global batch;
            example: int32 [b], index in `source`, of the substitute where there is one;
            replaced: int32 [b], 1 for a substitute, else 0;
            weight: float32 [b], where the source has weights: divided by their mean.

        Raises:
          BadImageError: an image that cannot be read, naming it: without `on_bad`, or when
            `MAX_DRAWS` substitutes could not be read either.
        """
        items = [self._sampler(step, place) for place in self._places]
        out = {'image': self._buffers.take()}
        out['label'] = np.zeros(len(items), self._reader.label_dtype)
        out |= {name: np.zeros(len(items), np.int32) for name in _COLUMNS}
        rng = np.random.Generator(np.random.Philox(0))
        for row, (position, index, key) in enumerate(items):
            try:
                label = self._show(index, rng, key, out['image'][row])
            except BadImageError as error:
                if self._on_bad is None:
                    raise
                self._on_bad(error)
                index, label = self._substitute(rng, key, error, self._on_bad, out['image'][row])
                out['replaced'][row] = 1
            if np.ndim(label) > out['label'].ndim - 1:  # several captions
                label = captions.draw(label, key)
            out['label'][row], out['position'][row], out['example'][row] = label, position, index
        if self._reader.weights is not None:
            out['weight'] = self._reader.weights[out['example']]
        return out

    def _show(
        self, index: int, rng: np.random.Generator, key: np.ndarray, out: np.ndarray
    ) -> Label:
        """Writes a random crop of an example, drawn by the key of the place; returns the label."""
        label = self._crop(index, _begin(rng, key), out)
        if self._augment:
            # The counter begins elsewhere: crops are the same with and without.
            self._augment(out, np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 2])))
        return label

    def _crop(self, index: int, rng: np.random.Generator, out: np.ndarray) -> Label:
        if self._exact:
            pixels, label = self._reader.read(index)
            self._preprocess.train(pixels, rng, out)
            return label
        drawn: list[CropBox] = []

        def reduction(height: int, width: int) -> int:
            drawn.append(self._preprocess.draw_box(height, width, rng))
            return drawn[0].reduction()

        pixels, label, size = self._reader.read_reduced(index, reduction)
        self._preprocess.render_uint8(pixels, drawn[0], size, out)
        return label

    def _substitute(
        self,
        rng: np.random.Generator,
        key: np.ndarray,
        error: BadImageError,
        on_bad: OnBad,
        out: np.ndarray,
    ) -> tuple[int, Label]:
        """Index and label of an example that can be read, drawn by the key of the place."""
        # The same key as the crop's; the counter begins elsewhere, so the numbers are others.
        draw = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        for _ in range(MAX_DRAWS):
            index = int(draw.integers(len(self._reader)))
            try:
                # The crop comes from the place alone, whichever image is there.
                return index, self._show(index, rng, key, out)
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


def batches_ahead(batch_bytes: int, threads: int) -> int:
    """How many batches are read ahead: two for each thread, if memory allows.

    That is a quarter of the machine's memory, at most `MAX_BUFFER_BYTES`.
    """
    try:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 4
    except (AttributeError, ValueError):  # Not on every system.
        memory = MAX_BUFFER_BYTES
    return max(1, min(2 * threads, min(memory, MAX_BUFFER_BYTES) // batch_bytes))
