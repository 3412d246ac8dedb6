"""Fits a checkpoint to a model: head, position grid, `pre_logits`; accounts for every array.

The rules are those of the original release's `load_pretrained`; what it let pass in silence (arrays
that are missing, unknown or of another shape) is an error here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from vit_jax.checkpoint import npz
from vit_jax.errors import UserError

POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'
CLASSIFIERS_WITH_CLASS_TOKEN = ('token', 'token_unpooled')

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every array of a checkpoint and of every parameter of the model.

    `str(report)` is a few lines.

    Attributes:
        source: what was loaded, for people: the path or the name.
        loaded: names (Linen, joined by '/') of the arrays taken as they are.
        num_parameters: number of scalars loaded (resized ones count as the model has them).
        resized: name -> (shape in the checkpoint, shape in the model).
        initialised: name -> why the model's own initial value was kept.
        ignored: name -> why the checkpoint's array was not used.
    """

    source: str
    loaded: tuple[str, ...]
    num_parameters: int
    resized: Mapping[str, tuple[Shape, Shape]]
    initialised: Mapping[str, str]
    ignored: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f'{self.source}: {len(self.loaded) + len(self.resized)} arrays loaded '
            f'({self.num_parameters:,} parameters)'
        ]
        for name, (old, new) in self.resized.items():
            lines.append(f'  resized: {name} {old} -> {new}')
        for title, reasons in (('newly initialised', self.initialised), ('ignored', self.ignored)):
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines.append(f'  {title}: {_enumerate(names)} ({reason})')
        return '\n'.join(lines)


def adapt(
    params: Mapping[str, Any],
    init_params: Mapping[str, Any],
    *,
    classifier: str,
    keep_head: bool = False,
    source: str,
) -> tuple[Mapping[str, Any], Report]:
    """Fits the parameters of a checkpoint to a model.

    - `pre_logits` of the checkpoint is left out when the model has none (`representation_size` is
      None), and starts anew when only the model has it.
    - `head` starts anew, from `init_params`, unless `keep_head` asks for the checkpoint's and it
      fits.
    - the position embeddings are resized to the model's grid (see `resize_position_embedding`).
    - everything else must be there with the model's shape.

    Args:
        params: nested dict with Linen names, NumPy or JAX arrays: what `load` returns.
        init_params: the model's parameters, newly initialised: a nested dict (or FrozenDict) of
            arrays. Leaves may be abstract (`jax.ShapeDtypeStruct`); one that would have to be newly
            initialised then stays abstract in the result.
        classifier: the model's: 'token', 'token_unpooled' (these have a class token), 'gap',
            'unpooled'.
        keep_head: take the checkpoint's head if shapes agree.
        source: name of the checkpoint for the report and for errors.

    Returns:
        (parameters, report): the structure, shapes and dtypes of `init_params`.

    Raises:
        UserError: an array is missing, unknown or wrongly shaped (all such arrays are listed), or
            the position grids are not square or do not agree about the class token.
    """
    found = npz.flatten(params)
    expected = npz.flatten(init_params)
    initialised, ignored = _head_rules(found, expected, keep_head)
    resized: dict[str, tuple[Shape, Shape]] = {}
    new = {name: expected[name] for name in initialised}
    problems = []
    for name, leaf in expected.items():
        if name in initialised:
            continue
        if name not in found:
            problems.append(f'{name}: missing, expected {tuple(leaf.shape)}')
            continue
        array = found[name]
        if tuple(array.shape) != tuple(leaf.shape):
            if name != POSITION_EMBEDDING or array.ndim != 3 or array.shape[2] != leaf.shape[2]:
                problems.append(
                    f'{name}: has shape {tuple(array.shape)}, expected {tuple(leaf.shape)}'
                )
                continue
            _check_class_token(found, array, leaf, classifier, source)
            resized[name] = (tuple(array.shape), tuple(leaf.shape))
            array = resize_position_embedding(
                array,
                leaf.shape[1],
                has_class_token=classifier in CLASSIFIERS_WITH_CLASS_TOKEN,
                source=source,
            )
        new[name] = array if array.dtype == leaf.dtype else array.astype(leaf.dtype)
    for name, array in found.items():
        if name not in expected and name not in ignored:
            problems.append(f'{name}: unknown to the model, has shape {tuple(array.shape)}')
    if problems:
        raise _misfit(source, problems, found, expected)
    loaded = tuple(name for name in expected if name not in initialised and name not in resized)
    report = Report(
        source=source,
        loaded=loaded,
        num_parameters=sum(math.prod(expected[name].shape) for name in (*loaded, *resized)),
        resized=resized,
        initialised=initialised,
        ignored=ignored,
    )
    tree = flax.traverse_util.unflatten_dict({name: new[name] for name in expected}, sep='/')
    return flax.core.freeze(tree) if isinstance(init_params, flax.core.FrozenDict) else tree, report


