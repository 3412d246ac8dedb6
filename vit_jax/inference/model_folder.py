"""The product of a run: a folder with everything that is needed to use the model.

    params.npz   the parameters, in the published naming (float32)
    model.json   architecture, image size, preprocessing, class names, what the outputs are, where
                 it came from, versions

Predicting, evaluating and exporting take such a folder, or weights alone, of any known kind.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vit_jax import files, models, variants
from vit_jax.checkpoint import adapt, catalog, formats, infer, npz, open_clip_configs
from vit_jax.checkpoint.arrays import count_not_finite
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.inference import bare_weights, description, labels, model_card
from vit_jax.inference.task import Task, of_module

PARAMS_FILE = 'params.npz'
MODEL_FILE = 'model.json'
CARD_FILE = 'README.md'

_FILE_NAME = re.compile(r'\w[\w.+-]{0,199}', re.A)  # beside model.json, no path

# What reading a description raises that is damaged, or somebody else's.
_BAD_DESCRIPTION = (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is ready to use: `model.model.apply({'params': model.params}, x, train=False)`.

    Attributes:
        model: the Flax module; takes [batch, height, width, channels] float32 in [-1, 1].
        params: nested dict of float32 NumPy arrays, on the host.
        model_config: the module's arguments without `num_classes` (plain dict; 'model_name' among
            them, None where no known variant has this architecture).
        class_names: one per class, in label order; () for a model without a head.
        preprocess: from decoded images to pixels.
        source: where the model came from; any JSON.
        task: what its outputs are; by default what the module tells.
    """

    model: nn.Module
    params: Mapping[str, Any]
    model_config: Mapping[str, Any]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    source: Mapping[str, Any]
    task: Task = dataclasses.field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fills in the task."""
        if self.task is None:
            object.__setattr__(self, 'task', of_module(self.model))

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of the input, or (height, width), pixels."""
        return self.preprocess.crop

    @property
    def channels(self) -> int:
        """Of the input: 3 for RGB."""
        return infer.channels(self.params)


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    model_config: Mapping[str, Any],
    class_names: Sequence[str],
    preprocess: Preprocess,
    source: Mapping[str, Any],
    task: Task | None = None,
) -> None:
    """Writes a model folder. It appears, complete and on disk, by a rename.

    Args:
        folder: the folder to write; missing parents are made. An older model folder there is
            replaced: whoever reads finds the old or the new one, also after this process was
            killed (`files.atomic_folder`).
        params: nested dict with Linen names of NumPy or (fully addressable) JAX float arrays.
        model_config: arguments of `models.VisionTransformer`, a dict or ConfigDict; `num_classes`
            and how it is computed (dtype, attention, remat) are left out.
        class_names: names in label order.
        preprocess: from decoded images to pixels; its crop is the size of the input.
        source: where the model came from (weights, dataset, steps, ...); anything that JSON has.
        task: what the outputs are; None for what `model_config` tells.

    Raises:
        UserError: `folder` is something else than a model folder, or cannot be written; or `load`
            would refuse it: the parameters are not those of `model_config` (other shapes, arrays
            that it does not have), or are not finite.
        ValueError: not as many names as the head has classes.
        TypeError: a parameter is not an array of floats, or something else is not for JSON.
    """
    folder = pathlib.Path(folder).absolute()
    files.recover(folder)
    num_classes = bare_weights.num_classes(params)
    if len(class_names) != num_classes:
        raise ValueError(f'{len(class_names)} class names for a head of {num_classes} classes')
    if folder.exists() and not (folder / MODEL_FILE).exists():
        raise UserError(
            f'{folder} exists and is not a model folder; name another place for the model'
        )
    described = description.to_json(
        num_classes, model_config, class_names, preprocess, source, task
    )
    text = json.dumps(described)
    try:
        opened = _described(files.parse_json(text), params)
    except _BAD_DESCRIPTION as e:
        raise UserError(f'{folder} could not be loaded if it were written: {e}') from e
    _check(opened, f'what would be saved as {folder}')
    for name, leaf in npz.flatten(params).items():
        if bad := count_not_finite(np.asarray(leaf)):
            raise UserError(
                f'{name} has {bad:,} values (of {leaf.size:,}) that are NaN or infinite; '
                f'{folder} could not be loaded. Save an earlier state'
            )
    with files.atomic_folder(folder, exists='replace') as part:
        config = described['architecture']['config']
        npz.save(part / PARAMS_FILE, params, infer.settings(config, params, preprocess))
        described['params'] = {'file': PARAMS_FILE, 'sha256': _sha256(part / PARAMS_FILE)}
        files.write_json(part / MODEL_FILE, described)
        count = sum(leaf.size for leaf in npz.flatten(params).values())
        files.write_text(part / CARD_FILE, model_card.render(folder.name, described, count))


