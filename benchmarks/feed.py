"""The batches of a benchmark: made up, or of a dataset through our own input pipeline."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def batches(setup: Mapping[str, Any]) -> tuple[Iterator[dict[str, np.ndarray]], bool]:
    """Host batches for a contestant; every contestant of a cell gets the same ones.

    Args:
      setup: `batch`, `image_size`, `num_classes`, and `data`: '' for made-up images, else a folder
        or dataset.

    Returns:
      An endless iterator over dicts of `image` float32 [B, S, S, 3] in [0, 255], `label`,
      `position`, `replaced` int32 [B]; and whether it always gives the same batch, which can then
      stay on the device.

    Raises:
      UserError: the dataset cannot be opened, or has more classes than the model.
    """
    if not setup['data']:
        return _made_up(setup), True
    return _from_dataset(setup), False


def _made_up(setup: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    batch, side = setup['batch'], setup['image_size']
    rng = np.random.default_rng(0)
    arrays = {
        'image': rng.uniform(0, 255, (batch, side, side, 3)).astype(np.float32),
        'label': rng.integers(setup['num_classes'], size=batch).astype(np.int32),
        'position': np.arange(batch, dtype=np.int32),
        'replaced': np.zeros(batch, np.int32),
    }
    while True:
        yield dict(arrays)


def _from_dataset(setup: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    from vit_jax.data import loader, sources
    from vit_jax.data.preprocess import Preprocess
    from vit_jax.errors import UserError

    train, _ = sources.open_sources(setup['data'])
    if len(train.class_names) > setup['num_classes']:
        raise UserError(
            f'{setup["data"]} has {len(train.class_names)} classes and the model '
            f'{setup["num_classes"]}: use --num_classes {len(train.class_names)}'
        )
    dataset = loader.train_dataset(
        train, Preprocess(crop=setup['image_size']), batch=setup['batch'], seed=0
    )
    with loader.train_batches(dataset, start=0, threads=setup.get('cores') or None) as iterator:
        for batch in iterator:
            del batch['example']
            yield batch
