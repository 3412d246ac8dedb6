"""Sweeps: what is tried, chosen and tested, with runs that are made up, and once with true ones."""

import json
import pathlib
import signal

import pytest

from vit_jax.analysis import sweep_report
from vit_jax.errors import UserError
from vit_jax.run import child, preemption, sweep, sweep_plan

WORDS = ('--config', 'digits')
LR = 'config.base_lr'


def accuracy(settings: dict[str, str], share: float) -> float:
    """Of a made-up run, after a share of its steps: best at a learning rate of 0.01."""
    return share * (0.9 - abs(float(settings[f'--{LR}']) - 0.01))


class Process:
    """A run that is made up: with each look at it, it gets on by a tenth."""

    runs: list[dict[str, str]] = []
    stop_at = None  # (which run, tenth): the sweep is told to stop

    def __init__(self, arguments, stdout, **options):
        assert arguments[:4] == ['-m', 'vit_jax.main', *WORDS] and options['start_new_session']
        words = [word for word in arguments[4:] if '=' in word]
        self.settings = dict(word.split('=', 1) for word in words)
        self.workdir = pathlib.Path(arguments[arguments.index('--workdir') + 1])
        self.stdout, self.returncode = stdout, None
        self.runs.append(self.settings | {'workdir': self.workdir.name})
        self.final = '--config.seed' in self.settings
        self.workdir.mkdir(parents=True, exist_ok=True)
        (self.workdir / 'model').mkdir(exist_ok=True)
        self.tenth = len(self.lines())
        if self.tenth == 10:  # is finished
            self.returncode = 0
        data = {'train': {'split': 'train without 10%'}, 'test': {'split': 'test'},
                'val': {'split': '10% of train', 'examples': 500}}  # fmt: skip
        (self.workdir / 'data.json').write_text(json.dumps(data))
        (self.workdir / 'config.json').write_text(json.dumps({'total_steps': 50}))

    def lines(self):
        file = self.workdir / 'metrics.jsonl'
        return file.read_text().splitlines() if file.exists() else []

    def poll(self):
        if self.returncode is not None:
            return self.returncode
        if float(self.settings[f'--{LR}']) > 1:
            self.stdout.write(b'step 1\nerror: the loss is nan\n')
            self.returncode = 1
            return 1
        if self.stop_at == (len(self.runs), self.tenth):
            type(self).stop_at = None
            signal.raise_signal(signal.SIGTERM)
            return None
        self.tenth += 1
        split = 'test' if self.final else 'val'
        row = {
            'step': 5 * self.tenth,
            f'accuracy_{split}': accuracy(self.settings, self.tenth / 10),
        }
        with open(self.workdir / 'metrics.jsonl', 'a') as file:
            file.write(json.dumps(row | {f'loss_{split}': 1.0}) + '\n')
        self.returncode = 0 if self.tenth == 10 else None
        return None

    def terminate(self):
        self.returncode = 143

    def wait(self):
        return self.returncode


@pytest.fixture(autouse=True)
def made_up(monkeypatch, request):
    if 'command' in request.fixturenames:
        return
    monkeypatch.setattr(child, 'start', Process)
    monkeypatch.setattr(sweep, '_POLL_SECONDS', 0)
    monkeypatch.setattr(Process, 'runs', [])


def plan(*grid, **options):
    return sweep_plan.Plan(WORDS, dict(map(sweep_plan.parse_grid, grid)), **options)


