"""Inspects a file of weights: format, model, arrays, and whatever is unusual about it."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax import files, models, variants
from vit_jax.checkpoint import adapt, catalog, formats, infer, npz
from vit_jax.errors import UserError, printable

MIB = 2**20
# Listings are rounded, to 0.01 GiB for the large files.
_SIZE_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Array:
    """One array.

    Attributes:
        name: Linen name, such as 'head/kernel'.
        shape: as the model has it.
        dtype: type in the file.
        mean, std, min, max: statistics of its values; None where `problem` says why not.
        problem: why it cannot be used (NaN, damaged), or ''.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    problem: str = ''

    @property
    def is_zero(self) -> bool:
        """Whether all its values are 0."""
        return self.min == 0 and self.max == 0


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A file of weights; `str` of it is for people.

    Attributes:
        path: the file or folder.
        mib: its size (of a folder: that of its files).
        format: what it was recognised as.
        notes: what loading it does or leaves out.
        variant: name of the variant, or a description where no variant has these sizes.
        computes: heads, activation, epsilon, pooling.
        image_size: side or (height, width) of the input, pixels; 0 where it cannot be told.
        num_classes: outputs of the head; 0 without a head.
        class_names: where the file tells them.
        arrays: all arrays of weights.
        unusual: what to know before using it, a sentence each.
        catalogue: how its size compares with the released files.
    """

    path: str
    mib: float
    format: str
    notes: tuple[str, ...]
    variant: str
    computes: str
    image_size: int | tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...]
    arrays: tuple[Array, ...]
    unusual: tuple[str, ...]
    catalogue: str

    @property
    def num_parameters(self) -> int:
        """Number of scalars."""
        return sum(int(np.prod(array.shape)) for array in self.arrays)

    def __str__(self) -> str:
        names = ', '.join(self.class_names[:5]) + (', ...' if len(self.class_names) > 5 else '')
        size = f'{variants.in_words(self.image_size)} px' if self.image_size else 'cannot be told'
        lines = [
            self.path,
            f'  format      {self.format}',
            f'  variant     {self.variant}',
            f'  computes    {self.computes}',
            f'  image size  {size}',
            f'  classes     {self.num_classes or "none (no head)"}{f": {names}" if names else ""}',
            f'  parameters  {self.num_parameters:,} in {len(self.arrays)} arrays',
            f'  file size   {self.mib:.2f} MiB; {self.catalogue}',
        ]
        for title, sentences in (('notes', self.notes), ('unusual', self.unusual)):
            label = title
            for sentence in sentences:
                lines.append(f'  {label:10}  {sentence}')
                label = ''
        return '\n'.join(map(printable, lines))

    def table(self) -> str:
        """A line for each array: name, shape, type, statistics."""
        names = [printable(array.name) for array in self.arrays]
        width = max(map(len, names))
        shapes = ['x'.join(map(str, array.shape)) or 'scalar' for array in self.arrays]
        shape_width = max(map(len, shapes))
        header = f'{"array":{width}}  {"shape":{shape_width}}  {"type":8}'
        lines = [header + ''.join(f' {word:>10}' for word in ('mean', 'std', 'min', 'max'))]
        for array, name, shape in zip(self.arrays, names, shapes, strict=True):
            line = f'{name:{width}}  {shape:{shape_width}}  {array.dtype:8}'
            if array.problem:
                lines.append(f'{line}  cannot be used, see above')
                continue
            numbers = (array.mean, array.std, array.min, array.max)
            lines.append(line + ''.join(f' {number:10.3g}' for number in numbers))
        return '\n'.join(lines)


def inspect(path: str | os.PathLike[str], *, variant: str = '', num_heads: int = 0) -> Inspection:
    """Looks at weights of any format that `formats.open_weights` knows, array by array.

    Args:
        path: file, folder of weights, or model folder.
        variant: name from `models.variants.VARIANTS`, where the arrays do not tell.
        num_heads: of the attention, where nothing tells.

    Returns:
        What it is. Arrays with NaN, or damaged, are reported; they do not end the inspection.

    Raises:
        UserError: there is no such file, or it holds no weights that this package knows.
    """
    path = pathlib.Path(path)
    if os.path.isfile(path / 'model.json'):  # False, too, for a path that no file can have
        return _inspect_model_folder(path, variant)
    weights = formats.open_weights(path, variant=variant, num_heads=num_heads)
    config = infer.architecture(
        weights.params, str(path), variant=variant, settings=weights.settings
    )
    try:
        image_size = infer.image_size(weights.params, config, str(path), weights.image_size)
    except UserError:  # not square
        image_size = 0
    arrays = tuple(_arrays(weights.params))
    num_classes = next((array.shape[0] for array in arrays if array.name == 'head/bias'), 0)
    parts = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    mib = sum(part.stat().st_size for part in parts) / MIB
    return Inspection(
        path=str(path),
        mib=mib,
        format=weights.format,
        notes=weights.notes,
        variant=config.get('model_name') or f'no known variant ({adapt.describe(weights.params)})',
        image_size=image_size,
        num_classes=num_classes,
        class_names=weights.class_names,
        computes=_computes(config),
        arrays=arrays,
        unusual=tuple(_unusual(arrays)),
        catalogue=_catalogue(path, mib, config.get('model_name') or '', num_classes, image_size),
    )


def _inspect_model_folder(folder: pathlib.Path, variant: str) -> Inspection:
    """A model folder has its weights and its class names in two files."""
    description = files.read_json(folder / 'model.json')
    try:
        size, names = description['image_size'], tuple(map(str, description['class_names']))
        size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f'{folder / "model.json"} does not describe a model: {error}') from error
    return dataclasses.replace(
        inspect(folder / 'params.npz', variant=variant),
        path=str(folder),
        format='model folder of vit_jax',
        image_size=size,
        class_names=names,
    )


def _computes(config: Mapping[str, Any]) -> str:
    """What neither shapes nor the variant's name tell."""
    model = models.from_config(config, num_classes=0)
    facts = [f'activation {model.act}', f'LayerNorm epsilon {model.layer_norm_eps:g}']
    if 'transformer' in config:
        facts.insert(0, f'{config["transformer"]["num_heads"]} heads')
        facts.append(f'classifier {model.classifier}')
        if model.rotary:
            facts.append(f'rotary positions {dict(model.rotary)}')
    return ', '.join(facts)


