"""Several processes, on one machine or many, that train one model together (`jax.distributed`).

Each process holds the devices of its machine (or one of them); all together form the mesh of
`sharding.create_mesh`. Every process runs the same program; the first (index 0) writes logs.
"""

import contextlib
import faulthandler
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vit_jax.errors import UserError

HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life after which a process counts as dead
START_TIMEOUT = 300  # seconds that processes wait for each other at the start

_FLAGS = '--coordinator_address HOST:PORT --num_processes N --process_id I'


def start(
    coordinator_address: str = '',
    num_processes: int = 0,
    process_id: int = -1,
    *,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Joins the other processes, if there are any; to be called before anything runs on a device.

    With all three arguments these count. With none, Slurm (`srun`), Open MPI (`mpirun`) and
    Kubernetes (indexed jobs) tell; outside of them this process is alone, and nothing happens.

    Args:
      coordinator_address: host and port of process 0, the port free there.
      num_processes: how many there are.
      process_id: index of this one, from 0.
      heartbeat_timeout: seconds after which a silent process counts as dead, which ends the others.

    Raises:
      UserError: some arguments but not all, impossible ones, or the others did not come.
    """
    given = (bool(coordinator_address), num_processes > 0, process_id >= 0)
    arguments: dict[str, Any] = {}
    if not any(given):
        cluster = find_cluster(os.environ)
        if not cluster:
            return
        if cluster == 'slurm' and (ids := _slurm_devices(os.environ)):
            arguments |= {'local_device_ids': ids}
        how = f'found by {cluster}'
    else:
        if not all(given):
            raise UserError(f'several processes need all three of {_FLAGS}, or none of them')
        _check(coordinator_address, num_processes, process_id)
        arguments |= {
            'coordinator_address': coordinator_address,
            'num_processes': num_processes,
            'process_id': process_id,
            'cluster_detection_method': 'deactivate',
        }
        how = f'process {process_id} of {num_processes}, coordinator {coordinator_address}'
    # Signals are ours (`preemption`): JAX's service would take SIGTERM for itself.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=heartbeat_timeout,
            initialization_timeout=START_TIMEOUT,
            **arguments,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f'the processes did not find each other ({how}): {str(error).splitlines()[0]}. '
            'Check that all of them were started, with the same coordinator, and that its port is '
            f'free and reachable; the flags are {_FLAGS}'
        ) from error
    # When another process dies, JAX says so and aborts this one. Python's own dump of an aborted
    # process (absl turns that on) would bury the message.
    faulthandler.disable()


def find_cluster(environ: Mapping[str, str]) -> str:
    """The cluster manager that started this process as one of several.

    Args:
      environ: environment variables.

    Returns:
      'slurm', 'ompi' or 'k8s', as JAX calls them, or an empty string.
    """
    slurm = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
    if all(name in environ for name in slurm) and int(environ['SLURM_NTASKS']) > 1:
        return 'slurm'
    if 'OMPI_MCA_orte_hnp_uri' in environ and int(environ.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
        return 'ompi'
    # Every pod knows the service host; the pods of an indexed job have an index as well.
    if 'KUBERNETES_SERVICE_HOST' in environ and 'JOB_COMPLETION_INDEX' in environ:
        return 'k8s'
    return ''


def explain(error: Exception) -> UserError | None:
    """The error to show when another process is gone; None for any other error.

    Args:
      error: what JAX raised.
    """
    text = ' '.join(str(error).split())
    signs = 'gloo|nccl|heartbeat|coordination service|closed by|UNAVAILABLE|DEADLINE_EXCEEDED'
    if jax.process_count() == 1 or not re.search(signs, text, re.IGNORECASE):
        return None
    return UserError(
        f'another of the {jax.process_count()} processes is gone or cannot be reached; its own '
        f'message says why ({text[:200]}). Start all of them again to go on from the last '
        'checkpoint'
    )


def _slurm_devices(environ: Mapping[str, str]) -> list[int]:
    """GPUs of this process where Slurm runs one task per node; [] to leave it to JAX.

    JAX gives task i of a node its device i, hence with one task per node the first device only.
    """
    nodes = environ.get('SLURM_STEP_NUM_NODES', '')
    gpus = environ.get('SLURM_GPUS_ON_NODE', '')
    if nodes == environ['SLURM_NTASKS'] and gpus.isdigit():
        return list(range(int(gpus)))
    return []


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, colon, port = coordinator_address.rpartition(':')
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(
            f'--coordinator_address={coordinator_address} is not HOST:PORT, such as node1:12345'
        )
    if process_id >= num_processes:
        raise UserError(
            f'--process_id={process_id} is not one of 0 to {num_processes - 1} '
            f'(--num_processes={num_processes})'
        )
    if process_id != 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', int(port)))
        except OSError as error:
            raise UserError(
                f'port {port} of --coordinator_address={coordinator_address} is in use on this '
                'machine: use another'
            ) from error


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """All processes leave this context, or none: a failure of one is a failure of all.

    What runs inside must not need the other processes. A process that fails raises its own error,
    and the others a `UserError` that says so, instead of waiting for it for ever.
    """
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    ok = False
    try:
        yield
        ok = True
    finally:
        everyone = multihost_utils.process_allgather(np.array(ok))
        failed = [int(index) for index in np.flatnonzero(~everyone)]
        if ok and failed:
            raise UserError(
                f'process {", ".join(map(str, failed))} of {jax.process_count()} cannot go on, '
                'its message says why'
            )
