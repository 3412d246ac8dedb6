"""Makes a folder for transformers.js of an ONNX file; needs onnx, nothing else.

vit_jax export --model runs/x/model --format onnx --layout NCHW --output flowers.onnx
python transformers_js.py flowers.onnx flowers_js/

transformers.js wants its own names: the input `pixel_values`, the output `logits`, and beside the
graph what it reads of config.json and preprocessor_config.json.
"""

import json
import pathlib
import sys

import onnx

RESAMPLE = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3, 'box': 4, 'hamming': 5}


def main():
    """Runs the command line."""
    source, folder = (pathlib.Path(word) for word in sys.argv[1:])
    model = onnx.load(source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if metadata['layout'] != 'NCHW' or metadata['output'] != 'logits':
        raise SystemExit('transformers.js takes logits of NCHW: export with --layout NCHW alone')
    (given,) = model.graph.input
    for node in model.graph.node:
        node.input[:] = ['pixel_values' if n == given.name else n for n in node.input]
    given.name = 'pixel_values'
    (folder / 'onnx').mkdir(parents=True)
    onnx.save(model, folder / 'onnx/model.onnx')
    classes = json.loads(metadata['class_names'])
    settings = json.loads(metadata['preprocessing'])
    write(folder / 'config.json', config(classes))
    write(folder / 'preprocessor_config.json', processor(settings))


def config(classes):
    """What config.json tells: any classifier of images is a ViT for transformers.js."""
    return {
        'model_type': 'vit',
        'architectures': ['ViTForImageClassification'],
        'id2label': dict(enumerate(classes)),
        'label2id': {name: index for index, name in enumerate(classes)},
    }


def processor(settings):
    """preprocessor_config.json, of the `preprocessing` in the metadata."""
    crop = settings['crop']
    height, width = (crop, crop) if isinstance(crop, int) else crop
    form = settings.get('eval', 'squash')
    told = {
        'image_processor_type': 'ViTImageProcessor',
        'do_resize': True,
        'size': {'height': height, 'width': width},
        'resample': RESAMPLE[settings.get('interpolation', 'bilinear')],
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': [0.5, 0.5, 0.5],
        'image_std': [0.5, 0.5, 0.5],
    }
    if form != 'squash':
        resize = settings.get('resize') or crop
        if form != 'resize_crop' or not isinstance(resize, int):
            raise SystemExit(f'transformers.js has no preprocessing of the form {form}')
        told |= {
            'size': {'shortest_edge': resize},
            'do_center_crop': True,
            'crop_size': {'height': height, 'width': width},
        }
    return told


def write(path, content):
    """Writes JSON."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding='utf-8')


if __name__ == '__main__':
    main()
