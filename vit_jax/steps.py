"""The steps of a run: one training step, one evaluation step, one prediction step.

Each as a pure function (`train_step_fn`, `eval_step_fn`, `predict_step_fn`) and jitted
(`make_train_step`, `make_eval_step`, `make_predict_step`).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import Mesh

from vit_jax import evaluate, groups, losses, models, optim, sharding
from vit_jax.data import augment
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.inference.task import ONE_CLASS, Task
from vit_jax.losses import Batch, Metrics
from vit_jax.models import stochastic_depth
from vit_jax.state import TrainState
from vit_jax.variants import sides

# Passes of XLA's CPU compiler that are left out (docs/performance.md). The first takes out
# optimization barriers, and with them all that rematerialisation saves. Without the second, matrix
# products go to Eigen instead of YNNPACK, which was faster for every model measured.
_KEEPS_NO_BARRIERS, _PRODUCTS_BY_YNNPACK = 'cse_barrier_expander', 'dot-library-rewriter'

# Name in a batch of collections of variables for the model, beside its parameters.
_VARIABLES = 'variables'
# What the training step tells by itself.
OWN_METRICS = ('train_loss', 'gradient_norm', 'lr', 'finite', 'skipped')


def train_step_fn(
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule | None = None,
    mesh: Mesh | None = None,
    state_shardings: TrainState | None = None,
    *,
    seed: int,
    accum_steps: int = 1,
    flip: bool = True,
    flip_vertical: bool = False,
    erasing: float = 0.0,
    skip_nonfinite: bool = False,
    loss_fn: losses.LossFn | None = None,
    frozen: str = '',
    depth_rate: float = 0.0,
    mix: augment.Mix | None = None,
    sharpness: optim.Sharpness | None = None,
    teacher: nn.Module | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the training step, a pure function for programs of one's own.

    Args:
      model: gives logits for images [B, height, width, channels] in [-1, 1]; or is a
        `models.LitModel`, whose three outputs `loss_fn` gets, with token ids as labels. Images may
        then be embeddings already, [B, C].
      tx: the optimizer. One that wants them gets `value` (the loss), `grad` and `value_fn`, as
        `optax.contrib.reduce_on_plateau`, `optax.polyak_sgd` and `optax.lbfgs` do.
      schedule: its learning rate, as a function of the number of updates done; for the metrics.
      mesh: of `sharding.create_mesh`, over which the batch is spread; None for one device, or to
        leave it to XLA.
      state_shardings: a `TrainState` of `NamedSharding`s, see `sharding.state_sharding`; only a
        mesh with `fsdp` needs it.
      seed: of mirroring and dropout.
      accum_steps: micro-batches per device; the batch is a multiple of devices * accum_steps.
      flip: whether to mirror half of the images.
      flip_vertical: whether to turn half of them upside down.
      erasing: share of the images of which a box is filled with noise, see
        `augment.random_erasing`.
      skip_nonfinite: whether a step whose loss or gradient is not finite leaves parameters and
        optimizer as they were, but for the counts of its schedules, and is counted in
        `state.skipped`. Else they get what comes out; `finite` tells.
      loss_fn: see `losses.LossFn`; None for `losses.softmax_cross_entropy`.
      frozen: pattern of the names of parameters that stay as they are, see `groups.partition`; `tx`
        is then one of `optim.trained_only`.
      depth_rate: share of the images for which a branch of the last block is left out, rising from
        0 for the first, see `models.stochastic_depth`.
      mix: mixup and CutMix, after all that; `loss_fn` then gets mixed labels, of classes
        probabilities [B, classes].
      sharpness: SAM or GSAM, with a second pass through the same batch; `gradient_norm` is then
        that of what the optimizer gets, `train_loss` that of the first pass.
      teacher: a model that sees the same images; `loss_fn` finds its logits as `teacher` in the
        batch, see `losses.distillation`.

    Returns:
      A function (state, batch) -> (state, metrics), of which a third argument is the teacher's
      parameters, if there is one. batch: `image` [B, height, width, channels],
      values in [0, 255]; `label` and whatever else `loss_fn` reads, [B, ...]; `position`, int32
      [B], the places in the batch, which decide what is mirrored (default 0, 1, ...). metrics,
      scalars over the whole batch: `train_loss`; what `loss_fn` tells (by default `accuracy_train`,
      share in [0, 1]); `gradient_norm` (before clipping); `lr` (the learning rate of this update;
      without a schedule left out), float32; `finite` (loss and gradient norm are), bool; `skipped`,
      the count of the new state, int32. It raises UserError if the batch cannot be cut into
      micro-batches, or a metric of `loss_fn` is no scalar or has one of these names.
    """
    loss_fn = loss_fn or losses.softmax_cross_entropy
    blocks = models.block_names(model) if depth_rate else []
    alone: Any = {'flip': flip, 'flip_vertical': flip_vertical, 'erasing': erasing}
    grad_shardings = state_shardings and groups.partition(state_shardings.params, frozen)[0]

    def loss_and_metrics(
        trained: Any, kept: Any, taught: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        params = groups.combine(trained, kept)
        beside: Any = batch.get(_VARIABLES, {})
        variables = {'params': params, **beside}
        outputs = _apply(model, variables, batch, train=True, rngs={'dropout': key})
        seen = {name: value for name, value in batch.items() if name != _VARIABLES}
        if teacher is not None:
            told = _apply(teacher, {'params': taught}, batch, train=False)
            seen['teacher'] = told
        loss, metrics = loss_fn(outputs, seen, params)
        _check_metrics(metrics)
        return jax.tree.map(losses.at_least_float, (loss, metrics))

    def train_step(
        state: TrainState, batch: Batch, taught: Any = None
    ) -> tuple[TrainState, Metrics]:
        step_key = functools.partial(augment.step_key, seed, state.step)
        places = _places(batch)
        images = augment.each(batch['image'], places, step_key, **alone)
        batch = {**batch, 'image': images}
        if mix:
            batch = mix(
                batch, step_key(augment.MIX), functools.partial(sharding.previous, mesh=mesh)
            )
        if depth_rate:
            draws = augment.draw(
                places, step_key(augment.DEPTH), (len(blocks), stochastic_depth.BRANCHES)
            )
            factors = stochastic_depth.factors(depth_rate, blocks, draws)
            beside: Any = {_VARIABLES: {stochastic_depth.COLLECTION: factors}}
            batch = {**batch, **beside}
        key = step_key(augment.DROPOUT)
        trained, kept = groups.partition(state.params, frozen)

        def mean(trained: Any, *, gradient: bool) -> Any:
            spread = (max(1, accum_steps), mesh, grad_shardings)
            return sharding.mean_over_batch(
                loss_and_metrics, (trained, kept, taught), batch, key, *spread, gradient=gradient
            )

        (loss, metrics), grads = mean(trained, gradient=True)
        if sharpness:
            second_pass = functools.partial(mean, gradient=True)
            grads = sharpness(grads, trained, state.step, lambda moved: second_pass(moved)[1])
        updates, opt_state = optim.update(
            tx,
            grads,
            state.opt_state,
            trained,
            value=loss,
            grad=grads,
            value_fn=lambda trained: mean(trained, gradient=False)[0][0],
        )
        new = optax.apply_updates(trained, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = state.skipped
        if skip_nonfinite:
            new = optim.select(finite, new, trained)
            opt_state = optim.select(finite, opt_state, state.opt_state)
            skipped += (~finite).astype(jnp.int32)
        metrics |= {'train_loss': loss, 'gradient_norm': norm, 'finite': finite, 'skipped': skipped}
        if schedule is not None:
            metrics['lr'] = schedule(state.step)
        params = groups.combine(new, kept)
        return TrainState(state.step + 1, params, opt_state, skipped), metrics

    return train_step


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    mesh: Mesh,
    state_shardings: TrainState,
    *,
    teacher_shardings: Any = None,
    **options: Any,
) -> jax.stages.Wrapped:
    """Builds the training step, jitted: `train_step_fn`, whose arguments it takes.

    On CPUs, the model takes the forms that train faster there, see `models.for_training`. With a
    teacher, `teacher_shardings` are those of its parameters.

    Returns:
      What `train_step_fn` returns, jitted. The state is donated. It may be called inside other
      programs (`jax.jit`, `jax.lax.scan`, `jax.vmap`), too.
    """
    model = models.for_training(model)
    taught = () if teacher_shardings is None else (teacher_shardings,)
    return _jit(
        train_step_fn(model, tx, schedule, mesh, state_shardings, **options),
        model,
        donate_argnums=0,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), *taught),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )


