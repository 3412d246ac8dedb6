"""Batches: a pure function of seed and step on any number of processes; every test example once."""

import collections
import contextlib
import pathlib
import threading

import jax
import numpy as np
import pytest

from vit_jax.data import loader, reader
from vit_jax.data.batches import eval_batches
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import CLASS_INDEX, Example
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

PP = Preprocess(crop=8)


class Squares:
    """Distinct random images in memory; those in `bad` are broken."""

    class_names = ('even', 'odd')
    exif = False
    label_dtype = CLASS_INDEX

    def __init__(self, count, bad=()):
        self._images = np.random.RandomState(0).randint(0, 256, (count, 12, 10, 3)).astype(np.uint8)
        self._bad = bad

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        image = b'\xff\xd8 broken' if index in self._bad else self._images[index]
        return Example(image, index % 2, f'square/{index}')


def pixels_by_example(batch):
    """The pixels of each example, by its index."""
    return dict(zip(batch['example'].tolist(), batch['image'], strict=True))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_shapes_types_and_ranges():
    batch = loader.BatchLoader(Squares(20), PP, batch=6, seed=0)[0]
    assert batch['image'].shape == (6, 8, 8, 3) and batch['image'].dtype == np.float32
    assert 0 <= batch['image'].min() < 50 and 200 < batch['image'].max() <= 255
    for name in ('label', 'position', 'example'):
        assert batch[name].shape == (6,) and batch[name].dtype == np.int32
    assert batch['position'].tolist() == list(range(6))
    assert np.array_equal(batch['label'], batch['example'] % 2)


def test_each_epoch_is_another_permutation():
    dataset = loader.BatchLoader(Squares(21), PP, batch=6, seed=0)
    order = np.concatenate([dataset[step]['example'] for step in range(14)])  # 4 epochs
    epochs = order.reshape(4, 21)
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_differ_and_repeat():
    def first(seed):
        return loader.BatchLoader(Squares(50), PP, batch=50, seed=seed)[0]

    assert equal(first(0), first(0))
    assert not np.array_equal(first(0)['example'], first(1)['example'])
    by_example = [pixels_by_example(first(seed)) for seed in (0, 1)]
    assert sum(np.array_equal(by_example[0][i], by_example[1][i]) for i in range(50)) <= 2


def test_crops_differ_between_epochs():
    dataset = loader.BatchLoader(Squares(10), PP, batch=10, seed=0)
    epochs = [pixels_by_example(dataset[step]) for step in (0, 1)]
    assert not any(np.array_equal(epochs[0][i], epochs[1][i]) for i in range(10))


@pytest.mark.parametrize('count', [2, 4])
def test_same_examples_and_pixels_on_any_number_of_processes(count):
    def dataset(index, count):
        return loader.BatchLoader(
            Squares(26), PP, batch=12, seed=3, process_index=index, process_count=count
        )

    alone = dataset(0, 1)
    for step in (0, 1, 2, 7):  # 26 examples: batches 2 and 7 cross from one epoch to the next
        parts = [dataset(index, count)[step] for index in range(count)]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert all(len(part['label']) == 12 // count for part in parts)
        assert equal(joined, alone[step])  # each has a block of consecutive places


def test_source_smaller_than_a_batch():
    batch = loader.BatchLoader(Squares(3), PP, batch=8, seed=0)[0]
    assert sorted(collections.Counter(batch['example'].tolist()).values()) == [2, 3, 3]


@pytest.mark.parametrize('threads', [1, 3])
def test_reading_ahead_gives_the_same_batches_from_any_step(threads):
    dataset = loader.BatchLoader(Squares(26), PP, batch=8, seed=3)
    for start in (0, 5):
        with contextlib.closing(dataset.from_step(start, threads=threads)) as iterator:
            for step in range(start, start + 6):
                assert equal(next(iterator), dataset[step])


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith('read-images')]


def test_threads_end_with_the_context():
    dataset = loader.BatchLoader(Squares(26), PP, batch=8, seed=3)
    with contextlib.closing(dataset.from_step(0, threads=2)) as iterator:
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
    dataset = loader.BatchLoader(Squares(40, bad=(13,)), PP, batch=4, seed=0)
    with (
        pytest.raises(BadImageError, match='square/13') as caught,
        contextlib.closing(dataset.from_step(0, threads=threads)) as iterator,
    ):
        for _ in range(11):
            next(iterator)
    assert caught.value.key == 'square/13'
    with pytest.raises(BadImageError, match='square/13'):
        list(eval_batches(Squares(40, bad=(13,)), PP, batch=4, threads=threads))


