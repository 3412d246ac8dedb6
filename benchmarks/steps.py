"""Training steps and inference, ours beside its peers: the measurement of scripts/benchmark.py."""

import argparse
import contextlib
import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import contestants, largest, record, steps_tables, turns
from benchmarks.contestants import Cell, Contestant
from vit_jax.analysis import architecture, counts, devices
from vit_jax.errors import UserError

KIND = record.Kind('benchmark.py', 'vit_jax benchmark', 1, steps_tables.tables, steps_tables.rows)


@dataclasses.dataclass(frozen=True)
class Timing:
    """How much is timed.

    Attributes:
      rounds: timings of each contestant.
      steps: in each timing; 0: as many as take `seconds`.
      seconds: that one timing takes about.
      warmup: steps of each contestant that are not timed, after its first.
      warm_start: whether to start each contestant twice, to time its first step also with programs
        that were compiled before.
      timeout: seconds after which a contestant that does not answer has failed.
    """

    rounds: int = 10
    steps: int = 0
    seconds: float = 1.0
    warmup: int = 2
    warm_start: bool = True
    timeout: float = 1800.0

    def check(self) -> None:
        """Raises `UserError` for what cannot be."""
        if self.rounds < 1 or self.steps < 0 or self.warmup < 0:
            raise UserError('--rounds is at least 1, --steps and --warmup are at least 0')
        if not (self.seconds > 0 and self.timeout > 0):
            raise UserError('--seconds and --timeout are above 0')


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures every cell that the options of scripts/benchmark.py describe.

    Returns:
      `cells`, or `largest` with --largest-batch, `left_out` (why which contestant did not take
      part), and `settings`, as JSON; see `steps_tables`.

    Raises:
      UserError: options that are not possible; wrong names are refused before measuring.
    """
    timing = _timing(args)
    timing.check()
    if args.cores < 0 or min(args.batch) < 1 or args.num_classes < 1:
        raise UserError('--batch and --num_classes are at least 1, --cores at least 0')
    if args.peak_tflops is not None and not args.peak_tflops > 0:
        raise UserError(f'--peak_tflops {args.peak_tflops:g}: expected a number above 0')
    if args.device:
        stated_peak(args.device, 'float32')
    labels = contestants.parse(args.contestants)
    cells, done = _cells(args), []
    left_out: dict[str, None] = {}
    for cell in cells:
        reasons = {c.label: c.reason_to_leave_out(cell.model_config, cell.dtype) for c in labels}
        left_out |= {f'{label}: {reason}': None for label, reason in reasons.items() if reason}
        takes_part = [c for c in labels if not reasons[c.label]]
        name = f'{cell.variant} {cell.image_size} px, {cell.dtype}, {cell.batch}, {cell.mode}'

        def say(text: str, name: str = name) -> None:
            record.say(f'{name}: {text}')

        if args.largest_batch:
            rows = largest.measure(cell, takes_part, args.timeout, args.memory_gib, say)
            names = {key: getattr(cell, key) for key in ('variant', 'image_size', 'dtype', 'mode')}
            done.append(names | {'memory_gib': args.memory_gib, 'results': rows})
            continue
        products = [Contestant(label, label) for label in contestants.MATMULS]
        products = [c for c in products if not c.missing()]
        rows = time_cell(cell, takes_part + products, timing, say)
        count = len(takes_part)
        done.append(_describe(args, cell, rows[:count], rows[count:]))
    if args.largest_batch:
        return {'left_out': list(left_out), 'largest': done}
    settings = {'inference_only': args.inference_only, **dataclasses.asdict(timing)}
    return {'left_out': list(left_out), 'settings': settings, 'cells': done}


def time_cell(
    cell: Cell,
    people: Sequence[Contestant],
    timing: Timing,
    say=lambda text: None,
) -> list[dict[str, Any]]:
    """Starts contestants and times them in turns.

    Args:
      cell: what they do.
      people: the contestants.
      timing: how much of it.
      say: called with progress messages.

    Returns:
      For each contestant a dict, as JSON: `contestant`, and either `error`, or `facts`, `ready_s`
      (from the start of its process to the end of its first step: with nothing compiled before, and
      `ready_warm_s`, with everything), `steps` (in a timing), `seconds` (per step, of each round)
      and `peak_memory` (bytes).
    """
    rows: dict[str, dict[str, Any]] = {c.label: {'contestant': c.label} for c in people}
    tasks = {}
    with contextlib.ExitStack() as stack:
        for contestant in people:
            say(f'{contestant.label}: starts')
            row = rows[contestant.label]
            try:
                child = _start(cell, contestant, timing, stack, row)
            except turns.ContestantError as error:
                rows[contestant.label] = {'contestant': contestant.label, 'error': str(error)}
                continue
            tasks[contestant.label] = functools.partial(child.time, row['steps'])
        answers, errors = turns.take_turns(tasks, timing.rounds, say=say)
    for label, found in answers.items():
        if label in errors:
            rows[label] = {'contestant': label, 'error': errors[label]}
            continue
        rows[label]['seconds'] = [answer['seconds'] / rows[label]['steps'] for answer in found]
        rows[label]['peak_memory'] = found[-1]['peak_memory']
    return list(rows.values())


def _start(
    cell: Cell,
    contestant: Contestant,
    timing: Timing,
    stack: contextlib.ExitStack,
    row: dict[str, Any],
) -> turns.Child:
    """Starts one, cold and if requested also warm; warms up; chooses how many steps to time."""
    cached = contestant.name != contestants.ORIGINAL  # which kept no programs
    cache = stack.enter_context(tempfile.TemporaryDirectory()) if cached else ''
    start = functools.partial(
        turns.Child, contestant.command, cell.setup(contestant), timing.timeout, cache=cache
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
    row['steps'] = timing.steps
    if not timing.steps:
        row['steps'] = max(1, math.ceil(timing.seconds / child.time(1)['seconds']))
    return child


def _timing(args: argparse.Namespace) -> Timing:
    rounds, steps, warmup = (30, 1, 10) if args.inference_only else (10, 0, 2)
    if args.inference_only and args.steps not in (None, 1):
        raise UserError('--inference-only times each step alone: leave --steps out')
    return Timing(
        rounds=rounds if args.rounds is None else args.rounds,
        steps=steps if args.steps is None else args.steps,
        seconds=args.seconds,
        warmup=warmup if args.warmup is None else args.warmup,
        warm_start=not args.skip_warm_start,
        timeout=args.timeout,
    )


def _cells(args: argparse.Namespace) -> list[Cell]:
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
                Cell(
                    variant, config, args.num_classes, size, dtype, batch, mode, args.data,
                    args.cores,
                )
                for dtype in args.dtype
                for batch in args.batch
                for mode in (['inference'] if args.inference_only else args.modes)
            ]  # fmt: skip
    return cells


def _describe(
    args: argparse.Namespace,
    cell: Cell,
    rows: list[dict[str, Any]],
    products: list[dict[str, Any]],
) -> dict[str, Any]:
    """The result of a cell; `UserError` if a contestant did other work than ours."""
    arguments = (cell.model_config, cell.num_classes, cell.image_size)
    macs = counts.training_macs if cell.mode == 'training' else counts.forward_macs
    expected = counts.parameters(*arguments)
    for row in rows:
        parameters = row.get('facts', {}).get('parameters')
        if parameters not in (None, expected):
            raise UserError(
                f'{row["contestant"]} has {parameters:,} parameters, and {cell.variant} '
                f'{expected:,}: it would not be the same work'
            )
    names = ('variant', 'image_size', 'num_classes', 'dtype', 'batch', 'mode')
    return {name: getattr(cell, name) for name in names} | {
        'data': pathlib.Path(cell.data).name if cell.data else 'made up',
        'flops_per_image': 2 * macs(*arguments),
        'peak': _peak(args, cell, rows, products),
        'results': rows,
        'matrix_products': products,
    }


def _peak(
    args: argparse.Namespace,
    cell: Cell,
    rows: Sequence[Mapping[str, Any]],
    products: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
    """FLOP/s that the share is of, and where that comes from."""
    if args.peak_tflops:
        return {'flops': 1e12 * args.peak_tflops, 'source': 'as given'}
    if args.device:
        return stated_peak(args.device, cell.dtype)
    facts = [row['facts'] for row in rows if 'facts' in row]
    gpus = [f['device'] for f in facts if f['platform'] == 'gpu']
    if gpus:
        return published_peak(gpus[0], cell.dtype)
    rates = {
        row['contestant']: row['facts']['flops'] / steps_tables.quartiles(row['seconds'])[1]
        for row in products
        if 'error' not in row
    }
    if not rates:
        return None
    best = max(rates, key=lambda name: rates[name])
    library = 'PyTorch' if best == 'torch-matmul' else 'XLA'
    source = f'measured in the same run: a square matrix product of {library}, median'
    return {'flops': rates[best], 'source': source}


def published_peak(kind: str, dtype: str) -> dict[str, Any] | None:
    """The peak rate of an accelerator that calls itself `kind`, such as 'NVIDIA H200'.

    Returns:
      See `stated_peak`; None for a device that is not in the table.
    """
    plain = kind.lower().replace('nvidia', '').replace('geforce', '').replace(' ', '-').strip('-')
    # The longest name that fits: 'a100-40gb' rather than 'a100'.
    fitting = [n for n in devices.DEVICES if n in plain or n in plain.replace('-', '')]
    return stated_peak(max(fitting, key=len), dtype) if fitting else None


def stated_peak(name: str, dtype: str) -> dict[str, Any]:
    """The peak rate of a device of `devices.DEVICES`: `flops` (per second) and `source`.

    Args:
      name: such as 'h200'.
      dtype: 'float32' or 'bfloat16'.

    Raises:
      UserError: it is not in the table.
    """
    try:
        device = devices.get(name)
    except UserError as error:
        raise UserError(str(error).replace('--memory_gib and ', '')) from error
    return {'flops': 1e12 * device.peak(dtype), 'source': device.source}
