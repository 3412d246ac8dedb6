"""The input pipelines that benchmark_data.py compares.

Setup: `contestant` (of `KINDS`), `files` (paths of images), `crop` (pixels), `batch`, and
`workers`: 0 times the stages of one image after the other on one thread; else the whole pipeline
with so many threads or processes.

A step is all files once. Every contestant draws its boxes from the same distribution, ours, so that
they cut and resize as many pixels. Pillow resizes with antialiasing: that is the usual way there,
with other pixels than TensorFlow's and ours.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import child, torchvision_import
from vit_jax.data import decode, loader, preprocess, reader
from vit_jax.data.dataset import Example
from vit_jax.inference import predict

STAGES = ('read', 'decode', 'crop', 'resize', 'batch', 'transfer')
# Batches that may wait ready, for each worker, in any of the pipelines.
WAITING = 3


def build(setup: Mapping[str, Any]) -> child.Workload:
    """Makes the workload of a setup, run once."""
    if setup['contestant'] == 'tf.data':
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
    workload = KINDS[setup['contestant']](setup)
    workload.run(1)
    return workload


class Pipeline:
    """What all have in common; a subclass has a method for each stage and one for the whole.

    Args:
      setup: see the top of the file.
    """

    def __init__(self, setup: Mapping[str, Any]):
        self.facts: Mapping[str, Any] = {}
        self.files, self.side, self.size = setup['files'], setup['crop'], setup['batch']
        self.rng = np.random.default_rng(0)
        self._workers = setup['workers']
        self._stream = self.stream(self._workers) if self._workers else None

    def run(self, steps: int) -> dict[str, Any]:
        """See `child.Workload.run`; reports `timed`, the seconds that count, of the stages or all.

        Of the whole pipeline, batches that were made while nobody waited are taken first and do not
        count: as many as any of the pipelines keeps.
        """
        if not self._stream:
            return {'timed': self._time_stages(steps)}
        for _ in range(WAITING * self._workers):
            next(self._stream)
        start = time.perf_counter()
        for _ in range(steps * len(self.files) // self.size):
            next(self._stream)
        return {'timed': {'all': time.perf_counter() - start}}

    def _time_stages(self, steps: int) -> dict[str, float]:
        seconds = dict.fromkeys(STAGES, 0.0)

        def timed(name: str, *arguments: Any) -> Any:
            start = time.perf_counter()
            result = getattr(self, name)(*arguments)
            seconds[name] += time.perf_counter() - start
            return result

        for _ in range(steps):
            for first in range(0, len(self.files), self.size):
                images = []
                for path in self.files[first : first + self.size]:
                    image = timed('read', path)
                    for name in ('decode', 'crop', 'resize'):
                        image = timed(name, image)
                    images.append(image)
                timed('transfer', timed('batch', images))
        return seconds

    def peak_memory(self) -> int:
        """See `child.Workload.peak_memory`."""
        return child.process_memory()

    def read(self, path: str) -> bytes:
        """The same for all."""
        return decode.read_file(path)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """y, x, height, width of a random crop."""
        return preprocess.sample_inception_box(height, width, self.rng)

    def stream(self, workers: int) -> Iterator[Any]:
        """The whole pipeline: endless batches, shuffled, cropped, on the host."""
        raise NotImplementedError


class Ours(Pipeline):
    """Our pipeline in threads, and its stages."""

    exact = True
    cache = False
    simulated = False

    def __init__(self, setup: Mapping[str, Any]):
        import cv2

        cv2.setNumThreads(0)  # as the pipeline does
        self._settings = preprocess.Preprocess(crop=setup['crop'])
        self._batch: np.ndarray | None = None
        self._row = 0
        super().__init__(setup)

    def decode(self, image: bytes) -> Any:
        """uint8 [height, width, 3], upright."""
        return decode.decode(image, key='', exif=True)

    def crop(self, image: Any) -> Any:
        """Draws the part that will be seen."""
        height, width = image.shape[:2]
        return image, self._settings.draw_box(height, width, self.rng)

    def resize(self, item: Any) -> None:
        """float32 [S, S, 3], into the batch."""
        image, box = item
        self._settings.render(image, box, self._place(np.float32))

    def batch(self, images: list[None]) -> Any:
        """[B, S, S, 3]; the images are in it."""
        batch, self._batch, self._row = self._batch, None, 0
        return batch

    def transfer(self, batch: np.ndarray) -> Any:
        """To JAX's first device."""
        import jax

        return jax.block_until_ready(jax.device_put(batch, jax.devices()[0]))

    def stream(self, workers: int) -> Iterator[Any]:
        """See `Pipeline.stream`."""
        cache = reader.ImageCache(64 << 30) if self.cache else None
        source = (Sleeping if self.simulated else predict.Images)(self.files)
        batches = loader.BatchLoader(
            reader.Reader(source, cache),
            self._settings,
            batch=self.size,
            seed=0,
            exact=self.exact,
        )
        return batches.from_step(0, threads=workers)

    def _place(self, dtype: Any) -> np.ndarray:
        """Where the next image of the batch goes."""
        if self._batch is None:
            self._batch = np.empty((self.size, self.side, self.side, 3), dtype)
        self._row += 1
        return self._batch[self._row - 1]


