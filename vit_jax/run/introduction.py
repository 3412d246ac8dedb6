"""What the log of a run says before it trains: what is about to run, on what, and what is odd."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from vit_jax import config as config_lib
from vit_jax import groups
from vit_jax.data import copies
from vit_jax.data.dataset import Selection
from vit_jax.data.holdout import coverage_notes
from vit_jax.inference.task import NUMBERS
from vit_jax.run import augmentation, recipe
from vit_jax.run.choice import FEW
from vit_jax.run.setup import Setup
from vit_jax.variants import in_words

if TYPE_CHECKING:
    from vit_jax import loop


def introduce(run: 'loop.Run', setup: Setup) -> None:
    """Says what is about to run on what."""
    config, log = run.config, run.log
    params = setup.abstract.params
    count, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(part))
        for part in (params, groups.partition(params, setup.frozen)[0])
    )
    part = f', of which {trained:,} ({trained / count:.2%}) are trained' * bool(setup.frozen)
    devices, kind = run.mesh.devices.size, run.mesh.devices.flat[0].device_kind
    dtype, processes = config_lib.compute_dtype(config, jax.default_backend()), jax.process_count()
    name = config.model.model_name if setup.parts.model is None else type(setup.model).__name__
    how = 'data parallel' if run.mesh.shape['fsdp'] == 1 else f'fsdp={run.mesh.shape["fsdp"]}'
    how += f', {processes} processes' if processes > 1 else ''
    log.info(
        f'model: {name}, {count:,} parameters{part}, {dtype}, '
        f'{in_words(run.preprocess.crop)} px, on {devices} x {kind} ({how})',
        'started',
        parameters=count,
        trained=trained,
        dtype=dtype,
        devices=devices,
        kind=kind,
        processes=processes,
    )
    names = run.train.class_names
    told = f'{len(names)} {"numbers" if run.task.kind == NUMBERS else "classes"}: '
    told += ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
    if setup.pairs is not None:
        told = f'texts of up to {setup.pairs.tokenizer.max_len} tokens'
    tested = f'tested on {run.test!r}'
    if run.val is not None:
        tested = f'validated on {run.val!r}, tested once, at the end, on {run.test!r}'
    log.info(f'data: {run.train!r}, {tested}; {told}')
    if setup.schedule is not None:
        log.info(f'schedule: {recipe.describe_schedule(config, run.train)}')
    images = augmentation.describe(config)
    if images:
        log.info(f'training images: {images}')
    common = run.train.overlap(run.test) if isinstance(run.train, Selection) else 0
    if common:
        log.info(
            f'WARNING: {common:,} of the {len(run.test):,} test images are trained on as well: '
            'set both --config.pp.train and --config.pp.test'
        )
    for note in _data_notes(run):
        log.info(f'WARNING: {note}')
    if processes > 1:
        log.info(
            f'{processes} processes: when one ends too early, so do the others; the same '
            'commands again go on from the last checkpoint'
        )
    own = [
        f'{name} {setup.data[name]}' for name in ('loss_fn', 'tx', 'model') if name in setup.data
    ]
    if own:
        log.info(f'given by the caller: {", ".join(own)}')
    if setup.changed:
        log.info(f'settings that changed since this run began: {"; ".join(setup.changed)}')
    log.info(f'workdir: {run.workdir}')


def _data_notes(run: 'loop.Run') -> list[str]:
    """What is known to be wrong with the examples; labels and files are, where none is read."""
    notes = list[str]()
    if run.val is not None and len(run.val) < FEW and config_lib.chooses(run.config):
        notes.append(
            f'{len(run.val):,} validation images are few to choose by (config.keep_best, '
            f'config.patience): the best of many results on under {FEW} is the best by luck, and '
            'flatters'
        )
    if not isinstance(run.train, Selection):
        return notes
    names = run.train.class_names
    train, test = run.train.labels(), run.test.labels()
    if train is not None and test is not None:
        train, test = (np.bincount(labels, minlength=len(names)) for labels in (train, test))
        notes += coverage_notes(names, train, test)
    if jax.process_index() == 0:
        notes += copies.notes(run.train, run.test, run.config.dataset)
    return notes
