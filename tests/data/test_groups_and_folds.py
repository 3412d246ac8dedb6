"""Groups that stay on one side of every split, and folds, of own arrays, folders and tables."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn import model_selection

from vit_jax import config as config_lib
from vit_jax.configs import digits
from vit_jax.data import from_arrays, holdout, sources
from vit_jax.errors import UserError

N, GROUPS = 240, 24
RNG = np.random.default_rng(0)
GROUP = RNG.permutation(np.arange(N) % GROUPS)
# A group is mostly of one class, as a patient is.
LABEL = np.where(RNG.random(N) < 0.8, GROUP % 3, RNG.integers(0, 3, N))
PIXELS = np.arange(N, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)


def arrays(labels=LABEL, groups=GROUP, names=None):
    return from_arrays(PIXELS[: len(labels)], labels, names, groups=groups)


def numbers(part):
    return [int(np.ravel(part[i].image)[0]) for i in range(len(part))]


def test_folds_are_those_of_scikit_learn_and_their_properties_hold():
    data = arrays()
    seen = []
    splitter = model_selection.StratifiedGroupKFold(5, shuffle=True, random_state=0)
    for k, (_, expected) in enumerate(splitter.split(LABEL, LABEL, GROUP.astype(str)), 1):
        train, test = data.fold(f'{k}/5')
        assert numbers(test) == expected.tolist()
        assert sorted(numbers(train) + numbers(test)) == list(range(N))
        assert not set(train.groups()) & set(test.groups())
        share = np.bincount(test.labels(), minlength=3) / len(test)
        assert np.abs(share - np.bincount(LABEL) / N).max() < 0.12
        seen += numbers(test)
        assert (train.spec, test.spec) == (f'all without fold {k}/5', f'fold {k}/5 of all')
        assert arrays().fold(f'{k}/5')[1].fingerprint() == test.fingerprint()
    assert sorted(seen) == list(range(N))


def test_folds_without_groups_have_each_class_in_proportion():
    data = arrays(groups=None)
    counts = [np.bincount(data.fold(f'{k}/4')[1].labels(), minlength=3) for k in range(1, 5)]
    assert np.ptp(counts, axis=0).max() <= 1
    with pytest.raises(UserError, match='9 folds of 8 images of the largest class'):
        arrays(np.arange(16) % 2, None).fold('9/9')
    with pytest.raises(UserError, match='5 folds of 3 groups'):
        arrays(groups=GROUP % 3).fold('1/5')
    for wrong in ('0/5', '6/5', '1/1', 'second'):
        with pytest.raises(UserError, match='is no fold: write 2/5'):
            data.fold(wrong)


def test_what_is_held_out_is_whole_groups_also_within_a_fold():
    data = arrays()
    for whole in (data, data.fold('2/5')[0]):
        left, held = whole.hold_out('20%')
        assert not set(left.groups()) & set(held.groups())
        assert sorted(numbers(left) + numbers(held)) == sorted(numbers(whole))
        assert 0.1 < len(held) / len(whole) < 0.3
        assert set(held.labels()) == {0, 1, 2}
    with pytest.raises(UserError, match='are of one group'):
        arrays(groups=np.zeros(N, int)).hold_out('10%')


def test_other_labels_than_classes_are_held_in_proportion():
    several = np.stack([np.arange(N) % 2, np.arange(N) % 12 == 0], axis=1).astype(np.float32)
    rare = holdout.strata(several)
    assert (rare == np.where(several[:, 1] > 0, 1, np.where(several[:, 0] > 0, 0, 2))).all()
    held = arrays(several, None).hold_out('10%')[1]
    assert held.targets()[:, 1].sum() == 2
    ages = RNG.normal(50, 10, N)
    assert np.bincount(holdout.strata(ages)).tolist() == [48] * 5
    parts = [arrays(ages, None).fold(f'{k}/3')[1].targets().mean() for k in (1, 2, 3)]
    assert np.ptp(parts) < 3


def test_groups_must_be_one_for_each_example():
    for wrong in (GROUP[:5], RNG.random(N), np.stack([GROUP, GROUP], 1)):
        with pytest.raises(UserError, match='groups of arrays must be 240 texts or whole numbers'):
            arrays(groups=wrong)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """60 images in two classes, of 12 patients who are told by the names of the files."""
    root = tmp_path_factory.mktemp('root')
    with open(root / 'labels.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['path', 'label', 'patient'])
        for number in range(60):
            patient, name = number % 12, 'ab'[number % 3 == 0]
            path = root / f'photos/{name}/p{patient}_{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(path)
            rows.writerow([path.relative_to(root), name, f'p{patient}'])
    return root


@pytest.mark.parametrize('kind', ['folder', 'table'])
def test_patients_of_folders_and_tables_stay_together(root, kind):
    name = str(root / 'photos') if kind == 'folder' else str(root / 'labels.csv')
    options = {'group': r'/(p\d+)_'} if kind == 'folder' else {}
    train, val, test = sources.open_three(name, val_split='20%', **options)
    parts = {'train': train, 'val': val, 'test': test}
    patients = {name: set(part.groups()) for name, part in parts.items()}
    assert sum(map(len, patients.values())) == 12 and sum(map(len, parts.values())) == 60
    assert set().union(*patients.values()) == {f'p{i}' for i in range(12)}
    opened = sources.open_dataset(name, **options)
    assert opened.default_specs() == ('train without 10%', '10% of train')
    for part in parts.values():
        assert opened.select(part.spec).fingerprint() == part.fingerprint()
    train, val, test = sources.open_three(name, fold='2/4', val_split='30%', **options)
    assert val.spec == '30% of train without fold 2/4' and test.spec == 'fold 2/4 of train'
    for part in (train, val, test):
        assert opened.select(part.spec).fingerprint() == part.fingerprint()
    train, val, test = sources.open_three(name, fold='2/4', **options)
    assert val is None and train.spec == 'train without fold 2/4'
    assert len(set(train.groups())) + len(set(test.groups())) == 12
    with pytest.raises(UserError, match='groups are in the training and in the test examples'):
        sources.open_three(name, train_split='train[:50%]', test_split='train[50%:]', **options)


@pytest.mark.parametrize(
    ('group', 'message'),
    [(r'nobody_(\d+)', 'does not fit [ab]/p'), ('(', 'is no regular expression')],
)
def test_patterns_that_fit_nothing_are_refused(root, group, message):
    with pytest.raises(UserError, match=message):
        sources.open_dataset(str(root / 'photos'), group=group)
    with pytest.raises(UserError, match='rows have a column for it'):
        sources.open_dataset(str(root / 'labels.csv'), group='a')
    with pytest.raises(UserError, match='is for folders'):
        sources.open_dataset('digits', group='a')


def test_a_fold_and_test_examples_exclude_each_other():
    config = digits.get_config()
    config.dataset, config.fold = 'digits', '2/5'
    resolved = config_lib.resolve(config)
    assert resolved.pp.test == '' and resolved.pp.train == ''  # not those of the preset
    config.pp.test = 'train[90%:]'
    with pytest.raises(UserError, match='leave out one of them'):
        config_lib.resolve(config)
    config.fold = '7/5'
    with pytest.raises(UserError, match='is no fold'):
        config_lib.resolve(config)
