"""Weights alone, without a model folder: which model they are of."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from vit_jax.checkpoint import formats, infer, model_input, npz
from vit_jax.errors import UserError
from vit_jax.inference import description, labels

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What weights are taken for.

    Attributes:
        weights: without what the model has no place for; the notes say what was left out.
        config: the arguments of the module, see `model_folder.Model.model_config`.
        image_size: side of the input, or (height, width), pixels.
        class_names: one per class of the head; 'class 0', ... where the file does not tell.
    """

    weights: formats.Weights
    config: Mapping[str, Any]
    image_size: int | tuple[int, int]
    class_names: tuple[str, ...]


def recognise(
    path: pathlib.Path, weights: formats.Weights, variant: str, resize: bool
) -> Recognised:
    """Finds the architecture from the shapes of the arrays and what the file tells beside them.

    Args:
        path: of the weights, for messages.
        weights: not yet read.
        variant: what it has to be, see `model_folder.load`.
        resize: see `model_folder.open_model`.

    Raises:
        UserError: they are not of a known model, or of too many classes.
    """
    _log.info('%s', weights)
    for guess in weights.assumed:
        _log.warning('%s: %s', path, guess)
    if weights.projects:
        params = {name: leaf for name, leaf in weights.params.items() if name != 'head'}
        note = 'its head, which projects to the space of texts, is left out: it knows no classes'
        weights = dataclasses.replace(weights, params=params, notes=(*weights.notes, note))
    # With a head on the class token alone, as DeiTForImageClassification, or none, as DeiTModel.
    lonely = 'dist' in weights.params and 'head_dist' not in weights.params
    if lonely and weights.format.startswith('Hugging Face'):
        params = {name: leaf for name, leaf in weights.params.items() if name != 'dist'}
        params['registers'] = weights.params['dist']
        note = 'no head reads the distillation token, which is kept as a register token'
        weights = dataclasses.replace(weights, params=params, notes=(*weights.notes, note))
    config = infer.architecture(
        weights.params, str(path), variant=variant, settings=weights.settings
    )
    image_size = infer.image_size(weights.params, config, str(path), weights.image_size)
    weights, image_size = model_input.fit_positions(weights, config, image_size, resize=resize)
    classes = num_classes(weights.params)
    if classes > description.MAX_CLASSES:  # each gets a name, which takes more than its weights
        raise UserError(
            f'{path} has a head of {classes:,} classes; at most {description.MAX_CLASSES:,} fit'
        )
    class_names = weights.class_names
    if len(class_names) != classes:
        class_names = labels.numbered(classes)
    return Recognised(weights, config, image_size, class_names)


def num_classes(params: Mapping[str, Any]) -> int:
    """From either array of the head: `check` names the other if it is missing. 0 without a head."""
    head = npz.flatten({'head': params.get('head', {})})
    return next((array.shape[-1] for array in head.values()), 0)
