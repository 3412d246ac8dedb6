"""Files and folders that are whole or absent."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from vit_jax import files
from vit_jax.errors import UserError


def everything(folder):
    """Relative path -> content of every file, hidden ones included."""
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def write(writer, path, text, **options):
    """Writes `text` with one of the three writers, and files beside it with the third."""
    with writer(path, **options) as place:
        if writer is files.atomic_file:
            place.write_text(text)
        elif writer is files.atomic_folder:
            (place / 'a').write_text(text)
        else:
            (place / path.name).write_text(text)
            (place / f'{path.name}.json').write_text(text)


WRITERS = (files.atomic_file, files.atomic_folder, files.atomic_group)
# Each with what makes it replace what is there, and with the files that `write` then makes.
REPLACING = [
    (files.atomic_file, {'overwrite': True}),
    (files.atomic_folder, {'exists': 'replace'}),
    (files.atomic_group, {'overwrite': True}),
]
MADE = dict(zip(WRITERS, ({'x'}, {'x/a'}, {'x', 'x.json'}), strict=True))


@pytest.mark.parametrize(('writer', 'replace'), REPLACING)
def test_appears_whole_with_the_permissions_of_a_new_file(tmp_path, writer, replace):
    old = os.umask(0o027)
    try:
        write(writer, tmp_path / 'x', 'old', **replace)
        write(writer, tmp_path / 'x', 'new', **replace)
    finally:
        os.umask(old)
    assert everything(tmp_path) == dict.fromkeys(MADE[writer], 'new')
    mode = (tmp_path / 'x').stat().st_mode & 0o777
    assert mode == (0o750 if writer is files.atomic_folder else 0o640)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(('writer', 'replace'), REPLACING)
def test_an_error_or_an_interruption_leaves_what_was_there(tmp_path, writer, replace, error):
    write(writer, tmp_path / 'x', 'old', **replace)
    before = everything(tmp_path)
    with pytest.raises(error), writer(tmp_path / 'x', **replace) as place:
        (place if writer is files.atomic_file else place / 'x').write_text('half')
        raise error
    assert everything(tmp_path) == before and len(os.listdir(tmp_path)) == len(before)


@pytest.mark.parametrize(('writer', 'replace'), REPLACING)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, writer, replace, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(writer, tmp_path / 'x', 'old', **replace)
    before = everything(tmp_path)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot write .*/x: No space left on device'):
        write(writer, tmp_path / 'x', 'new', **replace)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(('writer', 'replace'), REPLACING)
def test_an_error_about_another_file_keeps_its_type(tmp_path, writer, replace):
    with pytest.raises(FileNotFoundError), writer(tmp_path / 'x', **replace):
        (tmp_path / 'absent').read_text()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('writer', WRITERS)
def test_what_came_meanwhile_is_not_overwritten(tmp_path, writer):
    options = {'overwrite': False} if writer is files.atomic_file else {}
    with pytest.raises(UserError, match='x exists'), writer(tmp_path / 'x', **options) as place:
        (place if writer is files.atomic_file else place / 'x').write_text('ours')
        write(writer, tmp_path / 'y', 'theirs')
        (tmp_path / 'y').rename(tmp_path / 'x')
    assert set(everything(tmp_path).values()) == {'theirs'}


def test_a_folder_that_came_meanwhile_can_be_kept(tmp_path):
    with files.atomic_folder(tmp_path / 'x', exists='keep') as place:
        (place / 'a').write_text('ours')
        write(files.atomic_folder, tmp_path / 'x', 'theirs')
    assert everything(tmp_path) == {'x/a': 'theirs'}


def test_a_folder_never_replaces_a_file(tmp_path):
    (tmp_path / 'x').write_text('old')
    with pytest.raises(UserError, match='x is a file'):
        write(files.atomic_folder, tmp_path / 'x', 'new', exists='replace')
    assert everything(tmp_path) == {'x': 'old'}


def test_an_empty_folder_does_not_appear(tmp_path):
    with files.atomic_folder(tmp_path / 'x'):
        pass
    assert not os.listdir(tmp_path)


def test_a_group_that_cannot_be_moved_whole_is_taken_back(tmp_path, monkeypatch):
    replace = os.replace

    def fail_at_the_last(source, place):
        if place == tmp_path / 'x':
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, place)

    monkeypatch.setattr(os, 'replace', fail_at_the_last)
    with pytest.raises(UserError, match='Input/output error'):
        write(files.atomic_group, tmp_path / 'x', 'new')
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('writer', WRITERS)
def test_leftovers_of_killed_writers_go_and_those_of_running_ones_stay(tmp_path, writer):
    killed = subprocess.Popen([sys.executable, '-c', ''])
    killed.wait()
    running = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    try:
        for process in (killed, running):
            (tmp_path / f'.x.{process.pid}.part').mkdir()
        (tmp_path / f'.x.{killed.pid}.old').write_text('')
        (tmp_path / '.x.y.part').write_text('')  # not ours
        write(writer, tmp_path / 'x', 'new')
        hidden = {name for name in os.listdir(tmp_path) if name.startswith('.')}
        assert hidden == {f'.x.{running.pid}.part', '.x.y.part'}
    finally:
        running.communicate(b'\n')
    assert set(everything(tmp_path)) == {*MADE[writer], '.x.y.part'}


def test_no_folder_to_write_to(tmp_path):
    with pytest.raises(UserError, match='cannot write .*x: No such file or directory'):
        files.write_text(tmp_path / 'no' / 'x', '')
    (tmp_path / 'file').write_text('')
    for writer in WRITERS:
        with pytest.raises(UserError, match='cannot write .*: Not a directory'):
            write(writer, tmp_path / 'file' / 'x', '')


def test_a_pipe_is_written_as_it_comes(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / 'pipe').read_text()))
    reader.start()
    files.check_output(tmp_path / 'pipe', overwrite=False, flag='--output')
    files.write_text(tmp_path / 'pipe', 'text')
    reader.join()
    assert found == ['text'] and (tmp_path / 'pipe').is_fifo()


def test_standard_output_is_written_as_it_comes(tmp_path):
    code = 'from vit_jax import files; files.write_text("/dev/stdout", "text")'
    root = str(pathlib.Path(files.__file__).parents[1])
    with open(tmp_path / 'out', 'w') as out:
        subprocess.run([sys.executable, '-c', code], stdout=out, check=True, cwd=root)
    assert everything(tmp_path) == {'out': 'text'}


def test_check_output(tmp_path):
    (tmp_path / 'x').write_text('')
    files.check_output(tmp_path / 'new', overwrite=False, flag='--output')
    files.check_output(tmp_path / 'x', overwrite=True, flag='--output')
    for path, words in (
        (tmp_path, 'is a folder; name a file in it'),
        (tmp_path / 'x', 'x exists; name another file, or add --overwrite'),
        (tmp_path / 'no' / 'x', 'there is no folder .*no; make it first'),
    ):
        with pytest.raises(UserError, match=f'^--output .*{words}'):
            files.check_output(path, overwrite=False, flag='--output')


def test_json_there_and_back(tmp_path):
    value = {'a': [1, 2.5, None], 'ä': 'bytes that are not text: \udcff'}
    files.write_json(tmp_path / 'x', value)
    assert files.read_json(tmp_path / 'x') == value


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'[1]', 'should hold a JSON object, and holds a list'),
        (b'{"a": ', 'is not JSON'),
        (b'{"a": "\xff"}', "can't decode"),
        (b'{"a": ' + 100_000 * b'[', 'nested too deeply'),
        (b'{"a": ' + 100 * b'[' + 100 * b']' + b'}', 'nested too deeply'),
        (b'{"a": ' + 400 * b'9' + b'}', 'a number of 400 digits'),
        (b'{"a": ' + 5_000 * b'1' + b'}', 'is not JSON'),
        (b'{"a": "' + 100 * b'x' + b'"}', 'has more than 99 bytes'),
    ],
)
def test_json_from_elsewhere(tmp_path, content, words):
    (tmp_path / 'x').write_bytes(content)
    limit = {'max_bytes': 99} if 'more than' in words else {}
    with pytest.raises(UserError, match=words):
        files.read_json(tmp_path / 'x', **limit)


def test_what_is_not_a_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path, words in (
        (tmp_path / 'pipe', 'is not a regular file'),
        (tmp_path, 'is not a regular file'),
        (tmp_path / 'absent', 'No such file'),
    ):
        with pytest.raises(UserError, match=f'cannot read .*{words}'):
            files.read_json(path)


def test_expand(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert files.expand('~/x') == tmp_path / 'x'
    for path in ('~nobody-of-this-name/x', 'a\0b', 5000 * 'x'):
        with pytest.raises(UserError, match='is not a path that can be used'):
            files.expand(path)


KILLED = """
import os, pathlib, shutil, signal, sys

