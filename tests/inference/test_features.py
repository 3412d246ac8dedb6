"""Features of frozen models, probes on them, and their commands."""

import json

import numpy as np
import pytest

from vit_jax import models
from vit_jax.data import from_arrays
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.inference import features, model_folder, probes

CLASSES = 3


def made_up(count=60, width=5, seed=0):
    """Features of three classes that overlap."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % CLASSES
    means = np.random.default_rng(9).normal(0, 1, (CLASSES, width))
    return (means[y] + rng.normal(0, 0.7, (count, width))).astype(np.float32), y


@pytest.fixture(scope='module')
def source():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    return from_arrays(images, np.array([0, 1, 1, 0, 1]), ('cat', 'dog'))


@pytest.mark.parametrize(
    ('layer', 'pooling', 'name'),
    [
        ('', '', 'pre_logits'),
        ('0', '', 'Transformer/encoderblock_0/tokens'),
        ('0', 'mean', 'Transformer/encoderblock_0/tokens'),
        ('encoded', 'both', 'encoded'),
    ],
)
def test_features_are_those_of_the_forward_pass(tiny_model, source, layer, pooling, name):
    model = tiny_model(('cat', 'dog'))
    found, errors = features.extract(model, source, layer=layer, pooling=pooling, batch=2)
    pixels = np.stack([model.preprocess.evaluate(source[i].image) for i in range(len(source))])
    _, inside = models.apply_with_intermediates(model.model, model.params, normalize(pixels))
    expected = np.asarray(inside[name])
    if layer:
        parts = {'class': expected[:, 0], 'mean': expected[:, 1:].mean(1)}
        expected = np.concatenate(
            [parts[p] for p in {'': ['class'], 'both': parts}.get(pooling, [pooling])], axis=-1
        )
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found.values / largest, expected / largest, atol=1e-6)
    assert found.label.tolist() == [0, 1, 1, 0, 1] and not errors
    assert found.keys == tuple(source[i].key for i in range(5))


def test_what_a_model_does_not_have_is_said(tiny_model, source):
    model = tiny_model(('cat', 'dog'))
    for options, message in (
        ({'layer': '7'}, "no layer '7'"),
        ({'layer': 'x'}, "no layer 'x'"),
        ({'pooling': 'mean'}, 'of a layer'),
    ):
        with pytest.raises(UserError, match=message):
            features.extract(model, source, **options)


def test_ridge_is_the_closed_form():
    """Against the normal equations of both shapes, in float64."""
    for count in (60, 4):  # more and fewer examples than features
        x, y = made_up(count)
        probe = probes.ridge(x, y, CLASSES, 2.0)
        scaled = (x.astype(np.float64) - x.mean(0, dtype=np.float64)) / (
            x.std(0, dtype=np.float64) + 1e-5
        )
        inputs = np.concatenate([scaled, np.full((count, 1), 100.0)], 1)
        targets = np.where(y[:, None] == np.arange(CLASSES), 1.0, -1.0)
        stacked = np.concatenate([inputs, np.sqrt(2.0) * np.eye(6)])
        weights = np.linalg.lstsq(stacked, np.concatenate([targets, np.zeros((6, 3))]), rcond=None)[
            0
        ]
        np.testing.assert_allclose(x @ probe.kernel + probe.bias, inputs @ weights, atol=1e-4)


def test_the_other_probes_are_what_their_names_say():
    x, y = made_up()
    queries, _ = made_up(seed=1)
    means = np.stack([x[y == label].mean(0) for label in range(CLASSES)])
    nearest = ((queries[:, None] - means) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(probes.nearest_mean(x, y, CLASSES).predict(queries), nearest)

    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (queries, x)]
    np.testing.assert_array_equal(
        probes.Neighbours(x, y, CLASSES, k=1).predict(queries), y[(unit[0] @ unit[1].T).argmax(-1)]
    )
    votes = probes.Neighbours(x[[0, 1, 1]], np.array([2, 0, 0]), CLASSES, k=3)
    assert votes.predict(x[:1]).tolist() == [0]  # two against the nearest

    linear_model = pytest.importorskip('sklearn.linear_model')
    for classes in (2, CLASSES):
        keep = y < classes
        scaled = (x[keep] - x[keep].mean(0)) / (x[keep].std(0) + 1e-5)
        theirs = linear_model.LogisticRegression(C=0.1, max_iter=2000).fit(scaled, y[keep])
        probe = probes.logistic(x[keep], y[keep], CLASSES, 0.1)
        logits = (x[keep] @ probe.kernel + probe.bias)[:, :classes]
        share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(share, theirs.predict_proba(scaled), atol=2e-3)


def test_settings_are_chosen_without_the_test_images():
    x, y = made_up(120)
    results = probes.choose(x, y, CLASSES)
    assert {result.chosen.name for result in results} == {c.name for c in probes.CANDIDATES}
    scores = [result.validation for result in results]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.6
    with pytest.raises(UserError, match='two of two classes'):
        probes.choose(x[:4], np.array([0, 0, 0, 1]), CLASSES)
    low, high = probes.interval(90, 100)  # of Wilson's formula, by hand
    assert low == pytest.approx(0.8256, abs=1e-4) and high == pytest.approx(0.9448, abs=1e-4)


@pytest.fixture
def photos(tmp_path):
    """Dark and bright pictures in two folders."""
    import cv2

    rng = np.random.default_rng(0)
    for part, count in (('train', 6), ('test', 3)):
        for name, level in (('dark', 20), ('light', 220)):
            folder = tmp_path / 'photos' / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(level - 15, level + 15, (20, 20, 3), np.uint8)
                cv2.imwrite(str(folder / f'{index}.png'), pixels)
    return tmp_path / 'photos'


def test_the_commands(tiny_model, photos, tmp_path, run_script):
    tiny_model(('cat', 'dog', 'cow'), folder=tmp_path / 'model')
    model = ('--model', tmp_path / 'model')
    done = run_script(
        'probe.py', *model, '--dataset', photos, '--shots', 1, '--output', tmp_path / 'probed'
    )
    assert done.returncode == 0, done.stderr
    assert '1-shot ridge: mean' in done.stdout and 'test 100.0 % of 6' in done.stdout
    probed = model_folder.load(tmp_path / 'probed')
    assert probed.class_names == ('dark', 'light') and probed.source['train'] == 'train'
    evaluated = run_script(
        'evaluate.py', '--model', tmp_path / 'probed', '--dataset', photos, '--split', 'test',
        '--output', tmp_path / 'evaluation',
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((tmp_path / 'evaluation/evaluation.json').read_text())['accuracy'] == 1

    bright = photos / 'test/light/0.png'
    done = run_script(
        'embed.py', *model, '--output', tmp_path / 'f.npz', '--neighbors', bright, photos / 'test'
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ['1.0000', str(bright)] and '/light/' in lines[2]
    saved = np.load(tmp_path / 'f.npz', allow_pickle=False)
    assert saved['features'].shape == (6, 8) and str(bright) in saved['paths']
    for words, message in (
        ([], 'name either images or a --dataset'),
        ([bright], 'say what to do'),
        ([bright, '--output', tmp_path / 'f.npz'], 'exists'),
    ):
        done = run_script('embed.py', *model, *words)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    done = run_script('probe.py', *model, '--dataset', photos, '--test', 'train')
    assert done.returncode == 1 and 'images are in both' in done.stderr
