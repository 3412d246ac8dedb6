"""Training steps and inference, ours beside its peers: the measurement of scripts/benchmark.py."""

import argparse
import contextlib
import functools
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import contestants, largest, record, steps_tables, turns
from benchmarks.contestants import Contestant
from vit_jax.analysis import architecture, counts, devices
from vit_jax.errors import UserError

KIND = record.Kind('benchmark.py', 'vit_jax benchmark', 1, steps_tables.tables)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures every cell that the options of scripts/benchmark.py describe.

    Returns:
      `cells`, or `largest` with --largest-batch, `left_out` (why which contestant did not take
      part), and `settings`, for JSON; see `steps_tables`.

    Raises:
      UserError: options that are not possible; wrong names are refused before measuring.
    """
    _check(args)
    people = contestants.parse(args.contestants)
    cells, done = _cells(args), []
    left_out: dict[str, None] = {}
    for cell in cells:
        takes_part = []
        for contestant in people:
            reason = contestant.reason_to_leave_out(cell['model_config'], cell['dtype'])
            if reason:
                left_out[f'{contestant.label}: {reason}'] = None
            else:
                takes_part.append(contestant)

        def say(text: str, cell: Mapping[str, Any] = cell) -> None:
            names = '{variant} {image_size} px, {dtype}, {batch}, {mode}'.format_map(cell)
            record.say(f'{names}: {text}')

        if args.largest_batch:
            named = {key: cell[key] for key in ('variant', 'image_size', 'dtype', 'mode')}
            rows = largest.measure(cell, takes_part, args.timeout, args.memory_gib, say)
            done.append(named | {'memory_gib': args.memory_gib, 'results': rows})
            continue
        products = [c for c in map(Contestant, contestants.MATMULS) if not c.missing()]
        rows = time_cell(cell, takes_part + products, args, say)
        count = len(takes_part)
        done.append(_describe(args, cell, rows[:count], rows[count:]))
    if args.largest_batch:
        return {'left_out': list(left_out), 'largest': done}
    names = ('inference_only', 'rounds', 'steps', 'seconds', 'warmup', 'warm_start', 'timeout')
    settings = {name: getattr(args, name) for name in names}
    return {'left_out': list(left_out), 'settings': settings, 'cells': done}


def time_cell(
    cell: Mapping[str, Any],
    people: Sequence[Contestant],
    timing: argparse.Namespace,
    say=lambda text: None,
) -> list[dict[str, Any]]:
    """Starts contestants and times them in turns.

    Args:
      cell: what they do, see `contestants`.
      people: the contestants.
      timing: `rounds`, `steps` in a timing (0: as many as take `seconds`), `warmup` (steps that are
        not timed), `warm_start` (start each twice: its first step is timed with programs that were
        compiled before, too) and `timeout` (seconds to wait for an answer).
      say: called with progress messages.

    Returns:
      For each contestant a dict, for JSON: `contestant`, and either `error`, or `facts`, `ready_s`
      (from the start of its process to the end of its first step: with nothing compiled before, and
      `ready_warm_s`, with everything), `steps` (in a timing), `seconds` (per step, of each round)
      and `peak_memory` (bytes).
    """
    rows: dict[str, dict[str, Any]] = {c.label: {'contestant': c.label} for c in people}
    tasks, errors = {}, {}
    with contextlib.ExitStack() as stack:
        for contestant in people:
            label = contestant.label
            say(f'{label}: starts')
            try:
                tasks[label] = _start(cell, contestant, timing, stack, rows[label])
            except turns.ContestantError as error:
                errors[label] = str(error)
        answers, failed = turns.take_turns(tasks, timing.rounds, say=say)
    for label, found in answers.items():
        if label not in failed:
            rows[label]['seconds'] = [a['seconds'] / rows[label]['steps'] for a in found]
            rows[label]['peak_memory'] = found[-1]['peak_memory']
    for label, text in (errors | failed).items():
        rows[label] = {'contestant': label, 'error': text}
    return list(rows.values())


def _start(
    cell: Mapping[str, Any],
    contestant: Contestant,
    timing: argparse.Namespace,
    stack: contextlib.ExitStack,
    row: dict[str, Any],
) -> functools.partial[dict[str, Any]]:
    """Starts one, cold and if requested also warm; warms up; returns what times its steps."""
    cached = contestant.name != contestants.ORIGINAL  # which kept no programs
    cache = stack.enter_context(tempfile.TemporaryDirectory()) if cached else ''
    start = functools.partial(
        turns.Child, contestant.module, contestant.setup(cell), timing.timeout, cache=cache
    )
    child = start()
    row |= {'facts': child.facts, 'ready_s': child.ready_s}
    if timing.warm_start and contestant.name not in contestants.MATMULS:
        child.close()
        child = start()
        row['ready_warm_s'] = child.ready_s
    stack.callback(child.close)
    if timing.warmup:
        child.time(timing.warmup)
    row['steps'] = timing.steps or max(1, math.ceil(timing.seconds / child.time(1)['seconds']))
    return functools.partial(child.time, row['steps'])


def _check(args: argparse.Namespace) -> None:
    """Fills in what depends on --inference-only; `UserError` for options that are not possible."""
    if args.inference_only and args.steps not in (None, 1):
        raise UserError('--inference-only times each step alone: leave --steps out')
    defaults = (30, 1, 10) if args.inference_only else (10, 0, 2)
    for name, default in zip(('rounds', 'steps', 'warmup'), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.rounds < 1 or args.steps < 0 or args.warmup < 0:
        raise UserError('--rounds is at least 1, --steps and --warmup are at least 0')
    if not (args.seconds > 0 and args.timeout > 0):
        raise UserError('--seconds and --timeout are above 0')
    if args.cores < 0 or min(args.batch) < 1 or args.num_classes < 1:
        raise UserError('--batch and --num_classes are at least 1, --cores at least 0')
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UserError(f'--peak_tflops {args.peak_tflops:g}: expected a number above 0')
    if args.device:
        devices.get(args.device)  # refuses a name that is not in the table


def _cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells of the command line; raises `UserError` for wrong names and sizes."""
    cells = []
    for variant in args.variants:
        for size in args.image_size:
            found = architecture.find(variant, '', args.num_classes, size)
            config = dict(found.model_config)
            if 'transformer' in config:
                # The peers have no dropout at the same places: none for anybody.
                config['transformer'] = config['transformer'] | {'dropout_rate': 0.0}
            cells += [
                {
                    'variant': variant, 'model_config': config, 'num_classes': args.num_classes,
                    'image_size': size, 'dtype': dtype, 'batch': batch, 'mode': mode,
                    'data': args.data, 'cores': args.cores,
                }
                for dtype in args.dtype
                for batch in args.batch
                for mode in (['inference'] if args.inference_only else args.modes)
            ]  # fmt: skip
    return cells


