"""Which examples are held out: by rule, of every class, the same every time."""

from collections.abc import Sequence

import numpy as np

# The last tenth of `stratified_order` has an image of each class, if all classes have so many.
SMALL_CLASS = 10


def stratified_order(labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """A fixed shuffled order in which every slice holds each class in proportion.

    Each class is shuffled by itself; then the r-th of the n examples of a class gets the place (r +
    0.5) / n, and all are sorted by it. The last example of a small class, of 2 to 9, gets the place
    0.95, as that of 10, so that the last tenth has it; and where there are small classes, equal
    places are in random order, not in that of the classes.

    Args:
      labels: int [examples].
      seed: of the shuffles.

    Returns:
      int [examples], a permutation of the indices.
    """
    labels = np.asarray(labels)
    place, tie = np.empty(len(labels)), np.zeros(len(labels), np.uint64)
    counts = np.unique(labels, return_counts=True)
    for label, count in zip(*counts, strict=True):
        members = np.flatnonzero(labels == label)
        # Raw bits, because NumPy may change what `permutation` makes of them, and a later version
        # must not move test images into the training set.
        raw = np.random.PCG64([seed, int(label)]).random_raw(count)
        rank = np.argsort(np.argsort(raw))
        place[members] = (rank + 0.5) / count
        if 1 < count < SMALL_CLASS:
            place[members[rank == count - 1]] = 1 - 0.5 / SMALL_CLASS
        tie[members] = raw
    if len(labels) and counts[1].min() >= SMALL_CLASS:
        tie[:] = 0  # as ever
    return np.lexsort((tie, place))


def held_out(labels: np.ndarray) -> int:
    """How many examples at the end of `stratified_order` to test on.

    A tenth of those whose class has two or more, and as many more as it takes to have one of each
    such class.

    Args:
      labels: int [examples], in that order.
    """
    last = {label: place for place, label in enumerate(labels.tolist())}
    counts = np.bincount(labels)
    several = [place for label, place in last.items() if counts[label] > 1]
    tenth = round(sum(counts[counts > 1]) / 10)
    return max([tenth, *(len(labels) - place for place in several)])


def choose(labels: np.ndarray, share: float) -> np.ndarray:
    """Which examples to hold out for validation.

    A share of those whose class has two or more, rounded, each class in proportion; and as many
    more as it takes to have one of each such class. One at least of each class is not held out.

    Args:
      labels: int [examples].
      share: above 0, at most 0.5.

    Returns:
      Their indices, int [n], increasing; none if no class has two.
    """
    counts = np.bincount(labels, minlength=1)
    order = stratified_order(labels)[::-1]
    order = order[counts[labels[order]] > 1]
    _, firsts = np.unique(labels[order], return_index=True)
    rest = np.setdiff1d(np.arange(len(order)), firsts)
    more = max(0, round(share * len(order)) - len(firsts))
    return np.sort(order[np.concatenate([firsts, rest[:more]])])


def coverage_notes(
    class_names: Sequence[str], train: np.ndarray, test: np.ndarray
) -> tuple[str, ...]:
    """Sentences on classes that a model never sees in training, or is never tested on.

    Args:
      class_names: C names, in label order.
      train: int [C], training images of each class.
      test: int [C], test images.
    """
    notes = []
    for missing, what in (
        (train == 0, 'no training images'),
        ((train == 1) & (test == 0), 'a single image, which is trained on, not tested'),
        ((train > 1) & (test == 0), 'no test images'),
    ):
        names = [class_names[label] for label in np.flatnonzero(missing).tolist()]
        if names:
            shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
            notes.append(f'of {len(class_names):,} classes, {len(names):,} with {what}: {shown}')
    return tuple(notes)
