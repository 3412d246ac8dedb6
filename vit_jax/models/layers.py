"""What the families share: types of intermediate results, the MLP, the head, rematerialisation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# The activation functions, by the names that timm gives them.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),  # https://arxiv.org/abs/1606.08415
    'gelu': functools.partial(nn.gelu, approximate=False),  # exact, with erf
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),  # of OpenAI's CLIP
    'relu': nn.relu,
    'silu': nn.silu,
    'tanh': nn.tanh,
    'linear': lambda x: x,
}

REMAT_POLICIES: Mapping[str, Callable | None] = {
    'full': None,  # keep nothing of a block but its input
    # Keep what matrix products with parameters gave.
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def at_least_float32(dtype: Any) -> jnp.dtype:
    """What softmax, weight standardisation and logits are computed in.

    float32 for all other types, float64 in a float64 model.
    """
    return jnp.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)


def unit_length(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [..., D] divided by their lengths, and the lengths [..., 1]; at least float32.

    As the original release's LiT, which adds 1e-8 to the length.
    """
    x = x.astype(at_least_float32(x.dtype))
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / (length + 1e-8), length


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of a name in `ACTIVATIONS`; `ValueError` for another name."""
    if name not in ACTIVATIONS:
        raise ValueError(f'unknown activation {name!r}: one of {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[name]


class MlpBlock(nn.Module):
    """Two dense layers with an activation function between them; as many outputs as inputs.

    Attributes:
      mlp_dim: width of the hidden layer.
      dropout_rate: dropout after each of the two layers.
      dtype: type of the matrix products.
      act: the activation function, a name in `ACTIVATIONS`.
      gated: multiply what the activation function gives by a second layer's output, act(gate(x)) *
        Dense_0(x), as in SwiGLU, where the function is 'silu' (https://arxiv.org/abs/2002.05202).
      norm: makes a normalisation in front of the second layer, `norm`, from a name; None for none.
      kernel_init: of all kernels [inputs, outputs].
      bias_init: of all biases [outputs].
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    act: str = 'gelu_tanh'
    gated: bool = False
    norm: Callable[..., nn.Module] | None = None
    kernel_init: Callable[..., jax.Array] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., jax.Array] = nn.initializers.normal(stddev=1e-6)

    @nn.compact
    def __call__(self, inputs: jax.Array, *, deterministic: bool) -> jax.Array:
        """[..., inputs] to [..., inputs], over the last axis."""
        dense = functools.partial(
            nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        x = dense(self.mlp_dim, name='Dense_0')(inputs)
        if self.gated:
            x = self.activation(dense(self.mlp_dim, name='gate')(inputs)) * x
        else:
            x = self.activation(x)
        x = nn.Dropout(self.dropout_rate, name='Dropout_0')(x, deterministic=deterministic)
        if self.norm is not None:
            x = self.norm(name='norm')(x)
        x = dense(inputs.shape[-1], name='Dense_1')(x)
        return nn.Dropout(self.dropout_rate, name='Dropout_1')(x, deterministic=deterministic)

    def activation(self, x: jax.Array) -> jax.Array:
        """[..., M] to [..., M]."""
        return activation(self.act)(x)


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor, `scale` [D], at first 1e-5.

    Source: https://arxiv.org/abs/2103.17239.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        init = nn.initializers.constant(1e-5)
        scale = self.param('scale', init, x.shape[-1:], jnp.float32).astype(self.dtype)
        return x * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def rematerialised(
    block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
    """The class of a block that recomputes its activations in the backward pass.

    Args:
      block: class of the module.
      remat: a key of `REMAT_POLICIES`, or '' for `block` as it is.
      static_argnums: positions of the arguments of `__call__` that are not arrays; `self` is 0.

    Raises:
      ValueError: no such policy.
    """
    if not remat:
        return block
    if remat not in REMAT_POLICIES:
        raise ValueError(f'unknown remat {remat!r}: one of {", ".join(REMAT_POLICIES)}, or empty')
    return nn.remat(block, static_argnums=static_argnums, policy=REMAT_POLICIES[remat])


def hashable(value: Any) -> Any:
    """A setting of a model as something that has a hash: mappings frozen, lists as tuples."""
    if hasattr(value, 'to_dict'):  # a `ConfigDict`, which is no `Mapping`
        value = value.to_dict()
    if isinstance(value, Mapping):
        return flax.core.FrozenDict({name: hashable(item) for name, item in value.items()})
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


def check_images(images: jax.Array) -> None:
    """Checks what a model is given.

    Raises:
      ValueError: there is no batch axis, or the values are integers.
    """
    if images.ndim != 4:
        raise ValueError(
            f'images are [batch, height, width, channels], not {list(images.shape)}: '
            'of a single one, give images[None]'
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f'images are floating-point numbers in [-1, 1], not {images.dtype}: give '
            'images / 127.5 - 1, or use `steps.make_predict_step`, which takes pixels'
        )


def check_patches(patch: Sequence[int], image: Sequence[int], features: Sequence[int]) -> None:
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


def patch_embedding(
    features: int, patch: tuple[int, int], *, name: str, dtype: Any, use_bias: bool = True
) -> nn.Conv:
    """Cuts a map into patches and projects each: [B, h, w, C] to [B, h / P, w / P, features]."""
    return nn.Conv(
        features,
        patch,
        strides=patch,
        padding='VALID',
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=_project_patches,
        name=name,
    )


def _project_patches(x, kernel, strides, padding, *, precision, **options):
    """The convolution; where images are spread over explicit axes, as a product of matrices.

    JAX differentiates no convolution there. Else it is a fifth faster on CPUs.
    """
    if not any(jax.typeof(x).sharding.spec):  # which tells of explicit axes only
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, precision=precision, **options
        )
    batch, height, width, channels = x.shape
    rows, columns = kernel.shape[:2]
    # One axis at a time, which keeps the batch spread.
    x = x.reshape(batch, height // rows, rows, width, channels)
    x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return jnp.einsum('bhpwqc,pqcd->bhwd', x, kernel, precision=precision)


def as_tokens(x: jax.Array) -> jax.Array:
    """A map [B, h, w, D] as tokens [B, h * w, D], row by row."""
    batch, rows, columns, width = x.shape
    return x.reshape(batch, rows * columns, width)  # -1 would not do for an empty batch


def head(
    num_classes: int, *, name: str, dtype: Any, bias_init: float = 0.0, zeros: bool = True
) -> nn.Dense:
    """The last layer, initialised to zeros unless told otherwise: features [..., D] to [..., C].

    Operands are in `dtype`, logits at least in float32: rounding them to bfloat16 would round the
    loss.
    """
    return nn.Dense(
        num_classes,
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zeros else nn.initializers.lecun_normal(),
        bias_init=nn.initializers.constant(bias_init),
        dot_general=functools.partial(
            jax.lax.dot_general, preferred_element_type=at_least_float32(dtype)
        ),
        name=name,
    )
