"""What a run writes and shows: metrics, timing, TensorBoard events, its log and the progress line.

`metrics.jsonl` holds what was learned and is a function of configuration and data alone, so that
two runs can be compared byte for byte; everything that depends on the clock goes to `timing.jsonl`.
TensorBoard shows both. `train.log` is for people; what happened (resumed, stopped, an unreadable
image) is in `events.jsonl` as well, with the facts that a program may need.
"""

import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import rich.console
import rich.live
import rich.progress_bar
import rich.table

from vit_jax import files
from vit_jax.errors import UserError, printable_lines
from vit_jax.run import trackers

METRICS_FILE = 'metrics.jsonl'
_EVALUATED = ('_test', '_val')  # how the names of metrics of an evaluation end
TIMING_FILE = 'timing.jsonl'
LOG_FILE = 'train.log'
EVENTS_FILE = 'events.jsonl'

MAX_LINES_BYTES = 256 << 20  # of a file of lines: more than a million steps

# Seconds between two progress lines in train.log, and on a console that is not a terminal (a file,
# a pipe, a batch system).
PLAIN_INTERVAL = 10.0


class Telemetry:
    """Writes and shows the progress of one run. Use it as a context manager.

    On resume from step `start_step`, the lines of later steps (the run went on after that
    checkpoint, and was then killed) are removed from both `.jsonl` files, so that a resumed run
    ends with the same `metrics.jsonl` as one that was never interrupted; TensorBoard is told to
    forget the same steps. So log a step's metrics before you save its checkpoint.

    Before `start`, messages are shown and nothing is written: a refused run leaves nothing.

    Args:
      workdir: folder of the run; made by `start` if it does not exist.
      name: what messages call it, if the user did not name this folder.
      total_steps: number of training steps of the whole run.
      process_index: of several processes only the first, 0, writes, shows, and makes the folder.
      settings: of the run, for trackers.
      tracker: of `trackers.NAMES`, beside TensorBoard; '' for none.
      console: where to show it; standard output by default. A terminal gets one live line, anything
        else plain lines.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        name: str = '',
        total_steps: int,
        process_index: int = 0,
        settings: trackers.Settings | None = None,
        tracker: str = '',
        console: rich.console.Console | None = None,
    ):
        self._workdir = pathlib.Path(workdir)
        self._name = name or str(self._workdir)
        self._total_steps = total_steps
        self._process_index = process_index
        self._enabled = process_index == 0
        self._live: rich.live.Live | None = None
        self._last_plain = -math.inf
        self._console = console or rich.console.Console()
        self._files: dict[str, TextIO] = {}
        self._early: list[tuple[str, str]] = []  # (name of the file, line) from before `start`
        self._settings, self._tracker = settings or {}, tracker
        self._trackers: list[trackers.Tracker] = []

    def start(self, step: int) -> None:
        """Opens the files of the run, which begins, or goes on, after so many steps.

        Raises:
          UserError: one of them is something else than a file, or too large.
        """
        if not self._enabled:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        removed = {
            name: _remove_later_steps(self._workdir / name, step)
            for name in (METRICS_FILE, TIMING_FILE)
        }
        names = (LOG_FILE, EVENTS_FILE, METRICS_FILE, TIMING_FILE)
        for name in names:
            if (place := self._workdir / name).exists() and not place.is_file():
                raise UserError(f'{place} is not a regular file: a pipe would be waited for')
        opened: dict[str, TextIO] = {
            name: open(self._workdir / name, 'a', encoding='utf-8', buffering=1) for name in names
        }
        self._files = opened  # at once: a thread that reads images may have something to say
        self._trackers = [trackers.TensorBoard(self._workdir, step, self._settings)]
        if self._tracker:
            self._trackers.append(
                trackers.start(
                    self._tracker, self._workdir, self._workdir.absolute().name, self._settings
                )
            )
        for name, line in self._early:
            self._files[name].write(line)
        for name, unreadable in removed.items():
            if unreadable:
                self.info(f'{self._workdir / name}: removed {unreadable} lines that are not JSON')

    def __enter__(self) -> 'Telemetry':
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.close(finished=kind is None)

    def metrics(self, step: int, **values: float) -> None:
        """Adds a line to `metrics.jsonl` and TensorBoard.

        Args:
          step: number of training steps done.
          **values: what was learned (`train_loss`, `lr`, `accuracy_test`, ...); a function of
            configuration and data only. A value that is not finite is `null` in the file (JSON has
            no other way) and itself in TensorBoard.
        """
        self._add(METRICS_FILE, step, values)

    def timing(self, step: int, **values: float) -> None:
        """Adds a line to `timing.jsonl` and TensorBoard.

        Args:
          step: number of training steps done.
          **values: what depends on the clock or the machine (`img_sec_core_train`, memory, ...).
        """
        self._add(TIMING_FILE, step, values)

    def progress(
        self,
        step: int,
        *,
        loss: float,
        accuracy: float | None,
        lr: float | None,
        images_per_sec: float = math.nan,
        data_wait: float = math.nan,
        eta_s: float = math.nan,
    ) -> None:
        """Shows how far the run is: a live line on a terminal, elsewhere plain lines.

        A plain line comes at most every `PLAIN_INTERVAL` seconds, the first one and the last step's
        always, as those that have no speed yet. `train.log` gets the plain lines.

        Args:
          step: number of training steps done.
          loss: training loss of the latest step.
          accuracy: share of the latest training batch that was classified correctly, in [0, 1];
            None if nothing is classified.
          lr: learning rate; None if it is not known.
          images_per_sec: training speed, images per second over all devices; NaN for none yet.
          data_wait: share of the time spent waiting for data, in [0, 1].
          eta_s: time left, in seconds.
        """
        if not self._enabled:
            return
        line = f'step {step:,}/{self._total_steps:,}  loss {loss:.4f}'
        if accuracy is not None:
            line += f'  accuracy {100 * accuracy:.1f} %'
        if lr is not None:
            line += f'  lr {lr:.3g}'
        now = time.monotonic()
        due = now - self._last_plain >= PLAIN_INTERVAL or step >= self._total_steps
        if math.isnan(images_per_sec):
            due = True
        else:
            line += (
                f'  {format_rate(images_per_sec)} images/s  data wait {100 * data_wait:.0f} %  '
                f'{format_duration(eta_s)} left'
            )
            self._last_plain = now if due else self._last_plain
        if due:
            self._write(LOG_FILE, f'{_now()}  {line}\n')
        if not self._console.is_interactive:
            if due:
                self._print(line)
            return
        if self._live is None:
            # No refresh thread: the line changes only here. Live moves what others print above the
            # line.
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            self._live.start()
        row = rich.table.Table.grid(padding=(0, 1))
        if self._console.width >= len(line) + 20:
            bar = rich.progress_bar.ProgressBar(self._total_steps, completed=step, width=16)
            row.add_row(bar, line)
        else:
            row.add_row(line)
        self._live.update(row, refresh=True)

    def info(self, text: str, event: str = 'message', **facts: Any) -> None:
        """Shows a message and adds it, with the time, to `train.log` and `events.jsonl`.

        Args:
          text: for people.
          event: what happened, for programs: `started`, `resumed`, `skipped`, ...
          **facts: about it, of types that JSON has, in `events.jsonl` beside `time`, `event` and
            `text`.
        """
        if self._enabled:
            text = printable_lines(text.replace(str(self._workdir), self._name))
            self._print(text)
            now = _now()
            self._write(LOG_FILE, f'{now}  {text}\n')
            row = {'time': now, 'event': event, 'text': text, **facts}
            self._write(EVENTS_FILE, json.dumps(row) + '\n')

    def note(self, text: str, event: str = 'message', **facts: Any) -> None:
        """As `info`; but every process shows what it has to say, and only the first writes it.

        May be called from any thread.
        """
        if self._process_index == 0:
            self.info(text, event, **facts)
        else:
            print(f'process {self._process_index}: {printable_lines(text)}', file=sys.stderr)

    def close(self, *, finished: bool = True) -> None:
        """Leaves the last progress line on the terminal and closes the files.

        Args:
          finished: whether the run has ended by itself.
        """
        if not self._enabled:
            return
        if self._live is not None:
            self._live.stop()
        self._track(lambda tracker: tracker.close(finished))
        self._enabled = False
        for file in self._files.values():
            file.close()

    def _add(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if not self._enabled:
            return
        assert self._trackers, 'start comes first'
        row: dict[str, float | None] = {'step': int(step)}
        for key, value in values.items():
            value = value if isinstance(value, int) else float(value)
            row[key] = value if math.isfinite(value) else None
        self._files[name].write(json.dumps(row, allow_nan=False) + '\n')
        group = 'train' if name == METRICS_FILE else 'speed'
        tagged = {trackers.tag(key, group): value for key, value in values.items()}
        self._track(lambda tracker: tracker.write(step, tagged))

    def _track(self, work: Callable[[trackers.Tracker], None]) -> None:
        """Has all trackers do something; what is not ours may fail, and is given up then."""
        if not self._trackers:  # the run ended before its start
            return
        ours, *others = self._trackers
        work(ours)
        for tracker in others:
            try:
                work(tracker)
            except Exception as error:  # noqa: BLE001  (packages and servers raise anything)
                self._trackers = [ours]
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
                self.info(f'WARNING: {self._tracker} failed and gets no more ({reason})')

    def _print(self, text: str) -> None:
        # soft_wrap: where there is no terminal, rich would otherwise break lines at 80 columns.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, name: str, line: str) -> None:
        if self._files:
            self._files[name].write(line)
        else:
            self._early.append((name, line))


def read_metric(
    workdir: str | os.PathLike, name: str, *, up_to: int | None = None
) -> dict[int, float]:
    """What `metrics.jsonl` has of one metric: step -> value, in order; {} without such a file.

    A value that was not finite is NaN.

    Args:
      workdir: folder of the run.
      name: of the metric, such as `accuracy_test`.
      up_to: last step to read; the lines of later ones are those of steps that a resumed run
        repeats.
    """
    values = {}
    for _, row in read_lines(pathlib.Path(workdir) / METRICS_FILE):
        try:
            step, value = int(row['step']), row[name]
            value = math.nan if value is None else float(value)
        except (ValueError, TypeError, KeyError):
            continue  # other metrics; or torn by a kill, which `Telemetry` reports
        if up_to is None or step <= up_to:
            values[step] = value
    return values


def read_evaluation(workdir: str | os.PathLike, step: int) -> dict[str, float]:
    """What `metrics.jsonl` has of the evaluations after a step: finite values by their names.

    Args:
      workdir: folder of the run.
      step: the number of updates done.
    """
    found: dict[str, Any] = {}
    for _, row in read_lines(pathlib.Path(workdir) / METRICS_FILE):
        if row.get('step') == step:
            found |= {name: value for name, value in row.items() if name.endswith(_EVALUATED)}
    return {name: float(v) for name, v in found.items() if isinstance(v, int | float)}


def read_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a `.jsonl` file, each with the object in it; none without such a file.

    The object is empty where a line holds none: the run was killed while it wrote, or the disk lost
    it.

    Raises:
      UserError: the file cannot be read, or has more than `MAX_LINES_BYTES`.
    """
    text = ''
    if path.exists():
        text = files.read_text(path, max_bytes=MAX_LINES_BYTES, errors='replace')
    rows = []
    for line in text.splitlines(keepends=True):
        try:
            row = files.parse_json(line)
        except ValueError:
            row = None
        rows.append((line, row if isinstance(row, dict) else {}))
    return rows


