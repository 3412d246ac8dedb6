"""ONNX graphs: what they compute, in onnxruntime, against JAX."""

import collections
import dataclasses
import json
import pathlib

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from vit_jax import models, variants
from vit_jax.checkpoint import npz
from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.errors import UserError
from vit_jax.export import onnx as onnx_export
from vit_jax.export.options import LAYOUTS, Options
from vit_jax.inference import model_folder

CONFORMANCE = pathlib.Path(__file__).parents[1] / 'fixtures/conformance'
FAMILIES = (
    'token',
    'gap',
    'pre_logits',
    'gap_pre_logits',
    'mlp_head',
    'distilled',
    'gelu',
    'avgmax',
    'no_position_embedding',
    'registers',
    'map',
    'gated',
    'dinov3',
    'eva02',
    'hybrid_root',
    'hybrid_stages',
    'mixer',
)
# Opset 17 spells GELU, sums and splits in another way: once in each kind of graph.
OPSETS = [(name, 20) for name in FAMILIES] + [
    (name, 17)
    for name in ('gap_pre_logits', 'distilled', 'gelu', 'eva02', 'hybrid_stages', 'mixer')
]
BATCHES = (1, 2, 7)
FLOAT32_ATOL = 1e-5  # for logits of unit scale


def run(proto, images):
    """All outputs of a model, by name."""
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=['CPUExecutionProvider']
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {'image': images}), strict=True))


def count(proto):
    return collections.Counter(node.op_type for node in proto.graph.node)


def types(proto):
    """Element type of every value."""
    graph = proto.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize('name, opset', OPSETS)
def test_logits_are_those_of_jax(case, name, opset):
    tiny = case(name)
    proto = onnx_export.build(tiny.model, Options(opset=opset))
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == opset
    assert proto.ir_version == {17: 8, 20: 9}[opset]  # what came with them
    for batch in BATCHES:
        outputs = run(proto, tiny.images[:batch])
        assert list(outputs) == ['logits'] and outputs['logits'].dtype == np.float32
        np.testing.assert_allclose(
            outputs['logits'], tiny.logits[:batch], atol=FLOAT32_ATOL, rtol=0
        )


@pytest.mark.parametrize(
    'name',
    ['vit_token', 'vit_token_pre_logits', 'vit_gap', 'vit_head_dim_80', 'hybrid_stem', 'mixer'],
)
def test_logits_are_the_original_releases(name):
    config = json.loads((CONFORMANCE / 'index.json').read_text())[name]
    arguments = dict(config['config'])
    classes = arguments.pop('num_classes')
    model = model_folder.Model(
        models.from_config(arguments, num_classes=classes),
        npz.open_file(CONFORMANCE / f'{name}.checkpoint.npz').read(),
        arguments,
        tuple(map(str, range(classes))),
        Preprocess(crop=config['image_size']),
        {},
    )
    expected = np.load(CONFORMANCE / f'{name}.expected.npz')
    logits = run(onnx_export.build(model), expected['images'])['logits']
    np.testing.assert_allclose(logits, expected['logits'], atol=FLOAT32_ATOL, rtol=0)


@pytest.mark.parametrize('name, opset', OPSETS)
def test_nothing_can_be_removed_and_all_shapes_are_known(case, name, opset):
    onnxsim = pytest.importorskip('onnxsim', reason='needs onnxsim: requirements-test.txt')
    model = case(name).model
    proto = onnx_export.build(model, Options(opset=opset))
    side = model.image_size
    for shapes in ({}, {'image': [2, side, side, 3]}):
        simpler, ok = onnxsim.simplify(proto, overwrite_input_shapes=shapes)
        assert ok
        assert count(simpler) == count(proto)
    shapes = {v.name: v.type.tensor_type.shape for v in [*proto.graph.value_info]}
    shapes |= {v.name: v.type.tensor_type.shape for v in proto.graph.output}
    for node in proto.graph.node:
        for value in node.output:
            dims = shapes[value].dim
            assert dims[0].dim_param in ('batch', 'rows', '2*batch')
            assert all(dim.dim_value > 0 for dim in dims[1:]), value
    # The only lengths written into the graph that could be a batch are open.
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    reshapes = [node for node in proto.graph.node if node.op_type == 'Reshape']
    assert reshapes and all(constants[node.input[1]][0] == -1 for node in reshapes)


