"""Training batches: which examples each of them has, and how it is made of them."""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess, View
from vit_jax.data.reader import Reader

Batch = dict[str, np.ndarray]
OnBad = Callable[[BadImageError], None]

# Draws for a substitute of an unreadable image. Where half of a set is unreadable, one place in
# 2**100 finds none.
MAX_DRAWS = 100


class TrainDataset:
    """An endless sequence of training batches, see `pipeline.train_dataset`.

    Pickled, it loses `on_bad`: the other process sends the errors back.

    Args:
      order: which examples.
      load: makes the batch of them.
      on_bad: see `pipeline.train_dataset`.
    """

    def __init__(self, order: 'Order', load: 'Load', on_bad: OnBad | None):
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


_COLUMNS = ('label', 'position', 'example', 'replaced')
_Item = tuple[int, int, np.ndarray]  # place in the global batch, example, key of its randomness


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples come when, see `pipeline.train_dataset`."""

    examples: int
    batch: int
    seed: int
    process_index: int
    process_count: int

    def plan(self) -> grain.MapDataset:
        """A dataset whose element s is a list of `_Item`, those of batch s."""

        def place(index: int, example: int) -> tuple[int, int]:
            return index % self.batch, example

        def draw(item: tuple[int, int], rng: np.random.Generator) -> _Item:
            return *item, rng.integers(2**63, size=2, dtype=np.uint64)

        # shuffle before repeat: each epoch is a permutation. Slicing after random_map: same crops
        # on any process count. The images are made last, in place: fresh memory for each of them,
        # copied into the batch, would take more time than decoding does.
        examples = grain.MapDataset.range(self.examples).seed(self.seed).shuffle().repeat()
        examples = examples.map_with_index(place).random_map(draw)
        mine = examples[self.process_index :: self.process_count]
        return mine.batch(self.batch // self.process_count, batch_fn=list)


@dataclasses.dataclass(frozen=True)
class Load:
    """Makes a batch.

    Attributes:
      reader: of the examples.
      preprocess: what is made of them.
      exact: see `pipeline.train_dataset`.
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
        items: Sequence[_Item],
        on_bad: OnBad | None,
        empty: Callable[..., np.ndarray] = np.empty,
    ) -> Batch:
        """The batch of these examples.

        Args:
          items: of `Order.plan`.
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
        """Writes a view of an example, drawn by `rng`; returns the label."""
        if self.exact:
            pixels, label = self.reader.read(index)
            self.preprocess.train(pixels, rng, out)
            return label
        drawn: list[View] = []

        def reduction(height: int, width: int) -> int:
            drawn.append(self.preprocess.draw_view(height, width, rng))
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
