"""Batches for evaluation and inference: every example once, in order."""

import contextlib
from collections.abc import Iterator

import grain
import numpy as np

from vit_jax.data.dataset import Source
from vit_jax.data.decode import BadImageError, load_image
from vit_jax.data.loader import Batch, OnBad, OncePerKey, as_reader, default_threads, read_ahead
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reader import Reader
from vit_jax.errors import UserError


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
    reader = as_reader(source)

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
                load_image(pixels, preprocess, out=out['image'][row])
        out['image'][len(indices) :] = 0
        example = np.int32([*indices, *[-1] * padding])
        return out | {'mask': mask, 'readable': readable, 'example': example}

    dataset = grain.MapDataset.range(count).map(load)
    with contextlib.closing(read_ahead(dataset, 0, threads or default_threads())) as iterator:
        yield from iterator
