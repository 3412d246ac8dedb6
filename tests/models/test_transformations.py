"""What JAX can do with a function, it can do with every model as `models.get_model` gives it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models

ENCODER = {
    'mlp_dim': 24,
    'num_heads': 2,
    'num_layers': 1,
    'dropout_rate': 0.1,
    'attention_dropout_rate': 0.1,
}
VIT = {'patches': {'size': (8, 8)}, 'hidden_size': 16, 'transformer': ENCODER}
MODELS = {
    'vit': VIT | {'representation_size': 8},
    'distilled': VIT | {'distilled': True},
    'hybrid': VIT | {
        'patches': {'size': (1, 1)}, 'resnet': {'num_layers': [1], 'width_factor': 0.5},
        'classifier': 'gap', 'mlp_head': True,
    },
    'mixer': {
        'patches': {'size': (8, 8)}, 'hidden_dim': 16, 'num_blocks': 1, 'tokens_mlp_dim': 24,
        'channels_mlp_dim': 32,
    },
}  # fmt: skip

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape)), tree)


def logits_and_params(name, **changes):
    """A float64 model as a function of its parameters, [2, 5], and such parameters."""
    model = models.from_config(MODELS[name] | changes, num_classes=5, dtype=jnp.float64)
    images = random_like(jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float64), 0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)['params'])
    params = random_like(shapes, 1)
    return lambda params: model.apply({'params': params}, images, train=False), params


@pytest.mark.parametrize('name', MODELS)
def test_jvp_and_linearize_give_the_directional_derivative(float64, name):
    logits, params = logits_and_params(name)
    direction = random_like(params, 2)
    value, tangent = jit(lambda p, d: jax.jvp(logits, (p,), (d,)))(params, direction)
    assert value.dtype == tangent.dtype == np.float64

    def step(size):
        return jax.tree.map(lambda p, d: p + size * d, params, direction)

    f, h = jit(logits), 1e-7  # small, for the kinks of ReLU
    np.testing.assert_allclose(tangent, (f(step(h)) - f(step(-h))) / (2 * h), rtol=1e-5, atol=1e-7)
    assert np.abs(tangent).min() > 1e-4
    linear = jit(lambda p, d: jax.linearize(logits, p)[1](d))(params, direction)
    np.testing.assert_allclose(linear, tangent, rtol=1e-10)


def test_jacfwd_is_jacrev(float64):
    logits, params = logits_and_params('vit')

    def of_class_token(token):
        return logits({**params, 'cls': token})

    forward, reverse = (jit(f(of_class_token))(params['cls']) for f in (jax.jacfwd, jax.jacrev))
    assert forward.shape == (2, 5, 1, 1, 16) and np.abs(forward).max() > 1e-3
    np.testing.assert_allclose(forward, reverse, atol=1e-12)


@pytest.mark.parametrize('remat', ['', 'full'])
def test_forward_over_reverse_gives_products_with_the_hessian(float64, remat):
    logits, params = logits_and_params('vit', remat=remat)
    gradient = jax.grad(lambda params: (logits(params) ** 2).sum())
    product = jit(lambda v: jax.jvp(gradient, (params,), (v,))[1])
    u, v = random_like(params, 2), random_like(params, 3)

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))

    # The Hessian is symmetric.
    np.testing.assert_allclose(dot(u, product(v)), dot(v, product(u)), rtol=1e-10)
    assert abs(dot(u, product(v))) > 1e-2


@pytest.mark.parametrize('name', MODELS)
def test_vmap_over_parameters(float64, name):
    logits, params = logits_and_params(name)
    others = random_like(params, 2)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, others)
    together, single = jit(jax.vmap(logits))(both), jit(logits)
    assert together.shape == (2, 2, 5)
    np.testing.assert_allclose(together[0], single(params), atol=1e-12)
    np.testing.assert_allclose(together[1], single(others), atol=1e-12)


@pytest.mark.parametrize('name', MODELS)
def test_strict_promotion_of_types_and_ranks(name):
    """In float32: in other types, Flax's own LayerNorm converts without being asked."""
    model = models.from_config(MODELS[name], num_classes=5)
    images = jnp.zeros((2, 32, 32, 3))

    def gradient(key):
        params = model.init(key, images, train=False)['params']
        rngs = {'dropout': key}
        return jax.grad(lambda p: model.apply({'params': p}, images, train=True, rngs=rngs).sum())(
            params
        )

    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        gradients = jax.eval_shape(gradient, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype('float32')}
