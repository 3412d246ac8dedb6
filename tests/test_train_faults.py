"""Whole runs in which something is wrong: loss, images, settings; and the best step of a run."""

import json
import os
import pathlib
import signal

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from vit_jax import config as config_lib
from vit_jax import evaluate, loop, sharding, steps, train
from vit_jax.analysis import run_files
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.configs import digits
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.inference import model_folder
from vit_jax.run import preemption


def make_config(**changes) -> ml_collections.ConfigDict:
    """Digits and a model that compiles in a moment; 8 steps on 4 devices."""
    config = digits.get_config()
    config.report = False
    config.model.hidden_size = 16
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=1, dropout_rate=0.0)
    config.pp.crop, config.model.patches.size = 16, (8, 8)
    config.batch, config.batch_eval, config.total_steps, config.warmup_steps = 32, 100, 8, 2
    config.progress_every, config.eval_every, config.checkpoint_every = 2, 4, 2
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


def lines(workdir, name='metrics.jsonl'):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def spoil(monkeypatch, bad_steps):
    """Makes the images of some steps (1-based) infinite, on their way to the device."""
    original = sharding.put_batch
    count = iter(range(1, 1000))

    def put(batch, mesh):
        if 'position' in batch and next(count) in bad_steps:
            batch = {**batch, 'image': np.full_like(batch['image'], np.inf)}
        return original(batch, mesh)

    monkeypatch.setattr(sharding, 'put_batch', put)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(monkeypatch, tmp_path):
    spoil(monkeypatch, {6})
    monkeypatch.setattr(sharding, 'steps_ahead', lambda: 2)  # as on a GPU
    with pytest.raises(UserError) as error:
        train.train_and_evaluate(make_config(), tmp_path)
    text = str(error.value)
    assert text.startswith('step 6: the loss is nan') and '--config.nan_policy=skip' in text
    assert f'The last good checkpoint is that of step 4, in {tmp_path}' in text
    named = {int(word) for word in text.rsplit(': ', 1)[1].split(', ')}
    selection = sources.open_sources('digits')[0]
    assert len(named) == 32 and named <= set(range(len(selection)))
    assert [p.name for p in sorted((tmp_path / 'checkpoints').iterdir())] == ['2', '4']
    monkeypatch.undo()
    train.train_and_evaluate(make_config(), tmp_path)  # and the run can go on from there
    assert lines(tmp_path)[-1]['step'] == 8


