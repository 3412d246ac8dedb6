"""The pure, jitted functions of a run: one training step, one evaluation step, one prediction step.

Accumulation. A device splits its own share of the batch into `accum_steps` micro-batches, one after
the other, sums their gradients, and takes part in a single mean over devices at the end. Splitting
the *global* batch instead would make XLA gather all images on every device.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax import evaluate, models, sharding
from vit_jax.data import augment
from vit_jax.data.preprocess import normalize
from vit_jax.state import TrainState

# Passes of XLA's CPU compiler that are left out (docs/performance.md). The first takes out
# optimization barriers, and with them all that rematerialisation saves. Without the second, matrix
# products go to Eigen instead of YNNPACK, which was faster for every model measured.
_KEEPS_NO_BARRIERS, _PRODUCTS_BY_YNNPACK = 'cse_barrier_expander', 'dot-library-rewriter'

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    state_shardings: TrainState,
    *,
    seed: int,
    accum_steps: int = 1,
    flip: bool = True,
    skip_nonfinite: bool = False,
) -> jax.stages.Wrapped:
    """Builds the training step.

    Args:
      model: gives logits [B, C] float32 for images [B, height, width, 3] in [-1, 1].
      tx: the optimizer.
      schedule: its learning rate, as a function of the number of updates done; for the metrics.
      mesh: of `sharding.create_mesh`.
      state_shardings: a `TrainState` of `NamedSharding`s, see `sharding.state_sharding`.
      seed: of mirroring and dropout.
      accum_steps: micro-batches per device; the batch is a multiple of devices * accum_steps.
      flip: whether to mirror half of the images.
      skip_nonfinite: whether a step whose loss or gradient is not finite leaves parameters and
        optimizer as they were, and is counted in `state.skipped`. Else they get what comes out;
        `finite` tells.

    Returns:
      A jitted function (state, batch) -> (state, metrics). The state is donated. batch: see
      `abstract_batch`. metrics, scalars over the whole batch: `train_loss` (mean cross-entropy),
      `accuracy_train` (share in [0, 1]), `gradient_norm` (before clipping), `lr` (the learning rate
      of this update), float32; `finite` (loss and gradient norm are), bool; `skipped`, the count of
      the new state, int32.
    """
    model = models.for_training(model)
    gradients = _sharded_gradients if mesh.shape['fsdp'] == 1 else _fsdp_gradients

    def micro_batch(params, batch, key):
        """Gradient of the mean loss of one micro-batch, and its mean loss and accuracy."""

        def loss_fn(params):
            logits = model.apply(
                {'params': params}, normalize(batch['image']), train=True, rngs={'dropout': key}
            )
            return _cross_entropy(logits, batch['label']).mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        right = jnp.argmax(logits, axis=-1) == batch['label']
        accuracy = jnp.mean(right, dtype=jnp.float32)
        return grads, (loss, accuracy)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if flip:
            key = augment.step_key(seed, state.step, augment.FLIP)
            mirrored = augment.random_flip(batch['image'], batch['position'], key)
            batch = {**batch, 'image': mirrored}
        key = augment.step_key(seed, state.step, augment.DROPOUT)
        grads, (loss, accuracy) = gradients(
            micro_batch, state.params, batch, key, max(1, accum_steps), mesh, state_shardings.params
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = state.skipped
        if skip_nonfinite:
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
            skipped += ~finite
        metrics = {
            'train_loss': loss,
            'accuracy_train': accuracy,
            'gradient_norm': norm,
            'lr': schedule(state.step),
            'finite': finite,
            'skipped': skipped,
        }
        return TrainState(state.step + 1, params, opt_state, skipped), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        compiler_options=_compiler_options(model),
    )


def abstract_batch(
    batch: int, image_size: int, mesh: Mesh, *, exact: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch: what the training step takes.

    Args:
      batch: B, images over all devices.
      image_size: side of the images, pixels.
      mesh: of `sharding.create_mesh`.
      exact: whether images are float32; else uint8.

    Returns:
      `image` [B, height, width, 3], values in [0, 255]; `label`, `position` (place in the batch),
      int32 [B]; each sharded on its first axis over all devices.
    """
    column = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding.batch_sharding(mesh))
    images = jax.ShapeDtypeStruct(
        (batch, image_size, image_size, 3),
        jnp.float32 if exact else jnp.uint8,
        sharding=column.sharding,
    )
    return {'image': images, 'label': column, 'position': column}