def _describe(
    args: argparse.Namespace,
    cell: Mapping[str, Any],
    rows: list[dict[str, Any]],
    products: list[dict[str, Any]],
) -> dict[str, Any]:
    """The result of a cell; `UserError` if a contestant did other work than ours."""
    arguments = (cell['model_config'], cell['num_classes'], cell['image_size'])
    macs = counts.training_macs if cell['mode'] == 'training' else counts.forward_macs
    expected = counts.parameters(*arguments)
    for row in rows:
        parameters = row.get('facts', {}).get('parameters')
        if parameters not in (None, expected):
            raise UserError(
                f'{row["contestant"]} has {parameters:,} parameters, and {cell["variant"]} '
                f'{expected:,}: it would not be the same work'
            )
    names = ('variant', 'image_size', 'num_classes', 'dtype', 'batch', 'mode')
    return {name: cell[name] for name in names} | {
        'data': pathlib.Path(cell['data']).name if cell['data'] else 'made up',
        'flops_per_image': 2 * macs(*arguments),
        'peak': _peak(args, cell['dtype'], rows, products),
        'results': rows,
        'matrix_products': products,
    }


def _peak(
    args: argparse.Namespace,
    dtype: str,
    rows: Sequence[Mapping[str, Any]],
    products: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
    """The FLOP/s that shares are of, and where they come from."""
    if args.peak_tflops:
        return {'flops': 1e12 * args.peak_tflops, 'source': 'as given'}
    if args.device:
        return _peak_of(devices.get(args.device), dtype)
    facts = [row['facts'] for row in rows if 'facts' in row]
    gpus = [f['device'] for f in facts if f['platform'] == 'gpu']
    if gpus:
        return published_peak(gpus[0], dtype)
    rates = [
        (row['facts']['flops'] / float(np.median(row['seconds'])), row['contestant'])
        for row in products
        if 'error' not in row
    ]
    if not rates:
        return None
    rate, best = max(rates)
    library = 'PyTorch' if best == 'torch-matmul' else 'XLA'
    source = f'measured in the same run: a square matrix product of {library}, median'
    return {'flops': rate, 'source': source}


def published_peak(kind: str, dtype: str) -> dict[str, Any] | None:
    """The peak rate of an accelerator that calls itself `kind`, such as 'NVIDIA H200'.

    Returns:
      `flops` (per second) and `source`; None for a device that is not in the table.
    """
    plain = kind.lower().replace('nvidia', '').replace('geforce', '').replace(' ', '-').strip('-')
    # The longest name that fits: 'a100-40gb' rather than 'a100'.
    fitting = [n for n in devices.DEVICES if n in plain or n in plain.replace('-', '')]
    return _peak_of(devices.get(max(fitting, key=len)), dtype) if fitting else None


def _peak_of(device: devices.Device, dtype: str) -> dict[str, Any]:
    return {'flops': 1e12 * device.peak(dtype), 'source': device.source}