def save_new(folder: str | os.PathLike[str], model: Model) -> None:
    """Writes a model that was loaded, and perhaps changed, as a model folder.

    Args:
        folder: must not exist.
        model: its leaves may be lazy.

    Raises:
        UserError: see `save`; or the folder exists.
    """
    files.refuse_address(folder, 'the model folder')
    if os.path.lexists(files.expand(folder)):
        raise UserError(f'{folder} exists; remove it, or name another place')
    save(
        files.expand(folder),
        jax.tree.map(np.asarray, dict(model.params)),
        model_config=model.model_config,
        class_names=model.class_names,
        preprocess=model.preprocess,
        source=model.source,
        task=model.task,
    )


def describe(model: Model) -> dict[str, Any]:
    """What model.json says of a model, but for the weights."""
    return description.to_json(
        len(model.class_names),
        model.model_config,
        model.class_names,
        model.preprocess,
        model.source,
        model.task,
    )


def of_description(path: pathlib.Path) -> Model:
    """A model without parameters, from a file with what `describe` told.

    Raises:
        UserError: it is missing, or damaged.
    """
    found = files.read_json(path)
    try:
        return _described(found, {})
    except _BAD_DESCRIPTION as e:
        raise UserError(f'{path} is damaged ({str(e)[:200]}); copy it again') from e


