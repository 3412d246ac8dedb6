"""Checks the description of a prepared TFDS set before TFDS itself reads it.

The description (`features.json`, `dataset_info.json`, label names) comes with the data, from
whoever made it, and TFDS trusts it: it imports whatever Python module the features name, reads
files wherever a name leads, and makes lists as long as a number says.
"""

import contextlib
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.data.examples import check_class_names
from vit_jax.errors import UserError

MAX_CLASSES = 1_000_000
MAX_EXAMPLES = 2**31 - 1  # an index is an int32 in the batches
MAX_SHARDS = 1_000_000

DESCRIPTION = 'dataset_info.json'  # the last file that TFDS writes of a set
_FEATURES = 'features.json'
_FEATURE_CLASS = re.compile(r'tensorflow_datasets\.core\.features(\.\w+)+', re.A)
_CLASS_KEYS = ('pythonClassName', 'python_class_name', 'type')  # the last one until TFDS 4.4
# What names the files of a split; a slash or a dot-dot would lead out of the folder.
_TEMPLATE = re.compile(r'(?!.*\.\.)[\w.{}\-]*')
_SET_NAME = re.compile(
    r'(?P<stem>[A-Za-z]\w*)(/(?P<config>(?!\.+(:|$))[\w+.\-]+))?(:(\d+|\*)(\.(\d+|\*)){2})?', re.A
)


def parse_name(name: str) -> str | None:
    """The name of a set without configuration and version; None if the text is not a name.

    Args:
      name: `tf_flowers`, `name/config`, `name:version` or `name/config:version`. TFDS's namespaces
        (`huggingface:name`) and arguments (`name/data_dir=...`) are refused: they run other
        code and read other places than a name seems to say.
    """
    match = _SET_NAME.fullmatch(name)
    return match['stem'] if match else None


def check_below(folder: pathlib.Path) -> None:
    """Refuses sets that TFDS must not even look at: foreign Python classes, endless files.

    Args:
      folder: of all configurations and versions of a set: `<data_dir>/<name>`; may not exist. Files
        that are not JSON are left for TFDS to refuse.

    Raises:
      UserError: says which file and what is wrong in it.
    """
    for level in ('*', '*/*'):  # version; configuration and version
        for file in (_FEATURES, DESCRIPTION, '*.labels.txt'):
            for path in sorted(folder.glob(f'{level}/{file}')):
                _check_size(path)
                if file == _FEATURES:
                    _check_classes(files.read_json(path), path)
                if file == DESCRIPTION:
                    _check_files(path.parent)


def check_folder(folder: pathlib.Path) -> None:
    """Checks the description of one prepared set.

    Args:
      folder: of one version; sets prepared by TFDS before 4.0 have no `features.json`.

    Raises:
      UserError: names the file and what is wrong in it.
    """
    info_file, features_file = folder / DESCRIPTION, folder / _FEATURES
    with reading(info_file):
        info = files.read_json(info_file)
    with reading(features_file):
        features = files.read_json(features_file) if features_file.exists() else {}
    _check_classes(features, features_file)
    for node in _objects(features):
        for key in ('numClasses', 'num_classes'):
            if not _is_count(node.get(key, 0), MAX_CLASSES):
                raise _damaged(features_file, f'{key} is {_short(node[key])}')
        if 'names_file' in node:
            raise _damaged(features_file, 'it names a file of labels elsewhere (names_file)')
    _check_label_names(folder / 'label.labels.txt', features)
    splits = info.get('splits', [])
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        raise _damaged(info_file, 'splits should be a list of objects')
    for split in splits:
        _check_split(split, info_file)


