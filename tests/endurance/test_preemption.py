"""SIGTERM and Ctrl-C: the step is finished and saved, and the run goes on where it was."""

import signal
import sys

import processes
import pytest

from vit_jax.run import preemption


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp('whole')
    run = processes.Run(folder / 'run', cache=folder / 'cache', log=folder / 'log')
    assert run.wait() == 0, run.output
    return folder


# The moment is that of a line in the output; the run is then somewhere behind it.
@pytest.mark.parametrize(
    ('signum', 'code', 'moment'),
    [(signal.SIGTERM, 143, 'step 4/40'), (signal.SIGINT, 130, 'step 10: test')],
)
def test_a_signal_saves_and_says_how_to_go_on(whole, tmp_path, signum, code, moment):
    options = {'cache': whole / 'cache'}
    run = processes.Run(tmp_path / 'run', log=tmp_path / '1.log', **options)
    run.wait_for(moment)
    run.signal(signum)
    assert run.wait() == code, run.output
    name = signal.Signals(signum).name
    assert f'stopped by {name} after step' in run.output, run.output
    assert 'run the same command again' in run.output and 'Traceback' not in run.output
    saved = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()]
    assert f'after step {max(saved)} of 40' in run.output
    assert not (tmp_path / 'run' / 'model').exists()

    run = processes.Run(tmp_path / 'run', log=tmp_path / '2.log', **options)
    assert run.wait() == 0, run.output
    assert f'resumed from step {max(saved)}' in run.output
    assert processes.differences(whole / 'run', tmp_path / 'run', step=40) == []


def test_a_second_signal_ends_it_at_once(whole, tmp_path):
    flags = ['--config.total_steps=100000', '--config.eval_every=2']
    run = processes.Run(tmp_path / 'run', *flags, cache=whole / 'cache', log=tmp_path / 'log')
    run.wait_for('step 4/')
    # Stopped, it cannot act on the first before the second is there.
    run.signal(signal.SIGSTOP)
    run.signal(signal.SIGTERM)
    run.signal(signal.SIGINT)
    run.signal(signal.SIGCONT)
    assert run.wait(60) != 0


def test_a_signal_before_the_first_step_is_no_traceback(whole, tmp_path):
    run = processes.Run(tmp_path / 'run', cache=whole / 'cache', log=tmp_path / 'log')
    run.wait_for('data: ')
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert 'Traceback' not in run.output, run.output


def test_an_interrupt_that_python_drops_is_kept(monkeypatch, capsys):
    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(preemption.StopSignals, 'dropped', 0)
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    preemption.keep_interrupts()
    Interrupted()
    with preemption.StopSignals() as signals:
        assert signals.received == signal.SIGINT
    assert capsys.readouterr().err == ''
