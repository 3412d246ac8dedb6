"""The cache of images: the same pixels, never more than it has room for, each read once."""

import io
import threading

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vit_jax.data import decode, loader, reader
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Example
from vit_jax.data.preprocess import CropBox, Preprocess

PIXELS = np.random.RandomState(0).randint(0, 256, (12, 40, 48, 3)).astype(np.uint8)
SIZE = PIXELS[0].nbytes + reader._OVERHEAD


class Files:
    """Encoded images, and how often each was asked for."""

    class_names = ('even', 'odd')
    exif = False

    def __init__(self, encode=simplejpeg.encode_jpeg, broken=()):
        self._files = [encode(image) for image in PIXELS]
        self.broken = broken
        self.reads = [0] * len(PIXELS)

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        self.reads[index] += 1
        return Example(
            b'' if index in self.broken else self._files[index], index % 2, f'file/{index}'
        )


def png(image):
    import cv2

    return cv2.imencode('.png', image[..., ::-1])[1].tobytes()


def batches(source, exact, crop=9, count=4):
    dataset = loader.BatchLoader(
        source, Preprocess(crop), batch=8, seed=1, exact=exact, on_bad=lambda error: None
    )
    return [dataset[step] for step in range(count)]


@pytest.mark.parametrize('encode', [simplejpeg.encode_jpeg, png], ids=['jpeg', 'png'])
@pytest.mark.parametrize('exact', [True, False])
def test_batches_are_the_same_with_and_without_cache(encode, exact):
    expected = batches(Files(encode, broken=(3,)), exact)
    for room in (0, 5, 100):
        cache = reader.ImageCache(room * SIZE)
        found = batches(reader.Reader(Files(encode, broken=(3,)), cache), exact)
        for kept, plain in zip(found, expected, strict=True):
            assert kept.keys() == plain.keys()
            for name in kept:
                assert kept[name].dtype == plain[name].dtype
                assert np.array_equal(kept[name], plain[name])
        assert cache.used <= cache.size
        if exact:
            assert cache.used == min(room, 11) * SIZE


def test_what_is_kept_is_not_read_again_and_what_does_not_fit_is():
    source = Files(broken=(3,))
    images = reader.Reader(source, reader.ImageCache(5 * SIZE))
    for _ in range(4):
        for index in range(len(source)):
            if index == 3:
                with pytest.raises(BadImageError, match='file/3') as caught:
                    images.read(index)
                assert caught.value.label == 1
                continue
            pixels, label = images.read(index)
            expected = decode.decode(source._files[index], key='')
            assert np.array_equal(pixels, expected) and label == index % 2
    assert source.reads == [1, 1, 1, 4, 1, 1] + [4] * 6


def test_readers_share_the_room_and_threads_do_not_take_it_twice():
    cache = reader.ImageCache(20 * SIZE)
    first, second = reader.Reader(Files(), cache), reader.Reader(Files(), cache)
    barrier = threading.Barrier(4)

    def read_all():
        barrier.wait()
        for index in range(len(PIXELS)):
            first.read(index)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.used == 12 * SIZE
    for index in range(len(PIXELS)):
        second.read(index)
    assert cache.used == 20 * SIZE


def test_pixels_that_are_in_memory_anyway_take_no_room():
    class InMemory(Files):
        def __getitem__(self, index):
            return Example(PIXELS[index], 0, str(index))

    cache = reader.ImageCache(100 * SIZE)
    images = reader.Reader(InMemory(), cache)
    assert np.array_equal(images.read(5)[0], PIXELS[5]) and cache.used == 0


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('height, width', [(601, 803), (604, 801), (608, 800)])
def test_reduced_images_are_where_the_whole_ones_are(orientation, height, width):
    """The last row and column of a reduced image stand for less, and EXIF may turn them."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x / width * 255, y / height * 255, (np.sin(x / 40) + 1) * 127], -1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, 'JPEG', quality=95, exif=exif)

    class Source:
        exif, class_names = True, ('a', 'b')

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Example(out.getvalue(), 0, 'x')

    pp, drawn = Preprocess(crop=64), []

    def reduction(high, wide):
        drawn.append(CropBox(0, 0, high, wide, (64, 64)))
        return drawn[0].reduction()

    reduced, _, size = reader.Reader(Source()).read_reduced(0, reduction)
    whole = decode.decode(out.getvalue(), key='x', exif=True)
    assert size == whole.shape[:2]
    if orientation in (1, 5) or (height % 8, width % 8) == (0, 0):
        assert len(reduced) < len(whole) / 7
    found = pp.render_uint8(reduced, drawn[0], size, np.empty((64, 64, 3), np.uint8))
    expected = cv2.resize(whole, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(float) - expected).mean() < 1.2
