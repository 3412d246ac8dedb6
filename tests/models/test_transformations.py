"""What JAX can do with a function, it can do with every model as `models.get_model` gives it."""

import functools

import flax.core
import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
    shapes = modules.shapes(model, images, train=False)
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


def loss_and_arrays(name, batch=8):
    """A function of parameters and images, and such, float32."""
    model = models.from_config(MODELS[name], num_classes=5)
    images = jnp.float32(random_like(jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32), 0))
    shapes = modules.shapes(model, images, train=False)
    params = jax.tree.map(jnp.float32, random_like(shapes, 1))

    def loss(params, images):
        return (model.apply({'params': params}, images, train=False) ** 2).sum()

    return loss, params, images


def assert_close(trees, others):
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(others))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=0), trees, others
    )


@pytest.mark.parametrize('name', MODELS)
def test_gradients_inside_and_around_shard_map(name):
    """With replicated parameters, of which JAX sums the gradients over devices."""
    loss, params, images = loss_and_arrays(name)
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
    whole, spread = PartitionSpec(), PartitionSpec('data')

    def sharded(function):
        return jax.shard_map(function, mesh=mesh, in_specs=(whole, spread), out_specs=whole)

    inside = sharded(jax.grad(loss))
    around = jax.grad(sharded(lambda params, images: jax.lax.psum(loss(params, images), 'data')))
    if name != 'vit':  # equal values are a matter of JAX, not of the model
        for gradient in (inside, around):
            shapes = jax.eval_shape(gradient, params, images)
            assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
        return
    expected = jax.jit(jax.grad(loss))(params, images)
    for gradient in (inside, around):
        assert_close(jax.jit(gradient)(params, images), expected)


@pytest.mark.parametrize('name', [name for name in MODELS if name != 'hybrid'])
def test_explicit_axes(name):
    """A hybrid is left out: JAX differentiates no convolution of images that are spread."""
    loss, params, images = loss_and_arrays(name)
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Explicit,))
    gradient = jax.jit(jax.grad(loss))
    with jax.set_mesh(mesh):
        spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec('data')))
        if name != 'vit':
            assert gradient.trace(params, spread)
            return
        ours = jax.device_get(gradient(params, spread))
    assert_close(ours, gradient(params, images))


@pytest.mark.parametrize('name', MODELS)
def test_an_empty_batch_has_no_logits_and_no_gradient(name):
    loss, params, images = loss_and_arrays(name, batch=0)
    value, gradients = jax.eval_shape(jax.value_and_grad(loss), params, images)
    assert value.shape == ()
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)


def test_the_exported_gradient_takes_any_batch():
    loss, params, images = loss_and_arrays('vit', batch=3)
    gradient = jax.jit(jax.grad(loss))
    count = jax.export.symbolic_shape('b')[0]
    shape = jax.ShapeDtypeStruct((count, *images.shape[1:]), images.dtype)
    exported = jax.export.deserialize(jax.export.export(gradient)(params, shape).serialize())
    assert_close(exported.call(params, images), gradient(params, images))


@pytest.mark.parametrize('name', MODELS)
def test_parameters_are_float32_under_x64(float64, name):
    model = models.from_config(MODELS[name], num_classes=5)
    images = jnp.zeros((1, 32, 32, 3))
    logits, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, train=False)
    )
    assert images.dtype == np.float64
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables))} == {np.dtype('float32')}


@pytest.mark.parametrize('name', MODELS)
def test_a_model_is_hashable_and_so_a_static_argument(name):
    """Mappings and lists, as JSON has them, become what has a hash."""
    model, other = (models.from_config(dict(MODELS[name]), num_classes=5) for _ in range(2))
    assert model == other == model.clone() and hash(model) == hash(other)
    assert hash(models.for_training(model)) != hash(model)
    assert isinstance(model.patches, flax.core.FrozenDict)
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def shapes(model, images):
        traced.append(model)
        return model.init(jax.random.key(0), images, train=False)

    for again in (model, other):
        jax.eval_shape(functools.partial(shapes, again), jnp.zeros((1, 32, 32, 3)))
    assert len(traced) == 1


def test_models_of_the_table_are_hashable():
    assert len({models.get_model('ViT-Ti_16', num_classes=3) for _ in range(2)}) == 1


def test_a_model_becomes_an_nnx_module():
    loss, params, images = loss_and_arrays('vit')
    model = models.from_config(MODELS['vit'], num_classes=5)

    def create():
        return bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images, train=False)

    module = nnx.eval_shape(create)
    graph, state = nnx.split(module)
    own = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    logits = jax.eval_shape(lambda state: nnx.merge(graph, state)(images, train=False), state)
    assert logits.shape == (8, 5)


@pytest.mark.parametrize('name', ['vit', 'mixer'])
def test_what_is_no_batch_of_images_is_refused(name):
    model = models.from_config(MODELS[name], num_classes=5)

    def trace(images):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))

    with pytest.raises(ValueError, match=r'not \[16, 16, 3\]: of a single one, give images\[None'):
        trace(jnp.zeros((16, 16, 3)))
    with pytest.raises(ValueError, match=r'in \[-1, 1\], not uint8: give images / 127.5 - 1'):
        trace(jnp.zeros((1, 16, 16, 3), jnp.uint8))
