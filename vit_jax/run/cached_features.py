"""Training on embeddings of a locked image tower, which are made once: `config.cache_features`."""

import dataclasses
import itertools
from collections.abc import Callable, Generator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from vit_jax import config as config_lib
from vit_jax import evaluate
from vit_jax.data import captions
from vit_jax.data.batches import READ_AHEAD, Batch, in_order, reading_threads
from vit_jax.data.dataset import Selection
from vit_jax.data.sampler import Sampler
from vit_jax.errors import UserError
from vit_jax.run.pairs import Evaluation


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureBatches:
    """Training batches of embeddings that are kept in memory, in the place of images.

    Batch s is a function of seed and step, as that of `loader.BatchLoader`.

    Attributes:
      features: of the N images that can be read, float32 [N, C].
      examples: their indices in the source, int [N].
      tokens: of all images of the source.
      sampler: over N examples.
      places: of this process in the global batch.
    """

    features: np.ndarray
    examples: np.ndarray
    tokens: captions.Tokens
    sampler: Sampler
    places: range

    def from_step(self, start: int) -> Generator[Batch]:
        """Batches start, start + 1, ..., some ahead, made in a thread."""
        with reading_threads(1) as pool:

            def begin(step: int) -> Callable[[], Batch]:
                return pool.submit(self.__getitem__, step).result

            yield from in_order(begin, itertools.count(start), READ_AHEAD)

    def __getitem__(self, step: int) -> Batch:
        """See `loader.BatchLoader`; `image` is float32 [b, C]."""
        items = [self.sampler(step, place) for place in self.places]
        rows = np.array([index for _, index, _ in items])
        example = self.examples[rows]
        firsts, ends = (
            np.searchsorted(self.tokens.image, example, side) for side in ('left', 'right')
        )
        ids = [
            captions.draw(self.tokens.ids[first:end], key)
            for first, end, (_, _, key) in zip(firsts, ends, items, strict=True)
        ]
        return {
            'image': self.features[rows],
            'label': np.stack(ids),
            'position': np.array([place for place, _, _ in items], np.int32),
            'example': example.astype(np.int32),
            'replaced': np.zeros(len(items), np.int32),
        }


def cached_batches(
    config: ml_collections.ConfigDict,
    evaluation: Evaluation,
    params: Any,
    train: Selection,
    mesh: Mesh,
    on_bad: Callable[[Any], None],
) -> FeatureBatches:
    """Embeds all training images once, for `config.cache_features`.

    Args:
      config: resolved.
      evaluation: of the run.
      params: on the devices.
      train: the training pairs.
      mesh: the devices.
      on_bad: is told of images that cannot be read, which are left out.

    Raises:
      UserError: too many images cannot be read, or too few are left for a batch.
    """
    told = evaluate.collect(
        evaluation.image_step,
        params,
        train,
        config_lib.preprocess_of(config),
        mesh,
        batch=config.batch_eval,
        threads=config.data_threads or None,
        on_bad=on_bad,
    )
    assert told is not None  # nothing stops it
    tokens = captions.Tokens.of(train, evaluation.pairs.tokenizer)
    usable = tokens.usable(told['readable'])
    bad, examples = int((~usable).sum()), np.flatnonzero(usable)
    if bad > config.max_unreadable * len(train) or len(examples) < config.batch:
        raise UserError(
            f'{bad:,} of {len(train):,} training images cannot be read (they are named above); '
            f'--config.max_unreadable={config.max_unreadable:g} allows a share of that. Repair or '
            'remove them, or raise it'
        )
    part = config.batch // jax.process_count()
    places = range(jax.process_index() * part, (jax.process_index() + 1) * part)
    sampler = Sampler(len(examples), config.batch, config.seed)
    return FeatureBatches(told['embedding'][usable], examples, tokens, sampler, places)
