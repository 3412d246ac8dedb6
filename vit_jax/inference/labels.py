"""Names of classes: those a model brings along, those of a file, and those of ImageNet-1k."""

import difflib
import functools
import importlib.resources
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax import files
from vit_jax.data.examples import numbered
from vit_jax.errors import UserError, printable

IMAGENET1K = 'imagenet1k'
NONE = 'none'

_WORDNET_ID = re.compile(r'(?<![a-z0-9])n\d{8}(?!\d)')

_log = logging.getLogger(__name__)


def imagenet1k() -> tuple[str, ...]:
    """The 1,000 names of ImageNet-1k (ILSVRC 2012) in label order; all different.

    A name is the first word that WordNet 3.0 has for the class, except for two that would be there
    twice: 'crane bird' beside 'crane', 'maillot tank suit' beside 'maillot'.
    """
    return tuple(name for _, name in _imagenet1k())


def choose(own: Sequence[str], labels: str, model: str) -> tuple[str, ...]:
    """The class names to use for a model.

    Args:
      own: the names that the model brings along, in label order.
      labels: 'imagenet1k'; 'none': what the model has, even if only numbers; the path of a file
        (see `read`); or '': the model's own names, or for 1,000 classes without names those of
        ImageNet-1k, and the log says so.
      model: what a person calls the model, for messages.

    Returns:
      As many names as `own` has, in label order.

    Raises:
      UserError: not as many names as classes, or a file that cannot be read.
    """
    own = tuple(own)
    if labels == NONE or (not labels and own != numbered(1000)):
        return own
    if not labels:
        _log.warning(
            'Note: %s has 1,000 classes without names; they are taken for those of ImageNet-1k '
            '(--labels none for numbers, --labels FILE for other names)',
            model,
        )
    names = imagenet1k() if labels in ('', IMAGENET1K) else read(labels)
    if len(names) != len(own):
        raise UserError(
            f'--labels {labels} has {len(names):,} names, but {model} has {len(own):,} classes; '
            'give a file with one name per class, in label order'
        )
    return names


def listed(text: str) -> tuple[str, ...]:
    """Names as `--classes` of the command line tells them.

    Args:
      text: names separated by commas; the path of a file (see `read`); 'imagenet1k'; or ''.

    Raises:
      UserError: the file is not there or cannot be read, or another ImageNet is named.
    """
    if os.path.isfile(text):
        return read(text)
    if text == IMAGENET1K:
        return imagenet1k()
    if text.endswith(('.txt', '.json')):
        raise UserError(f'--classes: there is no file {printable(text)}')
    if re.fullmatch(r'(?i)imagenet[\w-]*', text):
        raise UserError(
            f'--classes {text}: the names that are known are the 1,000 of --classes imagenet1k; '
            'others stand in a file, one in each line'
        )
    return tuple(name.strip() for name in text.split(',')) if text else ()


