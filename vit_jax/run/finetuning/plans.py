"""What `vit_jax finetune` trains: a plan, which a file holds, and the commands it stands for."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import pprint
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from vit_jax import config as config_lib
from vit_jax import files
from vit_jax.errors import UserError
from vit_jax.inference import features, model_folder
from vit_jax.run import product
from vit_jax.run.finetuning.look import MAX_UNREADABLE, Parts

FORMAT, VERSION = 'vit_jax finetune plan', 1
CONFIG_FILE = 'config.py'
RUNS, PROBE, BETWEEN = 'runs', 'probe', 'between'
BATCH = 32  # of features and tests
_PIXELS = ('crop', 'channels', 'eval', 'resize', 'interpolation', 'antialias')
_NAME = re.compile(r'[a-z0-9][a-z0-9_.-]{0,60}')
_KNOB = re.compile(r'[a-z_]+(\.[a-z_]+)?')
NEVER = 10**9  # as eval_every: at the end only


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of training.

    Attributes:
      name: its folder.
      what: is trained, for people.
      settings: knobs by name, beside those of `config.py`: numbers, texts, or yes or no.
      ended: the step after which the clock ended it; 0 for after the last.
    """

    name: str
    what: str
    settings: Mapping[str, Any]
    ended: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is decided, so that the same comes out whatever the clock says.

    Attributes:
      dataset: as the user spelt it.
      data: further arguments of `sources.open_dataset`.
      train: split to train on, before the validation images are held out of it.
      val: those: a share, or a split.
      test: split to test on.
      weights: to start from.
      fingerprint: of these weights.
      pixels: knobs of `config.pp` that say what the model sees, as JSON has them.
      seed: of everything that is drawn.
      settings: knobs that all runs have, beside those of data and model.
      runs: in order; the last one is the long one.
    """

    dataset: str
    data: Mapping[str, Any]
    train: str
    val: str
    test: str
    weights: str
    fingerprint: str
    pixels: Mapping[str, Any]
    seed: int
    settings: Mapping[str, Any]
    runs: tuple[Run, ...] = ()

    def write(self, path: pathlib.Path) -> None:
        """Writes the plan to a file."""
        told = {'format': FORMAT, 'version': VERSION, **dataclasses.asdict(self)}
        files.write_json(path, told)

    def with_run(self, run: Run) -> 'Plan':
        """The plan with a run more, or with another one of its name."""
        if run.name in [each.name for each in self.runs]:
            runs = tuple(run if each.name == run.name else each for each in self.runs)
        else:
            runs = (*self.runs, run)
        return dataclasses.replace(self, runs=runs)


def read(path: pathlib.Path) -> Plan:
    """Reads a plan.

    Raises:
      UserError: the file is missing, damaged, or no plan.
    """
    told = files.read_json(path)
    if told.pop('format', None) != FORMAT:
        raise UserError(f'{path} is no plan of vit_jax finetune')
    if told.pop('version', None) != VERSION:
        raise UserError(f'{path} is a plan of another version of vit_jax: plan anew')
    try:
        runs = tuple(Run(**run) for run in told.pop('runs'))
        plan = Plan(**told, runs=runs)
        _check(plan)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f'{path} is damaged ({str(error)[:200]}): plan anew') from error
    return plan


def _check(plan: Plan) -> None:
    for name in ('dataset', 'train', 'val', 'test', 'weights', 'fingerprint'):
        if not isinstance(getattr(plan, name), str):
            raise ValueError(f'{name} is a text')
    if type(plan.seed) is not int or plan.seed < 0:
        raise ValueError('seed is a number from 0 on')
    for name, value in plan.pixels.items():
        sides = isinstance(value, list) and all(type(side) is int for side in value)
        if name not in _PIXELS or not (sides or isinstance(value, bool | int | str)):
            raise ValueError(f'pixels.{name} is not known')
    for name, value in plan.data.items():
        if name not in ('tfds_data_dir', 'columns', 'image_root', 'group') or not isinstance(
            value, str
        ):
            raise ValueError(f'data.{name} is not known')
    names = [run.name for run in plan.runs]
    if len(set(names)) < len(names):
        raise ValueError('two runs have one name')
    for run in plan.runs:
        if not _NAME.fullmatch(run.name) or not isinstance(run.what, str):
            raise ValueError(f'{run.name!r} is no name of a run')
        if type(run.settings.get('total_steps')) is not int or type(run.ended) is not int:
            raise ValueError(f'the steps of {run.name} are missing')
        if run.ended < 0 or run.settings['total_steps'] < 1:
            raise ValueError(f'the steps of {run.name} are from 1 on')
    for settings in (plan.settings, *(run.settings for run in plan.runs)):
        for knob, value in settings.items():
            plain = isinstance(value, bool | int | str) or (
                isinstance(value, float) and math.isfinite(value)
            )
            if not _KNOB.fullmatch(knob) or not plain:
                raise ValueError(f'{knob} is no knob with a plain value')


def write_config(folder: pathlib.Path, plan: Plan, architecture: Mapping[str, Any]) -> None:
    """Writes the config file of all runs.

    Args:
      folder: to write `config.py` to.
      plan: of the runs.
      architecture: of the model, see `model_folder.Model.model_config`.
    """
    knobs: dict[str, Any] = {'dataset': plan.dataset}
    knobs |= {name: value for name, value in plan.data.items() if value}
    knobs |= {'pp.train': plan.train, 'pp.val': plan.val, 'pp.test': plan.test}
    for name, value in plan.pixels.items():
        knobs[f'pp.{name}'] = tuple(value) if isinstance(value, list) else value
    knobs |= {'pretrained': str(folder / 'probe'), 'keep_head': True, 'seed': plan.seed}
    knobs |= plan.settings
    lines = [f'    config.{name} = {value!r}' for name, value in knobs.items()]
    model = pprint.pformat(dict(architecture), width=90, sort_dicts=False).replace(
        '\n', '\n        '
    )
    text = f'''"""What all runs of a `vit_jax finetune` have in common, which wrote this file."""

import ml_collections

from vit_jax.configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model = ml_collections.ConfigDict(
        {model}
    )
{chr(10).join(lines)}
    return config
'''
    files.write_text(folder / CONFIG_FILE, text)


def command(folder: pathlib.Path, run: Run) -> str:
    """The command line of training that does what a run does."""
    words = ['python', '-m', 'vit_jax.main', '--config', str(folder / CONFIG_FILE)]
    words += [f'--config.{knob}={value}' for knob, value in run.settings.items()]
    return shlex.join([*words, '--workdir', str(folder / RUNS / run.name)])


def between_command(folder: pathlib.Path, between: Mapping[str, Any]) -> str:
    """The command line that makes the model between the probe and a run.

    Args:
      folder: of all.
      between: `run`, a name, and `share`, of it.
    """
    tuned = folder / RUNS / between['run'] / product.MODEL_FOLDER
    words = ['vit_jax', 'soup', str(tuned), '--start', str(folder / PROBE)]
    return shlex.join([*words, '--share', f'{between["share"]:g}', '--output', BETWEEN])


def probe_command(plan: Plan) -> str:
    """The command line that compares the same probes."""
    words = ['vit_jax', 'probe', '--model', plan.weights, '--dataset', plan.dataset]
    for name, value in plan.data.items():
        words += [f'--{name}', value]
    inside = f'{plan.train} without {plan.val}'
    return shlex.join([*words, '--train', inside, '--test', plan.test])


def new_plan(
    parts: Parts,
    dataset: str,
    data: Mapping[str, Any],
    weights: str,
    model: model_folder.Model,
    seed: int,
) -> Plan:
    """A plan without runs.

    Args:
      parts: the images.
      dataset: as the user spelt it.
      data: further arguments of `sources.open_dataset`.
      weights: to start from.
      model: what they are.
      seed: of everything that is drawn.
    """
    devices, cpu = jax.device_count(), jax.default_backend() == 'cpu'
    batch = 32 if cpu else 128
    while batch > max(4, len(parts.train) // 2):
        batch //= 2
    batch = max(1, batch // devices) * devices
    settings = {
        'batch': batch,
        'batch_eval': max(1, BATCH // devices) * devices,
        'accum_steps': 1,
        'optimizer': 'adamw',
        'weight_decay': 0.05,
        'pp.exact': False,
        'progress_every': 5,
        'eval_every': NEVER,
        'checkpoint_every': 25 if cpu else 100,
        'max_unreadable': MAX_UNREADABLE,
        'test_at_end': False,
        'report': False,
    }
    if isinstance(model.image_size, int):  # gentle crops, see docs/recipes.md
        settings['pp.resize_small'] = round(model.image_size * 8 / 7)
    fingerprint = features.fingerprint(model)
    return Plan(
        dataset, dict(data), *parts.specs, weights, fingerprint, pixels_of(model), seed, settings
    )


def read_config(path: pathlib.Path, settings: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The resolved config of a run, as its command line gives it.

    Args:
      path: of the config file.
      settings: values of knobs, as flags.
    """
    spec = importlib.util.spec_from_file_location('vit_jax_finetune_config', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    try:
        config.update_from_flattened_dict(dict(settings))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'the plan has a knob that does not fit: {error}') from error
    return config_lib.resolve(config, settings)


def pixels_of(model: model_folder.Model) -> dict[str, Any]:
    """Knobs of `config.pp` with which training evaluates as the model does."""
    ours = model.preprocess
    told = {'crop': ours.crop, 'channels': model.channels, 'eval': ours.eval}
    told |= {'interpolation': ours.interpolation, 'antialias': ours.antialias}
    told |= {'resize': ours.resize} if ours.resize else {}
    return json.loads(json.dumps(told))
