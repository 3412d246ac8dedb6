"""One interface to a model that says what is on an image, whatever runs it: JAX or onnxruntime."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from vit_jax.data.batches import Batch, eval_batches, in_order
from vit_jax.data.examples import Source
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reader import OnBad
from vit_jax.errors import UserError
from vit_jax.inference import labels as names
from vit_jax.inference.task import Task

if TYPE_CHECKING:
    from vit_jax.data.normalization import Normalization
    from vit_jax.inference import model_folder


@runtime_checkable
class Classifier(Protocol):
    """What predicting and evaluating need of a model.

    Attributes:
      class_names: in label order, at least one.
      preprocess: from decoded images to pixels.
      channels: of the images; 3 for RGB.
      source: where the model came from; any JSON.
      task: what the outputs are.
    """

    class_names: tuple[str, ...]
    preprocess: Preprocess
    channels: int
    source: Mapping[str, Any]
    task: Task

    def logits(self, pixels: np.ndarray) -> Any:
        """The outputs of the model, which `task.values` makes probabilities or numbers of.

        Args:
          pixels: float32 [B, *preprocess.size, channels] in [0, 255], what `preprocess` gives. They
            must not be changed until the result has been read.

        Returns:
          float32 [B, classes], an array that may still be computed: `np.asarray` waits for it.
        """


class OneSize:
    """A function of images that sees batches of one size, so that it is compiled once.

    Smaller ones than the largest so far are filled up with black images.

    Args:
      function: gives for images [B, ...] an array [B, ...].
    """

    def __init__(self, function: Callable[[np.ndarray], Any]):
        self._function, self._batch = function, 0

    def __call__(self, pixels: np.ndarray) -> Any:
        """What the function gives for these images, [B, height, width, channels]."""
        given, self._batch = len(pixels), max(len(pixels), self._batch)
        if given == self._batch:
            return self._function(pixels)
        filled = np.pad(pixels, [(0, self._batch - given), (0, 0), (0, 0), (0, 0)])
        return self._function(filled)[:given]


class JaxClassifier:
    """A `Classifier` computed by JAX, see `OneSize`.

    Args:
      model: what `model_folder.load` gives.

    Raises:
      UserError: the model does not give one vector of class scores per image.
    """

    def __init__(self, model: 'model_folder.Model'):
        import jax

        from vit_jax import steps

        if not len(model.class_names):
            raise UserError('this model has no classification head, so it gives no probabilities')
        self.class_names: tuple[str, ...] = tuple(model.class_names)
        self.task = model.task
        self.preprocess = model.preprocess
        self.channels = model.channels
        self.source: Mapping[str, Any] = model.source
        params = jax.device_put(model.params)
        self._apply = OneSize(functools.partial(steps.make_predict_step(model.model), params))

    def logits(self, pixels: np.ndarray) -> Any:
        """See `Classifier.logits`."""
        logits = self._apply(pixels)
        if logits.shape != (len(pixels), len(self.class_names)):
            raise UserError(
                f'this model gives {list(logits.shape)} for {len(pixels)} images, not a score for '
                f'each of its {len(self.class_names)} classes'
            )
        return logits


def open_classifier(
    path: str | os.PathLike[str],
    *,
    variant: str = '',
    labels: str = '',
    num_heads: int = 0,
    normalization: 'Normalization | None' = None,
    pixels: Mapping[str, Any] | None = None,
) -> Classifier:
    """Opens a model of any kind for predicting.

    Args:
      path: an exported `.onnx` file (onnxruntime runs it, JAX is not imported); a model folder; or
        weights of any kind that `model_folder.load` reads.
      variant: architecture of bare weights, such as ViT-B_16, where their arrays do not tell.
      labels: class names, see `labels.choose`.
      num_heads: of bare weights, see `model_folder.load`.
      normalization: of bare weights, see `model_folder.load`.
      pixels: how images become pixels, where not as the files tell, see `model_folder.load`.

    Returns:
      The model, loaded.

    Raises:
      UserError: it cannot be opened, or `labels` does not fit it.
    """
    if pathlib.Path(path).suffix.lower() == '.onnx':
        if variant:
            raise UserError(f'{path} is an ONNX file, which knows its architecture: no --variant')
        if num_heads:
            raise UserError(f'{path} is an ONNX file, which knows its heads: no --num_heads')
        if normalization:
            raise UserError(f'{path} is an ONNX file, which knows its input: no --normalization')
        from vit_jax.inference import onnx as onnx_model

        classifier: Classifier = onnx_model.OnnxClassifier(path)
        classifier.preprocess = classifier.preprocess.but(pixels or {})
    else:
        from vit_jax.inference import model_folder

        given: dict[str, Any] = {
            'num_heads': num_heads,
            'normalization': normalization,
            'pixels': pixels,
        }
        classifier = JaxClassifier(model_folder.load(path, variant=variant, **given))
    classifier.class_names = names.choose(classifier.class_names, labels, str(path))
    return classifier


def classify(
    classifier: Classifier, source: Source, *, batch: int, on_bad: OnBad
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Scores all images of a source; the next batches are read while one is computed.

    Args:
      classifier: the model.
      source: at least one image.
      batch: images at once; of fewer, as many as there are.
      on_bad: see `eval_batches`.

    Returns:
      An iterator over the batches of `eval_batches` without padding, and their logits, float32 [b,
      classes]; those of unreadable images have no meaning.

    Raises:
      UserError: `batch` less than 1; or scores of an image that are not finite.
    """
    batches = eval_batches(
        source, classifier.preprocess, batch=min(batch, len(source)), on_bad=on_bad
    )

    def start(padded: Batch) -> Callable[[], tuple[Batch, np.ndarray]]:
        count = np.count_nonzero(padded['example'] >= 0)
        data = {name: values[:count] for name, values in padded.items()}
        logits = classifier.logits(data['image'])
        return lambda: (data, checked(data, np.asarray(logits)))

    def checked(data: Batch, logits: np.ndarray) -> np.ndarray:
        wrong = data['readable'] & ~np.isfinite(logits).all(axis=-1)
        if wrong.any():
            key = source[int(data['example'][wrong.argmax()])].key
            raise UserError(f'the model gives scores that are NaN or infinite for {key}')
        return logits

    return in_order(start, batches, ahead=1)
