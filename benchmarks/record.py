"""Result files: what was measured on which machine, written, read and shown the same way by all."""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import vit_jax
from vit_jax import files
from vit_jax.analysis import tables
from vit_jax.errors import UserError

# Lines of a document between which --update writes.
MARKS = ('<!-- benchmark -->', '<!-- /benchmark -->')
PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'torchvision', 'timm', 'transformers',
    'simplejpeg', 'opencv-python-headless', 'pillow', 'grain', 'tensorflow-cpu', 'tensorflow',
    'onnx', 'onnxruntime', 'onnxscript',
)  # fmt: skip


class Kind(NamedTuple):
    """A kind of result.

    Attributes:
      script: the command that measures it.
      name: `kind` of its files.
      format: version of its files.
      tables: makes tables of a result.
    """

    script: str
    name: str
    format: int
    tables: Callable[[Mapping[str, Any]], Sequence[tables.Table]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `run` reads."""
    add = parser.add_argument
    add('--format', choices=tables.FORMATS, default='terminal', help='default: terminal')
    add('--output', help='write the result as JSON to this file')
    add('--table', nargs='+', metavar='FILE.json', help='only print results as Markdown tables')
    add('--update', metavar='FILE.md', help=f'put them between {MARKS[0]} and {MARKS[1]} of it')


def run(args: argparse.Namespace, kind: Kind, measure: Callable[[], dict[str, Any]]) -> None:
    """What all commands do: measures, writes and prints; or prints what was measured before.

    Args:
      args: of a parser with `add_options`.
      kind: of the result.
      measure: gives the result, as JSON, without what `run` adds.

    Raises:
      UserError: options contradict each other, or a contestant failed.
    """
    if args.update and not args.table:
        raise UserError('--update goes with --table: which results should be written?')
    if args.table:
        results = [read(path, kind) for path in args.table]
        text = _render(results, kind, 'csv' if args.format == 'csv' else 'markdown')
        if args.update:
            update_document(args.update, text)
        else:
            print(text)
        return
    if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
        raise UserError(f'the folder of {args.output} does not exist: make it first')
    # Of absolute paths only the last part, which does not name the machine.
    words = [pathlib.Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    hardware = describe_hardware()  # before the contestants make it busy
    result = {
        'kind': kind.name,
        'format': kind.format,
        'date': datetime.date.today().isoformat(),
        'command': ' '.join([f'python scripts/{kind.script}', *words]),
        'hardware': hardware,
        'versions': versions(),
    } | measure()
    rows = _rows(result)
    for row in rows:
        if row.get('facts', {}).get('platform') == 'gpu':
            hardware['accelerator'] = row['facts']['device']
    if args.output:
        files.write_json(args.output, result)
    print(_render([result], kind, args.format))
    failed = [f'{row["contestant"]}: {row["error"]}' for row in rows if 'error' in row]
    if failed or not rows:
        raise UserError(
            f'{len(failed)} of {len(rows)} measurements failed: {"; ".join(dict.fromkeys(failed))}'
        )


def _rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Everything that was measured, a dict for each contestant, with `error` if it failed."""
    parts = [result]
    for key in ('cells', 'largest', 'whole'):
        parts += result.get(key, ())
    return [row for part in parts for key in ('stages', 'results') for row in part.get(key, ())]


def say(text: str) -> None:
    """Tells how far a measurement is."""
    print(text, file=sys.stderr, flush=True)


def describe_hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and how busy the machine is."""
    cpuinfo = pathlib.Path('/proc/cpuinfo')
    text = cpuinfo.read_text() if cpuinfo.exists() else ''
    found = re.search(r'^model name\s*: (.*)$', text, re.MULTILINE)
    return {
        'processor': found[1] if found else platform.processor(),
        'cores': cores(),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'load_average': round(os.getloadavg()[0], 2),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Python, ours, and those packages that are installed."""
    found = {'python': platform.python_version(), 'vit_jax': vit_jax.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def notes(result: Mapping[str, Any]) -> list[str]:
    """What stands below a table: command, date, machine, versions, and what was left out."""
    hardware = result['hardware']
    installed = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
    return [
        f'`{result["command"]}`; {result["date"]}; load average at the start '
        f'{hardware["load_average"]}; {installed}.',
        *(f'Left out: {text}.' for text in result['left_out']),
    ]


def machine(result: Mapping[str, Any]) -> str:
    """What a result was measured on, in a few words."""
    hardware = result['hardware']
    accelerator = hardware.get('accelerator')
    return accelerator or f'{hardware["processor"]}, {hardware["cores"]} cores'


def read(path: str, kind: Kind) -> dict[str, Any]:
    """A result that was written before.

    Args:
      path: of the file.
      kind: that it has to be.

    Raises:
      UserError: the file cannot be read, or is not of this kind and format.
    """
    result = files.read_json(path)
    if result.get('kind') != kind.name:
        raise UserError(f'{path} is not a result of scripts/{kind.script} --output')
    if result.get('format') != kind.format:
        raise UserError(
            f'{path} has format {result.get("format")!r}, and this version reads {kind.format}: '
            'measure again'
        )
    return result


def update_document(path: str, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Replaces what is between two marks of a document, or leaves it as it is.

    Args:
      path: of a UTF-8 text file that has each mark once, alone on its line, in this order.
      text: what comes between them, with an empty line before and after.
      marks: the first and the last.

    Raises:
      UserError: the document cannot be read or written, or the marks are not in it.
    """
    lines = files.read_text(path).splitlines()
    places = [number for number, line in enumerate(lines) if line.strip() in marks]
    if [lines[number].strip() for number in places] != list(marks):
        raise UserError(f'{path}: expected a line {marks[0]} and after it a line {marks[1]}, once')
    first, last = places
    lines[first + 1 : last] = ['', text.strip(), '']
    files.write_text(path, '\n'.join(lines) + '\n')


def _render(results: Sequence[Mapping[str, Any]], kind: Kind, style: str) -> str:
    return '\n'.join(
        tables.render(table, style) for result in results for table in kind.tables(result)
    )
