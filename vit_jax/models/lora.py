"""Low-rank adapters: LoRA and DoRA.

LoRA (https://arxiv.org/abs/2106.09685): a dense layer y = x W + b gives x W + b + alpha / rank *
(dropout(x) A) B in which A and B are trained, and W and b are not. The arrays stand beside the
layer's own: `lora_a` [inputs, rank], at first uniform in +-1 / sqrt(inputs), and `lora_b` [rank,
outputs], at first zeros, so that nothing is changed at the start. Inputs and outputs of several
axes (attention heads) are flattened.

DoRA (https://arxiv.org/abs/2402.09353) then scales each column of W + alpha / rank * A B to a
length, `lora_magnitude` [outputs], that is trained as well, and at first that of W's column.

Initial values, dropout, and what has no gradient (the length of a column before it is scaled) are
those of peft.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.layers import MlpBlock

# Layers by what they belong to.
GROUPS: Mapping[str, tuple[str, ...]] = {
    'attention': ('query', 'key', 'value', 'out'),
    'mlp': ('Dense_0', 'gate', 'Dense_1'),
}
A, B, MAGNITUDE = 'lora_a', 'lora_b', 'lora_magnitude'
ARRAYS = (A, B, MAGNITUDE)
_POOLING = 'MAPHead_0'  # its layers are called as those of the blocks, and are none of them


@dataclasses.dataclass(frozen=True)
class Lora:
    """What adapters a model has: the argument `lora` of its module.

    Attributes:
      rank: of A B; at most the inputs and the outputs of each layer.
      targets: names of the layers, in every block: of `GROUPS`.
      alpha: of the factor alpha / rank; None for the rank, which is a factor of 1.
      dropout: share of the adapters' inputs that is left out in training.
      dora: train the lengths of the columns, too.
    """

    rank: int
    targets: tuple[str, ...] = GROUPS['attention']
    alpha: float | None = None
    dropout: float = 0.0
    dora: bool = False

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def adaptable(call: Callable) -> Callable:
    """Decorates the `__call__` of a model that has the argument `lora`, a `Lora` or None."""

    @functools.wraps(call)
    def adapted(model: nn.Module, *args: Any, train: bool, **kwargs: Any) -> jax.Array:
        if model.lora is None:
            return call(model, *args, train=train, **kwargs)
        with nn.intercept_methods(functools.partial(_adapt, model.lora, train)):
            return call(model, *args, train=train, **kwargs)

    return adapted


def _adapt(
    lora: Lora, train: bool, call: Callable, arrays: Any, options: Any, context: Any
) -> jax.Array:
    module = context.module
    dense = isinstance(module, nn.Dense | nn.DenseGeneral) and context.method_name == '__call__'
    if not dense or not isinstance(module.parent, MultiHeadDotProductAttention | MlpBlock):
        return call(*arrays, **options)
    y = call(*arrays, **options)
    params: Any = module.variables['params']
    if module.is_initializing() and module.name in lora.targets and _POOLING not in module.path:
        _create(module, lora, params)
        params = module.variables['params']
    if A not in params:
        return y
    return y + _added(module, lora, params, arrays[0], y, dropped=train and lora.dropout > 0)


def _create(module: nn.Module, lora: Lora, params: Any) -> None:
    kernel = params['kernel'].reshape(_inputs(module, params), -1)
    inputs, outputs = kernel.shape
    if not 1 <= lora.rank <= min(inputs, outputs):
        raise ValueError(
            f'rank {lora.rank} is not from 1 to {min(inputs, outputs)}: the layer {module.name} is '
            f'a matrix of {inputs} x {outputs}'
        )
    uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
    module.param(A, uniform, (inputs, lora.rank), jnp.float32)
    module.param(B, nn.initializers.zeros, (lora.rank, outputs), jnp.float32)
    if lora.dora:
        module.param(MAGNITUDE, lambda _: jnp.linalg.norm(kernel, axis=0))


def _inputs(module: Any, params: Any) -> int:
    """Into how many inputs the first axes of the kernel flatten."""
    axes = module.axis if isinstance(module, nn.DenseGeneral) else -1
    count = 1 if isinstance(axes, int) else len(axes)
    return math.prod(params['kernel'].shape[:count])


def _added(
    module: Any, lora: Lora, params: Any, x: jax.Array, y: jax.Array, *, dropped: bool
) -> jax.Array:
    """What an adapter adds to the layer's own y, which it made of x."""
    dtype = y.dtype
    x = x.astype(dtype).reshape(-1, len(params[A]))
    if dropped:
        rngs = {'dropout': module.make_rng('dropout')}
        drop = nn.Dropout(lora.dropout, deterministic=False, parent=None)
        x = typing.cast(jax.Array, drop.apply({}, x, rngs=rngs))
    new = lora.scale * ((x @ params[A].astype(dtype)) @ params[B].astype(dtype))
    if MAGNITUDE in params:
        factor = (params[MAGNITUDE] / _lengths(params, lora)).astype(dtype)[None]
        if dropped:
            own = x @ _kernel(params).astype(dtype)
        else:
            bias = params.get('bias', jnp.zeros(y.shape[-1:]))
            own = (y - bias.astype(dtype)[*[None] * (y.ndim - bias.ndim)]).reshape(len(x), -1)
        new = (factor - 1) * own + factor * new
    return new.reshape(y.shape)


def _kernel(params: Any) -> jax.Array:
    """Of a layer with an adapter, [inputs, outputs]."""
    return params['kernel'].reshape(len(params[A]), -1)


def _whole(params: Any, lora: Lora) -> jax.Array:
    return _kernel(params) + lora.scale * (params[A] @ params[B])


def _lengths(params: Any, lora: Lora) -> jax.Array:
    """Of the columns of W + alpha / rank * A B, [outputs]; a constant in backward passes."""
    return jax.lax.stop_gradient(jnp.linalg.norm(_whole(params, lora), axis=0))


def merge(params: Any, lora: Lora | None) -> Any:
    """Plain parameters that compute the same: the adapters' products are added to the kernels.

    Args:
      params: nested dict of arrays, of a model with these adapters.
      lora: as the model's; None for no adapters, and `params` as they are.

    Returns:
      The parameters of the model without `lora`.
    """
    if lora is None:
        return params

    def merged(layer: Any) -> Any:
        kernel = _whole(layer, lora)
        if MAGNITUDE in layer:
            kernel = kernel * (layer[MAGNITUDE] / _lengths(layer, lora))[None]
        return {**without(layer), 'kernel': kernel.reshape(layer['kernel'].shape)}

    return _map_layers(merged, params)


def without(params: Any) -> Any:
    """Parameters, or anything else in their tree, without those of the adapters."""
    if not isinstance(params, Mapping):
        return params
    return {name: without(child) for name, child in params.items() if name not in ARRAYS}


def started(params: Any) -> Any:
    """The parameters of a model whose kernels are others now, with DoRA's lengths as theirs."""

    def of(layer: Any) -> Any:
        if MAGNITUDE not in layer:
            return layer
        return {**layer, MAGNITUDE: jnp.linalg.norm(_kernel(layer), axis=0)}

    return _map_layers(of, params)


def _map_layers(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with what `function` makes of each layer that has an adapter."""
    if not isinstance(tree, Mapping):
        return tree
    if A in tree:
        return function(tree)
    return {name: _map_layers(function, child) for name, child in tree.items()}
