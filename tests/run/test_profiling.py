"""A trace of some steps of a run."""

import jax
import pytest

from vit_jax import config as config_lib
from vit_jax import train
from vit_jax.configs import digits
from vit_jax.errors import UserError


def make_config(**changes):
    config = digits.get_config()
    config.report = False
    config.model.hidden_size = 16
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=1, dropout_rate=0.0)
    config.pp.crop, config.pp.resize, config.model.patches.size = 16, 0, (8, 8)
    config.batch, config.batch_eval, config.total_steps, config.warmup_steps = 16, 400, 5, 1
    config.eval_every, config.checkpoint_every = 10, 3
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


class Stop:
    def on_step(self, step, state, metrics):
        if step == 4:
            raise KeyboardInterrupt


def steps_in(trace):
    """The numbers of the steps that a trace has."""
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == 'train'
    ]
    return [dict(event.stats)['step_num'] for event in events]


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path):
    """Also of a run that is stopped meanwhile."""
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(make_config(profile='2:5'), tmp_path, callbacks=[Stop()])
    (trace,) = tmp_path.glob('plugins/profile/*/*.xplane.pb')
    assert steps_in(trace) == [2, 3, 4] and list(trace.parent.glob('*.trace.json.gz'))
    train.train_and_evaluate(make_config(profile='4:4'), tmp_path)  # may change; begins after 3
    traces = sorted(tmp_path.glob('plugins/profile/*/*.xplane.pb'))
    assert [steps_in(each) for each in traces] == [[2, 3, 4], [4]]
    text = (tmp_path / 'train.log').read_text()
    assert 'a trace of steps 2 to 4 is in' in text and 'a trace of steps 4 to 4 is in' in text


@pytest.mark.parametrize(
    ('profile', 'words'),
    [
        ('20', 'write 20:30'), ('0:3', 'write 20:30'), ('5:4', 'write 20:30'),
        ('1:101', 'at most 100'), ('4:6', 'goes beyond the 5 steps'),
    ],
)  # fmt: skip
def test_steps_that_are_none(profile, words):
    with pytest.raises(UserError, match=words):
        make_config(profile=profile)
