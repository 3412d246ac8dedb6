"""What XLA says about the real training step: FLOPs and memory.

The step is compiled for the devices at hand, not run: seconds for small models, minutes for large
ones. Neither weights nor images are made.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from configs import common
from vit_jax import models, optim, sharding, state, steps


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA counted in a compiled step, for one device.

    Attributes:
      batch: images per step, over all devices.
      flops: of one step; 0 where the compiler does not count them. The body of a loop is counted
        once, so `accum_steps` has to be 1 for a true count.
      arguments: bytes of state and batch.
      temporary: bytes of everything else at its largest.
    """

    batch: int
    flops: float
    arguments: int
    temporary: int

    @property
    def total(self) -> int:
        """Bytes: what is there at one time."""
        return self.arguments + self.temporary


def training(
    model_config: Mapping[str, Any],
    *,
    num_classes: int,
    image_size: int,
    batch: int,
    accum_steps: int = 1,
    dtype: str = 'float32',
    optimizer: str = 'sgd',
    optim_dtype: str = 'bfloat16',
    remat: str = '',
    attention: str = 'auto',
    fsdp: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Compiled:
    """Compiles the training step; arguments as for `cost.training_memory`.

    Args:
      model_config: see `cost.training_memory`, as all that is not named here.
      num_classes: C.
      image_size: pixels.
      batch: images over all devices.
      accum_steps: micro-batches per device.
      dtype: of activations.
      optimizer: 'sgd' or 'adamw'.
      optim_dtype: of momentum.
      remat: '', 'dots' or 'full'.
      attention: implementation.
      fsdp: how many devices share the parameters.
      devices: for which it is compiled; default the first that there is.
    """
    config = common.get_defaults()
    config.update(dict(optimizer=optimizer, optim_dtype=optim_dtype))
    schedule = optim.create_learning_rate_schedule(
        config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
    )
    tx = optim.create_optimizer(config, schedule)
    model = models.from_config(
        model_config,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        attention=attention,
        remat=remat,
    )
    mesh = sharding.create_mesh(fsdp, devices or jax.devices()[:1])
    abstract = state.abstract_state(model, tx, image_size, mesh)
    step = steps.make_train_step(
        model,
        tx,
        schedule,
        mesh,
        jax.tree.map(lambda leaf: leaf.sharding, abstract),
        seed=0,
        accum_steps=accum_steps,
    )
    images = steps.abstract_batch(batch, image_size, mesh)
    return _counted(step.lower(abstract, images).compile(), batch)


def _counted(compiled: Any, batch: int) -> Compiled:
    memory = compiled.memory_analysis()
    return Compiled(
        batch=batch,
        flops=(compiled.cost_analysis() or {}).get('flops', 0.0),
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
    )


def predict_total(first: Compiled, second: Compiled, batch: int) -> float:
    """Bytes at another batch size, on the line through two.

    A line, not a multiple: gradients and working space do not grow with the batch. It holds
    among batch sizes at which activations take more than the gradients do.

    Args:
      first: compiled at one batch size.
      second: compiled at another.
      batch: images per step.
    """
    slope = (second.total - first.total) / (second.batch - first.batch)
    return first.total + slope * (batch - first.batch)
