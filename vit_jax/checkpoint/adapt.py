"""Fits a checkpoint to a model: head, position grid, `pre_logits`; accounts for every array.

The rules are those of the original release's `load_pretrained`; what it let pass in silence (arrays
that are missing, unknown or of another shape) is an error here.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import numpy as np

from vit_jax.checkpoint import npz, resize
from vit_jax.checkpoint.arrays import LazyArray
from vit_jax.errors import UserError

POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'
# In the order in which they stand before the patches.
_TOKENS = {'cls': 'class token', 'dist': 'distillation token'}

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
        methods: name of a resized array -> how that was done.
    """

    source: str
    loaded: tuple[str, ...]
    num_parameters: int
    resized: Mapping[str, tuple[Shape, Shape]]
    initialised: Mapping[str, str]
    ignored: Mapping[str, str]
    methods: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f'{self.source}: {len(self.loaded) + len(self.resized)} arrays loaded '
            f'({self.num_parameters:,} parameters)'
        ]
        for name, (old, new) in self.resized.items():
            how = f' ({self.methods[name]})' if self.methods.get(name) else ''
            lines.append(f'  resized: {name} {old} -> {new}{how}')
        for title, reasons in (('newly initialised', self.initialised), ('ignored', self.ignored)):
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines.append(f'  {title}: {shorten(names, 4)} ({reason})')
        return '\n'.join(lines)


def adapt(
    params: Mapping[str, Any],
    init_params: Mapping[str, Any],
    *,
    classifier: str = 'token',
    keep_head: bool = False,
    source: str,
    grid: tuple[int, int] | None = None,
    source_grid: tuple[int, int] | None = None,
) -> tuple[Mapping[str, Any], Report]:
    """Fits the parameters of a checkpoint to a model.

    - `pre_logits` of the checkpoint is left out when the model has none (`representation_size` is
      None), and starts anew when only the model has it.
    - `head` starts anew, from `init_params`, unless `keep_head` asks for the checkpoint's and it
      fits.
    - the position embeddings are resized to the model's grid (`resize_position_embedding`).
    - a class or distillation token that only one of the two has is left out, or starts anew, with
      zeros as its position embedding.
    - the first layer is resized to the model's patches (`resize_patch_embedding`) and given its
      number of channels (`adapt_channels`).
    - everything else must be there with the model's shape.

    Args:
        params: nested dict with Linen names, NumPy or JAX arrays: what `load` returns.
        init_params: the model's parameters, newly initialised: a nested dict (or FrozenDict) of
            arrays. Leaves may be abstract (`jax.ShapeDtypeStruct`); one that would have to be newly
            initialised then stays abstract in the result.
        classifier: the model's, for the report.
        keep_head: take the checkpoint's head if shapes agree.
        source: name of the checkpoint for the report and for errors.
        grid: (rows, columns) of the model's tokens where its images are not square.
        source_grid: the same of the checkpoint.

    Returns:
        (parameters, report): the structure, shapes and dtypes of `init_params`.

    Raises:
        UserError: an array is missing, unknown or wrongly shaped (all such arrays are listed), or
            a position grid is not square and was not given.
    """
    found = npz.flatten(params)
    expected = npz.flatten(init_params)
    initialised, ignored = _head_rules(found, expected, keep_head)
    new_tokens, old_tokens = _token_rules(found, expected, classifier)
    initialised |= new_tokens
    ignored |= old_tokens
    same_tokens = all((name in found) == (name in expected) for name in _TOKENS)
    resized: dict[str, tuple[Shape, Shape]] = {}
    methods: dict[str, str] = {}
    new = {name: expected[name] for name in initialised}
    problems = []
    for name, leaf in expected.items():
        if name in initialised:
            continue
        if name not in found:
            problems.append(f'{name}: missing, expected {tuple(leaf.shape)}')
            continue
        array = found[name]
        fits = same_tokens or name != POSITION_EMBEDDING
        if tuple(array.shape) != tuple(leaf.shape) or not fits:
            fitted = _fit(name, found, expected, (grid, source_grid), source)
            if fitted is None:
                problems.append(
                    f'{name}: has shape {tuple(array.shape)}, expected {tuple(leaf.shape)}'
                )
                continue
            resized[name] = (tuple(array.shape), tuple(leaf.shape))
            array, methods[name] = fitted
        if isinstance(array, LazyArray):
            array = np.asarray(array)
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
        methods=methods,
    )
    tree = flax.traverse_util.unflatten_dict({name: new[name] for name in expected}, sep='/')
    return flax.core.freeze(tree) if isinstance(init_params, flax.core.FrozenDict) else tree, report


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
    """Returns (newly initialised, ignored), name -> reason, for `pre_logits` and heads."""
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

    for words, modules in (
        ('head', ('head', 'head_hidden')),
        ('distillation head', ('head_dist',)),
    ):
        file_head, model_head = (
            {name: shape for module in modules for name, shape in group(flat, module).items()}
            for flat in (found, expected)
        )
        if not model_head:
            why = f'the model has no {words}'
        elif not keep_head:
            why = 'a new head is trained'
        elif not file_head:
            why = f'the checkpoint has no {words}'
        elif bool(file_pre) != bool(model_pre):
            why = 'the head belongs to another pre_logits layer'
        elif file_head != model_head:
            why = _why_no_fit(file_head, model_head)
        else:
            continue
        initialised |= dict.fromkeys(model_head, why)
        ignored |= dict.fromkeys(file_head, why)
    return initialised, ignored


