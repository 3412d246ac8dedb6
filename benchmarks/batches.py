"""The batches of a benchmark: made up, or of a dataset through our own input pipeline."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.errors import UserError


def on_device(setup: Mapping[str, Any], put: Callable[[dict[str, np.ndarray]], Any]) -> Iterator:
    """Endless batches for a contestant; every contestant of a cell gets the same ones.

    Args:
      setup: `batch`, `image_size`, `num_classes`, `cores`, and `data`: '' for made-up images, of
        which one batch stays on the device, else a folder or dataset.
      put: brings a host batch to the device: a dict of `image` float32 [B, S, S, 3] in [0, 255],
        and `label`, `position` int32 [B].

    Raises:
      UserError: the dataset cannot be opened, or has more classes than the model.
    """
    if setup['data']:
        yield from map(put, _read(setup))
        return
    size, side = setup['batch'], setup['image_size']
    rng = np.random.default_rng(0)
    batch = put({
        'image': rng.uniform(0, 255, (size, side, side, 3)).astype(np.float32),
        'label': rng.integers(setup['num_classes'], size=size).astype(np.int32),
        'position': np.arange(size, dtype=np.int32),
    })  # fmt: skip
    while True:
        yield batch


def _read(setup: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    # Not at the top: the peers of made-up images need none of it.
    from vit_jax.data import loader, sources
    from vit_jax.data.preprocess import Preprocess

    train, _ = sources.open_sources(setup['data'])
    if len(train.class_names) > setup['num_classes']:
        raise UserError(
            f'{setup["data"]} has {len(train.class_names)} classes and the model '
            f'{setup["num_classes"]}: use --num_classes {len(train.class_names)}'
        )
    batches = loader.BatchLoader(
        train, Preprocess(crop=setup['image_size']), batch=setup['batch'], seed=0
    )
    for batch in batches.from_step(0, threads=setup.get('cores') or None):
        yield {name: batch[name] for name in ('image', 'label', 'position')}
