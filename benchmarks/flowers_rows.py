"""The runs behind the tables of `flowers`: what is tried, chosen and tested."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vit_jax import files
from vit_jax.errors import UserError
from vit_jax.run import resume, run_info, telemetry

# Of every run. The test images are predicted once, at its end; a report would do it again.
_WORDS = (
    '--config.accum_steps=1', '--config.batch_eval=64', '--config.eval_every=1000000',
    '--config.checkpoint_every=15', '--config.report=False',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a run, whose length and size come from its stage.

    Attributes:
      knobs: of the config.
      batch: images in a step.
      averaged: the second half of the run has a moving average, over a tenth of the steps.
      gentle: random crops of images of 8/7 of the size, in place of crops of any size.
    """

    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 64
    averaged: bool = False
    gentle: bool = False

    def with_knobs(self, **knobs: Any) -> 'Recipe':
        """The same, with other or further knobs."""
        return dataclasses.replace(self, knobs={**self.knobs, **knobs})

    def words(self, images: int, crop: int) -> list[str]:
        """The command line.

        Args:
          images: to go through the forward and the backward pass.
          crop: pixels.
        """
        steps = images // self.batch
        knobs = {
            'pp.crop': crop,
            'batch': self.batch,
            'total_steps': steps,
            'warmup_steps': steps // 10,
            **self.knobs,
        }
        if self.averaged:
            knobs |= {'ema_decay': 1 - 10 / steps, 'ema_warmup_steps': steps // 2}
        if self.gentle:
            knobs['pp.resize_small'] = crop * 8 // 7
        return [f'--config.{name}={value}' for name, value in knobs.items()]


def _rates(*rates: float, **knobs: Any) -> dict[str, Recipe]:
    """Recipes of AdamW that differ in the rate."""
    return {f'rate {r:g}': Recipe({'optimizer': 'adamw', 'base_lr': r, **knobs}) for r in rates}


PLAIN = Recipe()
_ADAMW = Recipe({'optimizer': 'adamw', 'base_lr': 0.001, 'layer_decay': 0.75}, averaged=True)
# Rows that are chosen among these on validation images.
CANDIDATES: dict[str, dict[str, Recipe]] = {
    'recipe': {
        'plain': PLAIN,
        'adamw': _ADAMW,
        'adamw, batch 32': dataclasses.replace(_ADAMW, batch=32),
        'adamw, gentle crops': dataclasses.replace(_ADAMW, gentle=True),
        'adamw, rate 0.0005': _ADAMW.with_knobs(base_lr=0.0005),
        'adamw, rate 0.002': _ADAMW.with_knobs(base_lr=0.002),
        'adamw, batch 32, gentle crops': dataclasses.replace(_ADAMW, batch=32, gentle=True),
    },
    'LoRA': _rates(0.001, 0.003, 0.01, lora_rank=8),
    'last:3': _rates(0.0003, 0.001, 0.003, train_only='last:3'),
    'bias': _rates(0.001, 0.003, 0.01, train_only='bias'),
    'head': _rates(0.003, 0.01, 0.03, train_only='head'),
}
# What trains less than all, and with how many seeds.
LESS = {'LoRA': 3, 'last:3': 1, 'bias': 1, 'head': 1}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Runs that can be compared.

    Attributes:
      name: in the records.
      images: of each run, through the forward and the backward pass.
      crop: pixels.
      words: what all its runs have.
    """

    name: str
    images: int
    crop: int
    words: tuple[str, ...] = ()


CHOICE = Stage('choice', 3_200, 112, ('--config.pp.val=40%', '--config.test_at_end=False'))
TEST = Stage('test', 9_600, 224)


class Start(NamedTuple):
    """Where all runs start from: first words of the command lines of training and of probing."""

    training: tuple[str, ...]
    probing: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of training, and one record."""

    stage: Stage
    name: str
    recipe: Recipe
    seed: int = 0

    def words(self) -> list[str]:
        """The command line, without config file, weights, data and workdir."""
        own = self.recipe.words(self.stage.images, self.stage.crop)
        return [*_WORDS, *self.stage.words, *own, f'--config.seed={self.seed}']

    def command(self, start: Start) -> list[str]:
        """The whole command line but for the workdir."""
        return ['-m', 'vit_jax.main', *start.training, *self.words()]

    def where(self, workdir: pathlib.Path) -> list[str]:
        """The rest of the command line."""
        return ['--workdir', str(workdir)]

    def measured(self, workdir: pathlib.Path) -> dict[str, Any]:
        """What the last evaluation gave, and numbers of images and parameters."""
        config = files.read_json(workdir / run_info.CONFIG_FILE)
        data = files.read_json(workdir / resume.DATA_FILE)
        found = telemetry.read_evaluation(workdir, config['total_steps'])
        split = 'test' if 'loss_test' in found else 'val'
        events = telemetry.read_lines(workdir / telemetry.EVENTS_FILE)
        return {
            'steps': config['total_steps'],
            f'accuracy_{split}': found[f'accuracy_{split}'],
            f'loss_{split}': found[f'loss_{split}'],
            'images': data[split]['examples'],
            'trainable_parameters': next(e['trained'] for _, e in events if 'trained' in e),
            'git_revision': files.read_json(workdir / run_info.VERSIONS_FILE)['git_revision'],
        }


@dataclasses.dataclass(frozen=True)
class Probes:
    """Classifiers on frozen features: all kinds in one command, and one record."""

    stage: Stage = TEST
    name: str = 'probes'
    seed: int = 0

    def words(self) -> list[str]:
        """The command line, without model, data and file for the metrics."""
        return ['--shots', '1', '5', '10', '25', '--seeds', '3']

    def command(self, start: Start) -> list[str]:
        """The whole command line but for the file of the metrics."""
        return ['-m', 'vit_jax', 'probe', *start.probing, *self.words()]

    def where(self, workdir: pathlib.Path) -> list[str]:
        """The rest of the command line."""
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / 'metrics.json').unlink(missing_ok=True)  # of a record that was not written
        return ['--metrics', str(workdir / 'metrics.json'), '--features', str(workdir / 'features')]

    def measured(self, workdir: pathlib.Path) -> dict[str, Any]:
        """What the probes gave."""
        found = files.read_json(workdir / 'metrics.json')
        parameters = (found['features'] + 1) * found['classes']
        kept = {
            name: found[name]
            for name in ('images', 'train_images', 'probes', 'few_shot', 'folds')
            if name in found
        }
        return kept | {'trainable_parameters': parameters}


