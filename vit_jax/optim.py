"""Learning-rate schedule and optimizer of a run, from optax."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from vit_jax import groups

_TINY = 1e-12  # against division by 0


def create_learning_rate_schedule(
    total_steps: int,
    base: float,
    decay_type: str,
    warmup_steps: int,
    linear_end: float = 1e-5,
    *,
    cooldown_steps: int = 0,
    rsqrt_timescale: int = 10_000,
) -> optax.Schedule:
    """Linear warm-up times decay times linear cool-down.

    With p = clip((step - warmup) / (total - warmup), 0, 1): 'cosine' is base (1 + cos(pi p)) / 2,
    'linear' goes from base to `linear_end`, as in the original release. 'rsqrt' is base / sqrt(1 +
    max(0, step - warmup) / timescale), as in "Scaling Vision Transformers"
    (https://arxiv.org/abs/2106.04560), 'constant' is base. All times min(1, step / warmup) and
    min(1, (total - step) / cooldown).

    Args:
      total_steps: updates in all.
      base: highest rate.
      decay_type: 'cosine', 'linear', 'rsqrt' or 'constant'.
      warmup_steps: updates of warm-up, fewer than all.
      linear_end: where linear decay ends.
      cooldown_steps: updates of cool-down, at most those that the warm-up leaves.
      rsqrt_timescale: updates of 'rsqrt' decay in which the rate falls to base / sqrt(2).

    Returns:
      A function from the number of updates done (int32 scalar) to the rate of the next update
      (float32 scalar). The first update, after 0 steps, has rate 0 if there is a warm-up.

    Raises:
      ValueError: unknown decay_type, a warm-up that is not shorter than the whole, or a cool-down
        that is longer than the rest.
    """
    if decay_type not in ('cosine', 'linear', 'rsqrt', 'constant'):
        raise ValueError(
            f"decay_type {decay_type!r} is not 'cosine', 'linear', 'rsqrt', 'constant'"
        )
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f'warmup_steps {warmup_steps} is not in [0, total_steps {total_steps})')
    if not 0 <= cooldown_steps <= total_steps - warmup_steps:
        rest = total_steps - warmup_steps
        raise ValueError(f'cooldown_steps {cooldown_steps} is not in [0, {rest}], the steps left')

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup_steps) / float(total_steps - warmup_steps), 0.0, 1.0)
        if decay_type == 'linear':
            lr = linear_end + (base - linear_end) * (1.0 - progress)
        elif decay_type == 'cosine':
            lr = base * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif decay_type == 'rsqrt':
            lr = base * jax.lax.rsqrt(1.0 + jnp.maximum(0.0, step - warmup_steps) / rsqrt_timescale)
        else:
            lr = jnp.float32(base)
        if warmup_steps:
            lr = lr * jnp.minimum(1.0, step / warmup_steps)
        if cooldown_steps:
            lr = lr * jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return jnp.asarray(lr, dtype=jnp.float32)

    return schedule


def schedule_of(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate that a resolved config asks for."""
    return create_learning_rate_schedule(
        config.total_steps,
        config.base_lr,
        config.decay_type,
        config.warmup_steps,
        cooldown_steps=config.cooldown_steps,
        rsqrt_timescale=config.rsqrt_timescale,
    )


def create_optimizer(
    config: ml_collections.ConfigDict,
    schedule: optax.Schedule,
    rate_factor: Callable[[str], float] | None = None,
) -> optax.GradientTransformation:
    """The optimizer that a resolved config asks for.

    - Clipping: the gradient is scaled down to global norm `grad_norm_clip` (0: never).
    - 'sgd': momentum, its accumulator stored as `optim_dtype`: m <- momentum * m + g; params <-
      params - lr * m. This is the original release's optimizer (there with momentum 0.9 and
      bfloat16, whatever its config said).
    - All others: see `_direction`; the first moment is stored as `optim_dtype`.
    - `weight_decay`, times the factors of `wd_mults`, by default 1 for kernels and 0 for all else:
      added to the gradient for 'sgd', decoupled for all others, times the learning rate
      (https://arxiv.org/abs/1711.05101).

    Args:
      config: resolved.
      schedule: the learning rate.
      rate_factor: from the name of a parameter to what its learning rate is multiplied by; None for
        1.
    """
    clip = (
        optax.clip_by_global_norm(config.grad_norm_clip)
        if config.grad_norm_clip
        else optax.identity()
    )
    decay = _weight_decay(config.weight_decay, config.wd_mults)
    if config.optimizer == 'sgd':
        dtype = jnp.dtype(config.optim_dtype)
        sgd = optax.sgd(schedule, momentum=config.momentum, accumulator_dtype=dtype)
        parts = [clip, decay if config.weight_decay else optax.identity(), sgd]
    else:
        trust = [optax.scale_by_trust_ratio()] if config.optimizer == 'lamb' else []
        rate = optax.scale_by_learning_rate(schedule)
        parts = [clip, optax.chain(_direction(config), decay, *trust, rate)]
    if rate_factor is not None:
        parts.append(_scale_by_name(rate_factor))
    return optax.chain(*parts)


def _weight_decay(weight_decay: float, mults: groups.Patterns) -> optax.GradientTransformation:
    """Adds to the update of each array `weight_decay` times its factor times the array."""
    factor_of = groups.factor_of(mults, 0.0)

    def of_one(factor: float) -> optax.GradientTransformation:
        mask = functools.partial(groups.map_names, lambda name: factor_of(name) == factor)
        return optax.add_decayed_weights(weight_decay * factor, mask)

    factors = dict.fromkeys(float(factor) for _, factor in mults)
    parts = [of_one(factor) for factor in factors if factor]
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _scale_by_name(factor: Callable[[str], float]) -> optax.GradientTransformation:
    """Multiplies the update of each array by a factor that goes with its name."""

    def update(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u, f: f * u, updates, groups.map_names(factor, updates))

    return optax.stateless(update)


def trained_only(tx: optax.GradientTransformation, frozen: str) -> optax.GradientTransformation:
    """The optimizer of the parameters that are trained, see `groups.partition`.

    Its state is made from all of them; its gradients and updates are those of the trained ones.
    """
    if not frozen:
        return tx
    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(groups.partition(params, frozen)[0]),
        functools.partial(update, tx),
    )