def load(
    path: str | os.PathLike[str],
    *,
    variant: str = '',
    num_heads: int = 0,
    normalization: formats.Normalization | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> Model:
    """Loads a model folder, or weights of any kind that `checkpoint.open_weights` knows.

    For weights alone the architecture is read from the shapes of the arrays, the image size from
    the grid of positions; classes have the names that the file tells, or are called 'class 0',
    'class 1', ..., and where it does not tell how images become pixels, they are squashed.

    Args:
        path: a model folder (the `model` folder of a run); a `.npz`, `.safetensors` or `.pth` file;
            a folder of Hugging Face or timm; or a released name or an address, see
            `catalog.resolve`.
        variant: name from `models.variants.VARIANTS`, not for a model folder: what it has to be.
        num_heads: of the attention, as `normalization`.
        normalization: see `checkpoint.open_weights`; not for a model folder.
        pixels: how evaluation and prediction make pixels of images, where it is to be another way
            than the files tell: `eval`, `resize`, `interpolation`, `antialias` of `Preprocess`.

    Returns:
        The model, its head included.

    Raises:
        UserError: nothing there, damaged, of a newer format, or not the weights of a known model.
    """
    opened = open_model(
        path,
        variant=variant,
        num_heads=num_heads,
        normalization=normalization,
        pixels=pixels,
        resize=True,
    )
    check(opened)
    loaded = dataclasses.replace(opened, params=jax.tree.map(np.asarray, opened.params))
    head = loaded.params.get('head')
    if head and not any(np.any(leaf) for leaf in head.values()):
        _log.warning('The head of %s is all zeros: it is made for fine-tuning only', path)
    return loaded


def open_model(
    path: str | os.PathLike[str],
    *,
    variant: str = '',
    num_heads: int = 0,
    normalization: formats.Normalization | None = None,
    pixels: Mapping[str, Any] | None = None,
    resize: bool = False,
) -> Model:
    """Like `load`, but reads no weights yet: the leaves of `params` are `LazyArray`.

    Whether they fit the architecture is for `check` to say.

    Args:
        path: see `load`.
        variant: see `load`.
        num_heads: see `load`.
        normalization: see `load`.
        pixels: see `load`.
        resize: give the positions the size of the images that the folder makes, where they have
            another one and the class in its library resizes them (DINOv2's does). As they are, a
            model can be converted and nothing is lost.
    """
    name, path = os.fspath(path), files.expand(path)
    files.recover(path)
    if catalog.is_name(name) and not os.path.lexists(path):
        path = catalog.resolve(name, option='--model FILE')
        if (path.parent / MODEL_FILE).is_file():  # a model folder in cloud storage
            path = path.parent
    of_library = (path / 'config.json').is_file() or open_clip_configs.is_folder(path)
    if path.is_dir() and ((path / MODEL_FILE).is_file() or not of_library):
        if variant:
            raise UserError(f'{path} is a model folder, which knows its variant; leave it out')
        if num_heads:
            raise UserError(f'{path} is a model folder, which knows its heads: no num_heads')
        if normalization:
            raise UserError(f'{path} is a model folder, whose input is [-1, 1]: no normalization')
        opened = _open_folder(path)
    else:
        weights = formats.open_weights(
            path, variant=variant, num_heads=num_heads, normalization=normalization
        )
        if weights.refused and not (pixels and pixels.get('eval')):
            raise UserError(
                f'{path}: {weights.refused} is not computed here. Say how images become pixels: '
                '--eval squash, or --eval resize_crop --resize PIXELS'
            )
        opened = _of_weights(path, bare_weights.recognise(path, weights, variant, resize))
    return dataclasses.replace(opened, preprocess=opened.preprocess.but(pixels or {}))


def own_class_names(model: Model) -> tuple[str, ...]:
    """The names of the classes; () if they have none but 'class 0', 'class 1', ..."""
    return () if model.class_names == labels.numbered(len(model.class_names)) else model.class_names


def _open_folder(folder: pathlib.Path) -> Model:
    if not (folder / MODEL_FILE).is_file():
        inside = folder / 'model'
        hint = f'; did you mean {inside}?' if (inside / MODEL_FILE).is_file() else ''
        raise UserError(f'{folder} is not a model folder: it has no {MODEL_FILE}{hint}')
    try:
        found = files.read_json(folder / MODEL_FILE)
    except UserError as e:
        raise UserError(f'{folder / MODEL_FILE} is damaged, copy the folder again: {e}') from e
    if found.get('format') != description.FORMAT:
        both = found.get('format') == 'vit_jax two towers'
        hint = ': it is of images and texts, see vit_jax zeroshot (--save_as)' if both else ''
        raise UserError(f'{folder / MODEL_FILE} does not describe a model of vit_jax{hint}')
    version = found.get('format_version')
    if isinstance(version, int) and version > description.FORMAT_VERSION:
        raise UserError(
            f'{folder} was written by a newer vit_jax (format {version}, this one reads up to '
            f'{description.FORMAT_VERSION}): update vit_jax'
        )
    try:
        params_entry = found['params']
        if not _FILE_NAME.fullmatch(params_entry['file']):
            raise ValueError(f'params.file {params_entry["file"]!r} is not a plain file name')
        params_path, sha256 = folder / params_entry['file'], params_entry['sha256']
        opened = _described(found, {})
    except _BAD_DESCRIPTION as e:
        kind = '' if isinstance(e, UserError) else f'{type(e).__name__}: '
        raise UserError(
            f'{folder / MODEL_FILE} is damaged ({kind}{str(e)[:200]}); copy it again'
        ) from e
    if not params_path.is_file():
        raise UserError(f'{folder} has no {params_path.name}; copy the folder again')
    if _sha256(params_path) != sha256:
        raise UserError(
            f'{params_path} is not the file that {MODEL_FILE} describes (its SHA-256 differs): it '
            'is damaged, or was exchanged. Copy the folder again'
        )
    return dataclasses.replace(opened, params=npz.open_file(params_path).params)


def _described(found: Mapping[str, Any], params: Mapping[str, Any]) -> Model:
    """The model that the contents of a model.json describe, with these parameters.

    Raises:
        _BAD_DESCRIPTION: of whatever kind, something is missing, or not what it should be.
    """
    config, num_classes = description.architecture(found['architecture'])
    described = description.read(description.Description, found)
    names = described.class_names
    if len(names) != num_classes:
        raise ValueError(f'{len(names)} class_names, num_classes {num_classes} do not agree')
    try:
        model = models.from_config(config, num_classes=num_classes)
    except (ValueError, TypeError) as e:
        raise UserError(f'no model can be built as described: {e}') from e
    told = of_module(model)
    task = told if described.task is None else described.task
    if task.kind != told.kind:
        raise ValueError(f'task.kind {task.kind}, and the architecture is of {told.kind}')
    return Model(model, params, config, names, described.preprocessing, described.source, task)


def _of_weights(path: pathlib.Path, found: bare_weights.Recognised) -> Model:
    """The model that weights alone, of this path, are taken for."""
    weights, names = found.weights, found.class_names
    pixels = weights.preprocess
    source: dict[str, Any] = {'file': str(path), 'format': weights.format}
    if weights.notes:
        source['notes'] = list(weights.notes)
    return Model(
        models.from_config(found.config, num_classes=len(names)),
        weights.params,
        found.config,
        names,
        pixels.at(found.image_size) if pixels else Preprocess(found.image_size),
        source,
    )


def check(opened: Model) -> None:
    """Raises `UserError` if the shapes of the parameters do not fit the architecture.

    Args:
        opened: what `open_model` gave; nothing is read.
    """
    _check(opened, str(opened.source.get('file', 'the model folder')))


def _check(opened: Model, what: str) -> None:
    """`check` of a model that messages call `what`."""
    size = (1, *opened.preprocess.size, opened.channels)
    image = jax.ShapeDtypeStruct(size, np.float32)
    try:
        init = jax.eval_shape(
            lambda x: opened.model.init(jax.random.key(0), x, train=False)['params'], image
        )
    except (ValueError, TypeError, ArithmeticError, AssertionError) as e:
        raise UserError(f'{what}: no model can be built as described: {e}') from e
    shapes = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), dict(opened.params))
    found, expected = npz.flatten(shapes), npz.flatten(init)
    shape, needed = (
        getattr(flat.get(adapt.POSITION_EMBEDDING), 'shape', ()) for flat in (found, expected)
    )
    if shape and shape[-1:] == needed[-1:]:  # nothing is resized here: the same, or an error
        if shape != needed:
            raise UserError(
                f'{what} has position embeddings {shape}, the model has {needed} for images of '
                f'{variants.in_words(opened.image_size)} pixels. Use the size that the weights '
                'were trained at'
            )
        del found[adapt.POSITION_EMBEDDING], expected[adapt.POSITION_EMBEDDING]
    classifier = opened.model_config.get('classifier', '')
    _, report = adapt.adapt(found, expected, classifier=classifier, keep_head=True, source=what)
    if report.initialised or report.ignored or report.resized:
        raise UserError(
            f'the weights do not agree with the architecture ({adapt.describe(init)}):\n  {report}'
        )


def _sha256(path: pathlib.Path) -> str:
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
