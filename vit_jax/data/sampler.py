"""Which examples each training batch has."""

import dataclasses

import grain
import numpy as np

# Place in the global batch, index of the example, key of its randomness (uint64 [2]).
Item = tuple[int, int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """Which examples come when, see `loader.train_dataset`."""

    examples: int
    batch: int
    seed: int
    process_index: int
    process_count: int

    def plan(self) -> grain.MapDataset:
        """A dataset whose element s is a list of `Item`, those of batch s."""

        def place(index: int, example: int) -> tuple[int, int]:
            return index % self.batch, example

        def draw(item: tuple[int, int], rng: np.random.Generator) -> Item:
            return *item, rng.integers(2**63, size=2, dtype=np.uint64)

        # shuffle before repeat: each epoch is a permutation. Slicing after random_map: same crops
        # on any process count. The images are made last, in place: fresh memory for each of them,
        # copied into the batch, would take more time than decoding does.
        examples = grain.MapDataset.range(self.examples).seed(self.seed).shuffle().repeat()
        examples = examples.map_with_index(place).random_map(draw)
        mine = examples[self.process_index :: self.process_count]
        return mine.batch(self.batch // self.process_count, batch_fn=list)
