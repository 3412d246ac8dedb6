"""Two processes, gloo between them, train as one does; none is left hanging."""

import json
import re
import signal
import socket
import time

import numpy as np
import processes
import pytest

# Kernels of 2**14 elements, so that FSDP cuts them; no dropout, whose masks depend on the topology.
FLAGS = [
    '--config.model.hidden_size=64',
    '--config.model.transformer.mlp_dim=256',
    '--config.model.transformer.dropout_rate=0.0',
    '--config.model.transformer.num_layers=2',
    '--config.stochastic_depth=0.3',
    '--config.ema_decay=0.9',
    # Adam's division would blow up differences in the last bit.
    '--config.optimizer=sgd',
    '--config.optim_dtype=float32',
    '--config.base_lr=0.03',
    # The same images reach the model on any topology, whatever is done to them.
    '--config.augreg=light2',
    '--config.random_erasing=0.25',
    '--config.repeated_augmentation=2',
    '--config.total_steps=20',
    '--config.eval_every=10',
    '--config.checkpoint_every=10',
    '--heartbeat_timeout_seconds=10',
]


class Pair:
    """Both processes of a run, with two devices each."""

    def __init__(self, folder, cache, *flags, workdir='run', **options):
        with socket.socket() as probe:
            probe.bind(('localhost', 0))
            port = probe.getsockname()[1]
        flags = [*(() if 'config' in options else FLAGS), *flags]
        flags += [f'--coordinator_address=localhost:{port}', '--num_processes=2']
        self.runs = [
            processes.Run(
                folder / workdir, *flags, f'--process_id={index}', devices=2,
                cache=cache, log=folder / f'{workdir}-{index}.log', **options,
            )
            for index in range(2)
        ]  # fmt: skip

    def wait(self, timeout=300):
        return [run.wait(timeout) for run in self.runs]

    def kill(self):
        for run in self.runs:
            run.kill()

    @property
    def output(self):
        return '\n---\n'.join(run.output for run in self.runs)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def alone(tmp_path_factory, cache):
    """One process on one device."""
    folder = tmp_path_factory.mktemp('alone')
    run = processes.Run(folder / 'run', *FLAGS, cache=cache, log=folder / 'log')
    assert run.wait() == 0, run.output
    return folder / 'run'


def assert_close(one, other, ties=()):
    """The same lines of metrics, and parameters, to 1e-6.

    With `ties`, parts of the names of metrics that two equal cosines may change, by how much: other
    metrics to 1e-5 of them.
    """
    rows = [
        [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        for folder in (one, other)
    ]
    assert len(rows[0]) == len(rows[1]) > 6
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys() and a['step'] == b['step']
        for name in a:
            far = 2e-6 if 'norm' in name else 1e-6
            if ties:
                far = 1e-5 * abs(a[name])
            far = max([far, *(most for part, most in ties if part in name)])
            assert b[name] == pytest.approx(a[name], abs=far), name
    with np.load(one / 'model/params.npz') as a, np.load(other / 'model/params.npz') as b:
        assert set(a) == set(b) and len(a) > 10
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize('fsdp', [1, -1])
def test_two_processes_train_as_one_and_stop_together(alone, cache, tmp_path, fsdp):
    flag = f'--config.fsdp={fsdp}'
    pair = Pair(tmp_path, cache, flag)
    # Only the second one is told to stop.
    pair.runs[0].wait_for('step 4/20')
    pair.runs[1].signal(signal.SIGTERM)
    assert pair.wait() == [143, 143], pair.output
    [saved] = [path.name for path in (tmp_path / 'run/checkpoints').iterdir()]
    assert 0 < int(saved) < 20
    for run in pair.runs:
        assert f'stopped by SIGTERM after step {saved} of 20' in run.output, run.output

    if fsdp == 1:  # goes on in two processes
        pair = Pair(tmp_path, cache, flag)
        assert pair.wait() == [0, 0], pair.output
        assert f'resumed from step {saved}' in pair.runs[0].output
        # One writer: the second process shows nothing of its own.
        assert 'resumed' not in pair.runs[1].output and 'step ' not in pair.runs[1].output
        assert len(list((tmp_path / 'run').glob('events.out.tfevents*'))) == 2
    else:  # goes on in one, on one device
        run = processes.Run(tmp_path / 'run', *FLAGS, cache=cache, log=tmp_path / 'one.log')
        assert run.wait() == 0, run.output
        assert f'resumed from step {saved}' in run.output
    assert_close(alone, tmp_path / 'run')


@pytest.mark.parametrize(
    'loss', ['contrastive', pytest.param('pairwise_sigmoid', marks=pytest.mark.slow)]
)
def test_two_processes_train_on_pairs_as_one(cache, tmp_path, loss):
    """Each image is compared with the texts of both, with its own caption among them."""
    options = {'config': 'tests/endurance/tiny_pairs.py'}
    pair = Pair(tmp_path, cache, f'--config.loss={loss}', **options)
    one = processes.Run(
        tmp_path / 'one', f'--config.loss={loss}', cache=cache, log=tmp_path / 'log', **options
    )
    assert pair.wait() == [0, 0], pair.output
    assert one.wait() == 0, one.output
    ties = (('recall', 0.1), ('rank', 1), ('accuracy', 0.04))
    assert_close(tmp_path / 'one', tmp_path / 'run', ties)
    rows = [json.loads(row) for row in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    losses = [row['train_loss'] for row in rows if 'train_loss' in row]
    assert len(losses) == 12 and np.std(losses) > 0.02  # other captions would show


def test_two_processes_choose_as_one(cache, tmp_path):
    """By validation images; patience ends both, where nothing is learned any more."""
    choosing = ['--config.pp.val=20%', '--config.keep_best=True', '--config.eval_every=2']
    choosing += ['--config.patience=2', '--config.decay_type=constant', '--config.base_lr=0.0']
    pair = Pair(tmp_path, cache, *choosing)
    assert pair.wait() == [0, 0], pair.output
    assert 'the run ends with step 6' in pair.runs[0].output
    rows = [json.loads(row) for row in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    found = [row['step'] for row in rows if 'accuracy_val' in row]
    assert found == [2, 4, 6] and [row['step'] for row in rows if 'accuracy_test' in row] == [6]
    assert rows[-1]['step_tested'] == 2
    described = json.loads((tmp_path / 'run/model_best/model.json').read_text())
    assert described['source']['steps'] == 2


@pytest.mark.parametrize('dead', [0, 1])
def test_a_dead_process_ends_the_other_with_a_message(cache, tmp_path, dead):
    pair = Pair(tmp_path, cache, '--config.total_steps=100000')
    pair.runs[0].wait_for('step 4/')
    pair.runs[dead].kill()
    begin = time.monotonic()
    other = pair.runs[1 - dead]
    assert other.wait(60) != 0
    assert time.monotonic() - begin < 60
    # Ours, or JAX's own, whichever of the two notices first.
    messages = 'another of the 2 processes is gone|another task died'
    assert re.search(messages, other.output), other.output
    assert 'Fatal Python error' not in other.output


def test_a_failure_of_one_is_told_by_all(cache, tmp_path):
    """The workdir is in use, which only the first process finds out."""
    first = processes.Run(
        tmp_path / 'run', *FLAGS, '--config.total_steps=100000', cache=cache, log=tmp_path / '1.log'
    )
    try:
        first.wait_for('step 4/')
        pair = Pair(tmp_path, cache)
        assert pair.wait(120) == [1, 1], pair.output
        assert 'another run is at work in' in pair.runs[0].output
        assert 'process 0 of 2 cannot go on' in pair.runs[1].output
    finally:
        first.kill()