BAD = (0, 7, 13, 25)


def substituted(count, seed=3, steps=(0, 1, 2, 7), bad=BAD, on_bad=None):
    """Batches of some steps, of 26 examples of which some are bad, joined over the processes."""
    parts = [
        loader.BatchLoader(
            Squares(26, bad=bad),
            PP,
            batch=12,
            seed=seed,
            process_index=index,
            process_count=count,
            on_bad=on_bad or (lambda error: None),
        )
        for index in range(count)
    ]
    for step in steps:
        batches = [part[step] for part in parts]
        joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        order = np.argsort(joined['position'])
        yield {key: value[order] for key, value in joined.items()}


def test_a_substitute_takes_the_place_of_a_bad_image():
    steps = range(13)  # six passes over 26 examples, so each bad one has been met six times
    places = 0
    for batch, good in zip(
        substituted(1, steps=steps), substituted(1, steps=steps, bad=()), strict=True
    ):
        replaced = batch['replaced'] == 1
        assert batch['replaced'].dtype == np.int32 and set(batch['replaced']) <= {0, 1}
        assert not good['replaced'].any()
        assert np.array_equal(replaced, np.isin(good['example'], BAD))
        assert not np.isin(batch['example'], BAD).any()
        assert np.array_equal(batch['label'], batch['example'] % 2)
        # Nobody else notices.
        for key in batch:
            assert np.array_equal(batch[key][~replaced], good[key][~replaced])
        places += replaced.sum()
    assert places == 6 * len(BAD)


def test_pixels_are_those_of_the_substitute():
    class Grey(Squares):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            if index not in self._bad:
                example.image[...] = 9 * index
            return example

    dataset = loader.BatchLoader(Grey(26, bad=BAD), PP, batch=26, seed=3, on_bad=lambda error: None)
    batch = dataset[0]
    assert batch['replaced'].sum() == len(BAD)
    grey = np.broadcast_to(batch['example'][:, None, None, None] * 9, batch['image'].shape)
    assert np.array_equal(batch['image'], grey)


@pytest.mark.parametrize('count', [2, 4])
def test_substitutes_are_the_same_on_any_number_of_processes(count):
    for batch, alone in zip(substituted(count), substituted(1), strict=True):
        assert equal(batch, alone)


def test_substitutes_depend_on_the_seed_and_are_the_same_after_resuming():
    drawn = [
        np.concatenate([b['example'][b['replaced'] == 1] for b in substituted(1, seed, range(13))])
        for seed in (3, 3, 4)
    ]
    assert np.array_equal(drawn[0], drawn[1]) and len(set(drawn[0])) > 8
    assert not np.array_equal(drawn[0], drawn[2])
    dataset = loader.BatchLoader(
        Squares(26, bad=BAD), PP, batch=12, seed=3, on_bad=lambda error: None
    )
    whole = list(substituted(1, steps=range(9)))
    with contextlib.closing(dataset.from_step(5, threads=3)) as iterator:
        for step in range(5, 9):
            assert equal(next(iterator), whole[step])


def test_a_substitute_may_be_bad_as_well():
    bad = tuple(range(1, 26))  # one good image for a batch of 12
    errors = []
    (batch,) = substituted(1, steps=[1], bad=bad, on_bad=errors.append)
    assert set(batch['example']) == {0} and batch['replaced'].sum() >= 11
    assert {error.key for error in errors} == {f'square/{i}' for i in bad}
    assert len(errors) == len(bad)
    crops = {image.tobytes() for image in batch['image']}
    assert len(crops) == 12  # each place has its own crop


def test_without_any_readable_image_the_first_bad_one_is_named(monkeypatch):
    reads = []

    class Counted(Squares):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    source = Counted(26, bad=range(26))
    dataset = loader.BatchLoader(source, PP, batch=4, seed=0, on_bad=lambda error: None)
    with pytest.raises(BadImageError, match=r'none of 100 others .* can be used') as caught:
        dataset[0]
    assert caught.value.key == f'square/{reads[0]}' and len(reads) == 1 + loader.MAX_DRAWS


