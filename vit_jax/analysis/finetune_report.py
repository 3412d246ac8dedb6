"""The page of a fine-tuning, `report.html`: candidates, what was chosen, how good it is."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.analysis import (
    report,
    report_charts,
    report_data,
    report_examples,
    report_tables,
    run_files,
)
from vit_jax.analysis.tables import Table
from vit_jax.data.dataset import Selection
from vit_jax.errors import UserError
from vit_jax.inference import features, metrics_report
from vit_jax.inference.metrics import Metrics
from vit_jax.run import telemetry
from vit_jax.run.finetuning import finetune, look, plans, results

ALIKE = 0.95  # cosine of features from which on images are shown as perhaps the same
_DOUBTFUL = 12  # images whose labels are doubted
_PAIRS = 8


def write(outcome: results.Outcome) -> pathlib.Path:
    """Writes the page; returns the file.

    Args:
      outcome: what came out.
    """
    state, parts = outcome.state, outcome.parts
    root = pathlib.Path(outcome.plan.dataset)
    prefix = f'{root.parent if root.is_file() else root}/'
    found = report_examples.of_outcomes(
        outcome.model,
        parts.test,
        np.arange(len(parts.test)),
        outcome.found,
        range(len(parts.test.class_names)),
        prefix,
        explained=0,
    )
    runs = [
        run_files.read(outcome.folder / plans.RUNS / run.name)
        for run in outcome.plan.runs[: report_charts.MAX_RUNS]
        if 'right' in state['scores'].get(run.name, {})
    ]
    assert isinstance(found.metrics, Metrics)  # as `open_parts` takes no other labels
    counts, notes = report_data.class_balance(parts.train, parts.test)
    with report_charts.themed():
        confusion = metrics_report.draw_confusion(found.metrics, title='Confusion matrix')
        reliability = metrics_report.draw_reliability(found.metrics, title='Calibration')
        balance = report_charts.class_balance(parts.train.class_names, counts)
        page = report.render_page(
            'finetune.html.j2',
            title=outcome.folder.name,
            folder=str(outcome.folder),
            verdict=_verdict(state, parts),
            candidates=candidates(state),
            probes=_probes(outcome),
            why=why(state),
            results=Table('Test images', ('', '>'), _results(found), ()),
            confusion=report_charts.to_svg(confusion, 'confusion'),
            reliability=report_charts.to_svg(reliability, 'calibration'),
            classes=report_tables.classes(found.metrics),
            found=found,
            doubtful=_doubtful(outcome, prefix),
            pairs=_pairs(outcome, prefix),
            alike=ALIKE,
            unreadable=[f'{error.key.removeprefix(prefix)}: {error.reason}'
                        for error in outcome.unreadable],
            balance=report_charts.to_svg(balance, 'balance'),
            notes=notes,
            charts=report_charts.curves(runs) if runs else [],
            commands=commands(outcome.folder, outcome.plan, outcome.state),
        )  # fmt: skip
    path = outcome.folder / finetune.REPORT_FILE
    files.write_text(path, page)
    return path


def last_line(state: Mapping[str, Any]) -> str:
    """What came out on the test images, in a line.

    Args:
      state: what `finetune.json` holds, of one that is finished.
    """
    result = state['result']
    low, high = result['interval']
    return (
        f'test: {100 * result["right"] / result["count"]:.1f} % of {result["count"]:,} images '
        f'(95 % interval {100 * low:.1f} to {100 * high:.1f})'
    )


def candidates(state: Mapping[str, Any]) -> Table:
    """All models, in the order in which they were made."""
    rows = []
    for name, told in state['scores'].items():
        if 'right' not in told:
            rows.append((name, told['what'], '', '', '', '', f'failed: {told["reason"]}'[:200]))
            continue
        steps = f'{told["steps"]:,}' if 'steps' in told else ''
        seconds = telemetry.format_duration(told['seconds']) if 'seconds' in told else ''
        share = f'{100 * told["right"] / told["count"]:.1f} % ({told["right"]:,})'
        chosen = 'chosen' if name == state.get('chosen') else ''
        rows.append((name, told['what'], share, f'{told["loss"]:.3f}', steps, seconds, chosen))
    count = next(iter(state['scores'].values()))['count']
    columns = ('', 'Trained', 'Validation accuracy>', 'Loss>', 'Steps>', 'Time>', '')
    return Table('Candidates', columns, rows, (f'Accuracy of {count:,} validation images.',))


def why(state: Mapping[str, Any]) -> str:
    """Why the model was chosen, in a sentence or two."""
    scores = {name: told for name, told in state['scores'].items() if 'right' in told}
    chosen = scores[state['chosen']]
    equal = [name for name, told in scores.items() if told['right'] == chosen['right']]
    text = f'{state["chosen"]} is right on the most validation images'
    if len(equal) > 1:
        others = f'{len(equal) - 1} others' if len(equal) > 2 else 'one other'
        text += f', as many as {others}, and has the smallest loss of these'
    text += '.'
    if state['chosen'] == plans.PROBE:
        text += ' Once chosen, it was fitted to these images as well.'
    if chosen['count'] < look.ENOUGH_VALIDATION:
        text += (
            f' {chosen["count"]:,} images are few to choose by: with others, another candidate '
            'may have been chosen.'
        )
    return text


def commands(folder: pathlib.Path, plan: plans.Plan, state: Mapping[str, Any]) -> list[str]:
    """Commands that do by hand what was done."""
    found = [plans.probe_command(plan), *(plans.command(folder, run) for run in plan.runs)]
    if between := state['scores'].get(plans.BETWEEN):
        found.append(plans.between_command(folder, between))
    return found


def _verdict(state: Mapping[str, Any], parts: look.Parts) -> Table:
    result = state['result']
    low, high = result['interval']
    rows = [
        ('Model', state['chosen']),
        ('Test accuracy', f'{100 * result["right"] / result["count"]:.1f} %'),
        ('95 % interval', f'{100 * low:.1f} to {100 * high:.1f} %'),
        ('Test images', f'{result["count"]:,}'),
    ]
    if state['chosen'] != plans.PROBE:
        of_probe = 100 * result['probe_right'] / result['count']
        gain, half = 100 * result['gain'], 100 * result['gain_half']
        rows.append(('Test accuracy of the probe', f'{of_probe:.1f} %'))
        rows.append(('Gain over the probe', f'{gain:+.1f} ± {half:.1f} points'))
    rows.append(('Time', telemetry.format_duration(state['spent'])))
    notes = [
        f'The model was chosen on {len(parts.val):,} validation images; the test images were '
        'predicted once, after that. Interval: Wilson. ±: half a 95 % interval, over the pairs of '
        'predictions of each image.'
    ]
    return Table('What came out', ('', '>'), rows, notes)


def _results(found: report_examples.Predictions) -> list[tuple[str, str]]:
    return [
        (name[0].upper() + name[1:], value) for name, value in metrics_report.summary(found.metrics)
    ]


def _probes(outcome: results.Outcome) -> Table:
    rows = [
        (result.chosen.name, result.chosen.setting, f'{100 * result.validation:.1f} %')
        for result in outcome.fitted.results
    ]
    note = (
        'Classifiers on features of the frozen model; each setting is the best of several, in '
        'cross-validation on the images to fit to. The best that is linear became the candidate.'
    )
    return Table('Probes', ('Probe', 'Setting', 'Accuracy>'), rows, (note,))


def _doubtful(outcome: results.Outcome, prefix: str) -> list[report_examples.Picture]:
    """Images to fit to whose labels a probe that did not see them finds the least likely."""
    result = next(r for r in outcome.fitted.results if r.logits is not None)
    logits, train = result.logits, outcome.fitted.train
    assert logits is not None
    logits = logits - logits.max(-1, keepdims=True)
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    label = train.label[result.held]
    of_label = share[np.arange(len(label)), label]
    wrong = np.flatnonzero(result.predicted != label)
    names = outcome.parts.train.class_names
    shown = []
    for row in wrong[np.argsort(of_label[wrong], kind='stable')][:_DOUBTFUL].tolist():
        told = {
            'right': names[label[row]],
            'predicted': names[result.predicted[row]],
            'mistaken': True,
            'confidence': float(share[row].max()),
            'probability': float(of_label[row]),
        }
        place = int(train.index[result.held[row]])
        shown += _picture(outcome.parts.train, place, prefix, **told)
    return shown


def _pairs(
    outcome: results.Outcome, prefix: str
) -> list[tuple[report_examples.Picture, report_examples.Picture, str]]:
    """Test images that look like images to fit to."""
    train, test, parts = outcome.fitted.train, outcome.test, outcome.parts
    names, shown = parts.train.class_names, []
    for place, other, cosine in features.near_copies(test.values, train.values, ALIKE)[:_PAIRS]:
        pair = []
        for source, found, row in ((parts.test, test, place), (parts.train, train, other)):
            name = names[found.label[row]]
            pair += _picture(source, int(found.index[row]), prefix, right=name, predicted=name)
        if len(pair) == 2:
            shown.append((pair[0], pair[1], f'{cosine:.3f}'))
    return shown


def _picture(
    source: Selection, index: int, prefix: str, **told: Any
) -> list[report_examples.Picture]:
    """A picture; none where the file has gone meanwhile."""
    try:
        return [report_examples.picture_of(source, index, prefix, **told)]
    except UserError:
        return []
