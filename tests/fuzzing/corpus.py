"""Small real files of every kind that is read, made by this package's own writers."""

import argparse
import importlib.util
import io
import json
import os
import pathlib
import runpy
import shutil

import numpy as np
from PIL import Image

from fuzzing import rows, runs
from vit_jax import checkpoint
from vit_jax.checkpoint import npz
from vit_jax.data.preprocess import Preprocess
from vit_jax.export import pytorch as export
from vit_jax.inference import model_folder

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
SHARED = pathlib.Path(__file__).parents[3] / 'shared'

WIDTH, HEADS, CLASSES, SIZE = 8, 2, 3, 12
CONFIG = {
    'model_name': None,
    'patches': {'size': (4, 4)},
    'hidden_size': WIDTH,
    'transformer': {
        'mlp_dim': 16,
        'num_heads': HEADS,
        'num_layers': 2,
        'attention_dropout_rate': 0.0,
        'dropout_rate': 0.0,
    },
    'classifier': 'token',
    'representation_size': None,
}
NAMES = ('a rose', 'Gänseblümchen', 'x/y')


def params() -> dict:
    """A ViT of two blocks, Linen names."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def layer(*shape):
        return {'kernel': array(*shape), 'bias': array(*shape[1:])}

    def norm():
        return {'scale': array(WIDTH), 'bias': array(WIDTH)}

    head = WIDTH // HEADS
    block = {
        'LayerNorm_0': norm(),
        'MultiHeadDotProductAttention_0': {
            **{name: layer(WIDTH, HEADS, head) for name in ('query', 'key', 'value')},
            'out': {'kernel': array(HEADS, head, WIDTH), 'bias': array(WIDTH)},
        },
        'LayerNorm_1': norm(),
        'MlpBlock_0': {'Dense_0': layer(WIDTH, 16), 'Dense_1': layer(16, WIDTH)},
    }
    return {
        'cls': array(1, 1, WIDTH),
        'embedding': {'kernel': array(4, 4, 3, WIDTH), 'bias': array(WIDTH)},
        'Transformer': {
            'posembed_input': {'pos_embedding': array(1, 10, WIDTH)},
            'encoderblock_0': block,
            'encoderblock_1': block,
            'encoder_norm': norm(),
        },
        'head': layer(WIDTH, CLASSES),
    }


def make(root: pathlib.Path) -> None:
    """Writes one folder for each reader below `root`; PyTorch's only where PyTorch is."""
    tree = params()
    root.mkdir()
    _make_npz(root / 'npz', tree)
    model_folder.save(
        root / 'models' / 'model',
        tree,
        model_config=CONFIG,
        class_names=NAMES,
        preprocess=Preprocess(crop=SIZE),
        source={'dataset': 'made up'},
    )
    model = model_folder.load(root / 'models' / 'model')
    for to in ('timm', 'huggingface', 'torchvision'):
        export.write(root / 'folders' / to, model, to=to)
    _make_rotary(root)
    files = root / 'safetensors'
    files.mkdir()
    for folder in (root / 'folders').iterdir():
        shutil.copy(folder / 'model.safetensors', files / f'{folder.name}.safetensors')
    _make_shards(root / 'folders' / 'huggingface', root / 'folders' / 'shards')
    _make_pickles(root / 'pickles', files / 'timm.safetensors')
    _make_msgpack(root / 'folders' / 'huggingface', root / 'msgpack' / 'flax')
    _make_images(root / 'images')
    runs.make(root, root / 'models' / 'model')
    tfds_set = runpy.run_path(str(FIXTURES / 'data' / 'tfds_set.py'))
    pictures = [path.read_bytes() for path in sorted((root / 'images').glob('small*'))]
    tfds_set['make'](
        root / 'tfds',
        [tfds_set['tf_example'](pictures[i % len(pictures)], i % 2) for i in range(6)],
    )
    rows.make(root, pictures)
    (root / 'index').mkdir()
    (root / 'index' / 'index.csv').write_text(
        'name,ds,filename,final_val\n'
        'B/16,i21k,B_16-i21k-300ep-lr_0.001,0.41\nTi/16,i21k,Ti_16-i21k-300ep-lr_0.001,0.3\n'
    )
    for name in ('B_16', 'Ti_16'):
        shutil.copy(root / 'npz/vit.npz', root / 'index' / f'{name}-i21k-300ep-lr_0.001.npz')


def _make_rotary(root: pathlib.Path) -> None:
    """A DINOv3 of one block: model folder, `.npz` with settings, folders of timm, Hugging Face."""
    tree = params()
    encoder, block = tree['Transformer'], tree['Transformer']['encoderblock_0']
    del encoder['posembed_input'], encoder['encoderblock_1'], tree['head']
    del block['MultiHeadDotProductAttention_0']['key']['bias']
    block |= {f'LayerScale_{i}': {'scale': np.ones(WIDTH, np.float32)} for i in range(2)}
    tree['registers'] = np.zeros((1, 2, WIDTH), np.float32)
    shape = {'num_layers': 1, 'layer_scale': True, 'add_position_embedding': False}
    config = CONFIG | {
        'transformer': CONFIG['transformer'] | shape | {'qkv_bias': 'qv'},
        'registers': 2,
        'act': 'gelu',
        'rotary': {'form': 'dinov3', 'theta': 100.0},
    }
    folder = root / 'models' / 'rotary'
    preprocess = Preprocess(crop=SIZE)
    model_folder.save(
        folder, tree, model_config=config, class_names=(), preprocess=preprocess, source={}
    )
    model = model_folder.load(folder)
    for to in ('timm', 'huggingface'):
        export.write(root / 'folders' / f'rotary_{to}', model, to=to)
    export.write(root / 'npz' / 'rotary.npz', model, to='npz')


