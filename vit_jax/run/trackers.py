"""Where a run is shown beside its own files: TensorBoard, MLflow, Weights & Biases.

What a run learned is in its `.jsonl` files; here it is in the form of others. TensorBoard's files
are written through its record writer and its protocol buffers, which import neither TensorFlow nor
PyTorch (its `SummaryWriter`, and `tensorboardX`, import them wherever they are installed).
"""

import importlib
import io
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any, Protocol

from vit_jax import files
from vit_jax.errors import UserError, extra

TRACKER_FILE = 'tracker.json'  # which run of the tracker this is, to go on with it
NAMES = ('mlflow', 'wandb')
_PROJECT = 'vit_jax'

Settings = Mapping[str, int | float | bool | str]


class Tracker(Protocol):
    """What a tracker does."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values after so many steps."""

    def close(self, finished: bool) -> None:
        """Ends; `finished`: whether the run did as well."""


def tag(name: str, group: str) -> str:
    """The name of a value with its group, by which trackers arrange them: `test/accuracy`.

    Args:
      name: in `metrics.jsonl` or `timing.jsonl`: `accuracy_test`, `train_loss`, `lr`.
      group: of what is of no split.
    """
    for split in ('train', 'val', 'test'):
        if group != 'speed' and name.endswith(f'_{split}'):
            return f'{split}/{name.removesuffix(f"_{split}")}'
    return f'{group}/{name.removeprefix("train_") if group == "train" else name}'


def check(name: str) -> None:
    """Checks that a tracker is there, before anything is computed.

    Raises:
      UserError: its package is not installed.
    """
    if name:
        _package(name)


def start(name: str, workdir: pathlib.Path, shown: str, settings: Settings) -> Tracker:
    """Begins a run in a tracker, or goes on with it.

    Args:
      name: of `NAMES`.
      workdir: of the run.
      shown: what to call it.
      settings: of the run.

    Raises:
      UserError: the tracker cannot be used, as where nobody is logged in.
    """
    package = _package(name)
    known = files.read_json(workdir / TRACKER_FILE) if (workdir / TRACKER_FILE).exists() else {}
    begin: type[_Mlflow | _Wandb] = _Mlflow if name == 'mlflow' else _Wandb
    try:
        tracker = begin(package, workdir, shown, settings, str(known.get(name, '')))
    except Exception as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        raise UserError(
            f'config.tracker={name!r} cannot be used ({reason}): see its documentation on where it '
            'keeps runs and how to log in, or leave it out'
        ) from error
    files.write_json(workdir / TRACKER_FILE, {**known, name: tracker.id})
    return tracker


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f'config.tracker={name!r}: the package {error.name} is not installed: '
            f'pip install {name}'
        ) from error


class _Mlflow:
    """MLflow; where it keeps runs, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    def __init__(
        self, mlflow: Any, workdir: pathlib.Path, shown: str, settings: Settings, known: str
    ):
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', _PROJECT)
        if known:
            self.id = known
            self._client.update_run(known, status='RUNNING')
            return
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=shown, tags={'workdir': str(workdir)})
        self.id = run.info.run_id
        params = [mlflow.entities.Param(key, str(value)) for key, value in settings.items()]
        for first in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self.id, params=params[first : first + 100])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, 'FINISHED' if finished else 'KILLED')


class _Wandb:
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables count."""

    def __init__(
        self, wandb: Any, workdir: pathlib.Path, shown: str, settings: Settings, known: str
    ):
        self._run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', _PROJECT),
            name=shown,
            id=known or None,
            resume='allow',
            dir=str(workdir),
            config=dict(settings),
        )
        self.id = self._run.id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class TensorBoard:
    """A TensorBoard event file: framed `Event` records, of which the first names the format.

    Args:
      workdir: where to put it.
      step: that the run begins, or goes on, after.
      settings: for the page of hyperparameters.
    """

    def __init__(self, workdir: pathlib.Path, step: int, settings: Settings):
        with extra('train'):
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.hparams import summary_v2
            from tensorboard.summary.writer.record_writer import RecordWriter
        self._Event, self._Summary = event_pb2.Event, summary_pb2.Summary
        # TensorBoard reads the files of a folder in the order of their names. Nanoseconds, because
        # a run that is restarted at once must not write into the file of the one before.
        name = f'events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}'
        self._file: io.BufferedWriter = open(workdir / name, 'xb')
        self._writer = RecordWriter(self._file)
        self._add(file_version='brain.Event:2')
        # Makes TensorBoard drop what earlier files hold for this step and later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=step + 1, session_log=start)
        if settings:
            told = summary_v2.hparams_pb(dict(settings), trial_id=str(workdir.absolute()))
            self._add(step=0, summary=told)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        scalars = [
            self._Summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
        ]
        self._add(step=step, summary=self._Summary(value=scalars))

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        del finished
        self._file.close()

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._Event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()
