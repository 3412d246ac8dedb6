"""Children: run like any program, and gone when who started them is."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from vit_jax.run import child

SLEEPS = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)
    return result


@pytest.mark.parametrize('module', [True, False])
def test_a_killed_parent_leaves_no_child(tmp_path, module):
    (tmp_path / 'sleeps.py').write_text(SLEEPS)
    place = tmp_path / 'pid'
    program = ['-m', 'sleeps'] if module else [str(tmp_path / 'sleeps.py')]
    code = f'from vit_jax.run import child; child.run({[*program, str(place)]!r})'
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {'PYTHONPATH': f'{root}{os.pathsep}{tmp_path}'}
    parent = subprocess.Popen([sys.executable, '-c', code], env=environment)
    pid = int(wait_for(lambda: place.exists() and place.read_text(), 30))
    parent.kill()
    parent.wait()
    # One that nobody has waited for yet is a zombie, and has no command line.
    wait_for(lambda: not os.path.exists(f'/proc/{pid}') or not command_line(pid), 1)


def command_line(pid):
    try:
        return pathlib.Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
        return b''


def test_arguments_and_exit_code(tmp_path):
    (tmp_path / 'says.py').write_text('import sys\nprint(sys.argv, __name__)\nsys.exit(3)\n')
    done = child.run([str(tmp_path / 'says.py'), '--a', 'b c'], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout == f'{[str(tmp_path / "says.py"), "--a", "b c"]} __main__\n'
