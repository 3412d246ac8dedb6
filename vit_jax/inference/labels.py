"""Names of classes: those a model brings along, those of a file, and those of ImageNet-1k."""

import difflib
import functools
import importlib.resources
import logging
import os
import pathlib
from collections.abc import Sequence

from vit_jax import files
from vit_jax.data.dataset import numbered
from vit_jax.errors import UserError

IMAGENET1K = 'imagenet1k'
NONE = 'none'

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


def read(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names from a file.

    Args:
      path: text with one name per line; or JSON: a list of names, or an object with the number of
        each class, such as the `class_indices.json` of many tutorials: {"0": "daisy", ...} or
        {"daisy": 0, ...}.

    Raises:
      UserError: no such file, not text, a line without a name, numbers that leave a gap.
    """
    try:
        text = pathlib.Path(path).read_text(encoding='utf-8-sig')
    except FileNotFoundError:
        raise UserError(
            f'there is no file of labels {path}; --labels takes imagenet1k, none, or a file with '
            'one name per line'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'the labels in {path} cannot be read as text ({error})') from error
    if text.lstrip()[:1] in ('[', '{'):
        return _from_json(text, str(path))
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if not all(names):
        where = 1 + names.index('') if names else 1
        raise UserError(f'line {where} of the labels in {path} is empty; one name per line')
    if not names:
        raise UserError(f'the file of labels {path} is empty; one name per line')
    return names


def remap(data: Sequence[str], model: Sequence[str], what: str) -> tuple[int, ...]:
    """Which class of a model each class of a dataset is, by name.

    Datasets and models are free to have their classes in any order: tf_flowers begins with
    dandelion, a folder of the same photos with daisy. WordNet ids ('n01440764') stand for the names
    of ImageNet-1k. A dataset may have fewer classes than the model. Where the model has only
    numbers and as many classes, its order is taken to be that of the data, and the log says so.

    Args:
      data: class names of the dataset, in label order.
      model: class names of the model, in label order.
      what: what a person calls the dataset, for messages.

    Returns:
      For each label of the dataset, the model's label.

    Raises:
      UserError: a class that the model does not have, or a name that the model has twice.
    """
    data, model = tuple(data), tuple(model)
    if data == model:
        return tuple(range(len(data)))
    if model == numbered(len(model)):
        if len(data) != len(model):
            raise UserError(
                f'the model has {len(model):,} classes without names, {what} has {len(data):,} '
                'classes: they cannot be matched; name the classes of the model with --labels FILE'
            )
        _log.warning('Note: the model has no class names; its classes are taken for those of the '
                     'data, in the order of the data: %s, ...', ', '.join(data[:3]))  # fmt: skip
        return tuple(range(len(data)))
    twice = sorted({name for name in model if model.count(name) > 1})
    if twice:
        raise UserError(
            f'the model has more than one class called {twice[0]}, so classes cannot be matched by '
            'name; give different names with --labels FILE'
        )
    known = {name: i for i, name in enumerate(model)}
    wordnet = dict(_imagenet1k())
    other = wordnet | {name: wordnet_id for wordnet_id, name in wordnet.items()}
    index = {other.get(name, name): i for name, i in known.items()} | known
    missing = [name for name in data if name not in index]
    if missing:
        shown = ', '.join(missing[:3]) + (', ...' if len(missing) > 3 else '')
        near = difflib.get_close_matches(missing[0], model, n=1, cutoff=0.6)
        hint = f'the nearest to {missing[0]} is {near[0]}' if near else f'it knows {model[0]}, ...'
        raise UserError(
            f'{len(missing):,} of the {len(data):,} classes of {what} are none of the '
            f"model's {len(model):,} classes: {shown} ({hint}). Evaluate on the data the model was "
            'trained for, or rename its classes with --labels FILE'
        )
    return tuple(index[name] for name in data)


@functools.cache
def _imagenet1k() -> tuple[tuple[str, str], ...]:
    """WordNet ids ('n01440764', the names of the folders of ILSVRC) and names, in label order."""
    file = importlib.resources.files('vit_jax.data').joinpath('imagenet1k.txt')
    lines = file.read_text(encoding='utf-8').splitlines()
    pairs = [line.split(' ', 1) for line in lines if not line.startswith('#')]
    return tuple((wordnet_id, name) for wordnet_id, name in pairs)


def _from_json(text: str, path: str) -> tuple[str, ...]:
    try:
        found = files.parse_json(text)
        if isinstance(found, dict):
            if all(isinstance(value, int) for value in found.values()):  # {"daisy": 0}
                found = {value: key for key, value in found.items()}
            found = {int(key): value for key, value in found.items()}
            found = [found[i] for i in range(len(found))]
    except (ValueError, KeyError) as error:
        raise UserError(
            f'the labels in {path} are neither a JSON list of names nor an object with the number '
            f'of each class from 0 on ({type(error).__name__}: {error})'
        ) from error
    if not found or not all(isinstance(name, str) and name for name in found):
        raise UserError(f'the labels in {path} must be names; one of them is not')
    return tuple(found)