def _check_label_names(path: pathlib.Path, features: dict[str, Any]) -> None:
    """One name for each class; TFDS takes numbers for those it cannot read, and any number."""
    if not path.exists():
        return
    _check_size(path)
    with reading(path):
        lines = [line.strip() for line in path.read_text(encoding='utf-8').split('\n')]
    names = [line for line in lines if line]
    check_class_names(names, str(path))
    if len(set(names)) != len(names):
        raise _damaged(path, 'a name is there twice')
    classes: Any = features
    for key in ('featuresDict', 'features', 'label', 'classLabel', 'numClasses'):
        classes = classes.get(key) if isinstance(classes, dict) else None
    if names and _is_count(classes, MAX_CLASSES) and len(names) != int(classes):
        raise _damaged(path, f'it has {len(names):,} names for {int(classes):,} classes')


def _check_split(split: dict[str, Any], path: pathlib.Path) -> None:
    name = split.get('name')
    if not isinstance(name, str) or not re.fullmatch(r'[\w.\-]+', name):
        raise _damaged(path, f'the name of a split is {_short(name)}')
    template = split.get('filepathTemplate', '')
    if not isinstance(template, str) or not _TEMPLATE.fullmatch(template):
        raise _damaged(path, f'filepathTemplate is {_short(template)}, not a plain file name')
    lengths = split.get('shardLengths', [])
    counts = lengths if isinstance(lengths, list) else [None]
    if (
        len(counts) > MAX_SHARDS
        or not all(_is_count(count, MAX_EXAMPLES) for count in counts)
        or sum(map(int, counts)) > MAX_EXAMPLES
    ):
        raise _damaged(
            path, f'shardLengths of {name} should be numbers of examples: {_short(lengths)}'
        )


def _check_files(folder: pathlib.Path) -> None:
    """Refuses pipes and devices in place of files: reading them would never end."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # a link to nowhere: missing, which TFDS tells
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise _damaged(path, 'it is not a regular file')


def _is_dtype(name: Any) -> bool:
    """Whether NumPy knows it; for one that it does not, TFDS would import TensorFlow."""
    if name == 'string':
        return True
    try:
        return isinstance(name, str) and np.dtype(name) is not None
    except (TypeError, ValueError, SyntaxError):
        return False


def _is_count(value: Any, largest: int) -> bool:
    """Whether it is an integer, as number or (protobuf's 64-bit ones) as text, in [0, largest]."""
    if isinstance(value, str) and re.fullmatch(r'[0-9]{1,19}', value):
        value = int(value)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _check_classes(features: Any, path: pathlib.Path) -> None:
    for node in _objects(features):
        if not _is_dtype(node.get('dtype', 'string')):
            raise _damaged(path, f'dtype is {_short(node["dtype"])}')
        for kind, key in (('Image', 'image'), ('Tensor', 'tensor')):
            described = node.get(key)
            if str(node.get('pythonClassName')).endswith(f'.{kind}') and not (
                isinstance(described, dict) and 'dtype' in described
            ):
                raise _damaged(path, f'a feature {kind} has no dtype')
        for key in _CLASS_KEYS:
            name = node.get(key)
            if isinstance(name, str) and not _FEATURE_CLASS.fullmatch(name):
                raise UserError(
                    f'{path} asks for a Python class that is not of TFDS ({_short(name)}), and '
                    'reading it would run its code. Use a set that is made of the features of TFDS'
                )


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in it, without recursion."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _check_size(path: pathlib.Path) -> None:
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > files.MAX_JSON_BYTES:
            limit = f'{files.MAX_JSON_BYTES:,} bytes'
            raise ValueError(f'it is not a regular file, or of more than {limit}')


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Makes one `UserError` of whatever is raised for a damaged description.

    Args:
      path: a file of it; its folder is the one to replace.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # protobuf and TFDS raise nearly anything
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
        raise _damaged(path, reason) from error


def _damaged(path: pathlib.Path, reason: str) -> UserError:
    return UserError(
        f'{path} does not describe a set of TFDS as it should: {reason}. Remove {path.parent} to '
        'have it prepared again, or copy it again from where it came from'
    )


def _short(value: Any) -> str:
    return ascii(value)[:60]
