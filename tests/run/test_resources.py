"""Memory and disk that do not suffice are told before, or at least as what they are."""

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import time

import forked
import jax
import jax.numpy as jnp
import pytest

from vit_jax import config as config_lib
from vit_jax import optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.configs import b16, digits
from vit_jax.errors import UserError
from vit_jax.models import from_config
from vit_jax.run import resources

GIB = 2**30


def resolved(module, **changes):
    config = module.get_config()
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


def measured(config, compiled=False, devices=1):
    """What training on the first devices needs: at least, or as compiled."""
    mesh = sharding.create_mesh(config.fsdp, jax.devices()[:devices])
    model = from_config(config.model, num_classes=5, remat=config.remat)
    schedule = optim.create_learning_rate_schedule(10, 0.1, 'cosine', 1)
    tx = optim.create_optimizer(config, schedule)
    state = state_lib.abstract_state(model, tx, config.pp.crop, mesh)
    batch = steps.abstract_batch(config.batch, config.pp.crop, mesh, exact=config.pp.exact)
    least = resources.least_memory(config, state, batch)
    if not compiled:
        return least
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    make = functools.partial(steps.make_train_step, accum_steps=config.accum_steps)
    step = make(model, tx, schedule, mesh, shardings, seed=0).lower(state, batch)
    # Not optimised: machine code that nobody runs, and the memory is the same.
    quick = {'xla_backend_optimization_level': 0}
    return resources.compiled_memory(least, step.compile(compiler_options=quick), 0)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, 'local_device_count', lambda: 1)


@pytest.mark.usefixtures('one_device')
def test_what_can_never_fit_is_refused_by_arithmetic():
    config = resolved(b16, accum_steps=1)
    begin = time.monotonic()
    need = measured(config)
    assert time.monotonic() - begin < 10  # under a second where the machine is not busy
    count = 85_802_501  # parameters of B/16 with 5 classes, as published
    assert need.parameters == need.gradients == 4 * count
    assert 2 * count <= need.optimizer < 2 * count + 100  # bfloat16, and counters
    assert need.inputs == 512 * (224 * 224 * 3 * 4 + 8)
    with pytest.raises(UserError) as error:
        resources.check_memory(config, need, GIB)
    text = str(error.value)
    assert 'this machine has 1.0 GiB left' in text and 'micro-batches of' in text
    for advice in ('--config.batch', '--config.accum_steps', '--config.remat', 'smaller model'):
        assert advice in text
    assert '--config.dtype' not in text  # would not help on a CPU
    resources.check_memory(config, need, 2 * GIB)
    resources.check_memory(resolved(b16, check_memory=False), need, GIB)
    resources.check_memory(config, need, 0)  # not known
    # Sharded, a device holds its part of what is large.
    parts = measured(resolved(b16, fsdp=-1), devices=4)
    assert parts.parameters == pytest.approx(need.parameters / 4, rel=0.01)
    assert parts.inputs == need.inputs / 4


@pytest.mark.usefixtures('one_device')
def test_what_the_compiled_step_takes_is_compared_and_its_advice_helps():
    vit = {'model.hidden_size': 96, 'model.transformer.num_layers': 4, 'pp.crop': 64}
    config = resolved(digits, batch=64, data_threads=1, **vit)
    need, least = measured(config, compiled=True), measured(config)
    assert need.total > 3 * least.total and need.activations > need.parameters
    has = int(0.9 * need.total)
    with pytest.raises(UserError, match=r'training needs about .*activations'):
        resources.check_memory(config, need, has)
    resources.check_memory(config, least, has)
    helped = (measured(resolved(digits, batch=64, data_threads=1, **vit, **change), compiled=True)
              for change in ({'accum_steps': 4}, {'remat': 'full'}))  # fmt: skip
    for other in helped:
        assert other.total < 0.7 * need.total
    # What a cache takes is not there for training, nor what compiling took.
    enough = 2 * need.total
    resources.check_memory(config, need, enough)
    cached = resolved(digits, batch=64, data_threads=1, cache=enough / GIB - 0.001, **vit)
    with pytest.raises(UserError, match=r'left beside config.cache='):
        resources.check_memory(cached, need, enough)
    with pytest.raises(UserError, match='training needs about'):
        resources.check_memory(config, dataclasses.replace(need, compiling=enough), enough)


def test_a_cache_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(resources, '_host_memory_left', lambda: 8 * GIB)
    resources.check_cache(resolved(b16, cache=7.5))
    for size in (8.5, float('inf')):
        with pytest.raises(UserError, match=r'config.cache=\S+: this machine has 8.0 GiB'):
            resources.check_cache(resolved(b16, cache=size))


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch):
    class Gpu:
        platform, device_kind = 'gpu', 'NVIDIA Example'

        def memory_stats(self):
            return {'bytes_limit': 10 * GIB}

    monkeypatch.setattr(jax, 'local_devices', lambda: [Gpu()])
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    config = resolved(b16, batch=1024, dtype='float32')
    need = resources.Memory(2 * GIB, 2 * GIB, GIB, GIB, 5 * GIB, compiling=99 * GIB)
    assert resources.memory_of(Gpu()) == 10 * GIB
    with pytest.raises(UserError, match='NVIDIA Example has 10.0 GiB') as error:
        resources.check_memory(config, need, resources.memory_of(Gpu()))
    text = str(error.value)
    for advice in ('--config.batch', '--config.accum_steps', '--config.remat', '--config.dtype'):
        assert advice in text
    resources.check_memory(config, need, 12 * GIB)  # the host's memory is another


