"""Towers of image-text models as ONNX and StableHLO: the original's numbers, JAX's, and what goes
with them.
"""

import json
import pathlib

import modules
import numpy as np
import onnx
import onnxruntime
import pytest

from vit_jax import models
from vit_jax.checkpoint import npz
from vit_jax.errors import UserError
from vit_jax.export import onnx_text, tower, verify
from vit_jax.export.options import Options
from vit_jax.inference import classifier, two_tower

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'


def run(proto, tokens):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=['CPUExecutionProvider']
    )
    (found,) = session.run(['features'], {'tokens': tokens})
    return found


@pytest.mark.parametrize('opset', [17, 20])
@pytest.mark.parametrize('name', ['lit_bert', 'lit_bert_image_unprojected', 'lit_text_transformer'])
def test_features_are_the_original_releases(name, opset):
    case = json.loads((FIXTURES / 'conformance/lit_index.json').read_text())[name]
    arguments = {key: case[key] for key in ('image', 'text_model', 'text', 'out_dim')}
    model = models.LitModel(**arguments, pp={'max_len': case['max_len']})
    params = npz.open_file(FIXTURES / f'conformance/{name}.checkpoint.npz', whole=True).read()
    expected = np.load(FIXTURES / f'conformance/{name}.expected.npz')
    proto = onnx_text.build(model, params, Options(opset=opset))
    onnx.checker.check_model(proto, full_check=True)
    for batch in (1, 4):
        found = run(proto, expected['tokens'][:batch])
        np.testing.assert_allclose(found, expected['text_embeddings'][:batch], atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', ['bert', 'clip', 'siglip'])
def test_a_text_tower_is_that_of_jax(towers, kind):
    """On texts, and on random tokens with padding of every length, also with no end at all."""
    made = towers(kind)
    tokens = tower.tokens_for(made)
    if kind == 'clip':
        tokens = np.concatenate([tokens, np.full((1, 16), 3, np.int32)])
        assert not (tokens[-1] == 0).any()
    expected = np.asarray(modules.apply(made.model, made.params, tokens=tokens, train=None)[1])
    assert np.ptp(expected, axis=0).max() > 0.1
    for dtype, atol in (('float32', 1e-5), ('float16', 5e-3)):
        proto = onnx_text.build(made.model, made.params, Options(dtype=dtype))
        np.testing.assert_allclose(run(proto, tokens), expected, atol=atol, rtol=0)


def test_exported_with_all_that_using_it_needs(towers, tmp_path):
    made = towers('siglip')
    path = tmp_path / 'texts.onnx'
    report = tower.export(made, path, tower='text', format='onnx')
    assert report.status == verify.VERIFIED and report.facts['imported_vit_jax'] is False
    assert {row.batch for row in report.rows} == {1, 2, 7}
    assert (tmp_path / 'texts.onnx.vocab.model').read_bytes() == made.vocabulary.read_bytes()
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata['temperature']) == made.temperature
    assert json.loads(metadata['bias']) == made.bias
    assert metadata['tokenizer'] == 'sentencepiece' and json.loads(metadata['max_len']) == 8
    assert json.loads(metadata['tokenizer_settings']) == {'canonical': True}
    assert metadata['vocabulary'] == 'texts.onnx.vocab.model'
    (given,) = session.get_inputs()
    assert (given.name, given.shape, given.type) == ('tokens', ['batch', 8], 'tensor(int32)')
    with pytest.raises(UserError, match='text tower'):
        classifier.open_classifier(path)
    with pytest.raises(UserError, match='exists'):
        tower.export(made, path, tower='text', format='onnx')