def _why_no_fit(file_head: Mapping[str, Shape], model_head: Mapping[str, Shape]) -> str:
    if file_head.keys() != model_head.keys():
        return 'the head does not fit: only one of checkpoint and model has a hidden layer in it'
    bias = next(name for name in model_head if name.endswith('/bias') and 'hidden' not in name)
    old, new = file_head[bias][-1], model_head[bias][-1]
    return f'the head does not fit: {old} classes, the model has {new}'


def _fit(
    name: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    grids: tuple[tuple[int, int] | None, tuple[int, int] | None],
    source: str,
) -> tuple[np.ndarray, str] | None:
    """The checkpoint's array in the model's shape and how that was done; None if it cannot be."""
    array, leaf = found[name], expected[name]
    if array.ndim != len(leaf.shape) or array.shape[-1] != leaf.shape[-1]:
        return None
    if name == POSITION_EMBEDDING:
        return _fit_positions(found, expected, grids, source)
    # A hybrid's patches are cut from features, of which every model has its own number.
    first_layers = ('conv_root',) if 'conv_root/kernel' in expected else ('embedding', 'stem')
    if name not in [f'{layer}/kernel' for layer in first_layers] or array.ndim != 4:
        return None
    (*size, channels), how = leaf.shape[:3], []
    kernel = np.asarray(array)
    if array.shape[2] != channels:
        kernel = resize.adapt_channels(kernel, channels)
        how.append('channels summed' if channels == 1 else 'channels repeated and scaled')
    if list(array.shape[:2]) != size:
        if first_layers == ('conv_root',):
            return None
        kernel = resize.resize_patch_embedding(kernel, tuple(size))
        how.append('pseudo-inverse of the bilinear resize')
    return kernel, ', '.join(how)


def _fit_positions(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    grids: tuple[tuple[int, int] | None, tuple[int, int] | None],
    source: str,
) -> tuple[np.ndarray, str]:
    """Position embeddings with the model's tokens in front of the model's grid."""
    array = np.asarray(found[POSITION_EMBEDDING])
    old = [name for name in _TOKENS if name in found]
    new = [name for name in _TOKENS if name in expected]
    patches = resize.resize_position_embedding(
        array[:, len(old) :],
        expected[POSITION_EMBEDDING].shape[1] - len(new),
        has_class_token=False,
        grid=grids[0],
        source_grid=grids[1],
        source=source,
    )
    zeros = np.zeros_like(array[:, :1])
    rows = [array[:, old.index(name)][:, None] if name in old else zeros for name in new]
    how = ['bilinear'] if patches.shape[1] != array.shape[1] - len(old) else []
    how += [f'without the place of {_TOKENS[name]}' for name in old if name not in new]
    how += [f'zeros in the place of {_TOKENS[name]}' for name in new if name not in old]
    return np.concatenate([*rows, patches], axis=1), ', '.join(how)


def _token_rules(
    found: Mapping[str, Any], expected: Mapping[str, Any], classifier: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns (newly initialised, ignored), name -> reason, for class and distillation token."""
    initialised, ignored = {}, {}
    for name, words in _TOKENS.items():
        if name in expected and name not in found:
            initialised[name] = f'the checkpoint has no {words}'
        elif name in found and name not in expected:
            ignored[name] = f'the model (classifier {classifier!r}) has no {words}'
    return initialised, ignored


def _misfit(
    source: str, problems: list[str], found: Mapping[str, Any], expected: Mapping[str, Any]
) -> UserError:
    ours, theirs = describe(expected), describe(found)
    hint = f'The checkpoint is: {theirs}; the model: {ours}. ' if ours != theirs else ''
    tokens = 'MixerBlock_0/token_mixing/Dense_0/kernel'
    if tokens in found and tokens in expected:
        old, new = (flat[tokens].shape[0] for flat in (found, expected))
        if old != new:
            hint += (
                f'A Mixer has weights for each token: these are for {old} tokens, the model has '
                f'{new}; use the image size they were trained at (--config.pp.crop). '
            )
    return UserError(
        f'{source} does not fit the model: {len(problems)} of its arrays are missing, unknown or '
        f'wrongly shaped. {hint}'
        'Use weights of the same model, or the config of the model that these weights are for.\n  '
        + '\n  '.join(problems)
    )


def shorten(names: Sequence[str], limit: int) -> str:
    """The first names of a list, for people, and how many more there are."""
    rest = len(names) - limit
    return ', '.join(names[:limit]) + (f' and {rest} more' if rest > 0 else '')
