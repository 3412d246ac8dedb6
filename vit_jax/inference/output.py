"""Predictions as text: a table, CSV, JSON Lines; progress and errors of the commands."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from vit_jax import files
from vit_jax.data.decode import BadImageError
from vit_jax.errors import UserError, extra, printable
from vit_jax.evaluate import Outcomes, Outputs
from vit_jax.inference import predict
from vit_jax.inference.task import NUMBERS, ONE_CLASS, Task

FORMATS = ('table', 'csv', 'jsonl')
CSV_HEADER = ('image', 'rank', 'label', 'class', 'probability', 'error')
NUMBERS_HEADER = ('image', 'number', 'value', 'unit', 'error')

_FORMULA = ('=', '+', '-', '@')  # how a formula begins; tabs and line breaks are escaped anyway

# Of a path: what `Task.values` gives, float32 [outputs], or why the image could not be read.
Write = Callable[[str, np.ndarray | BadImageError], None]


def make_writer(
    file: TextIO,
    form: str,
    class_names: Sequence[str],
    *,
    top_k: int = 0,
    threshold: float = 0.0,
    escape_formulas: bool = False,
    task: Task = ONE_CLASS,
) -> Write:
    """A function that writes predictions, one at a time, as soon as they are there.

    CSV has a row for each class that is shown; an image with none, because it cannot be read or no
    class reaches the threshold, has one row with its error or without a class. JSON Lines has one
    object for each image: `image`, and `predictions`, a list of `label`, `class`, `probability`; or
    `error`. The table leaves unreadable images to a report at the end. Probabilities have 6
    decimals in CSV and JSON, 4 in the table. Of a model of numbers, CSV has a row for each number,
    with its unit, and JSON Lines `numbers`, a list of `name`, `value`, `unit`. Names that a
    terminal must not get are escaped (see `errors.printable`); JSON has them in its own way, so
    that a program reads them as they are.

    Args:
      file: text, opened with `newline=''` for CSV.
      form: one of `FORMATS`.
      class_names: in label order.
      top_k: how many classes to show; 0 for all.
      threshold: only classes of at least this probability.
      escape_formulas: whether texts in CSV that a spreadsheet would run get a ' before them.
      task: of the model.
    """
    numbers = task.kind == NUMBERS
    units = [printable(task.unit(output)) for output in range(len(class_names))]
    class_names = [printable(name) for name in class_names]
    width = max(map(len, class_names))
    rows = csv.writer(file, lineterminator='\n')
    if form == 'csv':
        rows.writerow(NUMBERS_HEADER if numbers else CSV_HEADER)

    def write_row(cells: Sequence[object]) -> None:
        if escape_formulas:
            cells = [f"'{c}" if isinstance(c, str) and c.startswith(_FORMULA) else c for c in cells]
        rows.writerow(cells)

    def write(path: str, found: np.ndarray | BadImageError) -> None:
        shown, error = [], None
        if isinstance(found, BadImageError):
            error = printable(found.reason)
        else:
            chosen = predict.choose_outputs(found, task, top_k=top_k, threshold=threshold).tolist()
            shown = [(label, class_names[label], float(found[label])) for label in chosen]
        shown_path = printable(path)
        if form == 'csv':
            for rank, (label, name, value) in enumerate(shown, start=1):
                cells = (rank, label, name, f'{value:.6f}')
                write_row(
                    (shown_path, *((name, f'{value:.7g}', units[label]) if numbers else cells), '')
                )
            if not shown:
                write_row((shown_path, *[''] * (3 if numbers else 4), error or ''))
        elif form == 'jsonl':
            listed: list[dict[str, object]] = [
                {'name': name, 'value': float(f'{value:.7g}'), 'unit': task.unit(label)}
                if numbers
                else {'label': label, 'class': name, 'probability': round(value, 6)}
                for label, name, value in shown
            ]
            key = 'numbers' if numbers else 'predictions'
            record = {'error': error} if error else {key: listed}
            # The path as it is; what a terminal must not get is escaped as JSON does.
            line = json.dumps({'image': path} | record, ensure_ascii=False)
            file.write(
                (line if line.isprintable() else json.dumps({'image': path} | record)) + '\n'
            )
        elif error is None:
            lines = [
                f'  {name:<{width}}  {printable(task.text(value, label))}\n'
                for label, name, value in shown
            ]
            lines = lines or [f'  (no class of at least {threshold:g})\n']
            file.writelines([f'{shown_path}\n', *lines])

    return write


def check_outcomes(path: str, *, overwrite: bool) -> None:
    """Refuses what `write_outcomes` could not write, before there is anything to write."""
    if not path.endswith(('.csv', '.parquet')):
        raise UserError(f'--predictions {path}: the file is NAME.csv or NAME.parquet')
    files.check_output(path, overwrite=overwrite, flag='--predictions')
    if path.endswith('.parquet'):
        with extra('parquet'):
            import pyarrow  # noqa: F401


def write_outcomes(
    path: str | os.PathLike[str],
    keys: Sequence[str],
    found: Outcomes | Outputs,
    class_names: Sequence[str],
    task: Task = ONE_CLASS,
) -> None:
    """Writes what became of each labelled image, as CSV or, with the suffix .parquet, Parquet.

    Columns: image, true, predicted (names of classes), confidence (probability of the predicted
    class), probability (of the true class), rank (of the true class, from 1), readable; what an
    image that cannot be read does not have is empty. Of several classes: image, true and predicted
    (names with ; between them), 'probability of NAME' of each class, readable; of numbers: image,
    'NAME true' and 'NAME' of each, readable.

    Args:
      path: the file; replaced if it is there.
      keys: what the images are called.
      found: what became of them, in the same order.
      class_names: in label order.
      task: of these.
    """
    columns = {'image': list(map(printable, keys))}
    if isinstance(found, Outcomes):
        columns |= _of_one_class(found, class_names)
    else:
        columns |= _of_outputs(found, class_names, task)
    columns['readable'] = found.readable.tolist()
    with files.atomic_file(path) as part:
        if os.fspath(path).endswith('.parquet'):
            with extra('parquet'):
                import pyarrow
                from pyarrow import parquet
            parquet.write_table(pyarrow.table(columns), part)
            return
        with open(part, 'w', newline='', encoding='utf-8') as file:
            rows = csv.writer(file, lineterminator='\n')
            rows.writerow(columns)
            rows.writerows(zip(*columns.values(), strict=True))


def _of_outputs(found: Outputs, class_names: Sequence[str], task: Task) -> dict[str, list]:
    """Columns of several classes, or of numbers."""
    values, columns = task.values(found.output), dict[str, list]()
    names = list(map(printable, class_names))
    if task.kind != NUMBERS:
        for column, there in (('true', found.label > 0.5), ('predicted', values >= task.threshold)):
            columns[column] = [
                ';'.join(n for n, yes in zip(names, row, strict=True) if yes) for row in there
            ]
        columns['predicted'] = _where(found.readable, columns['predicted'])
    for i, name in enumerate(names):
        if task.kind == NUMBERS:
            columns[f'{name} true'] = found.label[:, i].tolist()
        column = name if task.kind == NUMBERS else f'probability of {name}'
        columns[column] = _where(found.readable, values[:, i].tolist())
    return columns


def _where(readable: np.ndarray, values: Sequence[Any]) -> list[Any]:
    return [value if ok else None for value, ok in zip(values, readable, strict=True)]


def _of_one_class(found: Outcomes, class_names: Sequence[str]) -> dict[str, list]:
    names = np.array([*map(printable, class_names), ''], object)  # label -1: not known
    columns = {
        'true': names[found.label].tolist(),
        'predicted': names[found.predicted].tolist(),
        'confidence': found.confidence.tolist(),
        'probability': np.exp(found.log_probability).tolist(),
        'rank': (1 + found.rank).tolist(),
    }
    told = ('predicted', 'confidence', 'probability', 'rank')
    return columns | {name: _where(found.readable, columns[name]) for name in told}


@contextlib.contextmanager
def progress_bar(count: int, *, shares_terminal: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal.

    Args:
      count: images to come.
      shares_terminal: whether lines are printed to standard output meanwhile.

    Yields:
      A function that moves the bar by a number of images.
    """
    if not sys.stderr.isatty():
        yield lambda images: None
        return
    from rich import console, progress

    bar = progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
        transient=True,
        # Lines for the same terminal go above the bar; a pipe is not rich's to write to.
        redirect_stdout=shares_terminal and sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task('', total=count)
        yield lambda images: bar.advance(task, images)


def report_unreadable(errors: Sequence[BadImageError], count: int) -> int:
    """Names the images that could not be read, on standard error.

    Args:
      errors: one for each of them.
      count: of all images.

    Returns:
      The exit status: 1 if there are any, else 0.
    """
    if not errors:
        return 0
    sys.stdout.flush()
    print(f'{len(errors)} of {count} images could not be read:', file=sys.stderr)
    for error in errors:
        print(f'  {printable(f"{error.key}: {error.reason}")}', file=sys.stderr)
    return 1
