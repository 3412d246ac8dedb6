"""Command lines in processes that are forked from one that has done the slow imports already.

Such a process has its own memory, signals and exit code, as one that was started afresh; but JAX
and the rest, 3 s of importing, are there. What depends on what is imported, and when, needs a
process that is started: `subprocess`.
"""

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback

_SERVER = multiprocessing.get_context('forkserver')
_SERVER.set_forkserver_preload(
    [
        'forked',
        'vit_jax.train',
        'vit_jax.inference.predict',
        'vit_jax.inference.metrics',
        'cv2',
        'grain',
        'tensorboard.summary.writer.record_writer',
        'jinja2',
        'sklearn.datasets',
        'tensorflow_datasets.core',
    ]
)


class Popen:
    """Of `subprocess.Popen` what the tests use; the words are those after `python`."""

    def __init__(self, words, *, cwd, env, stdout, stderr=None):
        """Starts `python WORDS`: a script and its arguments, -m and a module, or -c and code.

        Args:
          words: strings.
          cwd: folder to start in.
          env: all of the environment.
          stdout: path of the file that gets the standard output.
          stderr: path for the standard error; None for the same file.
        """
        self._process = _SERVER.Process(
            target=_run, args=(words, str(cwd), dict(env), str(stdout), stderr and str(stderr))
        )
        self._process.start()
        self.args = [sys.executable, *words]

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout=None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(words, *, folder, cwd, env, timeout) -> subprocess.CompletedProcess:
    """As `subprocess.run` with the output captured, in files of the folder."""
    folder.mkdir(exist_ok=True)
    out, err = folder / 'stdout', folder / 'stderr'
    process = Popen(words, cwd=cwd, env=env, stdout=out, stderr=err)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, code, out.read_text(), err.read_text())


def _run(words, cwd, env, stdout, stderr):
    """What Python does with a command line, in the forked process."""
    gc.freeze()  # what the server has imported is there to stay
    gc.set_threshold(50_000, 20, 20)  # as in the tests' own process
    _redirect(stdout, stderr)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _configure_jax()
    sys.path[0:0] = [path for path in env.get('PYTHONPATH', '').split(os.pathsep) if path]
    code = 0
    try:
        if words[0] == '-m':
            sys.argv, sys.path[0:0] = words[1:], ['']
            runpy.run_module(words[1], run_name='__main__', alter_sys=True)
        elif words[0] == '-c':
            sys.argv, sys.path[0:0] = ['-c', *words[2:]], ['']
            exec(compile(words[1], '<string>', 'exec'), {'__name__': '__main__'})
        else:
            sys.argv, sys.path[0:0] = words, [os.path.dirname(os.path.abspath(words[0]))]
            runpy.run_path(words[0], run_name='__main__')
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # The end of Python, which `multiprocessing` leaves out.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _redirect(stdout, stderr):
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(stdout, flags), 1)
    os.dup2(os.open(stderr, flags) if stderr else 1, 2)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, 'w', closefd=False)
    sys.stderr = open(2, 'w', buffering=1, closefd=False)


def _configure_jax():
    """JAX read the environment when it was imported, in the server."""
    import jax

    for name, value in os.environ.items():
        setting = name.lower()
        if not name.startswith('JAX_') or not hasattr(jax.config, setting):
            continue
        old = getattr(jax.config, setting)
        jax.config.update(setting, json.loads(value) if isinstance(old, (int, float)) else value)
