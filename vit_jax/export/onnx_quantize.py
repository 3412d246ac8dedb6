"""8-bit integers for ONNX files, by onnxruntime's own tools."""

import os
import pathlib
import tempfile

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from vit_jax import files
from vit_jax.errors import UserError
from vit_jax.export import onnx as onnx_export


def quantize_dynamic(path_in: str | os.PathLike[str], path_out: str | os.PathLike[str]) -> None:
    """Writes an ONNX file whose dense layers compute in 8-bit integers.

    Dynamic quantisation (https://onnxruntime.ai/docs/performance/model-optimizations/
    quantization.html): weights are rounded to 8 bits with a scale for each output, once; what goes
    into a layer is rounded with one scale for the whole batch, taken from its values while the
    model runs. So an image's result depends, within the rounding, on the images beside it. A file
    has about 0.3 of its size; convolutions, normalisation, softmax and the products of attention
    stay float32.

    Weights are unsigned. Signed ones are quicker on processors without VNNI instructions, and
    there overflow: on 260 photos a Ti/16 then kept the most probable class of 247 instead of 252.

    Args:
        path_in: a float32 file that `onnx.save` wrote.
        path_out: the file to write; one that is there is replaced. Weights go beside it into
            `<name>.data` where they are too much for one file.

    Raises:
        UserError: `path_in` is not a float32 ONNX file written by this package, or `path_out`
            cannot be written.
    """
    path_in, path_out = pathlib.Path(path_in), pathlib.Path(path_out)
    properties = _properties_of_float32(path_in)
    from onnxruntime import quantization  # Here, because it takes a second to import.
    from onnxruntime.quantization import shape_inference

    large = path_in.with_name(path_in.name + '.data').is_file()
    with (
        files.atomic_group(path_out, overwrite=True) as folder,
        tempfile.TemporaryDirectory(dir=folder) as work,
    ):
        prepared, quantized = (os.path.join(work, name) for name in ('a.onnx', 'b.onnx'))
        # What the tool asks for first. Of its three steps the graph needs none but shapes.
        shape_inference.quant_pre_process(
            str(path_in),
            prepared,
            skip_optimization=True,
            skip_symbolic_shape=True,
            save_as_external_data=large,
        )
        quantization.quantize_dynamic(
            prepared,
            quantized,
            op_types_to_quantize=['MatMul', 'Gemm'],
            per_channel=True,
            weight_type=quantization.QuantType.QUInt8,
            use_external_data_format=large,
        )
        proto = onnx.load(quantized)
        del proto.metadata_props[:]  # the tools add their own, of no use to anyone
        helper.set_model_props(proto, properties | {'dtype': 'int8'})
        onnx_export.save(proto, folder / path_out.name)


def _properties_of_float32(path: pathlib.Path) -> dict[str, str]:
    """The metadata of a float32 file that this package wrote."""
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as e:
        raise UserError(f'cannot read {path}: {e}') from e
    except DecodeError as e:
        raise UserError(f'{path} is not an ONNX file, or is damaged: {e}') from e
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if properties.get('vit_jax.format') != onnx_export.FORMAT:
        raise UserError(f'{path} was not exported by this vit_jax; export the model again')
    if properties['dtype'] != 'float32':
        raise UserError(
            f'{path} is {properties["dtype"]}: int8 is made from a float32 file; export one'
        )
    return properties
