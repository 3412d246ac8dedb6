"""Memory and disk: is there enough, before a run begins, and what to say when there is not."""

import os
import pathlib
import re
import shutil
from typing import Any

import jax
import ml_collections

from vit_jax import config as config_lib
from vit_jax.analysis import cost
from vit_jax.data import loader
from vit_jax.errors import UserError


def check_memory(
    config: ml_collections.ConfigDict, *, num_classes: int, devices: int, platform: str
) -> cost.Memory:
    """Estimates what training needs on a device, and compares it with what there is.

    Args:
      config: resolved.
      num_classes: outputs of the model.
      devices: how many take part, over all processes.
      platform: 'cpu' or 'gpu'.

    Returns:
      The estimate, bytes per device.

    Raises:
      UserError: it is more than a device has (on a CPU, whose virtual devices share it: than the
        machine has left), and `config.check_memory` is on.
    """
    need = estimate(config, num_classes=num_classes, devices=devices, platform=platform)
    has = memory_of(jax.local_devices()[0])
    if platform == 'cpu':
        total = need.total * jax.local_device_count() + _waiting_batches(config)
        has = max(1, has - int(config.cache * 2**30)) if has else 0
        beside = f' beside config.cache={config.cache:g}' if config.cache else ''
        where = f'this machine has {_gib(has)} left{beside}'
    else:
        total = need.total
        where = f'{jax.local_devices()[0].device_kind} has {_gib(has)}'
    if has and total > has and config.check_memory:
        raise UserError(
            f'training needs about {_gib(total)} of memory ({_parts(need)}), and {where}: '
            f'{_advice(config, devices, platform)}. '
            '(This is an estimate; --config.check_memory=False starts nevertheless)'
        )
    return need


def estimate(
    config: ml_collections.ConfigDict, *, num_classes: int, devices: int, platform: str
) -> cost.Memory:
    """What training with this config needs, bytes per device; see `cost.training_memory`."""
    return cost.training_memory(
        config.model,
        num_classes=num_classes,
        image_size=config.pp.crop,
        batch=config.batch,
        accum_steps=max(1, config.accum_steps),
        dtype=config_lib.compute_dtype(config, platform),
        optimizer=config.optimizer,
        optim_dtype=config.optim_dtype,
        remat=config.remat,
        attention=config.attention,
        devices=devices,
        fsdp=devices if config.fsdp == -1 else config.fsdp,
        platform=platform,
    )


def check_cache(config: ml_collections.ConfigDict) -> None:
    """Raises if `config.cache` is more than this machine has.

    Raises:
      UserError: says how much is left.
    """
    has = _host_memory_left()
    if has and not config.cache * 2**30 <= has:
        raise UserError(
            f'config.cache={config.cache:g}: this machine has {_gib(has)} of memory left; use a '
            'smaller one (as many images are kept as fit), or 0'
        )


def out_of_memory(
    error: Exception, config: ml_collections.ConfigDict, need: cost.Memory
) -> UserError | None:
    """The error to show when the device ran out of memory; None if `error` is something else.

    Args:
      error: what JAX raised.
      config: resolved.
      need: of `check_memory`.
    """
    text = str(error)
    if not re.search(r'RESOURCE_EXHAUSTED|[Oo]ut of memory', text):
        return None
    device = jax.local_devices()[0]
    words = ' '.join(text.split())[:200]
    return UserError(
        f'{device.device_kind} ran out of memory ({words}). The estimate was {_gib(need.total)} '
        f'({_parts(need)}), it has {_gib(memory_of(device))}: '
        f'{_advice(config, jax.device_count(), device.platform)}'
    )


def check_disk(workdir: str | os.PathLike[str], state: Any, keep: int) -> None:
    """Raises if the disk has no room for a checkpoint and the model folder.

    Args:
      workdir: folder of the run; need not exist.
      state: the training state, or its shapes.
      keep: checkpoints that stay.

    Raises:
      UserError: there is less room than one checkpoint and the model folder take.
    """
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    model = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    folder = pathlib.Path(workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < checkpoint + model:
        raise UserError(
            f'{workdir}: no room for the checkpoints. One takes {_gib(checkpoint)} ({keep} are '
            f'kept, and one more while it is written), the model folder {_gib(model)}; '
            f'{_gib(free)} are free. Make room, or use a --workdir on another disk'
        )


def memory_of(device: jax.Device) -> int:
    """Bytes of memory: of a GPU all that JAX may use, of a CPU what is left; 0 if unknown."""
    stats = device.memory_stats() or {}  # a CPU has none
    return stats.get('bytes_limit', 0) if device.platform != 'cpu' else _host_memory_left()


def _host_memory_left() -> int:
    """Bytes that this process may still take: of the machine, or of its control group."""
    left = []
    try:
        meminfo = pathlib.Path('/proc/meminfo').read_text()
        left.append(1024 * int(re.search(r'MemAvailable:\s+(\d+) kB', meminfo)[1]))
    except (OSError, TypeError):
        return 0  # not Linux
    for group, limit, used in (
        ('/sys/fs/cgroup', 'memory.max', 'memory.current'),  # version 2
        ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes'),  # version 1
    ):
        try:
            most = pathlib.Path(group, limit).read_text().strip()
            if most != 'max':
                left.append(int(most) - int(pathlib.Path(group, used).read_text()))
        except OSError:
            continue
    return max(0, min(left))


def _waiting_batches(config: ml_collections.ConfigDict) -> int:
    """Bytes of the batches that wait for the device."""
    size = config.batch // jax.process_count() * config.pp.crop**2 * 3
    size *= 4 if config.pp.exact else 1
    threads = config.data_threads or loader.default_threads()
    return size * loader.batches_ahead(size, threads)


def _advice(config: ml_collections.ConfigDict, devices: int, platform: str) -> str:
    accum_steps = max(1, config.accum_steps)
    micro = config.batch // (accum_steps * devices)
    ways = [
        'use a smaller --config.batch',
        f'a larger --config.accum_steps (so far {accum_steps}: micro-batches of {micro} images)',
    ]
    ways.append('--config.remat=dots or full')
    if platform != 'cpu':  # there XLA computes bfloat16 as float32
        if config_lib.compute_dtype(config, platform) != 'bfloat16':
            ways.append('--config.dtype=bfloat16')
        ways.append('more devices (--config.fsdp=-1 shares parameters and optimizer state)')
    return ', '.join([*ways, 'a smaller model'])


def _parts(need: cost.Memory) -> str:
    return (
        f'parameters {_gib(need.weights)}, gradients {_gib(need.gradients)}, optimizer '
        f'{_gib(need.optimizer)}, activations {_gib(need.activations)}'
    )


def _gib(size: int) -> str:
    return f'{size / 2**30:.1f} GiB' if size >= 2**28 else f'{size / 2**20:.1f} MiB'
