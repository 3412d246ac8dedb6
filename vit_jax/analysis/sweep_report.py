"""The page of a sweep, `sweep.html`: its trials in a table and in charts, and what was chosen."""

import dataclasses
import math
import pathlib
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax import files
from vit_jax.analysis import report, report_charts, run_files
from vit_jax.analysis.tables import Table
from vit_jax.inference import contact_sheet
from vit_jax.run import choice, sweep, telemetry

if TYPE_CHECKING:
    import optuna

REPORT_FILE = 'sweep.html'
_STATES = {
    'COMPLETE': '', 'PRUNED': 'ended early', 'FAIL': 'failed', 'RUNNING': 'under way',
    'WAITING': 'waiting',
}  # fmt: skip


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the page of a sweep, in whatever state it is; returns the file.

    Args:
      folder: of the sweep.
    """
    plan = files.read_json(folder / sweep.PLAN_FILE)
    knobs = [*plan['grid'], *plan['ranges']]
    trials = sweep.open_study(folder).get_trials(deepcopy=False)
    trials = sorted(trials, key=lambda trial: -_value(trial))
    result: Mapping[str, Any] = {}
    if (folder / sweep.RESULT_FILE).exists():
        result = files.read_json(folder / sweep.RESULT_FILE)
    scored = [trial for trial in trials if trial.values or trial.intermediate_values]
    best = [folder / sweep.TRIALS / str(trial.number) for trial in scored]
    best = [workdir for workdir in best if (workdir / telemetry.METRICS_FILE).exists()]
    runs = [
        dataclasses.replace(run, name=f'trial {run.name}')
        for run in run_files.read_all(best[: report_charts.MAX_RUNS])
    ]
    ended = [trial for trial in trials if trial.values]
    with report_charts.themed():
        page = report.render_page(
            'sweep.html.j2',
            title=folder.absolute().name,
            folder=str(folder.absolute()),
            state=f'{len(ended)} of {len(trials)} trials ran to their end',
            chosen=_chosen(result),
            trials=_trials(trials, knobs),
            settings=[
                report_charts.to_svg(_by_knob(ended, knob), f'knob{number}')
                for number, knob in enumerate(knobs)
                if ended
            ],
            charts=report_charts.curves(runs),
        )
    files.write_text(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def _value(trial: 'optuna.trial.FrozenTrial') -> float:
    """What to sort by: the score; of trials that did not end, the last one that is known."""
    if trial.values:
        return trial.values[0]
    known = trial.intermediate_values
    return known[max(known)] - 1e6 if known else -math.inf


def _trials(trials: 'Sequence[optuna.trial.FrozenTrial]', knobs: Sequence[str]) -> Table:
    names = [knob.removeprefix('config.') for knob in knobs]
    rows = []
    for trial in trials:
        told = trial.user_attrs
        values = [trial.params.get(knob, trial.system_attrs.get('fixed_params', {}).get(knob, ''))
                  for knob in knobs]  # fmt: skip
        score = sweep.score_in_words(told['metric'], trial.values[0]) if trial.values else ''
        seconds = telemetry.format_duration(told['seconds']) if 'seconds' in told else ''
        state = (
            textwrap.shorten(told.get('reason', ''), 160, placeholder=' …')
            or _STATES[trial.state.name]
        )
        rows.append((
            f'trial {trial.number}',
            *(f'{v:.4g}' if isinstance(v, float) else str(v) for v in values),
            score, f'{told["steps"]:,}' if told.get('steps') else '', seconds, state,
        ))  # fmt: skip
    metric = next((trial.user_attrs['metric'] for trial in trials if trial.values), 'score')
    columns = ('', *(f'{name}>' for name in names), f'{metric}>', 'Steps>', 'Time>', '')
    notes = ('The best first. The score is that of the validation images.',)
    return Table('Trials', columns, rows, notes)


def _chosen(result: Mapping[str, Any]) -> Table:
    if not result:
        return Table('Chosen', ('', ''), (), ('Nothing is chosen yet: the sweep has not ended.',))
    score = sweep.score_in_words(result['metric'], result['score'])
    rows = [
        ('Settings', sweep.in_words(result['settings'])),
        (f'Trial {result["trial"]}, {result["metric"]}', score),
        ('Validation images', f'{result["validation_images"]:,}'),
    ]
    seeds = result['seeds']
    for name in (name for name in (seeds[0] if seeds else ()) if name.endswith('_test')):
        values = [each[name] for each in seeds]
        each = ', '.join(f'{value:.4f}' for value in values)
        spread = f' ± {statistics.stdev(values):.4f}' if len(values) > 1 else ''
        rows.append(
            (
                f'{name}, mean of {len(values)} seeds',
                f'{statistics.mean(values):.4f}{spread} ({each})',
            )
        )
    note = (
        'The score of the best of many trials flatters; the test images were predicted with the '
        'chosen settings alone, once for each seed. ±: standard deviation over seeds.'
    )
    return Table('Chosen', ('', ''), rows, (note,))


def _by_knob(trials: 'Sequence[optuna.trial.FrozenTrial]', knob: str):
    """The score of each trial by its value of one knob."""
    from matplotlib import ticker

    figure = contact_sheet.new_figure(4.4, 2.8)
    axes = figure.subplots()
    metric = trials[0].user_attrs['metric']
    percent = metric.startswith('accuracy')
    factor = 100 if percent else choice.JUDGES[metric]
    scores = [factor * trial.values[0] for trial in trials]
    values = [trial.params[knob] for trial in trials]
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        names = sorted(set(values))
        axes.set_xticks(range(len(names)), names, parse_math=False)
        numbers = [names.index(value) for value in values]
    else:
        if min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
            axes.set_xscale('log')
            steps = (1, 2, 5) if max(numbers) < 1000 * min(numbers) else (1,)
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps))
            axes.xaxis.set_major_formatter('{x:g}')
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.plot(numbers, scores, 'o', color=report_charts.SERIES[0], alpha=0.7)
    axes.plot(numbers[:1], scores[:1], 'o', markersize=10, fillstyle='none',
              color=report_charts.SERIES[1])  # fmt: skip
    axes.set(xlabel=knob.removeprefix('config.'), axisbelow=True,
             ylabel=f'{metric} (%)' if percent else metric)  # fmt: skip
    axes.set_title('each trial; the best is ringed', fontsize=9)
    axes.grid(True)
    axes.margins(0.1)
    return figure
