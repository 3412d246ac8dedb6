"""Evaluation: what becomes of each labelled example, and accuracy and loss over all of them.

Training, `vit_jax evaluate` and the report count by the same rules, which stand here once. JAX
is not imported before `evaluate` needs it, so that ONNX files are evaluated without it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.data.batches import Batch, eval_batches, in_order
from vit_jax.data.examples import Source
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reader import OnBad, Reader
from vit_jax.errors import UserError
from vit_jax.inference import regression, several
from vit_jax.inference.task import ONE_CLASS, SEVERAL, Task

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh


# How the columns are called that hold loss and metrics of a loss of one's own.
OWN = 'own/'


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of each of N examples, in the order of their source.

    Attributes:
      label: int [N], right class; -1 for an unreadable image whose label is not known either.
      readable: bool [N], whether the image could be read; what follows has no meaning if not.
      rank: int [N], how many classes come before the right one: 0 is right.
      predicted: int [N], the most probable class.
      log_probability: float [N], natural logarithm of the probability of the right class.
      confidence: float [N], probability of the predicted class.
    """

    label: np.ndarray
    readable: np.ndarray
    rank: np.ndarray
    predicted: np.ndarray
    log_probability: np.ndarray
    confidence: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Bool [N], whether the predicted class is the right one; never of an unreadable image."""
        return self.readable & (self.rank < 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Outputs:
    """What a model of several classes, or of numbers, gave for each of N examples.

    Attributes:
      label: float [N, C]: 0 or 1, or the numbers in their units.
      readable: bool [N], whether the image could be read; its output has no meaning if not.
      output: float [N, C], of the model: before the sigmoid, or in the scale of training.
    """

    label: np.ndarray
    readable: np.ndarray
    output: np.ndarray

    @classmethod
    def of(cls, found: Mapping[str, np.ndarray]) -> 'Outputs':
        """Of the columns of `steps.eval_step_fn`; a single number need not have an axis."""
        output = found['output']
        return cls(found['label'].reshape(output.shape), found['readable'], output)


def outcomes(logits: Any, label: Any) -> dict[str, Any]:
    """Compares logits with the right classes: the one rule of what is right.

    Of equal logits the class of lower label comes first; a right class whose logit is not finite
    comes last.

    Args:
      logits: float [N, C], of NumPy or of JAX (then this may be traced).
      label: int [N], of the same library.

    Returns:
      `rank`, `predicted`, `log_probability`, `confidence`, each [N]; see `Outcomes`.
    """
    xp = logits.__array_namespace__()
    score = xp.take_along_axis(logits, label[:, None], axis=-1)
    classes = xp.arange(logits.shape[-1])[None]
    before = (logits > score) | ((logits == score) & (classes < label[:, None]))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
    return {
        'rank': xp.where(xp.isfinite(score[:, 0]), before.sum(axis=-1), logits.shape[-1]),
        'predicted': xp.argmax(logits, axis=-1),
        'log_probability': xp.take_along_axis(log_probabilities, label[:, None], axis=-1)[:, 0],
        'confidence': xp.exp(log_probabilities.max(axis=-1)),
    }


def join(parts: Sequence[Mapping[str, np.ndarray]], count: int) -> Outcomes:
    """The outcomes of a whole source from those of its batches.

    Args:
      parts: as for `columns`, the others being the fields of `Outcomes`.
      count: as for `columns`.

    Raises:
      RuntimeError: as `columns`.
    """
    return Outcomes(**columns(parts, count))


def columns(parts: Sequence[Mapping[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """What is told of the examples of a whole source, from what is told of its batches.

    Args:
      parts: of each batch `example` (its index in the source, -1 for padding, which is left out)
        and other columns.
      count: of examples in the source.

    Returns:
      The other columns, [count, ...], in the order of the source.

    Raises:
      RuntimeError: not every example is there exactly once.
    """
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    example = joined.pop('example')
    order = np.argsort(example, kind='stable')[np.count_nonzero(example < 0) :]
    if not np.array_equal(example[order], np.arange(count)):
        raise RuntimeError(f'evaluated {len(order)} examples instead of each of {count} once')
    return {name: values[order] for name, values in joined.items()}


def totals(found: Outcomes, classes: int) -> dict[str, float]:
    """Accuracy and loss, summed in float64.

    Args:
      found: of N examples.
      classes: how many there are.

    Returns:
      `accuracy`, share of N in [0, 1]; `loss`, mean cross-entropy (natural logarithm) of the
      readable ones; with more than 5 classes `accuracy_top5`, share of N whose right class is among
      the five most probable; where images cannot be read `unreadable`, their number.

    Raises:
      UserError: not one image can be read.
    """
    readable = found.readable
    check_readable(readable)
    result = {
        'accuracy': float(found.right.mean()),
        'loss': -float(found.log_probability[readable].mean(dtype=np.float64)),
    }
    if classes > 5:
        result['accuracy_top5'] = float((readable & (found.rank < 5)).mean())
    return result | _unreadable(readable)


def own_totals(values: Mapping[str, np.ndarray], readable: np.ndarray) -> dict[str, float]:
    """Loss and metrics of a loss of one's own, `OWN`: means over the readable examples, in float64.

    Args:
      values: float [N] of each, by the name of its column.
      readable: bool [N].

    Returns:
      As `totals`: the means by name, and `unreadable`.

    Raises:
      UserError: not one image can be read.
    """
    check_readable(readable)
    means = {
        name.removeprefix(OWN): float(column[readable].mean(dtype=np.float64))
        for name, column in values.items()
    }
    return means | _unreadable(readable)


def task_totals(found: Mapping[str, np.ndarray], task: Task, classes: int) -> dict[str, float]:
    """What is told of an evaluation, by the kind of the task.

    Args:
      found: columns: `label`, `readable`, and `output` or the others of `Outcomes`; only the former
        where nothing is known but a loss of one's own.
      task: what the outputs are.
      classes: how many.

    Returns:
      `totals`, or those of `several` or `regression`; nothing of labels that are none of these.

    Raises:
      UserError: not one image can be read.
    """
    if 'rank' in found:
        return totals(Outcomes(**found), classes)
    if 'output' not in found:
        return {}
    check_readable(found['readable'])
    told = Outputs.of(found)
    return several.totals(told) if task.kind == SEVERAL else regression.totals(told, task)


def check_readable(readable: np.ndarray) -> None:
    """Raises `UserError` if not one image can be read."""
    if not readable.any():
        raise UserError(f'not one of the {len(readable):,} images to evaluate on can be read')


def _unreadable(readable: np.ndarray) -> dict[str, float]:
    return {} if readable.all() else {'unreadable': int((~readable).sum())}


def evaluate(
    eval_step: 'Callable[[Any, Any], dict[str, jax.Array]]',
    params: Any,
    source: Source | Reader,
    preprocess: Preprocess,
    mesh: 'Mesh',
    *,
    split: str = 'test',
    task: Task = ONE_CLASS,
    **reading: Any,
) -> tuple[dict[str, float], float] | None:
    """Loss and accuracy of a model that is being trained, over all examples of a source.

    With a loss of one's own, the means of what it says of each example alone: the loss, and its
    metrics; accuracy only where labels are classes, other metrics by the task.

    With several processes each of them calls this, reads its share, and gets the same result.

    Args:
      eval_step: of `steps.make_eval_step`.
      params: on the devices.
      source: the examples.
      preprocess: how they become the model's input.
      mesh: the devices; the batch is spread over all of them.
      split: what the examples are for: 'test' or 'val'.
      task: what the outputs are.
      **reading: `batch` and others of `collect`.

    Returns:
      The `task_totals` and `own_totals`, `accuracy_{split}` and so on; and the speed, images per
      second and device. None if `should_stop` ended it.

    Raises:
      BadImageError: without `on_bad`, an image that cannot be read.
      UserError: no examples, or not one that can be read.
    """
    begin = time.monotonic()
    found = collect(eval_step, params, source, preprocess, mesh, **reading)
    if found is None:
        return None
    speed = len(source) / (time.monotonic() - begin) / mesh.devices.size
    own = {name: found.pop(name) for name in list(found) if name.startswith(OWN)}
    metrics = task_totals(found, task, len(source.class_names))
    if own:
        metrics |= own_totals(own, found['readable'])
    return {f'{name}_{split}': value for name, value in metrics.items()}, speed


def collect(
    eval_step: 'Callable[[Any, Any], dict[str, jax.Array]]',
    params: Any,
    source: Source | Reader,
    preprocess: Preprocess,
    mesh: 'Mesh',
    *,
    batch: int,
    threads: int | None = None,
    on_bad: OnBad | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, np.ndarray] | None:
    """What an evaluation step tells of all examples of a source.

    Args:
      eval_step: see `evaluate`.
      params: see `evaluate`.
      source: see `evaluate`.
      preprocess: see `evaluate`.
      mesh: see `evaluate`.
      batch: images per step; rounded up to a multiple of the devices. The last one is padded, and
        the padding does not count.
      threads: readers, see `eval_batches`.
      on_bad: see `eval_batches`.
      should_stop: asked after each batch; once it says so, the evaluation ends without a result.

    Returns:
      The `columns`; None if `should_stop` ended it.

    Raises:
      BadImageError: see `evaluate`.
      UserError: no examples.
    """
    import jax

    from vit_jax import sharding

    devices = mesh.devices.size
    batches = eval_batches(
        source,
        preprocess,
        batch=-(-min(batch, len(source)) // devices) * devices,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=threads,
        on_bad=on_bad,
    )

    def start(data: Batch) -> Callable[[], dict[str, np.ndarray]]:
        told = eval_step(params, sharding.put_batch(data, mesh))
        return lambda: jax.device_get(told)

    parts = []
    for part in in_order(start, batches, sharding.steps_ahead()):
        parts.append(part)
        if should_stop and should_stop():
            return None
    return columns(parts, len(source))
