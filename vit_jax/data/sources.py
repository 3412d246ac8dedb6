"""Opens datasets of every kind: TFDS sets, folders, tables, files of many images, digits."""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import files
from vit_jax.data import (
    array_records,
    captions,
    folders,
    hugging_face,
    remote,
    shards,
    splits,
    table_files,
    tables,
    tfds_sets,
    webdataset,
)
from vit_jax.data import columns as columns_lib
from vit_jax.data.dataset import Dataset, Selection
from vit_jax.data.examples import Example
from vit_jax.data.holdout import stratified_order
from vit_jax.data.text import Tokenizer
from vit_jax.errors import UserError, extra

_log = logging.getLogger(__name__)

# What a run's config says of a dataset, beside its name and where it is.
TOLD = ('columns', 'image_root', 'group')
HELD_OUT = '10%'  # of the training examples, where validation is needed and nothing says which


def open_sources(
    dataset: str,
    *,
    train_split: str = '',
    test_split: str = '',
    **options: Any,
) -> tuple[Selection, Selection]:
    """Opens the training and the test examples of a dataset.

    Args:
      dataset: see `open_dataset`.
      train_split: split specification (`Dataset.select`); '' takes `Dataset.default_specs`.
      test_split: likewise.
      **options: see `open_dataset`.

    Returns:
      (training examples, test examples).

    Raises:
      UserError: anything wrong with the dataset or the splits; the message says what to do.
    """
    return _train_and_test(open_dataset(dataset, **options), train_split, test_split)


