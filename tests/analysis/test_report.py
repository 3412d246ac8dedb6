"""The report of a run: every number on the page, hostile names, runs in any state."""

import base64
import functools
import html.parser
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import modules
import numpy as np
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.analysis import (
    counts,
    report,
    report_charts,
    report_data,
    report_examples,
    report_tables,
    run_files,
)
from vit_jax.checkpoint import npz
from vit_jax.configs import common
from vit_jax.data import sources, tfds_sets
from vit_jax.data.dataset import Selection
from vit_jax.data.decode import decode
from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.errors import UserError
from vit_jax.inference import metrics_report, model_folder

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'report.py'
CLASSES = ('$a_{b}$ & "c" \'d\'', '<img src=x onerror=alert(1)>', '{{ 7*7 }}', 'ünï\u3000code', '_')
RUN = '<b>run & "1"<b> {% x %}'
SIDE = 16
VIT = {
    'model_name': None,
    'patches': {'size': (8, 8)},
    'hidden_size': 8,
    'transformer': {
        'mlp_dim': 16,
        'num_heads': 2,
        'num_layers': 2,
        'attention_dropout_rate': 0.0,
        'dropout_rate': 0.0,
    },
    'classifier': 'token',
    'representation_size': None,
}
MIXER = {
    'model_name': None,
    'patches': {'size': (8, 8)},
    'num_blocks': 1,
    'hidden_dim': 8,
    'tokens_mlp_dim': 4,
    'channels_mlp_dim': 16,
}
DEVICE = {'dtype': 'float32', 'devices': 2, 'kind': 'cpu', 'processes': 1}
EVENTS = [
    ('10:00:00', 'started', 'model: tiny, 1,541 parameters, float32, 16 px, on 2 x cpu', DEVICE),
    ('10:00:00', 'compiled', 'memory: training takes about 7.0 MiB on each device',
     {'parameters': 2**20, 'inputs': 3 * 2**19, 'total': 7 * 2**20}),
    ('10:00:00', 'weights', 'weights: new weights (no pretrained ones were asked for)', {}),
    ('10:00:08', 'unreadable', 'WARNING: cannot use image <i>x</i>.png: it is torn',
     {'image': '<i>x</i>.png'}),
    ('10:00:09', 'stopped', 'stopped by SIGTERM after step 10 of 30, which is saved',
     {'step': 10, 'signal': 'SIGTERM'}),
    ('11:00:00', 'started', 'model: tiny, 1,541 parameters, float32, 16 px, on 2 x cpu', DEVICE),
    ('11:00:00', 'resumed', 'weights: resumed from step 10 in somewhere\n  a second line',
     {'step': 10}),
    ('11:00:03', 'skipped', 'WARNING: step 17: the loss is nan; its update is skipped',
     {'step': 17}),
    ('11:00:04', 'evaluated', 'step 20: test accuracy 70.00 %, loss 0.9000 (20 images)',
     {'step': 20}),
]  # fmt: skip
METRICS = [
    {'step': 10, 'train_loss': 1.5, 'accuracy_train': 0.5, 'gradient_norm': 2.0, 'lr': 0.01},
    {'step': 20, 'train_loss': None, 'accuracy_train': 0.625, 'gradient_norm': None, 'lr': 0.02,
     'skipped_steps': 1, 'replaced_images': 3},
    {'step': 20, 'accuracy_test': 0.7, 'loss_test': 0.9},
    {'step': 30, 'train_loss': 0.71234, 'accuracy_train': 0.75, 'gradient_norm': 1.5, 'lr': 0.0,
     'skipped_steps': 4, 'replaced_images': 1234},
    {'step': 30, 'accuracy_test': 0.65432, 'loss_test': 0.98765, 'unreadable_test': 2},
]  # fmt: skip
TIMING = [
    {'step': 1, 'first_step_s': 75.0},
    {'step': 10, 'img_sec_core_train': 100.0, 'data_wait': 0.25},
    {'step': 20, 'img_sec_core_train': 123.4, 'data_wait': 0.5},
    {'step': 30, 'img_sec_core_train': 1500.0, 'data_wait': 0.5, 'device_memory_peak': 3 * 2**20},
]


