"""8-bit integers for ONNX files, by onnxruntime's own tools."""

import os
import pathlib
import tempfile

from vit_jax import files
from vit_jax.errors import UserError, extra
from vit_jax.export import onnx as onnx_export

with extra('export'):
    import onnx
    from onnx import helper


def quantize_dynamic(proto: onnx.ModelProto, path: str | os.PathLike[str]) -> int:
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
        proto: what `onnx.build` gave, in float32.
        path: the file to write; one that is there is replaced. Weights go beside it into
            `<name>.data` where they are too much for one file.

    Returns:
        Bytes that the graph takes in float32.

    Raises:
        UserError: `proto` is not float32, or `path` cannot be written.
    """
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    if properties['dtype'] != 'float32':
        raise UserError(
            f'the graph is {properties["dtype"]}: int8 is made from a float32 graph; build one'
        )
    with extra('export'):  # Here, because it takes a second to import.
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference

    path = pathlib.Path(path)
    with (
        files.atomic_group(path, overwrite=True) as folder,
        tempfile.TemporaryDirectory(dir=folder) as work,
    ):
        full, prepared, quantized = (os.path.join(work, f'{i}.onnx') for i in range(3))
        onnx_export.save(proto, full)
        written = [entry.stat().st_size for entry in os.scandir(work)]
        large = len(written) > 1
        # What the tool asks for first. Of its three steps the graph needs none but shapes.
        shape_inference.quant_pre_process(
            full,
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
        small = onnx.load(quantized)
        del small.metadata_props[:]  # the tools add their own, of no use to anyone
        helper.set_model_props(small, properties | {'dtype': 'int8'})
        onnx_export.save(small, folder / path.name)
    return sum(written)
