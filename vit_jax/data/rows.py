"""Datasets whose labels stand in rows: of tables, of records, beside the images of an archive.

What differs between them is where an image is (`Images`). What a row says of it stands in columns.
"""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data import captions
from vit_jax.data.columns import (
    CAPTION,
    NUMBERS,
    ONE,
    SEVERAL,
    Columns,
    listed,
    read_labels,
    read_splits,
    read_weights,
    text_of,
)
from vit_jax.data.dataset import Dataset
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import CLASS_INDEX, Example, check_class_names
from vit_jax.data.holdout import stratified_order
from vit_jax.data.row_images import AtRows, Images
from vit_jax.data.splits import SPLITS
from vit_jax.errors import UserError

_PLACES = {split: place for place, split in enumerate(SPLITS)}
_SHOWN = 5  # rows that a message names

_logger = logging.getLogger(__name__)


def make_dataset(
    name: str,
    images: Images,
    columns: Columns,
    values: Mapping[str, Sequence[Any]],
    *,
    faults: Mapping[int, str] | None = None,
    splits: Sequence[str] | None = None,
    class_names: Sequence[str] = (),
    channels: int = 3,
    max_unreadable: float = 1.0,
) -> Dataset:
    """The dataset that N rows are.

    Rows without a usable label, split, group or weight are left out, and named in the log.

    Args:
      name: as the user spells it.
      images: of the N rows.
      columns: which of `values` is what.
      values: N values for each of `columns.others()`: texts, numbers, lists of them, None.
      faults: rows (indices) that cannot be used anyhow, and why.
      splits: of the N rows, one of `SPLITS` each, where no column tells.
      class_names: in the order of their indices, where these stand in the rows; () where the values
        are the names.
      channels: see `examples.channels_of`.
      max_unreadable: the largest share of rows that may be left out or have no image.

    Returns:
      A dataset; each split in `stratified_order` (of other labels than classes in a random order),
      so that any slice has each class in proportion. Without splits, all of it is `train`.

    Raises:
      UserError: too many rows cannot be used, none can, fewer than two classes, or classes that
        `train` does not have.
    """
    faults, count = dict(faults or {}), len(values[columns.labels[0]])
    if not count:
        raise UserError(f'{name} has no rows')
    cells = [values[column] for column in columns.labels]
    labels, names, kind = np.zeros(count), tuple[str, ...](), CAPTION
    if columns.kind == CAPTION:
        texts = captions.of_cells(cells[0], faults)
    else:
        labels, names, kind = read_labels(cells, columns, class_names, faults)
    groups = weights = None
    if columns.split:
        splits = read_splits(values[columns.split], faults)
    if columns.group:
        groups = np.array([text_of(value) for value in values[columns.group]])
        for row in np.flatnonzero(groups == '').tolist():
            faults.setdefault(row, 'its group is empty')
    if columns.weight:
        weights = read_weights(values[columns.weight], faults)
    _logger.warning('Note: %s: %s', name, columns.describe(kind))
    if kind == CAPTION:
        told = splits or ['train'] * count
        rows, texts = captions.by_image(images, texts, told, faults)
    _check_faults(name, faults, images, count, max_unreadable)
    if kind == CAPTION:
        made_of = _captioned(images, rows, texts, [told[row] for row in rows], groups)
        return Dataset(name, (), True, made_of, channels, captions.CAPTIONS)
    good = np.ones(count, bool)
    good[list(faults)] = False
    part_of = np.array([_PLACES.get(split, -1) for split in splits or ['train'] * count], np.int8)
    made: dict[str, _Rows] = {}
    for split, place in _PLACES.items():
        rows = np.flatnonzero(good & (part_of == place))
        if len(rows):
            classes = labels[rows] if kind == ONE else np.zeros(len(rows), int)
            rows = rows[stratified_order(classes)]
            of_groups = None if groups is None else groups[rows]
            of_weights = None if weights is None else weights[rows]
            made[split] = _Rows(images, rows, labels[rows], of_groups, of_weights)
    if kind == ONE and not class_names:
        names = _of_training(made, names, name)
    check_class_names(names, name)
    if len(names) < (2 if kind == ONE else 1):
        raise UserError(
            f'{name} has {"one class only: " + names[0][:40] if names else "no classes"} (column '
            f'{columns.labels[0]}); at least two are needed'
        )
    dtype = CLASS_INDEX if kind == ONE else np.dtype((np.float32, labels.shape[1:]))
    units: tuple[str, ...] = ()
    if kind == NUMBERS:  # 'age [years]' has a unit
        found = [re.fullmatch(r'(.*\S)\s*\[(.*)\]', name) for name in names]
        units = tuple(match[2].strip() if match else '' for match in found)
        names = tuple(m[1] if m else n for m, n in zip(found, names, strict=True))
    return Dataset(name, names, True, made, channels, dtype, units, kind == SEVERAL)


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows(AtRows):
    """A split of n rows, in the order of the examples."""

    labels: np.ndarray  # int32 [n], or float32 [n, C]
    groups: np.ndarray | None
    weights: np.ndarray | None

    def read(self, index: int) -> Example:
        row, label = int(self.rows[index]), self.labels[index]
        label = label if label.ndim else label.item()
        try:
            image, key = self.images.read(row)
        except BadImageError as error:
            error.label = label
            raise
        return Example(image, label, key)

    def identity(self) -> Iterator[str]:
        for values in (self.labels, self.groups, self.weights):
            if values is not None:
                yield hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
        yield from (self.images.identity(int(row)) for row in self.rows)


