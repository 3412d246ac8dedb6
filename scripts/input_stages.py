"""The input pipelines that benchmark_data.py compares; it starts this for each of them.

Setup: `contestant` ('vit_jax', 'torchvision' or 'tf.data'), `files` (paths of images), `crop`
(pixels), `batch`, and `threads`: 0 times the stages one after the other on one thread;
else the whole pipeline with so many threads (of torchvision: worker processes).

A step is all files once; the seconds of a stage are those of all files. The crop of torchvision is
of another distribution than ours (larger on average), and Pillow resizes with antialiasing: that is
the usual way there, with other pixels.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torchvision_import

from vit_jax.benchmark import child
from vit_jax.data import decode, preprocess
from vit_jax.data.sources import Example

STAGES = ('read', 'decode', 'crop', 'resize', 'batch', 'transfer')


def build(setup: Mapping[str, Any]) -> child.Workload:
    """Makes the workload of a setup, run once."""
    if setup['contestant'] == 'tf.data':
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
    kinds = {'vit_jax': Ours, 'torchvision': Torchvision, 'tf.data': TensorFlow}
    workload = kinds[setup['contestant']](setup)
    workload.run(1)
    return workload


class Pipeline:
    """What all have in common; a subclass has a method for each stage and one for the whole.

    Args:
      setup: see the top of the file.
    """

    def __init__(self, setup: Mapping[str, Any]):
        self.facts: dict[str, Any] = {}
        self.files, self.side, self.size = setup['files'], setup['crop'], setup['batch']
        self.rng = np.random.default_rng(0)
        self._stream = self.stream(setup['threads']) if setup['threads'] else None

    def run(self, steps: int) -> dict[str, Any]:
        """See `child.Workload.run`; reports the seconds of the stages where these are timed."""
        seconds = dict.fromkeys(STAGES, 0.0)
        for _ in range(steps):
            if self._stream:
                for _ in range(len(self.files) // self.size):
                    next(self._stream)
                continue
            items: Any = self.files
            for name in STAGES:
                start = time.perf_counter()
                items = getattr(self, name)(items)
                seconds[name] += time.perf_counter() - start
        return {} if self._stream else {'stages': seconds}

    def peak_memory(self) -> int:
        """See `child.Workload.peak_memory`."""
        return child.process_memory()

    def read(self, files: Sequence[str]) -> list[bytes]:
        """Paths to bytes; the same for all."""
        return [decode.read_file(path) for path in files]

    def batches(self, items: list) -> Iterator[list]:
        """Lists of a batch's items."""
        for first in range(0, len(items), self.size):
            yield items[first : first + self.size]

    def stream(self, threads: int) -> Iterator[Any]:
        """The whole pipeline: endless batches, float32, shuffled, cropped, on the host."""
        raise NotImplementedError


