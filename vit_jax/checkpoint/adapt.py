"""Fits a checkpoint to a model: head, position grid, `pre_logits`; accounts for every array.

The rules are those of the original release's `load_pretrained`; what it accepted silently (arrays
that are missing, unknown or of another shape) is an error here.
"""

import dataclasses
import fnmatch
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import numpy as np

from vit_jax.checkpoint import npz, resize
from vit_jax.checkpoint.arrays import LazyArray
from vit_jax.errors import UserError, printable

POSITION_EMBEDDING = 'Transformer/posembed_input/pos_embedding'
# In the order of their places before the patches.
_TOKENS = {'cls': 'class token', 'dist': 'distillation token'}

Shape = tuple[int, ...]
Grid = tuple[int, int]  # (rows, columns) of tokens


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
        grid: (rows, columns) of the model's tokens, None where it has no position embeddings or
            nothing tells.
        source_grid: the same of the checkpoint.
        assumed: which of the two ('model', 'checkpoint') nobody gave: it is taken for a square.
    """

    source: str
    loaded: tuple[str, ...]
    num_parameters: int
    resized: Mapping[str, tuple[Shape, Shape]]
    initialised: Mapping[str, str]
    ignored: Mapping[str, str]
    methods: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grid: Grid | None = None
    source_grid: Grid | None = None
    assumed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f'{self.source}: {len(self.loaded) + len(self.resized)} arrays loaded '
            f'({self.num_parameters:,} parameters)'
        ]
        for name, (old, new) in self.resized.items():
            how = f' ({self.methods[name]})' if self.methods.get(name) else ''
            lines.append(f'  resized: {name} {old} -> {new}{how}')
        if self.grid and self.source_grid:
            grids = dict.fromkeys([_words(self.source_grid), _words(self.grid)])
            guess = f' (assumed square: {" and ".join(self.assumed)})' if self.assumed else ''
            lines.append(f'  grid of tokens: {" -> ".join(grids)}{guess}')
        for title, reasons in (('newly initialised', self.initialised), ('ignored', self.ignored)):
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines.append(f'  {title}: {shorten(names, 4)} ({reason})')
        return '\n'.join(map(printable, lines))


def adapt(
    params: Mapping[str, Any],
    init_params: Mapping[str, Any],
    *,
    classifier: str = 'token',
    keep_head: bool = False,
    source: str,
    grid: Grid | None = None,
    source_grid: Grid | None = None,
    allow_new: Sequence[str] = (),
    patch_resize: str = resize.PATCH_METHODS[0],
) -> tuple[Mapping[str, Any], Report]:
    """Fits the parameters of a checkpoint to a model.

    - `pre_logits` of the checkpoint is left out when the model has none (`representation_size` is
      None), and newly initialised when only the model has it.
    - `head` is newly initialised, from `init_params`, unless `keep_head` asks for the checkpoint's
      and it fits.
    - the position embeddings are resized to the model's grid (`resize_position_embedding`).
    - a class or distillation token that only one of the two has is left out, or newly initialised
      with zeros as its position embedding.
    - the first layer is resized to the model's patches (`resize_patch_embedding`) and given its
      number of channels (`adapt_channels`).
    - what `allow_new` names is newly initialised where the checkpoint lacks it.
    - everything else must be there with the model's shape.

    Args:
        params: nested dict with Linen names, NumPy or JAX arrays: what `load` returns.
        init_params: the model's parameters, newly initialised: a nested dict (or FrozenDict) of
            arrays. Leaves may be abstract (`jax.ShapeDtypeStruct`); one that would have to be newly
            initialised then stays abstract in the result.
        classifier: the model's, for the report.
        keep_head: take the checkpoint's head if shapes agree.
        source: name of the checkpoint for the report and for errors.
        grid: (rows, columns) of the model's tokens; default a square, as the report says.
        source_grid: the same of the checkpoint.
        allow_new: what names of parameters that the checkpoint need not have begin with
            ('Transformer/registers'); * stands for anything ('*/lora_a').
        patch_resize: how the first layer is made for other patches, of `resize.PATCH_METHODS`.

    Returns:
        (parameters, report): the structure, shapes and dtypes of `init_params`.

    Raises:
        UserError: an array is missing, unknown or wrongly shaped (all such arrays are listed), or
            a position grid is not square, or could be one or not, and was not given; or
            `allow_new` names nothing that the model has.
    """
    found = npz.flatten(params)
    expected = npz.flatten(init_params)
    initialised, ignored = _not_shared(found, expected, classifier, keep_head)
    initialised |= _allowed_new(found, expected, allow_new)
    grid, source_grid, assumed = _grids(found, expected, grid, source_grid, source)
    same_tokens = all((name in found) == (name in expected) for name in _TOKENS)
    new: dict[str, Any] = {}
    resized: dict[str, tuple[Shape, Shape]] = {}
    methods: dict[str, str] = {}
    problems = []
    for name, leaf in expected.items():
        if name in initialised:
            new[name] = leaf
            continue
        if name not in found:
            problems.append(f'{name}: missing, expected {tuple(leaf.shape)}')
            continue
        array = found[name]
        shapes = tuple(array.shape), tuple(leaf.shape)
        same = same_tokens and grid == source_grid if name == POSITION_EMBEDDING else True
        if shapes[0] != shapes[1] or not same:
            fitted = _fit(name, found, expected, (grid, source_grid), source, patch_resize)
            if fitted is None:
                problems.append(f'{name}: has shape {shapes[0]}, expected {shapes[1]}')
                continue
            resized[name] = shapes
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
    count = sum(math.prod(expected[name].shape) for name in (*loaded, *resized))
    grids = grid, source_grid, assumed
    report = Report(source, loaded, count, resized, initialised, ignored, methods, *grids)
    tree = flax.traverse_util.unflatten_dict(new, sep='/')
    return flax.core.freeze(tree) if isinstance(init_params, flax.core.FrozenDict) else tree, report


def prefix_positions(flat: Mapping[str, Any], grid: Grid | None = None) -> int:
    """How many rows of the position embeddings are of tokens in front of the patches.

    Class and distillation token have one; registers may have theirs: then the rest is the grid.

    Args:
        flat: arrays with Linen names, position embeddings among them; shapes are enough.
        grid: (rows, columns) of the patches, where it is known; else a square is looked for.
    """
    tokens = sum(name in flat for name in _TOKENS)
    registers = flat['registers'].shape[1] if 'registers' in flat else 0
    count = flat[POSITION_EMBEDDING].shape[1] - tokens - registers
    fits = count == math.prod(grid) if grid else bool(resize.square(count))
    return tokens + registers if registers and fits else tokens


def describe(params: Mapping[str, Any]) -> str:
    """Tells the architecture of ViT-like parameters from their shapes, for people.

    Args:
        params: nested (or flat, '/'-joined) dict of arrays, Linen names.

    Returns:
        For example 'ViT, patch 16x16, hidden size 192, 12 layers, 3 heads, MLP 768'; what cannot be
        told is left out.
    """
    flat = npz.flatten(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in flat.items()}
    facts = []
    for layer, block, dense in (
        ('embedding', 'Transformer/encoderblock_', 'MlpBlock_0'),
        ('stem', 'MixerBlock_', 'channel_mixing'),
    ):
        kernel = shapes.get(f'{layer}/kernel', ())
        if len(kernel) == 4:
            family = 'Mixer' if layer == 'stem' else 'ViT'
            facts.append('hybrid' if 'conv_root/kernel' in flat else family)
            facts.append(f'patch {kernel[0]}x{kernel[1]}, hidden size {kernel[3]}')
        if layers := {
            name.removeprefix(block).split('/')[0] for name in flat if name.startswith(block)
        }:
            facts.append(f'{len(layers)} layers')
        query = shapes.get(f'{block}0/MultiHeadDotProductAttention_0/query/kernel', ())
        if len(query) == 3:
            facts.append(f'{query[1]} heads')
        mlp = shapes.get(f'{block}0/{dense}/Dense_0/kernel', ())
        if len(mlp) == 2:
            facts.append(f'MLP {mlp[1]}')
    return ', '.join(facts) or f'{len(flat)} arrays of no known model'


def _not_shared(
    found: Mapping[str, Any], expected: Mapping[str, Any], classifier: str, keep_head: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """(newly initialised, ignored), name -> reason: tokens, `pre_logits` and heads."""
    initialised: dict[str, str] = {}
    ignored: dict[str, str] = {}

    def shapes(flat: Mapping[str, Any], *modules: str) -> dict[str, Shape]:
        return {
            name: tuple(leaf.shape) for name, leaf in flat.items() if name.split('/')[0] in modules
        }

    pooling = f' (classifier {classifier!r})'
    for module, words, why in (
        *((token, words, pooling) for token, words in _TOKENS.items()),
        ('MAPHead_0', 'attention pooling', pooling),
        ('fc_norm', 'norm behind the pooling', ' (fc_norm is off)'),
        ('pre_logits', 'pre_logits layer', ' (representation_size is None)'),
    ):
        in_file, in_model = shapes(found, module), shapes(expected, module)
        if in_model and not in_file:
            initialised |= dict.fromkeys(in_model, f'the checkpoint has no {words}')
        elif in_file and not in_model:
            ignored |= dict.fromkeys(in_file, f'the model{why} has no {words}')
    norm = 'Transformer/encoder_norm/'
    if 'fc_norm/scale' in expected and f'{norm}scale' not in expected:
        why = 'the model has its norm behind the pooling (fc_norm)'
        ignored |= {name: why for name in found if name.startswith(norm)}
    one_pre_logits = any(name.startswith('pre_logits/') for name in (*initialised, *ignored))

    for words, modules in (
        ('head', ('head', 'head_hidden')),
        ('distillation head', ('head_dist',)),
    ):
        in_file, in_model = shapes(found, *modules), shapes(expected, *modules)
        if not in_model:
            why = f'the model has no {words}'
        elif not keep_head:
            why = 'a new head is trained'
        elif not in_file:
            why = f'the checkpoint has no {words}'
        elif one_pre_logits:
            why = 'the head belongs to another pre_logits layer'
        elif in_file != in_model:
            why = _why_no_fit(in_file, in_model)
        else:
            continue
        initialised |= dict.fromkeys(in_model, why)
        ignored |= dict.fromkeys(in_file, why)
    return initialised, ignored


def _allowed_new(
    found: Mapping[str, Any], expected: Mapping[str, Any], patterns: Sequence[str]
) -> dict[str, str]:
    """Parameters of the model that the checkpoint lacks and need not have, name -> reason."""
    initialised: dict[str, str] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [name for name in expected if fnmatch.fnmatchcase(name, f'{pattern}*')]
        if not names:
            raise UserError(
                f'allow_new names {pattern!r}, which the model does not have; its parameters are '
                f'{shorten(list(expected), 8)}'
            )
        new = [name for name in names if name not in found]
        initialised |= dict.fromkeys(new, 'not in the checkpoint, as allow_new permits')
    return initialised


def _grids(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    grid: Grid | None,
    source_grid: Grid | None,
    source: str,
) -> tuple[Grid | None, Grid | None, tuple[str, ...]]:
    """Grids of the model and of the checkpoint, and for which of them a square is assumed.

    A grid that was not given is None if there is nothing to tell it from.
    """
    grid, source_grid = _as_grid(grid, 'grid'), _as_grid(source_grid, 'source_grid')
    flats = expected, found
    shapes = [flat[POSITION_EMBEDDING].shape for flat in flats if POSITION_EMBEDDING in flat]
    if len(shapes) != 2 or any(len(shape) != 3 for shape in shapes):
        return None, None, ()
    count, old = (
        shape[1] - prefix_positions(flat, known)
        for shape, flat, known in zip(shapes, flats, (grid, source_grid), strict=True)
    )
    for given, positions, owner in ((grid, count, 'the model'), (source_grid, old, source)):
        if given:
            resize.grid_of(positions, given, owner, source)
    if old == count and not resize.square(count):  # as many positions: the same images
        grid, source_grid = grid or source_grid, source_grid or grid
    if old == count and grid and not source_grid and grid != resize.square(count):
        raise UserError(
            f"{source} has {old} positions, as many as the model's grid {_words(grid)}: is its own "
            'grid the same, or a square? Say source_grid=(rows, columns)'
        )
    assumed = [name for name, g in (('model', grid), ('checkpoint', source_grid)) if not g]
    grid, source_grid = grid or resize.square(count), source_grid or resize.square(old)
    return grid, source_grid, tuple(assumed)


def _as_grid(grid: Any, argument: str) -> Grid | None:
    if grid is None:
        return None
    try:
        rows, columns = map(operator.index, grid)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise UserError(f'{argument}={grid!r} should be (rows, columns), two numbers from 1 up')
    return rows, columns


def _words(grid: Grid) -> str:
    return f'{grid[0]} x {grid[1]}'


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
    grids: tuple[Grid | None, Grid | None],
    source: str,
    patch_resize: str,
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
        kernel = resize.resize_patch_embedding(kernel, tuple(size), patch_resize)
        inverse = 'pseudo-inverse of the bilinear resize'
        how.append(inverse if patch_resize == 'pseudo-inverse' else patch_resize)
    return kernel, ', '.join(how)


def _fit_positions(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    grids: tuple[Grid | None, Grid | None],
    source: str,
) -> tuple[np.ndarray, str] | None:
    """Position embeddings with the model's tokens in front of the model's grid."""
    array = np.asarray(found[POSITION_EMBEDDING])
    old = [name for name in _TOKENS if name in found]
    new = [name for name in _TOKENS if name in expected]
    first = [
        prefix_positions(flat, grid) for flat, grid in zip((expected, found), grids, strict=True)
    ]
    patches, registers = array[:, first[1] :], array[:, len(old) : first[1]]
    if registers.shape[1] != first[0] - len(new):
        return None
    count = expected[POSITION_EMBEDDING].shape[1] - first[0]
    resized = patches.shape[1] != count or grids[0] != grids[1]
    if resized:
        patches = resize.resize_position_embedding(
            patches, count, grid=grids[0], source_grid=grids[1], source=source
        )
    zeros = np.zeros_like(array[:, :1])
    rows = [array[:, old.index(name)][:, None] if name in old else zeros for name in new]
    how = ['bilinear'] if resized else []
    how += [f'without the place of {_TOKENS[name]}' for name in old if name not in new]
    how += [f'zeros in the place of {_TOKENS[name]}' for name in new if name not in old]
    return np.concatenate([*rows, registers, patches], axis=1), ', '.join(how)


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
        + '\n  '.join(map(printable, problems))
    )


def shorten(names: Sequence[str], limit: int) -> str:
    """The first names of a list, for people, and how many more there are."""
    rest = len(names) - limit
    return ', '.join(names[:limit]) + (f' and {rest} more' if rest > 0 else '')
