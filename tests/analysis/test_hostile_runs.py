"""Reports of workdirs that are damaged or made to harm: a page or one line, soon."""

import json
import os

import numpy as np
import pytest

from vit_jax.analysis import report, report_data, report_settings, report_tables, run_files
from vit_jax.errors import UserError
from vit_jax.run import telemetry

CONFIG = {'total_steps': 2, 'dataset': '', 'tfds_data_dir': '', 'batch': 8, 'remat': '',
          'model': {'model_name': 'x'}, 'pp': {'crop': 8}}  # fmt: skip
DATA = {'class_names': ['a', 'b']}
METRICS = [{'step': 1, 'train_loss': 1.0}, {'step': 2, 'train_loss': 0.5, 'accuracy_test': 0.5}]
TIME = '2026-01-02 10:00:00'


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    for name, value in (('config', CONFIG), ('data', DATA), ('versions', {'command': 'x'})):
        (folder / f'{name}.json').write_text(json.dumps(value))
    for name, rows in (('metrics', METRICS), ('timing', []), ('events', [])):
        write_lines(folder / f'{name}.jsonl', rows)
    return folder


def write_lines(path, rows):
    path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows))


def texts(run):
    """Every cell of every table, and the events."""
    tables = (
        report_tables.summary([run]), *report_settings.configuration(run), report_tables.costs(run),
        report_settings.architecture(run), report_settings.environment(run),
        report_settings.packages(run), report_tables.happened(run),
    )  # fmt: skip
    cells = [cell for table in tables for row in table.rows for cell in row]
    return [
        report_tables.state(run),
        *cells,
        *(t for event in report_tables.events(run) for t in event),
    ]


def test_numbers_are_bounded(workdir):
    nines = '9' * 5000
    write_lines(
        workdir / 'metrics.jsonl',
        [
            {'step': 1, 'train_loss': 1e308},
            {'step': 2, 'train_loss': -1e308, 'lr': 1e-320},
            {'step': 3, 'train_loss': 0.25, 'accuracy_test': 1e300},
            {'step': 2**53 - 1, 'train_loss': 1.0},
            f'{{"step": 4, "train_loss": {nines}}}',
            f'{{"step": {nines}, "train_loss": 1}}',
            '{"step": 5, "train_loss": ' + '9' * 300 + '}',
        ],
    )
    write_lines(
        workdir / 'timing.jsonl',
        [{'step': 2, 'img_sec_core_train': -1e308, 'first_step_s': 1e308, 'data_wait': 1e300}],
    )
    run = run_files.read(workdir)
    steps, values = run.series('train_loss')
    assert steps.tolist() == [1, 2, 3, 5]
    np.testing.assert_array_equal(values, [np.nan, np.nan, 0.25, np.nan])
    assert any('3 of 7 lines' in note for note in run.notes)
    assert 'not finite' in dict(report_tables.summary([run]).rows)['Test accuracy, last']
    assert max(map(len, texts(run))) < 600
    assert '<svg' in report.render([run], images=0)


@pytest.mark.parametrize(
    'config',
    [
        {'total_steps': 10**300},
        {'batch': 10**300},
        {'batch': 'x'},
        {'pp': {'crop': 10**12}},
        {'pp': []},
        {'model': {'patches': {'size': [4, 4]}, 'hidden_size': 8, 'transformer':
                   {'mlp_dim': 1, 'num_heads': 1, 'num_layers': 10**9}}},
        {'model': {'patches': {'size': [16, 16]}, 'resnet': {'num_layers': [10**9] * 4}}},
        {'model': {'patches': {'size': [4, 0]}}},
        {'model': []},
        {'x' * 100_000: 'y' * 100_000},
    ],
)  # fmt: skip
def test_settings_are_bounded(workdir, config):
    (workdir / 'config.json').write_text(json.dumps(CONFIG | config))
    run = run_files.read(workdir)
    assert max(map(len, texts(run))) < 600
    assert run.total_steps is None or run.total_steps < 10**12


def test_events_are_bounded(workdir):
    def event(name, **facts):
        return {'time': TIME, 'event': name, 'text': 'x'} | facts

    write_lines(
        workdir / 'events.jsonl',
        [
            event('started', dtype='x' * 10_000, devices=10**300, kind='k'),
            event('started', dtype='x' * 10_000, devices=2, kind='\x1b[2Jk' * 1000),
            *[event('resumed', step=step) for step in (',', None, True, -1, 10**300, 7)],
            *[event('resumed', step=step) for step in range(2000)],
            event('compiled', total=10**300, parameters=True),
            event('unreadable', image=['x']),
            event('x', time='2026-01-02 10:00:00+00:00', text='a\x1b[2J\u202e'),
        ],
    )
    run = run_files.read(workdir)
    assert run.resumes()[0] == 7 and len(run.resumes()) == 2001
    assert run.wall_seconds() is None  # one time with a zone, one without
    assert max(map(len, texts(run))) < 600
    page = report.render([run], images=0)
    assert r'a\x1b[2J\u202e' in page and '\x1b' not in page and '\u202e' not in page


@pytest.mark.parametrize('name', ['metrics', 'timing', 'events', 'config', 'data', 'versions'])
@pytest.mark.parametrize('kind', ['pipe', 'device', 'folder', 'nowhere', 'deep'])
def test_what_is_no_file_costs_its_part_only(workdir, name, kind):
    path = workdir / (f'{name}.json' if name in ('config', 'data', 'versions') else f'{name}.jsonl')
    path.unlink()
    {
        'pipe': lambda: os.mkfifo(path),
        'device': lambda: path.symlink_to('/dev/zero'),
        'folder': path.mkdir,
        'nowhere': lambda: path.symlink_to(path),
        'deep': lambda: path.write_text('{"a":' + '[' * 100_000),
    }[kind]()
    run = run_files.read(workdir)
    assert any(name in note for note in run.notes)
    assert max(map(len, texts(run))) < 600


@pytest.mark.parametrize('name', ['metrics.jsonl', 'events.jsonl', 'train.log'])
def test_going_on_with_a_pipe_is_one_line(workdir, name):
    (workdir / name).unlink(missing_ok=True)
    os.mkfifo(workdir / name)
    with (
        telemetry.Telemetry(workdir, total_steps=2) as log,
        pytest.raises(UserError, match=f'{name}.* is not a regular file'),
    ):
        log.start(1)


def test_lines_are_bounded(workdir, monkeypatch):
    monkeypatch.setattr(telemetry, 'MAX_LINES_BYTES', 100)
    write_lines(workdir / 'metrics.jsonl', METRICS * 10)
    assert any('it has more than 100 bytes' in note for note in run_files.read(workdir).notes)


@pytest.mark.parametrize(
    'pp', [None, [], {'channels': 'x'}, {'channels': 10**9}, {'channels': True}]
)
def test_settings_of_the_images_are_not_trusted(workdir, pp):
    """A run of an older version has no channels; one of none has no settings."""
    config = {key: value for key, value in CONFIG.items() if key != 'pp'} | {'dataset': 'digits'}
    (workdir / 'config.json').write_text(json.dumps(config if pp is None else config | {'pp': pp}))
    split = {'split': 'train', 'examples': 1, 'fingerprint': 'x'}
    (workdir / 'data.json').write_text(json.dumps(DATA | {'train': split, 'test': split}))
    with pytest.raises(UserError, match='another than when' if pp is None else 'is damaged'):
        report_data.open_data(run_files.read(workdir))
