"""The images an export is verified on: the user's, or photographs that are always at hand."""

import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vit_jax.data.decode import decode, read_file
from vit_jax.data.preprocess import normalize
from vit_jax.inference import model_folder, predict

# The largest batch an export is run at; fewer images are repeated to fill it.
BATCH = 7

# Of the photographs in scikit-learn (427 x 640 pixels): y, x, height, width.
_CROPS = (
    ('china.jpg', (0, 0, 427, 640)),
    ('flower.jpg', (0, 0, 427, 640)),
    ('china.jpg', (0, 0, 427, 427)),
    ('flower.jpg', (0, 213, 427, 427)),
    ('china.jpg', (127, 240, 300, 400)),
    ('flower.jpg', (60, 100, 240, 240)),
    ('china.jpg', (200, 0, 160, 213)),
)


class Samples:
    """Images as a model takes them, one batch at a time in memory.

    Attributes:
        keys: a name of each image, for people.
        description: of all of them, for people.
    """

    def __init__(
        self, read: Callable[[int], np.ndarray], keys: Sequence[str], description: str
    ) -> None:
        self._read = read
        self.keys = tuple(keys)
        self.description = description

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each image: float32 [S, S, 3] in [0, 255], preprocessed as in evaluation."""
        return (self._read(i) for i in range(len(self)))


def of(model: model_folder.Model, paths: Sequence[str] = ()) -> Samples:
    """Images for a model.

    Args:
        model: says how images are preprocessed.
        paths: image files and folders of them; none: seven crops of the two photographs that
            scikit-learn has for such purposes (a temple, a flower).

    Returns:
        At least `BATCH` of them: fewer are repeated.

    Raises:
        UserError: a path that does not exist, or a folder without images. An image that cannot be
            read is a `BadImageError` when its turn comes.
    """
    if not paths:
        return _photographs(model)
    files = [str(file) for file in predict.find_images(paths)]
    keys = [files[i % len(files)] for i in range(max(BATCH, len(files)))]
    repeated = '' if len(keys) == len(files) else f', repeated to make {len(keys)}'

    def read(i: int) -> np.ndarray:
        return model.preprocess.evaluate(decode(read_file(keys[i]), key=keys[i], exif=True))

    return Samples(read, keys, f'{len(files)} images of --images{repeated}')


def to_input(pixels: np.ndarray, *, preprocessing: bool) -> np.ndarray:
    """Pixels as an exported model takes them, [..., 3].

    Args:
        pixels: float32 [..., 3] in [0, 255].
        preprocessing: whether the model normalises itself.

    Returns:
        uint8 in [0, 255] (rounded) for such a model, else float32 in [-1, 1].
    """
    return np.rint(pixels).astype(np.uint8) if preprocessing else normalize(pixels)


def _photographs(model: model_folder.Model) -> Samples:
    import sklearn.datasets  # here, because it takes a second to import

    found = sklearn.datasets.load_sample_images()
    photos = {
        pathlib.Path(name).name: photo
        for name, photo in zip(found.filenames, found.images, strict=True)
    }

    def read(i: int) -> np.ndarray:
        name, (y, x, height, width) = _CROPS[i]
        return model.preprocess.evaluate(photos[name][y : y + height, x : x + width])

    keys = [f'{name} {height}x{width}+{y}+{x}' for name, (y, x, height, width) in _CROPS]
    return Samples(read, keys, "7 crops of scikit-learn's sample photographs")
