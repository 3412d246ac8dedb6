import contextlib
import functools
import gc
import json
import logging
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.checkpoint.workdir import Checkpoints
from vit_jax.errors import UserError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    momentum: tuple


def _shardings(mesh, *specs):
    return [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]


def _mesh(devices=None):
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


@functools.cache
def _state(step, mesh=None, rows=1024):
    """Float32 sharded, bfloat16 and int32 replicated, a typed key; values depend on `step`."""
    sharded, replicated = _shardings(mesh or _mesh(), ('data',), ())
    kernel = jax.random.normal(jax.random.key(step), (rows, 16))
    return State(
        step=jax.device_put(jnp.int32(step), replicated),
        params={
            'kernel': jax.device_put(kernel, sharded),
            'bias': jax.device_put(kernel[0].astype(jnp.bfloat16), replicated),
            'key': jax.device_put(jax.random.key(step), replicated),
        },
        momentum=(jax.device_put(kernel.astype(jnp.bfloat16), sharded), None),
    )


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _data(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def _assert_equal(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(_data(a), _data(b), strict=True)


def _saved(workdir, *steps, keep=10):
    with Checkpoints(workdir, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step))
    return workdir / 'checkpoints'


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_has_dtypes_and_shardings_of_the_abstract_state(tmp_path):
    assert len(jax.devices()) == 4
    _saved(tmp_path, 3, 7)
    for mesh in (_mesh(), _mesh(jax.devices()[:1]), _mesh(jax.devices()[2:])):
        target = _abstract(_state(0, mesh))
        with Checkpoints(tmp_path) as checkpoints:
            step, state = checkpoints.restore_latest(target)
        assert step == 7
        assert isinstance(state, State)
        _assert_equal(state, _state(7))
        for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
            assert leaf.sharding == want.sharding


def test_saved_on_one_device_restored_on_four(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1, _mesh(jax.devices()[:1])))
    with Checkpoints(tmp_path) as checkpoints:
        _, state = checkpoints.restore_latest(_abstract(_state(0)))
    _assert_equal(state, _state(1))


def test_orbax_alone_reads_a_checkpoint_as_the_docs_say(tmp_path, monkeypatch):
    import orbax.checkpoint
    from orbax.checkpoint import v1

    _saved(tmp_path / 'runs' / 'x', 500)
    monkeypatch.chdir(tmp_path)
    page = (pathlib.Path(__file__).parents[2] / 'docs' / 'weights.md').read_text(encoding='utf-8')
    (code,) = [part for part in page.split('```python\n') if 'ocp.load' in part.partition('```')[0]]
    names = {}
    exec(code.partition('```')[0], names)
    path, state, expected = names['path'], names['state'], _state(500)
    read = [state, names['wanted'] | {'params': names['params']}]
    with pytest.warns(UserWarning, match='Sharding info not provided'):
        read.append(v1.load(path))
        read.append(orbax.checkpoint.StandardCheckpointer().restore(path / 'state'))
    for tree in read:
        for name in ('kernel', 'bias', 'key'):
            np.testing.assert_array_equal(_data(tree['params'][name]), _data(expected.params[name]))
    assert names['wanted']['step'] is ... and state['step'] == 500
    np.testing.assert_array_equal(state['momentum'][0], expected.momentum[0])
    assert isinstance(state['momentum'][0], np.ndarray)
    assert 'checksums' in v1.metadata(path).custom_metadata['vit_jax']


def test_no_checkpoint_yet(tmp_path):
    with Checkpoints(tmp_path / 'new') as checkpoints:
        assert checkpoints.restore_latest(_abstract(_state(0))) is None
        assert checkpoints.steps() == []
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('devices', [1, 4])
def test_state_may_be_donated_right_after_save(tmp_path, devices):
    state = _state(1, _mesh(jax.devices()[:devices]), rows=1 << 16)
    destroy = jax.jit(
        lambda s: s.replace(params=s.params | {'kernel': s.params['kernel'] * 0 - 1}),
        donate_argnums=0,
    )
    other = _state(2, _mesh(jax.devices()[:devices]), rows=1 << 16)
    jax.block_until_ready(destroy(other))
    assert other.params['kernel'].is_deleted()  # so the donation is one
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        after = jax.block_until_ready(destroy(state))
        step, restored = checkpoints.restore_latest(_abstract(after))
    assert step == 1
    np.testing.assert_array_equal(
        _data(restored.params['kernel']), _state(1, rows=1 << 16).params['kernel']
    )