def test_a_grid_is_tried_and_the_best_is_tested_once_for_each_seed(tmp_path):
    """One trial fails, which ends nothing; no trial predicts test images."""
    said: list[str] = []
    tried = plan(f'{LR}=0.003,5,0.01,0.1', 'config.mixup=0.0,0.2')
    result = sweep.run(tried, tmp_path, said.append)
    trials, final = Process.runs[:8], Process.runs[8:]
    assert [(run[f'--{LR}'], run['--config.mixup']) for run in trials] == [
        (lr, mix) for lr in ('0.003', '5', '0.01', '0.1') for mix in ('0.0', '0.2')
    ]
    for run in trials:
        assert run['--config.test_at_end'] == run['--config.report'] == 'False'
        assert not (tmp_path / 'trials' / run['workdir'] / 'model').exists()
    assert result['settings'] == {LR: '0.01', 'config.mixup': '0.0'} and result['trial'] == 4
    assert [run['--config.seed'] for run in final] == ['0', '1', '2']
    for run in final:  # on training and validation images
        assert run['--config.pp.train'] == 'train' and run['--config.pp.val'] == ''
        assert run['--config.eval_every'] == '1000000000' and '--config.report' not in run
    assert [seed['accuracy_test'] for seed in result['seeds']] == [0.9] * 3
    assert json.loads((tmp_path / 'result.json').read_text()) == result
    assert sum('FAILED: the loss is nan' in line for line in said) == 2

    page = sweep_report.write(tmp_path).read_text()
    for text in ('base_lr', 'mixup', '90.00 %', 'the loss is nan', '0.9000 ± 0.0000', '</svg>'):
        assert text in page
    # Again: nothing is left to do but the last runs, which find that they are finished.
    assert sweep.run(tried, tmp_path, said.append) == result and len(Process.runs) == 14


def test_a_sweep_that_was_stopped_goes_on_with_the_trial_under_way(tmp_path, monkeypatch):
    whole = tmp_path / 'whole'
    options = {'ranges': dict([sweep_plan.parse_range(f'{LR}=0.001:0.1:log')]), 'trials': 6}
    sweep.run(plan(**options), whole, print)
    expected = [run[f'--{LR}'] for run in Process.runs]
    assert len(set(expected[:6])) == 6 and len(expected) == 9
    assert all(0.001 <= float(lr) <= 0.1 for lr in expected)

    monkeypatch.setattr(Process, 'runs', [])
    monkeypatch.setattr(Process, 'stop_at', (3, 4))
    with pytest.raises(preemption.PreemptedError, match='the same command goes on'):
        sweep.run(plan(**options), tmp_path / 'parts', print)
    sweep.run(plan(**options), tmp_path / 'parts', print)
    found = [run[f'--{LR}'] for run in Process.runs]
    assert found == expected[:3] + expected[2:]
    third = (tmp_path / 'parts/trials/2/metrics.jsonl').read_text()
    assert third == (whole / 'trials/2/metrics.jsonl').read_text()

    # More trials may be asked for; other settings are another sweep.
    monkeypatch.setattr(Process, 'runs', [])
    sweep.run(plan(**options | {'trials': 7}), tmp_path / 'parts', print)
    assert Process.runs[0]['workdir'] == '6'
    for other in (plan(f'{LR}=0.1'), plan(**options, retrain=False)):
        with pytest.raises(UserError, match='holds another sweep'):
            sweep.run(other, tmp_path / 'parts', print)


@pytest.mark.parametrize('prune', [True, False])
def test_trials_below_the_median_end_early(tmp_path, prune):
    values = f'{LR}=0.01,0.011,0.012,0.013,0.5,0.009'
    said: list[str] = []
    sweep.run(plan(values, seeds=0, prune=prune), tmp_path, said.append)
    lines = [(tmp_path / f'trials/{i}/metrics.jsonl').read_text().count('\n') for i in range(6)]
    assert lines == [10, 10, 10, 10, 2 if prune else 10, 10]
    assert any('below the median' in line for line in said) == prune
    assert len(Process.runs) == 6


def test_final_runs_that_keep_the_validation_images(tmp_path):
    sweep.run(plan(f'{LR}=0.01', seeds=1, retrain=False), tmp_path, print)
    assert Process.runs[-1]['--config.pp.train'] == 'train'
    assert Process.runs[-1]['--config.pp.val'] == '10%'


def test_no_trial_that_succeeds(tmp_path):
    with pytest.raises(UserError, match='not one trial succeeded; the last one: the loss is nan'):
        sweep.run(plan(f'{LR}=5,6'), tmp_path, print)


