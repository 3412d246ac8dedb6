"""The measurement of what pieces of recipes cost."""

import jax
import pytest

from benchmarks import recipes, trained_part
from vit_jax import config as config_lib
from vit_jax import variants
from vit_jax.configs import b16


def test_a_step_is_timed_and_the_state_is_counted(monkeypatch):
    small = variants.get_config('ViT-Ti_16').to_dict() | {'hidden_size': 8}
    small['transformer'] |= {'num_layers': 2, 'mlp_dim': 8, 'num_heads': 2}
    monkeypatch.setitem(variants.VARIANTS, 'ViT-Ti_16', small)
    batch = jax.device_count()
    plain, averaged, taught, head = (
        recipes.contestant('ViT-Ti_16', 16, batch, knobs)
        for knobs in (
            {},
            {'ema_decay': 0.9},
            {'distillation': 'patient', 'teacher': 'x'},
            {'train_only': 'head'},
        )
    )
    assert plain.timed() > 0 and plain.timed() > 0 and taught.timed() > 0
    assert taught.state == plain.state  # the teacher is no part of the state
    # Parameters in float32 and their momentum in bfloat16; the averages in float32, and a count.
    assert averaged.state / plain.state == pytest.approx(10 / 6, rel=1e-3)
    assert plain.optimizer == pytest.approx(2 * plain.trained, rel=1e-2)
    assert head.trained == 9 * recipes.CLASSES and head.temporary < plain.temporary


@pytest.mark.parametrize('knobs', recipes.ON_THE_HOST.values(), ids=recipes.ON_THE_HOST)
def test_what_is_done_on_the_host_takes_time(knobs):
    assert 0 < recipes.on_the_host(16, knobs, images=3) < 1


def test_pieces_are_knobs():
    for knobs in (recipes.PIECES | recipes.ON_THE_HOST | trained_part.PARTS).values():
        config = b16.get_config()
        config.update(**knobs)
        assert config_lib.resolve(config).to_dict().items() >= knobs.items()