@pytest.mark.parametrize('name', ['token', 'hybrid_root', 'mixer'])
def test_channels_first(case, name):
    tiny = case(name)
    proto = onnx_export.build(tiny.model, Options(layout='NCHW'))
    logits = run(proto, tiny.images.transpose(0, 3, 1, 2))['logits']
    np.testing.assert_allclose(logits, tiny.logits, atol=FLOAT32_ATOL, rtol=0)


def test_probabilities_of_each_image(case):
    tiny = case('token')
    for dtype, atol in (('float32', 1e-6), ('float16', 1e-3)):
        proto = onnx_export.build(tiny.model, Options(probabilities=True, dtype=dtype))
        outputs = run(proto, tiny.images)
        assert list(outputs) == ['probabilities']
        expected = np.exp(tiny.logits) / np.exp(tiny.logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(outputs['probabilities'], expected, atol=atol, rtol=0)
        np.testing.assert_allclose(outputs['probabilities'].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize('name', FAMILIES)
def test_features_and_attention(case, name):
    tiny = case(name)
    attention = name != 'mixer'
    proto = onnx_export.build(tiny.model, Options(features=True, attention=attention))
    outputs = run(proto, tiny.images)
    assert list(outputs) == ['logits', 'features'] + ['attention'] * attention
    np.testing.assert_allclose(outputs['logits'], tiny.logits, atol=FLOAT32_ATOL, rtol=0)
    features = tiny.values['pre_logits']
    features = features.mean(axis=1) if name == 'distilled' else features
    np.testing.assert_allclose(outputs['features'], features, atol=FLOAT32_ATOL, rtol=0)
    if attention:
        weights = [
            tiny.values[f'Transformer/encoderblock_{layer}/attention_weights'] for layer in range(2)
        ]
        np.testing.assert_allclose(outputs['attention'], np.stack(weights, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize('name', ['gap', 'distilled'])
def test_a_model_without_a_head_gives_features(case, made_up, name):
    tiny = case(name)
    params = {k: v for k, v in tiny.model.params.items() if k not in ('head', 'head_dist')}
    module = tiny.model.model.clone(num_classes=0)
    model = dataclasses.replace(tiny.model, model=module, params=params, class_names=())
    with pytest.raises(UserError, match='no classification head.*features'):
        onnx_export.build(model)
    proto = onnx_export.build(model, Options(features=True))
    outputs = run(proto, tiny.images)
    assert list(outputs) == ['features']
    features = tiny.values['pre_logits']
    features = features.mean(axis=1) if name == 'distilled' else features
    np.testing.assert_allclose(outputs['features'], features, atol=FLOAT32_ATOL, rtol=0)
    assert {p.key: p.value for p in proto.metadata_props}['output'] == 'features'


@pytest.mark.parametrize('layout', LAYOUTS)
def test_preprocessing_inside(case, layout):
    tiny = case('token')
    pixels = np.random.default_rng(2).integers(256, size=tiny.images.shape).astype(np.uint8)
    plain = onnx_export.build(tiny.model)
    inside = onnx_export.build(tiny.model, Options(preprocessing=True, layout=layout))
    assert types(inside)['image'] == TensorProto.UINT8
    given = pixels if layout == 'NHWC' else pixels.transpose(0, 3, 1, 2)
    # Not only near: the graph rounds as `normalize` does.
    np.testing.assert_array_equal(
        run(inside, given)['logits'], run(plain, normalize(pixels))['logits']
    )


@pytest.mark.parametrize('name, opset', OPSETS)
def test_float16_is_typed_in_the_graph(case, name, opset):
    tiny = case(name)
    options = Options(dtype='float16', opset=opset, features=True, attention=name != 'mixer')
    proto = onnx_export.build(tiny.model, options)
    onnx.checker.check_model(proto, full_check=True)
    of = types(proto)
    low = {'Gemm', 'MatMul', 'Conv'}
    high = {'LayerNormalization', 'InstanceNormalization', 'Softmax', 'ReduceMean', 'Tanh'}
    seen = set()
    for node in proto.graph.node:
        floats = {of[value] for value in node.input if of[value] != TensorProto.INT64}
        if node.op_type in low:
            assert floats == {TensorProto.FLOAT16}, node.name
        elif node.op_type in high and node.name != 'pre_logits/tanh':
            assert floats == {TensorProto.FLOAT}, node.name
        elif node.op_type != 'Cast':
            assert len(floats) == 1, node.name
        seen.add(node.op_type)
    assert {'Gemm', 'Conv', 'LayerNormalization', 'Cast'} <= seen
    assert all(of[v.name] == TensorProto.FLOAT for v in [*proto.graph.input, *proto.graph.output])
    kernels = [t for t in proto.graph.initializer if t.name.endswith('/kernel')]
    assert kernels and all(t.data_type == TensorProto.FLOAT16 for t in kernels)

    logits = run(proto, tiny.images)['logits']
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(tiny.logits, axis=1)
    assert ((logits * tiny.logits).sum(axis=1) / norms).min() > 0.9999
    # Different from float32, or nothing was rounded.
    assert np.abs(logits - tiny.logits).max() > 1e-5


def test_gelu_is_one_node_from_opset_20(case):
    model = case('token').model
    assert count(onnx_export.build(model))['Gelu'] == 2
    older = count(onnx_export.build(model, Options(opset=17)))
    assert older['Gelu'] == 0 and older['Tanh'] == 2


def test_number_of_nodes(made_up):
    """Of a Ti/16; the size of the image changes nothing."""
    model = made_up(variants.get_config('ViT-Ti_16').to_dict(), 32)
    assert len(onnx_export.build(model).graph.node) == 232
    assert len(onnx_export.build(model, Options(opset=17)).graph.node) == 316


def test_metadata(case):
    tiny = case('token')
    options = Options(probabilities=True, layout='NCHW', preprocessing=True, dtype='float16')
    proto = onnx_export.build(tiny.model, options)
    found = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(found.pop('class_names')) == [f'Blüte {i}' for i in range(5)]
    assert json.loads(found.pop('value_range')) == [0, 255]
    assert Preprocess.from_dict(json.loads(found.pop('preprocessing'))) == Preprocess(crop=32)
    assert json.loads(found.pop('source')) == {'dataset': 'made up'}
    found.pop('vit_jax.version')
    assert found == {
        'vit_jax.format': '1',
        'model_name': '',
        'image_size': '32',
        'layout': 'NCHW',
        'output': 'probabilities',
        'dtype': 'float16',
    }


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'opset': 13}, 'unknown opset 13: one of 17, 20'),
        ({'opset': 18}, 'unknown opset 18'),
        ({'layout': 'HWC'}, "unknown layout 'HWC': one of NHWC, NCHW"),
        ({'dtype': 'bfloat16'}, "unknown dtype 'bfloat16': one of float32, float16, int8"),
        ({'weights_only': True}, '--weights_only goes with --dtype float16 or int8'),
    ],
)
def test_unknown_options(arguments, message):
    with pytest.raises(UserError, match=message):
        Options(**arguments)


