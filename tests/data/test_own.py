"""Own data: arrays, lists, and datasets and batches of other libraries."""

import concurrent.futures
import contextlib
import io
import itertools
import types

import numpy as np
import pytest
from PIL import Image

from vit_jax import data
from vit_jax.data import own
from vit_jax.data.batches import eval_batches
from vit_jax.data.examples import CLASS_INDEX, Example
from vit_jax.data.loader import BatchLoader
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

RNG = np.random.RandomState(0)
PIXELS = RNG.randint(0, 256, (12, 20, 24, 3)).astype(np.uint8)
LABELS = np.arange(12) % 3
NAMES = ('a', 'b', 'c')
PP = Preprocess(crop=16)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def first_batch(source, **options):
    return BatchLoader(source, PP, batch=8, seed=0, **options)[0]


def test_the_same_images_in_every_form_give_the_same_batches(tmp_path):
    for index, pixels in enumerate(PIXELS):
        (tmp_path / f'{index}.png').write_bytes(png(pixels))
    paths = [tmp_path / f'{index}.png' for index in range(12)]
    pictures = [Image.open(path) for path in paths]
    expected = first_batch(data.from_arrays(PIXELS, LABELS))
    assert expected['label'].tolist() == LABELS[expected['example']].tolist()
    assert expected['label'].dtype == np.int32
    forms = {
        'paths': data.from_sequence(paths, LABELS),
        'texts': data.from_sequence([str(path) for path in paths], list(LABELS)),
        'bytes': data.from_sequence([png(pixels) for pixels in PIXELS], LABELS),
        'PIL': data.from_sequence(pictures, LABELS),
        'list of arrays': data.from_sequence(list(PIXELS), LABELS),
        'pairs': data.from_sequence(list(zip(PIXELS, LABELS, strict=True)), class_names=NAMES),
        'dicts': data.from_sequence(
            [{'img': i, 'fine': int(j)} for i, j in zip(pictures, LABELS, strict=True)],
            class_names=NAMES,
            keys=('img', 'fine'),
        ),
        'floats': data.from_arrays(PIXELS / np.float64(255), LABELS),
    }
    for form, source in forms.items():
        assert len(source) == 12, form
        found = first_batch(source)
        for name in ('label', 'example', 'position', 'replaced'):
            assert np.array_equal(found[name], expected[name]), (form, name)
        np.testing.assert_allclose(found['image'], expected['image'], atol=1e-3, err_msg=form)
    for picture in pictures:
        picture.close()
    assert forms['paths'][3].key == str(paths[3]) and forms['PIL'][3].key == 'list/3'
    assert forms['PIL'].class_names == ('class 0', 'class 1', 'class 2')
    assert forms['bytes'].labels().tolist() == LABELS.tolist()


@pytest.mark.parametrize('channels', [1, 2, 4, 13])
def test_images_of_any_number_of_channels(channels):
    images = RNG.rand(12, 20, 24, channels).astype(np.float32)
    for exact in (True, False):
        source = data.from_arrays(images, LABELS, channels=channels)
        batch = first_batch(source, exact=exact)
        assert batch['image'].shape == (8, 16, 16, channels)
        assert batch['image'].dtype == (np.float32 if exact else np.uint8)
    one = [data.from_arrays(images[..., i : i + 1], LABELS, channels=1) for i in range(channels)]
    whole = next(eval_batches(source, PP, batch=12))['image']
    parts = [next(eval_batches(part, PP, batch=12))['image'] for part in one]
    np.testing.assert_allclose(whole, np.concatenate(parts, -1), atol=1e-3)
    assert 200 < whole.max() <= 255


def test_grey_images_without_a_channel_axis():
    grey = data.from_arrays(PIXELS[..., 0], LABELS)
    assert first_batch(grey)['image'].shape == (8, 16, 16, 3)
    one = data.from_arrays(PIXELS[..., 0], LABELS, channels=1)
    assert np.array_equal(first_batch(one)['image'], first_batch(grey)['image'][..., :1])


def test_labels_that_are_vectors_or_numbers():
    several = np.eye(3, dtype=int)[LABELS] | np.eye(3, dtype=int)[::-1][LABELS]
    for labels in (several, several / 2):
        for source in (
            data.from_arrays(PIXELS, labels),
            data.from_sequence(list(zip(PIXELS, labels, strict=True))),
        ):
            batch = first_batch(source)
            assert batch['label'].dtype == np.float32
            assert np.array_equal(batch['label'], labels[batch['example']].astype(np.float32))
            assert len(source.class_names) == 3 and source.labels() is None
            parts = list(eval_batches(source, PP, batch=7))
            assert [part['label'].shape for part in parts] == [(7, 3), (7, 3)]
            assert not parts[1]['label'][5:].any()
    source = data.from_arrays(PIXELS, LABELS / 10)
    assert source.class_names == ('value',)
    batch = first_batch(source)
    assert batch['label'].dtype == np.float32 and batch['label'].shape == (8,)
    assert np.array_equal(batch['label'], (LABELS / 10)[batch['example']].astype(np.float32))


