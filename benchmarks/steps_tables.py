"""Tables of the results of `steps`: speed, start and memory, largest batches."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.contestants import OURS
from vit_jax.analysis.tables import Table

Cell = Mapping[str, Any]
_NAME = ('model', 'pixels>', 'dtype', 'batch>', 'who')


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
    return [*found, _start_up(result)]


def _measured(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Mapping[str, Any], list[str]]]:
    """(cell, row, first columns of the table) of each contestant that was measured."""
    for cell in cells:
        for row in cell['results']:
            if 'error' not in row:
                yield cell, row, [*_name(cell), row['contestant']]


def _name(cell: Cell) -> list[str]:
    return [str(cell[key]) for key in ('variant', 'image_size', 'dtype', 'batch') if key in cell]


def _speed(mode: str, cells: Sequence[Cell], result: Mapping[str, Any]) -> Table:
    rows = []
    ours = {
        id(cell): np.median(row['seconds'])
        for cell, row, _ in _measured(cells)
        if row['contestant'] == OURS
    }
    for cell, row, name in _measured(cells):
        low, median, high = np.percentile(row['seconds'], (25, 50, 75))
        rate = cell['flops_per_image'] * cell['batch'] / median
        rows.append([
            *name,
            f'{cell["batch"] / median:.1f}',
            f'{cell["batch"] / high:.1f} - {cell["batch"] / low:.1f}',
            f'{rate / 1e12:.3g}',
            f'{100 * rate / cell["peak"]["flops"]:.0f} %' if cell['peak'] else 'unknown',
            f'{ours[id(cell)] / median:.2f}' if id(cell) in ours else '',
        ])  # fmt: skip
    columns = (*_NAME, 'images/s>', 'quartiles>', 'TFLOP/s>', 'of peak>', 'speed to ours>')
    notes = list(dict.fromkeys(map(_peak_note, cells)))
    title = f'{mode.capitalize()}: {record.machine(result)}'
    return Table(title, columns, rows, notes + _notes(result))


def _per_core(cells: Sequence[Cell], result: Mapping[str, Any]) -> Table:
    """The figures of the original's inference_time: images/s/core, of each step."""
    rows = []
    for cell, row, name in _measured(cells):
        rates = [cell['batch'] / seconds for seconds in row['seconds']]
        figures = (min(rates), max(rates), statistics.fmean(rates), statistics.pstdev(rates))
        rows.append([*name, *(f'{figure:.1f}' for figure in figures)])
    columns = (*_NAME, 'min>', 'max>', 'mean>', 'std>')
    title = f'Inference, images/s/core (a core is a device; one is used): {record.machine(result)}'
    return Table(title, columns, rows, _notes(result))


def _start_up(result: Mapping[str, Any]) -> Table:
    rows = []
    for cell, row, (*name, who) in _measured(result['cells']):
        facts = row['facts']
        compiled = [facts[key] for key in ('trace_s', 'compile_s') if key in facts]
        formula = cell['flops_per_image'] * cell['batch']
        rows.append([
            *name,
            cell['mode'],
            who,
            f'{sum(compiled):.1f}' if compiled else '',
            f'{row["ready_s"]:.1f}',
            f'{row["ready_warm_s"]:.1f}' if 'ready_warm_s' in row else '',
            f'{row["peak_memory"] / 2**30:.2f}',
            f'{facts["xla_flops"] / formula:.3f}' if facts.get('xla_flops') else '',
        ])  # fmt: skip
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
    for cell, row, (*name, who) in _measured(result['largest']):
        limit = row.get('limit') or cell['memory_gib'] * 2**30
        rows.append([
            *name,
            cell['mode'],
            who,
            f'{limit / 2**30:.1f}' if limit else 'all',
            f'{row["predicted"]:,}' if 'predicted' in row else '',
            f'{row["largest"]:,}',
        ])  # fmt: skip
    columns = ('model', 'pixels>', 'dtype', 'step', 'who', 'GiB>', 'predicted>', 'measured>')
    notes = ['Measured: tried, each batch in a process of its own; the next larger try, at most '
             '6 % above, had too little memory. GiB: of the device, what JAX may use.']  # fmt: skip
    return Table(f'Largest batch: {record.machine(result)}', columns, rows, notes + _notes(result))


def _peak_note(cell: Cell) -> str:
    if not cell['peak']:
        return 'Peak of the device: unknown; give --peak_tflops.'
    peak = cell['peak']
    return f'Peak, {cell["dtype"]}: {peak["flops"] / 1e12:.3g} TFLOP/s ({peak["source"]}).'


def _notes(result: Mapping[str, Any]) -> list[str]:
    described, *left_out = record.notes(result)
    errors = [
        f'{row["contestant"]} failed on {" ".join(_name(cell))} {cell["mode"]}: {row["error"]}.'
        for cell in result.get('cells', result.get('largest'))
        for row in cell['results']
        if 'error' in row
    ]
    return [described, *errors, *left_out]
