"""Which example is at which place of which training batch: a function of seed and step alone."""

from typing import TYPE_CHECKING

import numpy as np

from vit_jax.errors import extra

if TYPE_CHECKING:
    import grain

# Place in the global batch, index of the example, key of its randomness (uint64 [2]).
Item = tuple[int, int, np.ndarray]


class Sampler:
    """An endless sequence of batches of examples.

    Each pass over the examples is a new permutation of them. A batch may cross from one pass to the
    next, and a set smaller than a batch is passed over more than once in it.

    With `repeats`, a batch has each of its examples so many times, with different randomness:
    repeated augmentation (https://arxiv.org/abs/1902.05509), as DeiT uses it. The copies are far
    from each other, so that mixup does not mix an image with itself.

    With `balance`, all classes are equally frequent: of C classes that have examples, each run of C
    examples has one of each, in random order, and each class goes through permutations of its own.

    Args:
      examples: their number.
      batch: examples in the global batch, a multiple of `repeats`.
      seed: of the order and of the keys.
      repeats: how often an example is in its batch.
      balance: classes of all examples, int [examples], that are to be equally frequent; None to
        take the examples as they are.
    """

    def __init__(
        self,
        examples: int,
        batch: int,
        seed: int,
        *,
        repeats: int = 1,
        balance: np.ndarray | None = None,
    ):
        self._batch, self._distinct = batch, batch // repeats
        self._seed, self._shuffled = seed, _shuffled(examples, seed)
        self._keys = self._shuffled.map_with_index(lambda index, _: index).random_map(_draw_key)
        self._members: list[np.ndarray] = []
        self._orders: dict[int, grain.MapDataset] = {}
        if balance is not None:
            order = np.argsort(balance, kind='stable')
            borders = np.flatnonzero(np.diff(balance[order])) + 1
            self._members = np.split(order, borders)
            self._classes = _shuffled(len(self._members), seed)

    def __call__(self, step: int, place: int) -> Item:
        """What is at a place of the batch of a step, both 0-based."""
        index = step * self._distinct + place % self._distinct
        key = self._keys[step * self._batch + place]
        if not self._members:
            return place, int(self._shuffled[index]), key
        of_class = int(self._classes[index])
        members = self._members[of_class]
        return place, int(members[self._order(of_class)[index // len(self._members)]]), key

    def _order(self, of_class: int) -> 'grain.MapDataset':
        """The endless order of the examples of a class."""
        if of_class not in self._orders:
            seed = (self._seed + 1 + of_class) % 2**31
            self._orders[of_class] = _shuffled(len(self._members[of_class]), seed)
        return self._orders[of_class]


def _shuffled(count: int, seed: int) -> 'grain.MapDataset':
    """0 ... count - 1 in random order, again and again in another one."""
    with extra('train'):
        import grain

    # shuffle before repeat: each epoch is a permutation. Never sliced: an item has the same
    # randomness on any number of processes.
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def _draw_key(_: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(2**63, size=2, dtype=np.uint64)