def test_skipping_is_counted_and_ends_somewhere(monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, {3, 6})
    train.train_and_evaluate(make_config(nan_policy='skip'), tmp_path / 'some')
    training = [line for line in lines(tmp_path / 'some') if 'train_loss' in line]
    assert [line['skipped_steps'] for line in training] == [0, 0, 1, 2, 2]
    assert training[3]['train_loss'] is None and training[4]['train_loss'] > 0
    assert capsys.readouterr().out.count('its update is skipped') == 2
    skipped = run_files.read(tmp_path / 'some').happened('skipped')
    assert [event['step'] for event in skipped] == [3, 6]

    spoil(monkeypatch, range(3, 100))
    monkeypatch.setattr(loop, 'MAX_SKIPPED_IN_A_ROW', 4)
    with pytest.raises(UserError, match='step 6.*4 steps in a row were skipped'):
        train.train_and_evaluate(make_config(nan_policy='skip'), tmp_path / 'all')


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
    """120 images of two classes in train/, 20 in test/; 3 and 2 of them are no images."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 60), ('test', 10)):
        for label, name in enumerate(('dark', 'light')):
            folder = tmp_path / 'photos' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (20, 20, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    folder = tmp_path / 'photos'
    (folder / 'train/dark/3.png').write_bytes(b'')
    (folder / 'train/dark/5.png').write_bytes((folder / 'train/dark/6.png').read_bytes()[:60])
    (folder / 'train/light/7.png').write_text('no image')
    (folder / 'test/dark/1.png').write_bytes(b'')
    (folder / 'test/light/2.png').write_text('no image either')
    return folder


def test_bad_images_are_named_once_counted_and_not_in_the_way(photos, tmp_path, capsys):
    changes = {'dataset': str(photos), 'max_unreadable': 0.2, 'total_steps': 12}
    train.train_and_evaluate(make_config(**changes), tmp_path / 'run')
    shown = capsys.readouterr().out
    bad = ['train/dark/3', 'train/dark/5', 'train/light/7', 'test/dark/1', 'test/light/2']
    for name in bad:
        assert shown.count(f'WARNING: cannot use image {photos / name}.png') == 1, shown
    assert (tmp_path / 'run/train.log').read_text().count('WARNING') == len(bad)
    metrics = lines(tmp_path / 'run')
    counts = [line.get('replaced_images', 0) for line in metrics if 'train_loss' in line]
    # 12 steps of 32 are 3.2 passes over 120 images, 3 of which are bad.
    assert counts == sorted(counts) and 9 <= counts[-1] <= 15
    testing = [line for line in metrics if 'accuracy_test' in line]
    assert all(line['unreadable_test'] == 2 for line in testing)
    assert all(line['accuracy_test'] <= 18 / 20 for line in testing)

    run = run_files.read(tmp_path / 'run')
    assert run.unreadable() == len(bad) and not run.happened('skipped')
    # Stopped and resumed, it ends the same: what stands for what does not depend on history.
    with pytest.raises(preemption.PreemptedError):
        interrupt_after(6, make_config(**changes), tmp_path / 'two')
    assert run_files.read(tmp_path / 'two').stopped
    train.train_and_evaluate(make_config(**changes), tmp_path / 'two')
    run = run_files.read(tmp_path / 'two')
    assert run.resumes() == [6] and not run.stopped and run.unreadable() == len(bad)
    for name in ('metrics.jsonl', 'model/params.npz'):
        assert (tmp_path / 'two' / name).read_bytes() == (tmp_path / 'run' / name).read_bytes()


def interrupt_after(step: int, config, workdir) -> None:
    """Runs until SIGTERM comes while `step` is computed."""
    with pytest.MonkeyPatch.context() as patch:
        make = steps.make_train_step

        class Interrupting:
            """A compiled step that sends the signal, from its own `lower(...).compile()`."""

            def __init__(self, *args, **kwargs):
                self._made = make(*args, **kwargs)
                self._count = iter(range(1, 1000))

            def lower(self, *args):
                self._made = self._made.lower(*args)
                return self

            def compile(self):
                self._made = self._made.compile()
                return self

            def memory_analysis(self):
                return self._made.memory_analysis()

            def __call__(self, state, batch):
                if next(self._count) == step:
                    os.kill(os.getpid(), signal.SIGTERM)
                return self._made(state, batch)

        patch.setattr(steps, 'make_train_step', Interrupting)
        train.train_and_evaluate(config, workdir)


@pytest.mark.parametrize(('share', 'split'), [(0.02, 'train'), (0.03, 'test')])
def test_too_many_bad_images_stop_the_run(photos, tmp_path, share, split):
    config = make_config(dataset=str(photos), max_unreadable=share, total_steps=40)
    with pytest.raises(UserError, match=rf'{split} images so far could not be read'):
        train.train_and_evaluate(config, tmp_path / 'run')


def test_settings_and_data_stay_as_they_were(photos, tmp_path, capsys):
    changes = {'dataset': str(photos), 'max_unreadable': 1.0}
    with pytest.raises(preemption.PreemptedError):
        interrupt_after(3, make_config(**changes), tmp_path / 'run')
    with pytest.raises(UserError, match=r'other settings \(base_lr: .* -> 0.5; seed: 0 -> 1\)'):
        train.train_and_evaluate(make_config(base_lr=0.5, seed=1, **changes), tmp_path / 'run')
    (photos / 'train/dark/3.png').unlink()
    with pytest.raises(UserError, match=r'dataset is another.*train.examples: 120 -> 119'):
        train.train_and_evaluate(make_config(**changes), tmp_path / 'run')
    (photos / 'train/dark/3.png').write_bytes(b'')
    train.train_and_evaluate(make_config(progress_every=1, **changes), tmp_path / 'run')
    assert 'settings that changed since this run began: progress_every: 2 -> 1' in (
        capsys.readouterr().out
    )


def test_the_best_step_is_kept_and_becomes_a_model(monkeypatch, tmp_path):
    """The accuracies are made up: best at step 2, which is saved, and tested, for that alone."""
    accuracies = {1: 0.2, 2: 0.9, 3: 0.3, 4: 0.4, 5: 0.5, 6: 0.6, 7: 0.7, 8: 0.8}
    at = iter(sorted(accuracies))
    kept = {}

    def made_up(eval_step, params, *args, split, **kwargs):
        if split == 'test':
            kept['tested'] = jax.device_get(params)
            return {'accuracy_test': 0.7, 'loss_test': 1.0}, 1.0
        step = next(at)
        kept[step] = jax.device_get(params)
        return {'accuracy_val': accuracies[step], 'loss_val': 1.0}, 1.0

    monkeypatch.setattr(evaluate, 'evaluate', made_up)
    config = make_config(keep_best=True, eval_every=1, checkpoint_every=100, keep_checkpoints=1)
    train.train_and_evaluate(config, tmp_path)
    with workdir_lib.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 8]
    best, last = (model_folder.load(tmp_path / name) for name in ('model_best', 'model'))
    jax.tree.map(np.testing.assert_array_equal, dict(best.params), kept[2])
    jax.tree.map(np.testing.assert_array_equal, dict(last.params), kept[8])
    assert (best.source['steps'], last.source['steps']) == (2, 8)
    jax.tree.map(np.testing.assert_array_equal, kept['tested'], kept[2])
    tested = {'step': 8, 'accuracy_test': 0.7, 'loss_test': 1.0, 'step_tested': 2}
    assert lines(tmp_path)[-1] == tested
