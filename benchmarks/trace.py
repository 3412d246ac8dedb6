"""Where the time of a step goes, from a trace of `jax.profiler`.

Read by `jax.profiler.ProfileData`, which needs no TensorFlow. A trace names the operations of the
compiled program; the program's text says which part of the model each of them came from.
"""

import argparse
import collections
import contextlib
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vit_jax.analysis import architecture, tables
from vit_jax.errors import UserError

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$')
_CALLS = re.compile(r' (?:fusion|call)\(.* (?:calls|to_apply)=%?([\w.\-]+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# These contain others, which are in the trace themselves.
_CONTAINERS = ('while', 'call', 'conditional')
# Instructions that compute nothing, and those of them that move numbers.
_MOVES = ('copy', 'transpose', 'concatenate', 'slice', 'dynamic-slice', 'dynamic-update-slice',
          'pad', 'gather', 'scatter', 'reverse', 'copy-start', 'copy-done')  # fmt: skip
_NOTHING = ('parameter', 'constant', 'broadcast', 'bitcast', 'reshape', 'convert', 'iota', 'tuple',
            'get-tuple-element', *_MOVES)  # fmt: skip
_ON_THE_WAY = 2
# Libraries' matrix products, convolutions and attention.
_PRODUCT = re.compile(r'gemm|matmul|dot|conv|fmha', re.IGNORECASE)
# Words of the modules that tell what is computed, beside matrix products; the first that fits.
_WORK = (
    (r'Dropout|random_bits|threefry', 'dropout'),
    (r'LayerNorm|encoder_norm|pre_head_layer_norm|GroupNorm|/gn', 'layer norm'),
    (r'\bgelu\b', 'GELU'),
    (r'/(query|key|value|out|embedding|head|Dense_\d+)/', 'biases'),
    (r'Attention', 'softmax'),
)


class Operation(NamedTuple):
    """An operation of a compiled program.

    Attributes:
      kind: of the instruction, 'fusion' or 'dot'.
      part: of the model that it comes from: 'backward Transformer/encoderblock_*/MlpBlock_0',
        or '(none)' where the compiler does not say.
      work: what it computes, or most of it where the compiler has fused several: 'matrix products'
        (with what is fused to them), 'softmax', 'layer norm', 'GELU', 'biases', 'dropout',
        'copies, transposes, broadcasts' (a sum or a product on the way is nothing beside them),
        'optimizer and loss' (all that is in no module), 'others' (additions).
    """

    kind: str
    part: str
    work: str = 'others'


class _Instruction(NamedTuple):
    """A line of a program: `calls` names the computation that it fuses."""

    name: str
    kind: str
    op_name: str
    calls: str
    target: str


def operations(hlo: str) -> dict[str, Operation]:
    """The operations of a compiled program, by their names in a trace.

    Args:
      hlo: its text, `compiled.as_text()`.
    """
    computations: dict[str, list[_Instruction]] = {'': []}
    inside = ''
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            rest = (
                found[1] if (found := pattern.search(line)) else ''
                for pattern in (_OP_NAME, _CALLS, _TARGET)
            )
            computations[inside].append(_Instruction(match[1], match[2], *rest))
        elif header := _COMPUTATION.match(line):
            inside = header[1]
            computations[inside] = []

    def fused(instruction: _Instruction) -> list[_Instruction]:
        """The instruction, or those that it consists of."""
        inner = computations.get(instruction.calls, []) if instruction.calls else []
        return [part for i in inner for part in fused(i)] or [instruction]

    return {
        i.name: Operation(i.kind, part_of(i.op_name), _work(fused(i)))
        for instructions in computations.values()
        for i in instructions
    }


def _work(instructions: list[_Instruction]) -> str:
    """See `Operation.work`."""
    if any(i.kind in ('dot', 'convolution') or _PRODUCT.search(i.target) for i in instructions):
        return 'matrix products'
    computing = [i for i in instructions if i.kind not in _NOTHING]
    moved = any(i.kind in ('copy', 'transpose') for i in instructions)
    if not computing or (moved and len(computing) <= _ON_THE_WAY):
        return 'copies, transposes, broadcasts'
    named = [i for i in computing if i.op_name] or computing
    return collections.Counter(_work_of_one(i.op_name) for i in named).most_common(1)[0][0]


def _work_of_one(op_name: str) -> str:
    for words, work in _WORK:
        if re.search(words, op_name):
            return work
    return 'optimizer and loss' if part_of(op_name).endswith(_REST) else 'others'


def part_of(op_name: str) -> str:
    """The part of the model that an operation belongs to.

    Args:
      op_name: metadata of the instruction, such as
        'jit(step)/transpose(jvp(VisionTransformer))/Transformer/encoderblock_3/MlpBlock_0/add'.

    Returns:
      The modules on the way to it, blocks not told apart; 'backward' in front where it computes
      gradients; 'optimizer and loss' for what is in no module.
    """
    if not op_name:
        return '(none)'
    backward = 'transpose(' in op_name
    words = [re.sub(r'_\d+$', '_*', w) if 'block' in w and 'Block' not in w else w
             for w in op_name.split('/')]  # fmt: skip
    # Modules are in front of the last word, which is the operation; functions have brackets.
    modules = [w for w in words[:-1] if re.fullmatch(r'[\w*]+', w) and w not in _NOISE]
    if not modules:
        inside = 'jvp(' in op_name or 'VisionTransformer' in op_name or 'MlpMixer' in op_name
        name = 'model, outside of its modules' if inside else _REST
        return f'backward {name}' if backward else name
    return ('backward ' if backward else '') + '/'.join(modules)


_REST = 'optimizer, loss and the rest'
_NOISE = ('shard_map', 'closed_call', 'while', 'body', 'cond', 'checkpoint', 'rematted_computation',
          'pjit', 'jit', 'vmap', 'branch_0_fun', 'branch_1_fun', 'custom_vjp_call')  # fmt: skip


def read(folder: str, known: Mapping[str, Operation]) -> dict[str, tuple[float, int]]:
    """Seconds and count of each operation in a trace.

    Args:
      folder: where `jax.profiler.trace` wrote.
      known: of `operations`; others (of other programs) are left out.

    Returns:
      name -> (seconds, count), over all of the trace. Seconds of operations that ran at the same
      time are added up.

    Raises:
      UserError: there is no trace, or it has none of these operations.
    """
    from jax.profiler import ProfileData

    files = sorted(pathlib.Path(folder).glob('**/*.xplane.pb'))
    if not files:
        raise UserError(f'the profiler wrote no trace to {folder}')
    found = collections.defaultdict[str, tuple[float, int]](lambda: (0.0, 0))
    for plane in ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            # A GPU's plane shows operations a second time, summed up in lines of their own.
            if plane.name.startswith('/device') and not line.name.startswith('Stream'):
                continue
            for event in line.events:
                name = next((str(value) for key, value in event.stats if key == 'hlo_op'), '')
                operation = known.get(name)
                if operation and operation.kind not in _CONTAINERS:
                    seconds, count = found[name]
                    found[name] = seconds + 1e-9 * event.duration_ns, count + 1
    if not found:
        raise UserError('none of the operations of the step is in the trace')
    return dict(found)


def profile(args: argparse.Namespace) -> list[tables.Table]:
    """Traces steps of ours.

    Args:
      args: options of scripts/profile_step.py.

    Returns:
      Tables by kind of work, by part of the model, and by operation of the compiled program.

    Raises:
      UserError, ValueError: no such model, or options that it refuses; the folder is there already.
    """
    import jax

    from benchmarks import jax_workload

    if args.output and pathlib.Path(args.output).exists():
        raise UserError(f'{args.output} is there already: name a new folder')
    found = architecture.find(args.variant, '', args.num_classes, args.image_size)
    options = {key: str(getattr(args, key)) for key in ('attention', 'remat', 'accum_steps')}
    setup = vars(args) | {'model_config': found.model_config, 'options': options, 'data': ''}
    workload = jax_workload.Ours(setup, {})
    workload.run(2)
    start = time.perf_counter()
    workload.run(args.steps)
    untraced = (time.perf_counter() - start) / args.steps
    known = operations(workload.function.as_text())
    with contextlib.ExitStack() as stack:
        folder = args.output or stack.enter_context(tempfile.TemporaryDirectory())
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            workload.run(args.steps)
            traced = (time.perf_counter() - start) / args.steps
        times = read(folder, known)
    busy = sum(seconds for seconds, _ in times.values()) / args.steps
    notes = [
        f'One step: {1e3 * untraced:.1f} ms, {1e3 * traced:.1f} ms while traced; the operations '
        f'together {1e3 * busy:.1f} ms (more than the step where several run at a time; less where '
        'the device waits).'
    ]
    labels = {
        'kind of work': {name: known[name].work for name in times},
        'part of the model': {name: known[name].part for name in times},
        'operation': {name: f'{known[name].kind} {name}: {known[name].part}' for name in times},
    }
    title = f'{found.name}, {args.image_size} px, {args.dtype}, batch {args.batch}, {args.mode}'
    return [
        tables.Table(
            f'{title}: time by {what}',
            (what, 'ms a step>', 'times>', 'share>'),
            _rank(times, label, args.steps, args.top),
            notes if what == 'kind of work' else (),
        )
        for what, label in labels.items()
    ]


def _rank(
    times: Mapping[str, tuple[float, int]], label: Mapping[str, str], steps: int, count: int
) -> list[tuple[str, ...]]:
    """Rows of sums by label: the `count` longest, and one row for the rest."""
    sums = collections.defaultdict[str, np.ndarray](lambda: np.zeros(2))
    for name, spent in times.items():
        sums[label[name]] += spent
    ranked = sorted(sums.items(), key=lambda item: -item[1][0])
    if rest := [spent for _, spent in ranked[count:]]:
        ranked[count:] = [(f'{len(rest)} others', np.sum(rest, axis=0))]
    total = sum(seconds for seconds, _ in times.values())
    return [
        (name, f'{1e3 * spent / steps:.2f}', f'{runs / steps:.0f}', f'{100 * spent / total:.1f} %')
        for name, (spent, runs) in ranked
    ]