class Page(html.parser.HTMLParser):
    """What is on a page; fails where elements are not nested as they should be."""

    EMPTY = ('meta', 'img', 'br', 'path', 'circle', 'use', 'input')

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags, self.attributes, self.tables = text, [], set(), [], []
        self.texts = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or '') for name, value in attrs]
        if tag not in self.EMPTY or tag in ('path', 'use'):
            self.open.append(tag)
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('th', 'td'):
            self.tables[-1][-1].append('')

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ('th', 'td'):
            self.tables[-1][-1][-1] += data

    @property
    def rows(self):
        """The rows of all tables by their first cell."""
        return {row[0]: row[1:] for table in self.tables for row in table}


def make_model(folder, config=VIT, classes=CLASSES, scale=0.5):
    """A model folder with weights drawn at random."""
    module = models.from_config(config, num_classes=len(classes))
    image = np.zeros((1, SIDE, SIDE, 3), np.float32)
    leaves, tree = jax.tree.flatten(modules.shapes(module, image, train=False))
    rng = np.random.default_rng(0)
    params = tree.unflatten([rng.normal(0, scale, x.shape).astype(np.float32) for x in leaves])
    model_folder.save(
        folder,
        params,
        model_config=config,
        class_names=classes,
        preprocess=Preprocess(crop=SIDE),
        source={},
    )


