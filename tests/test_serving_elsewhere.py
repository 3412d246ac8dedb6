"""The examples of docs/ for transformers.js, Triton and TensorRT."""

import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import modules
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.export import onnx, onnx_text
from vit_jax.export.options import Options
from vit_jax.inference import classifier, predict

DOCS = pathlib.Path(__file__).resolve().parents[1] / 'docs'
CLASSES = ('dandelion', 'Gänseblümchen', 'tulips')


@pytest.fixture(scope='module')
def model(tiny_model):
    return tiny_model(CLASSES)


def call(monkeypatch, script, *words):
    monkeypatch.setattr(sys, 'argv', [str(script), *map(str, words)])
    runpy.run_path(str(script), run_name='__main__')


@pytest.fixture
def photos(tmp_path):
    """PNG files of the model's size, which nobody has to resize."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f'{i}.png' for i in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def for_transformers_js(model, tmp_path, monkeypatch):
    onnx.save(onnx.build(model, Options(layout='NCHW')), tmp_path / 'flowers.onnx')
    script = DOCS / 'serving/transformers_js.py'
    call(monkeypatch, script, tmp_path / 'flowers.onnx', tmp_path / 'js')
    onnx.save(onnx.build(model), tmp_path / 'nhwc.onnx')
    with pytest.raises(SystemExit, match='--layout NCHW'):
        call(monkeypatch, script, tmp_path / 'nhwc.onnx', tmp_path / 'other')
    return tmp_path / 'js'


def test_the_folder_for_transformers_js(for_transformers_js, model):
    session = onnxruntime.InferenceSession(for_transformers_js / 'onnx/model.onnx')
    assert [given.name for given in session.get_inputs()] == ['pixel_values']
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    (found,) = session.run(['logits'], {'pixel_values': images})
    expected = modules.apply(model.model, model.params, images.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    config = json.loads((for_transformers_js / 'config.json').read_text('utf-8'))
    assert config['id2label'] == {str(i): name for i, name in enumerate(CLASSES)}
    processor = json.loads((for_transformers_js / 'preprocessor_config.json').read_text())
    assert processor['size'] == {'height': 16, 'width': 16}
    scale, shift = (processor[name][0] for name in ('image_std', 'image_mean'))
    assert (255 * processor['rescale_factor'] - shift) / scale == 1 and -shift / scale == -1


def test_transformers_js_says_what_predict_says(for_transformers_js, model, photos):
    """With its package in `$VIT_JAX_NODE/node_modules`; 500 MB, so that no test fetches it."""
    node = pathlib.Path(os.environ.get('VIT_JAX_NODE', ''))
    if not (node / 'node_modules/@huggingface/transformers').is_dir() or not shutil.which('node'):
        pytest.skip('needs transformers.js: npm install @huggingface/transformers, VIT_JAX_NODE')
    script = for_transformers_js.parent / 'classify.mjs'
    shutil.copyfile(DOCS / 'serving/classify.mjs', script)
    (script.parent / 'node_modules').symlink_to(node / 'node_modules')
    command = ['node', script, 'js', *photos]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    told = re.findall(r'^  (\S+)  (\S+)$', done.stdout, re.MULTILINE)
    found = np.array([float(score) for _, score in told]).reshape(3, 3)
    path = script.parent / 'nhwc.onnx'
    expected = dict(predict.predict(classifier.open_classifier(path), photos))
    for i, photo in enumerate(photos):
        order = np.argsort(-expected[photo])
        assert [name for name, _ in told[3 * i : 3 * i + 3]] == [CLASSES[j] for j in order]
        np.testing.assert_allclose(found[i], expected[photo][order], atol=1e-4)


def read_config(path):
    """config.pbtxt as a dict of lists, by its own small grammar."""
    tokens = iter(re.findall(r'"[^"]*"|[\w.]+|[{}\[\]:,]', path.read_text('utf-8')))

    def block():
        found = {}
        for key in tokens:
            if key == '}':
                return found
            value = next(tokens)
            value = next(tokens) if value == ':' else value
            found.setdefault(key, []).append(parse(value))
        return found

    def parse(token):
        if token == '{':
            return block()
        if token != '[':
            return json.loads(token) if re.fullmatch(r'"[^"]*"|\d+', token) else token
        return [parse(item) for item in iter(lambda: next(tokens), ']') if item != ',']

    return block()


def text_tower():
    """The graph of a small text tower, which has no classes."""
    sizes = dict(width=16, num_layers=1, mlp_dim=16, num_heads=2, vocab_size=9)
    module = models.LitModel(
        image={}, text_model='text_transformer', text=sizes, out_dim=None, pp={'max_len': 5}
    )
    tokens = np.zeros((1, 5), np.int32)
    return onnx_text.build(module, modules.params_of(module, tokens=tokens))


@pytest.mark.parametrize('kind', ['logits', 'bytes', 'text'])
def test_the_configuration_for_triton_is_the_signature(model, tmp_path, monkeypatch, kind):
    path = tmp_path / 'flowers.onnx'
    options = {
        'logits': Options(layout='NCHW'),
        'bytes': Options(preprocessing=True, probabilities=True, features=True),
    }
    proto = text_tower() if kind == 'text' else onnx.build(model, options[kind])
    onnx.save(proto, path, external_data=kind == 'bytes')
    call(monkeypatch, DOCS / 'serving/triton.py', path, tmp_path / 'models', '--max-batch', '16')
    folder = tmp_path / 'models/flowers'
    session = onnxruntime.InferenceSession(folder / '1/model.onnx')
    told = read_config(folder / 'config.pbtxt')
    assert told['name'] == ['flowers'] and told['max_batch_size'] == [16]
    types = {'TYPE_FP32': 'float', 'TYPE_UINT8': 'uint8', 'TYPE_INT32': 'int32'}
    for word, values in (('input', session.get_inputs()), ('output', session.get_outputs())):
        (entries,) = told[word] if len(told[word]) == 1 else (sum(told[word], []),)
        assert [(e['name'][0], e['dims'][0], types[e['data_type'][0]]) for e in entries] == [
            (v.name, v.shape[1:], v.type.removeprefix('tensor(')[:-1]) for v in values
        ]
        assert all(isinstance(value.shape[0], str) for value in values)  # the batch is open
    labelled = [e for e in sum(told['output'], []) if 'label_filename' in e]
    lines = (folder / 'labels.txt').read_text('utf-8').splitlines()
    assert lines == ([] if kind == 'text' else list(CLASSES)) and bool(labelled) == bool(lines)


TENSORRT = """
import ctypes, enum, numpy, onnxruntime
class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2
class Logger:
    WARNING = 2
    def __init__(self, level): pass
