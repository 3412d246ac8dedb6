import io
import json
import math
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import ml_collections
import pytest
import rich.console

from vit_jax.errors import UserError
from vit_jax.run import run_info, telemetry

ROOT = pathlib.Path(__file__).parents[2]
PROGRESS = {
    'loss': 0.25,
    'accuracy': 0.9312,
    'lr': 0.003,
    'images_per_sec': 1234.4,
    'data_wait': 0.031,
    'eta_s': 252,
}


def console(terminal=False, width=200):
    return rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, force_interactive=terminal, width=width
    )


def start(workdir, start_step=0, **overrides):
    arguments = {'total_steps': 100, 'console': console(), **overrides}
    out = telemetry.Telemetry(workdir, **arguments)
    out.start(start_step)
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def tensorboard_without_tensorflow(monkeypatch):
    """TensorBoard reads with its own stub instead of TensorFlow, as where that is not installed."""
    name = 'tensorboard.compat.notf'
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


def scalars(workdir):
    """What TensorBoard's own reader shows: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing import plugin_event_multiplexer

    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRun(str(workdir), 'run')
    multiplexer.Reload()
    accumulator = multiplexer.GetAccumulator('run')
    return {
        tag: [(event.step, event.tensor_proto.float_val[0]) for event in accumulator.Tensors(tag)]
        for tag in accumulator.Tags()['tensors']
    }


def test_metrics_and_timing_go_to_their_files(tmp_path):
    with start(tmp_path / 'new' / 'run') as out:
        out.metrics(10, train_loss=1.5, lr=0.003)
        out.timing(10, img_sec_core_train=57.25)
        out.metrics(20, accuracy_test=1)
    run = tmp_path / 'new' / 'run'
    assert (run / 'metrics.jsonl').read_text() == (
        '{"step": 10, "train_loss": 1.5, "lr": 0.003}\n{"step": 20, "accuracy_test": 1}\n'
    )
    assert rows(run / 'timing.jsonl') == [{'step': 10, 'img_sec_core_train': 57.25}]


def test_lines_are_on_disk_before_the_run_ends(tmp_path):
    out = start(tmp_path)
    out.metrics(1, train_loss=2.0)
    out.timing(1, seconds=3.0)
    out.info('hello')
    assert rows(tmp_path / 'metrics.jsonl') == [{'step': 1, 'train_loss': 2.0}]
    assert rows(tmp_path / 'timing.jsonl') == [{'step': 1, 'seconds': 3.0}]
    assert 'hello' in (tmp_path / 'train.log').read_text()
    assert scalars(tmp_path) == {'train/loss': [(1, 2.0)], 'speed/seconds': [(1, 3.0)]}
    out.close()


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with start(tmp_path) as out:
        out.metrics(1, train_loss=math.nan, lr=math.inf)
    assert rows(tmp_path / 'metrics.jsonl') == [{'step': 1, 'train_loss': None, 'lr': None}]
    assert math.isnan(scalars(tmp_path)['train/loss'][0][1])


def test_resuming_equals_not_having_stopped(tmp_path):
    def log(out, steps):
        for step in steps:
            out.metrics(step, train_loss=1 / step, lr=step / 7)
            out.timing(step, seconds=step * 1.0)

    with start(tmp_path / 'straight') as out:
        log(out, range(1, 11))
    # Killed after step 7 was logged, resumed from the checkpoint of step 5.
    with start(tmp_path / 'resumed') as out:
        log(out, range(1, 8))
    with open(tmp_path / 'resumed' / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 8, "train_lo')
    with start(tmp_path / 'resumed', start_step=5) as out:
        log(out, range(6, 11))
    for name in ('metrics.jsonl', 'timing.jsonl'):
        straight = (tmp_path / 'straight' / name).read_bytes()
        assert (tmp_path / 'resumed' / name).read_bytes() == straight
    assert scalars(tmp_path / 'resumed') == scalars(tmp_path / 'straight')
    assert len(list((tmp_path / 'resumed').glob('events.out.tfevents.*'))) == 2
    assert not list(tmp_path.rglob('*.tmp'))


def test_starting_over_forgets_every_step(tmp_path):
    for loss in (3.0, 2.0):
        with start(tmp_path, start_step=0) as out:
            out.metrics(1, train_loss=loss)
    assert rows(tmp_path / 'metrics.jsonl') == [{'step': 1, 'train_loss': 2.0}]
    assert scalars(tmp_path) == {'train/loss': [(1, 2.0)]}


@pytest.mark.parametrize('damage', ['\x00\x00\n', '[1]\n', '{"loss": 1}\n', '{"step": null}\n'])
def test_damaged_lines_are_removed_and_counted(tmp_path, damage):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n' + damage + '{"step": 2}\n')
    shown = console()
    with start(tmp_path, start_step=9, console=shown) as out:
        out.metrics(10, lr=0.5)
    assert rows(tmp_path / 'metrics.jsonl') == [{'step': 1}, {'step': 2}, {'step': 10, 'lr': 0.5}]
    assert 'removed 1 lines that are not JSON' in shown.file.getvalue()


def test_a_start_that_fails_ends_in_its_own_error(tmp_path):
    (tmp_path / 'timing.jsonl').mkdir()
    with (
        pytest.raises(UserError, match='not a regular file'),
        telemetry.Telemetry(tmp_path, total_steps=30, console=console()) as log,
    ):
        log.start(10)


def test_other_processes_write_nothing(tmp_path):
    shown = console()
    with start(tmp_path / 'run', process_index=1, console=shown) as out:
        out.metrics(1, train_loss=1.0)
        out.timing(1, seconds=1.0)
        out.progress(1, **PROGRESS)
        out.info('hello')
    assert not (tmp_path / 'run').exists()
    assert shown.file.getvalue() == ''


def test_plain_progress_is_limited_in_time_but_first_and_last_step_show(tmp_path, monkeypatch):
    calls = {1: 1000.0, 2: 1009.9, 3: 1010.0, 4: 1011.0, 1200: 1012.0}
    clock = iter(calls.values())
    monkeypatch.setattr(telemetry.time, 'monotonic', lambda: next(clock))
    shown = console(width=40)  # narrower than a line: a file has no width
    with start(tmp_path, total_steps=1200, console=shown) as out:
        for step in calls:
            out.progress(step, **PROGRESS)
    lines = shown.file.getvalue().splitlines()
    assert lines[0] == (
        'step 1/1,200  loss 0.2500  accuracy 93.1 %  lr 0.003  1,234 images/s  data wait 3 %  '
        '4 min 12 s left'
    )
    assert [line.split('/')[0] for line in lines] == ['step 1', 'step 3', 'step 1,200']
    log = (tmp_path / 'train.log').read_text().splitlines()
    assert [re.sub(r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ', '', line) for line in log] == lines


def test_a_line_without_speed_is_always_shown_and_does_not_delay_the_next(tmp_path):
    shown = console()
    with start(tmp_path, total_steps=1200, console=shown) as out:
        out.progress(1, loss=0.25, accuracy=0.5, lr=0.0)
        out.progress(2, **PROGRESS)
        out.progress(3, **PROGRESS)
    first, second = shown.file.getvalue().splitlines()
    assert first == 'step 1/1,200  loss 0.2500  accuracy 50.0 %  lr 0'
    assert second.startswith('step 2/1,200') and 'images/s' in second


def test_nothing_is_written_before_the_start_and_nothing_is_lost(tmp_path):
    shown = console()
    out = telemetry.Telemetry(tmp_path / 'run', total_steps=9, console=shown)
    out.info('hello', 'started', devices=4)
    assert shown.file.getvalue() == 'hello\n' and not (tmp_path / 'run').exists()
    out.start(0)
    out.info('on', image='\udcff.png')
    out.close()
    log = (tmp_path / 'run/train.log').read_text().splitlines()
    assert [line.split('  ')[1] for line in log] == ['hello', 'on']
    first, second = rows(tmp_path / 'run/events.jsonl')
    assert first.pop('time') in log[0]
    assert first == {'event': 'started', 'text': 'hello', 'devices': 4}
    assert (second['event'], second['image']) == ('message', '\udcff.png')


def test_a_report_reads_what_a_run_wrote(tmp_path):
    from vit_jax.analysis import run_files

    with start(tmp_path) as out:
        out.info('model', 'started', dtype='bfloat16', devices=2, kind='H200', processes=1)
        out.note('cannot use a.png', 'unreadable', image='a.png')
        out.note('cannot use a.png, after resuming', 'unreadable', image='a.png')
        out.info('skipped', 'skipped', step=3)
        out.note('stopped', 'stopped', step=5, signal='SIGTERM')
    run = run_files.read(tmp_path)
    assert run.stopped and run.unreadable() == 1 and run.resumes() == []
    assert (run.device['dtype'], run.device['devices'], run.device['kind']) == (
        'bfloat16',
        2,
        'H200',
    )
    with start(tmp_path, start_step=5) as out:
        out.info('model', 'started', dtype='float32', devices=1, kind='cpu', processes=1)
        out.info('resumed', 'resumed', step=5)
        out.info('best', 'evaluated', step=7)
    run = run_files.read(tmp_path)
    assert not run.stopped and run.resumes() == [5] and run.device['kind'] == 'cpu'
    kinds = ['started', 'unreadable', 'unreadable', 'skipped', 'stopped', 'started', 'resumed',
             'evaluated']  # fmt: skip
    assert [event['event'] for event in run.events] == kinds


def test_terminal_has_one_live_line_and_messages_above_it(tmp_path):
    shown = console(terminal=True)
    with start(tmp_path, console=shown) as out:
        out.progress(1, **PROGRESS)
        out.info('[evaluation] at step 1: 93 %')
        out.progress(2, **PROGRESS)
    text = shown.file.getvalue()
    visible = re.sub(r'\x1b\[[?\d;]*[A-Za-z]', '', text)
    assert '\x1b[2K' in text, 'the line is not rewritten in place'
    assert '[evaluation] at step 1: 93 %' in visible, 'brackets are text, not markup'
    assert 'step 2/100' in visible and '1,234 images/s' in visible
    assert visible.rstrip().splitlines()[-1].lstrip('\r━ ').startswith('step 2/100')
    assert text.count('\x1b[?25l') == text.count('\x1b[?25h') == 1, 'cursor shown again'
    log = (tmp_path / 'train.log').read_text()
    assert '\x1b' not in log and '━' not in log and '[evaluation] at step 1: 93 %' in log


def test_narrow_terminal_shows_the_numbers_rather_than_the_bar(tmp_path):
    shown = console(terminal=True, width=80)
    with start(tmp_path, console=shown) as out:
        out.progress(1, **PROGRESS)
    text = shown.file.getvalue()
    assert '━' not in text and '4 min 12 s left' in text


def test_log_is_continued_on_resume(tmp_path):
    for text in ('first', 'second'):
        with start(tmp_path) as out:
            out.info(text)
    assert [line.split('  ')[1] for line in (tmp_path / 'train.log').read_text().splitlines()] == [
        'first',
        'second',
    ]


@pytest.mark.parametrize(
    'seconds, text',
    [
        (0, '0 s'),
        (59.4, '59 s'),
        (59.6, '1 min 00 s'),
        (252, '4 min 12 s'),
        (3599.6, '1 h 00 min'),
        (3900, '1 h 05 min'),
        (183600, '2 d 3 h'),
        (-1, '0 s'),
        (math.inf, '?'),
        (math.nan, '?'),
    ],
)
def test_format_duration(seconds, text):
    assert telemetry.format_duration(seconds) == text


@pytest.mark.parametrize(
    'rate, text',
    [(0.516, '0.52'), (9.81, '9.81'), (9.996, '10.0'), (57.25, '57.2'), (99.96, '100')]
    + [(1234.4, '1,234'), (123456.0, '123,456'), (math.inf, '?')],
)
def test_format_rate(rate, text):
    assert telemetry.format_rate(rate) == text


def test_write_run_info(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'orig_argv', ['/usr/bin/python3', '-m', 'vit_jax.main', '--x=a b'])
    config = ml_collections.ConfigDict({'lr': 0.1, 'pp': {'crop': 224}, 'patches': (16, 16)})
    config.copy_of_lr = config.get_ref('lr')
    run_info.write(tmp_path / 'run', config)
    assert json.loads((tmp_path / 'run' / 'config.json').read_text()) == {
        'copy_of_lr': 0.1,
        'lr': 0.1,
        'patches': [16, 16],
        'pp': {'crop': 224},
    }
    versions = json.loads((tmp_path / 'run' / 'versions.json').read_text())
    import flax
    import jax

    assert versions['python'] == '.'.join(map(str, sys.version_info[:3]))
    assert versions['packages']['jax'] == jax.__version__
    assert versions['packages']['flax'] == flax.__version__
    assert {'vit_jax', 'jaxlib', 'optax', 'orbax-checkpoint', 'grain'} <= set(versions['packages'])
    assert versions['command'].endswith("-m vit_jax.main '--x=a b'")
    assert versions['git_revision'] is None or re.fullmatch(
        r'[0-9a-f]{40}(-dirty)?', versions['git_revision']
    )


def test_the_listed_packages_are_those_of_the_project():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    named = [*project['dependencies'], *sum(project['optional-dependencies'].values(), [])]
    names = {re.match(r'[\w-]+', requirement)[0] for requirement in named}
    assert names - {'vit_jax'} <= set(run_info._PACKAGES)


def test_a_checkout_that_is_not_installed_knows_its_version(tmp_path):
    """As after `pip install -r requirements-cpu.txt`: packages are installed, vit_jax is not."""
    program = f"""
