"""The input pipelines that benchmark_data.py compares.

Setup: `contestant`, `files` (paths of images), `crop` (pixels), `batch`, and `workers`: 0 times the
stages of one image after the other on one thread; else the whole pipeline with so many threads or
processes. A step is all files once.

Every contestant draws its boxes from the same distribution, ours, so that they cut and resize as
many pixels. Pillow resizes with antialiasing: that is the usual way there, with other pixels than
TensorFlow's and ours.
"""

import collections
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks import turns
from vit_jax.data import decode, inception_crop, loader, preprocess, reader
from vit_jax.data.examples import Example
from vit_jax.inference import predict

# Batches that may wait ready, for each worker, in any of the pipelines.
WAITING = 3

# The stages after reading, which is the same for all, by name, in their order: 'decode', 'crop' and
# 'resize' an image, make a 'batch' of a list of them, and 'transfer' it to the device.
Stages = dict[str, Callable[[Any], Any]]
# Starts the whole pipeline: endless batches on the host, of images in shuffled order.
Stream = Callable[[], Iterator[Any]]


def build(setup: Mapping[str, Any]) -> turns.Workload:
    """Makes the workload of a setup, run once."""
    makers = {'torchvision': _torchvision, 'tf.data': _tensorflow}
    workload = Pipeline(setup, *makers.get(setup['contestant'], ours)(setup))
    workload.run(1)
    return workload