@pytest.mark.parametrize('threads', [1, 4])
def test_each_bad_key_is_reported_once(threads):
    errors = []
    dataset = loader.BatchLoader(Squares(26, bad=BAD), PP, batch=12, seed=3, on_bad=errors.append)
    with contextlib.closing(dataset.from_step(0, threads=threads)) as iterator:
        for _ in range(20):
            next(iterator)
    assert sorted(error.key for error in errors) == sorted(f'square/{i}' for i in BAD)
    assert all(isinstance(error, BadImageError) and error.reason for error in errors)


def test_once_per_key_over_several_calls():
    errors = []
    once = reader.once_per_key(errors.append)
    for _ in range(2):
        list(eval_batches(Squares(26, bad=BAD), PP, batch=5, on_bad=once))
    assert len(errors) == len(BAD)


@pytest.mark.parametrize('threads', [1, 4])
def test_what_on_bad_raises_ends_the_reading(threads):
    def too_many(error):
        raise UserError('too many unreadable images')

    dataset = loader.BatchLoader(Squares(26, bad=BAD), PP, batch=12, seed=3, on_bad=too_many)
    with (
        pytest.raises(UserError, match='too many'),
        contextlib.closing(dataset.from_step(0, threads=threads)) as iterator,
    ):
        for _ in range(20):
            next(iterator)


@pytest.mark.parametrize('kind', [MemoryError, RuntimeError, SystemExit, KeyboardInterrupt])
def test_the_death_of_a_reading_thread_is_an_error_not_a_wait(kind):
    class Dying(Squares):
        def __getitem__(self, index):
            if index == 13:
                raise kind('the reader of 13')
            return super().__getitem__(index)

    def read():
        for batches in (
            loader.BatchLoader(Dying(40), PP, batch=4, seed=0, on_bad=lambda error: None),
            None,
        ):
            try:
                if batches is None:
                    list(eval_batches(Dying(40), PP, batch=4, threads=3))
                else:
                    with contextlib.closing(batches.from_step(0, threads=3)) as iterator:
                        for _ in range(11):
                            next(iterator)
            except kind as error:
                assert str(error) == 'the reader of 13'
                ended.append(error)

    ended = []
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive() and len(ended) == 2


@pytest.mark.parametrize('processes', [1, 2])
def test_evaluation_marks_what_cannot_be_read(processes):
    errors, seen = [], {}
    for index in range(processes):
        for batch in eval_batches(
            Squares(26, bad=BAD),
            PP,
            batch=8,
            process_index=index,
            process_count=processes,
            on_bad=errors.append,
        ):
            assert batch['readable'].dtype == bool
            for row in np.flatnonzero(batch['example'] >= 0):
                example = int(batch['example'][row])
                assert batch['label'][row] == example % 2
                seen[example] = batch['readable'][row]
    assert seen == {i: i not in BAD for i in range(26)}
    assert sorted(error.key for error in errors) == sorted(f'square/{i}' for i in BAD)


