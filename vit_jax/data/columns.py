"""What the columns of a table are, and what their cells say: labels, splits, weights.

A cell is a text, a number, a list of them, or None.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.examples import CLASS_INDEX
from vit_jax.data.splits import SPLITS, split_called
from vit_jax.errors import UserError

# Names by which columns are found, the first that is there; case does not count.
_FOUND_BY = {
    'image': ('image', 'path', 'file_name', 'filename', 'file', 'filepath', 'file_path',
              'image_path', 'img', 'img_path', 'image/encoded'),
    'label': ('label', 'labels', 'class', 'class_name', 'category', 'species', 'target', 'targets',
              'cls', 'txt', 'image/class/text', 'image/class/label'),
    'caption': ('caption', 'captions', 'text', 'texts', 'sentence', 'sentences', 'description',
                'alt_text', 'txt'),
    'split': ('split', 'subset', 'partition'),
    'group': ('group', 'group_id', 'patient', 'patient_id', 'subject', 'scene'),
    'weight': ('weight', 'sample_weight'),
}  # fmt: skip
# The roles that `config.columns` may give. Three of them say what labels are: one class, a yes or
# no for each class, numbers.
KINDS = ONE, SEVERAL, NUMBERS = 'label', 'labels', 'target'
CAPTION = 'caption'  # a text or several, in place of a label
_ROLES = ('image', *KINDS, CAPTION, 'split', 'group', 'weight')
_BETWEEN = ';'  # the labels of a cell
_LARGEST = 3e38  # that float32 holds
_MAX_NUMBERS = 1 << 28  # of all labels; a gigabyte
_FEW = 1000  # labels, of whatever number of rows


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column has what.

    Attributes:
      image: of the image, or its path.
      labels: one or several of them.
      kind: of the labels, one of `KINDS` or `CAPTION`; '' for what they look like.
      split: '' for none.
      group: likewise.
      weight: likewise.
    """

    image: str
    labels: tuple[str, ...]
    kind: str = ''
    split: str = ''
    group: str = ''
    weight: str = ''

    def others(self) -> tuple[str, ...]:
        """All that are there but the image's."""
        return tuple(filter(None, (*self.labels, self.split, self.group, self.weight)))

    def describe(self, kind: str) -> str:
        """What is read from where, where the labels are of this kind."""
        what = {ONE: 'a class', SEVERAL: 'any number of classes', NUMBERS: 'numbers',
                CAPTION: 'captions'}[kind]  # fmt: skip
        told = [f'images from the column {self.image}', f'{what} from {listed(self.labels, 3)}']
        told += [f'{name} from {column}' for name in ('split', 'group', 'weight')
                 if (column := getattr(self, name))]  # fmt: skip
        return ', '.join(told)


def choose_columns(text: str, found: Sequence[str], where: str, image: str = '') -> Columns:
    """Finds the columns by their names, or as the user says.

    Args:
      text: `config.columns`: 'image=file,label=species', with the roles image, label (one class),
        labels (several: a list in one column, or columns of 0 and 1, 'labels=cat+dog'), target
        (numbers, 'target=x+y'), caption (in place of labels), split, group, weight; 'split=' for
        none of this kind. What is not said is found by name, and so is the column of 'caption='.
      found: names of all columns.
      where: what has them, for messages.
      image: the column of the image, where that is known.

    Raises:
      UserError: no such role or column, or no image or label.
    """
    told = _parse(text)
    lower = {name.strip().lower(): name for name in reversed(found)}
    for role, names in told.items():
        for name in names:
            if name not in found:
                near = difflib.get_close_matches(name, found, n=1, cutoff=0.6)
                hint = f'did you mean {near[0]}?' if near else f'it has {listed(found)}'
                raise UserError(f'{where} has no column {name} (config.columns: {role}); {hint}')
    chosen = {role: names[0] if names else '' for role, names in told.items()}
    if image:
        chosen.setdefault('image', image)
    kinds = [role for role in (*KINDS, CAPTION) if role in told]
    kind = kinds[0] if kinds else ''
    if kind == CAPTION:
        if chosen.setdefault('weight', ''):
            raise UserError(f'config.columns={text!r}: captions have no weight; leave it out')
        if not chosen[CAPTION]:
            del chosen[CAPTION]
    for role, names in _FOUND_BY.items():
        if role not in chosen and (role not in ('label', CAPTION) or role == (kind or 'label')):
            chosen[role] = next((lower[name] for name in names if name in lower), '')
    found_by = CAPTION if kind == CAPTION else 'label'
    labels = told.get(kind, ()) or tuple(filter(None, [chosen.get(found_by, '')]))
    for role, given in (('image', chosen['image']), (found_by, labels)):
        if not given:
            raise UserError(
                f'{where} has no column that is called like one of the {role}s '
                f'({", ".join(_FOUND_BY[role][:5])}, ...): it has {listed(found)}. Say which it '
                f'is: --config.columns={role}=NAME (--columns elsewhere)'
            )
    return Columns(
        chosen['image'],
        tuple(labels),
        kind,
        chosen['split'],
        chosen['group'],
        chosen['weight'],
    )


