"""Memory and disk that do not suffice are told before, or at least as what they are."""

import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import b16, digits
from vit_jax import config as config_lib
from vit_jax import optim, sharding
from vit_jax import state as state_lib
from vit_jax.errors import UserError
from vit_jax.models import from_config
from vit_jax.run import resources

GIB = 2**30


def resolved(module, **changes):
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


def check(config, devices=1, platform='cpu'):
    return resources.check_memory(config, num_classes=5, devices=devices, platform=platform)


def test_b16_as_it_stands_is_refused_on_a_laptop(monkeypatch):
    monkeypatch.setattr(resources, '_host_memory_left', lambda: 6 * GIB)
    monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
    with pytest.raises(UserError) as error:
        check(resolved(b16))
    text = str(error.value)
    assert 'this machine has 6.0 GiB left' in text and 'micro-batches of 64 images' in text
    assert '--config.batch' in text and '--config.accum_steps' in text
    assert '--config.remat' in text
    assert '--config.dtype' not in text  # would not help on a CPU
    # What it advises helps.
    check(resolved(b16, batch=64, accum_steps=16))
    check(resolved(b16, batch=64, accum_steps=4, remat='full'))
    need = check(resolved(b16, check_memory=False))
    assert need.total > 6 * GIB


def test_a_cache_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(resources, '_host_memory_left', lambda: 8 * GIB)
    monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
    resources.check_cache(resolved(b16, cache=7.5))
    for size in (8.5, float('inf')):
        with pytest.raises(UserError, match=r'config.cache=\S+: this machine has 8.0 GiB'):
            resources.check_cache(resolved(b16, cache=size))
    # What it takes is not there for training.
    small = {'batch': 64, 'accum_steps': 16}
    check(resolved(b16, **small))
    with pytest.raises(UserError, match=r'has 1.0 GiB left beside config.cache=7'):
        check(resolved(b16, cache=7.0, **small))


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch):
    class Gpu:
        platform, device_kind = 'gpu', 'NVIDIA Example'

        def memory_stats(self):
            return {'bytes_limit': 10 * GIB}

    monkeypatch.setattr(jax, 'local_devices', lambda: [Gpu()])
    config = resolved(b16, batch=1024, accum_steps=1, dtype='float32')
    with pytest.raises(UserError, match='NVIDIA Example has 10.0 GiB') as error:
        check(config, platform='gpu')
    text = str(error.value)
    for advice in ('--config.batch', '--config.accum_steps', '--config.remat', '--config.dtype'):
        assert advice in text
    assert check(config, devices=32, platform='gpu').total < 10 * GIB


def test_a_memory_error_of_the_device_is_explained():
    config = resolved(digits)
    need = check(config)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(jnp.zeros((2**45,), jnp.float32))
    explained = resources.out_of_memory(error.value, config, need)
    assert 'ran out of memory' in str(explained) and '--config.accum_steps' in str(explained)
    assert resources.out_of_memory(ValueError('shapes differ'), config, need) is None


def test_a_disk_without_room_for_a_checkpoint_is_refused(monkeypatch, tmp_path):
    config = resolved(digits)
    schedule = optim.create_learning_rate_schedule(10, 0.1, 'cosine', 1)
    tx = optim.create_optimizer(config, schedule)
    model = from_config(config.model, num_classes=10)
    state = state_lib.abstract_state(model, tx, 16, sharding.create_mesh(1, jax.devices()[:1]))
    resources.check_disk(tmp_path / 'not' / 'yet', state, 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(UserError, match=r'no room for the checkpoints.*1\.0 MiB are free'):
        resources.check_disk(tmp_path, state, 2)


FULL_DISK = """
import pathlib, sys
import jax.numpy as jnp
import numpy as np
from vit_jax.checkpoint import workdir
from vit_jax.errors import UserError

folder = pathlib.Path(sys.argv[1])
small = {'a': jnp.zeros(100_000)}
large = {'a': jnp.asarray(np.random.default_rng(0).standard_normal(2_000_000, np.float32))}
with workdir.Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(1, small)
    checkpoints.wait()
    checkpoints.save(2, large)
    try:
        checkpoints.wait()
    except UserError as error:
        print(error)
    print(sorted(path.name for path in (folder / 'checkpoints').iterdir()))
    assert checkpoints.restore_latest(small)[0] == 1
"""


MAIN = """
import sys
from vit_jax import main
folder = sys.argv[1]
sys.argv = ['main', '--config', 'tests/endurance/tiny.py', *FLAGS]
main.run()
"""


def in_small_disk(code: str, size: str, readonly: bool = False) -> subprocess.CompletedProcess:
    """Runs Python code with the path of a file system of its own as argument."""
    mount = 'mkdir -p "$0" && mount -t tmpfs -o size=' + size + ' t "$0"'
    if readonly:
        mount += ' && mount -o remount,ro "$0"'
    folder = pathlib.Path('/tmp/vit_jax_test_disk')
    probe = subprocess.run(
        ['unshare', '-m', 'bash', '-c', mount, str(folder)], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip('file systems cannot be mounted here (needs root and Linux)')
    words = ['unshare', '-m', 'bash', '-c', mount + ' && "$1" -c "$2" "$0"', str(folder)]
    return subprocess.run(
        [*words, sys.executable, code], capture_output=True, text=True, check=False
    )


def test_a_full_disk_leaves_earlier_checkpoints_as_they_were():
    ended = in_small_disk(FULL_DISK, '3m')
    assert ended.returncode == 0, ended.stderr
    assert 'step 2 could not be written' in ended.stdout
    assert 'No space left on device' in ended.stdout
    assert 'the checkpoints of steps 1 are intact' in ended.stdout
    assert "['1']" in ended.stdout and 'Traceback' not in ended.stderr, ended.stderr


def test_a_read_only_workdir_is_one_line():
    flags = '["--config.compile_cache=", f"--workdir={folder}/x"]'
    ended = in_small_disk(MAIN.replace('*FLAGS', f'*{flags}'), '3m', readonly=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith('error: the workdir') and 'Read-only' in ended.stderr
    assert ended.stderr.count('\n') == 1


def test_a_disk_that_fills_up_ends_a_run_with_one_line():
    flags = (
        '[f"--workdir={folder}/run", "--config.compile_cache=", "--config.checkpoint_every=1",'
        ' "--config.keep_checkpoints=100", "--config.eval_every=100"]'
    )
    ended = in_small_disk(MAIN.replace('*FLAGS', f'*{flags}'), '2m')
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith('error: ') and ended.stderr.count('\n') == 1, ended.stderr
    assert 'No space left on device' in ended.stderr and 'intact' in ended.stderr


def test_a_read_only_cache_is_one_line():
    flags = '["--workdir=/tmp/never", f"--config.compile_cache={folder}"]'
    ended = in_small_disk(MAIN.replace('*FLAGS', f'*{flags}'), '2m', readonly=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith('error: config.compile_cache=') and 'Read-only' in ended.stderr
    assert not pathlib.Path('/tmp/never').exists()
