"""A run that is killed again and again ends as one that nobody disturbed."""

import kill
import pytest


def test_three_kills_change_nothing(tmp_path):
    said = []
    assert (
        kill.kill_and_compare(tmp_path, 3, 0, steps_per_kill=12, fresh=False, say=said.append) == []
    )
    assert len([line for line in said if line.startswith('kill')]) == 3


@pytest.mark.gpu
def test_three_kills_change_nothing_on_a_gpu(tmp_path):
    assert kill.kill_and_compare(tmp_path, kills=3, seed=0, platform='gpu') == []
