"""Which examples each training batch has."""

import grain
import numpy as np

# Place in the global batch, index of the example, key of its randomness (uint64 [2]).
Item = tuple[int, int, np.ndarray]


class BatchSampler:
    """The examples of this process in each batch: `sampler[step]` is a list of `Item`.

    A process has a block of consecutive places of the global batch. Arguments as for `BatchLoader`.
    """

    def __init__(
        self, examples: int, batch: int, seed: int, process_index: int, process_count: int
    ):
        def place(index: int, example: int) -> tuple[int, int]:
            return index % batch, example

        def draw(item: tuple[int, int], rng: np.random.Generator) -> Item:
            return *item, rng.integers(2**63, size=2, dtype=np.uint64)

        # shuffle before repeat: each epoch is a permutation. Not sliced: an item has the same
        # randomness on any number of processes.
        order = grain.MapDataset.range(examples).seed(seed).shuffle().repeat()
        self._items = order.map_with_index(place).random_map(draw)
        self._batch, self._size = batch, batch // process_count
        self._first = process_index * self._size

    def __getitem__(self, step: int) -> list[Item]:
        first = step * self._batch + self._first
        return [self._items[index] for index in range(first, first + self._size)]
