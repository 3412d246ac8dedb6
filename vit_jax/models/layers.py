"""What the families share: types of intermediate results, the head, rematerialisation."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT_POLICIES: Mapping[str, Callable | None] = {
    'full': None,  # keep nothing of a block but its input
    # Keep what matrix products with parameters gave.
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def at_least_float32(dtype: Any) -> jnp.dtype:
    """What softmax, weight standardisation and logits are computed in.

    float32 for all 16- and 32-bit types, float64 in a float64 model.
    """
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The tanh form of GELU, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).

    Source: https://arxiv.org/abs/1606.08415. For the backward pass only `x` is kept.

    Args:
      x: any shape and floating-point type.

    Returns:
      The same shape and type.
    """
    return _gelu_forward(x)[0]


# The names are for profiles (`benchmarks.trace`).
@jax.named_scope('gelu')
def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return nn.gelu(x, approximate=True), x


@jax.named_scope('gelu')
def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    a, b = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715
    square = x * x
    t = jnp.tanh(x * (a + b * square))
    return (grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (a + 3 * b * square)),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The affine map x kernel + bias, with a backward pass that XLA's CPU compiler computes well.

    Left to itself, JAX makes of the kernel's gradient the transpose of a product, whose operand is
    copied into another order, and of the bias's a sum; into both, XLA pulls the derivative of what
    comes after, and computes it again, in a slow order. Here both are matrix products of the stored
    gradient.

    Args:
      x: [B, inputs].
      kernel: [inputs, outputs].
      bias: [outputs].

    Returns:
      [B, outputs].
    """
    return _affine_forward(x, kernel, bias)[0]


def _affine_forward(x, kernel, bias):
    # Not `affine`, into which a policy of rematerialisation would not see.
    return x @ kernel + bias[None], (x, kernel)


def _affine_backward(kept, grad):
    x, kernel = kept
    return grad @ kernel.T, x.T @ grad, _sum_rows(grad)


affine.defvjp(_affine_forward, _affine_backward)


def gelu_affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The affine map of GELU, gelu(x) kernel + bias; arguments as for `affine`.

    On a CPU, what GELU gave is not kept for the backward pass but computed again: that takes no
    more time than getting memory for it, a fifth of a training step's temporary memory.
    """
    if jax.default_backend() == 'cpu':
        return _again_gelu_affine(x, kernel, bias)
    return affine(gelu(x), kernel, bias)


@jax.custom_vjp
def _again_gelu_affine(x, kernel, bias):
    return _gelu_affine_forward(x, kernel, bias)[0]


def _gelu_affine_forward(x, kernel, bias):
    return _affine_forward(_gelu_forward(x)[0], kernel, bias)[0], (x, kernel)


def _gelu_affine_backward(kept, grad):
    # Not before there is a gradient; otherwise XLA would merge it with the forward pass.
    x, grad = jax.lax.optimization_barrier((kept[0], grad))
    y, kernel = _gelu_forward(x)[0], kept[1]
    y_grad, kernel_grad, bias_grad = _affine_backward((y, kernel), grad)
    return *_gelu_backward(x, y_grad), kernel_grad, bias_grad


_again_gelu_affine.defvjp(_gelu_affine_forward, _gelu_affine_backward)


def _sum_rows(x: jax.Array) -> jax.Array:
    """[rows, columns] to [columns]. XLA's CPU compiler sums rows slowly, and multiplies well."""
    if jax.default_backend() == 'cpu':
        return (jnp.ones((1, len(x)), x.dtype) @ x)[0]
    return x.sum(axis=0)


class Dense(nn.Module):
    """`nn.Dense` by `affine`: [..., inputs] to [..., features].

    Attributes:
      features: outputs.
      after_gelu: whether GELU (tanh form) is applied to the inputs first, see `gelu_affine`.
      dtype: type of the product.
      kernel_init: of `kernel` [inputs, features], float32.
      bias_init: of `bias` [features], float32.
    """

    features: int
    after_gelu: bool = False
    dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] in, [..., features] of `dtype` out."""
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
        bias = self.param('bias', self.bias_init, (self.features,))
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        product = gelu_affine if self.after_gelu else affine
        y = product(rows, kernel.astype(self.dtype), bias.astype(self.dtype))
        return y.reshape(*x.shape[:-1], self.features)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-6) * scale + bias, of each row.

    Source: https://arxiv.org/abs/1607.06450; mean and variance as `nn.LayerNorm` computes them, in
    one pass. Its backward pass is its own because of the sums over all rows, the gradients of scale
    and bias, which XLA's CPU compiler does slowly.

    Args:
      x: [B, D].
      scale: [D], at least float32.
      bias: [D], of the same type.

    Returns:
      [B, D] in the type of `scale`, in which everything is computed.
    """
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    wide = x.astype(scale.dtype)
    mean = wide.mean(axis=1, keepdims=True)
    variance = (wide * wide).mean(axis=1, keepdims=True) - mean * mean
    factor = jax.lax.rsqrt(jnp.maximum(0.0, variance) + 1e-6)  # rounding may make it negative
    return (wide - mean) * (factor * scale[None]) + bias[None], (x, mean, factor, scale)