def format_duration(seconds: float) -> str:
    """A time span as people write it: `8 s`, `4 min 12 s`, `1 h 05 min`, `2 d 3 h`; `?` for NaN."""
    if not math.isfinite(seconds):
        return '?'
    seconds = max(0, round(seconds))
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f'{days} d {h} h'
    if hours:
        return f'{hours} h {m:02d} min'
    return f'{minutes} min {s:02d} s' if minutes else f'{s} s'


def format_rate(per_second: float) -> str:
    """A rate with three digits or more and thousands separated: `0.52`, `9.81`, `57.3`, `1,234`."""
    if not math.isfinite(per_second):
        return '?'
    digits = 0 if per_second >= 99.95 else 1 if per_second >= 9.995 else 2
    return f'{per_second:,.{digits}f}'


def _now() -> str:
    return datetime.datetime.now().isoformat(sep=' ', timespec='seconds')


def _remove_later_steps(path: pathlib.Path, start_step: int) -> int:
    """Rewrites a `.jsonl` file, atomically, without the lines of steps after `start_step`.

    The last line may be torn where the run was killed while it wrote; it belongs to a later step
    then, and is removed too.

    Returns:
      The number of other lines that are not JSON with a step (the disk lost them), which are
      removed as well.
    """
    lines = read_lines(path)
    kept, unreadable = [], 0
    for line, row in lines:
        if not line.endswith('\n'):
            continue
        try:
            if int(row['step']) <= start_step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            unreadable += 1
    if len(kept) < len(lines):
        files.write_text(path, ''.join(kept))
    return unreadable