def test_datasets_of_other_libraries_tell_their_classes():
    class Cifar(list):  # as torchvision's
        classes = ['cat', 'dog', 'cow']

    class Beans(list):  # as Hugging Face's
        features = {'labels': types.SimpleNamespace(names=['cat', 'dog', 'cow'])}

    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    pairs = Cifar(zip(pictures, LABELS.tolist(), strict=True))
    dicts = Beans({'image': i, 'labels': j} for i, j in pairs)
    for source in (
        data.from_sequence(pairs),
        data.from_sequence(dicts, keys=('image', 'labels')),
    ):
        assert source.class_names == ('cat', 'dog', 'cow')
        assert source[4].label == 1
    assert repr(data.from_sequence(pairs)) == 'Cifar all (12 examples)'
    assert data.from_sequence(pairs, name='mine')[2].key == 'mine/2'


def test_a_dataset_and_a_loader_of_pytorch():
    torch = pytest.importorskip('torch')
    square = PIXELS[:, :16, :16]
    tensors = torch.from_numpy(square / np.float32(255)).permute(0, 3, 1, 2)  # as of ToTensor
    dataset = torch.utils.data.TensorDataset(tensors, torch.from_numpy(LABELS))
    source = data.from_sequence(dataset, class_names=NAMES)
    found, expected = first_batch(source), first_batch(data.from_arrays(square, LABELS))
    np.testing.assert_allclose(found['image'], expected['image'], atol=1e-3)
    assert np.array_equal(found['label'], expected['label'])
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    batches = take(data.BatchStream(loader, NAMES), 4)
    np.testing.assert_allclose(batches[1]['image'], square[4:8], atol=1e-3)
    assert np.array_equal(batches[3]['image'], batches[0]['image'])  # from the beginning again


def test_what_is_known_of_the_data_is_in_its_fingerprint():
    def of(labels=LABELS, **options):
        return data.from_arrays(PIXELS, labels, NAMES, **options).fingerprint()

    assert of() == of()
    different = [of(), of(labels=LABELS[::-1]), of(fingerprint='v2'), of(labels=LABELS / 2)]
    assert len(set(different)) == 4
    assert data.from_arrays(PIXELS[:9], LABELS[:9], NAMES).fingerprint() not in different
    assert of(weights=np.ones(12)) not in different


def test_weights_are_in_the_batches_divided_by_their_mean():
    weights = np.arange(12)
    train = data.from_arrays(PIXELS, LABELS, NAMES, weights=weights)
    batch = BatchLoader(train, Preprocess(crop=8), batch=6, seed=0)[0]
    assert batch['weight'].dtype == np.float32
    np.testing.assert_allclose(batch['weight'], batch['example'] / 5.5)
    plain = data.from_arrays(PIXELS, LABELS, NAMES)
    assert 'weight' not in BatchLoader(plain, Preprocess(crop=8), batch=6, seed=0)[0]
    for wrong in (np.ones(11), -np.ones(12), [np.nan] * 12, ['a'] * 12):
        with pytest.raises(UserError, match='12 numbers from 0 on'):
            data.from_arrays(PIXELS, LABELS, NAMES, weights=wrong)
    with pytest.raises(UserError, match='all weights .* are 0'):
        BatchLoader(
            data.from_arrays(PIXELS, LABELS, NAMES, weights=np.zeros(12)),
            Preprocess(crop=8), batch=6, seed=0,
        )  # fmt: skip


def test_two_sources_have_nothing_in_common():
    first, second = (data.from_arrays(PIXELS, LABELS) for _ in range(2))
    assert first.overlap(second) == 0 and first.overlap(first) == 12


def test_reading_in_many_threads_gives_what_one_reads():
    pictures = [Image.open(io.BytesIO(png(pixels))) for pixels in PIXELS]  # read when asked for
    source = data.from_sequence(pictures, LABELS)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loader = BatchLoader(source, PP, batch=8, seed=0)
        found = list(pool.map(loader.__getitem__, range(12)))
    plain = BatchLoader(data.from_arrays(PIXELS, LABELS), PP, batch=8, seed=0)
    for step, batch in enumerate(found):
        assert np.array_equal(batch['image'], plain[step]['image'])


class Plain:
    """A source of one's own: a length, [] and two attributes."""

    class_names = NAMES
    exif = False

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return Example(PIXELS[index], np.eye(3)[LABELS[index]], f'plain/{index}')


