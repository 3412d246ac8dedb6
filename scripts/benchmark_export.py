"""Times our ONNX graph beside that of the same model exported from transformers by torch.onnx.

Both files are made here from the same weights, run by onnxruntime on the CPU in one process, turn
about, and have to give the same logits. Needs onnxruntime, torch, transformers and onnxscript.

Examples:
    python scripts/benchmark_export.py
    python scripts/benchmark_export.py --model ViT-B_16.npz --batch 1 8 --output benchmark.json
    python scripts/benchmark_export.py --variant ViT-S_16 --int8
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

# A checkout runs without being installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from vit_jax import cli
from vit_jax.errors import UserError

OURS, THEIRS, INT8 = 'vit_jax', 'transformers', 'vit_jax int8'  # which file
TOLERANCE = 1e-4  # of the largest logit: these are two exports of one model


def main() -> int:
    """Runs the command line; returns the exit status, 1 if there is no result."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        '--model', help='model folder or weights of a ViT; default: made-up weights'
    )
    parser.add_argument('--variant', default='ViT-Ti_16', help='of the made-up weights')
    parser.add_argument('--opset', type=int, default=20, choices=(17, 20), help='of our file')
    parser.add_argument('--batch', type=int, nargs='+', default=[8], help='images at once')
    parser.add_argument('--runs', type=int, default=20, help='timed runs of each file')
    parser.add_argument('--threads', type=int, default=2, help='of onnxruntime')
    parser.add_argument('--int8', action='store_true', help='time our int8 file, too')
    parser.add_argument('--output', help='write the result as JSON to this file')
    args = parser.parse_args()
    if min(*args.batch, args.runs, args.threads) < 1:
        parser.error('--batch, --runs and --threads are at least 1')
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
        raise UserError(f'the folder of {args.output} does not exist: make it first')
    result = _benchmark(args)
    _print(result)
    if args.output:
        _write(pathlib.Path(args.output), result)


def _benchmark(args: argparse.Namespace) -> dict:
    """Exports, compares, times. The result is JSON."""
    import numpy as np
    import onnx

    model = _model(args)
    side = model.image_size
    rows, nodes, differences = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = _export(model, args, pathlib.Path(folder))
        sessions = {name: _session(path, args.threads) for name, path in files.items()}
        for name, path in files.items():
            nodes[name] = len(onnx.load(path, load_external_data=False).graph.node)
        for batch in args.batch:
            images = np.random.default_rng(0).uniform(-1, 1, (batch, 3, side, side))
            images = images.astype(np.float32)
            logits = {name: s.run(['logits'], {'image': images})[0] for name, s in sessions.items()}
            differences[batch] = _compare(logits)
            times = {name: [] for name in sessions}
            for run in range(args.runs):
                # Turn about, and every other time in the other order: neither is always first.
                for name in sorted(sessions, reverse=run % 2 == 1):
                    start = time.perf_counter()
                    sessions[name].run(['logits'], {'image': images})
                    times[name].append(time.perf_counter() - start)
            rows += [
                {'file': name, 'batch': batch, 'seconds': seconds}
                | dict(
                    zip(
                        ('q25', 'median', 'q75'),
                        np.quantile(seconds, (0.25, 0.5, 0.75)),
                        strict=True,
                    )
                )
                for name, seconds in times.items()
            ]
    return {
        'model': model.model_config.get('model_name'),
        'weights': args.model or 'made up',
        'image_size': side,
        'opset': {OURS: args.opset, THEIRS: 20},
        'threads': args.threads,
        'runs': args.runs,
        'nodes': nodes,
        'largest_difference_of_logits': differences,
        'times': rows,
        'hardware': _hardware(),
        'versions': _versions(),
    }


def _model(args: argparse.Namespace):
    """The model to export: what the user names, or made-up weights of a variant."""
    import jax
    import numpy as np

    from vit_jax import models, variants
    from vit_jax.data.preprocess import Preprocess
    from vit_jax.errors import UserError
    from vit_jax.inference import model_folder

    if args.model:
        return model_folder.load(args.model)
    try:
        config = variants.get_config(args.variant).to_dict()
    except ValueError as error:
        raise UserError(str(error)) from error
    side, classes = 224, 1000
    model = models.from_config(config, num_classes=classes)
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(0)

    def made_up(path, leaf):
        deviation = 0.02 if path[-1].key in ('kernel', 'cls', 'pos_embedding') else 0.0
        values = deviation * rng.standard_normal(leaf.shape, np.float32)
        return values + np.float32(path[-1].key == 'scale')

    params = jax.tree_util.tree_map_with_path(made_up, shapes['params'])
    names = tuple(f'class {i}' for i in range(classes))
    return model_folder.Model(
        model, params, config, side, names, Preprocess(crop=side), {'weights': 'made up'}
    )


