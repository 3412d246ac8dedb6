"""Training batches that somebody else makes: tf.data, a PyTorch DataLoader, any iterator."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data.batches import READ_AHEAD, Batch, in_order, reading_threads
from vit_jax.data.decode import pixels_of
from vit_jax.data.examples import CLASS_INDEX, check_class_names, label_dtype
from vit_jax.errors import UserError
from vit_jax.variants import sides


class BatchStream:
    """Batches for training, in place of a source of examples.

    It gives up what a source gives: the batch of a step is whatever the iterator has next, so that
    two runs may differ, and one that is resumed begins with the iterator's first batches again.
    Augmentation is the iterator's, too, but for mirroring (`config.pp.flip`).

    Args:
      batches: an iterable of batches: dicts of images and labels, or pairs of them, as arrays that
        NumPy can read. Images [b, crop, crop, channels], as `decode.pixels_of` takes each; labels
        [b] or [b, C], of the kinds of `own.from_sequence`. All of b examples, `config.batch`
        divided by the number of processes. What can be iterated again (a DataLoader, a
        `tf.data.Dataset`) is, when it ends; an iterator must not end before the run.
      class_names: as many as the model has outputs.
      channels: of the images.
      keys: of image and label in dicts.
      name: what messages call it; default the type of `batches`.

    Attributes:
      class_names: the same.
      channels: the same.
      label_dtype: see `examples.label_dtype_of`.
      spec: of a source the selected examples; here, that they are not known.

    Raises:
      UserError: no batches, or a first one that cannot be used.
    """

    spec = 'batches'

    def __init__(
        self,
        batches: Iterable[Any],
        class_names: Sequence[str],
        *,
        channels: int = 3,
        keys: tuple[str, str] = ('image', 'label'),
        name: str = '',
    ):
        self.class_names = tuple(class_names)
        self.channels = channels
        self._batches = batches
        self._keys = keys
        self._name = name or type(batches).__name__
        check_class_names(self.class_names, self._name)
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise UserError(f'{self._name} has no batches')
        # Of an iterator, the first batch is gone once it was looked at.
        self._begun = itertools.chain([first], iterator) if iterator is batches else None
        self.label_dtype = label_dtype(self._image_and_label(first)[1][0])

    def __repr__(self) -> str:
        return f'batches of {self._name}'

    def fingerprint(self) -> str:
        """Of a source, what tells it from another; of batches, nothing is known."""
        return ''

    def from_step(
        self,
        start: int,
        *,
        batch: int,
        crop: int | tuple[int, int],
        exact: bool,
        process_index: int,
    ) -> Generator[Batch]:
        """Batches as `BatchLoader.from_step` gives them, two ahead, made in a thread.

        Args:
          start: the number of the first step; the iterator does not know it.
          batch: examples that a batch must have.
          crop: side or (height, width) that images must have, pixels.
          exact: whether images are float32; else uint8, rounded.
          process_index: of this process.

        Raises:
          UserError: a batch that does not fit, or the iterator has ended.
        """
        source = self._endless()

        def make(step: int) -> Batch:
            images, labels = self._image_and_label(next(source))
            if len(images) != batch or len(labels) != batch:
                raise UserError(
                    f'{self!r}: {len(images)} images and {len(labels)} labels came, and this '
                    f'process takes {batch} at a time (drop_last or drop_remainder leaves out the '
                    'last, smaller batch)'
                )
            shape = (batch, *sides(crop), self.channels)
            out = np.empty(shape, np.float32 if exact else np.uint8)
            for row, image in enumerate(images):
                pixels = pixels_of(image, key=f'{self._name}/{row}', channels=self.channels)
                if pixels.shape != out.shape[1:]:
                    raise UserError(
                        f'{self!r}: images are {list(pixels.shape)}, and config.pp.crop={crop} '
                        f'asks for {list(out.shape[1:])}'
                    )
                out[row] = pixels if exact else np.rint(pixels)
            rows = np.arange(batch, dtype=np.int32)
            return {
                'image': out,
                'label': labels.astype(self.label_dtype.base),
                'position': process_index * batch + rows,
                'example': step * batch + rows,
                'replaced': np.zeros(batch, np.int32),
            }

        with reading_threads(1) as pool:

            def begin(step: int) -> Callable[[], Batch]:
                return pool.submit(make, step).result

            yield from in_order(begin, itertools.count(start), READ_AHEAD)

    def _endless(self) -> Iterator[Any]:
        if self._begun is None:
            while True:
                yield from self._batches
        yield from self._begun
        raise UserError(
            f'{self!r} has ended before the run: give one that goes on (repeat()), or an iterable '
            'that can be iterated again'
        )

    def _image_and_label(self, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        images, labels = [batch[key] for key in self._keys] if isinstance(batch, Mapping) else batch
        labels = np.asarray(labels)
        if label_dtype(labels[0]) == CLASS_INDEX and not (
            0 <= labels.min() <= labels.max() < len(self.class_names)
        ):
            raise UserError(
                f'{self!r}: labels are in [{labels.min()}, {labels.max()}], and there are '
                f'{len(self.class_names)} classes'
            )
        return np.asarray(images), labels
