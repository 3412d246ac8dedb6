"""What has to be known of a model beside its weights, and whether it can be true.

A model folder says it in model.json (`to_json`), an ONNX file in its metadata. Both come from
elsewhere, so both are read by `read`, into a dataclass whose annotations say what each field may
be. A new field is one line: its name, its type, its limits.
"""

import dataclasses
import importlib.metadata
import os
import platform
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import ml_collections

import vit_jax
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError, printable
from vit_jax.inference.task import ONE_CLASS, Task
from vit_jax.variants import sides

FORMAT = 'vit_jax model'
FORMAT_VERSION = 1

# No part of an architecture: how it is computed, which is left to whoever loads it, and how a head
# begins.
_EXECUTION_KEYS = ('dtype', 'attention', 'remat', 'scan_layers', 'scan_from', 'head_bias_init')

# Larger than any real model: a description must not choose how long building or reading takes.
MAX_IMAGE_SIZE = 8192
MAX_CLASSES = 1_000_000
_MAX_NUMBER = 10_000_000
_MAX_FLOAT = 1e30
_MAX_TEXT = 1000  # characters
_MAX_LAYERS = 1000
_MAX_STAGES = 100

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Between:
    """Limits of a number, both included: `Annotated[int, Between(1, 8192)]`."""

    low: float
    high: float


Side = Annotated[int, Between(1, MAX_IMAGE_SIZE)]


@dataclasses.dataclass(frozen=True)
class Description:
    """The part that model folders and ONNX files have in common.

    Attributes:
        class_names: in label order; () without a head.
        image_size: side of the input, or (height, width), pixels.
        preprocessing: from decoded images to pixels.
        value_range: what black and white are in the input of the graph.
        source: where the model came from; any JSON.
        task: what the outputs are; None where that is not told here.

    Raises:
        UserError: the fields contradict each other.
    """

    class_names: tuple[str, ...]
    image_size: Side | tuple[Side, Side]
    preprocessing: Preprocess
    value_range: tuple[float, float]
    source: dict[str, Any]
    task: Task | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        crop = self.preprocessing.crop
        if sides(self.image_size) != self.preprocessing.size:
            raise UserError(f'image_size {self.image_size}, crop {crop} do not agree')
        if len(self.class_names) > MAX_CLASSES:
            raise UserError(f'{len(self.class_names):,} class_names; at most {MAX_CLASSES:,} fit')
        low, high = self.value_range
        if low >= high:
            raise UserError(f'value_range {low:g}, {high:g} is not from black to white')
        if self.task:
            self.task.check(len(self.class_names))


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What the `source` of a model that was trained here tells of its data; '' where it does not.

    Attributes:
        dataset: as the run's config named it.
        train: specification of the split that was trained on.
        test: of the one that was tested on.
        train_fingerprint: of the former, see `dataset.Selection.fingerprint`.
        val: specification of the split that something was chosen on.
        columns: of a table, see `sources.open_dataset`.
        image_root: likewise.
        group: of a folder, likewise.
    """

    dataset: str = ''
    train: str = ''
    test: str = ''
    train_fingerprint: str = ''
    val: str = ''
    columns: str = ''
    image_root: str = ''
    group: str = ''


def to_json(
    num_classes: int,
    model_config: Mapping[str, Any],
    class_names: Sequence[str],
    preprocess: Preprocess,
    source: Mapping[str, Any],
    task: Task | None,
) -> dict[str, Any]:
    """What model.json says, but for the weights; see `model_folder.save`."""
    config = {k: v for k, v in _plain(model_config).items() if k not in _EXECUTION_KEYS}
    config.pop('num_classes', None)
    config |= task.module_settings if task else {}
    return {
        'format': FORMAT,
        'format_version': FORMAT_VERSION,
        'architecture': {
            'variant': config.get('model_name'),
            'num_classes': num_classes,
            'config': config,
        },
        'image_size': preprocess.crop,
        'preprocessing': preprocess.to_dict(),
        'value_range': [-1, 1],
        'class_names': list(class_names),
        **({'task': task.to_dict()} if task and task != ONE_CLASS else {}),
        'source': _plain(source),
        'versions': _versions(),
    }


def _plain(value: Any) -> Any:
    """ConfigDict -> dict, tuple stays; the rest is json's to accept or refuse."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'numpy')}
    return {'python': platform.python_version(), 'vit_jax': vit_jax.__version__, **packages}


