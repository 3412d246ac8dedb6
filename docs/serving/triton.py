"""Puts an ONNX file into a model repository of Triton; needs onnx, nothing else.

python triton.py flowers.onnx repository/ --max-batch 32
docker run --rm -p 8000:8000 -v $PWD/repository:/models nvcr.io/nvidia/tritonserver:<version>-py3 \
    tritonserver --model-repository=/models

The repository gets flowers/1/model.onnx, its weights beside it where they are a file of their own,
flowers/config.pbtxt and flowers/labels.txt.
"""

import argparse
import json
import pathlib
import shutil

import onnx

TYPES = {
    onnx.TensorProto.FLOAT: 'TYPE_FP32',
    onnx.TensorProto.UINT8: 'TYPE_UINT8',
    onnx.TensorProto.INT32: 'TYPE_INT32',
}


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('onnx', type=pathlib.Path, help='the ONNX file')
    parser.add_argument('repository', type=pathlib.Path, help='a folder; made where it is missing')
    parser.add_argument('--max-batch', type=int, default=32, help='default: 32')
    parser.add_argument('--gpu', action='store_true', help='run it on GPUs')
    args = parser.parse_args()
    folder = args.repository / args.onnx.stem
    (folder / '1').mkdir(parents=True)
    model = onnx.load(args.onnx, load_external_data=False)
    names = class_names(model)
    shutil.copyfile(args.onnx, folder / '1' / 'model.onnx')
    data = args.onnx.with_name(f'{args.onnx.name}.data')
    if data.exists():  # the graph refers to it by name
        shutil.copyfile(data, folder / '1' / data.name)
    (folder / 'labels.txt').write_text(''.join(f'{name}\n' for name in names), encoding='utf-8')
    text = config(args.onnx.stem, model.graph, args.max_batch, args.gpu, bool(names))
    (folder / 'config.pbtxt').write_text(text, encoding='utf-8')
    print(f'{folder}: written; {len(names)} classes')


def class_names(model):
    """The class names in the metadata."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return json.loads(metadata.get('class_names', '[]'))


def config(name, graph, max_batch, gpu, labels):
    """config.pbtxt of a graph whose first axis is the batch, which Triton adds by itself."""
    kind = 'KIND_GPU' if gpu else 'KIND_CPU'
    parts = [f'name: "{name}"', 'platform: "onnxruntime_onnx"', f'max_batch_size: {max_batch}']
    for word, values in (('input', graph.input), ('output', graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            sizes = ', '.join(str(axis.dim_value) for axis in tensor.shape.dim[1:])
            lines = [f'name: "{value.name}"', f'data_type: {TYPES[tensor.elem_type]}']
            lines.append(f'dims: [ {sizes} ]')
            if labels and word == 'output' and value.name in ('logits', 'probabilities'):
                lines.append('label_filename: "labels.txt"')
            inner = '\n'.join(f'    {line}' for line in lines)
            parts.append(f'{word} [\n  {{\n{inner}\n  }}\n]')
    parts.append('dynamic_batching { }')
    parts.append(f'instance_group [\n  {{\n    count: 1\n    kind: {kind}\n  }}\n]')
    return '\n'.join(parts) + '\n'


if __name__ == '__main__':
    main()
