"""The architecture that a command is about: a variant by its name, or somebody's model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_jax import variants
from vit_jax.analysis import counts
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture at an image size.

    Attributes:
      name: of the variant, or path of the model.
      model_config: see `variants.get_config`.
      num_classes: C; 0 without a head.
      image_size: side or (height, width) of the images, pixels.
      channels: of the images.
    """

    name: str
    model_config: Mapping[str, Any]
    num_classes: int
    image_size: counts.ImageSize
    channels: int = 3

    def __str__(self) -> str:
        channels = '' if self.channels == 3 else f', {self.channels} channels'
        size = variants.in_words(self.image_size)
        return f'{self.name}, {size} px{channels}, {self.num_classes} classes'


def find(
    variant: str,
    model: str = '',
    num_classes: int | None = None,
    image_size: counts.ImageSize | None = None,
) -> Architecture:
    """The architecture that a command line names.

    Args:
      variant: a name of `variants.VARIANTS`; or '', and
      model: a model folder or weights, see `model_folder.open_model`; nothing but shapes is read.
      num_classes: default 1000, or the model's own.
      image_size: default 224, or the model's own.

    Raises:
      UserError: no such variant or model, or an impossible number of classes or pixels.
    """
    if num_classes is not None and num_classes < 0:
        raise UserError(f'{num_classes} classes: expected a number from 0 (no head) up')
    if variant:
        try:
            config = variants.get_config(variant).to_dict()
        except ValueError as e:
            raise UserError(str(e)) from e
        found = Architecture(variant, config, 1000, 224)
    else:
        from vit_jax.inference import model_folder  # imports JAX, which variants do without

        opened = model_folder.open_model(model)
        config = dict(opened.model_config)
        classes = len(opened.class_names)
        found = Architecture(model, config, classes, opened.image_size, opened.channels)
    if num_classes is not None:
        found = dataclasses.replace(found, num_classes=num_classes)
    if image_size is not None:
        found = dataclasses.replace(found, image_size=image_size)
    counts.sizes(found.model_config, found.image_size)  # raises for an impossible size
    return found