def abstract_batch(
    batch: int,
    image_size: int | tuple[int, int],
    mesh: Mesh,
    *,
    channels: int = 3,
    exact: bool = True,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch: what the training step takes.

    Args:
      batch: B, images over all devices.
      image_size: side of the images, or their height and width, pixels.
      mesh: of `sharding.create_mesh`.
      channels: of the images.
      exact: whether images are float32; else uint8.

    Returns:
      `image` [B, height, width, channels], values in [0, 255]; `label`, `position` (place in the
      batch), int32 [B]; each sharded on its first axis over all devices.
    """
    column = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding.batch_sharding(mesh))
    images = jax.ShapeDtypeStruct(
        (batch, *sides(image_size), channels),
        jnp.float32 if exact else jnp.uint8,
        sharding=column.sharding,
    )
    return {'image': images, 'label': column, 'position': column}


def eval_step_fn(
    model: nn.Module, loss_fn: losses.LossFn | None = None, task: Task = ONE_CLASS
) -> Callable[[Any, Batch], Metrics]:
    """Builds the evaluation step, a pure function for programs of one's own.

    Args:
      model: see `train_step_fn`.
      loss_fn: of training, if it is one's own; None where the classes are all that counts.
      task: what the outputs are.

    Returns:
      A function (params, batch) -> what `evaluate.columns` takes of a batch: of each example
      `example` and `readable` if they came; where `label` is a class, that and what
      `evaluate.outcomes` says; of other tasks `label` and `output`, the logits; with `loss_fn` what
      that says of the example alone, see `evaluate.OWN`; of a `models.LitModel` the `embedding` of
      the image [B, C] alone. batch: see `eval_batches`; `image` float32
      [B, height, width, channels] in [0, 255].
    """
    model = models.for_inference(model)

    def eval_step(params: Any, batch: Batch) -> Metrics:
        told = {name: batch[name] for name in ('example', 'readable') if name in batch}
        pixels = _model_input(batch['image'])
        if isinstance(model, models.LitModel):
            found: Any = model.apply({'params': params}, images=pixels)
            return told | {'embedding': found[0]}
        logits: Any = model.apply({'params': params}, pixels, train=False)
        # Computed once: XLA may round a logit that it computes again, for a comparison, otherwise.
        logits = jax.lax.optimization_barrier(logits)
        label = batch['label']
        if label.ndim == 1 and jnp.issubdtype(label.dtype, jnp.integer):
            told |= {'label': label, **evaluate.outcomes(logits.astype(jnp.float32), label)}
        elif task != ONE_CLASS:
            told |= {'label': label, 'output': logits.astype(jnp.float32)}
        if loss_fn is not None:
            told |= _of_each(loss_fn, logits, batch, params)
        return told

    return eval_step


def _of_each(loss_fn: losses.LossFn, logits: Any, batch: Batch, params: Any) -> Metrics:
    """Loss and metrics of each example alone, [B] float32."""

    def of_one(logits: jax.Array, image: jax.Array, label: jax.Array) -> Metrics:
        one = {'image': image[None], 'label': label[None]}
        loss, metrics = loss_fn(logits[None], one, params)
        _check_metrics(metrics)
        names = {name.removesuffix('_train'): value for name, value in metrics.items()}
        return {f'{evaluate.OWN}{name}': value for name, value in {**names, 'loss': loss}.items()}

    told = jax.vmap(of_one)(logits, batch['image'], batch['label'])
    return jax.tree.map(lambda value: value.astype(jnp.float32), told)


def make_eval_step(
    model: nn.Module,
    mesh: Mesh,
    params_shardings: Any,
    loss_fn: losses.LossFn | None = None,
    task: Task = ONE_CLASS,
) -> jax.stages.Wrapped:
    """Builds the evaluation step, jitted: `eval_step_fn`; results are whole on every device."""
    return _jit(
        eval_step_fn(model, loss_fn, task),
        model,
        in_shardings=(params_shardings, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def make_text_step(model: models.LitModel, mesh: Mesh, params_shardings: Any) -> jax.stages.Wrapped:
    """Builds the function from token ids [B, L] to embeddings of texts [B, C], jitted.

    Returns:
      A function (params, tokens) -> embeddings, whole on every device; B is spread over all.
    """

    def text_step(params: Any, tokens: jax.Array) -> jax.Array:
        found: Any = model.apply({'params': params}, tokens=tokens)
        return found[1]

    return _jit(
        text_step,
        model,
        in_shardings=(params_shardings, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def predict_step_fn(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Builds the prediction step, a pure function for programs of one's own.

    Returns:
      A function (params, pixels [B, height, width, channels] in [0, 255]) -> logits [B, C] float32.
    """
    model = models.for_inference(model)

    def predict_step(params: Any, pixels: jax.Array) -> jax.Array:
        logits: Any = model.apply({'params': params}, _model_input(pixels), train=False)
        return logits

    return predict_step


def make_predict_step(model: nn.Module) -> jax.stages.Wrapped:
    """Builds the prediction step, jitted: `predict_step_fn`."""
    return _jit(predict_step_fn(model), model)


class _Program:
    """A jitted function with compiler options, which also may be called inside other programs.

    There, JAX refuses compiler options, and so they are left out.
    """

    def __init__(
        self, function: Callable, compiler_options: dict[str, str], **options: Any
    ) -> None:
        self._alone = jax.jit(function, compiler_options=compiler_options, **options)
        self._inside = jax.jit(function, **options)
        self.trace, self.lower = self._alone.trace, self._alone.lower
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = get_opaque_trace_state() == _OUTSIDE
        return (self._alone if alone else self._inside)(*args, **kwargs)


with jax.core.eval_context():
    _OUTSIDE = get_opaque_trace_state()  # of any transformation


def _jit(function: Callable, model: nn.Module, **options: Any) -> jax.stages.Wrapped:
    """`jax.jit`, on CPUs with what makes `model` faster there."""
    compiler_options = _compiler_options(model)
    if compiler_options is None:
        return jax.jit(function, **options)
    return _Program(function, compiler_options, **options)


def _compiler_options(model: nn.Module) -> dict[str, str] | None:
    if jax.default_backend() != 'cpu':
        return None
    # XLA's way to Eigen takes no bfloat16. A module without `dtype` is taken for a float32 one.
    narrow = jnp.dtype(getattr(model, 'dtype', jnp.float32)) == jnp.bfloat16
    left_out = [_KEEPS_NO_BARRIERS] + ([] if narrow else [_PRODUCTS_BY_YNNPACK])
    return {'xla_disable_hlo_passes': ','.join(left_out)}


def _places(batch: Batch) -> jax.Array:
    """The places of the examples in the global batch, [B] int32."""
    return batch.get('position', jnp.arange(batch['image'].shape[0], dtype=jnp.int32))


def _model_input(pixels: jax.Array) -> jax.Array:
    """Pixels in [0, 255] to [-1, 1], at least float32."""
    return normalize(losses.at_least_float(pixels))


def _apply(model: nn.Module, variables: Any, batch: Batch, **options: Any) -> Any:
    """What a model gives for a batch: logits, or of two towers what `models.LitModel` does.

    Of two towers the labels are token ids, and images may be their embeddings, [B, C].
    """
    images = batch['image']
    if not isinstance(model, models.LitModel):
        return model.apply(variables, _model_input(images), **options)
    pixels = None if images.ndim == 2 else _model_input(images)
    found: Any = model.apply(variables, images=pixels, tokens=batch['label'], **options)
    return (images if pixels is None else found[0], *found[1:])


def _check_metrics(metrics: Metrics) -> None:
    for name, value in metrics.items():
        if jnp.shape(value):
            raise UserError(
                f'loss_fn: metric {name!r} has shape {jnp.shape(value)}; metrics are scalars'
            )
        if name in OWN_METRICS:
            raise UserError(
                f'loss_fn: a metric cannot be called {name!r}: the step has one of this name'
            )