RUN = """
import os, resource, sys
from vit_jax import train
from vit_jax import config as config_lib
from vit_jax.run import resources
from vit_jax.configs import digits
config = digits.get_config()
config.update_from_flattened_dict(dict(eval(sys.argv[1])))
config.report, config.compile_cache = False, ''
found = {}
check = resources.check_memory

def remember(config, need, has):
    found['need'] = resources.on_the_host(config, need)
    if not need.activations:
        found['before'] = resources.resident_bytes()
    check(config, need, has)

resources.check_memory = remember
train.train_and_evaluate(config_lib.resolve(config), sys.argv[2])
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print('MEASURED', found['need'], peak - found['before'])
"""


def test_a_run_takes_what_was_said(tmp_path):
    """Within 10 % of the growth of this process, from before compiling to its end."""
    settings = {
        'model.patches.size': (8, 8), 'model.hidden_size': 192, 'model.transformer.mlp_dim': 768,
        'model.transformer.num_heads': 3, 'model.transformer.num_layers': 2, 'pp.crop': 128,
        'pp.test': 'train[97%:]', 'batch': 128, 'batch_eval': 60, 'total_steps': 2,
        'checkpoint_every': 1,
    }  # fmt: skip
    # Compiled as for a user, and not found in a cache.
    env = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'XLA_FLAGS': ''}
    del env['JAX_COMPILATION_CACHE_DIR']
    done = subprocess.run(
        [sys.executable, '-c', RUN, repr(settings), str(tmp_path / 'run')],
        env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, grown = map(int, done.stdout.split('MEASURED')[1].split())
    assert said == pytest.approx(grown, rel=0.1), (said, grown)


def test_a_memory_error_of_the_device_is_explained():
    config = resolved(digits)
    need = measured(config)
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


MOUNT = """
import ctypes, subprocess, sys
assert not ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS: mounts are for this process alone
subprocess.run(['bash', '-ec', sys.argv[2]], check=True)
"""


@pytest.fixture
def in_small_disk(tmp_path):
    """Runs Python code with the path of a file system of its own as argument."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def run(code: str, size: str, readonly: bool = False) -> subprocess.CompletedProcess:
        mount = f'mount --make-rprivate / && mount -t tmpfs -o size={size} t "{folder}"'
        if readonly:
            mount += f' && mount -o remount,ro "{folder}"'
        probe = subprocess.run(
            ['unshare', '-m', 'bash', '-c', mount], capture_output=True, check=False
        )
        if probe.returncode:
            pytest.skip('file systems cannot be mounted here (needs root and Linux)')
        return forked.run(
            ['-c', MOUNT + code, str(folder), mount],
            folder=tmp_path / 'output',
            cwd=pathlib.Path(__file__).parents[2],
            env=os.environ | {'JAX_NUM_CPU_DEVICES': '1'},
            timeout=300,
        )

    return run


def test_a_full_disk_leaves_earlier_checkpoints_as_they_were(in_small_disk):
    ended = in_small_disk(FULL_DISK, '3m')
    assert ended.returncode == 0, ended.stderr
    assert 'step 2 could not be written' in ended.stdout
    assert 'No space left on device' in ended.stdout
    assert 'the checkpoints of steps 1 are intact' in ended.stdout
    assert "['1']" in ended.stdout and 'Traceback' not in ended.stderr, ended.stderr


def test_a_read_only_workdir_is_one_line(in_small_disk):
    flags = '["--config.compile_cache=", f"--workdir={folder}/x"]'
    ended = in_small_disk(MAIN.replace('*FLAGS', f'*{flags}'), '3m', readonly=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith('error: the workdir') and 'Read-only' in ended.stderr
    assert ended.stderr.count('\n') == 1


def test_a_disk_that_fills_up_ends_a_run_with_one_line(in_small_disk):
    flags = (
        '[f"--workdir={folder}/run", "--config.compile_cache=", "--config.checkpoint_every=1",'
        ' "--config.keep_checkpoints=100", "--config.eval_every=100"]'
    )
    ended = in_small_disk(MAIN.replace('*FLAGS', f'*{flags}'), '2m')
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith('error: ') and ended.stderr.count('\n') == 1, ended.stderr
    assert 'No space left on device' in ended.stderr and 'intact' in ended.stderr


def test_a_read_only_cache_is_one_line(in_small_disk, tmp_path):
    flags = f'["--workdir={tmp_path}/never", f"--config.compile_cache={{folder}}"]'
    ended = in_small_disk(MAIN.replace('*FLAGS', f'*{flags}'), '2m', readonly=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith('error: config.compile_cache=') and 'Read-only' in ended.stderr
    assert not (tmp_path / 'never').exists()
