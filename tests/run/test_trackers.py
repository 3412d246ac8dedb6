"""Trackers: what TensorBoard, MLflow and others are told of a run, and if they fail."""

import sys
import types

import pytest

from vit_jax import config as config_lib
from vit_jax.configs import digits
from vit_jax.errors import UserError
from vit_jax.run import resume, telemetry, trackers

SETTINGS = {'base_lr': 0.01, 'optimizer': 'sgd', 'pp.flip': True}


def run(workdir, tracker, steps, start=0, **arguments):
    """A part of a run."""
    with telemetry.Telemetry(
        workdir, total_steps=9, tracker=tracker, settings=SETTINGS, **arguments
    ) as out:
        out.start(start)
        for step in steps:
            out.metrics(step, train_loss=1 / step, accuracy_val=step / 10)
            out.timing(step, img_sec_core_train=5.0)


@pytest.mark.parametrize(
    ('name', 'group', 'expected'),
    [
        ('train_loss', 'train', 'train/loss'),
        ('accuracy_train', 'train', 'train/accuracy'),
        ('accuracy_top5_test', 'train', 'test/accuracy_top5'),
        ('loss_val', 'train', 'val/loss'),
        ('lr', 'train', 'train/lr'),
        ('img_sec_core_train', 'speed', 'speed/img_sec_core_train'),
    ],
)
def test_groups(name, group, expected):
    assert trackers.tag(name, group) == expected


def test_tensorboard_has_the_hyperparameters(tmp_path):
    from tensorboard.backend.event_processing import plugin_event_multiplexer
    from tensorboard.plugins.hparams import metadata

    run(tmp_path, '', [1])
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRun(str(tmp_path), 'run')
    multiplexer.Reload()
    (found,) = multiplexer.PluginRunToTagToContent(metadata.PLUGIN_NAME)['run'].values()
    told = metadata.parse_session_start_info_plugin_data(found).hparams
    assert told['base_lr'].number_value == 0.01 and told['optimizer'].string_value == 'sgd'
    assert told['pp.flip'].bool_value


def test_the_settings_that_are_told_are_those_that_change_what_is_learned():
    told = resume.learned_from(config_lib.resolve(digits.get_config()))
    assert told['base_lr'] and told['dataset'] == 'digits' and told['model.patches.size']
    assert not told.keys() & {'report', 'eval_every', 'tracker', 'keep_best', 'data_threads'}
    assert all(isinstance(value, bool | int | float | str) for value in told.values())


class MadeUp(types.ModuleType):
    """In place of wandb: notes what it is told."""

    def __init__(self):
        super().__init__('wandb')
        self.began, self.rows, self.ended, self.id = [], [], [], 'abc'
        self.fail = None

    def init(self, **arguments):
        self.began.append(arguments)
        return self

    def log(self, values, step):
        if step == self.fail:
            raise OSError('no network')
        self.rows.append((step, values))

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    found = MadeUp()
    monkeypatch.setitem(sys.modules, 'wandb', found)
    return found


def test_a_run_that_is_resumed_is_one_run(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv('WANDB_PROJECT', raising=False)
    workdir = tmp_path / 'flowers'
    with (
        pytest.raises(KeyboardInterrupt),
        telemetry.Telemetry(workdir, total_steps=9, tracker='wandb', settings=SETTINGS) as out,
    ):
        out.start(0)
        out.metrics(1, train_loss=1.0)
        raise KeyboardInterrupt
    run(workdir, 'wandb', [2], start=1)
    first, second = wandb.began
    assert (first['id'], second['id'], first['name']) == (None, 'abc', 'flowers')
    assert first['config'] == SETTINGS and first['project'] == 'vit_jax'
    assert wandb.rows == [
        (1, {'train/loss': 1.0}),
        (2, {'train/loss': 0.5, 'val/accuracy': 0.2}),
        (2, {'speed/img_sec_core_train': 5.0}),
    ]
    assert wandb.ended == [1, 0]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, wandb, capsys):
    wandb.fail = 2
    run(tmp_path, 'wandb', [1, 2, 3])
    assert [step for step, _ in wandb.rows] == [1, 1] and wandb.ended == []
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3
    text = (tmp_path / 'train.log').read_text()
    assert text.count('WARNING: wandb failed and gets no more (OSError: no network)') == 1


def test_one_that_cannot_be_used_is_refused(tmp_path, wandb, monkeypatch):
    def init(**arguments):
        raise RuntimeError('not logged in')

    wandb.init = init
    with pytest.raises(UserError, match='cannot be used .RuntimeError: not logged in'):
        run(tmp_path, 'wandb', [1])
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(UserError, match='is not installed: pip install mlflow'):
        trackers.check('mlflow')


@pytest.mark.filterwarnings('ignore')  # of what it is made of
def test_mlflow(tmp_path, monkeypatch):
    """With its real package, where it is installed."""
    mlflow = pytest.importorskip('mlflow', reason='the package mlflow is not installed')
    monkeypatch.setenv('MLFLOW_EXPERIMENT_NAME', 'flowers')
    mlflow.set_tracking_uri(f'sqlite:///{tmp_path}/mlflow.db')
    workdir = tmp_path / 'run'
    run(workdir, 'mlflow', [1, 2])
    run(workdir, 'mlflow', [3], start=2)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name('flowers').experiment_id
    (found,) = client.search_runs([experiment])
    assert (found.info.status, found.info.run_name) == ('FINISHED', 'run')
    assert found.data.params == {name: str(value) for name, value in SETTINGS.items()}
    history = client.get_metric_history(found.info.run_id, 'val/accuracy')
    assert [(each.step, each.value) for each in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
