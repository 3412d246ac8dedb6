"""Evaluation of a model on a set of labelled images: every example counts exactly once."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax import sharding
from vit_jax.data import loader
from vit_jax.data.batches import eval_batches
from vit_jax.data.dataset import Source
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError


def evaluate(
    eval_step: Callable[[Any, Any], dict[str, jax.Array]],
    params: Any,
    source: Source,
    preprocess: Preprocess,
    mesh: Mesh,
    *,
    batch: int,
    threads: int | None = None,
    on_bad: loader.OnBad | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[dict[str, float], float] | None:
    """Loss and accuracy over all examples of a source.

    Args:
      eval_step: of `steps.make_eval_step`.
      params: on the devices.
      source: the examples.
      preprocess: how they become the model's input.
      mesh: the devices; the batch is spread over all of them.
      batch: images per step; rounded up to a multiple of the devices. The last one is padded, and
        the padding does not count.
      threads: readers, see `eval_batches`.
      on_bad: called with the error of each image that cannot be read, once for each key, from the
        threads that read. None: such an image is an error.
      should_stop: asked after each batch; once it says so, the evaluation ends without a result.

    Returns:
      Metrics: `accuracy_test` in [0, 1], `loss_test` (mean cross-entropy) and, with more than 5
      classes, `accuracy_top5_test`; and the speed, images per second and device. Where images
      cannot be read, `unreadable_test` is their number; they count in the accuracies, as wrong, and
      not in the loss. None if `should_stop` ended it.

    Raises:
      BadImageError: without `on_bad`, an image that cannot be read.
      UserError: no examples, or not one that can be read.
    """
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
    start = time.monotonic()
    sums = []
    for data in batches:
        data = {name: data[name] for name in ('image', 'label', 'mask', 'readable')}
        sums.append(eval_step(params, sharding.put_batch(data, mesh)))
        if len(sums) > sharding.steps_ahead():
            jax.block_until_ready(sums[-1 - sharding.steps_ahead()])
        if should_stop and should_stop():
            return None
    # Summed in float64 on the host: float32 stops counting at 2**24 images.
    sums = jax.device_get(sums)
    total = {name: float(np.sum([s[name] for s in sums], dtype=np.float64)) for name in sums[0]}
    seconds = time.monotonic() - start
    count = total['count']
    if count != len(source):
        raise RuntimeError(f'evaluated {count:.0f} of {len(source)} examples')
    if not total['readable']:
        raise UserError(f'not one of the {len(source):,} images to evaluate on can be read')
    metrics = {
        'accuracy_test': total['correct'] / count,
        'loss_test': total['loss'] / total['readable'],
    }
    if len(source.class_names) > 5:
        metrics['accuracy_top5_test'] = total['correct_top5'] / count
    if total['readable'] < count:
        metrics['unreadable_test'] = count - total['readable']
    return metrics, count / seconds / devices
