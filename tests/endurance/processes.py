"""Training processes that can be watched, signalled and killed, and what they leave behind."""

import os
import pathlib
import re
import subprocess
import sys
import time
import warnings

import forked
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


class Run:
    """A process of `python -m vit_jax.main`; its output goes to a file. Kill it with `kill`.

    `fresh` starts a Python for it; else it is forked, with the slow imports done. `program` is what
    Python runs.
    """

    def __init__(
        self,
        workdir,
        *flags,
        cache,
        log,
        devices=1,
        config='tests/endurance/tiny.py',
        env=(),
        fresh=False,
        program=('-m', 'vit_jax.main'),
    ):
        self.log = pathlib.Path(log)
        environment = {
            **os.environ,
            'JAX_PLATFORMS': os.environ.get('JAX_PLATFORMS', 'cpu'),
            'JAX_NUM_CPU_DEVICES': str(devices),
            # Steps of milliseconds: fast programs would take longer to compile than to run.
            'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0',
            **dict(env),
        }
        words = [*program, '--config', config]
        words += ['--workdir', str(workdir), f'--config.compile_cache={cache}', *flags]
        if not fresh:
            self._process = forked.Popen(words, cwd=ROOT, env=environment, stdout=self.log)
            return
        with open(self.log, 'w') as file:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors='replace') if self.log.exists() else ''

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for(self, pattern: str, timeout: float = 300) -> None:
        """Waits for a text in the output, or for the end of the process."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output) and not self.ended:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f'{pattern!r} did not come:\n{self.output}')
            time.sleep(0.01)

    def signal(self, signum: int) -> None:
        self._process.send_signal(signum)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, timeout: float = 300) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f'it did not end:\n{self.output}') from None


def arrays(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Everything that the checkpoint of a step holds: name -> type, shape and bytes."""
    import jax
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():  # that it goes by the shardings that were saved, as it shall
        warnings.simplefilter('ignore', UserWarning)
        tree = ocp.load(workdir / 'checkpoints' / str(step))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {}
    for path, leaf in leaves:
        leaf = np.asarray(leaf)
        found[jax.tree_util.keystr(path)] = f'{leaf.dtype}{leaf.shape}'.encode() + leaf.tobytes()
    return found


def differences(one: pathlib.Path, other: pathlib.Path, step: int) -> list[str]:
    """Names of what differs between two finished runs; [] if nothing does."""
    found = []
    for name in ('metrics.jsonl', 'model/params.npz'):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    a, b = arrays(one, step), arrays(other, step)
    if len(a) < 3 or set(a) != set(b):
        found.append(f'checkpoint has {len(a)} and {len(b)} arrays')
    return found + [name for name in sorted(set(a) & set(b)) if a[name] != b[name]]