def _make_npz(folder: pathlib.Path, tree: dict) -> None:
    folder.mkdir()
    checkpoint.save(folder / 'vit.npz', tree)
    flat = npz.flatten(npz.to_published(tree))
    np.savez_compressed(folder / 'compressed.npz', **flat)
    halves = {name: array.view(np.uint16)[..., 1::2].view('V2') for name, array in flat.items()}
    np.savez(folder / 'bfloat16.npz', **halves)
    stacked = {name: array for name, array in npz.flatten(tree).items() if 'block' not in name}
    for name, array in npz.flatten(tree['Transformer']['encoderblock_0']).items():
        stacked[f'Transformer/encoderblock/{name}'] = np.stack([array, array])
    stacked['pos_embedding'] = stacked.pop('Transformer/posembed_input/pos_embedding')[:, 1:]
    beside = {'opt/0/mu': np.zeros(3, np.float32)}
    np.savez(folder / 'big_vision.npz', **{f'params/{k}': v for k, v in stacked.items()}, **beside)
    small = [
        p for p in (FIXTURES / 'conformance').glob('*.checkpoint.npz') if p.stat().st_size < 1e6
    ]
    for path in small[:3]:  # the original release's own
        shutil.copy(path, folder / path.name)


def _make_shards(source: pathlib.Path, folder: pathlib.Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    for name in ('config.json', 'preprocessor_config.json'):
        shutil.copy(source / name, folder / name)
    tensors = load_file(source / 'model.safetensors')
    names = sorted(tensors)
    parts = {'model-1-of-2.safetensors': names[::2], 'model-2-of-2.safetensors': names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {name: file for file, members in parts.items() for name in members}
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))


def _make_msgpack(source: pathlib.Path, folder: pathlib.Path) -> None:
    """A folder of transformers' Flax models, whose kernels lie the other way round."""
    from flax import serialization, traverse_util
    from safetensors.numpy import load_file

    flat = {}
    for name, array in load_file(source / 'model.safetensors').items():
        module, _, kind = name.rpartition('.')
        if kind == 'weight' and array.ndim > 1:
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
            name = f'{module}.kernel'
        flat[f'{module}.scale' if kind == 'weight' and array.ndim == 1 else name] = array
    folder.mkdir(parents=True)
    tree = traverse_util.unflatten_dict(flat, sep='.')
    (folder / 'flax_model.msgpack').write_bytes(serialization.msgpack_serialize(tree))
    for name in ('config.json', 'preprocessor_config.json'):
        shutil.copy(source / name, folder / name)


def _make_pickles(folder: pathlib.Path, source: pathlib.Path) -> None:
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        return
    folder.mkdir()
    tensors = load_file(source)
    torch.save(tensors, folder / 'zip.pth')
    beside = {'args': argparse.Namespace(lr=0.1), 'epoch': 3, 'best': np.float64(0.5)}
    torch.save({'model': tensors, **beside}, folder / 'wrapped.pt')
    torch.save(tensors, folder / 'old.bin', _use_new_zipfile_serialization=False)
    torch.save({k: v.bfloat16() for k, v in tensors.items()}, folder / 'bfloat16.pth')


def _make_images(folder: pathlib.Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image, format, options in (
        ('small.jpg', picture, 'JPEG', {'exif': exif}),
        ('small_progressive.jpg', picture, 'JPEG', {'progressive': True}),
        ('small_cmyk.jpg', picture.convert('CMYK'), 'JPEG', {}),
        ('small.png', picture, 'PNG', {}),
        ('small_palette.png', picture.quantize(9), 'PNG', {'transparency': 0, 'exif': exif}),
        ('deep.png', Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)), 'PNG', {}),
        ('small.webp', picture, 'WEBP', {}),
        ('small.bmp', picture, 'BMP', {}),
        ('animated.gif', picture.convert('P'), 'GIF', {'save_all': True}),
        ('page.tiff', picture, 'TIFF', {'compression': 'tiff_lzw'}),
        ('icon.ico', picture, 'ICO', {}),
        ('tiles.tiff', picture, 'TIFF', {'compression': 'tiff_adobe_deflate', 'exif': exif}),
        ('plain.tiff', picture.convert('L'), 'TIFF', {}),
        ('long.jp2', picture, 'JPEG2000', {}),
        ('photo.avif', picture, 'AVIF', {}),
        ('map.ppm', picture, 'PPM', {}),
    ):
        data = io.BytesIO()
        image.save(data, format, **options)
        (folder / name).write_bytes(data.getvalue())
    if importlib.util.find_spec('pillow_heif'):
        import pillow_heif

        pillow_heif.from_pillow(picture).save(folder / 'phone.heic')
    photos = [*(FIXTURES / 'data/photos').glob('*.jpg')]
    photos += sorted(SHARED.glob('data/flowers_folder/test/*/*.jpg'))[:2]
    for path in photos:
        shutil.copy(path, folder / f'photo_{os.path.basename(path)}')