def with_captions(text: str) -> str:
    """`config.columns` with the role `caption`; if it is not there, as one found by name."""
    return text if CAPTION in _parse(text) else ','.join(filter(None, [text, f'{CAPTION}=']))


def wants_captions(text: str) -> bool:
    """Whether `config.columns` has the role `caption`."""
    return CAPTION in _parse(text)


def has_label(found: Sequence[str]) -> bool:
    """Whether one of these columns would be taken for the label."""
    return not {name.strip().lower() for name in found}.isdisjoint(_FOUND_BY['label'])


def _parse(text: str) -> dict[str, tuple[str, ...]]:
    """Roles and the columns that were given for them."""
    told: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(','))):
        role, equals, names = (word.strip() for word in part.partition('='))
        if not equals or role not in _ROLES:
            raise UserError(
                f'config.columns={text!r}: {part!r} is not ROLE=COLUMN; roles are '
                f'{", ".join(_ROLES)}, as in image=file,label=species'
            )
        told[role] = tuple(filter(None, (name.strip() for name in names.split('+'))))
        if len(told[role]) > 1 and role not in (SEVERAL, NUMBERS):
            raise UserError(
                f'config.columns={text!r}: {role} is one column; labels=A+B and target=A+B take '
                'several'
            )
    if len(several := [role for role in (*KINDS, CAPTION) if role in told]) > 1:
        raise UserError(f'config.columns={text!r}: {" and ".join(several)} exclude each other')
    return told


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names with commas between them, cut; 'none' of none."""
    return ', '.join(map(str, names[:most])) + ', ...' * (len(names) > most) or 'none'


def read_splits(values: Sequence[Any], faults: dict[int, str]) -> list[str]:
    """The split of each of N rows; '' for what is none, which becomes a fault.

    Args:
      values: N cells.
      faults: by row (index), why it cannot be used; added to.
    """
    known = {text: split_called(text) for text in set(map(text_of, values))}
    parts = [known[text_of(value)] or '' for value in values]
    for row, part in enumerate(parts):
        if not part:
            shown = text_of(values[row])
            what = f'{shown[:40]!r} is none of {", ".join(SPLITS)}' if shown else 'is empty'
            faults.setdefault(row, f'its split {what}')
    return parts


def read_weights(values: Sequence[Any], faults: dict[int, str]) -> np.ndarray:
    """The weights of N rows, float32 [N] from 0 on; arguments as of `read_splits`."""
    weights = np.ones(len(values), np.float32)
    for row, value in enumerate(values):
        number = number_of(value)
        if number is None or not 0 <= number < _LARGEST:
            faults.setdefault(row, f'its weight {text_of(value)[:40]!r} is no number from 0 on')
        else:
            weights[row] = number
    return weights


def read_labels(
    cells: Sequence[Sequence[Any]],
    columns: Columns,
    class_names: Sequence[str],
    faults: dict[int, str],
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """The labels of N rows.

    Args:
      cells: N for each of `columns.labels`.
      columns: says what they are.
      class_names: in the order of their indices, where these stand in the cells; () where the names
        do.
      faults: as of `read_splits`.

    Returns:
      int32 [N], of a row with a fault any; or float32 [N, C]. The names of the classes, in the
      order of the alphabet (whole numbers in theirs), or of the C numbers. The kind, of `KINDS`.

    Raises:
      UserError: vectors that would take gigabytes.
    """
    if len(cells) > 1:
        return _of_columns(cells, columns.labels, columns.kind, faults)
    values = list(cells[0])
    kind = columns.kind or _looks_like(values)
    if kind == NUMBERS:
        return _of_numbers(values, columns.labels[0], faults)
    if kind == SEVERAL:
        return _of_lists(values, class_names, faults)
    texts = [text_of(value) for value in values]
    if all(re.fullmatch(r'-?\d+(\.0+)?', text) for text in texts if text):
        texts = [text.partition('.')[0] for text in texts]  # integers with gaps, as pandas has them
    for row, text in enumerate(texts):
        if not text or isinstance(values[row], list | tuple | dict):
            faults.setdefault(row, f'its label is {text[:40] or "empty"}')
    names = tuple(class_names) or _in_order({t for i, t in enumerate(texts) if i not in faults})
    places = _places(names, bool(class_names))
    for row, text in enumerate(texts):
        if text not in places:
            faults.setdefault(row, f'its label {text[:40]} is none of the {len(names):,} classes')
    return np.array([places.get(text, 0) for text in texts], CLASS_INDEX), names, ONE


def _looks_like(values: Sequence[Any]) -> str:
    """The kind of labels, where the user does not say it."""
    if any(isinstance(value, list | tuple) for value in values):
        numbers = [x for value in values if isinstance(value, list | tuple) for x in value]
        real = any(isinstance(x, float) and not x.is_integer() for x in numbers)
        return NUMBERS if real else SEVERAL
    present = [value for value in values if text_of(value)]
    numbers = [number_of(value) for value in present]
    if None not in numbers:
        return ONE if all(float(number).is_integer() for number in numbers) else NUMBERS
    several = any(_BETWEEN in value for value in present if isinstance(value, str))
    return SEVERAL if several else ONE


def _of_columns(
    cells: Sequence[Sequence[Any]], names: Sequence[str], kind: str, faults: dict[int, str]
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """A column of numbers for each name; without a kind, nothing but 0 and 1 is a yes or no."""
    count = len(cells[0])
    _check_size(count, len(names))
    labels = np.zeros((count, len(names)), np.float32)
    for place, column in enumerate(cells):
        for row, value in enumerate(column):
            number = number_of(value)
            if number is None or not abs(number) < _LARGEST:
                faults.setdefault(row, f'its {names[place]} {text_of(value)[:40]!r} is no number')
            else:
                labels[row, place] = number
    binary = np.isin(labels, (0, 1)).all(axis=1)
    kind = kind or (SEVERAL if binary.all() else NUMBERS)
    if kind == SEVERAL:
        for row in np.flatnonzero(~binary).tolist():
            faults.setdefault(row, 'its labels are not all 0 or 1')
    return labels, tuple(names), kind


def _of_numbers(
    values: Sequence[Any], name: str, faults: dict[int, str]
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """A number in each cell, or a list of as many as in the others."""
    sizes = {len(value) for value in values if isinstance(value, list | tuple)}
    if not sizes:
        return _of_columns([values], [name], NUMBERS, faults)
    size = max(sizes)
    _check_size(len(values), size)
    nothing = [None] * size
    for row, value in enumerate(values):
        if not isinstance(value, list | tuple) or len(value) != size:
            faults.setdefault(row, f'its {name} is no list of {size:,} numbers')
    lists = [nothing if row in faults else value for row, value in enumerate(values)]
    names = [f'{name} {place}' for place in range(size)]
    return _of_columns(list(zip(*lists, strict=True)), names, NUMBERS, faults)


def _of_lists(
    values: Sequence[Any], class_names: Sequence[str], faults: dict[int, str]
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Labels of lists, 'a;b' or ['a', 'b']; an empty one has none of them."""
    lists = []
    for row, value in enumerate(values):
        if isinstance(value, list | tuple):
            lists.append([text_of(item) for item in value])
        else:
            lists.append([part.strip() for part in text_of(value).split(_BETWEEN)])
            if value is None or (not text_of(value) and str(value).strip()):  # NaN
                faults.setdefault(row, 'its labels are empty')
    found = {text for row, texts in enumerate(lists) if row not in faults for text in texts}
    names = tuple(class_names) or _in_order(found - {''})
    places = _places(names, bool(class_names))
    _check_size(len(lists), len(names))
    labels = np.zeros((len(lists), len(names)), np.float32)
    for row, texts in enumerate(lists):
        for text in filter(None, texts):
            if text in places:
                labels[row, places[text]] = 1
            else:
                faults.setdefault(row, f'its label {text[:40]} is none of the classes')
    return labels, names, SEVERAL


def _check_size(rows: int, outputs: int) -> None:
    if rows * outputs > _MAX_NUMBERS or outputs > max(_FEW, rows // 10):
        raise UserError(
            f'{outputs:,} different labels of {rows:,} rows, any number for each, are more than '
            'there can be: is this the column of the labels?'
        )


def _in_order(names: set[str]) -> tuple[str, ...]:
    """In the order of the alphabet; whole numbers in theirs."""
    if all(re.fullmatch(r'[+-]?\d{1,18}', name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _places(names: Sequence[str], indices: bool) -> dict[str, int]:
    """Place of each name; and, with `indices`, of each place as text, which goes before."""
    places = {name: index for index, name in enumerate(names)}
    return places | {str(index): index for index in range(len(names))} if indices else places


def text_of(value: Any) -> str:
    """A cell as text; '' for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ''
    if isinstance(value, bytes):
        value = value.decode('utf-8', 'replace')
    text = str(value).strip()
    return '' if text.lower() == 'nan' else text


def number_of(value: Any) -> float | None:
    """A cell as a finite number; None if it is none."""
    if isinstance(value, list | tuple | dict | None):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError, TypeError):
        return None
    return number if math.isfinite(number) else None
