"""Features of frozen models, probes on them, and their commands."""

import itertools
import json

import cv2
import modules
import numpy as np
import pytest

from vit_jax.data import from_arrays, holdout
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.inference import features, model_folder, probe_choice, probes
from vit_jax.inference.predict import Images

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
    _, inside = modules.look_inside(model.model, model.params, normalize(pixels))
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

    found, _ = features.extract(
        model, source, layer=layer, pooling=pooling, normalized=True, batch=2
    )
    unit = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.values, unit, atol=1e-6)


def test_near_copies_are_the_nearest_above_a_cosine():
    values = np.array([[1, 0], [0, 2], [1, 1]], np.float32)
    queries = np.array([[3, 0.1], [0.1, 0.2], [-1, 0]], np.float32)
    found = features.near_copies(queries, values, 0.9)
    assert [pair[:2] for pair in found] == [(0, 0), (1, 2)]
    assert found[1][2] == pytest.approx(0.3 / (0.1 * 5**0.5 * 2**0.5), abs=1e-6)


KILLED = """
import os, signal, sys
from vit_jax.commands import embed
from vit_jax.inference import features
features.PART = 2
class Killed(features.Recorded):
    def __getitem__(self, index):
        if index == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)
features.Recorded = Killed
sys.argv = ['embed', *sys.argv[1:]]
embed.main()
"""


def test_embedding_goes_on_after_a_kill(tiny_model, photos, tmp_path, run_script, command):
    """With the same bits as without; what changed meanwhile is computed anew."""
    tiny_model(('cat', 'dog'), folder=tmp_path / 'model')
    (photos / 'train/dark/broken.png').write_bytes(b'no image')
    words = ('--model', tmp_path / 'model', '--dataset', photos, '--split', 'train', '--batch', 1)
    whole, output = tmp_path / 'whole.npz', tmp_path / 'f.npz'
    assert run_script('embed.py', *words, '--output', whole).returncode == 1
    parts = tmp_path / 'f.npz.parts'
    assert command('-c', KILLED, *words, '--output', output).returncode == -9
    assert not output.exists() and (parts / 'part-000000000.npz').exists()
    (parts / 'part-000000000.npz').touch()
    done = run_script('embed.py', *words, '--output', output)
    assert 'broken.png' in done.stderr and not parts.exists()
    before, after = np.load(whole), np.load(output)
    assert {*before} == {*after} and len(after['paths']) == 12
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])

    model = model_folder.load(tmp_path / 'model')
    source = Images(sorted(map(str, (photos / 'test/dark').iterdir())))
    read: list[int] = []
    found, _ = features.extract(model, source, keep=parts, advance=read.append)
    read.clear()
    again, _ = features.extract(model, source, keep=parts, advance=read.append)
    assert read == [3] and again.keys == found.keys
    np.testing.assert_array_equal(again.values, found.values)
    (photos / 'test/dark/0.png').write_bytes((photos / 'test/light/0.png').read_bytes())
    other, _ = features.extract(model, source, keep=parts)
    assert np.abs(other.values[0] - found.values[0]).max() > 1e-3
    with pytest.raises(UserError, match='something else than features'):
        features.extract(model, source, keep=photos)


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
    results = probe_choice.choose(x, y, CLASSES)
    assert {result.chosen.name for result in results} == {c.name for c in probe_choice.CANDIDATES}
    scores = [result.validation for result in results]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.6
    with pytest.raises(UserError, match='two of two classes'):
        probe_choice.choose(x[:4], np.array([0, 0, 0, 1]), CLASSES)
    low, high = probes.interval(90, 100)  # of Wilson's formula, by hand
    assert low == pytest.approx(0.8256, abs=1e-4) and high == pytest.approx(0.9448, abs=1e-4)


def test_probabilities_of_a_probe_are_calibrated():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (20_000, CLASSES))
    share = np.exp(2 * logits) / np.exp(2 * logits).sum(-1, keepdims=True)
    y = (share.cumsum(-1) > rng.random((len(share), 1))).argmax(-1)
    assert probe_choice.calibration_of(logits, y) == pytest.approx(2, rel=0.05)
    few = probe_choice.calibration_of(np.eye(CLASSES) - 0.5, np.arange(CLASSES))
    top = np.exp(few) / (np.exp(few) + CLASSES - 1)  # Platt's target for three right ones
    assert top == pytest.approx(1 - 1 / 5, abs=1e-3)

    x, y = made_up(120)
    for result in probe_choice.choose(x, y, CLASSES):
        assert sorted(result.held) == list(range(120))
        assert (result.predicted == y[result.held]).mean() == result.validation
        if result.logits is not None:
            np.testing.assert_array_equal(result.logits.argmax(-1), result.predicted)
            assert probe_choice.calibration_of(result.logits, y[result.held]) == pytest.approx(1)


