"""How processes find each other, and what is said when they do not."""

import socket

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.run import distributed

SLURM = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'node[1-2]',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1',
    'SLURM_LOCALID': '0',
    'SLURM_STEP_NUM_NODES': '2',
    'SLURM_GPUS_ON_NODE': '8',
}
OPEN_MPI = {'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.1:3', 'OMPI_COMM_WORLD_SIZE': '4'}
KUBERNETES = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}


@pytest.mark.parametrize(
    ('environ', 'cluster'),
    [
        ({}, ''),
        (SLURM, 'slurm'),
        ({**SLURM, 'SLURM_NTASKS': '1'}, ''),  # one process, which needs nobody
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2'}, ''),  # in a job's script, not under srun
        (OPEN_MPI, 'ompi'),
        ({**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '1'}, ''),
        (KUBERNETES, 'k8s'),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, ''),  # a pod that is no part of an indexed job
    ],
)
def test_clusters_are_known_by_their_variables(environ, cluster):
    assert distributed.find_cluster(environ) == cluster


def test_jax_knows_these_clusters_by_the_same_variables(monkeypatch):
    from jax._src.clusters import ompi_cluster, slurm_cluster

    for name, value in {**SLURM, **OPEN_MPI}.items():
        monkeypatch.setenv(name, value)
    assert slurm_cluster.SlurmCluster.is_env_present()
    assert ompi_cluster.OmpiCluster.is_env_present()
    assert slurm_cluster.SlurmCluster.get_process_count() == 2


@pytest.mark.parametrize(
    ('changes', 'ids'),
    [
        ({}, list(range(8))),  # one task per node has all its GPUs
        ({'SLURM_NTASKS': '16'}, None),  # one task per GPU: JAX gives each its own
        ({'SLURM_GPUS_ON_NODE': ''}, None),
    ],
)
def test_slurm_starts_jax_with_the_devices_of_the_task(monkeypatch, changes, ids):
    for name, value in {**SLURM, **changes}.items():
        monkeypatch.setenv(name, value)
    given = {}
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **kwargs: given.update(kwargs))
    monkeypatch.setattr(distributed.faulthandler, 'disable', lambda: None)
    distributed.start(heartbeat_timeout=12)
    assert given.get('local_device_ids') == ids
    assert given['heartbeat_timeout_seconds'] == 12 and 'coordinator_address' not in given


def test_alone_nothing_is_started(monkeypatch):
    for name in (*SLURM, *OPEN_MPI, *KUBERNETES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: pytest.fail('started'))
    distributed.start()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('node0:1234', 2, -1), 'all three of --coordinator_address'),
        (('', 2, 0), 'all three of'),
        (('node0', 2, 0), 'is not HOST:PORT'),
        (('node0:99999', 2, 0), 'is not HOST:PORT'),
        (('node0:1234', 2, 2), '--process_id=2 is not one of 0 to 1'),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*arguments)


def test_a_port_in_use_is_told():
    with socket.socket() as server:
        server.bind(('', 0))
        server.listen()
        with pytest.raises(UserError, match='in use on this machine'):
            distributed.start(f'localhost:{server.getsockname()[1]}', 2, 0)


def test_failing_to_meet_is_one_line(monkeypatch):
    def initialize(**kwargs):
        raise RuntimeError('DEADLINE_EXCEEDED: Barrier timed out.\nmore')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(UserError, match=r'did not find each other .*Barrier timed out\.\. Check'):
        distributed.start('localhost:1234', 2, 1)


def test_only_errors_of_connections_are_explained_so(monkeypatch):
    gone = RuntimeError('Gloo AllReduce failed: Connection closed by peer')
    assert distributed.explain(gone) is None  # alone, nobody can be gone
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    assert 'another of the 2 processes is gone' in str(distributed.explain(gone))
    assert distributed.explain(RuntimeError('INVALID_ARGUMENT: shapes')) is None
