"""A trace of some steps of a run."""

import jax
import pytest
import small

from vit_jax import train
from vit_jax.errors import UserError


def make_config(**changes):
    settings = {'batch': 16, 'batch_eval': 400, 'total_steps': 5, 'warmup_steps': 1}
    return small.run_config(**settings, eval_every=10, checkpoint_every=3, **changes)


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
