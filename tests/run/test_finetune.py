"""From photos to a model: what the clock plans, and what a plan gives, whatever the clock."""

import json
import os
import pathlib
import re
import shutil
import signal
import time

import cv2
import modules
import numpy as np
import pytest

from vit_jax import train
from vit_jax.errors import UserError
from vit_jax.inference import model_folder, probe_choice
from vit_jax.run.finetuning import clock as clock_lib
from vit_jax.run.finetuning import look, plans
from vit_jax.run.finetuning import trials as trials_lib
from vit_jax.run.finetuning.clock import Measured

LEVELS = {'dark': 40, 'light': 200}


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Dark and bright pictures, some of them in the wrong folder; one cannot be read."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp('photos') / 'pets'
    for part, count in (('train', 10), ('test', 4)):
        for name, level in LEVELS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                far = level if index else 240 - level
                pixels = rng.integers(far - 30, far + 30, (20, 20, 3), np.uint8)
                cv2.imwrite(str(folder / f'{index}.png'), pixels)
    (root / 'train/dark/broken.png').write_bytes(b'no image')
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp('weights') / 'model'
    tiny_model(('cat', 'dog', 'cow'), folder=folder)
    return folder


@pytest.fixture(scope='module')
def plan(photos, weights, tmp_path_factory):
    """A plan with two runs; the second one is ended early."""
    model = model_folder.load(weights)
    parts = look.open_parts(str(photos), {}, 3)
    assert parts.specs == ('train', '20%', 'test')
    made = plans.new_plan(parts, 'elsewhere', {}, str(weights), model, 0)
    for name, steps, ended in (('all-0.001', 3, 0), ('long-all-0.01', 5, 4)):
        settings = {'base_lr': float(name.split('-')[-1]), 'total_steps': steps,
                    'warmup_steps': 1, 'ema_decay': 0.5}  # fmt: skip
        made = made.with_run(plans.Run(name, 'all weights', settings, ended))
    path = tmp_path_factory.mktemp('plan') / 'plan.json'
    made.write(path)
    assert plans.read(path) == made
    return path


@pytest.fixture(scope='module')
def replayed(photos, plan, tmp_path_factory, command_once):
    folder = tmp_path_factory.mktemp('replayed') / 'out'
    done = command_once('scripts/finetune.py', photos, '--plan', plan, '--output', folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope='module')
def command_once(tmp_path_factory):
    """As `command` of the conftest, for a module."""
    import forked

    root = pathlib.Path(__file__).parents[2]

    def run(*words, env=None):
        folder = tmp_path_factory.mktemp('command')
        env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1', **(env or {})}
        return forked.run(
            [str(word) for word in words], folder=folder, cwd=root, env=env, timeout=300
        )

    return run


def order(told):
    return told['right'], -told['loss']


