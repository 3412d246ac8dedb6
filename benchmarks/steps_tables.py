"""Tables of the results of `steps`: speed, start and memory, largest batches."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import record
from benchmarks.contestants import OURS
from vit_jax.analysis.tables import Table

_NAME = ('model', 'pixels>', 'dtype', 'batch>', 'who')


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return low, middle, high


def rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each contestant did in each cell."""
    return [row for cell in _cells(result) for row in cell['results']]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Speed in training and inference, and start-up with memory, or largest batches."""
    if 'largest' in result:
        return [_largest(result)]
    found = []
    for mode in ('training', 'inference'):
        cells = [cell for cell in result['cells'] if cell['mode'] == mode]
        if cells:
            per_core = result['settings'].get('inference_only')
            found.append(_per_core(cells, result) if per_core else _speed(mode, cells, result))
    found.append(_start_up(result))
    return found


def _cells(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return result.get('cells', result.get('largest'))


def _measured(
    cells: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(cell, row) of each contestant that was measured."""
    for cell in cells:
        for row in cell['results']:
            if 'error' not in row:
                yield cell, row


def _name(cell: Mapping[str, Any]) -> list[str]:
    return [str(cell[key]) for key in ('variant', 'image_size', 'dtype', 'batch') if key in cell]


def _speed(mode: str, cells: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Table:
    rows = []
    for cell, row in _measured(cells):
        low, median, high = quartiles(row['seconds'])
        rate = cell['flops_per_image'] * cell['batch'] / median
        ours = [r for r in cell['results'] if r['contestant'] == OURS and 'error' not in r]
        ratio = quartiles(ours[0]['seconds'])[1] / median if ours else None
        rows.append(
            [
                *_name(cell),
                row['contestant'],
                f'{cell["batch"] / median:.1f}',
                f'{cell["batch"] / high:.1f} - {cell["batch"] / low:.1f}',
                f'{rate / 1e12:.3g}',
                f'{100 * rate / cell["peak"]["flops"]:.0f} %' if cell['peak'] else 'unknown',
                f'{ratio:.2f}' if ratio else '',
            ]
        )
    columns = (*_NAME, 'images/s>', 'quartiles>', 'TFLOP/s>', 'of peak>', 'speed to ours>')
    notes = list(dict.fromkeys(_peak_note(cell) for cell in cells))
    return Table(
        f'{mode.capitalize()}: {record.machine(result)}', columns, rows, notes + _notes(result)
    )


def _per_core(cells: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Table:
    """What the original's inference_time wrote: images/s/core, of each step."""
    rows = []
    for cell, row in _measured(cells):
        rates = [cell['batch'] / seconds for seconds in row['seconds']]
        figures = (min(rates), max(rates), statistics.fmean(rates), statistics.pstdev(rates))
        rows.append([*_name(cell), row['contestant'], *(f'{figure:.1f}' for figure in figures)])
    columns = (*_NAME, 'min>', 'max>', 'mean>', 'std>')
    title = f'Inference, images/s/core (a core is a device; one is used): {record.machine(result)}'
    return Table(title, columns, rows, _notes(result))


def _start_up(result: Mapping[str, Any]) -> Table:
    rows = []
    for cell, row in _measured(result['cells']):
        facts = row['facts']
        compiled = [facts[key] for key in ('trace_s', 'compile_s') if key in facts]
        xla = facts.get('xla_flops')
        formula = cell['flops_per_image'] * cell['batch']
        rows.append(
            [
                *_name(cell),
                cell['mode'],
                row['contestant'],
                f'{sum(compiled):.1f}' if compiled else '',
                f'{row["ready_s"]:.1f}',
                f'{row["ready_warm_s"]:.1f}' if 'ready_warm_s' in row else '',
                f'{row["peak_memory"] / 2**30:.2f}',
                f'{xla / formula:.3f}' if xla else '',
            ]
        )
    columns = (
        *_NAME[:-1], 'step', 'who', 'compile s>', 'first step, cold s>', 'warm s>', 'peak GiB>',
        'XLA FLOPs / formula>',
    )  # fmt: skip
    notes = [
        'First step: from the start of the process to the end of its first step, cold without and '
        'warm with programs compiled by an earlier process. Memory: of the accelerator, or on a '
        'CPU of the process. Formula: all of the architecture; ours leaves out what nothing '
        'depends on in the last block, and XLA counts a loop, such as that of attention in chunks, '
        'as one pass.'
    ]
    return Table('Start and memory', columns, rows, notes)


def _largest(result: Mapping[str, Any]) -> Table:
    rows = []
    for cell, row in _measured(result['largest']):
        limit = row.get('limit') or cell['memory_gib'] * 2**30
        rows.append(
            [
                *(str(cell[key]) for key in ('variant', 'image_size', 'dtype', 'mode')),
                row['contestant'],
                f'{limit / 2**30:.1f}' if limit else 'all',
                f'{row["predicted"]:,}' if 'predicted' in row else '',
                f'{row["largest"]:,}',
            ]
        )
    columns = ('model', 'pixels>', 'dtype', 'step', 'who', 'GiB>', 'predicted>', 'measured>')
    notes = ['Measured: tried, each batch in a process of its own; the next larger try, at most '
             '6 % above, had too little memory. GiB: of the device, what JAX may use.']  # fmt: skip
    return Table(f'Largest batch: {record.machine(result)}', columns, rows, notes + _notes(result))


def _peak_note(cell: Mapping[str, Any]) -> str:
    if not cell['peak']:
        return 'Peak of the device: unknown; give --peak_tflops.'
    peak = cell['peak']
    return f'Peak, {cell["dtype"]}: {peak["flops"] / 1e12:.3g} TFLOP/s ({peak["source"]}).'


def _notes(result: Mapping[str, Any]) -> list[str]:
    described, *left_out = record.notes(result)
    errors = [
        f'{row["contestant"]} failed on {" ".join(_name(cell))} {cell["mode"]}: {row["error"]}.'
        for cell in _cells(result)
        for row in cell['results']
        if 'error' in row
    ]
    return [described, *errors, *left_out]
