"""The report of a run, `<workdir>/report.html`: one file that needs nothing else, and no network.

    run_files.py         reads the workdir
    report_charts.py     draws the curves
    report_data.py       opens the images again, and counts them
    report_examples.py   runs the model over test images
    report_tables.py     makes texts of numbers
    report_settings.py   tells what the run was given
    report.html.j2       the page

Whatever is not there, because the run is under way or the dataset has moved, is left out, and the
page says so.
"""

import datetime
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import vit_jax
from vit_jax import files
from vit_jax.analysis import report_charts, report_settings, report_tables, run_files
from vit_jax.analysis.run_files import Run
from vit_jax.errors import UserError, printable_lines

REPORT_FILE = 'report.html'


def write(
    workdirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    images: int | None = None,
) -> pathlib.Path:
    """Writes the report of a run, or of several beside each other.

    Args:
      workdirs: of the runs, finished or not; at most `report_charts.MAX_RUNS`, or any number of
        folds, whose curves are then left out.
      output: the file to write, replaced if it is there; of a single run `<workdir>/report.html` by
        default.
      images: how many test images of each run to predict at most; 0 for none, None for what
        `report_examples.image_limit` says.

    Returns:
      The file.

    Raises:
      UserError: a folder without a run, too many of them, or a file that cannot be written.
    """
    if isinstance(workdirs, str | os.PathLike):
        workdirs = [workdirs]
    if output is None:
        if len(workdirs) != 1:
            raise UserError('a report of several runs needs a place: name a file with --output')
        output = pathlib.Path(workdirs[0]) / REPORT_FILE
    runs = run_files.read_all(workdirs)
    if len(runs) > report_charts.MAX_RUNS and report_tables.folds(runs) is None:
        raise UserError(
            f'{len(runs)} runs have too many colours to tell apart; give at most '
            f'{report_charts.MAX_RUNS}'
        )
    files.write_text(output, render(runs, images=images))
    return pathlib.Path(output)


def write_at_end(workdir: str | os.PathLike[str], say: Callable[[str], None]) -> None:
    """Writes the report of a run that has just ended, and tells where it is.

    The run, whose model is saved, must not fail because of its report; so any error becomes a line
    instead of being raised.

    Args:
      workdir: of the run.
      say: gets the line, such as `Telemetry.info`.
    """
    try:
        path = write(workdir)
    except Exception as error:  # noqa: BLE001  (whatever it is, the run has succeeded)
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        say(
            f'WARNING: no report could be written ({reason}); the model is not affected. Try '
            f'again: vit_jax report {workdir}'
        )
    else:
        say(f'report: {path}')


def render(runs: Sequence[Run], *, images: int | None = None) -> str:
    """The page as HTML.

    Args:
      runs: of `run_files.read_all`; at least one.
      images: see `write`.
    """
    many = len(runs) > report_charts.MAX_RUNS
    with report_charts.themed():
        return render_page(
            'report.html.j2',
            runs=[(run, _examples(run, number, images)) for number, run in enumerate(runs)],
            title=', '.join(run.name for run in runs),
            charts=[] if many else report_charts.curves(runs),
            no_charts=f'Left out: {len(runs)} runs.' if many else 'No step has been logged yet.',
            summary=report_tables.summary(runs),
            folds=report_tables.folds(runs),
            differences=report_settings.differences(runs),
            tables=report_tables,
            settings=report_settings,
        )


def render_page(template: str, **values: Any) -> str:
    """A page as HTML.

    Args:
      template: extends `page.html.j2`.
      **values: what it shows.
    """
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('vit_jax', 'analysis'),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters['svg'] = markupsafe.Markup  # what `report_charts.to_svg` made
    return environment.get_template(template).render(
        written=datetime.datetime.now().strftime('%Y-%m-%d %H:%M'),
        version=vit_jax.__version__,
        **values,
    )


def _printable(value: object) -> object:
    """Escapes what no page should hold in texts; what `report_charts.to_svg` made stays."""
    import markupsafe

    plain = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
    return printable_lines(value) if plain else value


def _examples(run: Run, number: int, images: int | None) -> dict[str, object]:
    """The parts of the page that need the data and the model, and notes on what is missing."""
    import jax

    from vit_jax.analysis import report_data, report_examples
    from vit_jax.data.examples import CLASS_INDEX
    from vit_jax.inference import metrics_report as classification_report
    from vit_jax.inference.metrics import Metrics

    parts: dict[str, object] = {'predictions': None, 'missing': '', 'balance': ''}
    parts['balance_title'] = 'Class balance'
    if run.of_pairs:
        note = (
            'Left out: pairs of images and texts have no classes. Results and curves have recalls.'
        )
        return parts | {'missing': note, 'balance_notes': (note,)}
    try:
        train, test = report_data.open_data(run)
    except UserError as error:
        note = f'Left out, because the images are not there: {error}.'
        return parts | {'missing': note, 'balance_notes': (note,)}
    if train.label_dtype == CLASS_INDEX or train.several:
        counts, notes = report_data.class_balance(train, test)
        sizes = {'training': len(train), 'test': len(test)} if train.several else None
        figure = report_charts.class_balance(train.class_names, counts, sizes)
    else:
        targets = {'training': np.asarray(train.targets()), 'test': np.asarray(test.targets())}
        figure, notes = report_charts.targets(train.class_names, targets), ()
        parts['balance_title'] = 'Targets'
    parts |= {'balance': report_charts.to_svg(figure, f'balance{number}'), 'balance_notes': notes}
    if images == 0:
        return parts | {'missing': 'Left out, as was asked for.'}
    if not run.finished:
        return parts | {'missing': 'There is no model folder yet: the run has not ended.'}
    try:
        found = report_examples.predict(run, test, images)
    except (UserError, jax.errors.JaxRuntimeError) as error:  # such as: no memory left
        return parts | {'missing': f'Left out: {" ".join(str(error).split())[:500]}.'}
    parts |= {'predictions': found, 'results': report_tables.results(found, run)}
    if not isinstance(found.metrics, Metrics):
        drawn = classification_report.pictures(found.metrics)
        return parts | {
            'confusion': '',
            'pictures': [
                report_charts.to_svg(draw('Test images'), f'picture{number}x{place}')
                for place, draw in enumerate(drawn.values())
            ],
            'details': report_tables.details(found.metrics),
        }
    confusion = classification_report.draw_confusion(found.metrics, title='Confusion matrix')
    reliability = classification_report.draw_reliability(found.metrics, title='Calibration')
    return parts | {
        'confusion': report_charts.to_svg(confusion, f'confusion{number}'),
        'many': len(found.metrics.class_names) > classification_report.LARGE,
        'reliability': report_charts.to_svg(reliability, f'calibration{number}'),
        'classes': report_tables.classes(found.metrics),
        'confused': report_tables.confused(found.metrics),
    }