def _captioned(
    images: Images,
    rows: np.ndarray,
    texts: Sequence[tuple[str, ...]],
    splits: Sequence[str],
    groups: np.ndarray | None,
) -> dict[str, captions.Captioned]:
    """The splits of M images with captions, each in a random order that stays."""
    made = {}
    for split in SPLITS:
        places = np.array([place for place, of in enumerate(splits) if of == split], int)
        if len(places):
            places = places[stratified_order(np.zeros(len(places), int))]
            of_groups = None if groups is None else groups[rows[places]]
            kept = [texts[place] for place in places]
            made[split] = captions.Captioned(images, rows[places], kept, of_groups)
    return made


def _of_training(
    splits: Mapping[str, _Rows], names: tuple[str, ...], dataset: str
) -> tuple[str, ...]:
    """The classes that are left once bad rows are out; they are those of the training rows.

    Labels are changed in place where classes fall away.

    Raises:
      UserError: another split has a class that training does not know.
    """
    used = {split: set(np.unique(part.labels).tolist()) for split, part in splits.items()}
    known = used.get('train') or set().union(*used.values())
    for split, labels in used.items():
        if extra := sorted(labels - known):
            shown = listed([names[label] for label in extra], _SHOWN)
            raise UserError(
                f'{split} has classes that training does not know: {shown} in {dataset}; add rows '
                'of them to train, or take them out here'
            )
    kept = sorted(known)
    if len(kept) < len(names):
        to_new = np.zeros(len(names), CLASS_INDEX)
        to_new[kept] = np.arange(len(kept))
        for part in splits.values():
            part.labels[:] = to_new[part.labels]
    return tuple(names[label] for label in kept)


def _check_faults(
    name: str,
    left_out: Mapping[int, str],
    images: Images,
    count: int,
    limit: float,
) -> None:
    """Names the rows that cannot be used, and stops where there are too many."""
    unreadable = {row: why for row, why in images.faults().items() if row not in left_out}
    for faults, what in (
        (left_out, 'cannot be used and are left out'),
        (unreadable, 'have no image that can be read'),
    ):
        if not faults:
            continue
        rows = sorted(faults)
        shown = '; '.join(f'{images.called(row)}: {faults[row]}' for row in rows[:_SHOWN])
        told = f'{name}: {len(rows):,} of {count:,} rows {what}: {shown}' + '; ...' * (
            len(rows) > _SHOWN
        )
        if len(left_out) == count:
            raise UserError(told)
        if len(left_out) + len(unreadable) > limit * count:
            raise UserError(
                f'{told}. That is more than config.max_unreadable={limit:g} of them: correct the '
                'rows, or allow a larger share'
            )
        _logger.warning('Note: %s', told)