def resize_position_embedding(
    embedding: np.ndarray, num_tokens: int, *, has_class_token: bool, source: str = 'the checkpoint'
) -> np.ndarray:
    """Resizes a square grid of position embeddings, bilinearly, with the corners aligned.

    The values are those of `scipy.ndimage.zoom(grid, order=1)`, which the original release uses:
    the outermost positions of the old and of the new grid coincide. (`jax.image.resize` and timm
    align the outer *edges* of the patches: other values.) The class token's embedding, the first,
    stays as it is.

    Args:
        embedding: [1, tokens, hidden_size] float32; tokens = side * side, and one more with a class
            token.
        num_tokens: tokens of the result, the class token included.
        has_class_token: whether token 0 is the class token, in both.
        source: name of the checkpoint for errors.

    Returns:
        [1, num_tokens, hidden_size], of the dtype of `embedding`.

    Raises:
        UserError: the old or the new grid is not square.
    """
    embedding = np.asarray(embedding)
    first = 1 if has_class_token else 0
    old, new = math.isqrt(embedding.shape[1] - first), math.isqrt(num_tokens - first)
    for side, count, owner in ((old, embedding.shape[1], source), (new, num_tokens, 'the model')):
        if side * side != count - first:
            without = f' ({count} with the class token)' if has_class_token else ''
            raise UserError(
                f'{source}: cannot resize the position embeddings: {owner} has {count - first} '
                f'positions{without}, which is no square grid. Use square images, or a checkpoint '
                'with the same grid as the model'
            )
    grid = embedding[0, first:].reshape(old, old, -1).astype(np.float64)
    grid = _interpolate(_interpolate(grid, new).swapaxes(0, 1), new).swapaxes(0, 1)
    grid = grid.reshape(1, new * new, -1).astype(embedding.dtype)
    return np.concatenate([embedding[:, :first], grid], axis=1)


def describe(params: Mapping[str, Any]) -> str:
    """Tells the architecture of ViT-like parameters from their shapes, for people.

    Args:
        params: nested (or flat, '/'-joined) dict of arrays, Linen names.

    Returns:
        For example 'patch 16, hidden size 192, 12 layers, 3 heads'; what cannot be told is left
        out.
    """
    flat = npz.flatten(params)
    facts = []
    for key in ('embedding/kernel', 'stem/kernel'):
        if key in flat and len(flat[key].shape) == 4:
            facts.append(f'patch {flat[key].shape[0]}, hidden size {flat[key].shape[3]}')
    for parent in ('Transformer/encoderblock_', 'MixerBlock_'):
        if layers := {
            name.removeprefix(parent).split('/')[0] for name in flat if name.startswith(parent)
        }:
            facts.append(f'{len(layers)} layers')
    query = flat.get('Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel')
    if query is not None and len(query.shape) == 3:
        facts.append(f'{query.shape[1]} heads')
    return ', '.join(facts) or f'{len(flat)} arrays of no known model'


def _head_rules(
    found: Mapping[str, Any], expected: Mapping[str, Any], keep_head: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns (newly initialised, ignored), name -> reason, for `pre_logits` and `head`."""
    initialised, ignored = {}, {}

    def group(flat: Mapping[str, Any], module: str) -> dict[str, Shape]:
        return {
            name: tuple(leaf.shape) for name, leaf in flat.items() if name.startswith(f'{module}/')
        }

    file_pre, model_pre = group(found, 'pre_logits'), group(expected, 'pre_logits')
    if file_pre and not model_pre:
        ignored |= dict.fromkeys(
            file_pre, 'the model has no pre_logits layer: representation_size is None'
        )
    if model_pre and not file_pre:
        initialised |= dict.fromkeys(model_pre, 'the checkpoint has no pre_logits layer')

    file_head, model_head = group(found, 'head'), group(expected, 'head')
    if not keep_head:
        why = 'a new head is trained'
    elif not file_head:
        why = 'the checkpoint has no head'
    elif bool(file_pre) != bool(model_pre):
        why = 'the head belongs to another pre_logits layer'
    elif file_head != model_head:
        old, new = (head.get('head/kernel', ('?', '?'))[-1] for head in (file_head, model_head))
        why = f'the head does not fit: {old} classes, the model has {new}'
    else:
        return initialised, ignored
    if model_head:
        initialised |= dict.fromkeys(model_head, why)
    else:
        why = 'the model has no head'
    return initialised, ignored | dict.fromkeys(file_head, why)


def _check_class_token(
    found: Mapping[str, Any], array: Any, leaf: Any, classifier: str, source: str
) -> None:
    """Raises if only one of checkpoint and model has a class token: their grids differ in kind."""
    model_has, file_has = classifier in CLASSIFIERS_WITH_CLASS_TOKEN, 'cls' in found
    if model_has == file_has:
        return
    with_without = ('with', 'without') if file_has else ('without', 'with')
    raise UserError(
        f'{source}: the checkpoint was trained {with_without[0]} a class token ({array.shape[1]} '
        f'position embeddings) and the model, classifier={classifier!r}, is {with_without[1]} one '
        f'({leaf.shape[1]} positions). '
        f'Use classifier={"token" if file_has else "gap"!r}, or another checkpoint'
    )


def _interpolate(grid: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation along axis 0 to `size` points, the first and the last point kept."""
    position = np.linspace(0, grid.shape[0] - 1, size)
    low = np.minimum(position.astype(np.int64), grid.shape[0] - 1)
    high = np.minimum(low + 1, grid.shape[0] - 1)
    weight = (position - low)[:, None, None]
    return grid[low] * (1 - weight) + grid[high] * weight


def _misfit(
    source: str, problems: list[str], found: Mapping[str, Any], expected: Mapping[str, Any]
) -> UserError:
    ours, theirs = describe(expected), describe(found)
    hint = f'The checkpoint is: {theirs}; the model: {ours}. ' if ours != theirs else ''
    return UserError(
        f'{source} does not fit the model: {len(problems)} of its arrays are missing, unknown or '
        f'wrongly shaped. {hint}'
        'Use weights of the same model, or the config of the model that these weights are for.\n  '
        + '\n  '.join(problems)
    )


def _enumerate(names: list[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ', '.join(names[:limit]) + (f' and {rest} more' if rest > 0 else '')
