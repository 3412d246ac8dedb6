"""A run in cloud storage that dies while it copies ends as one that nobody disturbed."""

import json
import pathlib
import shutil

import processes
import pytest

STEPS = 60


def start(folder, cache, log, last=0, **options):
    return processes.Run(
        'gs://bucket/run',
        f'--config.total_steps={STEPS}',
        cache=cache,
        log=log,
        env={'JAX_PLATFORMS': 'cpu', 'VIT_JAX_CACHE': str(folder / 'cache')},
        program=('tests/endurance/fake_bucket.py', str(folder / 'storage'), str(last)),
        **options,
    )


def test_deaths_while_copying_change_nothing(tmp_path):
    whole = processes.Run(
        tmp_path / 'whole',
        f'--config.total_steps={STEPS}',
        cache=tmp_path / 'programs',
        log=tmp_path / 'whole.log',
    )
    assert whole.wait() == 0, whole.output
    there, steps = tmp_path / 'storage/bucket/run', []
    for number, last in enumerate((4, 15, 33, 24, 27)):
        run = start(tmp_path, tmp_path / 'programs', tmp_path / f'{number}.log', last)
        assert run.wait() != 0 and 'killed before' in run.output, run.output
        complete = there.glob('checkpoints/*/complete.json')
        steps.append(max((int(path.parent.name) for path in complete), default=0))
        for path in there.glob('checkpoints/*/complete.json'):
            for name, size in json.loads(path.read_text())['sizes'].items():
                assert (path.parent / name).stat().st_size == size
        if number % 2:  # the next one is on another machine
            shutil.rmtree(tmp_path / 'cache')
    assert steps == sorted(steps) and steps[-1] > 0, 'each went on from what was there'
    run = start(tmp_path, tmp_path / 'programs', tmp_path / 'last.log')
    assert run.wait() == 0, run.output
    assert 'resumed from step' in run.output and str(tmp_path / 'cache') not in run.output
    assert processes.differences(tmp_path / 'whole', there, STEPS) == []
    assert not list((tmp_path / 'cache').rglob('*.npz')), 'nothing is left on this machine'
    again = start(tmp_path, tmp_path / 'programs', tmp_path / 'again.log')
    assert again.wait() == 0 and 'gs://bucket/run: this run is finished' in again.output


@pytest.mark.slow  # the other one is forked from a process with much imported already
def test_no_tensorflow_in_a_fresh_process(tmp_path):
    run = start(tmp_path, tmp_path / 'programs', tmp_path / 'log', fresh=True)
    assert run.wait() == 0, run.output
    assert pathlib.Path(tmp_path / 'storage/bucket/run/model/params.npz').is_file()
