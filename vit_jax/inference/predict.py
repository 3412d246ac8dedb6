"""From image files to class probabilities."""

import collections
import glob
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from vit_jax.data import image_files
from vit_jax.data.decode import BadImageError, decode, read_file
from vit_jax.data.examples import CLASS_INDEX, Example
from vit_jax.data.listing import list_images
from vit_jax.errors import UserError
from vit_jax.inference.classifier import Classifier, JaxClassifier, classify
from vit_jax.inference.task import NUMBERS, Task

if TYPE_CHECKING:
    from vit_jax.inference import model_folder

STDIN = '-'


class PipedImage(str):
    """The name of an image that was piped in, with its encoded bytes as `content`."""

    content: bytes


class Images:
    """Image files without labels (all are 0), as a `Source`; EXIF orientation is honoured.

    Args:
      paths: of the files, and `PipedImage`s.
      channels: see `examples.channels_of`.
    """

    class_names: tuple[str, ...] = ()
    exif = True
    label_dtype = CLASS_INDEX

    def __init__(self, paths: Sequence[str], channels: int = 3):
        self._paths = paths
        self.channels = channels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        path = self._paths[index]
        content = path.content if isinstance(path, PipedImage) else read_file(path)
        return Example(content, 0, path)

    def paths(self) -> Sequence[str]:
        """All of them."""
        return self._paths


def find_images(
    paths: Sequence[str | os.PathLike[str]], *, stdin: BinaryIO | None = None, channels: int = 3
) -> list[str]:
    """Lists the image files that a user names.

    Args:
      paths: files, taken as they are and in this order whatever their names; folders, walked with
        everything below them in the order of the names, of which what is hidden or does not end as
        an image (`image_files.suffixes`) is left out, as in training; patterns (`photos/*.jpg`,
        `**` for any depth), which stand for what they match, sorted; and `-` for what comes from
        `stdin`.
      stdin: paths of files, folders or patterns, one on each line or ended by a zero byte (`find
        -print0`); or one image, which is then called `-`.
      channels: those of the model; of another number than 3, .npy files in folders are images, too.

    Returns:
      Paths of image files; a `PipedImage` for one that was piped in.

    Raises:
      UserError: a path that does not exist, a pattern without match, a folder without images, or no
        path at all.
    """
    if not paths:
        raise UserError('no images given; name image files or folders of them')
    found = []
    for path in paths:
        if path == STDIN and stdin is not None:
            found += _from_stdin(stdin, channels)
        else:
            found += _expand(path, channels)
    return found


def predict(
    model: 'Classifier | model_folder.Model',
    images: Sequence[str | os.PathLike[str]],
    *,
    batch: int = 32,
    on_error: Callable[[BadImageError], None] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Computes class probabilities of image files.

    Images are preprocessed as in the evaluation of the model. EXIF orientation is honoured: what a
    person sees upright, the model sees upright.

    Args:
      model: what `classifier.open_classifier` or `model_folder.load` gives.
      images: paths of image files, of `find_images`.
      batch: how many images go through the model at once; a JAX model is compiled once, for this
        size or for the number of images if that is smaller.
      on_error: called with each image that cannot be read, in its place of the order; the image is
        then left out. By default the error is raised.

    Returns:
      An iterator over the images, in the order given: path, and probabilities, float32 [classes],
      which sum to 1, but for a model of classes that do not exclude each other; of a model of
      numbers these, in their units.

    Raises:
      UserError: `batch` less than 1, or a model without one vector of class scores per image.
      BadImageError: an image that cannot be read, where `on_error` is not given.
    """
    paths = [os.fspath(image) for image in images]
    if not paths:
        return iter(())
    errors: collections.deque[BadImageError] = collections.deque()
    classifier = model if isinstance(model, Classifier) else JaxClassifier(model)
    source = Images(paths, classifier.channels)
    scored = classify(classifier, source, batch=batch, on_bad=errors.append)

    def readable() -> Iterator[tuple[str, np.ndarray]]:
        for data, logits in scored:
            for index, good, scores in zip(data['example'], data['readable'], logits, strict=True):
                if good:
                    yield paths[index], classifier.task.values(scores)
                elif on_error is None:
                    raise errors.popleft()
                else:
                    on_error(errors.popleft())

    return readable()


def read_image(path: str, *, accurate: bool = False, channels: int = 3) -> np.ndarray:
    """The pixels of an image file, upright: uint8 [height, width, channels].

    Args:
      path: of the file, or a `PipedImage`.
      accurate: see `decode.decode`; what the model's preprocessing says.
      channels: see `decode.decode`; those of the model.

    Raises:
      BadImageError: it cannot be read.
    """
    image = Images([path])[0].image
    return decode(image, key=path, exif=True, accurate=accurate, channels=channels)


def choose_classes(
    probabilities: np.ndarray, *, top_k: int = 0, threshold: float = 0.0
) -> np.ndarray:
    """The classes to show, the most probable first; of equal ones the lower label first.

    Args:
      probabilities: float [classes].
      top_k: how many at most; 0 for all.
      threshold: only those of at least this probability, in [0, 1].

    Returns:
      int [chosen]: labels, perhaps none.
    """
    best_first = np.argsort(-probabilities, kind='stable')[: top_k or None]
    return best_first[probabilities[best_first] >= threshold]


def choose_outputs(
    values: np.ndarray, task: Task, *, top_k: int = 0, threshold: float = 0.0
) -> np.ndarray:
    """The outputs to show: `choose_classes`, or all numbers, in their order.

    Args:
      values: float [outputs], of `Task.values`.
      task: of the model.
      top_k: see `choose_classes`.
      threshold: see `choose_classes`.

    Returns:
      int [chosen].
    """
    if task.kind == NUMBERS:
        return np.arange(len(values))
    return choose_classes(values, top_k=top_k, threshold=threshold)


def _expand(path: str | os.PathLike[str], channels: int) -> list[str]:
    """The files that one word of a user stands for."""
    if os.path.isdir(path):
        arrays = channels != 3
        inside, _ = list_images(path, arrays=arrays)
        if not inside:
            raise UserError(f'folder {path} holds no images ({image_files.in_words(arrays)})')
        return inside
    if os.path.lexists(path):
        return [os.fspath(path)]
    pattern = os.path.expanduser(path)
    if not glob.has_magic(pattern):
        raise UserError(f'there is no file or folder {path}')
    matches = sorted(
        glob.glob(pattern, recursive=True), key=lambda match: pathlib.Path(match).parts
    )
    folders = {match for match in matches if os.path.isdir(match)}
    if '**' in pattern:  # It matches each folder, and what is in it once more.
        matches = [match for match in matches if match not in folders]
        folders = set()
    if not matches:
        raise UserError(f'nothing matches {path} (seen from {os.getcwd()})')
    return [
        file
        for match in matches
        for file in (_expand(match, channels) if match in folders else [match])
    ]


def _from_stdin(stdin: BinaryIO, channels: int) -> list[str]:
    try:
        content = stdin.read()
    except OSError as error:
        raise UserError(f'standard input cannot be read ({error.strerror})') from error
    if image_files.looks_like_image(content):
        image = PipedImage(STDIN)
        image.content = content
        return [image]
    separator = b'\0' if b'\0' in content else b'\n'
    lines = [os.fsdecode(line.removesuffix(b'\r')) for line in content.split(separator)]
    paths = [line for line in lines if line.strip()]
    if not paths:
        raise UserError('standard input is empty; pipe in paths, one per line, or an image')
    return [file for path in paths for file in _expand(path, channels)]
