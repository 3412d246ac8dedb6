"""Memory and disk: is there enough, before a run begins, and what to say when there is not.

Memory is compared twice: what no way of computing can do without is known by arithmetic at once,
and what the compiled training step takes, before any weights are read.
"""

import ctypes
import dataclasses
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vit_jax import config as config_lib
from vit_jax import sharding
from vit_jax.data import loader
from vit_jax.data.reader import default_threads
from vit_jax.errors import UserError
from vit_jax.state import TrainState
from vit_jax.variants import sides


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that training takes on one device.

    Attributes:
      parameters: float32.
      gradients: one per parameter.
      optimizer: momentum or moments.
      inputs: a batch of images and labels; on a GPU also those that are sent ahead.
      activations: what else the compiled step takes: activations and working space; 0 before it is
        compiled.
      compiling: bytes of this process that compiling took, and that it keeps.
    """

    parameters: int
    gradients: int
    optimizer: int
    inputs: int
    activations: int = 0
    compiling: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device at one time."""
        parts = self.parameters, self.gradients, self.optimizer, self.inputs, self.activations
        return sum(parts)


def least_memory(
    config: ml_collections.ConfigDict, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]
) -> Memory:
    """What training cannot do without: state, gradients and batch, counted from their shapes.

    Args:
      config: resolved.
      state: shapes, dtypes and shardings of the training state.
      batch: those of a batch, see `steps.abstract_batch`.
    """
    parameters, platform = _size(state.params), jax.default_backend()
    # XLA may keep the gradients of a GPU as narrow as what they are computed from.
    narrow = platform == 'gpu' and config_lib.compute_dtype(config, platform) == 'bfloat16'
    return Memory(
        parameters=parameters,
        gradients=parameters // 2 if narrow else parameters,
        optimizer=_size(state.opt_state),
        inputs=_size(batch) * (1 + sharding.steps_ahead()),
    )


def compiled_memory(least: Memory, step: jax.stages.Compiled, compiling: int) -> Memory:
    """What training takes, by the compiler's own account of the training step.

    Args:
      least: of `least_memory`.
      step: the compiled training step.
      compiling: bytes by which this process grew while it compiled.
    """
    ahead = sharding.steps_ahead()  # the step knows only the batch that it works on
    total = program_bytes(step) + least.inputs * ahead // (1 + ahead)
    return dataclasses.replace(
        least, activations=max(0, total - least.total), compiling=max(0, compiling)
    )


def program_bytes(program: jax.stages.Compiled) -> int:
    """Bytes of a device that a compiled program takes while it runs.

    Arguments, outputs and temporary memory are there at one time, but for outputs that take the
    place of arguments. (Not `peak_memory_in_bytes`, which leaves out most of it on CPUs.)
    """
    found = program.memory_analysis()
    if found is None:
        return 0  # a backend that does not count it
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return total - found.alias_size_in_bytes


def check_memory(config: ml_collections.ConfigDict, need: Memory, has: int) -> None:
    """Compares what training needs with what there is.

    Args:
      config: resolved.
      need: of `least_memory` or `compiled_memory`.
      has: of `memory_of` a device, before anything was compiled; 0 if unknown.

    Raises:
      UserError: it is more than a device has (on a CPU, whose virtual devices share it: than the
        machine has left, beside the cache), and `config.check_memory` is on.
    """
    device, total = jax.local_devices()[0], need.total
    if device.platform == 'cpu':
        total = on_the_host(config, need)
        has = max(1, has - int(config.cache * 2**30)) if has else 0
        beside = f' beside config.cache={config.cache:g}' if config.cache else ''
        where = f'this machine has {gib(has)} left{beside}'
    else:
        where = f'{device.device_kind} has {gib(has)}'
    if has and total > has and config.check_memory:
        about = 'about' if need.activations else 'more than'
        raise UserError(
            f'training needs {about} {gib(total)} of memory ({_parts(need)}), and {where}: '
            f'{_advice(config, device.platform)}. '
            '(--config.check_memory=False starts nevertheless)'
        )


def on_the_host(config: ml_collections.ConfigDict, need: Memory) -> int:
    """Bytes that training on this machine's CPU takes, on all of its (virtual) devices."""
    total = need.total * jax.local_device_count()
    if not need.activations:
        return total
    # Beside the step: what compiling took, the batches that wait, and a copy of the state while it
    # is read or saved.
    copy = need.parameters + need.optimizer
    return total + need.compiling + _waiting_batches(config) + copy


def check_cache(config: ml_collections.ConfigDict) -> None:
    """Raises if `config.cache` is more than this machine has.

    Raises:
      UserError: says how much is left.
    """
    has = _host_memory_left()
    if has and not config.cache * 2**30 <= has:
        raise UserError(
            f'config.cache={config.cache:g}: this machine has {gib(has)} of memory left; use a '
            'smaller one (as many images are kept as fit), or 0'
        )


