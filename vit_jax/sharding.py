"""How a run is spread over devices: one mesh, data parallel or fully sharded (FSDP).

The mesh has the axes `data` and `fsdp`. The batch is spread over both. Parameters and optimizer
state are the same on all devices along `data`, and along `fsdp` each device holds a part of every
large array (ZeRO, https://arxiv.org/abs/1910.02054). With `fsdp` of size 1 that is plain data
parallelism.

Accumulation. A device splits its own share of the batch into `accum_steps` micro-batches, one after
the other, sums their gradients, and takes part in a single mean over devices at the end. Splitting
the *global* batch instead would make XLA gather all images on every device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError

BATCH_AXES = ('data', 'fsdp')
# Smaller arrays (biases, norms) are kept whole: gathering them costs more than it saves. Elements.
MIN_SIZE_TO_SHARD = 2**14


def create_mesh(fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
      fsdp: devices that share one copy of the parameters; 1 for data parallel, -1 for all.
      devices: default all, of all processes.

    Returns:
      A mesh of shape (devices / fsdp, fsdp) with automatic axes (under JAX's default, explicit
      axes, Linen modules fail).

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = len(devices) if fsdp == -1 else fsdp
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f'fsdp={fsdp} does not divide {len(devices)} devices')
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a training state (or of its shapes).

    Along `fsdp`, an array of at least `MIN_SIZE_TO_SHARD` elements is cut on its longest axis that
    the number of devices divides; all else is whole on every device.

    Args:
      tree: arrays or `ShapeDtypeStruct`s.
      mesh: of `create_mesh`.

    Returns:
      The same structure, of `NamedSharding`s.
    """
    parts = mesh.shape['fsdp']

    def rule(leaf) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes or math.prod(leaf.shape) < MIN_SIZE_TO_SHARD:
            return replicated(mesh)
        axis = max(axes, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'fsdp'))

    return jax.tree.map(rule, tree)


