"""Batches: a pure function of seed and step on any number of processes; every test example once."""

import collections
import threading

import numpy as np
import pytest

from vit_jax.data import pipeline
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.sources import Example
from vit_jax.errors import UserError

PP = Preprocess(crop=8)


class Squares:
    """Distinct random images in memory; those in `bad` are broken."""

    class_names = ('even', 'odd')
    exif = False

    def __init__(self, count, bad=()):
        self._images = np.random.RandomState(0).randint(0, 256, (count, 12, 10, 3)).astype(np.uint8)
        self._bad = bad

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        image = b'\xff\xd8 broken' if index in self._bad else self._images[index]
        return Example(image, index % 2, f'square/{index}')


def views(batch):
    """The pixels of each example, by its index."""
    return dict(zip(batch['example'].tolist(), batch['image'], strict=True))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_shapes_types_and_ranges():
    batch = pipeline.train_dataset(Squares(20), PP, batch=6, seed=0)[0]
    assert batch['image'].shape == (6, 8, 8, 3) and batch['image'].dtype == np.float32
    assert 0 <= batch['image'].min() < 50 and 200 < batch['image'].max() <= 255
    for name in ('label', 'position', 'example'):
        assert batch[name].shape == (6,) and batch[name].dtype == np.int32
    assert batch['position'].tolist() == list(range(6))
    assert np.array_equal(batch['label'], batch['example'] % 2)


def test_each_epoch_is_another_permutation():
    dataset = pipeline.train_dataset(Squares(21), PP, batch=6, seed=0)
    order = np.concatenate([dataset[step]['example'] for step in range(14)])  # 4 epochs
    epochs = order.reshape(4, 21)
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_differ_and_repeat():
    def first(seed):
        return pipeline.train_dataset(Squares(50), PP, batch=50, seed=seed)[0]

    assert equal(first(0), first(0))
    assert not np.array_equal(first(0)['example'], first(1)['example'])
    by_example = [views(first(seed)) for seed in (0, 1)]
    assert sum(np.array_equal(by_example[0][i], by_example[1][i]) for i in range(50)) <= 2


def test_crops_differ_between_epochs():
    dataset = pipeline.train_dataset(Squares(10), PP, batch=10, seed=0)
    epochs = [views(dataset[step]) for step in (0, 1)]
    assert not any(np.array_equal(epochs[0][i], epochs[1][i]) for i in range(10))


@pytest.mark.parametrize('count', [2, 4])
def test_same_examples_and_pixels_on_any_number_of_processes(count):
    def dataset(index, count):
        return pipeline.train_dataset(
            Squares(26), PP, batch=12, seed=3, process_index=index, process_count=count
        )

    alone = dataset(0, 1)
    for step in (0, 1, 2, 7):  # 26 examples: batches 2 and 7 cross from one epoch to the next
        parts = [dataset(index, count)[step] for index in range(count)]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert all(len(part['label']) == 12 // count for part in parts)
        order = np.argsort(joined['position'])
        assert equal({key: value[order] for key, value in joined.items()}, alone[step])


def test_source_smaller_than_a_batch():
    batch = pipeline.train_dataset(Squares(3), PP, batch=8, seed=0)[0]
    assert sorted(collections.Counter(batch['example'].tolist()).values()) == [2, 3, 3]


@pytest.mark.parametrize('threads', [1, 3])
def test_reading_ahead_gives_the_same_batches_from_any_step(threads):
    dataset = pipeline.train_dataset(Squares(26), PP, batch=8, seed=3)
    for start in (0, 5):
        with pipeline.train_batches(dataset, start=start, threads=threads) as iterator:
            for step in range(start, start + 6):
                assert equal(next(iterator), dataset[step])


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith('grain-prefetch')]


def test_threads_end_with_the_context():
    dataset = pipeline.train_dataset(Squares(26), PP, batch=8, seed=3)
    with pipeline.train_batches(dataset, start=0, threads=2) as iterator:
        next(iterator)
        next(iterator)
        assert reading_threads()
    with pytest.raises(StopIteration):
        next(iterator)
    for thread in reading_threads():
        thread.join(timeout=20)
    assert not reading_threads()


@pytest.mark.parametrize('threads', [1, 4])
def test_a_broken_image_is_named_by_the_consumer(threads):
    dataset = pipeline.train_dataset(Squares(40, bad=(13,)), PP, batch=4, seed=0)
    with (
        pytest.raises(BadImageError, match='square/13') as caught,
        pipeline.train_batches(dataset, start=0, threads=threads) as iterator,
    ):
        for _ in range(11):
            next(iterator)
    assert caught.value.key == 'square/13'
    with pytest.raises(BadImageError, match='square/13'):
        list(pipeline.eval_batches(Squares(40, bad=(13,)), PP, batch=4, threads=threads))


@pytest.mark.parametrize(
    ('examples', 'batch', 'processes'),
    [(23, 8, 1), (23, 8, 2), (23, 8, 4), (24, 8, 2), (3, 8, 4), (23, 7, 2), (1, 1, 1), (17, 64, 2)],
)
def test_evaluation_sees_every_example_once(examples, batch, processes):
    source, seen, counts = Squares(examples), [], set()
    for index in range(processes):
        mine = list(
            pipeline.eval_batches(
                source, PP, batch=batch, process_index=index, process_count=processes, threads=2
            )
        )
        counts.add(len(mine))
        for part in mine:
            local = -(-batch // processes)
            assert part['image'].shape == (local, 8, 8, 3) and part['image'].dtype == np.float32
            assert part['mask'].dtype == np.float32 and part['label'].dtype == np.int32
            real = part['mask'] == 1
            assert np.array_equal(real, part['example'] >= 0) and set(part['mask']) <= {0, 1}
            assert not part['image'][~real].any() and not part['label'][~real].any()
            for place in np.flatnonzero(real):
                example = source[int(part['example'][place])]
                assert part['label'][place] == example.label
                assert np.array_equal(part['image'][place], PP.evaluate(example.image))
            seen += part['example'][real].tolist()
    assert sorted(seen) == list(range(examples))
    assert len(counts) == 1  # every process takes part in as many collective operations


def test_memory_for_waiting_batches_is_bounded(monkeypatch):
    """At most as many batches are made ahead as fit, however many threads there are."""
    made = []

    class Counted(Squares):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(pipeline, 'MAX_BUFFER_BYTES', 3 * 10 * 8 * 8 * 3 * 4 + 1000)
    dataset = pipeline.train_dataset(Counted(100), PP, batch=10, seed=0)
    with pipeline.train_batches(dataset, start=0, threads=8) as iterator:
        for _ in range(3):
            next(iterator)
        for _ in range(200):
            if len(made) >= 60:
                break
            threading.Event().wait(0.01)
        threading.Event().wait(0.2)
        assert len(made) == 60  # three taken and three waiting


def test_bad_requests():
    with pytest.raises(UserError, match='training set is empty'):
        pipeline.train_dataset(Squares(0), PP, batch=4, seed=0)
    with pytest.raises(UserError, match=r'batch=6 .* number of processes \(4\)'):
        pipeline.train_dataset(Squares(9), PP, batch=6, seed=0, process_count=4)
    with pytest.raises(UserError, match='at least 1'):
        next(pipeline.eval_batches(Squares(9), PP, batch=0))