def write_lines(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def make_run(workdir, photos):
    """All that a run writes, by hand."""
    train, test = sources.open_sources(str(photos))
    config = common.get_defaults().to_dict()
    config |= {'dataset': str(photos), 'batch': 64, 'total_steps': 30, 'accum_steps': 1}
    config['model'] = VIT
    config['pp'] |= {'crop': SIDE}
    data = {'class_names': list(train.class_names)} | {
        name: {'split': s.spec, 'examples': len(s), 'fingerprint': s.fingerprint()}
        for name, s in (('train', train), ('test', test))
    }
    versions = {'command': 'python <x>', 'git_revision': None, 'python': '3.99',
                'packages': {'jax': '0.0.1'}}  # fmt: skip
    workdir.mkdir(parents=True)
    for name, value in (('config', config), ('data', data), ('versions', versions)):
        (workdir / f'{name}.json').write_text(json.dumps(value))
    write_lines(workdir / 'metrics.jsonl', METRICS)
    write_lines(workdir / 'timing.jsonl', TIMING)
    rows = [
        {'time': f'2026-01-02 {time}', 'event': event, 'text': text, **facts}
        for time, event, text, facts in EVENTS
    ]
    write_lines(workdir / 'events.jsonl', rows)
    make_model(workdir / 'model', classes=train.class_names)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A run in `RUN`, and its images in `photos`, of which one test image cannot be read."""
    root = tmp_path_factory.mktemp('report')
    rng = np.random.default_rng(3)
    for label, name in enumerate(CLASSES):
        for split, count in (('train', 2 + label), ('test', 5)):
            folder = root / 'photos' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 20 + 50 * ((label + i) % 5), (10, 8, 3), np.uint8)
                pixels = pixels.repeat(4, axis=0).repeat(4, axis=1)[:, :30]  # JPEG keeps these
                Image.fromarray(pixels).save(folder / f'"><script>{i}.png')
    bad = os.fsencode(root / 'photos' / 'test' / CLASSES[0]) + b'/\xff\n.png'
    with open(bad, 'wb') as file:
        file.write(b'no image')
    make_run(root / RUN, root / 'photos')
    return root


@pytest.fixture(scope='module')
def page(root):
    return Page(report.write(root / RUN).read_text(encoding='utf-8'))


@pytest.fixture
def workdir(root, tmp_path):
    """A copy of the run that a test may damage."""
    return pathlib.Path(shutil.copytree(root / RUN, tmp_path / 'run'))


@pytest.fixture
def no_curves(monkeypatch):
    """Leaves the curves out, which take most of the time and are tested by themselves."""
    monkeypatch.setattr(report_charts, 'curves', lambda runs: [])


def test_numbers_of_the_training_are_those_of_its_files(page, root):
    expected = {
        'Training steps': '30',
        'Test accuracy, last': '65.43 %',
        'Test accuracy, best': '70.00 % (step 20)',
        'Test loss, last': '0.9877',
        'Training loss, last batch': '0.7123',
        'Training accuracy, last batch': '75.00 %',
        'Training speed, median (images/s per device)': '123',
        'Compiling and first step': '1 min 15 s',
        'Time from first to last event': '1 h 00 min',
        'Resumed': 'from step 10',
        'Unreadable images named in the log': '1',
        'Training images replaced by others': '1,234',
        'Unreadable test images, last evaluation': '2',
        'Updates skipped (loss or gradient not finite)': '4',
        'Logged steps whose loss was not finite': '1',
        'Command': 'python <x>',
        'Python': '3.99',
        'Devices': '2 x cpu',
        'jax': '0.0.1',
        'hidden_size': '8',
    }
    found = {name: page.rows[name][0] for name in expected}
    assert found == expected
    assert 'Top-5 test accuracy, last' not in page.rows  # it was not measured
    assert page.rows['batch'] == ['64', '512'] and page.rows['base_lr'] == ['0.03']
    names = [row[0] for table in page.tables for row in table]
    assert names.index('batch') < names.index('base_lr')  # what is no default comes first
    assert page.rows['2026-01-02 11:00:00'] == ['weights: resumed from step 10 in somewhere\n'
                                                '  a second line']  # fmt: skip
    assert 'finished, 30 of 30 steps' in page.text
    assert str(root / RUN) in ''.join(page.texts)


def test_costs_are_those_of_the_formulas(page, root):
    parameters = sum(x.size for x in npz.flatten(model_folder.load(root / RUN / 'model').params)
                     .values())  # fmt: skip
    assert page.rows['Parameters'] == [f'{parameters:,}']
    macs = counts.training_macs(VIT, len(CLASSES), SIDE)
    assert page.rows['Training, one image (GFLOPs)'] == [f'{2 * macs / 1e9:,.4g}']
    assert page.rows['Images trained on'] == ['1,920']
    assert page.rows['Training so far (PFLOPs)'] == [f'{2 * macs * 1920 / 1e15:.4g}']
    assert page.rows['Reached on each device, median (TFLOP/s)'] == [f'{246.8 * macs / 1e12:.4g}']
    assert page.rows['Memory of training, inputs (MiB per device)'] == ['1.5']
    assert page.rows['Memory of training, total (MiB per device)'] == ['7.0']
    assert page.rows['Memory of training, measured peak (MiB)'] == ['3.0']


def test_predictions_are_those_of_the_model(page, root):
    model = model_folder.load(root / RUN / 'model')
    _, test = sources.open_sources(str(root / 'photos'))
    names = test.class_names
    examples = [example for example in map(test.__getitem__, range(len(test)))
                if example.image != b'no image']  # fmt: skip
    pixels = [model.preprocess.evaluate(decode(e.image, key='x')) for e in examples]
    apply = jax.jit(functools.partial(model.model.apply, train=False))
    logits = apply({'params': model.params}, normalize(np.stack(pixels)))
    outcomes = [
        (e.label, p, e.key)
        for e, p in zip(examples, np.asarray(jax.nn.softmax(logits)), strict=True)
    ]
    right = [label == p.argmax() for label, p, _ in outcomes]
    assert 0 < sum(right) < len(right) == 25
    assert page.rows['Images'] == ['26']
    assert page.rows['Of these unreadable, counted as wrong'] == ['1']
    assert page.rows['Top-1 accuracy'] == [f'{100 * sum(right) / 26:.2f} %']
    loss = -np.mean([np.log(p[label]) for label, p, _ in outcomes])
    assert page.rows['Loss (cross-entropy)'] == [f'{loss:.4f}']
    confusion = np.zeros((5, 5), int)
    for label, p, _ in outcomes:
        confusion[label, p.argmax()] += 1
    for label, name in enumerate(names):
        precision, recall, _, images, _ = page.rows[name]
        n = 6 if name == CLASSES[0] else 5
        assert (recall, images) == (f'{100 * confusion[label, label] / n:.2f} %', str(n))
        taken = confusion[:, label].sum()
        assert precision == (f'{100 * confusion[label, label] / taken:.2f} %' if taken else '-')
    wrong = confusion - np.diag(confusion.diagonal())
    row, column = np.unravel_index(wrong.argmax(), wrong.shape)
    pair = f'{names[row]} → {names[column]}'
    n = 6 if names[row] == CLASSES[0] else 5
    assert page.rows[pair] == [str(wrong.max()), f'{100 * wrong.max() / n:.2f} %']
    (drawn,) = [s for s in re.findall('<svg .*?</svg>', page.text, re.S) if 'true class' in s]
    numbers = re.findall(r'text-anchor: middle[^>]*>(\d+)</text>', drawn)
    assert sorted(map(int, numbers)) == sorted(n for n in confusion.flat if n)

    best, worst = shown(page.text, 'Best predictions'), shown(page.text, 'Worst predictions')
    by_probability = sorted(outcomes, key=lambda outcome: -outcome[1][outcome[0]])
    for captions, wanted in (
        (best, [o for o in by_probability if o[0] == o[1].argmax()]),
        (worst, [o for o in reversed(by_probability) if o[0] != o[1].argmax()]),
    ):
        assert len(captions) == min(8, len(wanted))
        for caption, (label, p, key) in zip(captions, wanted, strict=False):
            assert names[p.argmax()] in caption and f'{100 * p.max():.1f} %' in caption
            assert f'{100 * p[label]:.1f} %' in caption and names[label] in caption
            assert key.removeprefix(f'{root}/photos/') in caption and str(root) not in caption


def shown(text, heading):
    """The captions of the pictures below a heading."""
    part = text.split(f'>{heading}<')[1].split('<h4')[0]
    captions = re.findall(r'<figcaption>(.*?)</figcaption>', part, re.S)
    return [html.unescape(re.sub(r'<[^>]*>', '', caption)) for caption in captions]


def test_class_table_on_a_phone_names_every_number(page):
    """Below 40rem the table is stacked, and what was a column's head stands at each number."""
    labels = [value for tag, name, value in page.attributes if name == 'data-label']
    heads = ['Precision', 'Recall', 'F1', 'Images', 'Most often taken for']
    assert labels[: 5 * len(CLASSES)] == heads * len(CLASSES)
    pairs = labels[5 * len(CLASSES) :]
    assert pairs == ['Images', 'Share of the class'] * (len(pairs) // 2) and pairs
    assert 'content: attr(data-label)' in page.text.split('@media (max-width: 40rem)')[1]


def test_many_classes_are_announced_above_their_table_and_drawn_large(
    page, root, no_curves, monkeypatch
):
    monkeypatch.setattr(metrics_report, 'MAX_ROWS', 1)
    monkeypatch.setattr(metrics_report, 'LARGE', len(CLASSES) - 1)
    text = report.write(root / RUN, root / 'many.html').read_text(encoding='utf-8')
    note = text.index(f'The 1 of {len(CLASSES)} classes with the lowest F1:')
    assert text.index('id="run1-zoom"') < note < text.index('<table class="stack">')
    assert 'class="drawing wide zoom many"' in text
    assert 'class="drawing wide zoom"' in page.text, 'a small one is not blown up'


def test_pictures_are_the_images(page, root):
    urls = [value for tag, name, value in page.attributes if (tag, name) == ('img', 'src')]
    lists = [shown(page.text, f'{which} predictions') for which in ('Best', 'Worst')]
    explained = sum(min(3, len(captions)) for captions in lists)
    assert len(shown(page.text, 'Attention')) == explained
    assert len(urls) == sum(map(len, lists)) + 3 * explained
    first = html.unescape(re.search(r'<img src="([^"]+)" alt="([^"]+)"', page.text)[2])
    first = root / 'photos' / first
    data = base64.b64decode(urls[0].split(',')[1])
    with Image.open(io.BytesIO(data)) as small:
        assert small.size == (60, 80)  # twice as large, so that browsers do not blur it
        shrunk = np.asarray(small.convert('RGB'), float).reshape(40, 2, 30, 2, 3).mean((1, 3))
    distances = {}
    for path in (root / 'photos' / 'test').glob('*/*.png'):
        if path.stat().st_size > 10:
            with Image.open(path) as original:
                distances[path] = np.abs(shrunk - np.asarray(original)).mean()
    assert min(distances, key=distances.get) == first and distances[first] < 12


def test_classes_are_counted(root):
    train, test = sources.open_sources(str(root / 'photos'))
    found, notes = report_data.class_balance(train, test)
    assert train.class_names == tuple(sorted(CLASSES))
    counted = dict(zip(train.class_names, found['training'].tolist(), strict=True))
    assert counted == {name: 2 + label for label, name in enumerate(CLASSES)}
    assert found['test'].sum() == 26 and notes == ()


def test_hostile_names_are_text(page, root):
    """Names of classes, files, folders and runs add no element, attribute, script or template."""
    assert page.tags <= {
        'html', 'head', 'meta', 'title', 'style', 'body', 'header', 'nav', 'main', 'section',
        'footer', 'h1', 'h2', 'h3', 'h4', 'p', 'b', 'a', 'br', 'span', 'div', 'ul', 'li', 'img',
        'figure', 'figcaption', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'details', 'summary',
        'svg', 'g', 'defs', 'clippath', 'path', 'rect', 'text', 'use', 'circle', 'image', 'input',
        'label',
    }  # fmt: skip
    assert not [a for a in page.attributes if a[1].startswith('on')]
    shown_texts = ''.join(page.texts)
    for name in (*CLASSES[:3], RUN, '<i>x</i>.png'):
        assert name in shown_texts, name
    assert '49' not in page.rows  # {{ 7*7 }}
    assert 'ünï\u3000code' in shown_texts
    bare = page.text.replace('&lt;', '').replace('&quot;', '')
    assert '<img src=x' not in bare and '<script' not in bare and '<i>x' not in bare


def test_names_that_are_no_text_are_escaped():
    assert report._printable('a\udcff\x1b[2J\u202eb') == 'a\\udcff\\x1b[2J\\u202eb'
    assert report._printable('plain <b>') == 'plain <b>' and report._printable(7) == 7


def test_page_needs_nothing_else(page):
    for tag, name, value in page.attributes:
        if name in ('src', 'href', 'xlink:href'):
            assert value.startswith(('data:image/', '#')), (tag, name, value)
    assert set(re.findall(r'url\(([^)]?)', page.text)) <= {'#'}
    assert '@import' not in page.text
    policy = {n: v for t, n, v in page.attributes if t == 'meta' and "'none'" in v}
    assert policy['content'].startswith("default-src 'none'")
    ids = [value for _, name, value in page.attributes if name == 'id']
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(|href=")#([^)"]+)', page.text)
    assert targets and set(targets) <= set(ids)


def test_charts_take_their_colours_from_the_page(page):
    svgs = re.findall(r'<svg .*?</svg>', page.text, re.S)
    assert 'stroke: currentColor' in page.text and 'var(--series-2)' in page.text
    assert not [c for svg in svgs for c in report_charts._CSS if c in svg]
    for name in ('--ink', '--grid', *(f'--series-{i}' for i in range(1, 9))):
        assert page.text.count(f'{name}: #') == 3, name  # light, dark, printed
    for title, unit in (
        ('Loss', 'cross-entropy (nats)'),
        ('Accuracy', 'accuracy (%)'),
        ('Training speed', 'images/s per device'),
    ):
        assert f'>{title}</text>' in page.text and f'>{unit}</text>' in page.text
    assert page.text.count('>training step</text>') == 6


def test_curves_go_through_the_values(root):
    run = run_files.read(root / RUN)
    steps, values = run.series('train_loss')
    assert steps.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(values, [1.5, np.nan, 0.71234])
    with report_charts.themed():
        loss = report_charts.curves([run])[0]
    # The test points: two of the same series, at the places of steps 20 and 30 and their values.
    points = [tuple(map(float, p)) for p in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" '
              r'style="fill: var\(--series-2\)', loss.svg)]  # fmt: skip
    ticks = re.findall(r'>([\d.]+)</text>', loss.svg)
    assert len(points) == 2 and '20' in ticks
    (x20, y09), (x30, y98765) = points
    assert x30 > x20 and y98765 < y09  # SVG counts from the top
    assert [key.label for key in loss.legend] == ['training batch', 'test set']


