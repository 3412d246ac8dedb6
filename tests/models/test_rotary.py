"""Rotary positions beside complex numbers, and models that have them."""

import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax import models
from vit_jax.models.rotary import Rotary

ENCODER = {
    'mlp_dim': 24,
    'num_heads': 2,
    'num_layers': 3,
    'dropout_rate': 0.0,
    'attention_dropout_rate': 0.0,
    'qkv_bias': 'qv',
}
VIT = {'patches': {'size': (8, 8)}, 'hidden_size': 24, 'transformer': ENCODER}
DINOV3 = VIT | {
    'transformer': ENCODER | {'add_position_embedding': False, 'layer_scale': True},
    'rotary': {'form': 'dinov3', 'theta': 100.0},
    'registers': 2,
}
EVA02 = VIT | {
    'transformer': ENCODER | {'gated_mlp': True, 'mlp_norm': True, 'attention_norm': True},
    'rotary': {'form': 'axial', 'theta': 10_000.0, 'grid': 3},
    'act': 'silu',
}
each = pytest.mark.parametrize('config', [DINOV3, EVA02], ids=['dinov3', 'eva02'])


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def setup(config, images):
    model = models.from_config(config, num_classes=5)
    shapes = modules.shapes(model, images, train=False)
    return model, jax.tree.map(lambda x: 0.5 * random(*x.shape, seed=x.size), shapes)


def test_dinov3_turns_by_the_place_of_the_centre():
    """Numbers i and i + K / 2 of a head are one complex number; rows come first."""
    rows, columns, size, theta = 2, 3, 8, 100.0
    x = random(1, 2 + rows * columns, 1, size, dtype=np.float64)
    with jax.enable_x64(True):
        turned = np.asarray(
            Rotary('dinov3', theta, shape=(rows, columns), prefix=2)(jnp.asarray(x))
        )
    np.testing.assert_array_equal(turned[:, :2], x[:, :2])
    for row in range(rows):
        for column in range(columns):
            token = 2 + row * columns + column
            old, new = ([v[0, token, 0, i] + 1j * v[0, token, 0, i + 4] for i in range(4)]
                        for v in (x, turned))  # fmt: skip
            y, z = -1 + (2 * row + 1) / rows, -1 + (2 * column + 1) / columns
            angles = 2 * np.pi * np.array([y, y / theta**0.5, z, z / theta**0.5])
            np.testing.assert_allclose(new, old * np.exp(1j * angles), atol=1e-12)


@pytest.mark.parametrize('grid', [0, 6])
def test_axial_turns_by_numbers_of_rows_and_columns(grid):
    """Neighbours are one complex number; `grid` scales what the patches are counted by."""
    rows, columns, size, theta = 2, 3, 8, 10_000.0
    x = random(1, 1 + rows * columns, 1, size, dtype=np.float64)
    with jax.enable_x64(True):
        rotary = Rotary('axial', theta, grid, shape=(rows, columns), prefix=1)
        turned = np.asarray(rotary(jnp.asarray(x)))
    np.testing.assert_array_equal(turned[:, :1], x[:, :1])
    for row in range(rows):
        for column in range(columns):
            token = 1 + row * columns + column
            old, new = (v[0, token, 0, 0::2] + 1j * v[0, token, 0, 1::2] for v in (x, turned))
            y, z = (row * grid / rows, column * grid / columns) if grid else (row, column)
            angles = np.array([y, y / theta**0.5, z, z / theta**0.5])
            np.testing.assert_allclose(new, old * np.exp(1j * angles), atol=1e-12)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('axia', 100.0), "unknown rotary form 'axia': one of axial, dinov3"),
        (('dinov3', 100.0, 16), "scales its places itself: no 'grid'"),
        (('axial', float('nan')), 'no such positions'),
        (('axial', 100.0, -1), 'no such positions'),
    ],
)
def test_positions_that_there_are_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rotary(*arguments)


def test_heads_are_multiples_of_four():
    with pytest.raises(ValueError, match='heads of a multiple of 4, not of 6'):
        Rotary('axial', 100.0, shape=(1, 1))(jnp.zeros((1, 1, 1, 6)))


@each
def test_scanned_for_training_and_for_inference_it_is_the_same(config):
    """Values and gradients, in float64."""
    with jax.enable_x64(True):
        images = random(2, 16, 24, 3, dtype=np.float64)
        model, params = setup(config, images)
        params = jax.tree.map(lambda x: x.astype(np.float64), params)

        def gradients(model):
            def loss(params):
                return (model.apply({'params': params}, images, train=True) ** 2).sum()

            quick = {'xla_backend_optimization_level': 0}
            return jax.jit(jax.value_and_grad(loss), compiler_options=quick)(params)

        model = model.clone(dtype=jnp.float64)
        value, expected = gradients(model)
        largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
        for other in (
            models.for_inference(model.clone(scan_layers=True)),
            models.for_training(model.clone(remat='dots')),
        ):
            again, found = gradients(other)
            np.testing.assert_allclose(again, value, rtol=1e-12)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * largest)


@each
def test_on_a_mesh_with_explicit_axes(config):
    images = random(4, 16, 24, 3)
    model, params = setup(config, images)

    def compute(params, images):
        return model.apply({'params': params}, images, train=False)

    expected = jax.jit(compute)(params, images)
    mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec('data')))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        found = jax.jit(compute)(params, spread)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rotary_positions_fit_any_image():
    images = random(1, 16, 24, 3)
    model, params = setup(DINOV3, images)
    other = models.for_image_size(model, params, (24, 8))
    assert jax.tree.all(jax.tree.map(np.array_equal, other, params))
    logits = modules.apply(model, other, random(1, 24, 8, 3))
    assert np.isfinite(logits).all()
    with pytest.raises(ValueError, match='not a whole number of'):
        models.for_image_size(model, params, (20, 20))

    model, params = setup(EVA02, images)  # beside learned ones, which are resized
    other = models.for_image_size(model, params, (24, 8), grid=(2, 3))
    assert other['Transformer']['posembed_input']['pos_embedding'].shape == (1, 4, 24)


def test_places_decide():
    """Patches in another order give another class token; without rotary positions they do not."""
    images = random(1, 16, 24, 3)
    swapped = np.concatenate([images[:, :, 16:], images[:, :, :16]], axis=2)
    model, params = setup(DINOV3, images)
    logits, other = (modules.apply(model, params, x) for x in (images, swapped))
    assert np.abs(logits - other).max() > 1e-3
    plain = model.clone(rotary=None)
    logits, other = (modules.apply(plain, params, x) for x in (images, swapped))
    np.testing.assert_allclose(logits, other, atol=1e-5)
