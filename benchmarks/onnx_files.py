"""Our ONNX graph beside that of the same model exported from transformers by torch.onnx.

The measurement of scripts/benchmark_export.py.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks import record, turns
from benchmarks.jax_workload import made_up_params
from vit_jax import models
from vit_jax.analysis import architecture, compare
from vit_jax.analysis.tables import Table
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import onnx as onnx_export
from vit_jax.export import onnx_quantize, pytorch
from vit_jax.export.options import Options
from vit_jax.inference import labels, model_folder

OURS, THEIRS, INT8 = 'vit_jax', 'transformers', 'vit_jax int8'  # which file
EXPORT_SECONDS = 1800.0  # after which torch.onnx has failed
TOLERANCE = 1e-4  # of the largest logit: these are two exports of one model


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Exports, compares, times.

    Args:
      args: options of scripts/benchmark_export.py.

    Returns:
      `results`, a row for each file and batch, and what was measured, as JSON.

    Raises:
      UserError: no such model, one that cannot be exported, or files that give other logits.
    """
    model = model_folder.load(args.model) if args.model else _made_up(args.variant)
    size = model.preprocess.size
    rows, differences = [], {}
    with tempfile.TemporaryDirectory() as folder:
        files = _export(model, args, pathlib.Path(folder))
        sessions = {name: _open_session(path, args.threads) for name, path in files.items()}
        nodes = {
            name: len(onnx.load(path, load_external_data=False).graph.node)
            for name, path in files.items()
        }
        for batch in args.batch:
            images = np.random.default_rng(0).uniform(-1, 1, (batch, 3, *size))
            images = images.astype(np.float32)
            logits = {name: s.run(['logits'], {'image': images})[0] for name, s in sessions.items()}
            differences[batch] = _compare(logits)
            tasks = {name: functools.partial(_time, s, images) for name, s in sessions.items()}
            seconds, _ = turns.take_turns(tasks, args.runs, pause=0.0)
            rows += [
                {'contestant': name, 'batch': batch, 'nodes': nodes[name], 'seconds': seconds[name]}
                for name in files
            ]
    return {
        'model': model.model_config.get('model_name'),
        'weights': pathlib.Path(args.model).name if args.model else 'made up',
        'image_size': model.image_size,
        'opset': {OURS: args.opset, THEIRS: 20},
        'threads': args.threads,
        'largest_difference_of_logits': differences,
        'left_out': [],
        'results': rows,
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Milliseconds and images per second of each file."""
    medians = {(r['contestant'], r['batch']): np.median(r['seconds']) for r in result['results']}
    rows = []
    for row in result['results']:
        low, median, high = np.percentile(row['seconds'], (25, 50, 75))
        rows.append([
            row['contestant'],
            str(row['nodes']),
            str(row['batch']),
            f'{1e3 * median:.1f}',
            f'{1e3 * low:.0f} - {1e3 * high:.0f}',
            f'{1e3 * min(row["seconds"]):.0f}',
            f'{row["batch"] / median:.1f}',
            f'{medians[THEIRS, row["batch"]] / median:.2f}',
        ])  # fmt: skip
    columns = (
        'file', 'nodes>', 'batch>', 'median ms>', 'quartiles>', 'least>', 'images/s>', 'speed>'
    )  # fmt: skip
    difference = max(result['largest_difference_of_logits'].values())
    notes = [
        f'Speed: that of the file from {THEIRS} (by torch.onnx) is 1; largest difference of the '
        f'logits {difference:.1e}; {record.machine(result)}.',
        *record.notes(result),
    ]
    title = (
        f'ONNX files of {result["model"]}, {result["image_size"]} px, onnxruntime on the CPU, '
        f'{result["threads"]} threads'
    )
    return [Table(title, columns, rows, notes)]


KIND = record.Kind('benchmark_export.py', 'vit_jax benchmark of exports', 1, tables)


def _made_up(variant: str) -> model_folder.Model:
    """A model with made-up weights, 224 px and 1000 classes."""
    config = dict(architecture.find(variant).model_config)
    model, names = models.from_config(config, num_classes=1000), labels.numbered(1000)
    params, source = made_up_params(model, 224), {'weights': 'made up'}
    return model_folder.Model(model, params, config, names, Preprocess(crop=224), source)


def _export(
    model: model_folder.Model, args: argparse.Namespace, folder: pathlib.Path
) -> dict[str, str]:
    """Writes all files; name -> path."""
    files = {name: str(folder / f'{i}.onnx') for i, name in enumerate((OURS, THEIRS, INT8))}
    proto = onnx_export.build(model, Options(opset=args.opset, layout='NCHW'))
    onnx_export.save(proto, files[OURS])
    if args.int8:
        onnx_quantize.quantize_dynamic(proto, files[INT8])
    else:
        del files[INT8]
    pytorch.write(folder / 'huggingface', model, to='huggingface')
    setup = {'folder': str(folder / 'huggingface'), 'output': files[THEIRS]}
    try:
        turns.Child('benchmarks.torch_onnx', setup, EXPORT_SECONDS).close()
    except turns.ContestantError as error:
        raise UserError(f'torch.onnx did not export the model: {error}') from error
    return files


def _open_session(path: str, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of a session that is not running do not take the processor from the other's.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def _time(session: Any, images: np.ndarray) -> float:
    start = time.perf_counter()
    session.run(['logits'], {'image': images})
    return time.perf_counter() - start


def _compare(logits: Mapping[str, np.ndarray]) -> float:
    """The largest difference of the two float32 files; `UserError` if they are not one model."""
    found = compare.Difference()
    found.add(logits[OURS], logits[THEIRS])
    if not found.max <= TOLERANCE * max(1.0, found.largest):
        raise UserError(
            f'the two files are not the same model: logits up to {found.largest:.3g} differ by '
            f'{found.max:.3g}'
        )
    return found.max