def test_what_cannot_be_exported(case, made_up):
    config = case('token').model.model_config
    for classifier in ('unpooled', 'token_unpooled'):
        model = made_up(config | {'classifier': classifier}, 32)
        with pytest.raises(UserError, match=f'{classifier}.*for each token.*cannot be exported'):
            onnx_export.build(model, Options(features=True))
    with pytest.raises(UserError, match='MLP-Mixer has no attention'):
        onnx_export.build(case('mixer').model, Options(attention=True))


def test_weights_that_float16_cannot_hold(case):
    tiny = case('token')
    params = dict(tiny.model.params)
    params['head'] = {'kernel': params['head']['kernel'] + np.float32(1e5), 'bias': np.zeros(5)}
    model = dataclasses.replace(tiny.model, params=params)
    onnx_export.build(model)
    with pytest.raises(UserError, match='head/kernel holds 1e.05, beyond the range of float16'):
        onnx_export.build(model, Options(dtype='float16'))
    params['head'] = {'kernel': np.full((24, 5), np.nan, np.float32), 'bias': np.zeros(5)}
    with pytest.raises(UserError, match='head/kernel holds NaN or infinity'):
        onnx_export.build(model)


def test_real_weights(shared_dir):
    """The answers of the original release."""
    model = model_folder.load(shared_dir / 'weights/deit_ti16_imagenet1k.npz')
    reference = np.load(shared_dir / 'weights/deit_ti16_imagenet1k_reference.npz')
    expected = reference['logits'][:3]
    for dtype in ('float32', 'float16'):
        proto = onnx_export.build(model, Options(preprocessing=True, dtype=dtype))
        logits = run(proto, reference['images'][:3])['logits']
        assert (logits.argmax(1) == expected.argmax(1)).all()
        if dtype == 'float32':
            np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
        else:
            norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
            assert ((logits * expected).sum(axis=1) / norms).min() > 0.9999