def test_keeps_the_newest(tmp_path):
    folder = _saved(tmp_path, 1, 2, 3, 10, keep=2)
    assert _names(folder) == ['10', '3']
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(20, _state(20))
        assert '10' in _names(folder)  # not before the new one is complete
    assert _names(folder) == ['20']


def test_a_step_is_written_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, _state(1))
        checkpoints.save(1, _state(2))
        _assert_equal(checkpoints.restore_latest(_abstract(_state(0)))[1], _state(1))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match='exists already, from another run'):
            checkpoints.save(1, _state(1))


def _data_files(step_folder):
    return sorted(p for p in (step_folder / 'state' / 'ocdbt.process_0' / 'd').iterdir())


def _flip(path, share=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 4
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@contextlib.contextmanager
def _nothing_on_console(capfd):
    """Orbax's tasks complain late, when they are collected."""
    capfd.readouterr()
    yield
    gc.collect()
    assert capfd.readouterr() == ('', '')


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
    """Checkpoints of the steps 5 and 10, to be copied."""
    return _saved(tmp_path_factory.mktemp('saved'), 5, 10)


@pytest.mark.parametrize('damage', [_flip, _cut, os.unlink])
@pytest.mark.parametrize(
    'file', ['data', '_CHECKPOINT_METADATA', 'state/manifest.ocdbt', 'state/_METADATA']
)
def test_damage_is_found_and_the_previous_step_used(
    two_steps, tmp_path, caplog, capfd, damage, file
):
    folder = shutil.copytree(two_steps, tmp_path / 'checkpoints')
    # Of the files with data some hold what later ones replace.
    paths = _data_files(folder / '10') if file == 'data' else [folder / '10' / file]
    if file == 'state/_METADATA' and damage is _flip:
        damage = functools.partial(_flip, share=0)  # in the middle are values that nobody reads
    for path in paths:
        damage(path)
    with _nothing_on_console(capfd), Checkpoints(tmp_path, keep=1) as checkpoints:
        step, state = checkpoints.restore_latest(_abstract(_state(0)))
        assert step == 5
        _assert_equal(state, _state(5))
        [record] = [r for r in caplog.records if r.name.startswith('vit_jax')]
        assert record.levelno == logging.WARNING
        assert f'{folder / "10"} is damaged' in record.getMessage()
        # The run goes on, and the damaged step neither blocks the name nor counts as the newest.
        checkpoints.save(7, _state(7))
        checkpoints.wait()
        assert _names(folder) == ['7', 'damaged-10']
        checkpoints.save(10, _state(10))
    assert _names(folder) == ['10', 'damaged-10']


def test_every_byte_of_the_data_counts(tmp_path):
    """A flip anywhere in the arrays' file is found, or harmless: never a wrong state."""
    folder = _saved(tmp_path, 1)
    path = max(_data_files(folder / '1'), key=lambda file: file.stat().st_size)
    good, found = path.read_bytes(), 0
    shares = np.linspace(0.01, 0.99, 15)
    for share in shares:
        path.write_bytes(good)
        _flip(path, share)
        with Checkpoints(tmp_path) as checkpoints:
            try:
                _, state = checkpoints.restore_latest(_abstract(_state(0)))
            except UserError as e:
                assert 'none of the checkpoints' in str(e)
                found += 1
            else:
                _assert_equal(state, _state(1))
    assert found >= 0.8 * len(shares)


def test_all_damaged_is_an_error_and_nothing_is_renamed(two_steps, tmp_path):
    folder = shutil.copytree(two_steps, tmp_path / 'checkpoints')
    for step in ('5', '10'):
        for path in _data_files(folder / step):
            _flip(path)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            UserError, match=r'none of the checkpoints in .* \(steps 10, 5: .*another workdir'
        ):
            checkpoints.restore_latest(_abstract(_state(0)))
    assert _names(folder) == ['10', '5']


def test_checkpoint_without_checksums_is_not_trusted(two_steps, tmp_path):
    folder = shutil.copytree(two_steps, tmp_path / 'checkpoints')
    path = folder / '10' / '_CHECKPOINT_METADATA'
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {'custom_metadata': {}}))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(_abstract(_state(0)))[0] == 5