def read(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names from a file.

    Args:
      path: text with one name per line; or JSON: a list of names, or an object with the number of
        each class, such as the `class_indices.json` of many tutorials: {"0": "daisy", ...} or
        {"daisy": 0, ...}; or Keras's {"0": ["n01440764", "tench"], ...}.

    Raises:
      UserError: no such file, not text, a line without a name, numbers that leave a gap.
    """
    if not os.path.exists(path):
        raise UserError(
            f'there is no file of labels {path}; --labels takes imagenet1k, none, or a file with '
            'one name per line'
        )
    text = files.read_text(path, pipes=True).removeprefix('\ufeff')
    if text.lstrip()[:1] in ('[', '{'):
        return _from_json(text, str(path))
    names = tuple(printable(line.strip()) for line in text.rstrip().splitlines())
    if not all(names):
        where = 1 + names.index('') if names else 1
        raise UserError(f'line {where} of the labels in {path} is empty; one name per line')
    if not names:
        raise UserError(f'the file of labels {path} is empty; one name per line')
    return names


def remap(
    data: Sequence[str],
    model: Sequence[str],
    what: str,
    class_map: Mapping[str, str | int] | None = None,
) -> tuple[int, ...]:
    """Which class of a model each class of a dataset is, by name.

    Datasets and models are free to have their classes in any order: tf_flowers begins with
    dandelion, a folder of the same photos with daisy. A dataset may have fewer classes than the
    model. Names that are spelled differently match where one class alone can be meant:
    'great_white_shark', 'Great White Shark', 'great white shark, white shark'; for ImageNet-1k
    WordNet ids, alone or in a name, 'n01484850_great_white_shark'; whole numbers from 0 on are the
    model's labels. Where the model has only numbers and as many classes, its order is taken to be
    that of the data. The log says what was not matched by equal names.

    Args:
      data: class names of the dataset, in label order.
      model: class names of the model, in label order.
      what: what a person calls the dataset, for messages.
      class_map: of `read_class_map`: for class names of the dataset the name or the label of the
        model's class, before all other rules.

    Returns:
      For each label of the dataset, the model's label.

    Raises:
      UserError: a class that the model does not have, or two that are the same one by their names.
    """
    data, model = (tuple(map(printable, names)) for names in (data, model))
    class_map = {
        printable(name): printable(found) if isinstance(found, str) else found
        for name, found in (class_map or {}).items()
    }
    if data == model and not class_map:
        return tuple(range(len(data)))
    classes = _Classes(model)
    in_order, nameless = tuple(range(len(model))), model == numbered(len(model))
    if (
        not class_map
        and classes.are_numbers(data)
        and not (nameless and tuple(map(int, data)) == in_order)
    ):
        _log.warning('Note: the classes of the data are numbers, %s, ..., which are taken for the '
                     'labels of the model: %s is %s, ...', ', '.join(data[:3]), data[0],
                     model[int(data[0])])  # fmt: skip
        return tuple(map(int, data))
    if nameless and not class_map:
        if len(data) != len(model):
            raise UserError(
                f'the model has {len(model):,} classes without names, {what} has {len(data):,} '
                'classes: they cannot be matched; name the classes of the model with --labels FILE'
            )
        _log.warning('Note: the model has no class names; its classes are taken for those of the '
                     'data, in the order of the data: %s, ...', ', '.join(data[:3]))  # fmt: skip
        return in_order
    found = [classes.label_of(class_map.get(name, name)) for name in data]
    missing = [name for name, label in zip(data, found, strict=True) if label is None]
    if missing:
        shown = ', '.join(missing[:3]) + (', ...' if len(missing) > 3 else '')
        near = difflib.get_close_matches(missing[0], model, n=1, cutoff=0.6)
        hint = f'the nearest to {missing[0]} is {near[0]}' if near else f'it knows {model[0]}, ...'
        if any(name in class_map for name in missing):
            hint = f'--class_map has {class_map.get(missing[0])!r} for {missing[0]}'
        raise UserError(
            f'{len(missing):,} of the {len(data):,} classes of {what} are none of the '
            f"model's {len(model):,} classes, or could be several: {shown} ({hint}). Say which "
            'they are with --class_map FILE, or evaluate on the data the model was trained for'
        )
    result = tuple(label for label in found if label is not None)
    _check_once(data, model, result, class_map)
    other = [
        i for i, label in enumerate(result)
        if data[i] not in (model[label], *class_map)
        and not _WORDNET_ID.search(f'{data[i]} {model[label]}')
    ]  # fmt: skip
    if other:
        _log.warning(
            'Note: %s of the %s classes are matched by other spellings, such as %s with %s',
            f'{len(other):,}', f'{len(data):,}', data[other[0]], model[result[other[0]]],
        )  # fmt: skip
    return result


def read_class_map(path: str | os.PathLike[str], data: Sequence[str]) -> dict[str, str | int]:
    """Which class of a model each class of a dataset is, from a file.

    Args:
      path: text with a line for each class, its name in the dataset, a tab, and the name or label
        of the model's class; or names alone, in the order of the model's labels, as timm's class
        maps; or the same as a JSON object or list; or Keras's `imagenet_class_index.json`,
        {"0": ["n01440764", "tench"], ...}, in which either name may be that of the dataset.
      data: class names of the dataset.

    Raises:
      UserError: no such file, or another content.
    """
    text = files.read_text(path, pipes=True).removeprefix('\ufeff').strip()
    try:
        found: Any = text.splitlines()
        if text[:1] in ('[', '{'):
            found = files.parse_json(text)
        elif '\t' in text:
            found = dict(line.split('\t', 1) for line in found if line.strip())
    except ValueError as error:
        raise UserError(f'--class_map {path} cannot be read: {error}') from error
    if isinstance(found, list):
        found = dict(enumerate(found))
    result: dict[str, str | int] = {}
    for key, value in found.items():
        names = value if isinstance(value, list) else [value]
        if str(key) not in data and _is_label(str(key)):  # from label to names
            result |= {name.strip(): int(key) for name in names if isinstance(name, str)}
        elif isinstance(value, str | int):
            text = str(value).strip()
            result[key] = int(text) if _is_label(text) else text
        else:
            raise UserError(f'--class_map {path}: {key} has {str(value)[:60]}, expected a class')
    if not set(result) & set(data):
        raise UserError(
            f'--class_map {path} has none of the classes of the data ({", ".join(data[:3])}, ...); '
            'expected lines of a name in the data, a tab, and the name or label of the class'
        )
    return result


def _is_label(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


class _Classes:
    """The classes of a model, to be found by names that are spelled in many ways."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._labels: dict[tuple[str, str], set[int]] = {}
        wordnet = _imagenet1k()
        # Some lists have 'crane' twice; where they are in the order of ImageNet-1k, that tells.
        ordered = len(names) == len(wordnet) and (
            sum(n.split(',')[0] == name for n, (_, name) in zip(names, wordnet, strict=True)) > 900
        )
        for label, name in enumerate(names):
            keys = _keys(name)
            if ordered:
                keys = [key for key in keys if key[0] != 'id'] + [('id', wordnet[label][0])]
            for key in keys:
                self._labels.setdefault(key, set()).add(label)

    def label_of(self, name: str | int) -> int | None:
        """The one class that is meant, or None."""
        if isinstance(name, int):
            return name if name < len(self._names) else None
        for key in _keys(name):
            labels = self._labels.get(key, set())
            if len(labels) == 1:
                return min(labels)
        return None

    def are_numbers(self, data: Sequence[str]) -> bool:
        """Whether class names are labels of this model, which has other names itself."""
        if not all(name.isdecimal() and int(name) < len(self._names) for name in data):
            return False
        return not any(name.isdecimal() for name in self._names)


def _keys(name: str) -> list[tuple[str, str]]:
    """What a class may be found by, the surest first.

    Upper case counts where it can: 'Cardigan' is a dog in ImageNet-1k, 'cardigan' is not.
    """
    spaced = _spaced(name)
    first = _spaced(name.split(',')[0])
    keys = [('name', name), ('name', spaced), ('name', first)]
    keys += [('plain', spaced.casefold()), ('plain', first.casefold())]
    found = _WORDNET_ID.search(name)
    ids = _wordnet_ids()
    number = found[0] if found else ids.get(first) or ids.get(first.casefold())
    return keys + ([('id', number)] if number else [])


def _spaced(name: str) -> str:
    """A name with words as in a text: 'great_white_shark' is 'great white shark'."""
    return ' '.join(re.sub(r'[_\-\s]+', ' ', name).replace("'", '').split())


def _check_once(
    data: Sequence[str], model: Sequence[str], labels: Sequence[int], given: Mapping[str, str | int]
) -> None:
    """Refuses two classes of the data that are one of the model, unless somebody said so."""
    known: dict[int, str] = {}
    for name, label in zip(data, labels, strict=True):
        if label in known and not {name, known[label]} <= given.keys():
            raise UserError(
                f'{known[label]} and {name} are both {model[label]} by their names; say which '
                'classes of the model they are with --class_map FILE'
            )
        known[label] = name


@functools.cache
def _imagenet1k() -> tuple[tuple[str, str], ...]:
    """WordNet ids ('n01440764', the names of the folders of ILSVRC) and names, in label order."""
    file = importlib.resources.files('vit_jax.data').joinpath('imagenet1k.txt')
    lines = file.read_text(encoding='utf-8').splitlines()
    pairs = [line.split(' ', 1) for line in lines if not line.startswith('#')]
    return tuple((wordnet_id, name) for wordnet_id, name in pairs)


@functools.cache
def _wordnet_ids() -> dict[str, str]:
    """WordNet ids of ImageNet-1k by name, as it is and in lower case."""
    ids = {_spaced(name): wordnet_id for wordnet_id, name in _imagenet1k()}
    return {name.casefold(): wordnet_id for name, wordnet_id in ids.items()} | ids


def _from_json(text: str, path: str) -> tuple[str, ...]:
    try:
        found = files.parse_json(text)
        if isinstance(found, dict):
            if all(isinstance(value, int) for value in found.values()):  # {"daisy": 0}
                found = {value: key for key, value in found.items()}
            found = {int(key): value for key, value in found.items()}
            found = [found[i] for i in range(len(found))]
            if all(isinstance(pair, list) and len(pair) == 2 for pair in found):  # Keras
                names = [name for _, name in found]
                twice = {name for name in names if names.count(name) > 1}
                found = [f'{n} ({wordnet_id})' if n in twice else n for wordnet_id, n in found]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'the labels in {path} are neither a JSON list of names nor an object with the number '
            f'of each class from 0 on ({type(error).__name__}: {error})'
        ) from error
    if not found or not all(isinstance(name, str) and name for name in found):
        raise UserError(f'the labels in {path} must be names; one of them is not')
    return tuple(map(printable, found))