def _arrays(params: Mapping[str, Any]) -> Iterator[Array]:
    for name, lazy in npz.flatten(params).items():
        try:
            values = np.asarray(lazy)
        except UserError as e:
            yield Array(name, lazy.shape, lazy.stored_dtype, problem=str(e))
            continue
        mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        low, high = float(values.min()), float(values.max())
        yield Array(name, lazy.shape, lazy.stored_dtype, mean, std, low, high)


def _unusual(arrays: Sequence[Array]) -> Iterator[str]:
    by_name = {array.name: array for array in arrays}
    yield from (array.problem for array in arrays if array.problem)
    kernel = by_name.get('head/kernel')
    if kernel is None:
        yield 'it has no head: it gives features, and a head has to be trained'
    elif kernel.is_zero:
        yield 'the head is all zeros: these weights are for fine-tuning only'
    if 'pre_logits/kernel' in by_name:
        yield 'it has a layer pre_logits (dense, tanh), which fine-tuning leaves out'
    zeros = [a.name for a in arrays if a.is_zero and not a.name.endswith(('/bias', 'head/kernel'))]
    if zeros:
        yield f'all zeros, and not biases: {adapt.shorten(zeros, 3)}'
    for dtype in dict.fromkeys(array.dtype for array in arrays if array.dtype != 'float32'):
        names = [array.name for array in arrays if array.dtype == dtype]
        yield f'{dtype}, not float32: {adapt.shorten(names, 3)}'


def _catalogue(
    path: pathlib.Path,
    mib: float,
    variant: str,
    num_classes: int,
    image_size: int | tuple[int, int],
) -> str:
    """Compares a size with the catalogue's: by the file's name, else by what the weights are."""
    full = path.absolute().as_posix()
    named = [c for c in catalog.CHECKPOINTS if full.endswith('/' + c.name)] or [
        c for c in catalog.CHECKPOINTS if c.name.split('/')[-1] == path.name
    ]
    alike = [
        c
        for c in catalog.CHECKPOINTS
        if (c.variant, c.num_classes, c.resolution) == (variant, num_classes, image_size)
    ]
    fitting = [c for c in named or alike if abs(c.mib - mib) <= _SIZE_TOLERANCE * c.mib]
    if fitting:
        names = adapt.shorten([c.name for c in fitting], 1)
        return f'the catalogue has {fitting[0].mib:g} MiB for {names}'
    if named:
        sizes = [f'{c.mib:g} MiB for {c.name}' for c in named]
        return f'NOT the size in the catalogue: {adapt.shorten(sizes, 2)}'
    return 'not in the catalogue of released files'