def previous(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Moves what is in each row to the next one, the last to the first: `jnp.roll(x, 1, axis=0)`.

    Where rows are spread over devices, one row goes from each to the next, and nothing is gathered.

    Args:
      x: [B, ...], spread as batches are.
      mesh: of `create_mesh`; None to leave it to XLA.
    """
    if mesh is None or mesh.size == 1:
        return jnp.roll(x, 1, axis=0)
    ring = [(device, (device + 1) % mesh.size) for device in range(mesh.size)]

    def local(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jax.lax.ppermute(x[-1:], BATCH_AXES, ring), x[:-1]])

    spec = PartitionSpec(BATCH_AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def steps_ahead() -> int:
    """How many steps the host may dispatch before it waits for an earlier one.

    Two keep a GPU busy without filling its memory with batches. On CPU none: there is nothing to
    gain, and virtual devices that wait for each other in two steps at once can lock up.
    """
    return 0 if jax.default_backend() == 'cpu' else 2


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch, as its part of a global array on the devices.

    Args:
      batch: arrays [local batch, ...].
      mesh: of `create_mesh`.

    Returns:
      Arrays [global batch, ...], the first axis over all devices.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    # As explicit as `device_put`, but the transfer guard takes it for an accident.
    with jax.transfer_guard_host_to_device('allow'):
        return {
            name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()
        }


def make_sum_over_processes(mesh: Mesh) -> Callable[[np.ndarray], jax.Array | np.ndarray]:
    """Builds a sum over processes; alone it gives back what it gets.

    Returns:
      A function of int32 [n], the counts of this process, to int32 [n], the same in all processes.
      As a training step it is dispatched and not waited for, and all processes call it in turn.
    """
    if jax.process_count() == 1:
        return lambda counts: counts
    add = jax.jit(lambda rows: rows.sum(axis=0), out_shardings=replicated(mesh))

    def total(counts: np.ndarray) -> jax.Array:
        rows = np.zeros((jax.local_device_count(), len(counts)), np.int32)  # a row to a device
        rows[0] = counts
        return add(put_batch({'counts': rows}, mesh)['counts'])

    return total


def put_tree(tree: Any, shardings: Any) -> Any:
    """Copies arrays, the same in every process, to the devices.

    The sources survive donation of the result: `jax.device_put` alone may share their memory, even
    with `may_alias=False` where the source is an array on one of the devices.
    """

    def put(leaf, sharding):
        leaf = np.array(leaf)
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shardings)


def mean_over_batch(
    loss_fn: Callable,
    params: tuple[Any, ...],
    batch: Any,
    key: jax.Array,
    accum_steps: int,
    mesh: Mesh | None,
    grad_shardings: Any,
    *,
    gradient: bool,
) -> Any:
    """Means over a batch of what a loss function gives, and of its gradients.

    Args:
      loss_fn: (*params, micro-batch, key) -> (loss, metrics), all scalars, means over its examples.
      params: those that gradients are for, and others.
      batch: arrays [B, ...], spread as batches are.
      key: of which each micro-batch gets another.
      accum_steps: micro-batches of a device.
      mesh: of `create_mesh`; None for one device, or to leave it to XLA.
      grad_shardings: of the gradients; only `fsdp` needs it.
      gradient: whether gradients are wanted.

    Returns:
      ((loss, metrics), gradients of the first of `params`, or None).

    Raises:
      UserError: the batch cannot be cut into micro-batches.
    """
    count, parts = batch['image'].shape[0], accum_steps * (mesh.size if mesh else 1)
    if count % parts:
        devices = f'{mesh.size} devices x ' if mesh else ''
        raise UserError(
            f'a batch of {count} is not a multiple of {devices}{accum_steps} micro-batches: '
            'set batch or accum_steps'
        )
    accumulate = functools.partial(_accumulate, loss_fn, gradient)
    if mesh is not None and mesh.shape['fsdp'] > 1:
        return _fsdp(accumulate, params, batch, key, accum_steps, mesh, grad_shardings)
    return _data_parallel(accumulate, params, batch, key, accum_steps, mesh)


def whole_batch(x: jax.Array, mesh: Mesh | None) -> tuple[jax.Array, jax.Array | int]:
    """The examples of all devices, in a loss that `mean_over_batch` takes the mean of.

    For losses that compare examples with each other. The gradient of the mean is exactly that of
    the whole batch: what the other devices' losses owe to an example comes back to its device.

    Args:
      x: [b, ...], of the examples that the loss is given; without accumulation.
      mesh: of `mean_over_batch`.

    Returns:
      [B, ...] of the whole batch, and the place in it of the first one given.
    """
    if mesh is None or mesh.size == 1 or mesh.shape['fsdp'] > 1:  # the loss is given the batch
        return x, 0
    first = jax.lax.axis_index(BATCH_AXES) * x.shape[0]
    return jax.lax.all_gather(x, BATCH_AXES, tiled=True), first


def _accumulate(loss_fn, gradient, params, batches, key, constrain=lambda grads: grads):
    """`mean_over_batch` of micro-batches `batches` [accum_steps, b, ...], one after the other."""
    evaluate_one = jax.value_and_grad(loss_fn, has_aux=True) if gradient else loss_fn

    def of_one(index, batch):
        told = evaluate_one(*params, batch, jax.random.fold_in(key, index))
        return told if gradient else (told, None)

    accum_steps = batches['image'].shape[0]
    if accum_steps == 1:
        scalars, grads = of_one(0, jax.tree.map(lambda x: x[0], batches))
        return scalars, constrain(grads)

    def body(total, item):
        scalars, grads = of_one(*item)
        return constrain(jax.tree.map(jnp.add, total, grads)), scalars

    zeros = constrain(jax.tree.map(jnp.zeros_like, params[0])) if gradient else None
    total, scalars = jax.lax.scan(body, zeros, (jnp.arange(accum_steps), batches))
    return jax.tree.map(jnp.mean, scalars), jax.tree.map(lambda x: x / accum_steps, total)


def _data_parallel(accumulate, params, batch, key, accum_steps, mesh):
    """Each device works on its share alone; one mean over devices at the end."""

    def share(params, batch, key):
        batches = jax.tree.map(lambda x: x.reshape(accum_steps, -1, *x.shape[1:]), batch)
        return accumulate(params, batches, key)

    if mesh is None or mesh.size == 1:  # a mean over one device is a copy of all gradients
        return share(params, batch, jax.random.fold_in(key, 0))
    axes = BATCH_AXES

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    def local(params, batch, key):
        # Without this JAX takes the parameters for one shared copy and sums their gradients over
        # the devices itself, in every micro-batch; they would come out times the number of devices.
        params = jax.tree.map(lambda p: jax.lax.pcast(p, axes, to='varying'), params)
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        return jax.lax.pmean(share(params, batch, key), axes)

    return local(params, batch, key)


def _fsdp(accumulate, params, batch, key, accum_steps, mesh, grad_shardings):
    """Fully sharded: XLA gathers parameters and scatters gradients, once per micro-batch."""

    def split(x):
        # Micro-batch i takes every accum_steps-th example, so each of them stays spread over all
        # devices.
        x = x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, BATCH_AXES)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def constrain(grads):
        return grads and jax.lax.with_sharding_constraint(grads, grad_shardings)

    return accumulate(params, jax.tree.map(split, batch), key, constrain)
