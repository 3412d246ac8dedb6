"""What a model makes of images before its head: features, and which images are alike."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.checkpoint import npz
from vit_jax.data.batches import eval_batches
from vit_jax.data.dataset import Example, Source, channels_of, label_dtype_of
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.inference.model_folder import Model

POOLINGS = ('class', 'mean', 'both')


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the images of a source that could be read, in its order.

    Attributes:
      values: float32 [N, D].
      label: int32 [N], as the source tells them.
      keys: what a person calls each image: its path.
    """

    values: np.ndarray
    label: np.ndarray
    keys: tuple[str, ...]


def extract(
    model: Model,
    source: Source,
    *,
    layer: str = '',
    pooling: str = '',
    batch: int = 32,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[Features, list[BadImageError]]:
    """Computes the features of all images of a source.

    Args:
      model: what `model_folder.load` gives.
      source: at least one image.
      layer: '' for what the head reads; the index of an encoder block, from '0'; or 'encoded', the
        tokens after the final norm.
      pooling: of the tokens of a layer: 'class' (the class token), 'mean' (of the patches), 'both'
        (one after the other); '' for 'class' where there is one. Not without `layer`.
      batch: images at once.
      advance: called after each batch with the number of its images.

    Returns:
      The features, and the errors of the images that could not be read.

    Raises:
      UserError: the model has no such layer or token, or not one vector for an image.
    """
    compute = _function(model, layer, pooling)
    params = jax.device_put(model.params)
    recorded = Recorded(source)
    errors: list[BadImageError] = []
    values, label, example = [], [], []
    for data in eval_batches(
        recorded, model.preprocess, batch=min(batch, len(source)), on_bad=errors.append
    ):
        good = data['readable']
        values.append(np.asarray(compute(params, data['image']))[good])
        label.append(data['label'][good])
        example.append(data['example'][good])
        advance(int(np.count_nonzero(data['example'] >= 0)))
    keys = tuple(recorded.keys[index] for index in np.concatenate(example).tolist())
    return Features(np.concatenate(values), np.concatenate(label), keys), errors


class Recorded:
    """A source that keeps the keys of the examples that were read.

    Attributes:
      keys: index -> key.
    """

    def __init__(self, source: Source):
        self._source = source
        self.class_names, self.exif = source.class_names, source.exif
        self.label_dtype = label_dtype_of(source)
        self.channels = channels_of(source)
        self.keys: dict[int, str] = {}

    def __len__(self) -> int:
        """Examples."""
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        """An example of the source."""
        example = self._source[index]
        self.keys[index] = example.key
        return example


def _function(model: Model, layer: str, pooling: str) -> Callable[[Any, np.ndarray], jax.Array]:
    """The jitted function (params, pixels [B, height, width, 3]) -> features [B, D]."""
    module: Any = model.model
    name = f'Transformer/encoderblock_{layer}/tokens' if layer.isdecimal() else layer
    prefix = getattr(module, 'prefix_tokens', 0)
    if pooling and (not layer or pooling not in POOLINGS):
        raise UserError(f'pooling {pooling!r}: one of {", ".join(POOLINGS)}, of a layer')
    if layer and pooling in ('class', 'both') and not prefix:
        raise UserError('this model has no class token: use the pooling mean')

    def compute(params: Any, pixels: np.ndarray) -> jax.Array:
        _, inside = models.apply_with_intermediates(module, params, normalize(pixels))
        tokens = inside[name or 'pre_logits']
        if layer:
            how = pooling or ('class' if prefix else 'mean')
            parts = [tokens[:, 0]] if how != 'mean' else []
            parts += [tokens[:, prefix:].mean(1)] if how != 'class' else []
            tokens = jnp.concatenate(parts, axis=-1)
        return tokens.mean(1) if tokens.ndim == 3 else tokens

    side = jax.ShapeDtypeStruct((1, *model.preprocess.size, 3), jnp.float32)
    try:
        jax.eval_shape(compute, model.params, side)
    except KeyError as error:
        raise UserError(
            f"the model has no layer {layer!r}: give the index of an encoder block, or 'encoded'"
        ) from error
    return jax.jit(compute)


def fingerprint(model: Model) -> str:
    """SHA-256 of all parameters with their names: features of one model can be compared."""
    digest = hashlib.sha256()
    for name, leaf in sorted(npz.flatten(model.params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def cosines(queries: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Cosines of the angles between features [Q, D] and [N, D]: float32 [Q, N]."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return unit(queries) @ unit(values).T
