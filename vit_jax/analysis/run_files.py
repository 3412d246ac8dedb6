"""Reads what a run left in its workdir, in whatever state it is; without JAX and images.

A run may be under way, killed while it wrote a line, or copied without some of its files. What is
missing or damaged is named in `Run.notes`, and the rest is there.
"""

import dataclasses
import datetime
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from vit_jax import files
from vit_jax.errors import UserError
from vit_jax.run import resume, run_info, telemetry

# As in `run.product`, which takes the whole of training to import.
MODEL_FOLDER, BEST_MODEL_FOLDER = 'model', 'model_best'

# Larger than any run has; a file from elsewhere may say anything.
_LARGEST_STEP = 10**12
_LARGEST_NUMBER = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir.

    Attributes:
      workdir: the folder.
      name: what to call the run, the folder's name.
      metrics: lines of `metrics.jsonl` and of `timing.jsonl` (which have no name in common):
        `step`, and numbers by name; a value that was not finite is NaN.
      config: `config.json`; {} where it is missing, as the next two.
      data: `data.json`.
      versions: `versions.json`.
      events: lines of `events.jsonl`, in order: `time` (local, such as '2026-01-02 10:00:00'),
        `event` (what happened: 'started', 'resumed', 'skipped', ...), `text` for people, and the
        facts of each, see `telemetry.Telemetry.info`; None where there is no such file (runs of
        versions before 2026-12 have none).
      notes: what is missing or damaged, in sentences.
    """

    workdir: pathlib.Path
    name: str
    metrics: tuple[Mapping[str, float], ...]
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]] | None
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The last step that has a line in the files; 0 if there is none."""
        return max((int(row['step']) for row in self.metrics), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None if config.json does not tell."""
        total = self.config.get('total_steps')
        return total if _is_step(total) and total > 0 else None

    @property
    def finished(self) -> bool:
        """Whether the run has written its model folder."""
        return (self.workdir / MODEL_FOLDER / 'model.json').is_file()

    @property
    def of_pairs(self) -> bool:
        """Whether a model of images and texts is trained."""
        return 'vocabulary' in self.data

    @property
    def chosen(self) -> str:
        """The name of the model folder that the run chose: of the best step, or of the last."""
        best = self.workdir / BEST_MODEL_FOLDER / 'model.json'
        return BEST_MODEL_FOLDER if 'val' in self.data and best.is_file() else MODEL_FOLDER

    @property
    def device(self) -> Mapping[str, Any] | None:
        """`dtype`, number of `devices` and their `kind` when it last started; None if not known."""
        for event in reversed(self.happened('started')):
            texts = all(isinstance(event.get(name), str) for name in ('dtype', 'kind'))
            if texts and _is_step(event.get('devices')):
                return event
        return None

    @property
    def stopped(self) -> bool:
        """Whether the run was asked to stop, and did, and was not started again."""
        found = self.happened('started', 'stopped')
        return bool(found) and found[-1]['event'] == 'stopped'

    def happened(self, *kinds: str) -> list[Mapping[str, Any]]:
        """The events of these kinds; none where that is not known."""
        return [event for event in self.events or () if event['event'] in kinds]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of one metric, such as `train_loss`, in the order of the steps.

        Returns:
          Steps, int64 [n], each once, and values, float64 [n], of which some may be NaN. Of a step
          that is there twice, the last line counts.
        """
        values = {int(row['step']): row[name] for row in self.metrics if name in row}
        steps = sorted(values)
        return np.array(steps, np.int64), np.array([values[step] for step in steps], np.float64)

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if there is none."""
        _, values = self.series(name)
        return float(values[-1]) if len(values) else None

    def resumes(self) -> list[int]:
        """The steps from which the run went on after it had been stopped."""
        steps = (event.get('step') for event in self.happened('resumed'))
        return [step for step in steps if _is_step(step)]

    def unreadable(self) -> int:
        """How many images could not be read, each once."""
        return len({str(event.get('image')) for event in self.happened('unreadable')})

    def wall_seconds(self) -> float | None:
        """Time between the first and the last event, pauses included; None if not known."""
        if not self.events:
            return None
        try:
            first, last = (
                datetime.datetime.fromisoformat(self.events[place]['time']) for place in (0, -1)
            )
            return max(0.0, (last - first).total_seconds())  # the clock may have been set back
        except (ValueError, TypeError):  # not a date, or only one of them with its time zone
            return None


def read(workdir: str | os.PathLike[str]) -> Run:
    """Reads the folder of a run.

    Raises:
      UserError: there is no such folder, or no run in it.
    """
    workdir = pathlib.Path(workdir)
    names = (telemetry.METRICS_FILE, run_info.CONFIG_FILE, telemetry.EVENTS_FILE)
    try:
        found = [(workdir / name).is_file() for name in names]
    except OSError as error:
        raise UserError(f'{workdir} cannot be read ({error.strerror})') from error
    if not workdir.is_dir():
        raise UserError(f'there is no folder {workdir}; give the --workdir of a run')
    if not any(found):
        raise UserError(
            f'{workdir} holds no run: it has none of {", ".join(names)}; give the --workdir of one'
        )
    notes: list[str] = []
    return Run(
        workdir=workdir,
        name=workdir.absolute().name or str(workdir),
        metrics=(
            *_read_lines(workdir / telemetry.METRICS_FILE, notes),
            *_read_lines(workdir / telemetry.TIMING_FILE, notes),
        ),
        config=_read_object(workdir / run_info.CONFIG_FILE, notes),
        data=_read_object(workdir / resume.DATA_FILE, notes),
        versions=_read_object(workdir / run_info.VERSIONS_FILE, notes),
        events=_read_rows(
            workdir / telemetry.EVENTS_FILE,
            notes,
            lambda row: all(isinstance(row.get(name), str) for name in ('time', 'event', 'text')),
            without=': whether the run was resumed or stopped, on which devices it ran, and which '
            'images could not be read, is not known',
        ),
        notes=tuple(notes),
    )


def read_all(workdirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Reads workdirs; those whose folders have the same name are called by their whole paths."""
    runs = [read(workdir) for workdir in workdirs]
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(run.workdir)) if names.count(run.name) > 1 else run
        for run in runs
    ]