def test_a_plan_gives_a_model_and_a_report(replayed, photos):
    folder, printed = replayed
    state = json.loads((folder / 'finetune.json').read_text())
    scores = state['scores']
    assert [*scores] == ['probe', 'all-0.001', 'long-all-0.01', 'between']
    assert scores['long-all-0.01']['steps'] == 4 and scores['all-0.001']['steps'] == 3
    best = max(scores.values(), key=order)
    assert scores[state['chosen']] == best  # and so never worse than the probe
    places = {name: folder / f'runs/{name}/model' for name in scores}
    places |= {name: folder / name for name in ('probe', 'between')}
    source = places[state['chosen']]
    # Between the probe and the best run, by hand.
    told = scores['between']
    assert told['run'] == max(('all-0.001', 'long-all-0.01'), key=lambda name: order(scores[name]))
    start, tuned, found = (
        np.load(places[name] / 'params.npz') for name in ('probe', told['run'], 'between')
    )
    for key in found:
        wanted = (1 - told['share']) * start[key] + told['share'] * tuned[key]
        np.testing.assert_allclose(found[key], wanted, rtol=1e-5, atol=1e-7)
    if state['chosen'] != 'probe':  # which is fitted again
        chosen = (folder / 'model/params.npz').read_bytes()
        assert chosen == (source / 'params.npz').read_bytes()
    model = model_folder.load(folder / 'model')
    assert model.class_names == ('dark', 'light')

    # The number of the last line, by hand.
    right = 0
    for label, name in enumerate(LEVELS):
        for path in (photos / 'test' / name).iterdir():
            pixels = model.preprocess.evaluate(cv2.imread(str(path))[..., ::-1])
            logits = modules.apply(model.model, model.params, pixels[None] / 127.5 - 1)
            right += int(logits.argmax()) == label
    last = printed.splitlines()[-1]
    assert last.startswith(f'test: {100 * right / 8:.1f} % of 8 images (95 % interval')
    assert state['result']['right'] == right
    for text in (
        'WARNING: 4 images are few to choose by', 'broken.png', 'python -m vit_jax.main --config',
        '--config.total_steps=3', 'vit_jax soup', 'chosen: ',
    ):  # fmt: skip
        assert text in printed
    page = (folder / 'report.html').read_text()
    for text in (
        'Candidates',
        'Is the label right?',
        'Calibration',
        'broken.png',
        'the same by hand',
    ):
        assert text.lower() in page.lower()
    assert page.count('<img') > 4 and not (folder / 'runs/all-0.001/checkpoints').exists()


def test_test_images_change_the_last_line_alone(replayed, photos, plan, tmp_path, command_once):
    """With the labels of the test images exchanged, and another path, the model is the same."""
    folder, printed = replayed
    other = tmp_path / 'pets'
    shutil.copytree(photos, other, copy_function=shutil.copy2)
    (other / 'test/dark').rename(other / 'test/x')
    (other / 'test/light').rename(other / 'test/dark')
    (other / 'test/x').rename(other / 'test/light')
    again = tmp_path / 'out'
    done = command_once('scripts/finetune.py', other, '--plan', plan, '--output', again)
    assert done.returncode == 0, done.stderr
    for name in ('model', 'probe', 'runs/long-all-0.01/model', 'between'):
        one, two = (place / name / 'params.npz' for place in (folder, again))
        assert one.read_bytes() == two.read_bytes()
    states = [json.loads((place / 'finetune.json').read_text()) for place in (folder, again)]
    for name, told in states[0]['scores'].items():
        for key in ('right', 'loss', 'steps'):
            assert told.get(key) == states[1]['scores'][name].get(key)
    right = [state['result']['right'] for state in states]
    assert sum(right) == 8 and printed.splitlines()[-1] != done.stdout.splitlines()[-1]


def test_a_probe_that_is_chosen_is_fitted_to_all(plan, photos, tmp_path, run_script):
    """To training and validation images, with the kind and setting that were chosen before."""
    told = json.loads(plan.read_text())
    (tmp_path / 'plan.json').write_text(json.dumps(told | {'runs': []}))
    words = ('finetune.py', photos, '--plan', tmp_path / 'plan.json', '--output', tmp_path / 'out')
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert 'chosen: probe' in done.stdout
    assert 'fitted to these images as well' in (tmp_path / 'out/report.html').read_text()
    setting = re.search(r'probe \((.*)\): validation', done.stdout)[1]
    (candidate,) = [
        each for each in probe_choice.CANDIDATES if f'{each.name} {each.setting}' == setting
    ]
    parts = [
        np.load(tmp_path / 'out/features' / name / 'part-000000000.npz')
        for name in ('train', 'val')
    ]
    values, labels = (np.concatenate([part[key] for part in parts]) for key in ('values', 'label'))
    assert len(labels) == 20
    wanted = candidate.fit(values, labels, 2).kernel
    models = [model_folder.load(tmp_path / 'out' / name) for name in ('model', 'probe')]
    heads = [np.array(each.params['head']['kernel']) for each in models]
    scaled = [head / np.linalg.norm(head) for head in (wanted, *heads)]
    np.testing.assert_allclose(scaled[1], scaled[0], rtol=1e-4, atol=1e-5)
    assert np.abs(scaled[2] - scaled[0]).max() > 1e-3
    assert [each.source['train'] for each in models] == ['train', 'train without 20%']


