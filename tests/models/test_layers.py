"""The layers with a backward pass of their own, beside Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import layers

PAIRS = {
    'dense': (layers.Dense, nn.Dense, {'features': 24}),
    'gelu_dense': (layers.Dense, nn.Dense, {'features': 24}),
    'layer_norm': (layers.LayerNorm, nn.LayerNorm, {}),
    'gelu': (None, None, {}),
}


def forward_and_gradients(function, params, x, weight):
    """Of sum(weight * function): the values, and the gradients of parameters and input."""

    def loss(params, x):
        y = function(params, x)
        return (y * weight).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return y, gradients


def both(name, dtype):
    """Ours and Flax's function of the parameters and the input, and the parameters."""
    if name == 'gelu':
        return (lambda p, x: layers.gelu(x)), (lambda p, x: nn.gelu(x, approximate=True)), {}
    ours, flax, options = PAIRS[name]
    options = options | {'dtype': dtype}
    if name == 'layer_norm':
        theirs = flax(epsilon=1e-6, **options)
    else:
        theirs = flax(**options)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), jnp.zeros((1, 16), dtype))['params']
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(1, 0.5, s.shape), dtype), shapes)
    before = (lambda x: nn.gelu(x, approximate=True)) if name == 'gelu_dense' else (lambda x: x)
    mine = ours(**options, **({'after_gelu': True} if name == 'gelu_dense' else {}))
    assert jax.tree.structure(
        jax.eval_shape(mine.init, jax.random.key(0), jnp.zeros((1, 16), dtype))['params']
    ) == jax.tree.structure(params)
    return (
        lambda p, x: mine.apply({'params': p}, x),
        lambda p, x: theirs.apply({'params': p}, before(x)),
        params,
    )


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize(('dtype', 'limit'), [('float32', 2e-6), ('float64', 1e-13)])
def test_values_and_gradients_are_those_of_flax(name, dtype, limit):
    with jax.enable_x64(dtype == 'float64'):
        mine, theirs, params = both(name, jnp.dtype(dtype))
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(0.3, 2, (3, 5, 16)), dtype)
        weight = jnp.asarray(rng.normal(size=jax.eval_shape(mine, params, x).shape), dtype)
        ours = jax.tree.leaves(forward_and_gradients(mine, params, x, weight))
        flax = jax.tree.leaves(forward_and_gradients(theirs, params, x, weight))
        for a, b in zip(ours, flax, strict=True):
            assert a.dtype == b.dtype == dtype and a.shape == b.shape
            assert np.abs(a - b).max() <= limit * np.abs(b).max()


def test_layer_norm_in_bfloat16_computes_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (4, 64)), jnp.bfloat16)
    layer = layers.LayerNorm(jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)['params']
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    y = layer.apply({'params': params}, x)
    assert y.dtype == jnp.bfloat16
    wide = np.float64(x)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    # In bfloat16, squares of 100 would be rounded by up to 32, and the variance is 1.
    assert np.abs(np.float64(y) - expected).max() < 0.02
    gradients = jax.grad(lambda p: layer.apply({'params': p}, x).astype(jnp.float32).sum())(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))


def test_layer_norm_of_equal_values_is_the_bias():
    """Their variance is 0, or by rounding below: neither NaN nor infinity."""
    x = jnp.full((2, 16), 1234.567, jnp.float32)
    scale, bias = jnp.ones(16), jnp.arange(16, dtype=jnp.float32)
    y, back = jax.vjp(lambda x: layers.layer_norm(x, scale, bias), x)
    assert np.abs(y - bias[None]).max() < 0.2  # of the mean, the last digit times 1 / sqrt(epsilon)
    assert np.isfinite(back(y)[0]).all()