@pytest.mark.parametrize(
    ('grid', 'options', 'words'),
    [
        ([], {}, 'nothing to try'),
        (['base_lr=1,2'], {}, 'write config.base_lr'),
        (['config.seed=1,2'], {}, 'cannot be swept'),
        (['config.pp.test=a,b'], {}, 'cannot be swept'),
        ([f'{LR}=0.1,0.1'], {}, 'there twice'),
        ([f'{LR}=0.1,'], {}, 'is missing'),
        ([f'{LR}'], {}, 'write --grid'),
        ([], {'ranges': {LR: sweep_plan.Range(0, 1)}}, 'say how often'),
        ([f'{LR}=1'], {'ranges': {LR: sweep_plan.Range(0, 1)}, 'trials': 3}, 'of one knob'),
        ([f'{LR}=1'], {'words': ('--config.base_lr=2',)}, 'is set, and swept'),
        ([f'{LR}=1'], {'seeds': -1}, 'from 0 on'),
    ],
)
def test_plans_without_sense(grid, options, words):
    with pytest.raises(UserError, match=words):
        sweep_plan.Plan(
            **{'words': WORDS, 'grid': dict(map(sweep_plan.parse_grid, grid))} | options
        ).check()


@pytest.mark.parametrize(
    'text', ['x', f'{LR}=1', f'{LR}=2:1', f'{LR}=0:1:log', f'{LR}=1:2:lin', f'{LR}=a:b']
)
def test_ranges_that_cannot_be_read(text):
    with pytest.raises(UserError, match='write the lowest and the highest'):
        sweep_plan.parse_range(text)
    assert sweep_plan.parse_range('config.batch=8:64') == (
        'config.batch',
        sweep_plan.Range(8, 64, whole=True),
    )


def test_a_true_sweep(command, tmp_path):
    """Two trials, of which one fails, and the best with one seed; mistakes come first."""
    words = ['--config=digits', '--config.total_steps=4', '--config.warmup_steps=1',
             '--config.batch=16', '--config.batch_eval=200', '--config.eval_every=2',
             '--config.model.hidden_size=16', '--config.model.transformer.num_layers=1',
             '--config.model.transformer.num_heads=2', '--config.report=False',
             '--config.model.transformer.mlp_dim=32', '--seeds=1']  # fmt: skip
    for wrong, message in (
        (['--grid=config.bse_lr=1,2'], 'config.bse_lr: there is no such knob; did you mean'),
        (['--grid=config.base_lr=1,-2'], 'config.base_lr=-2.0 must be at least 0'),
        (['--grid=config.patience=1,2'], 'add --no-retrain'),
    ):
        found = command('scripts/sweep.py', *words, '--workdir', tmp_path / 'sweep', *wrong)
        assert found.returncode == 1 and message in found.stderr, found.stderr
        assert not (tmp_path / 'sweep').exists()
    found = command(
        'scripts/sweep.py', *words, '--workdir', tmp_path / 'sweep',
        '--grid=config.base_lr=0.01,1e30',
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert 'base_lr=1e30: FAILED: step ' in found.stdout, found.stdout
    result = json.loads((tmp_path / 'sweep/result.json').read_text())
    assert result['settings'] == {LR: '0.01'} and result['validation_images'] == 144
    trial = (tmp_path / 'sweep/trials/0/metrics.jsonl').read_text()
    assert 'accuracy_val' in trial and '_test' not in trial
    (seed,) = result['seeds']
    final = (tmp_path / 'sweep' / seed['workdir'] / 'metrics.jsonl').read_text().splitlines()
    assert [line for line in final if '_test' in line] == final[-1:]
    data = json.loads((tmp_path / 'sweep' / seed['workdir'] / 'data.json').read_text())
    assert data['train']['examples'] == 1438 and 'val' not in data
    assert (tmp_path / 'sweep' / seed['workdir'] / 'model/model.json').exists()
    assert '</html>' in (tmp_path / 'sweep/sweep.html').read_text()