def test_many_points_become_means():
    steps, values = np.arange(1, 11), np.array([1.0, 3, np.nan, 5, np.nan, np.nan, 1, 1, 4, 8])
    thin_steps, thin_values, together = report_charts.thin(steps, values, most=5)
    assert together == 2
    np.testing.assert_array_equal(thin_steps, [1.5, 3.5, 5.5, 7.5, 9.5])
    np.testing.assert_array_equal(thin_values, [2, 5, np.nan, 1, 6])
    same = report_charts.thin(steps, values, most=10)
    assert same[0] is steps and same[2] == 1


def test_half_written_lines_are_left_out(workdir):
    with open(workdir / 'metrics.jsonl', 'a') as file:
        file.write('[1]\n{"step": 40, "train_lo')
    run = run_files.read(workdir)
    assert run.steps == 30 and run.last('train_loss') == 0.71234
    (note,) = run.notes
    assert '2 of 7 lines' in note and 'half-written' in note
    with open(workdir / 'timing.jsonl', 'a') as file:
        file.write('{"step": 30, "data_wait": "x", "first_step_s": 1e999, "eta_s": true}\n')
    run = run_files.read(workdir)
    assert run.last('data_wait') == 0.5 and run.last('eta_s') is None
    assert np.isnan(run.last('first_step_s'))


