"""Settings and examples that many tests take: knobs, a run of a moment, images."""

import ml_collections
import numpy as np

from vit_jax import config as config_lib
from vit_jax import data, train
from vit_jax.configs import common, digits
from vit_jax.data import dataset, own


def knobs(**changes) -> ml_collections.ConfigDict:
    """All knobs at their defaults, but for the changes."""
    config = common.get_defaults()
    config.update(changes)
    return config


def run_config(**changes) -> ml_collections.ConfigDict:
    """Settings of a run of 6 steps, with a model that compiles in a moment, for images of 16 px.

    Args:
      **changes: by dotted names, as flags.
    """
    config = digits.get_config()
    config.model.hidden_size, config.model.patches.size = 16, (8, 8)
    config.model.transformer.update(mlp_dim=32, num_heads=2, num_layers=1, dropout_rate=0.0)
    config.batch, config.batch_eval, config.total_steps, config.warmup_steps = 8, 8, 6, 2
    config.progress_every, config.eval_every, config.checkpoint_every = 1, 2, 2
    config.compile_cache, config.report = '', False
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config, changes)


def images(labels, names=('a', 'b', 'c')) -> dataset.Selection:
    """Black images of 8 px with these labels, as a run has them."""
    pixels = np.zeros((len(labels), 8, 8, 3), np.uint8)
    return own.as_selection(data.from_arrays(pixels, labels, names), 'train')


def stream() -> data.BatchStream:
    """A black image, as another library gives batches."""
    return data.BatchStream(iter([(np.zeros((1, 8, 8, 3)), [0])]), ('a', 'b'))


def run(config, workdir, callbacks=()):
    """Trains on 30 images of noise of three classes, and tests on 10 others."""
    rng = np.random.RandomState(0)
    pixels, labels = rng.randint(0, 256, (40, 16, 16, 3)).astype(np.uint8), rng.randint(0, 3, 40)
    sources = tuple(
        data.from_arrays(pixels[part], labels[part], ('cat', 'dog', 'cow'))
        for part in (slice(30), slice(30, 40))
    )
    return train.train_and_evaluate(config, workdir, sources=sources, callbacks=callbacks)
