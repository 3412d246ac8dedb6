"""Runs on a table of images with several classes, and with numbers: report, evaluate, predict."""

import csv
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vit_jax import config as config_lib
from vit_jax import train
from vit_jax.configs import digits
from vit_jax.inference import model_folder

SHAPES = ('circle', 'square')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """48 drawn images of 12 patients, a table of them, and a finished run of each kind."""
    root = tmp_path_factory.mktemp('root')
    rng, rows = np.random.default_rng(0), []
    for number in range(48):
        there = [name for place, name in enumerate(SHAPES) if number >> place & 1]
        light = int(rng.integers(120, 250))
        image = Image.new('RGB', (16, 16), (light,) * 3)
        draw = ImageDraw.Draw(image)
        for name in there:
            x, y = rng.integers(0, 8, 2).tolist()
            shape = draw.ellipse if name == 'circle' else draw.rectangle
            shape((x, y, x + 7, y + 7), fill=(0, 0, 60))
        image.save(root / f'{number}.png')
        rows.append((f'{number}.png', ';'.join(there), light / 10, f'p{number // 4}'))
    with open(root / 'labels.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('path', 'labels', 'light [lux]', 'patient'), *rows])
    run(root, 'several', **{'pp.val': '25%', 'positive_weights': 'balanced'})
    run(root, 'numbers', columns='target=light [lux]')
    return root


def run(root, name, **changes):
    config = digits.get_config()
    config.model.hidden_size = 16
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=1, dropout_rate=0.0)
    config.pp.crop, config.model.patches.size, config.dataset = 16, (8, 8), str(root / 'labels.csv')
    config.update(batch=8, batch_eval=8, total_steps=2, warmup_steps=1, compile_cache='')
    config.update_from_flattened_dict(changes)
    train.train_and_evaluate(config_lib.resolve(config), root / name)


def test_reports_show_what_each_kind_is_judged_by(root):
    page = (root / 'several/report.html').read_text()
    assert 'no report could be written' not in (root / 'several/train.log').read_text()
    for text in ('Mean average precision, validation', '>Mean average precision</text>', 'Recall',
                 'Best predictions', 'Those with the largest loss', 'Class balance'):  # fmt: skip
        assert text in page, text
    assert 'is <b>circle, square</b>' in page or '<b>circle, square</b>' in page
    page = (root / 'numbers/report.html').read_text()
    for text in ('Mean absolute error, test', 'Root mean squared error', '>predicted</text>',
                 'Those with the smallest errors', '>Targets</h2>', '>loss</text>'):  # fmt: skip
        assert text in page, text
    assert 'Class balance' not in page and 'class="wrong"' not in page


def test_evaluate_says_what_the_threshold_was_chosen_on(root, run_script, tmp_path):
    out = tmp_path / 'out'
    words = ('--model', root / 'several/model', '--output', out, '--predictions', f'{out}.csv')
    done = run_script('evaluate.py', *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / 'evaluation.json').read_text())
    task = model_folder.load(root / 'several/model').task
    assert found['threshold'] == task.threshold
    assert found['threshold_chosen_on'] == task.chosen_on != ''
    lines = [json.loads(line) for line in (root / 'several/metrics.jsonl').read_text().splitlines()]
    expected = lines[-1]['mean_average_precision_test']
    assert found['mean_average_precision'] == pytest.approx(expected, abs=1e-6)
    assert f'{100 * expected:.2f} %' in done.stdout
    assert f'{task.threshold:.2f} (chosen on ' in done.stdout
    assert [entry['class'] for entry in found['classes']] == list(SHAPES)
    assert (out / 'average_precision.png').read_bytes()[:4] == b'\x89PNG'
    rows = list(csv.DictReader((tmp_path / 'out.csv').read_text().splitlines()))
    assert len(rows) == found['images']
    for row in rows:
        named = [n for n in SHAPES if float(row[f'probability of {n}']) >= task.threshold]
        assert row['predicted'] == ';'.join(named)


def test_evaluate_on_numbers(root, run_script, tmp_path):
    out = tmp_path / 'out'
    words = ('--model', root / 'numbers/model', '--output', out, '--predictions', f'{out}.csv')
    done = run_script('evaluate.py', *words)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((out / 'evaluation.json').read_text())['numbers']
    rows = list(csv.DictReader((tmp_path / 'out.csv').read_text().splitlines()))
    error = [float(row['light']) - float(row['light true']) for row in rows]
    assert found['name'] == 'light' and found['unit'] == 'lux'
    assert found['mean_absolute_error'] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert (out / 'predicted.png').read_bytes()[:4] == b'\x89PNG'
    other = run_script('evaluate.py', '--model', root / 'several/model', '--dataset', 'digits')
    assert other.returncode == 1 and 'digits' in other.stderr


def test_predict_shows_the_classes_above_the_threshold(root, run_script):
    def predict(name, *words):
        done = run_script('predict.py', '--model', root / f'{name}/model', root / '3.png', *words)
        return done.returncode, done.stdout, done.stderr

    task = model_folder.load(root / 'several/model').task
    _, everything, _ = predict('several', '--threshold', 0, '--format', 'jsonl')
    found = json.loads(everything)['predictions']
    assert len(found) == 2
    _, out, err = predict('several', '--format', 'csv')
    named = {line.split(',')[3] for line in out.splitlines()[1:]} - {''}
    assert named == {row['class'] for row in found if row['probability'] >= task.threshold}
    assert f'probability {task.threshold:g} or more, chosen on {task.chosen_on}' in err
    _, out, _ = predict('numbers', '--format', 'csv')
    assert out.splitlines()[0] == 'image,number,value,unit,error'
    value = float(out.splitlines()[1].split(',')[2])
    _, out, _ = predict('numbers')
    assert out.splitlines()[1] == f'  light  {value:.6g} lux'
    status, _, err = predict('numbers', '--top_k', 1)
    assert status == 1 and '--top_k and --threshold are of classes' in err