def test_leftovers_of_killed_runs_are_swept(two_steps, tmp_path, caplog):
    folder = shutil.copytree(two_steps, tmp_path / 'checkpoints')
    (folder / '5').rename(folder / '20.orbax-checkpoint-tmp')
    shutil.copytree(folder / '10', folder / 'trash-0')
    with Checkpoints(tmp_path) as checkpoints:
        assert _names(folder) == ['10']
        assert '20.orbax-checkpoint-tmp' in caplog.text
        assert checkpoints.restore_latest(_abstract(_state(0)))[0] == 10


def test_another_model_in_the_workdir_is_an_error(two_steps, tmp_path):
    folder = shutil.copytree(two_steps, tmp_path / 'checkpoints')
    other = _state(0).replace(params={'kernel': _state(0, rows=32).params['kernel']})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match='another model or optimizer') as e:
            checkpoints.restore_latest(_abstract(other))
    assert 'params/kernel: saved float32[1024, 16], expected float32[32, 16]' in str(e.value)
    assert 'params/bias: saved bfloat16[16], expected nothing' in str(e.value)
    assert _names(folder) == ['10', '5']


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match='keep=0'):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match='x is a float'):
        checkpoints.save(1, {'x': 1.0})


def test_killed_while_saving_leaves_a_complete_checkpoint(tmp_path):
    """The process is killed at once after `save` returned, in the middle of writing."""
    code = """
    import os, signal, sys
    import jax, jax.numpy as jnp
    from vit_jax.checkpoint.workdir import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=1)
    checkpoints.save(1, {'x': jnp.full((1 << 20,), 1.0)})
    checkpoints.wait()
    checkpoints.save(2, {'x': jnp.full((1 << 20,), 2.0)})
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code), str(tmp_path)], timeout=120)
    assert done.returncode == -9
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path) as checkpoints:
        step, state = checkpoints.restore_latest(
            {'x': jax.ShapeDtypeStruct((1 << 20,), jnp.float32, sharding=device)}
        )
    assert step in (1, 2)
    np.testing.assert_array_equal(state['x'], np.full(1 << 20, step, np.float32))


def test_saving_makes_no_implicit_transfer(tmp_path):
    state = _state(1)
    with Checkpoints(tmp_path) as checkpoints, jax.transfer_guard('disallow'):
        checkpoints.save(1, state)
        checkpoints.wait()
    with Checkpoints(tmp_path) as checkpoints:
        _assert_equal(checkpoints.restore_latest(_abstract(state))[1], state)


def test_two_processes_agree_about_damage(tmp_path):
    """Only one of the processes reads the damaged file; the other must not wait for it for ever."""
    code = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from vit_jax.checkpoint.workdir import Checkpoints
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    def state(value):
        x = np.random.default_rng(value).normal(size=(512, 64)).astype(np.float32)
        return {'x': jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])}
    with Checkpoints(sys.argv[3], keep=3) as checkpoints:
        restored = checkpoints.restore_latest(state(0))
        if restored:
            step, got = restored
            shard = got['x'].addressable_shards[0]
            want = state(step)['x'].addressable_shards[0]
            assert np.array_equal(shard.data, want.data)
        print('restored', restored and step)
        for step in (1, 2):
            if not restored or step > restored[0]:
                checkpoints.save(step, state(step))
    """

    def run():
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            address = f'127.0.0.1:{s.getsockname()[1]}'
        env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', 'XLA_FLAGS': ''}
        processes = [
            subprocess.Popen(
                [sys.executable, '-c', textwrap.dedent(code), address, str(i), str(tmp_path)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
            )
            for i in range(2)
        ]
        try:
            return [process.communicate(timeout=90)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()

    assert all('restored None' in text for text in run())
    folder = tmp_path / 'checkpoints'
    [data] = (folder / '2' / 'state' / 'ocdbt.process_1' / 'd').iterdir()
    data.write_bytes(b'')
    assert all('restored 1' in text for text in run())
    assert _names(folder) == ['1', '2', 'damaged-2']
    sharding, _ = _shardings(_mesh(), ('data',), ())
    with Checkpoints(tmp_path) as checkpoints:  # the one that was saved again, in one process
        step, state = checkpoints.restore_latest(
            {'x': jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=sharding)}
        )
    expected = np.random.default_rng(2).normal(size=(512, 64)).astype(np.float32)
    assert step == 2
    np.testing.assert_array_equal(state['x'], expected)
