"""ONNX files: writing them, weights beside them, 8-bit integers, and the benchmark's errors."""

import copy
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

from vit_jax.errors import UserError
from vit_jax.export import onnx as onnx_export
from vit_jax.export import onnx_quantize
from vit_jax.export.options import Options


def run_file(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return session.run(None, {'image': images})[0]


def metadata(path):
    model = onnx.load(path, load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


def test_one_file(case, tmp_path):
    tiny = case('token')
    path = tmp_path / 'new folder' / 'x.onnx'
    onnx_export.save(onnx_export.build(tiny.model), path)
    assert os.listdir(path.parent) == ['x.onnx']
    onnx.checker.check_model(str(path), full_check=True)
    np.testing.assert_allclose(run_file(path, tiny.images), tiny.logits, atol=1e-5, rtol=0)


def test_external_data(case, tmp_path):
    tiny = case('token')
    proto = onnx_export.build(tiny.model)
    before = copy.deepcopy(proto)
    path = tmp_path / 'x.onnx'
    onnx_export.save(proto, path, external_data=True)
    assert proto == before
    assert sorted(os.listdir(tmp_path)) == ['x.onnx', 'x.onnx.data']
    onnx.checker.check_model(str(path), full_check=True)
    np.testing.assert_allclose(run_file(path, tiny.images), tiny.logits, atol=1e-5, rtol=0)
    # Read back by onnx, it is the same model; and the two can be moved together.
    moved = tmp_path / 'moved'
    moved.mkdir()
    for name in ('x.onnx', 'x.onnx.data'):
        os.rename(tmp_path / name, moved / name)
    read = onnx.load(moved / 'x.onnx')
    for theirs, ours in zip(read.graph.initializer, proto.graph.initializer, strict=True):
        assert (theirs.name, theirs.dims, theirs.raw_data) == (ours.name, ours.dims, ours.raw_data)
    light = onnx.load(moved / 'x.onnx', load_external_data=False)
    assert light.graph.node == proto.graph.node
    assert light.metadata_props == proto.metadata_props
    outside = [t for t in light.graph.initializer if t.external_data]
    assert outside
    for tensor in outside:
        reference = {entry.key: entry.value for entry in tensor.external_data}
        assert reference['location'] == 'x.onnx.data'
        assert int(reference['offset']) % 4096 == 0


def test_large_models_get_external_data_by_themselves(case, tmp_path, monkeypatch):
    proto = onnx_export.build(case('token').model)
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    monkeypatch.setattr(onnx_export, 'EXTERNAL_DATA_ABOVE', size)
    onnx_export.save(proto, tmp_path / 'a.onnx')
    monkeypatch.setattr(onnx_export, 'EXTERNAL_DATA_ABOVE', size - 1)
    onnx_export.save(proto, tmp_path / 'b.onnx')
    assert sorted(os.listdir(tmp_path)) == ['a.onnx', 'b.onnx', 'b.onnx.data']


def test_a_file_is_replaced(case, tmp_path):
    path = tmp_path / 'x.onnx'
    for name, external in (('token', False), ('gap', True), ('mixer', False)):
        tiny = case(name)
        onnx_export.save(onnx_export.build(tiny.model), path, external_data=external)
        np.testing.assert_allclose(run_file(path, tiny.images), tiny.logits, atol=1e-5, rtol=0)


def test_an_older_graph_never_meets_new_weights(case, tmp_path, monkeypatch):
    path = tmp_path / 'x.onnx'
    onnx_export.save(onnx_export.build(case('token').model), path, external_data=True)
    replace = os.replace

    def cut_short(source, target):
        if os.path.basename(target) == 'x.onnx':
            raise OSError(5, 'Input/output error')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', cut_short)
    with pytest.raises(UserError, match='Input/output error'):
        onnx_export.save(onnx_export.build(case('gap').model), path, external_data=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('external', [False, True])
def test_a_failed_write_leaves_nothing(case, tmp_path, monkeypatch, external):
    def full(*_):
        raise OSError(28, 'No space left on device')

    proto = onnx_export.build(case('token').model)
    path = tmp_path / 'x.onnx'
    path.write_bytes(b'an older file')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot write .*x.onnx.*No space left'):
        onnx_export.save(proto, path, external_data=external)
    assert os.listdir(tmp_path) == ['x.onnx'] and path.read_bytes() == b'an older file'


def test_a_folder_that_is_a_file(case, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        onnx_export.save(onnx_export.build(case('token').model), tmp_path / 'file' / 'x.onnx')


@pytest.mark.parametrize('name', ['token', 'hybrid_root', 'mixer'])
@pytest.mark.parametrize('external', [False, True])
def test_int8(case, tmp_path, monkeypatch, name, external):
    tiny = case(name)
    path = tmp_path / 'out' / 'int8.onnx'
    proto = onnx_export.build(tiny.model, Options(dtype='int8'))
    if external:
        monkeypatch.setattr(onnx_export, 'EXTERNAL_DATA_ABOVE', 50_000)
    size = onnx_quantize.quantize_dynamic(proto, path)
    assert size > len(proto.SerializeToString()) - 1000
    assert os.listdir(path.parent) == ['int8.onnx']
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    operators = {node.op_type for node in model.graph.node}
    assert 'MatMulInteger' in operators and not operators & {'Gemm', 'ConvInteger'}
    assert metadata(path) == {p.key: p.value for p in proto.metadata_props} | {'dtype': 'int8'}
    for batch in (1, 2, 7):
        logits = run_file(path, tiny.images[:batch])
        expected = tiny.logits[:batch]
        norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((logits * expected).sum(axis=1) / norms).min() > 0.99
        assert np.abs(logits - expected).max() > 1e-4


def test_int8_is_made_from_float32(case, tmp_path):
    proto = onnx_export.build(case('token').model, Options(dtype='float16'))
    with pytest.raises(UserError, match='the graph is float16: int8 is made from a float32 graph'):
        onnx_quantize.quantize_dynamic(proto, tmp_path / 'out.onnx')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
@pytest.mark.parametrize('name', ['token', 'hybrid_root', 'mixer'])
def test_weights_alone_are_small(case, name, dtype):
    """The graph computes what the float32 graph does with the rounded weights, in float32."""
    tiny = case(name)
    full = onnx_export.build(tiny.model)
    proto = onnx_export.build(tiny.model, Options(dtype=dtype, weights_only=True))
    onnx.checker.check_model(proto, full_check=True)
    small = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    integers = [name for name in small if name.endswith('/integers')]
    assert bool(integers) == (dtype == 'int8')
    for tensor in full.graph.initializer:
        weight, name = onnx.numpy_helper.to_array(tensor), tensor.name
        dense = name.removesuffix('/kernel')
        if f'{dense}/integers' in small:
            stored = small[f'{dense}/integers'].astype(np.float32) - 128
            scales = small[f'{dense}/scales'].reshape(*stored.shape[:2], 1)
            rounded = (stored * scales).reshape(len(stored), -1)[:, : len(weight)].T
            distance = np.abs(rounded - weight)
            assert distance.max() <= scales.max() / 2 * 1.001
            assert scales.max() == pytest.approx(np.abs(weight).max() / 127)
        elif f'{name}/stored' in small:
            rounded = small[f'{name}/stored'].astype(np.float32)
            np.testing.assert_allclose(rounded, weight, rtol=2**-11, atol=1e-7)
        else:
            np.testing.assert_array_equal(small[name], weight)
            assert weight.size < 1024 or name.endswith('pos_embedding')
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))
    expected, found = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {'image': tiny.images})[0]
        for model in (full, proto)
    )
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)
    assert 1e-5 < np.abs(found - tiny.logits).max() < 0.05


def test_benchmark_errors(run_script, tmp_path):
    done = run_script('benchmark_export.py', '--variant', 'ViT-Q_16')
    assert done.returncode == 1
    assert done.stderr.startswith("benchmark_export.py: unknown model 'ViT-Q_16'")
    assert done.stderr.count('\n') == 1
    done = run_script('benchmark_export.py', '--output', tmp_path / 'nowhere' / 'x.json')
    assert done.returncode == 1
    assert 'the folder of' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 12), reason='PyTorch is there on Python 3.11 only')
def test_benchmark(command, tmp_path):
    out = tmp_path / 'x.json'
    done = command('scripts/benchmark_export.py', '--runs', 3, '--batch', 1, 2, '--output', out)
    assert done.returncode == 0, done.stderr
    assert 'speed' in done.stdout and out.is_file()
