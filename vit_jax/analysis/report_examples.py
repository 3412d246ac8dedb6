"""The predictions of a run's model on its test images: the part of a report that computes."""

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.analysis import attention, counts, report_data
from vit_jax.analysis.run_files import Run
from vit_jax.data.dataset import Selection
from vit_jax.data.decode import decode, load_image
from vit_jax.data.examples import Example, Source, channels_of, label_dtype_of
from vit_jax.errors import UserError
from vit_jax.evaluate import Outcomes, Outputs
from vit_jax.inference import labels, model_folder, several
from vit_jax.inference import metrics as classification_metrics
from vit_jax.inference.classifier import JaxClassifier
from vit_jax.inference.task import NUMBERS, Task

MIN_IMAGES = 64
CPU_MACS = 2 * 10**12  # of all predictions, which is about half a minute
SHOWN = 8  # best, and worst
EXPLAINED = 3  # best, and worst, with attention
_BATCH = 32
_SIDE = 192  # of a picture, pixels at most


@dataclasses.dataclass(frozen=True)
class Picture:
    """A test image and its prediction.

    Attributes:
      key: what a person calls the image; of one in a folder the path below it.
      url: `data:` URL of a small version.
      right: name of its class; of several classes all, of numbers these.
      predicted: name of the most probable class; or the classes found, or the numbers.
      mistaken: whether these are other classes.
      confidence: probability of the one class that is predicted.
      probability: of the right one.
      attention: `data:` URLs: what the model sees, attention of the last block, rollout; or none.
    """

    key: str
    url: str
    right: str
    predicted: str
    mistaken: bool = False
    confidence: float | None = None
    probability: float | None = None
    attention: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of a model on the test images of its run.

    Attributes:
      metrics: of the images that were predicted.
      source: what they are, for people.
      available: how many test images there are.
      best: right predictions, the surest first; of other tasks those with the least errors.
      worst: wrong predictions, the lowest probability of the right class first; or the largest
        errors.
      attention_note: why there are no attention maps; '' if there are.
      notes: what the best and the worst are.
    """

    metrics: classification_metrics.AnyMetrics
    source: str
    available: int
    best: tuple[Picture, ...]
    worst: tuple[Picture, ...]
    attention_note: str
    notes: tuple[str, str]


class _Subset:
    """Some examples of a source, itself a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.class_names, self.exif = source.class_names, source.exif
        self.channels, self.label_dtype = channels_of(source), label_dtype_of(source)
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]


def predict(run: Run, test: Selection, limit: int | None = None) -> Predictions:
    """Runs the model folder that a run chose over its test images.

    Args:
      run: finished.
      test: its test examples.
      limit: how many images at most; None for `image_limit`.

    Raises:
      UserError: the model folder is damaged, does not fit the data, or no image can be read.
    """
    model = model_folder.load(run.workdir / run.chosen)
    classifier = JaxClassifier(model)
    to_model = labels.remap(test.class_names, model.class_names, str(test))
    chosen = report_data.sample(len(test), image_limit(model) if limit is None else limit)
    found, _ = classification_metrics.collect(
        classifier, _Subset(test, chosen), model_labels=to_model, batch=_BATCH
    )
    # The ends of the paths tell images of a folder, or beside a table, from each other.
    root = report_data.place(run.config['dataset'])
    folder = f'{root.absolute().parent if root.is_file() else root}/'
    return of_outcomes(model, test, chosen, found, to_model, folder)


def of_outcomes(
    model: model_folder.Model,
    test: Selection,
    chosen: np.ndarray,
    found: Outcomes | Outputs,
    to_model: Sequence[int],
    folder: str,
    *,
    explained: int = EXPLAINED,
) -> Predictions:
    """Metrics and pictures of what became of test images.

    Args:
      model: that predicted them.
      test: the images.
      chosen: int [n], which of them were predicted.
      found: what became of these.
      to_model: for each label of the images the model's.
      folder: with which paths begin that are shown without it.
      explained: how many of the best, and of the worst, to show the attention of.
    """
    names, task = model.class_names, model.task
    if isinstance(found, Outcomes):
        judged = _judge_classes(found, names)
    else:  # of those of the data alone
        names, task = tuple(names[i] for i in to_model), task.pick(to_model)
        judged = _judge_outputs(found, names, task)
    metrics = classification_metrics.measure(found, names, task)
    note = ''
    try:
        attention.check(model)
    except UserError as error:
        note = str(error)

    def picture(place: int, row: int) -> Picture:
        key, pixels = _pixels(test, int(chosen[row]), model.channels)
        return Picture(
            key=key.removeprefix(folder),
            url=to_url(attention.as_rgb(pixels)),
            attention=() if note or place >= explained else _attention(model, pixels),
            **judged.describe(row),
        )

    best, worst = (
        tuple(picture(place, row) for place, row in enumerate(rows))
        for rows in (judged.best, judged.worst)
    )
    return Predictions(metrics, repr(test), len(test), best, worst, note, judged.notes)


def picture_of(source: Selection, index: int, folder: str, **told: Any) -> Picture:
    """A picture of an image of a source.

    Args:
      source: the images.
      index: which.
      folder: see `of_outcomes`.
      **told: of the image, see `Picture`.
    """
    key, pixels = _pixels(source, index, source.channels)
    return Picture(key.removeprefix(folder), to_url(attention.as_rgb(pixels)), **told)


