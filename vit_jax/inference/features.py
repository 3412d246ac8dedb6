"""What a model makes of images before its head: features, and which images are alike."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.checkpoint import npz
from vit_jax.data.batches import eval_batches
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Example, Source, channels_of, label_dtype_of
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.inference import feature_files
from vit_jax.inference.feature_files import Features
from vit_jax.inference.model_folder import Model

POOLINGS = ('class', 'mean', 'both')
PART = 512  # images, after which they are written to disk; about 10 s of a small model on a CPU
_QUERIES = 1024  # whose cosines with all others are in memory at once


def extract(
    model: Model,
    source: Source,
    *,
    layer: str = '',
    pooling: str = '',
    normalized: bool = False,
    batch: int = 32,
    keep: str | os.PathLike[str] = '',
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
      normalized: whether to give the features of an image the length 1.
      batch: images at once.
      keep: folder in which parts are kept while they are computed, see `feature_files.Parts`: the
        same call goes on where it was, also after a kill, and later has nothing to compute. Empty
        for none.
      advance: called after each batch with the number of its images.

    Returns:
      The features, and the errors of the images that could not be read.

    Raises:
      UserError: the model has no such layer or token, or not one vector for an image; or no image
        could be read.
    """
    compute = _function(model, layer, pooling, normalized)
    parts = None
    done, found, errors = 0, list[Features](), list[BadImageError]()
    if keep:
        what = {
            'format': 'vit_jax features',
            'images': len(source),
            'source': feature_files.identity_of(source),
            'preprocessing': model.preprocess.to_dict(),
            **about(model, layer=layer, pooling=pooling, normalized=normalized),
        }
        parts = feature_files.Parts(pathlib.Path(keep), what)
        done, found, errors = parts.read()
        if done:
            advance(done)
    if done < len(source):
        shape = min(batch, len(source))  # the same after a kill: no bit may depend on it
        for end, part, bad in _compute(compute, model, source, done, shape, advance):
            if parts is not None:
                parts.write(done, end, part, bad)
            done = end
            found.append(part)
            errors += bad
    joined = Features.join(found)
    if not len(joined.keys):
        raise UserError(f'not one image could be read; the first: {errors[0]}')
    return joined, errors


def _compute(
    compute: Callable[[Any, np.ndarray], jax.Array],
    model: Model,
    source: Source,
    start: int,
    batch: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Features, list[BadImageError]]]:
    """Parts of about `PART` images, and where each ends."""
    params = jax.device_put(model.params)
    recorded = Recorded(source, start)
    errors: list[BadImageError] = []
    batches = list[Features]()
    end, begin = start, start
    for data in eval_batches(recorded, model.preprocess, batch=batch, on_bad=errors.append):
        good = data['readable']
        index = data['example'][good].astype(np.int64) + start
        keys = tuple(recorded.keys.pop(place) for place in index.tolist())
        values = np.asarray(compute(params, data['image']))[good]
        batches.append(Features(values, data['label'][good], keys, index))
        read = int(np.count_nonzero(data['example'] >= 0))
        advance(read)
        end += read
        if end - begin >= PART or end == len(source):
            yield end, Features.join(batches), errors[:]
            begin = end
            batches.clear()
            errors.clear()


class Recorded:
    """The examples of a source from one on; keeps the keys of those that were read.

    Args:
      source: the examples.
      start: index of the first.

    Attributes:
      keys: index in the source -> key.
    """

    def __init__(self, source: Source, start: int = 0):
        self._source, self._start = source, start
        self.class_names, self.exif = source.class_names, source.exif
        self.label_dtype = label_dtype_of(source)
        self.channels = channels_of(source)
        self.keys: dict[int, str] = {}

    def __len__(self) -> int:
        """Examples."""
        return len(self._source) - self._start

    def __getitem__(self, index: int) -> Example:
        """An example of the source."""
        example = self._source[self._start + index]
        self.keys[self._start + index] = example.key
        return example


def _function(
    model: Model, layer: str, pooling: str, normalized: bool
) -> Callable[[Any, np.ndarray], jax.Array]:
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
        vectors = tokens.mean(1) if tokens.ndim == 3 else tokens
        return _unit(vectors, jnp) if normalized else vectors

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


def about(model: Model, *, layer: str, pooling: str, normalized: bool) -> dict[str, Any]:
    """How features were made, as JSON: the model's fingerprint, and the arguments of `extract`."""
    return {
        'fingerprint': fingerprint(model),
        'layer': layer,
        'pooling': pooling,
        'normalized': normalized,
    }


def cosines(queries: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Cosines of the angles between features [Q, D] and [N, D]: float32 [Q, N]."""
    return _unit(queries, np) @ _unit(values, np).T


def near_copies(
    queries: np.ndarray, values: np.ndarray, above: float
) -> list[tuple[int, int, float]]:
    """Which images look like one of others: for each the one that is most like it.

    Args:
      queries: features of images, [Q, D].
      values: features of the others, [N, D].
      above: the least cosine that counts.

    Returns:
      (place among the queries, place among the others, cosine), the largest cosine first.
    """
    found = list[tuple[int, int, float]]()
    for start in range(0, len(queries), _QUERIES):
        similar = cosines(queries[start : start + _QUERIES], values)
        nearest = similar.argmax(-1)
        best = similar[np.arange(len(similar)), nearest]
        for place in np.flatnonzero(best >= above).tolist():
            found.append((start + place, int(nearest[place]), float(best[place])))
    return sorted(found, key=lambda pair: -pair[2])


def _unit(x: Any, numpy: Any) -> Any:
    """Vectors [..., D] of length 1; of NumPy or of JAX."""
    return x / numpy.maximum(numpy.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
