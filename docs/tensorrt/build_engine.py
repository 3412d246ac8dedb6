"""Builds a TensorRT engine from an ONNX file of vit_jax export.

Needs an NVIDIA GPU and `pip install tensorrt onnx` (TensorRT 10 or 11), and nothing of vit_jax.

    python build_engine.py flowers16.onnx flowers16.engine --max-batch 64

The network is strongly typed: every value has the type that the graph says, which for a float16
file of vit_jax export keeps LayerNorm and softmax in float32. So there is no precision flag
here; choose with `vit_jax export --dtype`. Beside the engine, <engine>.labels.txt gets the class
names, a line each.
"""

import argparse
import json
import os
import pathlib
import sys


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('onnx', type=pathlib.Path, help='the ONNX file')
    parser.add_argument('engine', type=pathlib.Path, help='the engine to write')
    parser.add_argument('--min-batch', type=int, default=1, help='smallest batch (default: 1)')
    parser.add_argument('--opt-batch', type=int, default=8, help='tuned for (default: 8)')
    parser.add_argument('--max-batch', type=int, default=32, help='largest batch (default: 32)')
    parser.add_argument(
        '--exact',
        action='store_true',
        help='no TF32 in float32 products: slower, and within 1e-4 of JAX',
    )
    args = parser.parse_args()
    if not 1 <= args.min_batch <= args.opt_batch <= args.max_batch:
        parser.error('expected 1 <= --min-batch <= --opt-batch <= --max-batch')
    try:
        if not args.onnx.is_file():
            raise SystemExit(f'build_engine.py: there is no file {args.onnx}')
        plan = build(args.onnx, (args.min_batch, args.opt_batch, args.max_batch), args.exact)
        names = class_names(args.onnx)
    except ImportError as error:
        print(
            f'build_engine.py: {error.name} cannot be imported ({error}). It is needed to build '
            'an engine: pip install tensorrt onnx, on a machine with an NVIDIA GPU',
            file=sys.stderr,
        )
        return 1
    write(args.engine, plan)
    labels = args.engine.with_name(f'{args.engine.name}.labels.txt')
    write(labels, ''.join(f'{name}\n' for name in names).encode())
    print(f'{args.engine}: {len(plan) / 2**20:.1f} MiB; {labels}: {len(names)} classes')
    return 0


def build(path: pathlib.Path, batches: tuple[int, int, int], exact: bool) -> bytes:
    """The serialised engine.

    Args:
        path: an ONNX file whose input has a dynamic first axis; its external data beside it.
        batches: smallest, optimal and largest batch.
        exact: whether float32 products are computed in float32, not TF32.

    Raises:
        ImportError: TensorRT is not installed.
        SystemExit: TensorRT does not take the file.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # TensorRT 11 has no other networks, and ignores the flag; TensorRT 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise SystemExit('\n'.join(['build_engine.py: TensorRT cannot read the file', *errors]))

    config = builder.create_builder_config()
    if exact:
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    image = network.get_input(0)
    profile.set_shape(image.name, *[(batch, *tuple(image.shape)[1:]) for batch in batches])
    config.add_optimization_profile(profile)

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit('build_engine.py: TensorRT built no engine; what it said is above')
    return bytes(plan)


def class_names(path: pathlib.Path) -> list[str]:
    """The class names in the metadata of an ONNX file."""
    import onnx

    metadata = onnx.load(path, load_external_data=False).metadata_props
    return json.loads({entry.key: entry.value for entry in metadata}.get('class_names', '[]'))


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file; it appears under its name when it is complete."""
    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise SystemExit(f'build_engine.py: cannot write {path}: {error}') from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == '__main__':
    sys.exit(main())
