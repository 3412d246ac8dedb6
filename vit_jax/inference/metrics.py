"""Metrics of a classifier on labelled images: overall, of each class, and its calibration.

They are computed from the outcome of each image, see `vit_jax.evaluate`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import CLASS_INDEX, Example, Source, channels_of, label_dtype_of
from vit_jax.errors import UserError, extra
from vit_jax.evaluate import Outcomes, Outputs, check_readable, columns, join, outcomes, totals
from vit_jax.inference import regression, several
from vit_jax.inference.classifier import Classifier, classify
from vit_jax.inference.task import ONE, SEVERAL, Task

if TYPE_CHECKING:
    from scipy import sparse

MAX_PAIRS = 100  # of classes that are confused, in the file
BINS = 15  # of confidence; the number used by Guo et al. (2017)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """How often a model is right at each confidence.

    Confidence is the probability of the predicted class. Bin i holds the images with a confidence
    in (i / bins, (i + 1) / bins], the first one 0 as well.

    Attributes:
      count: int [bins], images in each bin.
      accuracy: float64 [bins], share of them that are right; NaN in empty bins.
      confidence: float64 [bins], their mean confidence; NaN in empty bins.
      expected_error: expected calibration error: the mean over images of |accuracy - confidence| of
        their bin, in [0, 1] (Naeini et al. 2015; Guo et al. 2017,
        https://arxiv.org/abs/1706.04599, equation 3).
      largest_error: the largest |accuracy - confidence| of a bin.
    """

    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    expected_error: float
    largest_error: float


@dataclasses.dataclass(frozen=True, eq=False)
class Metrics:
    """Metrics of N images and C classes.

    Images that could not be read count in N and in `support`, and are never right; they are not in
    `loss`, `confusion`, `calibration`.

    Attributes:
      class_names: of the model, in label order.
      count: N.
      unreadable: how many of them could not be read.
      accuracy: share of N whose most probable class is the right one; of equal logits the class of
        lower label counts as predicted, and NaN is never right.
      accuracy_top5: share of N whose right class is among the five most probable; None with at most
        5 classes.
      loss: mean cross-entropy, natural logarithm.
      precision: float64 [C], of the images taken for a class the share that is of it; NaN where
        none was.
      recall: float64 [C], of the images of a class the share taken for it; NaN where there is none.
      f1: float64 [C], harmonic mean of both, 2 TP / (2 TP + FP + FN); NaN where there was neither
        an image of the class nor one taken for it.
      support: int64 [C], images of each class.
      confusion: int64 [C, C], images by right class (row) and predicted class (column); sparse, as
        few of a million pairs of 1,000 classes occur.
      calibration: of the readable images.
    """

    class_names: tuple[str, ...]
    count: int
    unreadable: int
    accuracy: float
    accuracy_top5: float | None
    loss: float
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    confusion: 'sparse.csr_array'
    calibration: Calibration

    def macro(self, values: np.ndarray) -> float:
        """Mean over the classes that have images, each counting the same; NaN counts as 0."""
        return float(np.nan_to_num(values[self.support > 0]).mean())

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The classes most often taken for another: (right, predicted, images), most images first.

        Args:
          most: pairs to give.
        """
        row, column, images = _triples(self.confusion)
        row, column, images = (values[row != column] for values in (row, column, images))
        order = np.lexsort((column, row, -images))[:most]
        return [(int(row[i]), int(column[i]), int(images[i])) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON; NaN becomes None."""
        shares = ('precision', 'recall', 'f1')
        columns = {name: _plain(getattr(self, name)) for name in (*shares, 'support')}
        calibration, bins = self.calibration, len(self.calibration.count)
        binned = map(_plain, (calibration.count, calibration.accuracy, calibration.confidence))
        return {
            'images': self.count,
            'unreadable': self.unreadable,
            'accuracy': self.accuracy,
            'accuracy_top5': self.accuracy_top5,
            'loss': None if np.isnan(self.loss) else self.loss,
            'macro': {name: self.macro(getattr(self, name)) for name in shares},
            'classes': [
                {'class': name} | {column: values[i] for column, values in columns.items()}
                for i, name in enumerate(self.class_names)
            ],
            'confusion': {
                'columns': ['true label', 'predicted label', 'images'],
                'counts': np.stack(_triples(self.confusion), axis=-1).tolist(),
            },
            'most_confused': [
                {'true': self.class_names[i], 'predicted': self.class_names[j], 'images': images,
                 'share_of_true': images / int(self.support[i])}
                for i, j, images in self.confused(MAX_PAIRS)
            ],
            'calibration': {
                'expected_calibration_error': calibration.expected_error,
                'maximum_calibration_error': calibration.largest_error,
                'bins': [
                    {'from': i / bins, 'to': (i + 1) / bins, 'images': n, 'accuracy': a,
                     'confidence': c}
                    for i, (n, a, c) in enumerate(zip(*binned, strict=True))
                ],
            },
        }  # fmt: skip


AnyMetrics = Metrics | several.SeveralMetrics | regression.NumberMetrics


class Recorded:
    """A source that keeps what its examples are called, once they were read.

    Attributes:
      keys: by index; '' of those that were not read.
    """

    def __init__(self, source: Source):
        self.class_names, self.exif = source.class_names, source.exif
        self.channels, self.label_dtype = channels_of(source), label_dtype_of(source)
        self.keys = [''] * len(source)
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        try:
            example = self._source[index]
        except BadImageError as error:
            self.keys[index] = error.key
            raise
        self.keys[index] = example.key
        return example


def collect(
    classifier: Classifier,
    source: Source,
    *,
    model_labels: Sequence[int],
    batch: int = 32,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[Outcomes | Outputs, list[BadImageError]]:
    """Runs a classifier on each example of a source.

    Args:
      classifier: of `classifier.open_classifier`.
      source: labelled images, of `sources.open_dataset`.
      model_labels: for each label of the source the model's, see `labels.remap`.
      batch: images at once.
      advance: called after each batch with the number of its images.

    Returns:
      What became of each image, in the order of the source: of a model of one class for each its
      `Outcomes`, else the `Outputs` for the labels of the source; and the errors of the images that
      could not be read.

    Raises:
      UserError: `batch` less than 1, or the labels are of another kind than the model's outputs.
    """
    _check_labels(classifier.task, label_dtype_of(source))
    one = classifier.task.kind == ONE
    errors: list[BadImageError] = []
    parts = []
    to_model = np.array([*model_labels, -1])  # the label of an unreadable record may be -1
    for data, logits in classify(classifier, source, batch=batch, on_bad=errors.append):
        told = {name: data[name] for name in ('example', 'readable', 'label')}
        if one:
            told['label'] = to_model[data['label']]
            told |= outcomes(logits.astype(np.float64), told['label'])
        else:
            told['output'] = logits[:, to_model[:-1]]
        parts.append(told)
        advance(len(data['label']))
    if one:
        return join(parts, len(source)), errors
    return Outputs.of(columns(parts, len(source))), errors


def _check_labels(task: Task, dtype: np.dtype) -> None:
    """Refuses labels that say nothing of such outputs."""
    given = 'one class for each image' if dtype == CLASS_INDEX else 'numbers or several classes'
    if (task.kind == ONE) != (dtype == CLASS_INDEX):
        gives = {ONE: 'the one class of an image', SEVERAL: 'a yes or no for each class'}
        raise UserError(
            f'the labels of the data are {given}, and this model gives '
            f'{gives.get(task.kind, "numbers")}: they say nothing of each other'
        )


def measure(found: Outcomes | Outputs, class_names: Sequence[str], task: Task) -> 'AnyMetrics':
    """Computes all metrics of what `collect` gave.

    Args:
      found: what became of each image.
      class_names: of the C outputs that it is about.
      task: of these.

    Raises:
      UserError: there is not one image that could be read; or none with a class.
    """
    if isinstance(found, Outcomes):
        return compute(found, class_names)
    check_readable(found.readable)
    how = several.compute if task.kind == SEVERAL else regression.compute
    return how(found, task, class_names)


def compute(found: Outcomes, class_names: Sequence[str]) -> Metrics:
    """Computes all metrics of a model of one class for each image.

    Args:
      found: what became of each image.
      class_names: of the C classes, in label order.

    Raises:
      UserError: there is not one image that could be read.
    """
    with extra('report'):
        from sklearn import metrics
    from scipy import sparse

    readable = found.readable
    overall = totals(found, len(class_names))
    labels = np.arange(len(class_names))
    # An image that cannot be read is taken for a class that does not exist: missed, not mistaken.
    predicted = np.where(readable, found.predicted, len(labels))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        found.label, predicted, labels=labels, zero_division=np.nan
    )
    return Metrics(
        class_names=tuple(class_names),
        count=len(readable),
        unreadable=int(overall.get('unreadable', 0)),
        accuracy=overall['accuracy'],
        accuracy_top5=overall.get('accuracy_top5'),
        loss=overall['loss'],
        precision=precision,
        recall=recall,
        f1=f1,
        support=support,
        confusion=sparse.coo_array(
            (np.ones(readable.sum(), np.int64), (found.label[readable], predicted[readable])),
            shape=(len(labels), len(labels)),
        ).tocsr(),
        calibration=calibrate(found.confidence[readable], found.right[readable]),
    )


def calibrate(confidence: np.ndarray, right: np.ndarray, *, bins: int = BINS) -> Calibration:
    """Compares confidence and accuracy in bins of equal width.

    Args:
      confidence: float [N] in [0, 1], probability of the predicted class; at least one.
      right: bool [N], whether the prediction is right.
      bins: how many.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side='left') - 1, 0, bins - 1)
    total = functools.partial(np.bincount, place, minlength=bins)
    count = total()
    with np.errstate(invalid='ignore'):
        accuracy, mean = total(weights=right) / count, total(weights=confidence) / count
    gap = np.abs(accuracy - mean)
    return Calibration(
        count, accuracy, mean, float(np.nansum(gap * count) / count.sum()), float(np.nanmax(gap))
    )


def _triples(counts: 'sparse.csr_array') -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of what is not 0, by row."""
    found = counts.tocoo()
    return found.row, found.col, found.data


def _plain(values: np.ndarray) -> list[Any]:
    """Nested lists of Python numbers, None for NaN."""
    if values.dtype.kind != 'f':
        return values.tolist()
    return [None if np.isnan(value) else value for value in values.tolist()]
