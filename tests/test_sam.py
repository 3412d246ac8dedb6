"""SAM and GSAM: beside two passes in NumPy, on any topology."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from vit_jax import optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.configs import common

CLASSES, RATE = 3, 0.1
RNG = np.random.default_rng(0)
BATCH = {
    'image': RNG.uniform(0, 255, (8, 2, 4, 3)).astype(np.float32),
    'label': RNG.integers(0, CLASSES, 8).astype(np.int32),
}
PARAMS = {
    'first': {'kernel': RNG.normal(0, 0.3, (24, 4)).astype(np.float32)},
    'head': {'kernel': RNG.normal(0, 0.3, (4, CLASSES)).astype(np.float32)},
}
SETTINGS = {
    'sam': {'sam_rho': 0.3},
    'gsam': {'sam_rho': 0.6, 'gsam_alpha': 0.6, 'gsam_rho_min': 0.1},
}


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        x = images.reshape(images.shape[0], -1)
        x = nn.tanh(nn.Dense(4, use_bias=False, name='first')(x))
        return nn.Dense(CLASSES, use_bias=False, name='head')(x)


def make_config(**changes):
    config = common.get_defaults()
    config.update(base_lr=0.4, **changes)
    return config


def gradient(a, b):
    """Loss, and gradients of both kernels, in float64."""
    x = BATCH['image'].reshape(8, -1).astype(np.float64) / 127.5 - 1
    hidden = np.tanh(x @ a)
    logits = hidden @ b
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    loss = -np.log(shares[np.arange(8), BATCH['label']]).mean()
    error = (shares - np.eye(CLASSES)[BATCH['label']]) / 8
    back = (error @ b.T) * (1 - hidden**2)
    return loss, x.T @ back, hidden.T @ error


def flat(*arrays):
    return np.concatenate([array.ravel() for array in arrays])


def by_hand(settings, rate_share):
    """The gradient for the optimizer, of both passes, as one vector; and the first loss."""
    a, b = PARAMS['first']['kernel'].astype(float), PARAMS['head']['kernel'].astype(float)
    loss, *clean = gradient(a, b)
    most = settings['sam_rho']
    least = settings.get('gsam_rho_min', most)
    rho = least + (most - least) * rate_share
    length = np.sqrt((flat(*clean) ** 2).sum())
    _, *robust = gradient(a + rho * clean[0] / length, b + rho * clean[1] / length)
    clean, robust = flat(*clean), flat(*robust)
    unit = robust / np.sqrt((robust**2).sum())
    rest = clean - (clean @ unit) * unit
    return robust - settings.get('gsam_alpha', 0.0) * rest, loss


def one_step(settings, devices=1, fsdp=1, frozen='', **options):
    config = make_config(**settings)
    sharpness = optim.sharpness_of(config, lambda step: 0.1 + 0.0 * step)  # a quarter of base_lr
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    tx = optim.trained_only(optax.sgd(RATE), frozen)
    state = state_lib.create_state(PARAMS, tx, mesh)
    places = sharding.state_sharding(state, mesh)
    step = steps.make_train_step(
        TwoLayers(), tx, None, mesh, places,
        seed=0, flip=False, sharpness=sharpness, frozen=frozen, **options,
    )  # fmt: skip
    return jax.device_get(step(state, sharding.put_batch(BATCH, mesh)))


@pytest.mark.parametrize(
    ('devices', 'fsdp', 'accum_steps'), [(1, 1, 1), (1, 1, 4), (4, 1, 2), (4, 4, 2)]
)
@pytest.mark.parametrize('name', SETTINGS)
def test_a_step_is_two_passes_over_the_whole_batch(name, devices, fsdp, accum_steps, monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 1)
    state, metrics = one_step(SETTINGS[name], devices, fsdp, accum_steps=accum_steps)
    expected, loss = by_hand(SETTINGS[name], 0.25)
    old = flat(PARAMS['first']['kernel'], PARAMS['head']['kernel'])
    new = flat(state.params['first']['kernel'], state.params['head']['kernel'])
    np.testing.assert_allclose((old - new) / RATE, expected, atol=2e-6)
    np.testing.assert_allclose(metrics['train_loss'], loss, atol=1e-6)
    np.testing.assert_allclose(metrics['gradient_norm'], np.linalg.norm(expected), rtol=1e-5)
    plain = flat(*gradient(*(PARAMS[k]['kernel'].astype(float) for k in ('first', 'head')))[1:])
    assert np.abs(plain - expected).max() > 1e-2


def test_what_is_frozen_is_not_moved_for_the_second_pass():
    state, _ = one_step({'sam_rho': 0.3}, frozen='first/.*')
    a, b = PARAMS['first']['kernel'].astype(float), PARAMS['head']['kernel'].astype(float)
    clean = gradient(a, b)[2]
    robust = gradient(a, b + 0.3 * clean / np.sqrt((clean**2).sum()))[2]
    np.testing.assert_allclose((b - state.params['head']['kernel']) / RATE, robust, atol=2e-6)
    np.testing.assert_array_equal(state.params['first']['kernel'], PARAMS['first']['kernel'])


def test_a_gradient_of_zero_stays_finite():
    sharpness = optim.Sharpness(lambda step: np.float32(0.5), alpha=0.5)
    zero = {'a': np.zeros(3, np.float32)}
    found = sharpness(zero, {'a': np.ones(3, np.float32)}, 0, lambda params: zero)
    np.testing.assert_array_equal(found['a'], 0)


def test_the_radius_follows_the_learning_rate_only_if_it_is_asked_to():
    assert optim.sharpness_of(make_config(), None) is None
    schedule = optim.create_learning_rate_schedule(10, 0.4, 'cosine', 0)
    constant = optim.sharpness_of(make_config(sam_rho=0.2), schedule)
    falling = optim.sharpness_of(make_config(**SETTINGS['gsam']), schedule)
    np.testing.assert_allclose([constant.radius(step) for step in (0, 5, 10)], 0.2)
    np.testing.assert_allclose([falling.radius(s) for s in (0, 5, 10)], [0.6, 0.35, 0.1], atol=1e-6)
    assert (constant.alpha, falling.alpha) == (0.0, 0.6)
