"""Which example is at which place: permutations, repeats, balanced classes."""

import collections

import numpy as np
import pytest

from vit_jax import data
from vit_jax.data import loader, own
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.sampler import Sampler


def examples(sampler, steps, batch):
    return np.array([[sampler(step, place)[1] for place in range(batch)] for step in range(steps)])


def keys(sampler, step, batch):
    return [tuple(sampler(step, place)[2].tolist()) for place in range(batch)]


def test_with_repeats_each_example_of_a_batch_is_there_so_often_with_other_keys():
    sampler = Sampler(10, 6, 3, repeats=3)
    order = examples(sampler, 10, 6)
    for batch in order:
        assert sorted(collections.Counter(batch.tolist()).values()) == [3, 3]
        assert (batch[1:] != batch[:-1]).all() and batch[0] != batch[-1]  # partners of mixup
    distinct = order[:, :2].reshape(-1)  # 20: two passes over the set
    assert sorted(distinct[:10]) == sorted(distinct[10:]) == list(range(10))
    assert len(set(keys(sampler, 0, 6))) == 6
    np.testing.assert_array_equal(distinct, examples(Sampler(10, 2, 3), 10, 2).reshape(-1))


def test_classes_are_equally_frequent_and_their_examples_too():
    labels = np.array([7, 0, 0, 3, 0, 0, 0, 3, 0])  # class 7 has one example, classes 1, 2 none
    sampler = Sampler(9, 4, 0, balance=labels)
    order = examples(sampler, 27, 4).reshape(-1)  # 108 = 36 of each class
    for start in range(0, 108, 3):
        assert sorted(labels[order[start : start + 3]]) == [0, 3, 7]
    counts = collections.Counter(order.tolist())
    assert counts[0] == 36 and counts[3] == counts[7] == 18
    assert all(counts[index] == 6 for index in (1, 2, 4, 5, 6, 8))
    orders = {tuple(labels[order[start : start + 3]]) for start in range(0, 108, 3)}
    assert len(orders) == 6
    again = examples(Sampler(9, 4, 0, balance=labels), 27, 4).reshape(-1)
    np.testing.assert_array_equal(order, again)
    assert (examples(Sampler(9, 4, 1, balance=labels), 27, 4).reshape(-1) != order).any()


@pytest.mark.parametrize('options', [{'repeats': 2}, {'balance': np.arange(26) % 3 % 2}])
def test_batches_are_the_same_on_any_number_of_processes(options):
    pixels = np.random.default_rng(0).integers(0, 256, (26, 12, 10, 3)).astype(np.uint8)
    source = own.as_selection(data.from_arrays(pixels, np.arange(26) % 2, ('a', 'b')), 'train')

    def dataset(index, count):
        return loader.BatchLoader(
            source, Preprocess(crop=8), batch=12, seed=3,
            process_index=index, process_count=count, **options,
        )  # fmt: skip

    for step in (0, 5):
        alone = dataset(0, 1)[step]
        parts = [dataset(index, 3)[step] for index in range(3)]
        for name in alone:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), alone[name])
    if 'repeats' in options:
        np.testing.assert_array_equal(alone['example'][:6], alone['example'][6:])
        assert all(
            not np.array_equal(a, b)
            for a, b in zip(alone['image'][:6], alone['image'][6:], strict=True)
        )
