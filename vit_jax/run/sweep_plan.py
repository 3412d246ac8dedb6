"""What a sweep tries: knobs of the config, and their values."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vit_jax.errors import UserError

if TYPE_CHECKING:
    import optuna

# All trials are of one set of images, and of one seed.
_FIXED = (
    'dataset', 'tfds_data_dir', 'pp.train', 'pp.val', 'pp.test', 'fold', 'seed', 'report',
    'test_at_end',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `log`: evenly in the logarithm; `whole`: integers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep tries.

    Attributes:
      words: command line that all runs have: ('--config', 'b16', '--config.batch=64').
      grid: values by name of the knob.
      ranges: for Optuna's choice, beside the grid, of which it then takes any.
      trials: how many Optuna proposes; 0: each point of the grid once.
      seeds: how often the chosen settings are trained and tested, with seeds 0, 1, ...
      retrain: whether that is on training and validation images.
      prune: whether a trial ends early that is worse than the median of the others so far.
    """

    words: tuple[str, ...]
    grid: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, Range] = dataclasses.field(default_factory=dict)
    trials: int = 0
    seeds: int = 3
    retrain: bool = True
    prune: bool = True

    def check(self) -> None:
        """Refuses what makes no sense.

        Raises:
          UserError: says what.
        """
        knobs = [*self.grid, *self.ranges]
        if not knobs:
            raise UserError(
                'nothing to try: add --grid config.base_lr=0.003,0.01,0.03, or --trials 30 --range '
                'config.base_lr=0.001:0.1:log'
            )
        for knob in knobs:
            if not knob.startswith('config.'):
                raise UserError(f'{knob} is no knob: write config.{knob.removeprefix("--")}')
            if knob.removeprefix('config.') in _FIXED:
                raise UserError(
                    f'{knob} cannot be swept: trials are compared on the same images and with the '
                    'same seed (--seeds is for the end)'
                )
            if any(word.partition('=')[0] == f'--{knob}' for word in self.words):
                raise UserError(f'{knob} is set, and swept: leave out one of them')
        for knob, values in self.grid.items():
            if len(set(values)) < len(values) or '' in values:
                raise UserError(f'--grid {knob}: a value is missing, or there twice')
        if both := set(self.grid) & set(self.ranges):
            raise UserError(f'{", ".join(both)}: --grid and --range of one knob')
        if self.ranges and not self.trials:
            raise UserError('--range leaves the choice to Optuna: say how often, --trials 30')
        if self.trials < 0 or self.seeds < 0:
            raise UserError('--trials and --seeds are numbers from 0 on')

    def corners(self) -> Iterator[dict[str, str]]:
        """Every point of the grid, with the lowest and the highest of each range."""
        ends = {knob: (_text(r.low, r), _text(r.high, r)) for knob, r in self.ranges.items()}
        sides = {**self.grid, **ends}
        for values in itertools.product(*sides.values()):
            yield dict(zip(sides, values, strict=True))

    def settings_of(self, params: Mapping[str, object]) -> dict[str, str]:
        """The settings of a trial, as flags, from what Optuna keeps of it."""
        found = {knob: str(params[knob]) for knob in self.grid}
        for knob, r in self.ranges.items():
            found[knob] = _text(float(str(params[knob])), r)
        return found

    def suggest(self, trial: 'optuna.Trial') -> dict[str, str]:
        """The settings of a trial."""
        for knob, values in self.grid.items():
            trial.suggest_categorical(knob, values)
        for knob, r in self.ranges.items():
            if r.whole:
                trial.suggest_int(knob, int(r.low), int(r.high), log=r.log)
            else:
                trial.suggest_float(knob, r.low, r.high, log=r.log)
        return self.settings_of(trial.params)


def parse_grid(text: str) -> tuple[str, tuple[str, ...]]:
    """`config.base_lr=0.003,0.01` as name and values."""
    knob, equals, values = text.partition('=')
    if not equals:
        raise UserError(f'--grid {text}: write --grid config.base_lr=0.003,0.01,0.03')
    return knob, tuple(value.strip() for value in values.split(','))


def parse_range(text: str) -> tuple[str, Range]:
    """`config.base_lr=0.001:0.1:log` as name and range; integers where both ends are."""
    knob, _, ends = text.partition('=')
    low, _, rest = ends.partition(':')
    high, _, log = rest.partition(':')
    try:
        found = Range(float(low), float(high), log == 'log', not set(low + high) & set('.eE'))
    except ValueError:
        found = Range(math.nan, math.nan)
    positive = found.low > 0 or not found.log
    if not (-math.inf < found.low < found.high < math.inf and positive and log in ('', 'log')):
        raise UserError(
            f'--range {text}: write the lowest and the highest value, --range '
            'config.base_lr=0.001:0.1:log (log: evenly in the logarithm, above 0)'
        )
    return knob, found


def _text(value: float, r: Range) -> str:
    return str(int(value)) if r.whole else f'{value:.4g}'