def _layer_norm_backward(kept, grad):
    x, mean, factor, scale = kept
    normed = (x.astype(scale.dtype) - mean) * factor
    inner = grad * scale[None]
    along = (inner * normed).mean(axis=1, keepdims=True)
    inner -= inner.mean(axis=1, keepdims=True) + normed * along
    return (factor * inner).astype(x.dtype), _sum_rows(grad * normed), _sum_rows(grad)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """`nn.LayerNorm` over the last axis by `layer_norm`: [..., D] to [..., D], epsilon 1e-6.

    Attributes:
      dtype: type of the result; it is computed at least in float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] in, [..., D] of `dtype` out."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
        wide = at_least_float32(self.dtype)
        y = layer_norm(x.reshape(-1, x.shape[-1]), scale.astype(wide), bias.astype(wide))
        return y.astype(self.dtype).reshape(x.shape)


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and projects each: [B, h, w, C] to [B, h / P, w / P, D].

    The convolution of P x P pixels with stride P, as the one matrix product that it is.

    Attributes:
      features: D.
      patch: (P, P), which divide h and w.
      dtype: type of the product.
    """

    features: int
    patch: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] in, [B, h / P, w / P, D] of `dtype` out."""
        batch, height, width, channels = x.shape
        rows, columns = height // self.patch[0], width // self.patch[1]
        shape = (*self.patch, channels, self.features)
        kernel = self.param('kernel', nn.initializers.lecun_normal(), shape)
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        x = x.astype(self.dtype).reshape(batch, rows, self.patch[0], columns, -1).swapaxes(2, 3)
        x = affine(
            x.reshape(batch * rows * columns, -1),
            kernel.reshape(-1, self.features).astype(self.dtype),
            bias.astype(self.dtype),
        )
        return x.reshape(batch, rows, columns, self.features)


def rematerialised(
    block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """The class of a block that recomputes its activations in the backward pass.

    Args:
      block: class of the module.
      remat: a key of `REMAT_POLICIES`, or '' for `block` as it is.
      static_argnums: arguments of `__call__` that are no arrays; `self` is number 0.

    Raises:
      ValueError: no such policy.
    """
    if not remat:
        return block
    if remat not in REMAT_POLICIES:
        raise ValueError(f'unknown remat {remat!r}: one of {", ".join(REMAT_POLICIES)}, or empty')
    return nn.remat(block, static_argnums=static_argnums, policy=REMAT_POLICIES[remat])


def check_patches(
    patch: tuple[int, int], image: tuple[int, int], features: tuple[int, int]
) -> None:
    """Checks that a map of features is a whole number of patches.

    Args:
      patch: height and width of a patch, in positions of the map.
      image: height and width of the image, pixels.
      features: height and width of the map: the image itself, or what a ResNet made of it.

    Raises:
      ValueError: it is not.
    """
    if features[0] % patch[0] or features[1] % patch[1]:
        of = '' if image == features else f' ({features[0]} x {features[1]} after the ResNet)'
        raise ValueError(
            f'an image of {image[0]} x {image[1]} pixels{of} is not a whole number of '
            f'{patch[0]} x {patch[1]} patches'
        )


def head(num_classes: int, *, name: str, dtype: Any, bias_init: float = 0.0) -> nn.Dense:
    """The classification layer, initialised to zeros: features [..., D] to logits [..., C].

    Operands are in `dtype`, logits at least in float32: rounding them to bfloat16 would round the
    loss.
    """
    return nn.Dense(
        num_classes,
        dtype=dtype,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(bias_init),
        dot_general=functools.partial(
            jax.lax.dot_general, preferred_element_type=at_least_float32(dtype)
        ),
        name=name,
    )