class Signal:
    """Comes after the second step."""

    def on_step(self, step, state, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_stopped_goes_on(replayed, photos, plan, tmp_path, run_script, monkeypatch):
    """By Ctrl-C while the probe is fitted, and by SIGTERM within the second run."""
    real, choose, calls = train.train_and_evaluate, probe_choice.choose, []

    def training(config, workdir, callbacks):
        calls.append(pathlib.Path(workdir).name)
        stopping = [Signal()] if len(calls) == 2 else []
        return real(config, workdir, callbacks=[*callbacks, *stopping])

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return choose(*args, **options)

    monkeypatch.setattr(train, 'train_and_evaluate', training)
    words = ('finetune.py', photos, '--plan', plan, '--output', tmp_path / 'out')
    with monkeypatch.context() as patch:
        patch.setattr(probe_choice, 'choose', interrupted)
        done = run_script(*words)
    assert done.returncode == 128 + signal.SIGINT and 'the same command goes on' in done.stderr
    assert not calls and not (tmp_path / 'out/probe').exists()
    done = run_script(*words)
    assert done.returncode == 128 + signal.SIGTERM and 'the same command goes on' in done.stderr
    assert '--workdir' not in done.stderr
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert calls == ['all-0.001', 'long-all-0.01', 'long-all-0.01']
    one, other = (
        json.loads((place / 'finetune.json').read_text())['scores']
        for place in (replayed[0], tmp_path / 'out')
    )
    assert [*one] == [*other]
    for name in one:  # to rounding: the devices are not as many
        assert one[name]['right'] == other[name]['right']
        assert one[name]['loss'] == pytest.approx(other[name]['loss'], abs=1e-3)
    done = run_script(*words)
    assert 'this is done' in done.stdout and len(calls) == 3
    assert done.stdout.splitlines()[-1].startswith('test: ')
    done = run_script(*words, '--seed', 3)
    assert done.returncode == 1 and 'holds another fine-tuning' in done.stderr


def test_sets_without_sense(weights, tmp_path, run_script):
    rng = np.random.default_rng(0)
    picture = cv2.imencode('.png', rng.integers(0, 255, (20, 20, 3), np.uint8))[1].tobytes()

    def folder(name, counts):
        root = tmp_path / name
        for label, count in enumerate(counts):
            (root / f'{label:04d}').mkdir(parents=True)
            for index in range(count):
                (root / f'{label:04d}/{index}.png').write_bytes(picture)
        return root

    for root, words in (
        (folder('one', [9]), 'holds one class only'),
        (folder('three', [2, 1]), 'has 3 images of 2 classes, and 0 of the classes have 4 or more'),
        (folder('thousand', [1] * 1000), 'has 1,000 images of 1,000 classes, and 0 of the classes'),
        (folder('same', [8, 8]), 'look the same to the model: are they copies'),
    ):
        done = run_script('finetune.py', root, '--weights', weights, '--output', tmp_path / 'out')
        assert done.returncode == 1
        assert re.search(words, done.stderr), done.stderr
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
    for words, message in (
        ([], 'name the photos'),
        (['x', '--minutes', 0], 'a number above 0'),
        ([tmp_path / 'same', '--plan', weights / 'model.json'], 'is no plan'),
    ):
        done = run_script('finetune.py', *words)
        assert done.returncode == 1 and message in done.stderr, done.stderr


def test_a_damaged_plan(plan, tmp_path):
    for name, value in (
        ('seed', -1), ('runs', [{'name': '../x', 'what': '', 'settings': {'total_steps': 3}}]),
        ('settings', {'batch': [1]}), ('data', {'tfds_dir': 'x'}), ('weights', 3), ('more', 1),
        ('pixels', {'crop': 16.5}),
    ):  # fmt: skip
        told = json.loads(plan.read_text()) | {name: value}
        (tmp_path / 'plan.json').write_text(json.dumps(told))
        with pytest.raises(UserError, match='is damaged'):
            plans.read(tmp_path / 'plan.json')


def outlook(left, measured=(), images=200):
    tries = trials_lib.to_try({'transformer': {'num_layers': 12}})
    return trials_lib.Outlook(tries, left, measured, forward=40, images=images, batch=32)


def test_runs_are_planned_for_the_time_that_is_left():
    """A step takes 32 / (40 * 0.29) = 2.8 s before one was measured."""
    trials = trials_lib
    kinds = {kind.name for kind, _ in trials.to_try({'transformer': {'num_layers': 3}})}
    assert kinds == {'all', 'lora'} and len(trials.to_try({'num_blocks': 8})) == 2
    best = [(trials.ALL, 1e-3), (trials.LAST, 1e-3)]
    assert trials.how_many(outlook(150)) == 0
    assert trials.last(outlook(60), best[:1], []) is None
    assert trials.kind_of(trials.last(outlook(60), best, [])) is trials.LAST
    run = trials.last(outlook(150, images=151), best, [])  # 42 steps of 32: 8.9 times each
    assert run and run.settings['randaug'] == '2,10' and run.settings['mixup'] == 0.2
    run = trials.last(outlook(150), best, [])
    assert run and 'randaug' not in run.settings
    assert run.settings['total_steps'] == int(0.93 * 125 / (32 / 11.6))
    assert trials.is_last(run) and trials.kind_of(run) is trials.ALL

    left, measured, total = 900.0, [], 0
    count = trials.how_many(outlook(left))
    assert count >= 2
    shares = []
    for place in range(count):
        run = trials.trial(outlook(left, measured), place, count)
        assert run and run.settings['base_lr'] == trials.TRIALS[place][1]
        kind = trials.kind_of(run)
        took = 15 + run.settings['total_steps'] * 1.0 * kind.cost  # faster than expected
        measured.append(Measured(kind.name, kind.cost, 15))
        shares.append(took)
        left -= took
    assert sum(shares) < 0.3 * 900
    run = trials.last(outlook(left, measured, images=10**5), best, [])
    total = 15 + run.settings['total_steps']
    assert 0.9 * left < total < left
    assert trials.seconds_of(outlook(left, measured), run) == total
    most = trials.last(outlook(10**6), best, [])
    assert most.settings['total_steps'] == 375  # 60 passes over 200 images
    more = trials.last(outlook(10**6), best, [most])
    assert more.name == 'long-last3-0.001' and trials.kind_of(more) is trials.LAST
    assert trials.last(outlook(10**6), best, [most, more]) is None
    assert trials.last(outlook(150), best[::-1], [most]) is None  # less than half as long


def test_the_clock_ends_a_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    noted: list[float] = []
    clock = clock_lib.Clock(60, 10, 100.0, noted.append)
    watch = clock_lib.Watch(clock, 30, 10, 1, 0)
    for step in range(1, 20):
        now[0] += 1
        try:
            watch.on_step(step, None, None)
        except clock_lib.EndRun:
            break
    assert step == watch.steps == 11 and watch.ended and noted == [16]
    measured = watch.measured('all', begin=98.0)
    assert measured == Measured('all', 1.0, 3.0)
    assert clock.left() == 60 - 10 - 11 and str(clock) == '[21 s of 1 min 00 s]'
    # Where steps take twice as long as expected, so will what comes after them.
    slow = clock_lib.Watch(clock, 44, 10, 0.5, 0)
    for step in range(1, 20):
        now[0] += 1
        try:
            slow.on_step(step, None, None)
        except clock_lib.EndRun:
            break
    assert slow.steps == 4 and clock.spent() == 25