def out_of_memory(
    error: Exception, config: ml_collections.ConfigDict, need: Memory
) -> UserError | None:
    """The error to show when the device ran out of memory; None if `error` is something else.

    Args:
      error: what JAX raised.
      config: resolved.
      need: of `compiled_memory`.
    """
    text = str(error)
    if not re.search(r'RESOURCE_EXHAUSTED|[Oo]ut of memory', text):
        return None
    device = jax.local_devices()[0]
    words = ' '.join(text.split())[:200]
    return UserError(
        f'{device.device_kind} ran out of memory ({words}). Training needs about '
        f'{gib(need.total)} ({_parts(need)}), it has {gib(memory_of(device))}: '
        f'{_advice(config, device.platform)}'
    )


def check_disk(workdir: str | os.PathLike[str], state: TrainState, keep: int) -> None:
    """Raises if the disk has no room for a checkpoint and the model folder.

    Args:
      workdir: folder of the run; need not exist.
      state: the training state, or its shapes.
      keep: checkpoints that stay.

    Raises:
      UserError: there is less room than one checkpoint and the model folder take.
    """
    checkpoint, model = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state, state.params)
    )
    folder = pathlib.Path(workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < checkpoint + model:
        raise UserError(
            f'{workdir}: no room for the checkpoints. One takes {gib(checkpoint)} ({keep} are '
            f'kept, and one more while it is written), the model folder {gib(model)}; '
            f'{gib(free)} are free. Make room, or use a --workdir on another disk'
        )


def memory_of(device: jax.Device) -> int:
    """Bytes of memory: of a GPU all that JAX may use, of a CPU what is left; 0 if unknown."""
    stats = device.memory_stats() or {}  # a CPU has none
    return stats.get('bytes_limit', 0) if device.platform != 'cpu' else _host_memory_left()


def resident_bytes() -> int:
    """Bytes of memory that this process holds; 0 if unknown."""
    try:
        pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    except OSError:
        return 0  # not Linux
    return pages * os.sysconf('SC_PAGE_SIZE')


def return_freed_memory() -> None:
    """Gives memory that this process has freed back to the system, where the C library is glibc.

    By itself it keeps most of what compiling and reading weights took, in pieces too small for the
    training step: a quarter of what a run of ViT-S/16 takes on a CPU.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


def _host_memory_left() -> int:
    """Bytes that this process may still take: of the machine, or of its control group."""
    left = []
    try:
        meminfo = pathlib.Path('/proc/meminfo').read_text()
        left += [1024 * int(kib) for kib in re.findall(r'MemAvailable:\s+(\d+) kB', meminfo)]
    except OSError:
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
    return max(0, min(left, default=0))


def _waiting_batches(config: ml_collections.ConfigDict) -> int:
    """Bytes of the batches that wait for the device."""
    height, width = sides(config.pp.crop)
    size = config.batch // jax.process_count() * (height * width * 3)
    size *= 4 if config.pp.exact else 1
    threads = config.data_threads or default_threads()
    return size * loader.batches_ahead(size, threads)


def _size(tree: Any) -> int:
    """Bytes of what one device holds of these arrays, given by shape, dtype and sharding."""
    return sum(
        jnp.dtype(leaf.dtype).itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(tree)
    )


def _advice(config: ml_collections.ConfigDict, platform: str) -> str:
    accum_steps = max(1, config.accum_steps)
    micro = config.batch // (accum_steps * jax.device_count())
    ways = [
        'use a smaller --config.batch',
        f'a larger --config.accum_steps (so far {accum_steps}: micro-batches of {micro} images)',
        '--config.remat=dots or full',
    ]
    if platform != 'cpu':  # there XLA computes bfloat16 as float32
        if config_lib.compute_dtype(config, platform) != 'bfloat16':
            ways.append('--config.dtype=bfloat16')
        ways.append('more devices (--config.fsdp=-1 shares parameters and optimizer state)')
    return ', '.join([*ways, 'a smaller model'])


def _parts(need: Memory) -> str:
    last = f'activations {gib(need.activations)}'
    if not need.activations:
        last = f'a batch {gib(need.inputs)}; activations come on top'
    return (
        f'parameters {gib(need.parameters)}, gradients {gib(need.gradients)}, optimizer '
        f'{gib(need.optimizer)}, {last}'
    )


def gib(size: int) -> str:
    """As people write it: '1.5 GiB', '12.0 MiB'."""
    return f'{size / 2**30:.1f} GiB' if size >= 2**28 else f'{size / 2**20:.1f} MiB'
