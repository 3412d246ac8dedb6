"""Forms of the layers for training on CPUs, in place of Flax's own.

A model computes them where its switch `cpu_training` is on, which it is in the training step only
(`models.for_training`), and where the program is compiled for a CPU (`jax.lax.platform_dependent`);
everywhere else it computes the plain form of its modules. The parameters are the same; results and
gradients differ by rounding only.

What this gives, for ViTs on a CPU: half of a training step's temporary memory (Ti/16 at batch 8:
173 for 359 MiB, B/16: 718 for 1,529), and 1.3 to 2 times the speed. XLA's CPU compiler sums over
rows slowly, computes derivatives again inside of matrix products, and has to clear all memory that
it keeps for the backward pass. What it costs: forward-mode differentiation (`jax.jvp`) fails, on
any platform, because the backward passes are hand-written (`jax.custom_vjp`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import layers, lora
from vit_jax.models.attention import MultiHeadDotProductAttention, dot_product_attention

# Most attention weights of a chunk: 2 MB in float32. Found with ViT-B/16 at batch 8 (465,708 an
# image).
CHUNK = 2**19


def switchable(call: Callable) -> Callable:
    """Decorates the `__call__` of a model that has the switch `cpu_training`, a bool.

    Where it is on, calls of the layers inside are replaced by those of `_FORMS`.
    """

    @functools.wraps(call)
    def switched(model: nn.Module, *args: Any, **kwargs: Any) -> jax.Array:
        if not model.cpu_training or model.is_initializing():
            return call(model, *args, **kwargs)
        with nn.intercept_methods(functools.partial(_replace, model.lora)):
            return call(model, *args, **kwargs)

    return switched


def _replace(
    adapters: lora.Lora | None, call: Callable, arrays: Any, options: Any, context: Any
) -> jax.Array:
    form = _FORMS.get((type(context.module), context.method_name))
    if form is None or not _applies(context.module, options, adapters):
        return call(*arrays, **options)
    if form is _call_mlp and adapters is not None:
        form = functools.partial(form, scale=adapters.scale)
    return form(context.module, context.module.variables.get('params'), *arrays)


def _applies(module: nn.Module, options: dict[str, Any], adapters: lora.Lora | None) -> bool:
    """Whether a call with these keyword arguments is what the form computes."""
    if isinstance(module, nn.Dense):
        return module.dot_general is None  # the head sets the type of its output by one
    if isinstance(module, nn.DenseGeneral):
        return module.use_bias
    if isinstance(module, MultiHeadDotProductAttention):
        plain = not options['dropout_rate'] and options['mask'] is None
        return module.implementation == 'auto' and plain
    if isinstance(module, layers.MlpBlock):
        dropout = module.dropout_rate and not options.get('deterministic', True)
        other = adapters is not None and (adapters.dropout or adapters.dora)
        other = other and any(lora.A in layer for layer in module.variables['params'].values())
        return not (module.gated or module.norm or dropout or other)
    if isinstance(module, nn.Conv):
        return module.use_bias
    return True


def _by_platform(cpu: Callable, default: Callable) -> Callable:
    """A function of arrays: `cpu` in a program for CPUs, `default` in any other.

    Equal layers are traced once, because of `jax.jit`.
    """
    return jax.jit(functools.partial(jax.lax.platform_dependent, cpu=cpu, default=default))


def _affine(x, kernel, bias):
    """[B, inputs], [inputs, outputs], [outputs] to [B, outputs]."""
    return x @ kernel + bias[None]


def _affine_forward(x, kernel, bias):
    return _affine(x, kernel, bias), (x, kernel)


def _affine_backward(kept, grad):
    # Left to itself, JAX makes of the kernel's gradient the transpose of a product, whose operand
    # is copied into another order, and of the bias's a sum; into both, XLA pulls the derivative of
    # what comes after, and computes it again, in a slow order. These are products of the stored
    # gradient.
    x, kernel = kept
    return grad @ kernel.T, x.T @ grad, _sum_rows(grad)


def _sum_rows(x):
    """[rows, columns] to [columns], as the matrix product that a CPU computes faster."""
    return (jnp.ones((1, len(x)), x.dtype) @ x)[0]


_own_affine = jax.custom_vjp(_affine)
_own_affine.defvjp(_affine_forward, _affine_backward)
affine = _by_platform(_own_affine, _affine)


# The scopes are for profiles (`benchmarks.trace`).
def _activation(act, x):
    with jax.named_scope('gelu'):
        return layers.activation(act)(x)


@jax.named_scope('gelu')
def _activation_backward(act, x, grad):
    if act != 'gelu_tanh':
        return jax.vjp(layers.activation(act), x)[1](grad)
    # x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), of which only x is kept.
    a, b = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715
    square = x * x
    t = jnp.tanh(x * (a + b * square))
    return (grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (a + 3 * b * square)),)


@functools.cache
def activation(act: str) -> Callable:
    """The function of a name in `layers.ACTIVATIONS`, of which only the argument is kept."""
    plain = functools.partial(_activation, act)
    own = jax.custom_vjp(plain)
    own.defvjp(lambda x: (plain(x), x), functools.partial(_activation_backward, act))
    return _by_platform(own, plain)


def _activation_affine(act, x, kernel, bias):
    return _affine(_activation(act, x), kernel, bias)


def _activation_affine_backward(act, kept, grad):
    # What the activation gave is computed again: that takes no more time than getting memory for
    # it, a fifth of a training step's temporary memory. Not before there is a gradient; otherwise
    # XLA would merge it with the forward pass.
    x, grad = jax.lax.optimization_barrier((kept[0], grad))
    y_grad, kernel_grad, bias_grad = _affine_backward((_activation(act, x), kept[1]), grad)
    return *_activation_backward(act, x, y_grad), kernel_grad, bias_grad


@functools.cache
def activation_affine(act: str) -> Callable:
    """`affine` of what the function `act` gives."""
    plain = functools.partial(_activation_affine, act)
    own = jax.custom_vjp(plain)
    own.defvjp(
        lambda x, kernel, bias: (plain(x, kernel, bias), (x, kernel)),
        functools.partial(_activation_affine_backward, act),
    )
    return _by_platform(own, plain)


def _activation_low_rank(act, x, a, b):
    return _activation(act, x) @ a @ b


def _activation_low_rank_backward(act, kept, grad):
    # As above. The layer beside it, whose kernel is not trained, needs nothing of it again.
    x, a, b = kept
    x, grad = jax.lax.optimization_barrier((x, grad))
    y, inner = _activation(act, x), grad @ b.T
    return *_activation_backward(act, x, inner @ a.T), y.T @ inner, (y @ a).T @ grad


@functools.cache
def activation_low_rank(act: str) -> Callable:
    """The product a b of an adapter, times what the function `act` gives."""
    plain = functools.partial(_activation_low_rank, act)
    own = jax.custom_vjp(plain)
    own.defvjp(
        lambda x, a, b: (plain(x, a, b), (x, a, b)),
        functools.partial(_activation_low_rank_backward, act),
    )
    return _by_platform(own, plain)


def _layer_norm(epsilon, x, scale, bias):
    """[B, D], [D], [D] to [B, D] in the type of `scale` and `bias`, which is at least float32.

    Mean and variance as `nn.LayerNorm` computes them, in one pass.
    """
    return _layer_norm_forward(epsilon, x, scale, bias)[0]


def _layer_norm_forward(epsilon, x, scale, bias):
    wide = x.astype(scale.dtype)
    mean = wide.mean(axis=1, keepdims=True)
    variance = (wide * wide).mean(axis=1, keepdims=True) - mean * mean
    factor = jax.lax.rsqrt(jnp.maximum(0.0, variance) + epsilon)  # rounding may make it negative
    return (wide - mean) * (factor * scale[None]) + bias[None], (x, mean, factor, scale)


def _layer_norm_backward(kept, grad):
    x, mean, factor, scale = kept
    normed = (x.astype(scale.dtype) - mean) * factor
    inner = grad * scale[None]
    along = (inner * normed).mean(axis=1, keepdims=True)
    inner -= inner.mean(axis=1, keepdims=True) + normed * along
    return (factor * inner).astype(x.dtype), _sum_rows(grad * normed), _sum_rows(grad)


@functools.cache
def layer_norm(epsilon: float) -> Callable:
    """`nn.LayerNorm` of rows with this epsilon."""
    plain = functools.partial(_layer_norm, epsilon)
    own = jax.custom_vjp(plain)
    own.defvjp(functools.partial(_layer_norm_forward, epsilon), _layer_norm_backward)
    return _by_platform(own, plain)


def _chunked_forward(*arrays):
    return dot_product_attention(*arrays), arrays


def _chunked_backward(kept, grad):
    """Computes the weights once more, of few images at a time: they stay in the CPU's cache.

    Source: https://arxiv.org/abs/2112.05682.
    """
    query, key, _ = kept
    batch, queries, heads, _ = query.shape
    # A batch that is spread over devices stays so: a chunk has images of each.
    devices = math.gcd(batch, jax.device_count())
    images = batch // devices
    largest = max(1, CHUNK // (queries * heads * key.shape[1]))
    chunks = next(n for n in range(1, images + 1) if images % n == 0 and images // n <= largest)

    def split(x):
        return x.reshape(devices, chunks, -1, *x.shape[1:])

    def backward(index, over):
        *chunk, chunk_grad = (
            jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False).reshape(-1, *x.shape[3:])
            for x in (*over, grads)
        )
        found = jax.vjp(dot_product_attention, *chunk)[1](chunk_grad)
        return [
            jax.lax.dynamic_update_index_in_dim(
                x, new.reshape(devices, -1, *new.shape[1:]), index, axis=1
            )
            for x, new in zip(over, found, strict=True)
        ]

    # Gradients are written over what they belong to: a loop that collects its results would have
    # to clear memory for them first.
    *arrays, grads = map(split, (*kept, grad))
    found = jax.lax.fori_loop(0, chunks, backward, arrays)
    return tuple(x.reshape(-1, *x.shape[3:]) for x in found)


# `dot_product_attention` that keeps no weights for its backward pass.
_chunked_attention = jax.custom_vjp(lambda *arrays: dot_product_attention(*arrays))
_chunked_attention.defvjp(_chunked_forward, _chunked_backward)
attention = _by_platform(_chunked_attention, dot_product_attention)


# What computes a call of a module: from the module, its parameters and the array arguments.


def _call_dense(
    module: Any,
    params: Any,
    x: jax.Array,
    product: Callable[..., jax.Array] = affine,
) -> jax.Array:
    """The leading axes of the kernel are contracted with the last of `x`, the others are given."""
    kernel, bias = (params[name].astype(module.dtype) for name in ('kernel', 'bias'))
    contracted = kernel.ndim - bias.ndim
    y = product(
        x.astype(module.dtype).reshape(-1, math.prod(kernel.shape[:contracted])),
        kernel.reshape(-1, bias.size),
        bias.reshape(-1),
    )
    return y.reshape(*x.shape[: x.ndim - contracted], *bias.shape)


def _call_patches(module: Any, params: Any, x: jax.Array) -> jax.Array:
    """The convolution of P x P positions with stride P, which is one matrix product."""
    batch, height, width, channels = x.shape
    rows, columns = module.kernel_size
    x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return _call_dense(module, params, x.swapaxes(2, 3))


def _call_layer_norm(module: Any, params: Any, x: jax.Array) -> jax.Array:
    wide = jnp.promote_types(module.dtype, jnp.float32)
    scale, bias = (params[name].astype(wide) for name in ('scale', 'bias'))
    y = layer_norm(module.epsilon)(x.reshape(-1, x.shape[-1]), scale, bias)
    return y.astype(module.dtype).reshape(x.shape)


def _call_mlp(module: layers.MlpBlock, params: Any, x: jax.Array, scale: float = 1.0) -> jax.Array:
    """With `scale` of what adapters give, if there are some; they have neither dropout nor DoRA."""
    for name, product, low_rank in (
        ('Dense_0', affine, lambda x, a, b: x @ a @ b),
        ('Dense_1', activation_affine(module.act), activation_low_rank(module.act)),
    ):
        with jax.named_scope(name):
            y = _call_dense(module, params[name], x, product)
            if lora.A in params[name]:
                rows = x.astype(module.dtype).reshape(-1, x.shape[-1])
                a, b = (params[name][array].astype(module.dtype) for array in (lora.A, lora.B))
                y += scale * low_rank(rows, a, b).reshape(y.shape)
            x = y
    return x


_FORMS: dict[tuple[type[nn.Module], str], Callable[..., jax.Array]] = {
    (nn.Conv, '__call__'): _call_patches,
    (nn.Dense, '__call__'): _call_dense,
    (nn.DenseGeneral, '__call__'): _call_dense,
    (nn.LayerNorm, '__call__'): _call_layer_norm,
    (layers.MlpBlock, '__call__'): _call_mlp,
    (layers.MlpBlock, 'activation'): lambda module, params, x: activation(module.act)(x),
    (MultiHeadDotProductAttention, 'attend'): lambda module, params, *arrays: attention(*arrays),
}