class Pipeline:
    """Times the stages of a pipeline, or all of it.

    Args:
      setup: see the top of the file.
      stages: of the pipeline.
      stream: starts it.
    """

    def __init__(self, setup: Mapping[str, Any], stages: Stages, stream: Stream):
        self.facts: Mapping[str, Any] = {}
        self._files, self._batch, self._workers = (
            setup[key] for key in ('files', 'batch', 'workers')
        )
        self._stages: Stages = {'read': decode.read_file, **stages}
        self._stream = stream() if self._workers else None

    def run(self, steps: int) -> dict[str, Any]:
        """See `turns.Workload.run`; reports `timed`, the seconds that count, of the stages or all.

        Of the whole pipeline, batches that were made while nobody waited are taken first and do not
        count: as many as any of the pipelines keeps.
        """
        if not self._stream:
            return {'timed': self._time_stages(steps)}
        for _ in range(WAITING * self._workers):
            next(self._stream)
        start = time.perf_counter()
        for _ in range(steps * len(self._files) // self._batch):
            next(self._stream)
        return {'timed': {'all': time.perf_counter() - start}}

    def _time_stages(self, steps: int) -> dict[str, float]:
        seconds = dict.fromkeys(self._stages, 0.0)

        def timed(name: str, argument: Any) -> Any:
            start = time.perf_counter()
            result = self._stages[name](argument)
            seconds[name] += time.perf_counter() - start
            return result

        for _ in range(steps):
            for first in range(0, len(self._files), self._batch):
                images = []
                for image in self._files[first : first + self._batch]:
                    for name in ('read', 'decode', 'crop', 'resize'):
                        image = timed(name, image)
                    images.append(image)
                timed('transfer', timed('batch', images))
        return seconds

    def peak_memory(self) -> int:
        """See `turns.Workload.peak_memory`."""
        return turns.process_memory()


def ours(setup: Mapping[str, Any]) -> tuple[Stages, Stream]:
    """Our pipeline in threads.

    It comes in four ways: `vit_jax`; with ':exact=False' as with `config.pp.exact=False` (decoded
    to scale, 8 bits); with ':cache' as with `config.cache`, once everything is in it; and with
    ':simulated', where decoding sleeps: what more threads would give if each had a core.
    """
    import cv2
    import jax

    cv2.setNumThreads(0)  # as the pipeline does
    way = setup['contestant'].partition(':')[2]
    exact = way != 'exact=False'
    settings, rng = preprocess.Preprocess(crop=setup['crop']), np.random.default_rng(0)
    shape = (setup['batch'], setup['crop'], setup['crop'], 3)
    free = collections.deque[np.ndarray]()  # the rows of the batch that have no image yet

    def decode_image(image: bytes) -> Any:
        if exact:
            return decode.decode(image, key='', exif=True)
        # The crop box decides how much is decoded, so it is drawn first.
        size = decode.size_of_jpeg(image, exif=True)
        assert size, 'only JPEG files'
        whole = size.height, size.width
        box = settings.draw_box(*whole, rng)
        reduction = min(box.reduction(), size.most)
        return decode.decode(image, key='', exif=True, reduction=reduction), box, whole

    def crop(image: Any) -> Any:
        if not exact:
            return image
        height, width = image.shape[:2]
        return image, settings.draw_box(height, width, rng)

    def resize(item: Any) -> np.ndarray:
        if not free:
            free.extend(np.empty(shape, np.float32 if exact else np.uint8))
        row = free.popleft()
        if exact:
            image, box = item
            return settings.render(image, box, row)
        image, box, size = item
        return settings.render_uint8(image, box, size, row)

    def transfer(batch: Any) -> Any:
        return jax.block_until_ready(jax.device_put(batch, jax.devices()[0]))

    def stream() -> Iterator[Any]:
        cache = reader.ImageCache(64 << 30) if way == 'cache' else None
        source = (Sleeping if way == 'simulated' else predict.Images)(setup['files'])
        batches = loader.BatchLoader(
            reader.Reader(source, cache), settings, batch=setup['batch'], seed=0, exact=exact
        )
        return batches.from_step(0, threads=setup['workers'])

    stages = {'decode': decode_image, 'crop': crop, 'resize': resize}
    return stages | {'batch': lambda rows: rows[0].base, 'transfer': transfer}, stream


class Sleeping(predict.Images):
    """The same, whose decoding takes its time but no processor."""

    def __init__(self, paths: Sequence[str]):
        super().__init__(paths)
        content = decode.read_file(paths[0])
        start = time.perf_counter()
        for _ in range(20):
            self._pixels = decode.decode(content, key='', exif=True)
        self._seconds = (time.perf_counter() - start) / 20

    def __getitem__(self, index: int) -> Example:
        key = super().__getitem__(index).key
        time.sleep(self._seconds)
        return Example(self._pixels, 0, key)


def _torchvision(setup: Mapping[str, Any]) -> tuple[Stages, Stream]:
    """Pillow and torchvision, as in PyTorch's ImageNet example; a DataLoader for the whole."""
    import torch

    from benchmarks import torch_workload

    torch.set_num_threads(1)  # the workers are what is counted
    functional = torch_workload.import_torchvision().transforms.functional
    side, rng = setup['crop'], np.random.default_rng(0)

    def decode_image(image: bytes) -> Any:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert('RGB')

    def crop(image: Any) -> Any:
        y, x, height, width = inception_crop.sample_inception_box(image.height, image.width, rng)
        return functional.crop(image, y, x, height, width)

    def resize(image: Any) -> Any:  # float32 tensor [3, S, S] in [0, 1]
        return functional.to_tensor(functional.resize(image, [side, side]))

    def transfer(batch: Any) -> Any:
        if torch.cuda.is_available():
            batch = batch.cuda()
            torch.cuda.synchronize()
        return batch

    class Photos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(setup['files'])

        def __getitem__(self, index: int) -> Any:
            return resize(crop(decode_image(decode.read_file(setup['files'][index]))))

    def stream() -> Iterator[Any]:
        batches = torch.utils.data.DataLoader(
            Photos(), setup['batch'], shuffle=True, num_workers=setup['workers'], drop_last=True,
            persistent_workers=True,
        )  # fmt: skip
        while True:
            yield from batches

    stages = {'decode': decode_image, 'crop': crop, 'resize': resize}
    return stages | {'batch': torch.stack, 'transfer': transfer}, stream


def _tensorflow(setup: Mapping[str, Any]) -> tuple[Stages, Stream]:
    """tf.io, tf.image and tf.data, as in the original release; EXIF is ignored."""
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    threads, side = setup['workers'] or 1, setup['crop']
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)

    def decode_image(image: Any) -> Any:
        return tf.io.decode_image(image, channels=3, expand_animations=False)

    def crop(image: Any) -> Any:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=(inception_crop.MIN_AREA, inception_crop.MAX_AREA),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.slice(image, begin, size)

    def resize(image: Any) -> Any:  # float32 [S, S, 3]
        return tf.image.resize(image, [side, side])

    def load(path: Any) -> Any:
        image = crop(decode_image(tf.io.read_file(path)))
        image.set_shape([None, None, 3])
        return resize(image)

    def stream() -> Iterator[Any]:
        data = tf.data.Dataset.from_tensor_slices(setup['files'])
        data = data.repeat().shuffle(len(setup['files']))
        data = data.map(load, num_parallel_calls=threads).batch(setup['batch'], drop_remainder=True)
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        return data.with_options(options).prefetch(1).as_numpy_iterator()

    # To NumPy, from where the original took it: TensorFlow itself stays on the host.
    stages = {'decode': decode_image, 'crop': crop, 'resize': resize}
    return stages | {'batch': tf.stack, 'transfer': lambda batch: batch.numpy()}, stream