def _direction(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """What an optimizer makes of gradients, before weight decay and learning rate.

    - 'adamw': Adam (https://arxiv.org/abs/1412.6980).
    - 'lion': the sign of a momentum (https://arxiv.org/abs/2302.06675).
    - 'lamb': Adam; then the norm of each array's step is that of the array
      (https://arxiv.org/abs/1904.00962).
    - 'adafactor': second moments of kernels as a product of rows and columns, with a momentum of
      the steps; as big_vision's, "Scaling Vision Transformers" (https://arxiv.org/abs/2106.04560).
    - 'muon': orthogonalised momentum of the kernels in blocks (https://kellerjordan.github.io/
      posts/muon), as large as Adam's steps (https://arxiv.org/abs/2502.16982); Adam for the rest.
    """
    dtype = jnp.dtype(config.optim_dtype)
    if config.optimizer == 'adafactor':
        second = optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            decay_rate_fn=lambda step, power: jnp.minimum(
                0.999, 1 - jnp.float32(step + 1) ** -power
            ),
        )
        first = optax.ema(config.momentum, debias=False, accumulator_dtype=dtype)
        return optax.chain(second, first if config.momentum else optax.identity())
    if config.optimizer == 'muon':
        # Its learning rate only turns the sign, which is turned back later.
        return optax.contrib.muon(
            -1.0,
            mu_dtype=dtype,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    if config.optimizer == 'lion':
        return optax.scale_by_lion(mu_dtype=dtype)
    eps = 1e-6 if config.optimizer == 'lamb' else 1e-8
    return optax.scale_by_adam(eps=eps, mu_dtype=dtype)


def _matrices(params: Any) -> Any:
    """Which axes of the kernels in blocks are inputs and outputs; None for all other arrays.

    Those of attention are [D, heads, size] for queries, keys and values, and [heads, size, D].
    """

    def axes(path: Any, leaf: Any) -> Any:
        name = groups.name_of(path)
        if not re.fullmatch(r'(.*/)?(encoderblock|MixerBlock)_\d+/.*/kernel', name):
            return None
        inputs = 2 if name.endswith('/out/kernel') and leaf.ndim == 3 else 1
        dimensions = tuple(range(leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(dimensions[:inputs], dimensions[inputs:])

    return jax.tree_util.tree_map_with_path(axes, params)


class EmaState(NamedTuple):
    """State of `with_average`.

    Attributes:
      updates: their number, int32 scalar.
      average: the moving average of the parameters, their shapes and types.
      inner: the optimizer's own state.
    """

    updates: jax.Array
    average: Any
    inner: optax.OptState


def with_average(
    tx: optax.GradientTransformation, decay: float, warmup_steps: int = 0
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps an exponential moving average of the parameters beside its state.

    After each update, average <- decay * average + (1 - decay) * parameters
    (https://epubs.siam.org/doi/10.1137/0330046). Up to `warmup_steps` updates, the average is the
    parameters themselves. The parameters are those of `tx`; `TrainState.model_params` are averages.

    Args:
      tx: the optimizer.
      decay: in (0, 1); the average is over about 1 / (1 - decay) updates.
      warmup_steps: number of updates.
    """

    def init(params: Any) -> EmaState:
        copy = jax.tree.map(jnp.copy, params)  # what is donated cannot be there twice
        return EmaState(jnp.zeros((), jnp.int32), copy, tx.init(params))

    def step(grads: Any, state: EmaState, params: Any, **extra: Any) -> tuple[Any, EmaState]:
        updates, inner = update(tx, grads, state.inner, params, **extra)
        count = state.updates + 1
        share = jnp.where(count > warmup_steps, 1.0 - decay, 1.0)
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(new, state.average, share)
        return updates, EmaState(count, average, inner)

    return optax.GradientTransformationExtraArgs(init, step)


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """Sharpness-aware minimization: SAM (https://arxiv.org/abs/2010.01412) and GSAM.

    With the gradient g at the parameters p, over the whole batch, and the gradient g' at
    p + radius * g / |g|, SAM takes g' in place of g. GSAM (https://arxiv.org/abs/2203.08065) takes
    g' - alpha * (g - (g . u) u) with u = g' / |g'|, which lowers the gap between both losses, too.
    As big_vision's, but that there each device has a p + radius * g / |g| of its own share.

    Attributes:
      radius: as a function of the number of updates done.
      alpha: of GSAM; 0 for SAM.
    """

    radius: optax.Schedule
    alpha: float = 0.0

    def __call__(
        self, grads: Any, params: Any, step: jax.Array, gradient_of: Callable[[Any], Any]
    ) -> Any:
        """The gradient that the optimizer is given.

        Args:
          grads: at `params`.
          params: those that are trained.
          step: number of updates done.
          gradient_of: gives the gradient of the same batch at other parameters.
        """
        scale = self.radius(step) / (optax.tree.norm(grads) + _TINY)
        uphill = jax.tree.map(lambda p, g: p + scale.astype(p.dtype) * g, params, grads)
        robust = gradient_of(uphill)
        if not self.alpha:
            return robust
        unit = optax.tree.scale(1 / (optax.tree.norm(robust) + _TINY), robust)
        along = optax.tree.vdot(unit, grads)
        return jax.tree.map(lambda r, g, u: r - self.alpha * (g - along * u), robust, grads, unit)


def sharpness_of(
    config: ml_collections.ConfigDict, schedule: optax.Schedule | None
) -> Sharpness | None:
    """SAM or GSAM as a resolved config asks for it; None for neither.

    GSAM's radius goes from `gsam_rho_min` where the learning rate is 0 to `sam_rho` where it is
    `base_lr`.
    """
    if not config.sam_rho:
        return None
    least, most = config.gsam_rho_min or config.sam_rho, config.sam_rho

    def radius(step: jax.Array) -> jax.Array:
        if schedule is None or least == most:
            return jnp.float32(most)
        return least + (most - least) * schedule(step) / config.base_lr

    return Sharpness(radius, config.gsam_alpha)


def update(
    tx: optax.GradientTransformation, grads: Any, state: optax.OptState, params: Any, **extra: Any
) -> tuple[Any, optax.OptState]:
    """`tx.update`, with those of the extra arguments that it takes.

    `optax.with_extra_args_support` gives all or none, which `optax.contrib.sam` refuses.
    """
    parameters = inspect.signature(tx.update).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        extra = {name: value for name, value in extra.items() if name in parameters}
    return tx.update(grads, state, params, **extra)


def select(finite: jax.Array, new: Any, old: Any) -> Any:
    """Parameters or an optimizer's state after a step: the new ones, or the old ones.

    The counts of schedules go on in any case: the learning rate is a function of the number of
    steps, and a schedule comes to its end.

    Args:
      finite: bool scalar, whether to take `new`.
      new: a tree of arrays.
      old: a tree of the same structure.
    """

    def choose(new: Any, old: Any) -> Any:
        if isinstance(new, optax.InjectStatefulHyperparamsState):
            return new._replace(inner_state=select(finite, new.inner_state, old.inner_state))
        return new if _is_schedule(new) else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old, is_leaf=_is_schedule)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState | optax.InjectStatefulHyperparamsState)