def read(kind: type[T], found: Mapping[str, Any]) -> T:
    """Builds a dataclass from a JSON object.

    Args:
        kind: the dataclass. Its annotations may be int, float, str, bool, None, `Literal`, unions,
            tuples, dict (any object), `Annotated` with `Between`, and dataclasses with `from_dict`.
            Whole numbers are at most 10 million, others finite, texts up to 1,000 characters long.
        found: the object; what it has beside the fields is left out.

    Raises:
        UserError: names the field that is missing or not what it should be.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in found:
            values[field.name] = _checked(found[field.name], hints[field.name], field.name)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f'{field.name} is missing')
    return kind(**values)


def architecture(found: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """(arguments of the module, number of classes), numbers in the range of real models.

    Args:
        found: 'architecture' of a model.json. Which arguments there are is for the module to say.

    Raises:
        ValueError, TypeError, KeyError: anything else; a number of a million layers would be built.
    """
    config, num_classes = found['config'], found['num_classes']
    if not isinstance(config, dict):
        raise TypeError(f'config is {_shown(config)}, expected an object')
    for name, value in _leaves(config):
        values = value if isinstance(value, list) else [value]
        if len(values) > _MAX_STAGES:
            raise ValueError(f'{name} has {len(values)} values')
        for number in values:
            largest = _MAX_LAYERS if name.endswith('num_layers') else _MAX_NUMBER
            if isinstance(number, int | float) and not 0 <= number <= largest:  # so that NaN fails
                raise ValueError(f'{name} is {number}')
            if not isinstance(number, int | float | str | None):
                raise TypeError(f'{name} is {_shown(number)}')
    if type(num_classes) is not int or not 0 <= num_classes <= _MAX_NUMBER:
        raise ValueError(f'num_classes is {_shown(num_classes)}')
    size = tuple(config['patches']['size'])
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f'patches.size is {size}')
    return config | {'patches': config['patches'] | {'size': size}}, num_classes


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, child in tree.items():
        if isinstance(child, dict):
            yield from ((f'{name}/{inner}', leaf) for inner, leaf in _leaves(child))
        else:
            yield name, child


def _checked(value: Any, kind: Any, name: str, limits: Between | None = None) -> Any:
    """The value as the `kind` of an annotation: lists become tuples, texts printable."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _checked(value, arguments[0], name, arguments[1])
    if origin in (types.UnionType, typing.Union):
        # The member of the same type; else the first, which then says what it expects.
        same = (list, tuple) if isinstance(value, list | tuple) else (type(value),)
        kind = next((k for k in arguments if (typing.get_origin(k) or k) in same), arguments[0])
        return _checked(value, kind, name, limits)
    if origin is typing.Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        items = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(items) == len(value):
            children = zip(value, items, strict=True)
            return tuple(_checked(v, k, f'{name}[{i}]') for i, (v, k) in enumerate(children))
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind, include_extras=True)
        known = {key: _checked(v, hints.get(key, Any), f'{name}.{key}') for key, v in value.items()}
        return kind.from_dict(known)  # type: ignore[union-attr]
    elif kind is Any or ((origin or kind) is dict and isinstance(value, dict)):
        return value
    elif kind is int and type(value) is int or kind is float and type(value) in (int, float):
        most = _MAX_NUMBER if kind is int else _MAX_FLOAT
        low, high = (limits.low, limits.high) if limits else (-most, most)
        if low <= value <= high:  # so that NaN fails
            return value
        raise UserError(f'{name} is {_shown(value)}, expected {low:,} to {high:,}')
    elif kind is str and type(value) is str:
        if len(value) <= _MAX_TEXT:
            return printable(value)
        raise UserError(f'{name} has {len(value):,} characters, expected up to {_MAX_TEXT:,}')
    elif kind in (bool, types.NoneType) and type(value) is kind:
        return value
    raise UserError(f'{name} is {_shown(value)}, expected {_words(kind)}')


def _shown(value: Any) -> str:
    """A value for a message, cut; of containers the type, as their contents may be endless."""
    if isinstance(value, dict | list | tuple):
        return {'dict': 'an object', 'list': 'a list'}.get(type(value).__name__, 'a list')
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}...'


def _words(kind: Any) -> str:
    """What an annotation allows, for a message."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ' or '.join(arguments)
    if origin is tuple:
        return 'a list' if arguments[-1] is ... else f'a list of {len(arguments)}'
    names = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'true or false'}
    return names.get(kind, 'an object')