def test_both_towers_as_onnx_give_the_logits(towers, tmp_path):
    """From files alone: temperature * images @ texts, as the model says."""
    made = towers('clip')
    for name in ('image', 'text'):
        report = tower.export(made, tmp_path / f'{name}.onnx', tower=name, format='onnx')
        assert report.status == verify.VERIFIED
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 32, 32, 3)).astype(np.float32)
    image, text = (
        onnxruntime.InferenceSession(tmp_path / f'{name}.onnx') for name in ('image', 'text')
    )
    texts = ['a photo of a rose', 'dog']
    (zimg,) = image.run(['features'], {'image': pixels / 127.5 - 1})
    (ztxt,) = text.run(['features'], {'tokens': made.tokenizer(texts)})
    temperature = json.loads(image.get_modelmeta().custom_metadata_map['temperature'])
    zero_shot = two_tower.ZeroShotClassifier(made, texts, ('{}',))
    np.testing.assert_allclose(
        temperature * zimg @ ztxt.T, zero_shot.logits(pixels), atol=1e-5, rtol=0
    )
    with pytest.raises(UserError, match='without classification head'):
        classifier.open_classifier(tmp_path / 'image.onnx')


@pytest.mark.parametrize('weights_only', [False, True])
@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_smaller_text_towers(towers, tmp_path, dtype, weights_only):
    made = towers('bert')
    path = tmp_path / 'texts.onnx'
    options = Options(dtype=dtype, weights_only=weights_only)
    report = tower.export(made, path, tower='text', format='onnx', options=options)
    assert report.status == verify.VERIFIED
    stored = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    small = {'float16': onnx.TensorProto.FLOAT16, 'int8': onnx.TensorProto.INT8}[dtype]
    assert stored[{'float16': 'embedding/rows', 'int8': 'embedding/integers'}[dtype]] == small


@pytest.mark.parametrize('name', ['image', 'text'])
def test_stablehlo(towers, tmp_path, name):
    made = towers('bert')
    path = tmp_path / 'tower.stablehlo'
    report = tower.export(made, path, tower=name, format='stablehlo')
    assert report.status == verify.VERIFIED and report.facts['imported_vit_jax'] is False
    told = json.loads((tmp_path / 'tower.stablehlo.json').read_text())
    assert told['tower'] == name and told['temperature'] == made.temperature
    assert told['outputs'] == {'features': ['batch', 20]}
    if name == 'text':
        assert told['input'] == {'shape': ['batch', 7], 'dtype': 'int32'}
        assert (tmp_path / told['vocabulary']).read_bytes() == made.vocabulary.read_bytes()


def test_an_export_that_computes_something_else_is_not_left(towers, tmp_path, monkeypatch):
    made = towers('clip')
    other = models.LitModel(
        **{n: getattr(made.model, n) for n in ('image', 'text_model', 'out_dim', 'pp')},
        text=dict(made.model.text) | {'causal': False},
    )
    wrong = onnx_text.build(other, made.params)
    monkeypatch.setattr(onnx_text, 'build', lambda *_: wrong)
    with pytest.raises(UserError, match='features too far from JAX'):
        tower.export(made, tmp_path / 'texts.onnx', tower='text', format='onnx')
    assert not list(tmp_path.iterdir())


def test_the_command(towers, tmp_path, run_script):
    folder, output = tmp_path / 'model', tmp_path / 'texts.onnx'
    two_tower.save(folder, towers('bert'))

    def export(*words, to=output):
        return run_script(
            'export.py', '--model', folder, '--format', 'onnx', '--output', to, *words
        )

    done = export('--tower', 'text')
    assert done.returncode == 0 and 'text tower, 7 tokens' in done.stdout, done.stderr
    assert 'texts.onnx: written, verified' in done.stdout
    for words, message in (
        ([], 'has two towers: --tower image or --tower text'),
        (['--tower', 'text', '--layout', 'NCHW'], '--layout goes with --tower image'),
        (['--tower', 'text', '--images', folder], '--images goes with --tower image'),
        (['--tower', 'image', '--probabilities'], 'no --probabilities'),
        (['--tower', 'image', '--format', 'npz'], 'onnx or stablehlo, not npz'),
        (['--vocabulary', 'x'], '--vocabulary goes with --tower'),
    ):
        other = tmp_path / ('other.npz' if 'npz' in words else 'other.onnx')
        done = export(*words, to=other)
        assert done.returncode == 1 and message in done.stderr, (words, done.stderr)
        assert not other.exists()