class Ours(Pipeline):
    """Our stages and our pipeline.

    The pipeline resizes into the batch. Here `resize` makes images one by one and `batch` stacks
    them, so the stages together are slower than the pipeline.
    """

    def decode(self, images: list[bytes]) -> list[np.ndarray]:
        """uint8 [height, width, 3], upright."""
        pairs = zip(images, self.files, strict=True)
        return [decode.decode(image, key=key, exif=True) for image, key in pairs]

    def crop(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Inception crops, as views."""
        cropped = []
        for image in images:
            y, x, height, width = preprocess.sample_inception_box(*image.shape[:2], self.rng)
            cropped.append(image[y : y + height, x : x + width])
        return cropped

    def resize(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """float32 [S, S, 3]."""
        import cv2

        cv2.setNumThreads(0)  # as the pipeline does
        return [preprocess.resize_bilinear(image, self.side) for image in images]

    def batch(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """float32 [B, S, S, 3]."""
        return [np.stack(part) for part in self.batches(images)]

    def transfer(self, batches: list[np.ndarray]) -> Any:
        """To JAX's first device."""
        import jax

        return jax.block_until_ready(jax.device_put(batches, jax.devices()[0]))

    def stream(self, threads: int) -> Iterator[Any]:
        """See `Pipeline.stream`."""
        from vit_jax.data import pipeline

        settings = preprocess.Preprocess(crop=self.side)
        dataset = pipeline.train_dataset(Files(self.files), settings, batch=self.size, seed=0)
        with pipeline.train_batches(dataset, start=0, threads=threads) as batches:
            yield from batches


class Files:
    """A `sources.Source` of image files without labels.

    Args:
      paths: of the files.
    """

    class_names = ('image',)
    exif = True

    def __init__(self, paths: Sequence[str]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        path = self._paths[index]
        return Example(decode.read_file(path), 0, path)


class Torchvision(Pipeline):
    """Pillow and torchvision, as in PyTorch's ImageNet example; a DataLoader for the whole."""

    def __init__(self, setup: Mapping[str, Any]):
        import torch

        torch.set_num_threads(1)  # the workers are what is counted
        self.transforms = torchvision_import.load().transforms
        super().__init__(setup)

    def decode(self, images: list[bytes]) -> list[Any]:
        """PIL images, upright."""
        import io

        from PIL import Image, ImageOps

        return [
            ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert('RGB')
            for image in images
        ]

    def crop(self, images: list[Any]) -> list[Any]:
        """Random resized crops, not yet resized."""
        arguments = (preprocess.MIN_AREA, preprocess.MAX_AREA), (0.75, 1.33)
        draw = self.transforms.RandomResizedCrop.get_params
        crop = self.transforms.functional.crop
        return [crop(image, *draw(image, *arguments)) for image in images]

    def resize(self, images: list[Any]) -> list[Any]:
        """float32 tensors [3, S, S] in [0, 1]."""
        functional, size = self.transforms.functional, [self.side, self.side]
        return [functional.to_tensor(functional.resize(image, size)) for image in images]

    def batch(self, images: list[Any]) -> list[Any]:
        """float32 [B, 3, S, S]."""
        import torch

        return [torch.stack(part) for part in self.batches(images)]

    def transfer(self, batches: list[Any]) -> list[Any]:
        """To the GPU, if there is one; on a CPU there is nothing to do."""
        import torch

        if not torch.cuda.is_available():
            return batches
        moved = [batch.cuda() for batch in batches]
        torch.cuda.synchronize()
        return moved

    def stream(self, threads: int) -> Iterator[Any]:
        """See `Pipeline.stream`; `threads` are worker processes."""
        import torch

        loader = torch.utils.data.DataLoader(
            _Photos(self), self.size, shuffle=True, num_workers=threads, drop_last=True,
            persistent_workers=True,
        )  # fmt: skip
        while True:
            yield from loader


class _Photos:
    """The whole work on one photo, for a DataLoader."""

    def __init__(self, pipeline: Torchvision):
        self._pipeline = pipeline
        self._length = len(pipeline.files)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        work = self._pipeline
        return work.resize(work.crop(work.decode(work.read([work.files[index]]))))[0]


class TensorFlow(Pipeline):
    """tf.io, tf.image and tf.data, as in the original release."""

    def __init__(self, setup: Mapping[str, Any]):
        import tensorflow as tf

        self.tf = tf
        tf.config.set_visible_devices([], 'GPU')
        threads = setup['threads'] or 1
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        super().__init__(setup)

    def decode(self, images: list[bytes]) -> list[Any]:
        """uint8 [height, width, 3]; EXIF is ignored."""
        return [self.tf.io.decode_image(x, channels=3, expand_animations=False) for x in images]

    def crop(self, images: list[Any]) -> list[Any]:
        """Inception crops."""
        return [self._crop(image) for image in images]

    def _crop(self, image: Any) -> Any:
        begin, size, _ = self.tf.image.sample_distorted_bounding_box(
            self.tf.shape(image),
            self.tf.zeros([0, 0, 4], self.tf.float32),
            area_range=(preprocess.MIN_AREA, preprocess.MAX_AREA),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        return self.tf.slice(image, begin, size)

    def resize(self, images: list[Any]) -> list[Any]:
        """float32 [S, S, 3]."""
        return [self.tf.image.resize(image, [self.side, self.side]) for image in images]

    def batch(self, images: list[Any]) -> list[Any]:
        """float32 [B, S, S, 3]."""
        return [self.tf.stack(part) for part in self.batches(images)]

    def transfer(self, batches: list[Any]) -> list[np.ndarray]:
        """To NumPy, from where the original took it; TensorFlow itself stays on the host."""
        return [batch.numpy() for batch in batches]

    def stream(self, threads: int) -> Iterator[Any]:
        """See `Pipeline.stream`."""
        tf = self.tf

        def load(path: Any) -> Any:
            image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
            image = self._crop(image)
            image.set_shape([None, None, 3])
            return tf.image.resize(image, [self.side, self.side])

        data = tf.data.Dataset.from_tensor_slices(self.files).repeat().shuffle(len(self.files))
        data = data.map(load, num_parallel_calls=threads).batch(self.size, drop_remainder=True)
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        return data.with_options(options).prefetch(1).as_numpy_iterator()


if __name__ == '__main__':
    sys.exit(child.serve(build))