def _read_object(path: pathlib.Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.exists():
        notes.append(f'There is no {path.name}.')
        return {}
    try:
        return files.read_json(path)
    except UserError as error:
        notes.append(f'{path.name} is damaged: {error}.')
        return {}


def _read_rows(
    path: pathlib.Path, notes: list[str], valid: Callable[[Any], bool], *, without: str = ''
) -> Sequence[Mapping[str, Any]] | None:
    """The lines of a `.jsonl` file that are objects and valid; the others are counted in a note.

    Without the file None, and a note that says what is not known `without` it.
    """
    if not path.exists():
        notes.append(f'There is no {path.name}{without}.')
        return None
    try:
        lines = telemetry.read_lines(path)
    except UserError as error:
        notes.append(f'{error}.')
        return []
    rows: list[Mapping[str, Any]] = [row for _, row in lines if valid(row)]
    if len(rows) < len(lines):
        torn = ' (the last one is half-written: the run was killed, or is writing it)'
        notes.append(
            f'{path.name}: {len(lines) - len(rows)} of {len(lines):,} lines cannot be read and are '
            f'left out{"" if lines[-1][0].endswith(chr(10)) else torn}.'
        )
    return rows


def _read_lines(path: pathlib.Path, notes: list[str]) -> list[Mapping[str, float]]:
    """The lines of a `.jsonl` file that have a step, with the values that are numbers."""

    def has_step(row: Any) -> bool:
        return _is_step(row.get('step'))

    return [
        {name: _number(value) for name, value in row.items() if _is_number(value)}
        | {'step': row['step']}
        for row in _read_rows(path, notes, has_step) or ()
    ]


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LARGEST_STEP


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: float | None) -> float:
    """NaN for null, which stands for what was not finite, and for what no float32 can hold."""
    if value is None or not abs(value) <= _LARGEST_NUMBER:
        return math.nan
    return float(value)
