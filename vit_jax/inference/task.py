"""What labels are, and what the outputs of a model say of them: the one place where it stands.

    one class           indices of classes that exclude each other; probabilities are a softmax
    several classes     a yes or no for each class; each probability is a sigmoid
    numbers             one or several real numbers (regression); the outputs, in their units

Training, evaluation, prediction and export ask a `Task`, which a model folder keeps.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError

ONE, SEVERAL, NUMBERS = 'one class', 'several classes', 'numbers'


@dataclasses.dataclass(frozen=True)
class Task:
    """What the C outputs of a model are.

    Attributes:
      kind: 'one class', 'several classes' or 'numbers', see above.
      threshold: of several classes: the probability, in [0, 1], from which a class counts as there.
      chosen_on: of several classes: the examples that the threshold was chosen on; '' for none, the
        threshold is then 0.5.
      units: of numbers: C texts, '' for one without a unit; or () for no units at all.
      mean: of numbers: C values, or () for 0 each.
      deviation: of numbers: C values above 0, or () for 1 each. The model was trained on
        (number - mean) / deviation.

    Raises:
      UserError: values that cannot be.
    """

    kind: str = ONE
    threshold: float = 0.5
    chosen_on: str = ''
    units: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (ONE, SEVERAL, NUMBERS):
            raise UserError(f'task.kind is {str(self.kind)[:60]!r}')
        if not 0 <= self.threshold <= 1:
            raise UserError(f'task.threshold is {self.threshold}, expected 0 to 1')
        if not all(value > 0 for value in self.deviation):
            raise UserError('task.deviation has a value that is not above 0')

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> 'Task':
        """What `to_dict` gave.

        Raises:
          UserError: no such task.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if 'kind' not in found or not known >= found.keys():
            raise UserError(f'task has {", ".join(found) or "nothing"}, expected kind, ...')
        told: dict[str, Any] = {}
        for name, value in found.items():
            told[name] = tuple(value) if isinstance(value, list) else value
        return cls(**told)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without what does not belong to its kind."""
        names = {ONE: (), SEVERAL: ('threshold', 'chosen_on'), NUMBERS: _OF_NUMBERS}[self.kind]
        told = {name: getattr(self, name) for name in names}
        return {'kind': self.kind} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in told.items()
        }

    def check(self, outputs: int) -> None:
        """Checks that this can be said of so many outputs.

        Raises:
          UserError: units, means or deviations of another number.
        """
        for name in _OF_NUMBERS:
            if len(getattr(self, name)) not in (0, outputs):
                raise UserError(
                    f'task.{name} has {len(getattr(self, name))} values for {outputs} outputs'
                )

    def values(self, outputs: Any) -> np.ndarray:
        """What the outputs of a model say.

        Args:
          outputs: [..., C].

        Returns:
          float32 [..., C]: probabilities of the classes, or the numbers in their units; computed in
          float64.
        """
        x = np.asarray(outputs, np.float64)
        if self.kind == NUMBERS:
            mean, deviation = self.scale(x.shape[-1])
            x = x * deviation + mean
        elif self.kind == SEVERAL:
            x = 0.5 * (1 + np.tanh(0.5 * x))
        else:
            exp = np.exp(x - x.max(axis=-1, keepdims=True))
            x = exp / exp.sum(axis=-1, keepdims=True)
        return x.astype(np.float32)

    def text(self, value: float, output: int, *, percent: bool = False) -> str:
        """One of `values` for people: '0.8231', '82.3 %', or '1934.21 years'.

        Args:
          value: of an output.
          output: which one.
          percent: how a probability is written.
        """
        if self.kind == NUMBERS:
            return f'{value:.6g} {self.unit(output)}'.rstrip()
        return f'{100 * value:.1f}\N{NO-BREAK SPACE}%' if percent else f'{value:.4f}'

    def pick(self, outputs: Sequence[int]) -> 'Task':
        """The task of some of the outputs, in this order."""
        told: dict[str, Any] = {}
        for name in _OF_NUMBERS:
            values = getattr(self, name)
            told[name] = tuple(values[i] for i in outputs) if values else ()
        return dataclasses.replace(self, **told)

    def scale(self, outputs: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of numbers, float64 [C] each."""
        ones = np.ones(outputs)
        return np.array(self.mean or 0 * ones), np.array(self.deviation or ones)

    def unit(self, output: int) -> str:
        """The unit of an output, or ''."""
        return self.units[output] if self.units else ''

    @property
    def module_settings(self) -> dict[str, bool]:
        """The arguments of the modules of `vit_jax.models` that tell the kind."""
        told = {'multi_label': self.kind == SEVERAL, 'regression': self.kind == NUMBERS}
        return {name: value for name, value in told.items() if value}


_OF_NUMBERS = ('units', 'mean', 'deviation')
ONE_CLASS = Task()


def of_module(module: Any) -> Task:
    """What the settings of a module tell of its outputs."""
    if getattr(module, 'multi_label', False):
        return Task(SEVERAL)
    return Task(NUMBERS) if getattr(module, 'regression', False) else ONE_CLASS


def standardized(targets: np.ndarray, names: Sequence[str], units: Sequence[str] = ()) -> Task:
    """The task of numbers that are brought to mean 0 and deviation 1 for training.

    Args:
      targets: of the training examples, float [N] or [N, C].
      names: of the C numbers.
      units: of them, or ().

    Raises:
      UserError: a number that is the same for all examples.
    """
    targets = np.asarray(targets, np.float64).reshape(len(targets), -1)
    mean, deviation = targets.mean(axis=0), targets.std(axis=0)
    same = np.flatnonzero(targets.min(axis=0) == targets.max(axis=0))
    if same.size:
        raise UserError(
            f'{names[same[0]]} is {targets[0, same[0]]:g} for every training image, so that there '
            'is nothing to learn: leave it out, or use other examples'
        )
    return Task(
        NUMBERS, units=tuple(units), mean=tuple(mean.tolist()), deviation=tuple(deviation.tolist())
    )