def open_three(
    dataset: str,
    *,
    train_split: str = '',
    val_split: str = '',
    test_split: str = '',
    validate: bool = False,
    fold: str = '',
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> tuple[Selection, Selection | None, Selection]:
    """Opens the training, validation and test examples of a dataset.

    Args:
      dataset: as the others, see `open_sources`.
      train_split: as `test_split`, see `open_sources`.
      val_split: a split specification, or a share such as `10%`. Either is taken out of the
        training examples.
      test_split: see `open_sources`.
      validate: whether there have to be validation examples: without a `val_split`, those of a
        stored split `validation` that is neither trained nor tested on, else a tenth of the
        training examples.
      fold: such as `2/5`: test on that fold of the training examples (`Selection.fold`), and train
        on the others; not with a `test_split`.
      tokenizer: of captions, which are then the labels, see `data.captions`.
      **options: see `open_dataset`.

    Returns:
      (training examples, validation examples or None, test examples).

    Raises:
      UserError: as `open_sources`; or validation examples are tested on as well, or a group is on
        both sides of a split.
    """
    if tokenizer is not None:
        options['columns'] = columns_lib.with_captions(options.get('columns', ''))
    opened = open_dataset(dataset, **options)
    if tokenizer is not None:
        opened = captions.tokenized(opened, tokenizer)
    train, val, test = _three(opened, train_split, val_split, test_split, validate, fold)
    check_groups({'training': train, 'validation': val, 'test': test})
    return train, val, test


def check_groups(examples: Mapping[str, Selection | None]) -> None:
    """Refuses groups (patients, scenes) that are on both sides of a split.

    Two parts that are the same examples, at least in part, are none: that is another matter.

    Args:
      examples: parts of a dataset, by what they are for.

    Raises:
      UserError: names a group and where it is.
    """
    known = {name: part for name, part in examples.items() if part is not None}
    for (name, part), (other, others) in itertools.combinations(known.items(), 2):
        groups, theirs = part.groups(), others.groups()
        if groups is None or theirs is None or part.overlap(others):
            continue
        common = np.intersect1d(groups, theirs)
        if len(common):
            raise UserError(
                f'{len(common):,} groups are in the {name} and in the {other} examples, {part!r} '
                f'and {others!r}: {", ".join(common[:3])}{", ..." * (len(common) > 3)}. Leave '
                '--config.pp.train and --config.pp.test out, or name splits that keep groups whole'
            )


def _three(
    opened: Dataset, train_split: str, val_split: str, test_split: str, validate: bool, fold: str
) -> tuple[Selection, Selection | None, Selection]:
    if fold:
        train, test = opened.select(train_split or opened.first).fold(fold)
    else:
        train, test = _train_and_test(opened, train_split, test_split)
    if not val_split and validate:
        stored = opened.select('validation') if 'validation' in opened.splits else None
        free = stored and not stored.overlap(train) and not stored.overlap(test)
        val_split = 'validation' if free else HELD_OUT
    if not val_split:
        return train, None, test
    if splits.is_share(val_split):
        return *train.hold_out(val_split.strip()), test
    val = opened.select(val_split)
    if common := val.overlap(test):
        raise UserError(
            f'config.pp.val={val_split!r}: {common:,} of these {len(val):,} images are those of '
            f'the test, {test.spec}, which nothing may be chosen on; name other splits with '
            f"--config.pp.val and --config.pp.test, or hold out of training: --config.pp.val='10%'"
        )
    return train.without(val), val, test


def _train_and_test(opened: Dataset, train: str, test: str) -> tuple[Selection, Selection]:
    defaults = opened.default_specs()
    return opened.select(train or defaults[0]), opened.select(test or defaults[1])


def is_path(dataset: str) -> bool:
    """Whether `open_dataset` takes this for a folder or a file, whatever sets of that name are."""
    return bool(remote.scheme_of(dataset)) or (bool(dataset) and files.expand(dataset).exists())


def lasting_name(dataset: str) -> str:
    """A name that means the same once the folder is gone: './cifar10' of a folder 'cifar10'."""
    plain = os.path.basename(dataset) == dataset
    return os.path.join(os.curdir, dataset) if plain and is_path(dataset) else dataset


def open_dataset(
    dataset: str,
    *,
    tfds_data_dir: str = '',
    tfds_manual_dir: str = '',
    channels: int = 3,
    columns: str = '',
    image_root: str = '',
    group: str = '',
    max_unreadable: float = 1.0,
) -> Dataset:
    """Opens a dataset by its name or path.

    Args:
      dataset: a folder of images (`vit_jax.data.folders`), a table of them (`tables`), or files of
        many (`hugging_face`, `webdataset`, `array_records`), here or in cloud storage, of which a
        copy in the cache is brought up to date (`remote.local_copy`); where there is none, `digits`
        (scikit-learn's handwritten digits), or the name of an image classification set of TFDS:
        `tf_flowers`, `name/config`, `name:version`. Where both are there, the log says so.
      tfds_data_dir: where TFDS sets are; '' is TFDS's default (`TFDS_DATA_DIR`, or
        ~/tensorflow_datasets). A set that is not there is downloaded and prepared, one that is
        there as TFRecord is converted, in a child process.
      tfds_manual_dir: files that had to be downloaded by hand, for the few sets that need it.
      channels: that images are to have: 3 (RGB), 1 (grey), or those of .npy files in a folder.
      columns: of a table or the like, which column is what; see `columns.choose_columns`. With the
        role `caption` the dataset has to have captions, see `data.captions`: it may then also be a
        folder with `captions.csv` (`.jsonl`, `.parquet`), a TFDS set that has captions, or
        `digits_captions`.
      image_root: of a table, the folder that its paths start from; '' for that of the table.
      group: of a folder, regular expression of what an image belongs to, see `folders.open_folder`.
      max_unreadable: of rows, the largest share that may be unusable; others are named in the
        log.

    Returns:
      The dataset; only descriptions have been read, no images.

    Raises:
      UserError: no such dataset, or one that cannot be used; the message says what to do.
    """
    if not dataset:
        raise UserError(
            'no dataset given: --config.dataset takes the name of a TFDS set, a folder or digits'
        )
    if remote.is_remote(dataset, 'the dataset'):
        path = remote.local_copy(dataset, _log.warning)
    else:
        path = files.expand(dataset)
    if not path.exists() and path.suffix.lower() in table_files.SUFFIXES:
        raise UserError(f'there is no table {dataset} (seen from {pathlib.Path.cwd()})')
    if image_root and remote.is_remote(image_root, 'config.image_root'):
        image_root = os.fspath(remote.local_copy(image_root, _log.warning))
    options = {'channels': channels, 'max_unreadable': max_unreadable}
    pairs = columns_lib.wants_captions(columns)
    opened = _open_rows(path, dataset, columns, image_root, options)
    if opened:
        if group:
            raise UserError(
                f'config.group={group!r} is for folders, whose paths tell the group; rows have a '
                "column for it: --config.columns='group=NAME'"
            )
        return opened
    if pairs:
        told = {'data_dir': tfds_data_dir, 'manual_dir': tfds_manual_dir}
        return _open_pairs(path, dataset, columns, image_root, group, **told)
    for knob, value in (('columns', columns), ('image_root', image_root)):
        if value:
            raise UserError(
                f'config.{knob}={value!r} is for tables and the like, and {dataset} is none: '
                'leave it out'
            )
    if path.is_dir():
        if dataset == 'digits' or tfds_sets.is_known(dataset):
            _log.warning(
                'Note: the dataset %s is the folder %s, not the set of that name; for the set, %s',
                dataset,
                path.absolute(),
                'start in another folder' if dataset == 'digits' else f'name it {dataset}:*.*.*',
            )
        return folders.open_folder(path, dataset, channels=channels, group=group)
    if group:
        raise UserError(
            f'config.group={group!r} is for folders, whose paths tell the group, and {dataset} is '
            'none: leave it out'
        )
    if dataset == 'digits':
        return _open_digits(channels)
    if path.exists():
        raise UserError(
            f'dataset {dataset} is a file, but no table ({", ".join(table_files.SUFFIXES)}), .tar, '
            '.arrow or .array_record; or give the folder that holds those of the classes'
        )
    _check_name(dataset)
    opened = tfds_sets.open_tfds(dataset, tfds_data_dir, tfds_manual_dir)
    return dataclasses.replace(opened, channels=channels)


def _open_rows(
    path: pathlib.Path, dataset: str, columns: str, image_root: str, options: dict[str, Any]
) -> Dataset | None:
    """A dataset whose labels stand in rows; None of folders of classes, and of names."""
    if not path.exists():
        return None
    suffix = path.suffix.lower()
    parts: list[tables.Part] = []
    if path.is_dir():
        pairs = columns_lib.wants_captions(columns)
        parts = tables.find_metadata(path, told=bool(columns), captions=pairs)
    if suffix in table_files.SUFFIXES and not path.is_dir():
        if suffix != '.parquet' or table_files.has_paths(path, dataset, columns):
            parts = [tables.Part(path)]
    if parts:
        return tables.open_tables(parts, dataset, columns=columns, image_root=image_root, **options)
    kind = shards.kind_of(path)
    if kind and image_root:
        raise UserError(
            f'config.image_root={image_root!r} is for tables with paths, and {dataset} holds the '
            'images themselves: leave it out'
        )
    if kind == 'hugging_face':
        return hugging_face.open_files(path, dataset, columns=columns, **options)
    if kind == 'webdataset':
        return webdataset.open_files(path, dataset, columns=columns, **options)
    if kind == 'array_record':
        return array_records.open_files(path, dataset, columns=columns, **options)
    return None


def _check_name(dataset: str) -> None:
    """Refuses what is spelled as a folder, and is none."""
    if (
        dataset.startswith(('/', './', '../', '~'))
        or dataset in ('.', '..')
        or dataset.endswith('/')
    ):
        raise UserError(f'there is no folder {dataset} (seen from {pathlib.Path.cwd()})')


def _open_pairs(
    path: pathlib.Path, dataset: str, columns: str, image_root: str, group: str, **options: Any
) -> Dataset:
    """A dataset of images with captions that stand in no rows; `options` as of `open_tfds`."""
    if path.exists() and path.is_dir() and dataset != captions.DIGITS:
        raise UserError(
            f'{dataset} has no captions: expected captions.csv, captions.jsonl or captions.parquet '
            'in it, with the columns image and caption (--config.columns=image=NAME,caption=NAME '
            'says which they are)'
        )
    if dataset == 'digits':
        raise UserError('digits has no captions: digits_captions has the same images in colours')
    told = {'columns': columns if columns != columns_lib.with_captions('') else ''}
    for knob, value in (told | {'image_root': image_root, 'group': group}).items():
        if value:
            raise UserError(
                f'config.{knob}={value!r} is for tables and the like, and {dataset} is none: '
                'leave it out'
            )
    if dataset == captions.DIGITS:
        return captions.open_digits()
    _check_name(dataset)
    return tfds_sets.open_tfds(dataset, captions=True, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pixels:
    """A split held in memory: images uint8 [examples, height, width, 3], labels int [examples]."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Example:
        return Example(self.images[index], int(self.labels[index]), f'{self.name}/{index}')

    def identity(self) -> tuple[str, ...]:
        return self.name, str(len(self))


@functools.cache
def _open_digits(channels: int = 3) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, in stratified order."""
    with extra('train'):
        from sklearn import datasets

    digits = datasets.load_digits()
    order = stratified_order(digits.target)
    grey = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # stored as 0 .. 16
    images = np.repeat(grey[..., None], channels, axis=-1)
    split = _Pixels('digits:train', images, digits.target[order])
    names = tuple(str(i) for i in range(10))
    return Dataset('digits', names, False, {'train': split}, channels)