def nptype(dtype): return numpy.dtype({'float': 'float32', 'uint8': 'uint8'}[dtype]).type
class Runtime:
    def __init__(self, logger): pass
    def deserialize_cuda_engine(self, content): return Engine(content) if content else None
class Engine:
    def __init__(self, content):
        self.session = onnxruntime.InferenceSession(content)
        self.all = {v.name: (v, m) for m, vs in (
            (TensorIOMode.INPUT, self.session.get_inputs()),
            (TensorIOMode.OUTPUT, self.session.get_outputs())) for v in vs}
        self.num_io_tensors = len(self.all)
    def get_tensor_name(self, i): return list(self.all)[i]
    def get_tensor_mode(self, name): return self.all[name][1]
    def get_tensor_shape(self, name): return (-1, *self.all[name][0].shape[1:])
    def get_tensor_dtype(self, name): return self.all[name][0].type[7:-1]
    def create_execution_context(self): return Context(self)
class Context:
    def __init__(self, engine): self.engine, self.places = engine, {}
    def set_input_shape(self, name, shape): self.shape = (name, tuple(shape))
    def get_tensor_shape(self, name): return (self.shape[1][0], *self.engine.all[name][0].shape[1:])
    def set_tensor_address(self, name, place): self.places[name] = place
    def execute_async_v3(self, stream):
        name, shape = self.shape
        given = numpy.empty(shape, nptype(self.engine.get_tensor_dtype(name)))
        ctypes.memmove(given.ctypes.data, self.places[name], given.nbytes)
        names = [n for n in self.places if n != name]
        for n, array in zip(names, self.engine.session.run(names, {name: given})):
            ctypes.memmove(self.places[n], array.ctypes.data, array.nbytes)
        return True
"""
CUDA = """
import ctypes, enum
class cudaError_t(enum.Enum):
    cudaSuccess = 0
class cudaMemcpyKind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
ok, held = cudaError_t.cudaSuccess, {}
def cudaStreamCreate(): return ok, 7
def cudaStreamSynchronize(stream): return (ok,)
def cudaMalloc(size):
    buffer = ctypes.create_string_buffer(size)
    held[ctypes.addressof(buffer)] = buffer
    return ok, ctypes.addressof(buffer)
def cudaFree(place):
    del held[place]
    return (ok,)
def cudaMemcpyAsync(to, start, size, kind, stream):
    ctypes.memmove(to, start, size)
    return (ok,)
"""


@pytest.mark.skipif(bool(importlib.util.find_spec('tensorrt')), reason='TensorRT is installed')
@pytest.mark.parametrize('options', [{}, {'layout': 'NCHW', 'probabilities': True}])
def test_the_runner_of_tensorrt(model, photos, tmp_path, options):
    """Against a stand-in for tensorrt and CUDA that runs the ONNX file; in a process of its own."""
    path = tmp_path / 'model.onnx'
    onnx.save(onnx.build(model, Options(**options)), path)
    fakes = tmp_path / 'fakes'
    (fakes / 'cuda/bindings').mkdir(parents=True)
    (fakes / 'tensorrt.py').write_text(TENSORRT)
    (fakes / 'cuda/bindings/runtime.py').write_text(CUDA)
    labels = tmp_path / 'labels.txt'
    labels.write_text('\n'.join(CLASSES), 'utf-8')
    done = subprocess.run(
        [sys.executable, DOCS / 'tensorrt/runner.py', path, labels, *photos],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(fakes), 'PYTHONIOENCODING': 'utf-8'},
    )
    assert done.returncode == 0, done.stderr
    told = re.findall(r'^  (\S+)  (\S+)$', done.stdout, re.MULTILINE)
    expected = dict(predict.predict(classifier.open_classifier(path), photos))
    best = np.concatenate([np.sort(expected[photo])[::-1] for photo in photos])
    np.testing.assert_allclose([float(score) for _, score in told], best, atol=1e-4)
    assert told[0][0] == CLASSES[expected[photos[0]].argmax()]
