"""Soups and WiSE-FT: against NumPy, and what cannot be averaged."""

import dataclasses
import json

import jax
import modules
import numpy as np
import pytest

from vit_jax import __main__ as command
from vit_jax import models
from vit_jax.checkpoint import npz
from vit_jax.data import sources
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.inference import model_folder, soup

VIT = {
    'patches': {'size': (8, 8)}, 'hidden_size': 8, 'model_name': None,
    'transformer': {
        'mlp_dim': 8, 'num_heads': 2, 'num_layers': 1, 'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}  # fmt: skip
DIGITS = tuple(str(digit) for digit in range(10))
TRAINED = {'dataset': 'digits', 'train': 'train[10%:90%]', 'val': 'train[:10%]',
           'test': 'train[90%:]'}  # fmt: skip


def made(seed, names=DIGITS, size=16, source=TRAINED, **changes):
    module = models.from_config(VIT | changes, num_classes=len(names))
    rng = np.random.default_rng(seed)
    shapes = modules.shapes(module, np.zeros((1, size, size, 3), np.float32), train=False)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), shapes)
    return model_folder.Model(module, params, VIT | changes, names, Preprocess(size), source)


def test_a_mean_is_that_of_numpy():
    trees = [made(seed).params for seed in range(3)]
    flats = [npz.flatten(tree) for tree in trees]
    for shares in (None, [0.2, 0.3, 0.5]):
        for name, array in npz.flatten(soup.average(trees, shares)).items():
            expected = np.average([flat[name] for flat in flats], axis=0, weights=shares)
            np.testing.assert_allclose(array, expected, atol=1e-6)
            assert array.dtype == np.float32