def _pixels(source: Selection, index: int, channels: int) -> tuple[str, np.ndarray]:
    example = source[index]
    return example.key, decode(example.image, key=example.key, exif=source.exif, channels=channels)


class _Judged(NamedTuple):
    """Which images to show: rows of the predictions, what is told of each, and of both lists."""

    best: np.ndarray
    worst: np.ndarray
    describe: Callable[[int], dict[str, Any]]
    notes: tuple[str, str]


def _judge_classes(found: Outcomes, names: Sequence[str]) -> _Judged:
    # NaN would be neither best nor worst; it is wrong with no probability at all.
    score = np.nan_to_num(found.log_probability, nan=-np.inf)
    best, worst = (
        np.flatnonzero(which)[np.argsort(order[which], kind='stable')][:SHOWN]
        for which, order in (
            (found.right, -score),
            (found.readable & (found.rank > 0), score),
        )
    )

    def describe(row: int) -> dict[str, Any]:
        return {
            'right': names[found.label[row]],
            'predicted': names[found.predicted[row]],
            'mistaken': found.label[row] != found.predicted[row],
            'confidence': float(found.confidence[row]),
            'probability': float(np.exp(found.log_probability[row])),
        }

    return _Judged(
        best,
        worst,
        describe,
        (
            'The right ones with the highest probability.',
            'The wrong ones with the lowest probability of the right class: what the model takes '
            'the image for, and below it what it is.',
        ),
    )


def _judge_outputs(found: Outputs, names: Sequence[str], task: Task) -> _Judged:
    """The same of several classes, or of numbers."""
    values = task.values(found.output)
    rows = np.flatnonzero(found.readable)
    if task.kind == NUMBERS:
        spread = np.maximum(found.label[rows].std(axis=0), 1e-12)
        error = (np.abs(values - found.label)[rows] / spread).mean(axis=1)
        notes = (
            'Those with the smallest errors, in deviations of the targets.',
            'Those with the largest errors: what the model says, and below it what is true.',
        )
    else:
        error = several.loss_of_each(found.output[rows], found.label[rows])
        notes = (
            'Those with the smallest loss: all classes from the threshold on.',
            'Those with the largest loss: what the model finds, and below it what is there.',
        )
    order = rows[np.argsort(error, kind='stable')]

    def texts(numbers: np.ndarray, there: np.ndarray) -> str:
        if task.kind != NUMBERS:
            return ', '.join(names[i] for i in np.flatnonzero(there).tolist()) or '(none)'
        shown = [task.text(float(x), i) for i, x in enumerate(numbers)]
        alone = len(names) == 1
        return ', '.join(t if alone else f'{n} {t}' for n, t in zip(names, shown, strict=True))

    def describe(row: int) -> dict[str, Any]:
        right = texts(found.label[row], found.label[row] > 0.5)
        predicted = texts(values[row], values[row] >= task.threshold)
        mistaken = task.kind != NUMBERS and right != predicted
        return {'right': right, 'predicted': predicted, 'mistaken': mistaken}

    half = min(SHOWN, len(order) // 2)
    return _Judged(order[:half], order[::-1][:half], describe, notes)


def image_limit(model: model_folder.Model) -> int:
    """How many images to predict: `report_data.MAX_IMAGES`, of a large model on a CPU less."""
    import jax

    if jax.default_backend() != 'cpu':
        return report_data.MAX_IMAGES
    macs = counts.forward_macs(
        model.model_config, len(model.class_names), model.image_size, model.channels
    )
    return int(np.clip(CPU_MACS // macs, MIN_IMAGES, report_data.MAX_IMAGES))


def to_url(pixels: np.ndarray) -> str:
    """A picture as a `data:` URL: PNG, or JPEG where that is smaller.

    Args:
      pixels: uint8 [height, width, 3].
    """
    from PIL import Image

    # Browsers would blur a tiny image.
    factor = max(1, _SIDE // 2 // max(pixels.shape[:2]))
    image = Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    image.thumbnail((_SIDE, _SIDE))
    encoded = {}
    for kind, options in (('png', {'optimize': True}), ('jpeg', {'quality': 85})):
        out = io.BytesIO()
        image.save(out, format=kind, **options)
        encoded[kind] = out.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f'data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}'


def _attention(model: model_folder.Model, pixels: np.ndarray) -> tuple[str, ...]:
    """What the model sees, and over it the attention of the last block, and the rollout."""
    seen = load_image(pixels, model.preprocess, channels=model.channels)
    maps = attention.maps(model, seen[None])
    last = maps.class_token[0, -1].mean(axis=0)
    # Each patch of a small image should be larger than a pixel of the overlay.
    enlarged = seen.repeat(-(-_SIDE // len(seen)), axis=0).repeat(-(-_SIDE // len(seen)), axis=1)
    pictures: Sequence[np.ndarray] = (
        attention.as_rgb(enlarged),
        attention.overlay(attention.as_rgb(enlarged), last),
        attention.overlay(attention.as_rgb(enlarged), maps.rollout[0]),
    )
    return tuple(map(to_url, pictures))
