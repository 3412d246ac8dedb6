"""What can be seen of a set of images at once, how it is divided, and whether it is enough."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.configs import datasets
from vit_jax.data import copies, decode, sources
from vit_jax.data.dataset import Dataset, Selection
from vit_jax.data.examples import CLASS_INDEX
from vit_jax.errors import UserError, printable
from vit_jax.inference import probe_choice

MAX_UNREADABLE = 0.1  # share of the images
ENOUGH_VALIDATION = 100  # images, of which a tenth of the training images should have so many
_SIZES = 50  # images whose size is looked at
_COPIES_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class Parts:
    """The images, divided.

    Attributes:
      train: to fit to.
      val: to choose by.
      test: to tell in the end how good the chosen one is.
      specs: of `config.pp`: train, val, test.
    """

    train: Selection
    val: Selection
    test: Selection
    specs: tuple[str, str, str]


def open_parts(
    name: str, data: Mapping[str, Any], channels: int, specs: tuple[str, str, str] = ('', '', '')
) -> Parts:
    """Opens a set and divides it, the same way every time.

    Args:
      name: see `sources.open_dataset`.
      data: further arguments of it.
      channels: of the images.
      specs: of training, validation and test images; empty for what the set says, else a tenth to
        test on, and a tenth or, of a small set, a fifth of the rest to choose by.

    Raises:
      UserError: the set cannot be used for this; says why.
    """
    options = {'channels': channels, 'max_unreadable': MAX_UNREADABLE, **data}
    opened = sources.open_dataset(name, **options)
    if opened.label_dtype != CLASS_INDEX:
        raise UserError(
            f'the labels of {name} are not a class each: train with vit_jax train, which takes '
            'several classes and numbers'
        )
    _check_counts(opened)
    preset = {} if sources.is_path(name) else datasets.get_preset(name).get('pp', {})
    train, val, test = specs
    train, test = train or preset.get('train', ''), test or preset.get('test', '')
    if not (train and test):
        defaults = opened.default_specs()
        train, test = train or defaults[0], test or defaults[1]
    if not val:
        tenth = len(opened.select(train)) / 10
        val = '10%' if tenth >= ENOUGH_VALIDATION else '20%'
        if 'validation' in opened.splits:
            stored = opened.select('validation')
            free = not stored.overlap(opened.select(train)) and not stored.overlap(
                opened.select(test)
            )
            val = 'validation' if free else val
    fitted, chosen, tested = sources.open_three(
        name, train_split=train, val_split=val, test_split=test, **options
    )
    assert chosen is not None
    if common := fitted.overlap(tested):
        raise UserError(f'{common:,} images are both in {train} and in {test}: name other splits')
    if (labels := fitted.labels()) is not None:
        probe_choice.check_labels(labels, fitted.class_names)
    return Parts(fitted, chosen, tested, (train, val, test))


def _check_counts(opened: Dataset) -> None:
    """Refuses a set of which too little would be left, once images are held out."""
    labels = getattr(opened.splits[opened.first], 'labels', None)
    if labels is None:
        return
    counts = np.bincount(np.asarray(labels), minlength=len(opened.class_names))
    total, there = int(counts.sum()), int((counts > 0).sum())
    if there < 2:
        name = opened.class_names[int(counts.argmax())] if there else 'none'
        raise UserError(
            f'all {total:,} images of {opened.name} are of one class, {printable(name)}: there is '
            'nothing to tell apart. Put the images of each class into a folder of its name'
        )
    held = 'test' in opened.splits or 'validation' in opened.splits
    least = 3 if held else 4
    if (counts >= least).sum() < 2:
        raise UserError(
            f'{opened.name} has {total:,} images of {there:,} classes, and '
            f'{int((counts >= least).sum())} of the classes have {least} or more: two to fit to, '
            f'one to choose by{"" if held else ", one to test on"}. Give so many of two classes at '
            'least; ten of each class are a beginning'
        )


def look(parts: Parts) -> list[str]:
    """Sentences on what is in a set, for people."""
    train, val, test = parts.train, parts.val, parts.test
    told = [
        f'{len(train):,} images to fit to, {len(val):,} to choose by, {len(test):,} to test on in '
        f'the end; {len(train.class_names):,} classes'
    ]
    if (labels := train.labels()) is not None:
        counts = np.bincount(labels, minlength=len(train.class_names))
        most, least = int(counts.argmax()), int(counts.argmin())
        if counts[most] == counts[least]:
            told.append(f'{counts[most]:,} images of each class to fit to')
        else:
            told.append(
                f'images of a class to fit to: {counts[least]:,} '
                f'({printable(train.class_names[least])}) to {counts[most]:,} '
                f'({printable(train.class_names[most])})'
            )
        if counts[most] > 10 * max(1, counts[least]):
            told.append(
                'WARNING: the classes are of very different sizes: look at the accuracy of each in '
                'the report'
            )
        if missing := int((counts == 0).sum()):
            told.append(f'WARNING: {missing:,} classes have no image to fit to')
    sides = _sides(train)
    if len(sides):
        shown = ' to '.join(f'{w} x {h}' for h, w in (sides[0], sides[-1]))
        told.append(f'sizes: {shown} pixels (of {len(sides):,} images)')
    if len(val) < ENOUGH_VALIDATION:
        told.append(
            f'WARNING: {len(val):,} images are few to choose by: the best of several models on so '
            'few is the best in part by luck. The test images tell how good it is'
        )
    found = copies.find(train, test, seconds=_COPIES_SECONDS)
    if found and found.pairs:
        told.append(
            f'WARNING: {len(found.pairs):,} test images are copies of training images, byte for '
            f'byte, such as {" and ".join(map(printable, found.pairs[0]))}: the test flatters'
        )
    return told


def _sides(source: Selection) -> list[tuple[int, int]]:
    """Height and width of some images, the smallest first; of those that can be read."""
    places = np.unique(np.linspace(0, len(source) - 1, min(_SIZES, len(source))).astype(int))
    found = []
    for place in places.tolist():
        try:
            example = source[place]
            known = decode.size_of_jpeg(example.image, exif=source.exif)
            size = known or decode.decode(example.image, key=example.key, exif=source.exif).shape
        except UserError:  # is named where it is read
            continue
        found.append((int(size[0]), int(size[1])))
    return sorted(found, key=lambda size: size[0] * size[1])
