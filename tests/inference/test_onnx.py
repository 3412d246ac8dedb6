import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import onnx as onnx_lib
import pytest
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.export import onnx
from vit_jax.export.options import Options
from vit_jax.inference import classifier
from vit_jax.inference import onnx as onnx_model
from vit_jax.inference.task import ONE_CLASS

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / 'scripts'
CLASSES = ('daisy', 'roses', 'tulips')


@pytest.fixture(scope='module')
def model(tiny_model):
    return tiny_model(CLASSES, {'dataset': 'made up'})


@pytest.fixture(scope='module')
def expected(model):
    """(pixels, logits) of five images, by JAX."""
    pixels = np.random.default_rng(1).uniform(0, 255, (5, 16, 16, 3)).astype(np.float32)
    return pixels, np.asarray(classifier.JaxClassifier(model).logits(pixels))


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'model.onnx'


@pytest.mark.parametrize(
    'options', [{}, {'layout': 'NCHW'}, {'opset': 17}, {'features': True, 'attention': True}]
)
def test_logits_equal_those_of_jax(model, expected, path, options):
    onnx.save(onnx.build(model, Options(**options)), path)
    opened = classifier.open_classifier(path)
    assert (opened.class_names, opened.preprocess.crop) == (CLASSES, 16)
    assert opened.preprocess == model.preprocess and opened.source == model.source
    pixels, logits = expected
    for batch in (1, 2, 5):
        found = opened.logits(pixels[:batch])
        assert found.dtype == np.float32 and found.shape == (batch, 3)
        np.testing.assert_allclose(found, logits[:batch], atol=1e-5)


def test_probabilities_become_logits_less_a_constant(model, expected, path):
    onnx.save(onnx.build(model, Options(probabilities=True)), path)
    pixels, logits = expected
    found = onnx_model.OnnxClassifier(path, threads=1).logits(pixels)
    np.testing.assert_allclose(ONE_CLASS.values(found), ONE_CLASS.values(logits), atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize('layout', ['NHWC', 'NCHW'])
def test_files_that_take_bytes_get_them_rounded(model, expected, path, layout):
    onnx.save(onnx.build(model, Options(preprocessing=True, layout=layout)), path)
    pixels, _ = expected
    rounded = np.asarray(classifier.JaxClassifier(model).logits(np.rint(pixels)))
    np.testing.assert_allclose(onnx_model.OnnxClassifier(path).logits(pixels), rounded, atol=1e-5)


def change_metadata(path, **changes):
    proto = onnx_lib.load(path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    metadata |= {key.replace('__', '.'): value for key, value in changes.items()}
    del proto.metadata_props[:]
    onnx_lib.helper.set_model_props(
        proto, {key: value for key, value in metadata.items() if value is not None}
    )
    onnx_lib.save(proto, path)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'class_names': None, 'layout': None}, 'has no metadata class_names, layout, so'),
        ({'vit_jax__format': None}, r'no metadata vit_jax\.format.* not written by vit_jax export'),
        ({'vit_jax__format': '2'}, 'metadata of format 2, this vit_jax reads 1: update'),
        ({'class_names': '['}, 'the metadata of .* cannot be used: Expecting value'),
        ({'preprocessing': '{"crop": 16, "new": 1}'}, 'preprocessing settings must be among'),
        ({'value_range': '[1, -1]'}, 'value_range 1, -1 is not from black to white'),
        ({'preprocessing': '{"crop": 32}'}, 'image_size 16, crop 32 do not agree'),
        ({'class_names': '[' * 50_000}, 'cannot be used: nested too deeply'),
        ({'class_names': '[' * 200 + ']' * 200}, 'cannot be used: nested too deeply'),
        ({'class_names': '[1, 2, 3]'}, r'class_names\[0\] is 1, expected a text'),
        ({'preprocessing': '{"crop": 16.0}'}, 'preprocessing.crop is 16.0, expected a whole'),
        ({'preprocessing': '{"crop": 16, "resize": "x"}'}, "resize is 'x', expected a whole"),
        ({'preprocessing': '[]'}, 'preprocessing is a list, expected an object'),
        ({'value_range': '[0, 1e999]'}, r'value_range\[1\] is inf, expected'),
        ({'value_range': '["0", "1"]'}, r"value_range\[0\] is '0', expected a number"),
        ({'image_size': '60000', 'preprocessing': '{"crop": 60000}'}, 'image_size is 60000'),
        ({'image_size': '9' * 5000}, 'a number of 5,000 digits'),
        ({'source': '7'}, 'source is 7, expected an object'),
        ({'layout': 'NHCW'}, "layout is 'NHCW', expected NHWC or NCHW"),
        ({'class_names': '[]', 'output': 'features'}, 'without classification head'),
        ({'class_names': '["a", "b"]'}, r"metadata says logits: \['batch', 2\]"),
        ({'layout': 'NCHW'}, r"metadata says image: \['batch', 16, 16, 16\]"),
        ({'output': 'probabilities'}, 'metadata says probabilities'),
    ],
)  # fmt: skip
def test_metadata_that_is_missing_or_wrong(model, path, changes, message):
    onnx.save(onnx.build(model), path)
    change_metadata(path, **changes)
    with pytest.raises(UserError, match=message):
        classifier.open_classifier(path)


def set_batch(path, size):
    proto = onnx_lib.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    onnx_lib.save(proto, path)


def test_a_fixed_batch_is_refused_before_an_image_is_read(model, path):
    onnx.save(onnx.build(model), path)
    set_batch(path, 4)
    with pytest.raises(UserError, match='takes 4 images at once and no other number'):
        classifier.open_classifier(path)


