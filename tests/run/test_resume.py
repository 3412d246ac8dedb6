"""What a run may find changed in its workdir, and who may use it."""

import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.run import resume

CONFIG = {'seed': 0, 'batch': 64, 'eval_every': 100, 'pp': {'crop': 16, 'train': ''}, 'fsdp': 1}


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(CONFIG))
    return path


def test_settings_that_do_not_change_what_is_learned_may_change(saved):
    assert resume.check_config(saved, CONFIG) == []
    notes = resume.check_config(saved, {**CONFIG, 'eval_every': 50, 'fsdp': -1})
    assert notes == ['eval_every: 100 -> 50', 'fsdp: 1 -> -1']


def test_a_knob_that_is_newer_than_the_run_had_the_effect_of_its_default(saved):
    now = {**CONFIG, 'cache': 0.0, 'pp': {**CONFIG['pp'], 'exact': True}}
    assert resume.check_config(saved, now) == []
    now['pp'] = {**CONFIG['pp'], 'exact': False}
    with pytest.raises(UserError, match='pp.exact: true -> false'):
        resume.check_config(saved, now)


def test_the_loss_of_earlier_versions_is_what_is_now_told_by_the_labels(tmp_path):
    saved = tmp_path / 'config.json'
    saved.write_text(json.dumps({**CONFIG, 'loss': 'softmax'}))
    assert resume.check_config(saved, {**CONFIG, 'loss': ''}) == []
    assert resume.check_config(saved, {**CONFIG, 'loss': 'softmax'}) == []
    with pytest.raises(UserError, match='loss: "softmax" -> "sigmoid"'):
        resume.check_config(saved, {**CONFIG, 'loss': 'sigmoid'})


def test_other_settings_may_not_and_all_are_named(saved):
    changed = {**CONFIG, 'batch': 32, 'pp': {'crop': 32, 'train': ''}, 'eval_every': 7, 'new': 1}
    with pytest.raises(UserError) as error:
        resume.check_config(saved, changed)
    text = str(error.value)
    for words in ('batch: 64 -> 32', 'pp.crop: 16 -> 32', 'new: null -> 1', '--workdir'):
        assert words in text
    assert 'eval_every: 100 -> 7' not in text and 'eval_every' in text.split('may change')[1]


def test_every_free_setting_is_a_knob():
    from vit_jax.configs import common

    assert set(common.get_defaults()) >= resume.FREE


@pytest.mark.parametrize('text', [None, '', '{"seed": ', '[1]'])
def test_lost_settings_are_an_error(saved, text):
    saved.unlink() if text is None else saved.write_text(text)
    with pytest.raises(UserError, match='(cannot read|should hold).*put the file back'):
        resume.check_config(saved, CONFIG)


def test_one_run_at_a_time(tmp_path):
    with resume.locked(tmp_path / 'run'):
        with pytest.raises(UserError, match=rf'another run is at work in .*process {os.getpid()}'):
            with resume.locked(tmp_path / 'run'):
                pass
    with resume.locked(tmp_path / 'run'):
        pass


@pytest.mark.parametrize('code', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_locked_is_not_another_run(tmp_path, monkeypatch, code):
    def no_lock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, 'flock', no_lock)
    with (
        pytest.raises(UserError, match='cannot be locked.*use another --workdir'),
        resume.locked(tmp_path / 'run'),
    ):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        'import os, signal, sys; from vit_jax.run import resume\n'
        'with resume.locked(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)'
    )
    ended = subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=False)
    assert ended.returncode == -9 and (tmp_path / '.lock').exists()
    with resume.locked(tmp_path):
        pass


def test_a_workdir_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        with resume.locked(tmp_path / 'file' / 'run'):
            pass


def photos(folder, count=6):
    from PIL import Image

    for name in ('cat', 'dog'):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (8, 8), (i, 0, 0)).save(folder / name / f'{i}.png')


def test_a_changed_dataset_is_noticed_and_a_moved_one_is_the_same(tmp_path):
    photos(tmp_path / 'one')
    before = [s.fingerprint() for s in sources.open_sources(str(tmp_path / 'one'))]
    assert before[0] != before[1]
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    assert [s.fingerprint() for s in sources.open_sources(str(tmp_path / 'two'))] == before
    (tmp_path / 'two/cat/0.png').rename(tmp_path / 'two/cat/9.png')
    after = [s.fingerprint() for s in sources.open_sources(str(tmp_path / 'two'))]
    assert after != before

    path = tmp_path / 'data.json'
    path.write_text(json.dumps({'train': {'fingerprint': before[0], 'examples': 10}}))
    resume.check_data(path, {'train': {'fingerprint': before[0], 'examples': 10}})
    with pytest.raises(UserError, match='train.examples: 10 -> 9'):
        resume.check_data(path, {'train': {'fingerprint': before[0], 'examples': 9}})


def test_slices_of_one_set_have_their_own_fingerprint():
    digits = sources.open_dataset('digits')
    prints = {digits.select(s).fingerprint() for s in ('train[:50%]', 'train[50%:]', 'train[:51%]')}
    assert len(prints) == 3
    assert digits.select('train[:50%]').fingerprint() in prints