import importlib.metadata, json, sys
found = importlib.metadata.Distribution.discover
def without(**kwargs):
    return iter([d for d in found(**kwargs) if d.name not in ('vit_jax', 'vit-jax')])
importlib.metadata.Distribution.discover = without
try:
    importlib.metadata.version('vit_jax')
except importlib.metadata.PackageNotFoundError:
    pass
else:
    sys.exit('it is known')
import vit_jax
from vit_jax.run import run_info
run_info.write({str(tmp_path)!r}, {{}})
versions = json.load(open({str(tmp_path / 'versions.json')!r}))['packages']
assert versions['vit_jax'] == vit_jax.__version__ and 'jax' in versions, versions
from vit_jax.analysis import report
from vit_jax.inference import model_folder
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_write_run_info_refuses_what_json_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match='not JSON serializable'):
        run_info.write(tmp_path, {'dtype': object()})


def test_git_revision_of_a_copy_outside_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / 'environment' / 'vit_jax'
    package.mkdir(parents=True)
    monkeypatch.setattr(run_info, '__file__', str(package / 'run' / 'run_info.py'))
    assert run_info._git_revision() is None
    # Installed into an environment inside some other project's checkout: not that one's commit.
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@example.org']
    subprocess.run([*git, 'init', '-q'], check=True)
    subprocess.run([*git, 'commit', '-q', '--allow-empty', '-m', 'x'], check=True)
    assert run_info._git_revision() is None


def test_imports_neither_tensorflow_nor_pytorch_even_where_installed(tmp_path):
    # Made-up packages of those names stand for installed ones, so that the test bites everywhere.
    for name in ('tensorflow', 'torch'):
        (tmp_path / 'site' / name).mkdir(parents=True)
        (tmp_path / 'site' / name / '__init__.py').write_text(
            'raise SystemExit("imported " + __name__)'
        )
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / 'site')!r})
from vit_jax.errors import UserError
from vit_jax.run import run_info, telemetry
with telemetry.Telemetry({str(tmp_path / 'run')!r}, total_steps=2, settings={{'lr': 1.0}}) as out:
    out.start(0)
    out.metrics(1, train_loss=1.0)
    out.timing(1, seconds=1.0)
    out.progress(1, loss=1, accuracy=1, lr=1, images_per_sec=1, data_wait=0, eta_s=1)
run_info.write({str(tmp_path / 'run')!r}, {{}})
loaded = {{'tensorflow', 'torch', 'jax'}} & set(sys.modules)
sys.exit(f'imported {{loaded}}' if loaded else 0)
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(pathlib.Path(tmp_path / 'run').glob('events.out.tfevents.*'))) == 1
