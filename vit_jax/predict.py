"""From image files to class probabilities."""

import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from vit_jax import steps
from vit_jax.data.decode import BadImageError, decode
from vit_jax.data.folders import SUFFIXES, list_images
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax import model_folder

DECODE_THREADS = 8


def find_images(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Lists the image files that a user names.

    Args:
      paths: files, taken as they are and in this order whatever their names, and folders, walked
        with everything below them in the order of the names; of those, files that are hidden or not
        jpg, jpeg, png, webp or bmp (any case) are left out.

    Returns:
      Paths of image files.

    Raises:
      UserError: a path that does not exist, a folder without images, or no path at all.
    """
    if not paths:
        raise UserError('no images given; name image files or folders of them')
    found = []
    for path in paths:
        if os.path.isdir(path):
            inside, _ = list_images(path)
            if not inside:
                suffixes = ', '.join(sorted(suffix[1:] for suffix in SUFFIXES))
                raise UserError(f'folder {path} holds no images ({suffixes})')
            found += inside
        elif os.path.exists(path):
            found.append(os.fspath(path))
        else:
            raise UserError(f'there is no file or folder {path}')
    return found


def predict(
    model: 'model_folder.Model',
    images: Sequence[str | os.PathLike],
    *,
    batch: int = 32,
    on_error: Callable[[BadImageError], None] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Computes class probabilities of image files.

    Images are preprocessed as in the evaluation of the model. EXIF orientation is honoured: what a
    person sees upright, the model sees upright.

    Args:
      model: what `model_folder.load` gives.
      images: paths of image files.
      batch: how many images go through the model at once; the model is compiled once, for this size
        or for the number of images if that is smaller.
      on_error: called with each image that cannot be read, which is then left out; by default the
        error is raised.

    Yields:
      For each image, in the order given: its path and its probabilities, float32 [classes], which
        sum to 1.

    Raises:
      UserError: `batch` less than 1, or a model without one vector of class scores per image.
      BadImageError: an image that cannot be read, where `on_error` is not given.
    """
    if batch < 1:
        raise UserError(f'batch is the number of images at once, at least 1; got {batch}')
    if not len(model.class_names):
        raise UserError('this model has no classification head, so it gives no probabilities')
    return _predict(model, [os.fspath(path) for path in images], batch, on_error)


def format_prediction(
    path: str, probabilities: np.ndarray, class_names: Sequence[str], top_k: int = 0
) -> str:
    """A prediction as text: the path, then a line for each class, the most probable first.

    Args:
      path: of the image.
      probabilities: float [classes].
      class_names: in label order.
      top_k: number of classes to show; 0 for all.

    Returns:
      Lines without a final newline: `photo.jpg`, `  daisy       0.9950`, `  sunflowers  0.0031`,
        ...
    """
    width = max(map(len, class_names))
    best_first = np.argsort(-probabilities, kind='stable')[: top_k or None]
    return '\n'.join(
        [path, *(f'  {class_names[i]:<{width}}  {probabilities[i]:.4f}' for i in best_first)]
    )


def _predict(model, images, batch, on_error):
    def read(path):
        try:
            image = decode(pathlib.Path(path).read_bytes(), key=path, exif=True)
        except OSError as error:
            return BadImageError(path, error.strerror or str(error))
        except BadImageError as error:
            return error
        return model.preprocess.evaluate(image)

    params = jax.device_put(model.params)
    batch = max(1, min(batch, len(images)))
    size = model.preprocess.crop
    predict_step = steps.make_predict_step(model.model)
    pixels = jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)
    shape = jax.eval_shape(predict_step, params, pixels).shape
    if shape != (batch, len(model.class_names)):
        raise UserError(
            f'this model gives {list(shape)} for {batch} images, not a score for each of its '
            f'{len(model.class_names)} classes'
        )
    with concurrent.futures.ThreadPoolExecutor(DECODE_THREADS) as threads:
        for first in range(0, len(images), batch):
            paths = images[first : first + batch]
            # One shape for every batch; the rows of missing images stay 0 and are not reported.
            pixels = np.zeros((batch, size, size, 3), np.float32)
            readable = []
            for row, (path, result) in enumerate(zip(paths, threads.map(read, paths), strict=True)):
                if not isinstance(result, BadImageError):
                    pixels[row] = result
                    readable.append((row, path))
                elif on_error is None:
                    raise result
                else:
                    on_error(result)
            if readable:
                rows = jax.device_get(predict_step(params, pixels))
                yield from ((path, rows[row]) for row, path in readable)
