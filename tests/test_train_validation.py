"""Whole runs with validation images: what is chosen, what is tested, and when."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
import small

from vit_jax import data, evaluate, train
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.inference import model_folder
from vit_jax.run import choice


def make_config(**changes) -> ml_collections.ConfigDict:
    """8 steps on 4 devices."""
    settings = {'batch': 32, 'batch_eval': 100, 'total_steps': 8, 'progress_every': 2}
    settings |= {'checkpoint_every': 100, 'base_lr': 0.01}
    return small.run_config(**settings | changes)


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


class Images:
    """Digits, and how often one of them was read."""

    def __init__(self, source):
        self.pixels = [source[i].image for i in range(len(source))]
        self.labels = source.labels()
        self.class_names = source.class_names
        self.read = 0

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.read += 1
        return self.pixels[index]

    def source(self, labels=None):
        return data.from_sequence(
            self, self.labels if labels is None else labels, self.class_names, name='digits'
        )


class Watch:
    """Notes how many test images had been read after the last step; `stop`: a step to fail at."""

    def __init__(self, test, stop=None):
        self.test, self.stop = test, stop

    def on_step(self, step, state, metrics):
        if step == self.stop:
            raise KeyboardInterrupt

    def on_end(self, step, state, metrics):
        self.read = self.test.read


@pytest.fixture(scope='module')
def images():
    dataset = sources.open_dataset('digits')
    return Images(dataset.select('train[:400]')), Images(dataset.select('train[400:500]'))


def run(images, workdir: pathlib.Path, test_labels=None, stop=None):
    training, test = images
    given = training.source(), test.source(test_labels)
    test.read, watch = 0, Watch(test, stop)
    config = make_config(keep_best=True)
    train.train_and_evaluate(config, workdir, sources=given, callbacks=[watch])
    return watch


@pytest.fixture(scope='module')
def finished(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('validation') / 'run'
    return workdir, run(images, workdir)


def test_the_test_images_are_seen_once_at_the_end(finished, images):
    workdir, watch = finished
    assert watch.read == 0 and images[1].read == 100
    found = lines(workdir)
    assert [line['step'] for line in found if 'accuracy_val' in line] == [2, 4, 6, 8]
    assert ['accuracy_test' in line for line in found] == [False] * (len(found) - 1) + [True]
    scores = {line['step']: line['accuracy_val'] for line in found if 'accuracy_val' in line}
    assert found[-1]['step_tested'] == max(scores, key=scores.get)
    log = (workdir / 'train.log').read_text()
    assert 'WARNING: 40 validation images are few to choose by' in log
    described = json.loads((workdir / 'data.json').read_text())
    assert [described[name]['examples'] for name in ('train', 'val', 'test')] == [360, 40, 100]
    assert model_folder.load(workdir / 'model').source['val'] == '10% of all'


def test_permuted_test_labels_change_nothing_but_the_last_line(finished, images, tmp_path):
    """Byte for byte: neither metrics, nor choice, nor parameters."""
    workdir, _ = finished
    other = tmp_path / 'run'
    run(images, other, test_labels=np.random.RandomState(0).permutation(images[1].labels))
    first, second = (
        (folder / 'metrics.jsonl').read_bytes().splitlines() for folder in (workdir, other)
    )
    assert first[:-1] == second[:-1] and first[-1] != second[-1]
    for name in ('model', 'model_best'):
        assert (workdir / name).exists() == (other / name).exists()
        if (workdir / name).exists():
            ours, theirs = (model_folder.load(folder / name).params for folder in (workdir, other))
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_that_was_stopped_ends_like_the_whole_one(finished, images, tmp_path, monkeypatch):
    """Stopped after step 3, and while the test images are evaluated."""
    whole, _ = finished
    original = evaluate.evaluate

    def interrupted(*args, split, **options):
        if split == 'test':
            raise KeyboardInterrupt
        return original(*args, split=split, **options)

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path, stop=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, 'evaluate', interrupted)
        run(images, tmp_path)
    run(images, tmp_path)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    run(images, tmp_path)  # is finished
    assert (tmp_path / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def made_up(monkeypatch, accuracies):
    """Accuracies of evaluations, by step."""
    at = iter(accuracies)
    monkeypatch.setattr(
        evaluate,
        'evaluate',
        lambda *args, split, **options: (
            {f'accuracy_{split}': next(at) if split == 'val' else 0.5, f'loss_{split}': 1.0},
            1.0,
        ),
    )


def test_patience_ends_the_run_and_survives_a_stop(images, tmp_path, monkeypatch):
    """Best at step 2; stopped after the first of two that are not better."""
    config = make_config(patience=2, checkpoint_every=4, progress_every=1)
    given = {'sources': (images[0].source(), images[1].source())}
    made_up(monkeypatch, [0.9, 0.9])
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, tmp_path, callbacks=[Watch(images[1], 5)], **given)
    made_up(monkeypatch, [0.8])  # one evaluation is left
    train.train_and_evaluate(config, tmp_path, **given)
    found = lines(tmp_path)
    assert [line['step'] for line in found if 'accuracy_val' in line] == [2, 4, 6]
    assert found[-1] == {'step': 6, 'accuracy_test': 0.5, 'loss_test': 1.0, 'step_tested': 6}
    assert model_folder.load(tmp_path / 'model').source['steps'] == 6
    assert not (tmp_path / 'model_best').exists()
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    train.train_and_evaluate(config, tmp_path, **given)  # is finished
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_what_is_better():
    found = choice.Choice(make_config(keep_best=True, patience=2))
    nan = float('nan')
    kept, over = {2, 4}, {6}
    for step, loss in enumerate((nan, 2.0, 2.0, 1.5, nan, 1.6), 1):
        assert found.add(step, {'loss_val': loss, 'right_val': step}) == (step in kept)
        assert found.is_over() == (step in over)
    assert found.best() == 4


def test_three_sources_and_what_is_refused(images, tmp_path):
    training, test = (each.source() for each in images)
    val = images[0].source()
    train.train_and_evaluate(
        make_config(total_steps=2, warmup_steps=1), tmp_path / 'run', sources=(training, val, test)
    )
    assert [set(line) & {'accuracy_val', 'accuracy_test'} for line in lines(tmp_path / 'run')][
        -2:
    ] == [{'accuracy_val'}, {'accuracy_test'}]
    for given, changes, words in (
        ((training, val, test), {'pp.val': '10%'}, 'has no effect with validation examples of'),
        ((training, test), {'pp.val': 'validation'}, 'sources of your own have no splits'),
        (
            (data.BatchStream([(np.zeros((32, 16, 16, 3)), [0] * 32)], test.class_names), test),
            {'keep_best': True},
            'three sources',
        ),
        (
            (training, data.from_arrays(np.zeros((2, 8, 8, 3)), [0, 1]), test),
            {},
            'of training and validation',
        ),
    ):
        with pytest.raises(UserError, match=words):
            train.train_and_evaluate(make_config(**changes), tmp_path / 'no', sources=given)
    assert not (tmp_path / 'no').exists()