@dataclasses.dataclass(frozen=True)
class Folds(Probes):
    """The same on each tenth of all images, by what was fitted to the rest."""

    name: str = 'probes, 10 folds'

    def words(self) -> list[str]:
        """See `Probes`."""
        return ['--train', 'train', '--folds', '10']


def choice(row: str) -> Iterator[Run]:
    """The runs on validation images among which a row is chosen."""
    for name, recipe in CANDIDATES[row].items():
        yield Run(CHOICE, name if row == 'recipe' else f'{row}, {name}', recipe)


def chosen(records: Sequence[Mapping[str, Any]], row: str) -> Run:
    """The best run of those that a row is chosen among, see `best`."""
    return best(records, list(choice(row)), row)


def best(records: Sequence[Mapping[str, Any]], runs: Sequence[Run], what: str) -> Run:
    """The run of the best validation accuracy; of equal ones that of the least loss.

    Args:
      records: what is known.
      runs: to choose among.
      what: is chosen, for the error.

    Raises:
      UserError: a candidate is missing.
    """
    found = {known['name']: known for known in records if known['stage'] == CHOICE.name}
    if missing := [run.name for run in runs if run.name not in found]:
        raise UserError(f'{what} is not chosen yet; to be tried: {", ".join(missing)}')
    return max(
        runs, key=lambda run: (found[run.name]['accuracy_val'], -found[run.name]['loss_val'])
    )


def tested(records: Sequence[Mapping[str, Any]], row: str, seeds: int) -> Iterator[Run]:
    """The runs of a row that are tested; of the recipe in turns with the plain one."""
    recipe = chosen(records, row).recipe
    for seed in range(seeds):
        yield Run(TEST, row, recipe, seed)
        if row == 'recipe':
            yield Run(TEST, 'plain', PLAIN, seed)