def test_a_greedy_soup_takes_up_what_does_not_make_it_worse():
    """By made-up scores of subsets; the best model is first, then the others by their scores."""
    each = [made(seed) for seed in range(4)]
    first = [npz.flatten(model.params)['head/bias'][0] for model in each]
    scores = {
        (0,): 0.6,
        (1,): 0.9,
        (2,): 0.7,
        (3,): 0.8,
        (1, 3): 0.85,
        (1, 2): 0.9,
        (0, 1, 2): 0.95,
    }

    def score(model):
        found = npz.flatten(model.params)['head/bias'][0]
        for subset, value in scores.items():
            if np.isclose(found, np.mean([first[index] for index in subset]), atol=1e-6):
                return value
        raise AssertionError('no subset that the greedy soup tries')

    said = []
    found = soup.greedy(each, score, say=said.append)
    assert (found.taken, found.score, found.scores) == ((1, 2, 0), 0.95, (0.6, 0.9, 0.7, 0.8))
    assert said[4:] == [
        'with model 4: 0.8500, left out', 'with model 3: 0.9000, taken up',
        'with model 1: 0.9500, taken up',
    ]  # fmt: skip
    expected = soup.average([each[index].params for index in (0, 1, 2)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.model.params, expected
    )


def test_the_way_from_the_start():
    start, tuned = made(0), made(1)
    for share, other in ((0, start), (1, tuned)):
        same = soup.interpolate(start, tuned, share)
        jax.tree.map(np.testing.assert_array_equal, same.params, other.params)
    quarter = npz.flatten(soup.interpolate(start, tuned, 0.25).params)
    a, b = npz.flatten(start.params), npz.flatten(tuned.params)
    for name, array in quarter.items():
        np.testing.assert_allclose(array, 0.75 * a[name] + 0.25 * b[name], atol=1e-6)
    scores = iter([0.5, 0.7, 0.7])
    model, share, found = soup.best_share(start, tuned, lambda _: next(scores), (0, 0.25, 0.5))
    assert share == 0.5 and found == {0: 0.5, 0.25: 0.7, 0.5: 0.7} and model.class_names == DIGITS
    with pytest.raises(UserError, match='from 0 to 1, not 1.5'):
        soup.interpolate(start, tuned, 1.5)


def test_a_start_of_other_classes_and_another_size_is_fitted():
    tuned, start = made(1), made(0, ('cat', 'dog'), size=32)
    fitted, own_head = soup.as_start(start, tuned, 'start')
    assert not own_head and fitted.class_names == DIGITS
    flat, theirs, ours = (npz.flatten(m.params) for m in (fitted, start, tuned))
    np.testing.assert_array_equal(flat['head/kernel'], ours['head/kernel'])
    np.testing.assert_array_equal(flat['embedding/kernel'], theirs['embedding/kernel'])
    assert flat['Transformer/posembed_input/pos_embedding'].shape == (1, 5, 8)
    same, own_head = soup.as_start(made(0), tuned, 'start')
    assert own_head
    np.testing.assert_array_equal(same.params['head']['kernel'], made(0).params['head']['kernel'])


def test_what_cannot_be_averaged_is_refused():
    first = made(0)
    for other, what in (
        (made(1, hidden_size=16), 'architecture .hidden_size: 8 and 16'),
        (made(1, DIGITS[::-1]), 'classes'),
        (made(1, size=32), r'parameters .Transformer/posembed_input/pos_embedding: \(1, 5, 8\)'),
        (dataclasses.replace(first, preprocess=Preprocess(16, eval='resize_crop', resize=18)),
         'pixels .resize: 0 and 18'),
        (made(1, multi_label=True), 'architecture .multi_label'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f'a and b differ in their {what}'):
            soup.check([first, other], ['a', 'b'])


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('soup')
    for seed in range(3):
        model_folder.save_new(root / str(seed), made(seed))
    return root


def run(monkeypatch, *words):
    monkeypatch.setattr('sys.argv', ['vit_jax', 'soup', *map(str, words)])
    return command.main()


def test_a_score_is_the_share_of_right_answers():
    model = made(0)
    images = sources.open_dataset('digits').select('train[:50]')
    score = soup.scorer(images, model, batch=20)
    pixels = np.stack([model.preprocess.evaluate(images[i].image) for i in range(50)])
    logits = modules.apply(model.model, model.params, pixels / 127.5 - 1)
    right = np.argmax(logits, axis=-1) == images.labels()
    assert score(model) == pytest.approx(right.mean())
    with pytest.raises(UserError, match='are not those of the model'):
        soup.scorer(images, made(0, DIGITS[::-1]), batch=20)


def test_the_command_writes_a_model_folder(folders, tmp_path, monkeypatch, capsys):
    words = [folders / '0', folders / '1', '--start', folders / '2', '--output', tmp_path / 'x']
    assert run(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert 'chosen on digits train[:10%]' in told and 'soup of ' in told and 'share 0.3: ' in told
    found = model_folder.load(tmp_path / 'x')
    assert found.class_names == DIGITS
    source = json.loads((tmp_path / 'x/model.json').read_text())['source']
    assert source['chosen_on'] == 'train[:10%]' and source['start'] == str(folders / '2')
    assert 0 <= source['share'] <= 1 and set(source['soup']) <= {str(folders / n) for n in '01'}
    words = [folders / '0', '--start', folders / '2', '--share', 0.5, '--output', tmp_path / 'y']
    assert run(monkeypatch, *words) == 0
    half = npz.flatten(model_folder.load(tmp_path / 'y').params)
    a, b = (npz.flatten(made(seed).params) for seed in (0, 2))
    for name, array in half.items():
        np.testing.assert_allclose(array, (a[name] + b[name]) / 2, atol=1e-6)


def test_what_the_command_refuses(folders, tmp_path, monkeypatch, capsys):
    a, b, output = folders / '0', folders / '1', ['--output', tmp_path / 'z']
    model_folder.save_new(tmp_path / 'untold', made(0, source={}))
    for words, message in (
        ([a, *output], 'one model is no soup'),
        ([a, b, '--share', 0.5, *output], 'is of the way from --start'),
        ([a, '--start', b, '--share', 2, *output], '--share 2 is not from 0 to 1'),
        ([a, b, '--output', folders / '2'], 'exists'),
        ([a, b, '--split', 'train', *output], 'was trained on 1,'),
        ([tmp_path / 'untold', b, *output], 'tells of no validation images'),
    ):
        assert run(monkeypatch, *words) == 1
        assert message in capsys.readouterr().err, words
    assert not (tmp_path / 'z').exists()
    assert run(monkeypatch, a, b, '--split', 'train[95%:]', *output) == 0
    assert 'WARNING: 90 of the 90 images' in capsys.readouterr().out