def test_run_that_has_only_begun(workdir):
    """No model, no evaluation, no metrics yet: the page is written and says so."""
    shutil.rmtree(workdir / 'model')
    (workdir / 'timing.jsonl').unlink()
    write_lines(workdir / 'metrics.jsonl', METRICS[:2])
    page = Page(report.write(workdir).read_text())
    assert page.rows['Training steps'] == ['20']
    assert 'Test accuracy, last' not in page.rows and 'Top-1 accuracy' not in page.rows
    text = ''.join(page.texts)
    assert 'There is no timing.jsonl.' in text and 'There is no model folder yet' in text
    assert '20 of 30 steps so far' in text and '>Training speed<' not in page.text
    assert '>Class balance</text>' in page.text

    (workdir / 'metrics.jsonl').write_text('')
    assert 'No step has been logged yet.' in report.write(workdir).read_text()


@pytest.mark.usefixtures('no_curves')
@pytest.mark.parametrize('name', ['config.json', 'data.json', 'versions.json', 'events.jsonl'])
@pytest.mark.parametrize('content', [None, '[]', '{"model": 3, "pp": [], "test": {}}'])
def test_missing_and_damaged_files_cost_their_part_only(workdir, name, content):
    (workdir / name).unlink()
    if content is not None:
        (workdir / name).write_text(content)
    page = Page(report.write(workdir, images=0).read_text())
    assert page.rows['Test accuracy, last'] == ['65.43 %']
    text = ''.join(page.texts)
    if content is None:
        assert f'There is no {name}' in text
    if name in ('config.json', 'data.json'):
        assert 'the images are not there' in text and 'config.json does not tell it' in text
    if name == 'events.jsonl':
        known = 'not known' if content is None else 'no'  # an older version's run has no such file
        assert 'No memory: events.jsonl' in text and page.rows['Resumed'] == [known]


