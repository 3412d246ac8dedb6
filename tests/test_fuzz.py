"""A few hundred cases of `tests/fuzz.py`; 10,000 are run by hand (its first lines say how)."""

import json
import pathlib
import subprocess
import sys

FUZZ = pathlib.Path(__file__).parent / 'fuzz.py'


def run(*words):
    command = [sys.executable, str(FUZZ), '--jobs', '1', *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_damaged_files_end_in_named_errors():
    done = run('--cases', 300, '--seed', 4)
    assert done.returncode == 0, done.stdout + done.stderr
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert table['all'][1] == '300' and table['all'][-1] == '0'
    header = table['reader']
    assert 'UserError' in header and 'ok' in header
    # Some survive and some do not, so neither the damage nor the reading is for nothing.
    assert int(table['all'][header.index('ok')]) > 20
    assert int(table['all'][header.index('UserError')]) > 100


WATCHED = """
import json, os, pathlib, subprocess, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from fuzzing import guard
from vit_jax.errors import UserError

def user_error(): raise UserError('named')
def other(): raise KeyError('x')
def endless():
    while True: time.sleep(0.01)
def escape(): open('/etc/passwd').close()
def write(): open({root!r} + '/README.md', 'r+').close()
def child(): subprocess.run(['true'])
def unpickled():
    import pickle; pickle.loads(b'cos\\ngetcwd\\n(tR.')
def memory(): bytearray(10**10)
def change(): os.rename({here!r} + '/a', {root!r} + '/../a')
def much(): bytes(b'x' * (60 << 20))
def busy():
    end = time.process_time() + 0.2
    while time.process_time() < end: pass

guard.limit_memory(100 << 20)
here = pathlib.Path({here!r})
print(json.dumps({{
    read.__name__: guard.watched(read, (here,), 3, True, lambda: (40 << 20, 0.1)).text
    for read in (
        user_error, other, endless, escape, write, child, unpickled, memory, change, much, busy,
    )
}}))
"""


def test_the_watch_notices_every_kind_of_fault(tmp_path):
    names = {'tests': str(FUZZ.parent), 'root': str(FUZZ.parents[1]), 'here': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, '-c', WATCHED.format(**names)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    outcomes = json.loads(done.stdout)
    assert outcomes.pop('user_error') == 'UserError'
    expected = {
        'other': 'FAULT KeyError', 'endless': 'FAULT no end', 'memory': 'FAULT MemoryError',
        'escape': "FAULT open '/etc/passwd'", 'write': 'FAULT open', 'child': 'FAULT subprocess',
        'unpickled': 'FAULT pickle.find_class', 'change': 'FAULT os.rename', 'much': 'FAULT memory',
        'busy': 'FAULT time',
    }  # fmt: skip
    assert outcomes.keys() == expected.keys()
    for name, outcome in expected.items():
        assert outcomes[name].startswith(outcome), (name, outcomes[name])
