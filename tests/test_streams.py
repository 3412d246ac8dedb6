"""Standard streams that are full, closed or cut: no traceback, and what writes files goes on."""

import json
import os
import pathlib
import pty
import subprocess
import sys

import pytest

from vit_jax import checkpoint
from vit_jax.checkpoint import npz

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIXTURE = ROOT / 'tests/fixtures/conformance/vit_token.checkpoint.npz'
FULL = 'standard output cannot be written (No space left on device)'


def shell(words, streams, **options):
    """Runs `vit_jax WORDS` with redirections of a shell; its own status, not that of a pipe."""
    line = f'set -o pipefail; "$0" -m vit_jax {" ".join(map(str, words))} {streams}'
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        ['bash', '-c', line, sys.executable], cwd=ROOT, env=environment, text=True,
        capture_output=True, timeout=300, **options,
    )  # fmt: skip
    assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ('streams', 'status', 'error'),
    [
        ('>/dev/full', 1, f'vit_jax list_models: {FULL}\n'),
        ('>&-', 0, ''),
        ('<&-', 0, ''),
        ('| true', 141, ''),  # as every program that is in front of `head`
        ('2>/dev/full', 0, ''),
        ('>&- 2>&- <&-', 0, ''),
        ('1</dev/null', 1, 'vit_jax list_models: standard output cannot be written (Bad file'),
    ],
)
def test_a_command_that_prints(streams, status, error):
    done = shell(['list_models', '--variants'], streams)
    assert done.returncode == status and done.stderr.startswith(error), done.stderr
    assert error or not done.stderr


@pytest.mark.parametrize(
    'words', [['--help'], ['predict', '--help'], ['train', '--help'], ['nonsense']]
)
def test_help_and_mistakes(words):
    done = shell(words, '>/dev/full')
    assert (FULL in done.stderr) == (words != ['nonsense'])
    shell(words, '2>/dev/full')
    shell(words, '| true')


@pytest.mark.parametrize('streams', ['>/dev/full', '2>&1 | true', '>&- 2>&- <&-'])
def test_files_are_written_though_nobody_listens(streams, tmp_path):
    output = tmp_path / 'out.npz'
    done = shell(['convert', FIXTURE, output, '--to', 'npz'], streams)
    assert done.returncode == 0
    assert (
        npz.flatten(checkpoint.load(output)).keys() == npz.flatten(checkpoint.load(FIXTURE)).keys()
    )
    if 'full' in streams:
        assert done.stderr == f'vit_jax convert: {FULL}, the rest goes on\n'


def test_closed_streams_are_not_what_is_opened_next(tmp_path):
    """Standard output that is closed is the number of the next file: what is printed went there."""
    code = (
        'import os, sys; from vit_jax.run import streams; streams.guard(go_on=False);'
        'file = open(sys.argv[1], "wb"); print("printed"); sys.stdout.flush();'
        'os.write(1, b"low"); os.write(2, b"low"); file.write(b"own")'
    )
    path = tmp_path / 'file'
    line = '"$0" -c "$1" "$2" >&- 2>&- <&-'
    subprocess.run(['bash', '-c', line, sys.executable, code, path], cwd=ROOT, check=True)
    assert path.read_bytes() == b'own'


def test_paths_from_a_closed_or_strange_standard_input():
    words = ['predict', '--model', FIXTURE, '-']
    for streams, reason in [
        ('<&-', 'standard input is empty'),
        ('0>/dev/null', 'cannot be read (Bad file'),
    ]:
        done = shell(words, streams)
        assert done.returncode == 1 and reason in done.stderr, done.stderr


def test_a_terminal_that_is_gone():
    code = (
        'from vit_jax.run import streams; streams.guard(go_on=True); '
        'input(); print("x"); print("y")'
    )
    terminal, end = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, '-c', code], cwd=ROOT, stdin=subprocess.PIPE, stdout=end,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(end)
    os.close(terminal)
    _, error = run.communicate('\n')
    assert run.returncode == 0 and 'cannot be written (Input/output error), the rest' in error


def test_a_pipe_that_must_be_waited_for():
    """Another process may have made it non-blocking; Python's own writing then fails."""
    code = (
        'import os; from vit_jax.run import streams; os.set_blocking(1, False);'
        'streams.guard(go_on=False); print("x" * 300_000)'
    )
    line = '"$0" -c "$1" | (sleep 0.5; wc -c)'
    done = subprocess.run(
        ['bash', '-c', line, sys.executable, code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ('300001', '')


def test_training_goes_on_when_its_reader_is_gone(tmp_path):
    workdir = tmp_path / 'run'
    words = ['train', '--config', 'tests/endurance/tiny.py', '--workdir', workdir]
    words += ['--config.total_steps=6', '--config.eval_every=3', '--config.compile_cache=']
    done = shell(words, '2>/dev/full | head -n 1')
    assert done.returncode == 0 and done.stdout.count('\n') == 1
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['step'] == 6 and 'accuracy_test' in rows[-1]
    assert 'step 6/6' in (workdir / 'train.log').read_text()
    assert (workdir / 'model/model.json').is_file()