def test_no_run_no_report(tmp_path):
    with pytest.raises(UserError, match='there is no folder'):
        report.write(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='holds no run'):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures('no_curves')
def test_dataset_that_is_gone_or_another(workdir, monkeypatch):
    config = json.loads((workdir / 'config.json').read_text())
    run = run_files.read(workdir)
    report_data.open_data(run)
    changed = run.data | {'test': run.data['test'] | {'fingerprint': 'x'}}
    (workdir / 'data.json').write_text(json.dumps(changed))
    with pytest.raises(UserError, match='is another than when the run began'):
        report_data.open_data(run_files.read(workdir))

    def download(*args, **kwargs):
        raise AssertionError('a report must not prepare a dataset')

    monkeypatch.setattr(tfds_sets, 'prepare_in_child', download)
    for dataset, message in (('/nowhere/photos', 'no folder'), ('tf_flowers', 'not on this mach')):
        config |= {'dataset': dataset, 'tfds_data_dir': str(workdir)}
        (workdir / 'config.json').write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            report_data.open_data(run_files.read(workdir))
    page = Page(report.write(workdir).read_text())
    assert 'not on this machine' in ''.join(page.texts) and 'Images' not in page.rows


@pytest.mark.usefixtures('no_curves')
def test_damaged_model_and_full_device_cost_the_predictions_only(workdir, monkeypatch):
    with open(workdir / 'model' / 'params.npz', 'r+b') as file:
        file.write(b'xxxx')
    assert 'Left out: ' in report.write(workdir).read_text()

    def no_memory(path):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: <out> of memory')

    monkeypatch.setattr(model_folder, 'load', no_memory)
    assert 'RESOURCE_EXHAUSTED: &lt;out&gt;' in report.write(workdir).read_text()


