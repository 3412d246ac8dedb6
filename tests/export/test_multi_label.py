"""Models of several classes, whose probabilities are sigmoids, or of numbers: in every format."""

import json

import modules
import numpy as np
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.data import from_arrays
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import onnx as onnx_export
from vit_jax.export import pytorch
from vit_jax.export.options import Options
from vit_jax.export.outputs import forward
from vit_jax.inference import classifier, metrics, model_folder, predict
from vit_jax.inference.task import Task


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_sigmoids_from_hugging_face_through_a_model_folder_to_onnx(tmp_path, case):
    tiny = case('multi_label')
    pytorch.write(tmp_path / 'hf', tiny.model, to='huggingface')
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    assert config['problem_type'] == 'multi_label_classification'
    loaded = model_folder.load(tmp_path / 'hf')
    assert loaded.task.kind == 'several classes' and loaded.model_config['multi_label']
    model_folder.save(
        tmp_path / 'model',
        loaded.params,
        model_config=loaded.model_config,
        class_names=loaded.class_names,
        preprocess=loaded.preprocess,
        source={},
    )
    pytorch.write(tmp_path / 'a.npz', loaded, to='npz')
    onnx_export.save(onnx_export.build(loaded), tmp_path / 'logits.onnx')
    both = Options(probabilities=True)
    onnx_export.save(onnx_export.build(loaded, both), tmp_path / 'probabilities.onnx')
    pixels = np.random.default_rng(0).uniform(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    expected = None
    for name in ('hf', 'model', 'a.npz', 'logits.onnx', 'probabilities.onnx'):
        opened = classifier.open_classifier(tmp_path / name)
        assert opened.task.kind == 'several classes'
        ((_, found),) = predict.predict(opened, [tmp_path / 'a.png'])
        if expected is None:
            images = pixels[None] / np.float32(127.5) - 1
            logits = modules.apply(loaded.model, loaded.params, images)
            expected = sigmoid(logits[0])
            assert not np.isclose(expected.sum(), 1, atol=0.1)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)

    values = forward(loaded.model, ['probabilities'])(loaded.params, images)
    np.testing.assert_allclose(values['probabilities'][0], expected, atol=1e-5)
    for to in ('timm', 'torchvision'):
        notes = pytorch.write(tmp_path / to, loaded, to=to)
        assert 'take the sigmoid of each logit' in ' '.join(notes)


def test_no_accuracy_over_classes_that_exclude_each_other(case):
    opened = classifier.JaxClassifier(case('multi_label').model)
    source = from_arrays(np.zeros((2, 32, 32, 3), np.uint8), [0, 1])
    with pytest.raises(UserError, match='this model gives a yes or no for each class'):
        metrics.collect(opened, source, model_labels=range(5))


@pytest.mark.parametrize('problem, message', [('poetry', "problem_type 'poetry'")])
def test_other_problems_are_refused(tmp_path, case, problem, message):
    pytorch.write(tmp_path / 'hf', case('token').model, to='huggingface')
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    (tmp_path / 'hf/config.json').write_text(json.dumps(config | {'problem_type': problem}))
    with pytest.raises(UserError, match=message):
        model_folder.load(tmp_path / 'hf')


@pytest.mark.parametrize(
    'task',
    [
        Task('several classes', threshold=0.2, chosen_on='photos val'),
        Task('numbers', units=('m', ''), mean=(5.0, 6.0), deviation=(2.0, 3.0)),
    ],
    ids=lambda task: task.kind,
)
def test_a_mixer_tells_its_task_in_every_file(tmp_path, task):
    config = {'model_name': None, 'patches': {'size': (8, 8)}, 'num_blocks': 1, 'hidden_dim': 8}
    config |= {'tokens_mlp_dim': 4, 'channels_mlp_dim': 8}
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    module = models.from_config(config, num_classes=2)
    params = modules.params_of(module, images, train=False)
    model_folder.save(
        tmp_path / 'model', params, model_config=config, class_names=('a', 'b'),
        preprocess=Preprocess(16), source={}, task=task,
    )  # fmt: skip
    model = model_folder.load(tmp_path / 'model')
    assert model.task == task
    pytorch.write(tmp_path / 'a.npz', model, to='npz')
    onnx_export.save(onnx_export.build(model), tmp_path / 'a.onnx')
    expected = task.values(classifier.JaxClassifier(model).logits(images))
    assert np.ptp(expected) > 0
    for name in ('a.npz', 'a.onnx'):
        opened = classifier.open_classifier(tmp_path / name)
        assert opened.task.kind == task.kind
        found = opened.task.values(opened.logits(images))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