def make_eval_step(
    model: nn.Module, mesh: Mesh, params_shardings: Any
) -> Callable[[Any, Batch], Metrics]:
    """Builds the evaluation step.

    Returns:
      A jitted function (params, batch) -> what `evaluate.join` takes of a batch, whole on every
      device: of each example what `evaluate.outcomes` says, and `example`, `label`, `readable` as
      they came. batch: see `eval_batches`; `image` float32 [B, height, width, 3] in [0, 255].
    """
    model = models.for_inference(model)

    def eval_step(params, batch: Batch) -> Metrics:
        logits: Any = model.apply({'params': params}, normalize(batch['image']), train=False)
        # Computed once: XLA may round a logit that it computes again, for a comparison, otherwise.
        logits = jax.lax.optimization_barrier(logits)
        told = {name: batch[name] for name in ('example', 'label', 'readable')}
        return told | evaluate.outcomes(logits.astype(jnp.float32), batch['label'])

    return jax.jit(
        eval_step,
        in_shardings=(params_shardings, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
        compiler_options=_compiler_options(model),
    )


def make_predict_step(model: nn.Module) -> Callable[[Any, jax.typing.ArrayLike], jax.Array]:
    """Builds the prediction step.

    Returns:
      A jitted function (params, pixels [B, height, width, 3] in [0, 255]) -> logits [B, C] float32.
    """
    model = models.for_inference(model)

    def predict_step(params: Any, pixels: jax.Array) -> jax.Array:
        logits: Any = model.apply({'params': params}, normalize(pixels), train=False)
        return logits

    return jax.jit(predict_step, compiler_options=_compiler_options(model))


def _compiler_options(model: nn.Module) -> dict[str, str] | None:
    if jax.default_backend() != 'cpu':
        return None
    # XLA's way to Eigen takes no bfloat16. A module without `dtype` is taken for a float32 one.
    narrow = jnp.dtype(getattr(model, 'dtype', jnp.float32)) == jnp.bfloat16
    left_out = [_KEEPS_NO_BARRIERS] + ([] if narrow else [_PRODUCTS_BY_YNNPACK])
    return {'xla_disable_hlo_passes': ','.join(left_out)}


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """[B] float32, from logits [B, C] and labels [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)


def _accumulate(micro_batch, params, batches, key, accum_steps, constrain=lambda grads: grads):
    """Mean gradients and metrics over micro-batches `batches` [accum_steps, b, ...].

    `micro_batch` gives gradients like `params`, and two float32 scalars.
    """
    if accum_steps == 1:
        grads, metrics = micro_batch(
            params, jax.tree.map(lambda x: x[0], batches), jax.random.fold_in(key, 0)
        )
        return constrain(grads), metrics

    def body(total, item):
        index, batch = item
        grads, metrics = micro_batch(params, batch, jax.random.fold_in(key, index))
        grads, metrics = jax.tree.map(jnp.add, total, (grads, metrics))
        return (constrain(grads), metrics), None

    grads = constrain(jax.tree.map(jnp.zeros_like, params))
    # Made from `key`, so that under shard_map it varies over devices as the sums that replace it
    # do.
    zero = 0.0 * jax.random.uniform(key, dtype=jnp.float32)
    total, _ = jax.lax.scan(body, (grads, (zero, zero)), (jnp.arange(accum_steps), batches))
    return jax.tree.map(lambda x: x / accum_steps, total)


def _sharded_gradients(micro_batch, params, batch, key, accum_steps, mesh, _):
    """Data parallel: each device works on its share alone; one mean over devices at the end."""

    def share(params, batch, key):
        batches = jax.tree.map(lambda x: x.reshape(accum_steps, -1, *x.shape[1:]), batch)
        return _accumulate(micro_batch, params, batches, key, accum_steps)

    if mesh.size == 1:  # a mean over one device is a copy of all gradients
        return share(params, batch, jax.random.fold_in(key, 0))
    axes = sharding.BATCH_AXES

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


def _fsdp_gradients(micro_batch, params, batch, key, accum_steps, mesh, param_shardings):
    """Fully sharded: XLA gathers parameters and scatters gradients, once per micro-batch."""

    def split(x):
        # Micro-batch i takes every accum_steps-th example, so each of them stays spread over all
        # devices.
        x = x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, sharding.BATCH_AXES)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return _accumulate(
        micro_batch,
        params,
        jax.tree.map(split, batch),
        key,
        accum_steps,
        lambda grads: jax.lax.with_sharding_constraint(grads, param_shardings),
    )