@pytest.mark.usefixtures('no_curves')
def test_mixer_has_no_attention(workdir):
    shutil.rmtree(workdir / 'model')
    make_model(workdir / 'model', MIXER, classes=sorted(CLASSES))
    page = Page(report.write(workdir, images=7).read_text())
    text = ''.join(page.texts)
    assert 'No attention maps: an MLP-Mixer has no attention' in text
    assert 'a fixed random sample of 7 of the 26 test images' in text
    assert page.rows['Images'] == ['7']


def test_several_runs(root, workdir, tmp_path):
    config = json.loads((workdir / 'config.json').read_text())
    (workdir / 'config.json').write_text(json.dumps(config | {'base_lr': 0.5, 'seed': 7}))
    write_lines(workdir / 'metrics.jsonl', METRICS[:3])
    output = tmp_path / 'both.html'
    page = Page(report.write([root / RUN, workdir], output, images=0).read_text())
    assert page.rows['Test accuracy, last'] == ['65.43 %', '70.00 %']
    (differences,) = [table[1:] for table in page.tables if table[0] == ['Setting', RUN, 'run']]
    assert differences == [['base_lr', '0.03', '0.5'], ['seed', '0', '7']]
    texts = [text for text in page.texts if text.endswith(', test set')]
    assert texts == [f'{RUN}, test set', 'run, test set'] * 2  # loss, accuracy
    ids = [value for _, name, value in page.attributes if name == 'id']
    assert len(ids) == len(set(ids))

    names = [run.name for run in run_files.read_all([workdir, workdir])]
    assert names == [str(workdir)] * 2
    with pytest.raises(UserError, match='name a file with --output'):
        report.write([workdir, workdir])
    with pytest.raises(UserError, match='at most 8'):
        report.write([workdir] * 9, output)


