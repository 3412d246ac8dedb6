"""Workdirs in cloud storage: what is there when, who may write, what is said."""

import json
import os
import pathlib

import fake_bucket
import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.run import preemption, remote_workdir
from vit_jax.run.remote_workdir import mirrored

RUN = 'gs://bucket/a/run'


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The folder that is the bucket's `a/run`."""
    fake_bucket.register(tmp_path / 'storage')
    monkeypatch.setattr(fake_bucket.Bucket, 'fail', staticmethod(lambda operation, name: None))
    monkeypatch.setattr(remote_workdir, '_LOOK_SECONDS', 0.01)
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'storage/bucket/a/run'


def save(folder, step, text='weights'):
    """As Orbax: under another name first."""
    part = folder / 'checkpoints' / f'{step}.orbax-checkpoint-tmp'
    (part / 'state').mkdir(parents=True)
    (part / 'state/x').write_text(f'{text} {step}')
    (part / 'empty').write_text('')
    part.rename(folder / 'checkpoints' / str(step))


def wait_for(path):
    while not path.exists():
        os.sched_yield()


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())


def test_a_path_is_the_folder_itself(tmp_path):
    with mirrored(tmp_path / 'x') as folder:
        assert folder == tmp_path / 'x'


def test_checkpoints_are_copied_while_the_run_goes_on_and_removed_with_it(there, tmp_path):
    with mirrored(RUN) as folder:
        folder.mkdir()
        (folder / 'metrics.jsonl').write_text('{"step": 1}\n{"st')
        save(folder, 1)
        wait_for(there / 'checkpoints/1/complete.json')
        assert (there / 'metrics.jsonl').read_text() == '{"step": 1}\n', 'whole lines'
        put = fake_bucket.Bucket.touched('put')
        assert put.index('bucket/a/run/metrics.jsonl') < put.index(
            'bucket/a/run/checkpoints/1/state/x'
        )
        save(folder, 2)
        (folder / 'checkpoints/1').rename(folder / 'checkpoints/trash-1')
        wait_for(there / 'checkpoints/2/complete.json')
        part = folder / '.model.1.part'
        part.mkdir()
        for name in ('model.json', 'params.npz'):
            (part / name).write_text(name)
        part.rename(folder / 'model')
        (folder / '.lock').write_text('')
    assert names(there) == [
        'checkpoints/2/complete.json', 'checkpoints/2/empty', 'checkpoints/2/state/x',
        'metrics.jsonl', 'model/model.json', 'model/params.npz',
    ]  # fmt: skip
    put = [name for name in fake_bucket.Bucket.touched('put') if 'lease' not in name]
    assert put[-1] == 'bucket/a/run/model/model.json'
    assert names(tmp_path / 'cache') == []


def test_what_is_there_is_read_but_for_unfinished_checkpoints(there, caplog):
    with mirrored(RUN) as folder:
        save(folder, 3)
        (folder / 'config.json').write_text('{}')
    for step in (4, 5, 6):
        save(there, step)
    complete = json.loads((there / 'checkpoints/3/complete.json').read_text())
    (there / 'checkpoints/5/complete.json').write_text('{"sizes": {"state/x": 1}}')
    (there / 'checkpoints/6/complete.json').write_text(json.dumps(complete)[:-5])
    fake_bucket.Bucket.log.clear()
    with mirrored(RUN) as folder:
        assert names(folder) == ['checkpoints/3/empty', 'checkpoints/3/state/x', 'config.json']
    assert [p.name for p in (there / 'checkpoints').iterdir() if names(p)] == ['3']
    assert 'checkpoints/4, a checkpoint that was never finished' in caplog.text
    assert fake_bucket.Bucket.touched('put') == ['bucket/a/run/lease.json'] * 2, 'nothing is new'


def test_a_run_that_is_at_work_is_left_alone(there):
    with mirrored(RUN) as folder:
        save(folder, 1)
        lease = json.loads((there / 'lease.json').read_text())
        ahead = {'host': 'elsewhere', 'seen': lease['seen'] + 60}
        for other in ({'process': 1}, {'host': 'elsewhere'}, ahead):
            (there / 'lease.json').write_text(json.dumps(lease | {'id': 'x'} | other))
            with pytest.raises(UserError, match=r'another run is at work in gs://bucket/a/run'):
                with mirrored(RUN):
                    pass
        (there / 'lease.json').write_text(json.dumps(lease))
    old = lease | {'host': 'elsewhere', 'seen': lease['seen'] - 301}
    for dead in (json.dumps(old), json.dumps(lease | {'process': 2**22 + 1}), 'damaged'):
        (there / 'lease.json').write_text(dead)
        with mirrored(RUN) as folder:
            assert (folder / 'checkpoints/1/state/x').is_file()
        assert not (there / 'lease.json').exists()


def test_a_run_that_another_took_over_copies_no_more(there):
    with pytest.raises(UserError, match='another run is at work in gs://bucket/a/run: this one'):
        with mirrored(RUN) as folder:
            (there / 'lease.json').write_text('{"id": "of the other one"}')
            save(folder, 1)
    assert names(there) == ['lease.json']


def test_what_cannot_be_copied_stays_and_the_next_run_goes_on_with_it(there, monkeypatch):
    def fail(operation, name):
        if name.endswith('state/x'):
            raise ConnectionError('no\nnetwork')

    with mirrored(RUN) as folder:
        (folder / 'checkpoints').mkdir(parents=True)
    monkeypatch.setattr(fake_bucket.Bucket, 'fail', staticmethod(fail))
    with pytest.raises(UserError, match=r'state/x: ConnectionError: no network\. All of it is in'):
        with mirrored(RUN) as folder:
            save(folder, 1)
    assert not (there / 'checkpoints/1/complete.json').exists()
    monkeypatch.setattr(fake_bucket.Bucket, 'fail', staticmethod(lambda operation, name: None))
    with mirrored(RUN) as folder:
        assert (folder / 'checkpoints/1/state/x').is_file()
    assert (there / 'checkpoints/1/complete.json').is_file() and not folder.exists()


def test_a_refused_run_leaves_nothing_and_speaks_of_the_address(there, tmp_path):
    for error in (UserError, lambda text: preemption.PreemptedError(15, text)):
        with pytest.raises((UserError, preemption.PreemptedError)) as caught:
            with mirrored(RUN) as folder:
                raise error(f'{folder}/config.json differs')
        assert str(caught.value) == 'gs://bucket/a/run/config.json differs'
    assert names(there) == [] and names(tmp_path / 'cache') == []


@pytest.mark.parametrize('workdir', ['hdfs://host/run', 'file:///tmp/x', 'memory://x', 'GS2://b/x'])
def test_other_schemes_are_refused(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'--workdir .*://.* is not known here'):
        with mirrored(workdir):
            pass
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(there, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(UserError, match='a disk that all of them see'):
        with mirrored(RUN):
            pass
    assert not pathlib.Path(there).exists()