def test_groups_are_not_divided_and_large_sets_are_not_folded():
    y = np.arange(60) % 3
    groups = np.arange(60) // 6
    parts = probe_choice._parts(y, groups, 0)
    assert sorted(np.concatenate(parts)) == list(range(60)) and len(parts) == 5
    for one, other in itertools.combinations(parts, 2):
        assert not set(groups[one]) & set(groups[other])
    assert [len(part) for part in probe_choice._parts(np.arange(4990) % 5, None, 0)] == [998] * 5
    assert [len(part) for part in probe_choice._parts(np.arange(5000) % 5, None, 0)] == [500]
    assert len(probe_choice._parts(np.arange(5000) % 11, None, 0)) == 5  # 45 of each class


def test_cross_validation_predicts_each_image_once():
    x, y = made_up(90)
    found = probe_choice.cross_validate(x, y, CLASSES, 3)
    fold = holdout.folds(y, None, 3)
    for right, count in found.values():
        assert count == [30, 30, 30] and 0.6 < sum(right) / 90 <= 1
    inside = fold == 1
    mean = probes.nearest_mean(x[~inside], y[~inside], CLASSES).predict(x[inside])
    assert found['nearest class mean'][0][1] == (mean == y[inside]).sum()


def test_sets_without_sense():
    names = ('cat', 'dog')
    for labels, message in (
        ([0, 0, 0], 'all 3 training images are of one class, cat'),
        ([0, 0, 1], '1 with two training images or more'),
    ):
        with pytest.raises(UserError, match=message):
            probe_choice.check_labels(np.array(labels), names)
    with pytest.raises(UserError, match='copies of one image'):
        probe_choice.choose(np.ones((8, 4), np.float32), np.arange(8) % 2, 2)


@pytest.fixture
def photos(tmp_path):
    """Dark and bright pictures in two folders."""
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
        'probe.py', *model, '--dataset', photos, '--shots', 1, '--output', tmp_path / 'probed',
        '--metrics', tmp_path / 'probed.json',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '1-shot ridge: mean' in done.stdout and 'test 100.0 % of 6' in done.stdout
    metrics = json.loads((tmp_path / 'probed.json').read_text())
    assert len(metrics['few_shot']['1']) == 3 and metrics['images'] == 6
    assert metrics['features'] == 8 and metrics['classes'] == 2
    assert {p['name']: p['accuracy_test'] for p in metrics['probes']}['logistic'] == 1
    probed = model_folder.load(tmp_path / 'probed')
    assert probed.class_names == ('dark', 'light') and probed.source['train'] == 'train'
    evaluated = run_script(
        'evaluate.py', '--model', tmp_path / 'probed', '--dataset', photos, '--split', 'test',
        '--output', tmp_path / 'evaluation',
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads((tmp_path / 'evaluation/evaluation.json').read_text())['accuracy'] == 1

    done = run_script(
        'probe.py', *model, '--dataset', photos, '--train', 'train', '--folds', 3,
        '--features', tmp_path / 'kept',
    )  # fmt: skip
    assert done.returncode == 0 and 'mean of folds 100.0 %' in done.stdout, done.stderr
    assert (tmp_path / 'kept/train/features.json').exists()

    bright = photos / 'test/light/0.png'
    done = run_script(
        'embed.py', *model, '--output', tmp_path / 'f.npz', '--neighbors', bright, photos / 'test'
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ['1.0000', str(bright)] and '/light/' in lines[2]
    saved = np.load(tmp_path / 'f.npz', allow_pickle=False)
    assert saved['features'].shape == (6, 8) and str(bright) in saved['paths']
    parquet = pytest.importorskip('pyarrow.parquet')
    done = run_script(
        'embed.py', *model, '--output', tmp_path / 'f.parquet', '--dataset', photos,
        '--split', 'test',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(tmp_path / 'f.parquet')
    paths = table['path'].to_pylist()
    order = [saved['paths'].tolist().index(path) for path in paths]
    np.testing.assert_allclose(
        np.stack(table['features'].to_numpy()), saved['features'][order], atol=1e-6
    )
    assert table['label'].to_pylist() == ['/light/' in path for path in paths]
    assert table.schema.metadata[b'fingerprint'].decode() == str(saved['fingerprint'])

    copy = photos / 'test/dark/copy.bmp'
    cv2.imwrite(str(copy), cv2.imread(str(photos / 'train/dark/1.png')))
    done = run_script(
        'find_copies.py', photos, *model, '--above', 0.999999, '--contact_sheet', tmp_path / 's.png'
    )
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1, done.stdout
    assert done.stdout.split('\t')[:2] == [str(copy), str(photos / 'train/dark/1.png')]
    assert (tmp_path / 's.png').stat().st_size > 1000
    for words, message in (
        (['--pixels', *model], 'two ways'), (['--above', 2, *model], 'is a cosine'),
        (['--variant', 'ViT-B_16'], 'add --model'),
    ):  # fmt: skip
        done = run_script('find_copies.py', photos, *words)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    copy.unlink()

    for words, message in (
        ([], 'name either images or a --dataset'),
        ([bright], 'say what to do'),
        ([bright, '--output', tmp_path / 'f.npz'], 'exists'),
        ([bright, '--output', tmp_path / 'f.csv'], 'NAME.npz or NAME.parquet'),
    ):
        done = run_script('embed.py', *model, *words)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    done = run_script('probe.py', *model, '--dataset', photos, '--test', 'train')
    assert done.returncode == 1 and 'images are in both' in done.stderr
