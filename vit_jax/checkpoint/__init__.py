"""Weights: reading and writing released files, fitting them to a model, checkpoints of a run.

The names of the original release (`load`, `load_pretrained`) keep their meaning.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from vit_jax.checkpoint import adapt
from vit_jax.checkpoint.adapt import Report
from vit_jax.checkpoint.arrays import Weights
from vit_jax.checkpoint.formats import load, open_weights
from vit_jax.checkpoint.npz import save

__all__ = ['Report', 'Weights', 'adapt', 'load', 'load_pretrained', 'open_weights', 'save']


def load_pretrained(
    *,
    pretrained_path: str | os.PathLike[str],
    init_params: Mapping[str, Any],
    model_config: Mapping[str, Any],
    keep_head: bool = False,
) -> Mapping[str, Any]:
    """Loads a released checkpoint for fine-tuning, as the original release's function of this name.

    The head is always newly initialised, also where the classes agree (`keep_head` keeps one that
    fits),
    `pre_logits` is kept only if the model has it, position embeddings are resized. What was loaded,
    resized, newly initialised and ignored is logged (INFO); `adapt.adapt` returns it instead.

    Args:
        pretrained_path: weights of any kind that `load` knows.
        init_params: the model's newly initialised parameters (nested dict of arrays).
        model_config: the model's config, a dict or ConfigDict; 'classifier' is read ('token' if it
            is not there).
        keep_head: take the checkpoint's head if it fits.

    Returns:
        Parameters with the structure, shapes and dtypes of `init_params`.

    Raises:
        UserError: the file cannot be read, or its arrays do not fit the model (all that do not are
            listed).
    """
    params, report = adapt.adapt(
        load(pretrained_path),
        init_params,
        classifier=model_config.get('classifier', 'token'),
        keep_head=keep_head,
        source=os.fspath(pretrained_path),
    )
    logging.getLogger(__name__).info('%s', report)
    return params