@pytest.mark.parametrize(
    ('examples', 'batch', 'processes'),
    [(23, 8, 1), (23, 8, 2), (23, 8, 4), (24, 8, 2), (3, 8, 4), (23, 7, 2), (1, 1, 1), (17, 64, 2)],
)
def test_evaluation_sees_every_example_once(examples, batch, processes):
    source, seen, counts = Squares(examples), [], set()
    for index in range(processes):
        mine = list(
            eval_batches(
                source, PP, batch=batch, process_index=index, process_count=processes, threads=2
            )
        )
        counts.add(len(mine))
        for part in mine:
            local = -(-batch // processes)
            assert part['image'].shape == (local, 8, 8, 3) and part['image'].dtype == np.float32
            assert part['label'].dtype == part['example'].dtype == np.int32
            real = part['example'] >= 0
            assert not part['image'][~real].any() and not part['label'][~real].any()
            assert np.array_equal(part['readable'], real)
            for place in np.flatnonzero(real):
                example = source[int(part['example'][place])]
                assert part['label'][place] == example.label
                assert np.array_equal(part['image'][place], PP.evaluate(example.image))
            seen += part['example'][real].tolist()
    assert sorted(seen) == list(range(examples))
    assert len(counts) == 1  # every process takes part in as many collective operations


class Photos:
    """The real photos of the fixtures, as they are stored."""

    class_names = ('photo',)
    exif = False

    def __init__(self):
        folder = pathlib.Path(__file__).parents[1] / 'fixtures/data/photos'
        self._files = [path.read_bytes() for path in sorted(folder.glob('*.jpg'))]

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        return Example(self._files[index], 0, str(index))


@pytest.mark.parametrize(
    ('options', 'mean', 'most'),
    # As measured. Where nothing is reduced it is rounding; else what antialiasing makes.
    [
        ({'crop': 48}, 0.27, 0.3),
        ({'crop': 16}, 8.23, 17),
        ({'crop': 40, 'resize': 60, 'inception_crop': False}, 0.27, 0.3),
        ({'crop': 96, 'inception_crop': False}, 0.27, 0.3),
    ],
)
def test_approximate_pixels_of_the_same_crops(monkeypatch, options, mean, most):
    drawn = []
    draw = Preprocess.draw_box

    def note(self, height, width, rng):
        drawn.append((height, width, draw(self, height, width, rng)))
        return drawn[-1][-1]

    monkeypatch.setattr(Preprocess, 'draw_box', note)
    pp, batches, boxes = Preprocess(**options), {}, {}
    for exact in (True, False):
        dataset = loader.BatchLoader(Photos(), pp, batch=12, seed=5, exact=exact)
        drawn.clear()
        batches[exact] = [dataset[step] for step in (0, 1)]
        boxes[exact] = list(drawn)
    assert boxes[True] == boxes[False] and len(drawn) == 24
    differences = []
    for exact, other in zip(batches[True], batches[False], strict=True):
        assert other['image'].dtype == np.uint8 and other['image'].shape == exact['image'].shape
        assert all(np.array_equal(exact[key], other[key]) for key in exact if key != 'image')
        differences.append(np.abs(exact['image'] - other['image']).mean(axis=(1, 2, 3)))
    assert np.max(differences) < most and np.mean(differences) == pytest.approx(mean, rel=0.1)


def test_approximate_batches_from_any_step_and_with_bad_images():
    def dataset(bad=BAD):
        return loader.BatchLoader(
            Squares(26, bad=bad), PP, batch=12, seed=3, exact=False, on_bad=lambda error: None
        )

    whole, good = dataset(), dataset(bad=())
    with contextlib.closing(whole.from_step(2, threads=2)) as iterator:
        for step in (2, 3):
            batch = next(iterator)
            assert equal(batch, whole[step])
            same = batch['replaced'] == 0
            assert np.array_equal(batch['image'][same], good[step]['image'][same])
            assert not same.all() and not np.isin(batch['example'], BAD).any()


def test_memory_for_waiting_batches_is_bounded(monkeypatch):
    """At most as many batches are made ahead as fit, however many threads there are."""
    made = []

    class Counted(Squares):
        def __getitem__(self, index):
            made.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(loader, 'MAX_BUFFER_BYTES', 3 * 10 * 8 * 8 * 3 * 4 + 1000)
    dataset = loader.BatchLoader(Counted(100), PP, batch=10, seed=0)
    with contextlib.closing(dataset.from_step(0, threads=8)) as iterator:
        for _ in range(3):
            next(iterator)
        for _ in range(200):
            if len(made) >= 60:
                break
            threading.Event().wait(0.01)
        threading.Event().wait(0.2)
        assert len(made) == 60  # three taken and three waiting


@pytest.mark.parametrize('keep', [lambda images: images[1:], jax.numpy.asarray])
def test_memory_is_used_again_only_when_nobody_holds_it(keep):
    dataset = loader.BatchLoader(Squares(26), PP, batch=12, seed=3)
    expected = np.array(keep(dataset[0]['image']))
    held = keep(dataset[0]['image'])
    places = {dataset[step]['image'].ctypes.data for step in range(1, 6)}
    assert np.array_equal(held, expected)
    assert len(places) <= 2  # the first call's memory came back, and is used each time


def test_bad_requests():
    with pytest.raises(UserError, match='training set is empty'):
        loader.BatchLoader(Squares(0), PP, batch=4, seed=0)
    with pytest.raises(UserError, match=r'batch=6 .* number of processes \(4\)'):
        loader.BatchLoader(Squares(9), PP, batch=6, seed=0, process_count=4)
    with pytest.raises(UserError, match='at least 1'):
        next(eval_batches(Squares(9), PP, batch=0))