class Approximate(Ours):
    """With `config.pp.exact=False`: decoded to scale, 8 bits."""

    exact = False

    def decode(self, image: bytes) -> Any:
        """uint8, perhaps reduced; the crop box decides how much, so it is drawn first."""
        size = decode.size_of_jpeg(image, exif=True)
        assert size, 'only JPEG files'
        box = self._settings.draw_box(*size, self.rng)
        return decode.decode(image, key='', exif=True, reduction=box.reduction()), box, size

    def crop(self, image: Any) -> Any:
        """Done."""
        return image

    def resize(self, item: Any) -> None:
        """uint8 [S, S, 3], into the batch."""
        image, box, size = item
        self._settings.render_uint8(image, box, size, self._place(np.uint8))


class Simulated(Ours):
    """Decoding is a sleep: what more threads would give if there were a core for each."""

    simulated = True


class Cached(Ours):
    """With `config.cache`, once everything is in it."""

    cache = True


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


class Torchvision(Pipeline):
    """Pillow and torchvision, as in PyTorch's ImageNet example; a DataLoader for the whole."""

    def __init__(self, setup: Mapping[str, Any]):
        import torch

        torch.set_num_threads(1)  # the workers are what is counted
        self.functional = torchvision_import.load().transforms.functional
        super().__init__(setup)

    def decode(self, image: bytes) -> Any:
        """A PIL image, upright."""
        import io

        from PIL import Image, ImageOps

        return ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert('RGB')

    def crop(self, image: Any) -> Any:
        """A random crop, not yet resized."""
        y, x, height, width = self.box(image.height, image.width)
        return self.functional.crop(image, y, x, height, width)

    def resize(self, image: Any) -> Any:
        """float32 tensor [3, S, S] in [0, 1]."""
        return self.functional.to_tensor(self.functional.resize(image, [self.side, self.side]))

    def batch(self, images: list[Any]) -> Any:
        """float32 [B, 3, S, S]."""
        import torch

        return torch.stack(images)

    def transfer(self, batch: Any) -> Any:
        """To the GPU, if there is one; on a CPU there is nothing to do."""
        import torch

        if torch.cuda.is_available():
            batch = batch.cuda()
            torch.cuda.synchronize()
        return batch

    def stream(self, workers: int) -> Iterator[Any]:
        """See `Pipeline.stream`; `workers` are processes."""
        import torch

        photos: Any = _Photos(self)
        batches: Iterable[Any] = torch.utils.data.DataLoader(
            photos, self.size, shuffle=True, num_workers=workers, drop_last=True,
            persistent_workers=True,
        )  # fmt: skip
        while True:
            yield from batches


class _Photos:
    """The whole work on one photo, for a DataLoader."""

    def __init__(self, pipeline: Torchvision):
        self._pipeline = pipeline
        self._length = len(pipeline.files)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        work = self._pipeline
        return work.resize(work.crop(work.decode(work.read(work.files[index]))))


class TensorFlow(Pipeline):
    """tf.io, tf.image and tf.data, as in the original release."""

    def __init__(self, setup: Mapping[str, Any]):
        import tensorflow as tf

        self.tf = tf
        tf.config.set_visible_devices([], 'GPU')
        threads = setup['workers'] or 1
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        super().__init__(setup)

    def decode(self, image: bytes) -> Any:
        """uint8 [height, width, 3]; EXIF is ignored."""
        return self.tf.io.decode_image(image, channels=3, expand_animations=False)

    def crop(self, image: Any) -> Any:
        """An inception crop."""
        begin, size, _ = self.tf.image.sample_distorted_bounding_box(
            self.tf.shape(image),
            self.tf.zeros([0, 0, 4], self.tf.float32),
            area_range=(preprocess.MIN_AREA, preprocess.MAX_AREA),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        return self.tf.slice(image, begin, size)

    def resize(self, image: Any) -> Any:
        """float32 [S, S, 3]."""
        return self.tf.image.resize(image, [self.side, self.side])

    def batch(self, images: list[Any]) -> Any:
        """float32 [B, S, S, 3]."""
        return self.tf.stack(images)

    def transfer(self, batch: Any) -> np.ndarray:
        """To NumPy, from where the original took it; TensorFlow itself stays on the host."""
        return batch.numpy()

    def stream(self, workers: int) -> Iterator[Any]:
        """See `Pipeline.stream`; `workers` are threads."""
        tf = self.tf

        def load(path: Any) -> Any:
            image = self.crop(self.decode(tf.io.read_file(path)))
            image.set_shape([None, None, 3])
            return self.resize(image)

        data = tf.data.Dataset.from_tensor_slices(self.files).repeat().shuffle(len(self.files))
        data = data.map(load, num_parallel_calls=workers).batch(self.size, drop_remainder=True)
        options = tf.data.Options()
        options.threading.private_threadpool_size = workers
        return data.with_options(options).prefetch(1).as_numpy_iterator()


KINDS = {
    'vit_jax': Ours,
    'vit_jax:exact=False': Approximate,
    'vit_jax:cache': Cached,
    'vit_jax:simulated': Simulated,
    'torchvision': Torchvision,
    'tf.data': TensorFlow,
}