def _export(model, args: argparse.Namespace, folder: pathlib.Path) -> dict[str, str]:
    """Writes all files; name -> path."""
    from vit_jax.errors import UserError
    from vit_jax.export import onnx as onnx_export
    from vit_jax.export import onnx_quantize
    from vit_jax.export import pytorch as export

    files = {name: str(folder / f'{i}.onnx') for i, name in enumerate((OURS, THEIRS, INT8))}
    onnx_export.save(onnx_export.build(model, opset=args.opset, layout='NCHW'), files[OURS])
    if args.int8:
        onnx_quantize.quantize_dynamic(files[OURS], files[INT8])
    else:
        del files[INT8]
    export.write(
        str(folder / 'huggingface'),
        model.params,
        to='huggingface',
        model_config=model.model_config,
        image_size=model.image_size,
        class_names=(),
    )
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.torch_onnx', folder / 'huggingface', files[THEIRS]],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise UserError(f'torch.onnx did not export the model: {last}')
    return files


def _session(path: str, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of a session that is not running do not take the processor from the other's.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def _compare(logits: dict) -> float:
    """The largest difference of the two float32 files; `UserError` if they are not one model."""
    import numpy as np

    from vit_jax.errors import UserError

    difference = float(np.abs(logits[OURS] - logits[THEIRS]).max())
    largest = float(np.abs(logits[OURS]).max())
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f'the two files are not the same model: logits up to {largest:.3g} differ by '
            f'{difference:.3g}'
        )
    return difference


def _hardware() -> dict:
    """Processor and cores that this process may use."""
    import platform

    name = platform.processor()
    cpuinfo = pathlib.Path('/proc/cpuinfo')
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(':', 1)[1].strip() for x in lines if x.startswith('model name')), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return {'processor': name, 'cores': cores, 'load_average': os.getloadavg()}


def _versions() -> dict[str, str]:
    import importlib.metadata

    import vit_jax

    packages = ('onnx', 'onnxruntime', 'onnxscript', 'torch', 'transformers', 'jax')
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {'python': sys.version.split()[0], 'vit_jax': vit_jax.__version__, **versions}


def _print(result: dict) -> None:
    import rich.console
    import rich.table

    table = rich.table.Table(
        title=f'{result["model"]}, {result["image_size"]} px, onnxruntime '
        f'{result["versions"]["onnxruntime"]}, {result["threads"]} threads, {result["runs"]} runs '
        'turn about, ms'
    )
    for column in ('file', 'nodes', 'batch', 'median', 'quartiles', 'least', 'image/s', 'speed'):
        justify = 'left' if column == 'file' else 'right'
        table.add_column(column, justify=justify, no_wrap=True)
    medians = {(row['file'], row['batch']): row['median'] for row in result['times']}
    for row in result['times']:
        table.add_row(
            row['file'],
            str(result['nodes'][row['file']]),
            str(row['batch']),
            f'{1e3 * row["median"]:.1f}',
            f'{1e3 * row["q25"]:.0f} - {1e3 * row["q75"]:.0f}',
            f'{1e3 * min(row["seconds"]):.0f}',
            f'{row["batch"] / row["median"]:.1f}',
            f'{medians[THEIRS, row["batch"]] / row["median"]:.2f}',
        )
    console = rich.console.Console()
    console.print(table)
    largest = max(result['largest_difference_of_logits'].values())
    console.print(
        f'speed: that of the file from {THEIRS} (by torch.onnx) is 1; largest difference of '
        f'the logits {largest:.1e}; '
        f'{result["hardware"]["processor"]}, {result["hardware"]["cores"]} cores',
        highlight=False,
    )


def _write(path: pathlib.Path, result: dict) -> None:
    """Writes JSON, complete or not at all."""
    from vit_jax.errors import UserError

    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        partial.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error}') from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == '__main__':
    sys.exit(main())
