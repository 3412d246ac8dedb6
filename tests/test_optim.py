"""Schedules and optimizers of recipes, beside independent computations."""

import jax
import numpy as np
import pytest

from vit_jax import optim


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
