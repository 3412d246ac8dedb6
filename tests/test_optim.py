"""Schedules and optimizers of recipes, beside independent computations."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from vit_jax import optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.configs import common


@pytest.mark.parametrize('decay_type', ['cosine', 'linear'])
def test_schedule(decay_type):
    schedule = optim.create_learning_rate_schedule(100, 0.03, decay_type, 10)
    rates = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(101)))
    assert rates[0] == 0 and rates[5] == pytest.approx(0.015, rel=1e-5)
    assert rates[10] == pytest.approx(0.03)
    middle, end = (0.015, 0.0) if decay_type == 'cosine' else (0.015005, 1e-5)
    assert rates[55] == pytest.approx(middle, rel=1e-4)
    assert rates[100] == pytest.approx(end, abs=1e-9)
    assert (np.diff(rates[10:]) < 0).all()


def expected_rate(step, total, base, kind, warmup, cooldown, timescale):
    """As big_vision's `create_learning_rate_schedule` says it, one step at a time."""
    progress = min(max((step - warmup) / (total - warmup), 0), 1)
    after = max(0, step - warmup)
    rate = {
        'cosine': base * 0.5 * (1 + np.cos(np.pi * progress)),
        'linear': 1e-5 + (base - 1e-5) * (1 - progress),
        'rsqrt': base / np.sqrt(1 + after / timescale),
        'constant': base,
    }[kind]
    rate *= min(1, step / warmup) if warmup else 1
    return rate * (min(1, (total - step) / cooldown) if cooldown else 1)


@pytest.mark.parametrize('kind', ['cosine', 'linear', 'rsqrt', 'constant'])
@pytest.mark.parametrize(('warmup', 'cooldown'), [(0, 0), (10, 0), (0, 15), (10, 90)])
def test_schedules_with_warm_up_and_cool_down(kind, warmup, cooldown):
    schedule = optim.create_learning_rate_schedule(
        100, 0.03, kind, warmup, cooldown_steps=cooldown, rsqrt_timescale=20
    )
    rates = jax.jit(jax.vmap(schedule))(np.arange(101))
    expected = [expected_rate(s, 100, 0.03, kind, warmup, cooldown, 20) for s in range(101)]
    np.testing.assert_allclose(rates, expected, rtol=2e-5, atol=1e-9)
    assert rates.dtype == np.float32


@pytest.mark.parametrize(
    ('kind', 'warmup', 'cooldown', 'message'),
    [
        ('step', 0, 0, "is not 'cosine'"),
        ('cosine', 100, 0, 'not in .0, total_steps 100.'),
        ('rsqrt', 10, 91, 'cooldown_steps 91 is not in .0, 90.'),
    ],
)
def test_schedules_that_do_not_fit_are_errors(kind, warmup, cooldown, message):
    with pytest.raises(ValueError, match=message):
        optim.create_learning_rate_schedule(100, 0.03, kind, warmup, cooldown_steps=cooldown)


# Rule by rule in NumPy, float64: from the gradients of one array to the directions of each step.


def adam(gradients, eps=1e-8, nesterov=False):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        first = m / (1 - 0.9**t)
        if nesterov:
            first = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        yield first / (np.sqrt(v / (1 - 0.999**t)) + eps)


def lion(gradients):
    m = 0.0
    for g in gradients:
        yield np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g


def adafactor(gradients):
    """Two axes of at least 32 are factored; the largest are."""
    rows = columns = v = m = 0.0
    for t, g in enumerate(gradients, 1):
        decay, square = min(0.999, 1 - t**-0.8), g**2 + 1e-30
        large = [axis for axis in np.argsort(g.shape)[::-1][:2] if g.shape[axis] >= 32]
        if len(large) == 2:
            rows = decay * rows + (1 - decay) * square.mean(large[0], keepdims=True)
            columns = decay * columns + (1 - decay) * square.mean(large[1], keepdims=True)
            estimate = rows * columns / rows.mean(large[1], keepdims=True)
        else:
            v = estimate = decay * v + (1 - decay) * square
        m = 0.9 * m + 0.1 * g / np.sqrt(estimate)
        yield m


def muon(gradients, inputs):
    """On the matrix of all input axes by all output axes."""
    m = 0.0
    for t, g in enumerate(gradients, 1):
        m = 0.95 * m + 0.05 * g
        x = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        x = x.reshape(np.prod(g.shape[:inputs]), -1)
        flip, larger = len(x) > x.shape[1], max(x.shape)
        x = x.T if flip else x
        x = x / (np.linalg.norm(x) + 1e-8)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        yield 0.2 * np.sqrt(larger) * (x.T if flip else x).reshape(g.shape)


BLOCK = 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0'
SHAPES = {
    f'{BLOCK}/query/kernel': (36, 2, 20), f'{BLOCK}/out/kernel': (2, 20, 36),
    f'{BLOCK}/out/bias': (36,), 'Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel': (36, 40),
    'embedding/kernel': (2, 2, 3, 36), 'head/kernel': (36, 5), 'cls': (1, 1, 36),
}  # fmt: skip
MUON = {'query': 1, 'out': 2, 'Dense_0': 1}  # axes of the inputs


