"""The images of a run, for its report: opened again, counted and sampled."""

import pathlib

import numpy as np

from vit_jax import files
from vit_jax.analysis.run_files import Run
from vit_jax.data import remote, sources
from vit_jax.data.dataset import Selection
from vit_jax.data.holdout import coverage_notes
from vit_jax.errors import UserError

MAX_IMAGES = 2000  # to count or to predict; with more, a sample of so many
_SEED = 0  # of the samples


def open_data(run: Run) -> tuple[Selection, Selection]:
    """The training and test examples of a run; nothing is downloaded or prepared.

    Raises:
      UserError: the run does not tell, or the dataset is not there, or is another than it was.
    """
    if not run.config or not run.data:
        raise UserError('config.json and data.json tell what the data are, and one is missing')
    try:
        dataset, data_dir = run.config['dataset'], run.config['tfds_data_dir']
        specs = [run.data[name]['split'] for name in ('train', 'test')]
        before = [run.data[name]['fingerprint'] for name in ('train', 'test')]
        channels = run.config.get('pp', {}).get('channels', 3)
        told = {name: run.config.get(name, '') for name in sources.TOLD}
        if not all(isinstance(text, str) for text in (dataset, data_dir, *specs, *told.values())):
            raise TypeError('dataset and splits should be texts')
        if type(channels) is not int or not 1 <= channels <= 1000:
            raise TypeError('pp.channels should be a number of channels')
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'config.json or data.json is damaged ({error!r})') from error
    if not dataset:
        raise UserError('the run was given its data by a program, not by name')
    root = place(dataset)
    if dataset != 'digits' and not root.exists():
        _check_prepared(dataset, data_dir)
    name = str(root) if remote.scheme_of(dataset) else dataset
    opened = sources.open_dataset(name, tfds_data_dir=data_dir, channels=channels, **told)
    train, test = (opened.select(spec) for spec in specs)
    if [train.fingerprint(), test.fingerprint()] != before:
        raise UserError(f'the dataset {dataset} is another than when the run began')
    return train, test


def place(dataset: str) -> pathlib.Path:
    """Where a folder or table is, if the dataset is one; of one in cloud storage, the copy.

    Raises:
      UserError: there is no copy.
    """
    if not remote.is_remote(dataset, 'the dataset'):
        return files.expand(dataset)
    copy = remote.existing_copy(dataset)
    if copy is None:
        raise UserError(f'of {dataset} there is no copy on this machine')
    return copy


def class_balance(
    train: Selection, test: Selection
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Counts the images of each class; where labels have to be read, in a sample.

    Returns:
      int64 [C] for 'training' and 'test'; and notes on what was counted, where not all was, and on
      classes that are missing.
    """
    found, notes, complete = {}, [], True
    for split, source in (('training', train), ('test', test)):
        if train.several:
            found[split] = np.asarray(source.targets()).sum(axis=0).astype(np.int64)
            continue
        known = source.labels()
        if known is None:
            indices = sample(len(source), MAX_IMAGES)
            known = np.array([_label(source, index) for index in indices])
            if len(indices) < len(source):
                complete = False
                notes.append(
                    f'Of the {len(source):,} {split} images a fixed random sample of '
                    f'{len(indices):,} was counted.'
                )
            if (known < 0).any():
                notes.append(f'{(known < 0).sum():,} records could not be read.')
            known = known[known >= 0]
        found[split] = np.bincount(known, minlength=len(source.class_names))
    if complete:
        notes += [f'{note}.' for note in coverage_notes(train.class_names, *found.values())]
    return found, tuple(notes)


def sample(count: int, limit: int) -> np.ndarray:
    """Sorted indices: all of `count`, or a random sample of `limit`, the same every time."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(_SEED).choice(count, limit, replace=False))


def _check_prepared(name: str, data_dir: str) -> None:
    """Raises if a TFDS set would have to be downloaded or converted first."""
    from vit_jax.data import tfds_metadata, tfds_sets

    if tfds_metadata.parse_name(name) is None:
        return  # a folder that is gone, as opening it will say
    if tfds_sets.array_record_folder(tfds_sets.find_builder(name, data_dir)) is None:
        raise UserError(f'the dataset {name} is not on this machine')


def _label(source: Selection, index: int) -> int:
    try:
        return int(source[int(index)].label)
    except UserError:  # a damaged record
        return -1