from vit_jax import files

calls, moment = 0, int(sys.argv[2])

def killing(function):
    def call(*args, **kwargs):
        global calls
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*args, **kwargs)
    return call

with files.atomic_folder(sys.argv[1], exists='replace') as place:
    (place / 'a').write_text('new')
    os.rename, shutil.rmtree = killing(os.rename), killing(shutil.rmtree)
"""


@pytest.mark.parametrize(('moment', 'expected'), [(0, 'old'), (1, 'new'), (2, 'new')])
def test_killed_while_a_folder_is_replaced(tmp_path, moment, expected):
    """Before the first rename, between the two, after both: a reader finds all of one or other."""
    folder = tmp_path / 'x'
    write(files.atomic_folder, folder, 'old')
    command = [sys.executable, '-c', KILLED, folder, str(moment)]
    root = str(pathlib.Path(files.__file__).parents[1])
    assert subprocess.run(command, cwd=root, check=False).returncode == -signal.SIGKILL
    assert folder.exists() == (moment != 1) and (moment == 1 or len(os.listdir(tmp_path)) > 1)
    files.recover(folder)
    assert (folder / 'a').read_text() == expected
    write(files.atomic_folder, folder, 'third', exists='replace')
    assert everything(tmp_path) == {'x/a': 'third'} and os.listdir(tmp_path) == ['x']