@pytest.mark.usefixtures('no_curves')
def test_report_is_whole_or_absent(workdir, monkeypatch):
    """An error at the end of training is one line, and an older report stays."""
    lines = []
    (workdir / 'report.html').write_text('older')
    with monkeypatch.context() as patch:
        patch.setattr(report, 'render', lambda *args, **kwargs: 1 / 0)
        report.write_at_end(workdir, lines.append)
    (line,) = lines
    assert line.startswith('WARNING: no report') and 'ZeroDivisionError' in line
    assert '\n' not in line and f'vit_jax report {workdir}' in line
    assert (workdir / 'report.html').read_text() == 'older'
    with pytest.raises(UserError, match='cannot write'):
        report.write(workdir, workdir / 'nowhere' / 'x.html', images=0)

    report.write_at_end(workdir, lines.append)
    assert lines[1] == f'report: {workdir / "report.html"}'
    assert (workdir / 'report.html').read_text().startswith('<!DOCTYPE html>')
    assert not list(workdir.glob('.report*'))


def test_samples_are_bounded_and_fixed(root):
    assert report_data.sample(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = report_data.sample(10_000, 100)
    assert len(set(chosen)) == 100 and (np.diff(chosen) > 0).all() and chosen[-1] < 10_000
    np.testing.assert_array_equal(chosen, report_data.sample(10_000, 100))
    assert report_examples.image_limit(model_folder.load(root / RUN / 'model')) == 2000


def test_labels_that_must_be_read_are_sampled(root, monkeypatch):
    train, test = sources.open_sources(str(root / 'photos'))
    monkeypatch.setattr(Selection, 'labels', lambda self: None)
    monkeypatch.setattr(report_data, 'MAX_IMAGES', 10)
    found, notes = report_data.class_balance(train, test)
    assert found['training'].sum() == 10
    assert 'Of the 20 training images a fixed random sample of 10 was counted.' in notes


def test_many_classes_show_the_largest_and_smallest():
    names = [f'class {i}' for i in range(50)]
    with report_charts.themed():
        figure = report_charts.class_balance(names, {'training': np.arange(50)})
        svg = report_charts.to_svg(figure, 'x')
    assert 'the 20 largest and 20 smallest of 50 classes' in svg
    assert '>class 49</text>' in svg and '>class 25</text>' not in svg


def test_many_events_are_cut_in_the_middle(workdir):
    row = {'time': '2026-01-02 10:00:00', 'event': 'unreadable', 'step': 1}
    rows = [
        {**row, 'image': f'{i}.png', 'text': f'cannot use image {i}.png: {"x" * 600}'}
        for i in range(500)
    ]
    write_lines(workdir / 'events.jsonl', rows)
    run = run_files.read(workdir)
    events = report_tables.events(run)
    assert len(events) == 201 and '300 more' in events[100][1]
    assert all(len(text) <= 500 for _, text in events) and '499.png' in events[-1][1]
    assert run.unreadable() == 500


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the command in this process: (status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location('report_script', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['report.py', *map(str, arguments)])
        status = script.main()
        return status, *capsys.readouterr()

    return call


@pytest.mark.usefixtures('no_curves')
def test_command(main, workdir, tmp_path):
    assert main(workdir, '--images', 0) == (0, f'written: {workdir / "report.html"}\n', '')
    output = tmp_path / 'other.html'
    assert main(workdir, '--images', 0, '--output', output)[0] == 0
    for words, message in (
        ((workdir, '--output', output), 'exists; name another file, or add --overwrite'),
        ((workdir, workdir), 'name a file with --output'),
        ((tmp_path,), 'holds no run'),
        ((workdir, '--images', -1), 'expected a number of images'),
    ):
        status, out, err = main(*words)
        assert (status, out) == (1, '') and err.startswith('report.py: ') and message in err
        assert err.count('\n') == 1
    assert main(workdir, '--images', 0, '--output', output, '--overwrite')[0] == 0


def test_help_comes_before_anything_heavy():
    code = (
        'import runpy, sys\n'
        'sys.argv = ["report.py", "--help"]\n'
        'try:\n'
        f'    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")\n'
        'finally:\n'
        '    assert not {"jax", "numpy", "matplotlib", "jinja2"} & set(sys.modules)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Examples:' in done.stdout
