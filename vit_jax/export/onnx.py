"""Models as ONNX files: the graph is written layer by layer, not traced.

The graph has a dynamic batch, LayerNormalization and Gelu as single nodes, and about half the nodes
of a traced one. Runtimes fuse it further. What it needs to be used without this package (class
names, preprocessing) is in its metadata.

    proto = onnx.build(model_folder.load('runs/x/model'))
    onnx.save(proto, 'x.onnx')
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import IO, Any

import vit_jax
from vit_jax import files, variants
from vit_jax.errors import UserError, extra
from vit_jax.export import onnx_models
from vit_jax.export.expressible import in_units
from vit_jax.export.onnx_graph import BATCH, FLOAT32, TYPES, UINT8, Graph
from vit_jax.export.options import DEFAULT, Options
from vit_jax.export.outputs import check_outputs
from vit_jax.inference import model_folder
from vit_jax.inference import onnx as inference_onnx
from vit_jax.inference.task import ONE_CLASS, SEVERAL

with extra('export'):
    import onnx
    from google.protobuf.message import Message
    from onnx import external_data_helper, helper

# A protobuf message is smaller than 2 GiB; 64 MiB are left for what is not weights.
EXTERNAL_DATA_ABOVE = 2**31 - 2**26
# Weights begin at multiples of this, which lets runtimes map them into memory.
_ALIGNMENT = 4096
_EXTERNAL_FROM = 1024  # bytes; what is smaller stays in the file of the graph


def build(
    model: model_folder.Model,
    options: Options = DEFAULT,
    told: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """Writes a model as an ONNX graph.

    The input is `image`, of any batch. Outputs are float32: `logits` (of a model of numbers, these
    in their units) or `probabilities` [batch, C], `features` [batch, D] and `attention`
    [batch, L, H, N, N], see `outputs.py`.

    Args:
        model: what `model_folder.load` gives (or `open_model`, which reads each array when it is
            written); ViT, hybrid, DeiT or Mixer.
        options: see `Options`; of 'int8' without `weights_only` the float32 graph, which
            `onnx_quantize` takes.
        told: more for the metadata; values other than texts become JSON.

    Returns:
        The model, with its metadata; `save` writes it.

    Raises:
        UserError: an output that the model does not have, or weights beyond the range of float16.
    """
    model = in_units(model)
    config, params, size = model.model_config, model.params, model.preprocess.size
    outputs = options.outputs(model.model.num_classes)
    check_outputs(model.model, outputs)
    classifier = config.get('classifier', 'token')
    if not variants.is_mixer(config) and 'unpooled' in classifier:
        raise UserError(
            f'a model with classifier {classifier!r} gives scores for each token, not for each '
            'image: it cannot be exported to ONNX'
        )
    names = ('act', 'layer_norm_eps')
    settings = {name: config[name] for name in names if config.get(name) is not None}
    graph = Graph(options.opset, TYPES[options.compute], options.stored, **settings)
    image = _image(graph, (*size, model.channels), options)
    values = onnx_models.build(graph, image, params, config, size, attention=options.attention)
    if values.logits:
        x = values.logits
        if options.probabilities:
            x = graph.probabilities(x, model.task.kind == SEVERAL)
        graph.output(x, outputs[0], (BATCH, params['head']['bias'].shape[0]))
    if options.features:
        width = variants.pooled_width(config)
        if 'pre_logits' in params:
            width = params['pre_logits']['bias'].shape[0]
        graph.output(values.features, 'features', (BATCH, width))
    if options.attention:
        num_heads, tokens = config['transformer']['num_heads'], values.num_tokens
        shape = (BATCH, len(values.attention), num_heads, tokens, tokens)
        x = graph.op('Concat', values.attention, 'attention/stacked', axis=1)
        graph.output(graph.reshape(x, shape, 'attention/blocks'), 'attention', shape)
    proto = graph.model(str(config.get('model_name') or 'vit_jax'), vit_jax.__version__)
    helper.set_model_props(proto, _metadata(model, options, outputs[0]) | as_text(told or {}))
    return proto


def _metadata(model: model_folder.Model, options: Options, output: str) -> dict[str, str]:
    """What is written into the file: all that a program needs which has nothing but the file.

    Returns:
        'vit_jax.format' ('1'); 'vit_jax.version'; 'model_name' ('' for no known variant);
        'class_names' (JSON list, in the order of the logits); 'image_size', pixels
        (JSON: side or [height, width]); 'layout';
        'value_range' (JSON: [-1, 1] or [0, 255]); 'preprocessing' (JSON of `Preprocess.to_dict`);
        'output' ('features' for a model without a head); 'dtype' of the products; 'stored', the
        type of the weights, only where it is another one; 'source' (JSON); 'multi_label' ('true')
        only where classes do not exclude each other; 'task' (JSON of `Task.to_dict`) only where the
        outputs are not scores of classes that exclude each other.
    """
    return as_text(
        {
            'vit_jax.format': inference_onnx.FORMAT,
            'vit_jax.version': vit_jax.__version__,
            'model_name': str(model.model_config.get('model_name') or ''),
            'class_names': list(model.class_names),
            'image_size': model.image_size,
            'layout': options.layout,
            'value_range': [0, 255] if options.preprocessing else [-1, 1],
            'preprocessing': model.preprocess.to_dict(),
            'output': output,
            'dtype': options.compute,
            'source': dict(model.source),
            **({'stored': options.stored} if options.stored else {}),
            **({'multi_label': True} if model.task.kind == SEVERAL else {}),
            **({'task': model.task.to_dict()} if model.task != ONE_CLASS else {}),
        }
    )


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as a file has them: texts as they are, everything else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata.items()
    }


def save(
    proto: onnx.ModelProto, path: str | os.PathLike[str], *, external_data: bool | None = None
) -> None:
    """Writes a model; files appear when they are complete and on disk.

    Args:
        proto: what `build` gave; it is not changed.
        path: the file; one that is there is replaced. Missing folders are made.
        external_data: put the weights into `<name>.data` beside the file (to which the file refers
            by name: they have to be moved together); by default, only where they are too much for
            one file, 2 GB.

    Raises:
        UserError: it cannot be written.
    """
    path = pathlib.Path(path).absolute()
    if external_data is None:
        external_data = sum(len(t.raw_data) for t in proto.graph.initializer) > EXTERNAL_DATA_ABOVE
    with files.atomic_group(path, overwrite=True) as folder:
        if external_data:
            name = f'{path.name}.data'
            with open(folder / name, 'wb') as f:
                proto = _write_weights(proto, f, name)
        (folder / path.name).write_bytes(proto.SerializeToString())


def _image(graph: Graph, image: tuple[int, int, int], options: Options) -> str:
    """Declares the input; gives [B, channels, height, width] in [-1, 1]."""
    channels_last = options.layout == 'NHWC'
    height, width, channels = image
    shape = (BATCH, *image) if channels_last else (BATCH, channels, height, width)
    x = graph.input('image', UINT8 if options.preprocessing else FLOAT32, shape)
    if options.preprocessing:
        x = graph.cast(x, FLOAT32)
        # The two steps of `data.preprocess.normalize`, which round as it does.
        half = graph.scalar(127.5)
        x = graph.op('Sub', [x, half], 'image/centred')
        x = graph.op('Div', [x, half], 'image/normalised')
    # The cast comes first, so that the transposition moves half of the bytes.
    x = graph.cast(x, graph.compute)
    return graph.transpose(x, (0, 3, 1, 2), 'image/channels_first') if channels_last else x


def _write_weights(proto: onnx.ModelProto, f: IO[bytes], location: str) -> onnx.ModelProto:
    """Writes the large weights to `f`; returns the model with references to them, named `location`.

    (onnx's own function for this would change `proto`, or copy all of it.)
    """
    light = onnx.ModelProto()
    _copy_fields(proto, light, leave_out='graph')
    _copy_fields(proto.graph, light.graph, leave_out='initializer')
    for tensor in proto.graph.initializer:
        reference = light.graph.initializer.add()
        if len(tensor.raw_data) < _EXTERNAL_FROM:
            reference.CopyFrom(tensor)
            continue
        _copy_fields(tensor, reference, leave_out='raw_data')
        f.write(bytes(-f.tell() % _ALIGNMENT))
        reference.raw_data = b''  # set_external_data wants it to be there
        external_data_helper.set_external_data(
            reference, location, offset=f.tell(), length=len(tensor.raw_data)
        )
        reference.ClearField('raw_data')
        f.write(tensor.raw_data)
    return light


def _copy_fields(source: Message, target: Message, *, leave_out: str) -> None:
    """Copies all fields but one between two protobuf messages of one type."""
    for field, value in source.ListFields():
        if field.name == leave_out:
            continue
        if field.is_repeated:
            getattr(target, field.name).MergeFrom(value)
        elif field.message_type:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)