def directions(name, gradients, optimizer):
    layer = name.split('/')[-2] if '/' in name else name
    if optimizer == 'muon' and name.endswith('kernel') and layer in MUON:
        return muon(gradients, MUON[layer])
    if optimizer == 'muon':
        return adam(gradients, nesterov=True)
    rule = {'adamw': adam, 'lion': lion, 'adafactor': adafactor}.get(optimizer)
    return rule(gradients) if rule else adam(gradients, eps=1e-6)


@pytest.mark.parametrize('optimizer', ['adamw', 'lion', 'lamb', 'adafactor', 'muon'])
def test_three_steps_of_an_optimizer_are_its_rule(optimizer):
    config = common.get_defaults()
    config.update(optimizer=optimizer, weight_decay=0.1, grad_norm_clip=0.0, optim_dtype='float32')
    tx = optim.create_optimizer(config, lambda count: 0.01 * (count + 1))
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 1, shape) for name, shape in SHAPES.items()}
    gradients = {name: rng.normal(0, 1, (3, *shape)) for name, shape in SHAPES.items()}

    def tree(flat):
        nested = {tuple(name.split('/')): x.astype(np.float32) for name, x in flat.items()}
        return jax.tree.map(np.asarray, traverse_util.unflatten_dict(nested))

    ours, state = tree(params), tx.init(tree(params))
    update = jax.jit(tx.update)
    for step in range(3):
        updates, state = update(tree({n: g[step] for n, g in gradients.items()}), state, ours)
        ours = optax.apply_updates(ours, updates)
    for name, p in params.items():
        for step, direction in enumerate(directions(name, gradients[name], optimizer)):
            direction = direction + (0.1 * p if name.endswith('kernel') else 0)
            if optimizer == 'lamb':
                direction = direction * np.linalg.norm(p) / np.linalg.norm(direction)
            p = p - 0.01 * (step + 1) * direction
        found = traverse_util.flatten_dict(ours, sep='/')[name]
        np.testing.assert_allclose(found, p, atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize('optimizer', ['lion', 'lamb', 'adafactor', 'muon'])
def test_first_moments_are_stored_as_asked(optimizer):
    config = common.get_defaults()
    config.update(optimizer=optimizer, optim_dtype='bfloat16')
    tx = optim.create_optimizer(config, lambda count: 0.1)
    params = {'Transformer': {'encoderblock_0': {'MLP': {'kernel': np.ones((4, 8), np.float32)}}}}
    state = jax.eval_shape(tx.init, params)
    new = jax.eval_shape(tx.update, params, state, params)[1]
    dtypes = [[str(leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (state, new)]
    assert dtypes[0] == dtypes[1] and dtypes[0].count('bfloat16') == 1


@pytest.mark.parametrize('warmup', [0, 2])
def test_the_moving_average_is_that_of_a_loop(warmup):
    rng = np.random.default_rng(0)
    params = {'a': {'b': rng.normal(size=(3, 2)).astype(np.float32)}, 'c': np.ones(4, np.float32)}
    plain = optax.adam(0.1)
    tx = optim.with_average(plain, 0.7, warmup)
    state, alone, expected = tx.init(params), plain.init(params), params
    update = jax.jit(tx.update)
    for step in range(5):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        updates, state = update(grads, state, params)
        same, alone = plain.update(grads, alone, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, same)
        params = optax.apply_updates(params, updates)
        decay = 0.7 if step >= warmup else 0.0
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, expected, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            state.average,
            expected,
        )
    assert int(state.updates) == 5


def test_the_moving_average_in_the_step(monkeypatch):
    """On one device and on four that share it, with frozen parameters, and not after bad steps."""
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 16)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            x = nn.Dense(8, name='lower')(images.reshape(images.shape[0], -1))
            return nn.Dense(4, name='head')(nn.relu(x))

    rng = np.random.default_rng(0)
    good = {
        'image': rng.uniform(0, 255, (8, 2, 2, 3)).astype(np.float32),
        'label': rng.integers(0, 4, 8).astype(np.int32),
    }
    bad = {**good, 'image': np.full_like(good['image'], np.inf)}
    params = jax.device_get(state_lib.init_params(Two(), 2, seed=0))
    params['head']['kernel'] = rng.normal(size=(8, 4)).astype(np.float32)
    found = []
    for devices, accum_steps, frozen in ((1, 1, ''), (4, 2, ''), (1, 1, 'lower/.*')):
        mesh = sharding.create_mesh(devices, jax.devices()[:devices])
        tx = optim.trained_only(optim.with_average(optax.sgd(0.1), 0.5), frozen)
        state = state_lib.create_state(params, tx, mesh)
        step = steps.make_train_step(
            Two(), tx, None, mesh, sharding.state_sharding(state, mesh), seed=0, flip=False,
            accum_steps=accum_steps, skip_nonfinite=True, frozen=frozen,
        )  # fmt: skip
        average = params
        for batch in (good, good, bad, good):
            state, _ = step(state, sharding.put_batch(batch, mesh))
            now = jax.device_get(state.params)
            if batch is good:
                average = jax.tree.map(lambda a, p: (a + p) / 2, average, now)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            jax.device_get(state.model_params),
            average,
        )
        found.append(average)
        if frozen:
            assert state.model_params['lower']['kernel'] is state.params['lower']['kernel']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found[:2])
    assert np.abs(found[0]['head']['kernel'] - now['head']['kernel']).max() > 1e-3