def test_graphs_that_fail_or_give_something_else(model, path, monkeypatch):
    onnx.save(onnx.build(model), path)
    opened = classifier.open_classifier(path)
    with pytest.raises(UserError, match='model.onnx cannot be computed: '):
        opened.logits(np.zeros((1, 9, 9, 3), np.float32))

    class Session:
        run = staticmethod(lambda outputs, inputs: [np.zeros((7, 3), np.float32)])

    opened._session = Session
    with pytest.raises(UserError, match=r'gives float32 \[7, 3\] for 2 images, not a score'):
        opened.logits(np.zeros((2, 16, 16, 3), np.float32))


def greedy(path):
    """A graph of 1 kB that takes 8 GiB for one image."""
    helper = onnx_lib.helper
    shape = helper.make_tensor('shape', onnx_lib.TensorProto.INT64, [2], [1, 2**31])
    axes = helper.make_tensor('axes', onnx_lib.TensorProto.INT64, [3], [1, 2, 3])
    last = helper.make_tensor('last', onnx_lib.TensorProto.INT64, [1], [1])
    two = helper.make_tensor('two', onnx_lib.TensorProto.FLOAT, [1, 2], [1, 2])
    nodes = [
        helper.make_node('ReduceMean', ['image', 'axes'], ['mean'], keepdims=0),
        helper.make_node('Unsqueeze', ['mean', 'last'], ['column']),
        helper.make_node('Expand', ['column', 'shape'], ['wide'], name='\x1b[2Jnode'),
        helper.make_node('ReduceMax', ['wide', 'last'], ['max'], keepdims=1),
        helper.make_node('MatMul', ['max', 'two'], ['logits']),
    ]
    kind = onnx_lib.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, 'greedy',
        [helper.make_tensor_value_info('image', kind, ['batch', 8, 8, 3])],
        [helper.make_tensor_value_info('logits', kind, ['batch', 2])],
        [shape, axes, last, two],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=9)
    helper.set_model_props(
        model,
        {
            'vit_jax.format': '1', 'class_names': '["a", "b"]', 'image_size': '8',
            'layout': 'NHWC', 'value_range': '[-1, 1]', 'preprocessing': '{"crop": 8}',
            'output': 'logits',
        },
    )  # fmt: skip
    onnx_lib.save(model, path)


@pytest.mark.parametrize('command', ['predict', 'evaluate'])
def test_max_memory(command, path, tmp_path):
    greedy(path)
    image = tmp_path / 'photos/a/x.png'
    image.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image)
    os.renames(shutil.copytree(image.parent, tmp_path / 'copy'), tmp_path / 'photos/b')
    words = [image] if command == 'predict' else ['--dataset', image.parents[1], '--split', 'all']
    done = subprocess.run(
        [sys.executable, SCRIPTS / f'{command}.py', '--model', path, '--max_memory', '3', *words],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'llocat' in done.stderr or 'memory' in done.stderr, done.stderr
    assert r'\x1b[2Jnode' in done.stderr and done.stderr.replace('\n', '').isprintable()
    assert f'{command}.py: ' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('value', ['0', '-1', 'nan', 'inf'])
def test_max_memory_is_a_positive_number(value, run_script, path, tmp_path):
    done = run_script('predict.py', '--model', path, '--max_memory', value, SCRIPTS / 'predict.py')
    assert done.returncode == 1 and 'is a number of GiB above 0' in done.stderr


def test_files_that_are_no_model(tmp_path, path):
    with pytest.raises(UserError, match='there is no ONNX file'):
        classifier.open_classifier(path)
    path.write_bytes(b'this is no protocol buffer')
    with pytest.raises(UserError, match='cannot be opened as an ONNX model') as error:
        classifier.open_classifier(path)
    assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='no --variant'):
        classifier.open_classifier(path, variant='ViT-B_16')


def test_without_onnxruntime_it_says_what_to_install(model, path, monkeypatch):
    onnx.save(onnx.build(model), path)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(UserError, match=r"pip install 'vit_jax\[export\]'"):
        classifier.open_classifier(path)


def test_predicting_imports_neither_jax_nor_torch(model, path, tmp_path):
    """The command itself, in a process of its own, with all that it has to do."""
    onnx.save(onnx.build(model), path)
    for name in ('a.png', 'b.jpg'):
        pixels = np.random.default_rng(2).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    program = (
        'import runpy, sys\n'
        'try:\n'
        '    runpy.run_path(sys.argv[0], run_name="__main__")\n'
        'except SystemExit as end:\n'
        '    import json\n'
        '    print(json.dumps([end.code, sorted(sys.modules)]))\n'
    )
    arguments = [
        str(SCRIPTS / 'predict.py'), '--model', str(path), '--format', 'jsonl', '--contact_sheet',
        str(tmp_path / 'sheet.png'), str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.argv = {arguments!r}\n{program}'],
        capture_output=True,
        text=True,
        env={**os.environ, 'MPLBACKEND': 'agg'},
    )
    *found, last = map(json.loads, done.stdout.splitlines())
    status, modules = last
    assert (status, done.stderr, len(found)) == (0, '', 2)
    assert {'onnxruntime', 'vit_jax.inference.onnx'} <= set(modules)
    heavy = {'jax', 'jaxlib', 'flax', 'torch', 'tensorflow', 'grain', 'sklearn', 'onnx'}
    assert not heavy & set(modules)
