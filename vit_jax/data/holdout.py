"""Which examples are held out: by rule, of every class, the same every time."""

import warnings
from collections.abc import Sequence

import numpy as np

from vit_jax.errors import UserError, extra

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
    by_class = np.argsort(labels, kind='stable')
    for label, count, end in zip(*counts, np.cumsum(counts[1]), strict=True):
        members = by_class[end - count : end]
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


def choose_groups(labels: np.ndarray, groups: np.ndarray, share: float) -> np.ndarray:
    """Which examples to hold out, where a group is held out as a whole or not at all.

    Of `folds`, up to 20, as many as are about the share, one at least.

    Args:
      labels: int [examples].
      groups: [examples], what each belongs to.
      share: above 0, at most 0.5.

    Returns:
      Their indices, int [n], increasing.

    Raises:
      UserError: a single group.
    """
    most = np.unique(labels, return_counts=True)[1].max()
    number = int(min(20, len(np.unique(groups)), most))
    if number < 2:
        raise UserError(
            f'all {len(labels):,} examples are of one group, or each of a class of its own, so '
            'that none can be held out: name splits that are held apart'
        )
    return np.flatnonzero(folds(labels, groups, number) < max(1, round(share * number)))


def folds(labels: np.ndarray, groups: np.ndarray | None, number: int) -> np.ndarray:
    """The fold of each example, for cross-validation; the same every time.

    By scikit-learn's `StratifiedKFold` or, with groups, `StratifiedGroupKFold`, shuffled with seed
    0: the folds have about the same share of each class, and a group is in one of them.

    Args:
      labels: int [examples].
      groups: [examples], what each belongs to; None for nothing.
      number: of folds, 2 or more.

    Returns:
      int [examples] in [0, number).

    Raises:
      UserError: more folds than groups, or than examples of the largest class.
    """
    with extra('train'):
        from sklearn import model_selection

    counts = np.unique(labels, return_counts=True)[1]
    for count, what in (
        (counts.max(), 'images of the largest class'),
        (number if groups is None else len(np.unique(groups)), 'groups'),
    ):
        if count < number:
            raise UserError(f'{number} folds of {count:,} {what}: use fewer of them')
    kind = model_selection.StratifiedGroupKFold
    kind = model_selection.StratifiedKFold if groups is None else kind
    found = np.empty(len(labels), np.int64)
    with warnings.catch_warnings():  # that a class has fewer examples than there are folds
        warnings.filterwarnings('ignore', 'The least populated class', UserWarning)
        splitter = kind(number, shuffle=True, random_state=0)
        for fold, (_, chosen) in enumerate(splitter.split(labels, labels, groups)):
            found[chosen] = fold
    return found


def strata(labels: np.ndarray) -> np.ndarray:
    """Classes to be held in proportion, of labels of another kind.

    Args:
      labels: [examples] or [examples, C]: of several classes, 0 or 1, or numbers.

    Returns:
      int [examples]: the rarest class that an image has, C where it has none; of numbers the fifth
      of all examples that the first number is in.
    """
    labels = labels.reshape(len(labels), -1)
    if np.isin(labels, (0, 1)).all():
        by_rarity = np.argsort(labels.sum(axis=0), kind='stable')
        there = labels[:, by_rarity] > 0
        return np.where(there.any(axis=1), by_rarity[there.argmax(axis=1)], labels.shape[1])
    first = labels[:, 0]
    return np.searchsorted(np.quantile(first, (0.2, 0.4, 0.6, 0.8)), first)


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
