"""The measurement of what pieces of recipes cost."""

import jax
import pytest

from benchmarks import recipes
from vit_jax import config as config_lib
from vit_jax import variants
from vit_jax.configs import b16


def test_a_step_is_timed_and_the_state_is_counted(monkeypatch):
    small = variants.get_config('ViT-Ti_16').to_dict() | {'hidden_size': 8}
    small['transformer'] |= {'num_layers': 2, 'mlp_dim': 8, 'num_heads': 2}
    monkeypatch.setitem(variants.VARIANTS, 'ViT-Ti_16', small)
    batch = jax.device_count()
    timed, plain = recipes.contestant('ViT-Ti_16', 16, batch, {})
    assert timed() > 0 and timed() > 0
    _, averaged = recipes.contestant('ViT-Ti_16', 16, batch, {'ema_decay': 0.9})
    timed, taught = recipes.contestant(
        'ViT-Ti_16', 16, batch, {'distillation': 'patient', 'teacher': 'x'}
    )
    assert timed() > 0 and taught == plain  # the teacher is no part of the state
    # Parameters in float32 and their momentum in bfloat16; the averages in float32, and a count.
    assert averaged / plain == pytest.approx(10 / 6, rel=1e-3)


@pytest.mark.parametrize('knobs', recipes.ON_THE_HOST.values(), ids=recipes.ON_THE_HOST)
def test_what_is_done_on_the_host_takes_time(knobs):
    assert 0 < recipes.on_the_host(16, knobs, images=3) < 1


@pytest.mark.parametrize(
    'knobs', (recipes.PIECES | recipes.ON_THE_HOST).values(),
    ids=recipes.PIECES | recipes.ON_THE_HOST,
)  # fmt: skip
def test_pieces_are_knobs(knobs):
    config = b16.get_config()
    config.update(**knobs)
    assert config_lib.resolve(config).to_dict().items() >= knobs.items()
