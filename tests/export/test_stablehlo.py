"""StableHLO files: what they compute, for which devices and batches, and their description."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax import export

from vit_jax.analysis import compare
from vit_jax.errors import UserError
from vit_jax.export import stablehlo
from vit_jax.export.options import Options
from vit_jax.export.outputs import forward


@pytest.mark.parametrize(
    'name, batches', [('distilled', (1, 3)), ('hybrid_root', (2,)), ('mixer', (2,))]
)
def test_it_computes_the_model_at_any_batch(case, name, batches):
    found = case(name)
    exported = stablehlo.build(found.model)
    assert exported.platforms == ('cpu', 'cuda')
    assert str(exported.in_avals[0].shape[0]) == 'batch'
    for count in batches:
        outputs = exported.call(found.images[:count])
        assert list(outputs) == ['logits']
        np.testing.assert_allclose(
            outputs['logits'], found.logits[:count], rtol=0, atol=2e-6, err_msg=str(count)
        )


def test_options(case):
    found = case('distilled')
    pixels = np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3), np.uint8)
    outputs = ('probabilities', 'features', 'attention')
    options = Options(
        layout='NCHW', preprocessing=True, probabilities=True, features=True, attention=True
    )
    result = stablehlo.build(found.model, options).call(pixels.transpose(0, 3, 1, 2))
    compute = forward(found.model.model, ('logits', *outputs))
    run = compare.compiled(compute, found.model.params)
    expected = run((pixels.astype(np.float32) - 127.5) / 127.5)
    logits = expected.pop('logits')
    assert result['attention'].shape == (2, 2, 4, 18, 18)
    assert result['features'].shape == (2, 24)
    for name in outputs:
        np.testing.assert_allclose(result[name], expected[name], rtol=0, atol=2e-6, err_msg=name)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(result['probabilities'], softmax, rtol=0, atol=1e-6)


def test_only_the_tokens_that_the_head_reads(case):
    model, image = case('token').model, jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)

    def flops(*outputs):
        lowered = jax.jit(forward(model.model, outputs)).lower(model.params, image)
        return lowered.cost_analysis()['flops']

    assert flops('logits') < 0.75 * flops('logits', 'attention')


def test_the_device_chooses_kernels_and_precision(case):
    model = case('token').model
    module = model.model.clone(attention='cudnn', remat='full', dtype=jax.numpy.bfloat16)
    text = stablehlo.build(dataclasses.replace(model, model=module)).mlir_module()
    # The one call there is checks that the batch is not 0.
    assert text.count('custom_call') == text.count('custom_call @shape_assertion')
    assert 'bf16' not in text
    assert 'HIGHEST' not in text  # though the tests ask for it


def test_the_file_and_what_stands_beside_it(case, tmp_path):
    model = case('token').model
    stablehlo.write(tmp_path / 'x.stablehlo', model, Options(preprocessing=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x.stablehlo', 'x.stablehlo.json']
    description = json.loads((tmp_path / 'x.stablehlo.json').read_text(encoding='utf-8'))
    assert description['class_names'] == [f'Blüte {i}' for i in range(5)]
    assert description['input'] == {
        'shape': ['batch', 32, 32, 3],
        'dtype': 'uint8',
        'layout': 'NHWC',
        'value_range': [0, 255],
    }
    assert description['outputs'] == {'logits': ['batch', 5]}
    assert description['preprocessing'] == model.preprocess.to_dict()
    assert description['source'] == {'dataset': 'made up'}
    exported = export.deserialize(bytearray((tmp_path / 'x.stablehlo').read_bytes()))
    assert exported.in_avals[0].dtype == np.uint8
    assert exported.call(np.zeros((3, 32, 32, 3), np.uint8))['logits'].shape == (3, 5)


def test_what_a_model_does_not_have_is_refused(case, made_up, monkeypatch):
    with pytest.raises(UserError, match='MLP-Mixer has no attention'):
        stablehlo.build(case('mixer').model, Options(attention=True))
    headless = made_up(case('token').model.model_config, 32, classes=0)
    with pytest.raises(UserError, match='no classification head'):
        stablehlo.build(headless)
    result = stablehlo.build(headless, Options(features=True))
    assert result.call(np.zeros((2, 32, 32, 3), np.float32))['features'].shape == (2, 24)
    monkeypatch.setattr(stablehlo, '_LARGEST', 10_000)
    with pytest.raises(UserError, match='at most 2 GiB.*--format onnx'):
        stablehlo.build(headless, Options(features=True))