def test_any_source_becomes_a_selection():
    source = own.as_selection(Plain(), 'sources[0]')
    assert source.label_dtype == np.dtype((np.float32, (3,))) and source.channels == 3
    assert np.array_equal(first_batch(source)['label'], first_batch(Plain())['label'])
    assert own.as_selection(source, 'x') is source
    assert 'weight' not in first_batch(source)
    weighted = type('Weighted', (Plain,), {'weights': lambda self: np.arange(len(self))})()
    batch = first_batch(own.as_selection(weighted, 'sources[0]'))
    np.testing.assert_allclose(batch['weight'], batch['example'] / np.arange(len(Plain())).mean())
    assert own.as_selection(weighted, 'x').fingerprint() != source.fingerprint()
    with pytest.raises(UserError, match=r'sources\[1\]: list is no source.*class_names, exif'):
        own.as_selection([1, 2], 'sources[1]')


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: data.from_arrays(PIXELS * 1.0, LABELS), r'arrays/0: floats must be in \[0, 1\]'),
        (lambda: data.from_arrays(PIXELS[0, 0], LABELS), 'one array'),
        (lambda: data.from_arrays(PIXELS[..., :2], LABELS), r'channels=C'),
        (lambda: data.from_arrays(PIXELS, LABELS[:5]), 'must be 12 numbers'),
        (lambda: data.from_arrays(PIXELS, [NAMES[i] for i in LABELS]), 'must be 12 numbers'),
        (lambda: data.from_arrays(PIXELS, LABELS[:, None]), r'labels\[:, 0\]'),
        (lambda: data.from_arrays(PIXELS, LABELS - 1), '-1 is not the index of a class'),
        (lambda: data.from_arrays(PIXELS, LABELS, ('a', 'b')), '2 is not the index.*2 classes'),
        (lambda: data.from_arrays(PIXELS, LABELS * np.nan), 'not finite'),
        (lambda: data.from_arrays(PIXELS, LABELS * 0), 'one class only'),
        (lambda: data.from_arrays(PIXELS[:0], LABELS[:0]), 'no examples'),
        (lambda: data.from_sequence(iter(PIXELS), LABELS), 'no length.*data.BatchStream'),
        (lambda: data.from_sequence(PIXELS), r'neither a pair .* but ndarray'),
        (lambda: data.from_sequence([(PIXELS[0], 1)]), 'does not tell its classes'),
        (lambda: data.from_sequence([(PIXELS[0], 'cat')], class_names=NAMES), "got 'cat'"),
        (lambda: data.from_sequence([{'x': 1, 'image': 2}]), r'has no label, only x, image'),
        (lambda: data.from_arrays(PIXELS, np.zeros((12, 2, 2))), r'\[2, 2\]: class_names'),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert '\n' not in str(caught.value)


def test_a_label_of_another_kind_is_refused_when_it_is_read():
    items = [(PIXELS[0], label) for label in (1, 0.5, 7, [0, 1])]
    source = data.from_sequence(items, class_names=NAMES)
    assert source[0].label == 1
    for index, words in ((1, 'label is 0.5'), (2, '7 is not the index'), (3, 'of one kind')):
        with pytest.raises(UserError, match=f'list/{index}: .*{words}'):
            source[index]


def take(stream, count, crop=16, **options):
    options = {'batch': 4, 'crop': crop, 'exact': True, 'process_index': 0, **options}
    with contextlib.closing(stream.from_step(0, **options)) as batches:
        return list(itertools.islice(batches, count))


def pieces(size=4, end=None):
    images, labels = PIXELS[:, :16, :16], LABELS
    for start in range(0, end or 12, size):
        yield {'image': images[start : start + size], 'label': labels[start : start + size]}


def test_a_stream_gives_what_the_loop_takes():
    loaded = first_batch(data.from_arrays(PIXELS, LABELS))
    for batches in (list(pieces()), pieces()):
        stream = data.BatchStream(batches, NAMES)
        assert stream.label_dtype == CLASS_INDEX
        first, second, third = take(stream, 3, process_index=1)
        assert first.keys() == loaded.keys()
        assert {name: array.dtype for name, array in first.items()} == {
            name: array.dtype for name, array in loaded.items()
        }
        assert np.array_equal(second['image'], PIXELS[4:8, :16, :16])
        assert np.array_equal(third['label'], LABELS[8:])
        assert first['position'].tolist() == [4, 5, 6, 7]
        assert second['example'].tolist() == [4, 5, 6, 7] and not second['replaced'].any()
    soft = ((batch['image'] / np.float32(255), np.eye(3)[batch['label']]) for batch in pieces())
    batch = take(data.BatchStream(soft, NAMES), 1, exact=False)[0]
    assert np.array_equal(batch['image'], PIXELS[:4, :16, :16]) and batch['image'].dtype == np.uint8
    assert np.array_equal(batch['label'], np.eye(3, dtype=np.float32)[LABELS[:4]])


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: data.BatchStream([], NAMES), 'no batches'),
        (lambda: data.BatchStream(pieces(), NAMES[:2]), r'labels are in \[0, 2\].* 2 classes'),
        (lambda: take(data.BatchStream(pieces(), NAMES), 4), 'ended before the run'),
        (lambda: take(data.BatchStream(list(pieces(5)), NAMES), 1), 'takes 4 at a time'),
        (lambda: take(data.BatchStream(pieces(), NAMES), 1, crop=8), r'pp.crop=8'),
        (
            lambda: take(data.BatchStream([(PIXELS[:4] * 2.0, LABELS[:4])], NAMES), 1),
            r'floats must be in \[0, 1\]',
        ),
    ],
)
def test_batches_that_do_not_fit(make, words):
    with pytest.raises(UserError, match=words):
        make()
