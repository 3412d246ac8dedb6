"""A run that is killed again and again ends as one that nobody disturbed."""

import kill
import pytest

RECIPE = [
    '--config.model.transformer.num_layers=2',
    '--config.stochastic_depth=0.3',
    '--config.ema_decay=0.9',
    '--config.augreg=light2',
    '--config.random_erasing=0.25',
]


def test_three_kills_change_nothing(tmp_path):
    said = []
    options = {'steps_per_kill': 12, 'fresh': False, 'say': said.append}
    assert kill.kill_and_compare(tmp_path, 3, 0, RECIPE, **options) == []
    assert len([line for line in said if line.startswith('kill')]) == 3


@pytest.mark.gpu
def test_three_kills_change_nothing_on_a_gpu(tmp_path):
    assert kill.kill_and_compare(tmp_path, kills=3, seed=0, platform='gpu') == []
