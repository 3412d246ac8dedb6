"""A folder of attention pictures and arrays, which appears when it is complete.

OUTPUT/attention_distance.png, patch_filters.png, position_similarity.png, arrays.npz
OUTPUT/NAME OF AN IMAGE/class_token.png, rollout.png, relevance.png, arrays.npz
"""

import contextlib
import dataclasses
import difflib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax import files
from vit_jax.analysis import attention, embeddings
from vit_jax.analysis import attention_pictures as pictures
from vit_jax.data.decode import BadImageError, load_image
from vit_jax.errors import UserError, printable
from vit_jax.inference import contact_sheet, model_folder, predict

OF_EACH_IMAGE = ('class_token', 'rollout', 'relevance')
OF_IMAGES = (*OF_EACH_IMAGE, 'distance')
OF_MODEL = ('filters', 'positions')
KINDS = OF_IMAGES + OF_MODEL
ARRAYS = 'arrays.npz'
TOP_K = 3
_MAX_NAME = 80  # of an image's folder, characters


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to draw.

    Attributes:
      kinds: of `KINDS`.
      layers: of which class_token.png shows the maps, from 0.
      heads: likewise.
      classes: labels whose relevance is drawn; () for the most probable ones of each image.
      top_k: how many most probable ones.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    classes: tuple[int, ...] = ()
    top_k: int = TOP_K


class Drawn(NamedTuple):
    """What was made of one image."""

    path: str
    folder: str  # its name in the output; '' if nothing was drawn of the image alone
    probabilities: np.ndarray | None  # float32 [classes]; None of a model without head


def default_folder(model: str) -> pathlib.Path:
    """A folder for the pictures of a model that is not there yet, in the current folder.

    Args:
      model: path or name of the model; of a run's model folder the run gives the name.
    """
    path = pathlib.Path(model).absolute()
    stem = f'attention-{path.parent.name if path.name == "model" else path.stem}'
    return pathlib.Path(_free_name(stem, os.path.lexists))


def check_folder(folder: pathlib.Path) -> None:
    """Raises `UserError` for a folder that has files, or whose parent is not there."""
    files.refuse_address(folder, '--output')
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f'--output {folder} exists and is not empty; name another folder')
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f'--output {folder} is a file; name a folder')
    if not folder.absolute().parent.is_dir():
        raise UserError(f'--output {folder}: there is no folder {folder.parent}; make it first')


def parse_kinds(text: str) -> tuple[str, ...]:
    """Kinds of pictures from a list with commas, such as 'rollout,distance', in order of `KINDS`.

    Raises:
      UserError: a word that is not a kind.
    """
    words = [word.strip() for word in text.split(',')]
    for word in words:
        if word not in KINDS:
            raise UserError(
                f'--what {text}: {word!r} is none of {", ".join(KINDS)}; nearest: '
                f'{_nearest(word, KINDS)}'
            )
    return tuple(kind for kind in KINDS if kind in words)


def parse_numbers(text: str, count: int, flag: str) -> tuple[int, ...]:
    """Numbers of layers or heads from a list with commas; negative ones count from the end.

    Args:
      text: such as '0,5,-1'; '' for all.
      count: how many the model has.
      flag: that was given, for messages.

    Raises:
      UserError: not numbers, or none that the model has.
    """
    try:
        numbers = [int(word) for word in text.split(',')] if text else range(count)
    except ValueError:
        raise UserError(f'{flag} {text}: expected numbers such as 0 or 0,5,-1') from None
    if not all(-count <= number < count for number in numbers):
        raise UserError(
            f'{flag} {text}: this model has numbers 0 to {count - 1}, or -1 for its last'
        )
    return tuple(sorted({number % count for number in numbers}))


def find_labels(names: Sequence[str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Labels of classes that were named; `UserError` (with the nearest) for an unknown name."""
    names = [printable(name) for name in names]
    for name in names:
        if name not in class_names:
            hint = f'; the nearest is {_nearest(name, class_names)}' if class_names else ''
            raise UserError(f'the model has no class {name!r}{hint}')
    return tuple(dict.fromkeys(class_names.index(name) for name in names))


def _nearest(word: str, words: Sequence[str]) -> str:
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]


def write(
    folder: pathlib.Path,
    model: model_folder.Model,
    images: Sequence[str],
    choice: Choice,
    *,
    title: str,
    skip: Callable[[str], None] | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[list[Drawn], list[BadImageError]]:
    """Draws, and gives the folder its name when everything is drawn.

    Args:
      folder: the place; nothing there, or an empty folder.
      model: what `model_folder.load` gives.
      images: paths, of `predict.find_images`.
      choice: what to draw.
      title: name of the model in the pictures.
      skip: called with the reason for each kind that this model does not have; by default it is
        raised.
      advance: called with 1 after each image.

    Returns:
      What was drawn, and the images that could not be read. If there is nothing at all to draw, no
      folder is written.

    Raises:
      UserError: see `attention.check`; the folder cannot be written; a kind of picture that this
        model does not have; a model that gives NaN.
    """
    attention.check(model)
    kinds = choice.kinds
    drawn: list[Drawn] = []
    distances: list[np.ndarray] = []
    unreadable: list[BadImageError] = []
    with files.atomic_folder(folder) as part:
        arrays = _draw_model(part, model, kinds, title, skip)
        if 'relevance' in kinds and not model.class_names:
            with _skipping(skip):
                raise UserError('relevance.png needs a model with a classification head')
            kinds = tuple(kind for kind in kinds if kind != 'relevance')
        choice = dataclasses.replace(choice, kinds=kinds)
        if set(kinds) & set(OF_IMAGES):
            model = dataclasses.replace(model, params=jax.device_put(model.params))
            taken = {ARRAYS}
            for path in images:
                try:
                    image = predict.read_image(
                        path, accurate=model.preprocess.accurate, channels=model.channels
                    )
                except BadImageError as error:
                    unreadable.append(error)
                else:
                    name = _folder_name(path, taken) if set(kinds) & set(OF_EACH_IMAGE) else ''
                    found, probabilities = _draw_image(
                        part, name, model, path, image, choice, title
                    )
                    drawn.append(Drawn(path, name, probabilities))
                    distances.append(found.mean_distance[0])
                advance(1)
        if 'distance' in kinds and drawn:
            arrays['mean_distance'] = np.stack(distances)
            figure = pictures.distance(
                np.mean(distances, axis=0),
                images=len(drawn),
                image_size=model.image_size,
                title=f'Mean attention distance of the heads\n{title}',
            )
            contact_sheet.save_figure(figure, part / 'attention_distance.png', dpi=100)
        if arrays:
            np.savez(part / ARRAYS, **arrays)
    return drawn, unreadable


@contextlib.contextmanager
def _skipping(skip: Callable[[str], None] | None, name: str = '') -> Iterator[None]:
    """Gives the reason why something cannot be drawn to `skip`, if there is one."""
    try:
        yield
    except UserError as error:
        reason = f'{name}: {error}' if name else str(error)
        if skip is None:
            raise UserError(reason) from error
        skip(reason)


def _draw_model(
    part: pathlib.Path,
    model: model_folder.Model,
    kinds: Sequence[str],
    title: str,
    skip: Callable[[str], None] | None,
) -> dict[str, Any]:
    """The pictures that need no image; returns their arrays."""
    arrays: dict[str, Any] = {}
    if 'filters' in kinds:
        with _skipping(skip, 'patch_filters.png'):
            components, share = embeddings.filter_components(model)
            arrays |= {'filter_components': components, 'filter_variance_share': share}
            text = f'Principal components of the patch embedding filters\n{title}'
            figure = pictures.filters(components, share, title=text)
            contact_sheet.save_figure(figure, part / 'patch_filters.png', dpi=100)
    if 'positions' in kinds:
        with _skipping(skip, 'position_similarity.png'):
            similarity = embeddings.position_similarity(model)
            arrays['position_similarity'] = similarity
            text = f'Similarity of position embeddings\n{title}'
            figure = pictures.positions(similarity, title=text)
            contact_sheet.save_figure(figure, part / 'position_similarity.png', dpi=100)
    return arrays


def _draw_image(
    part: pathlib.Path,
    name: str,
    model: model_folder.Model,
    path: str,
    image: np.ndarray,
    choice: Choice,
    title: str,
) -> tuple[attention.AttentionMaps, np.ndarray | None]:
    """The pictures of one image in the folder `name`, or none; its maps and probabilities.

    One at a time: the weights of attention are large, and it is drawing that takes long.
    """
    pixels = load_image(image, model.preprocess, channels=model.channels)[None]
    found = attention.maps(model, pixels)
    if not np.isfinite(found.logits).all():
        raise UserError(f'the model gives NaN or infinite numbers for {printable(path)}')
    probabilities = None
    if model.class_names:
        probabilities = model.task.values(found.logits[0])
    if not name:
        return found, probabilities
    folder = part / name
    folder.mkdir()
    image = pictures.shrink(attention.as_rgb(model.preprocess.seen(image)))
    title = f'{contact_sheet.shorten(pathlib.PurePath(path).name, 36)} · {title}'
    cls = attention.check(model).reads_class_token
    arrays: dict[str, Any] = {'path': printable(path), 'class_names': model.class_names}
    if probabilities is not None:
        arrays['probabilities'] = probabilities
    if 'class_token' in choice.kinds:
        arrays['class_token'] = found.class_token[0]
        what = 'Attention of the class token' if cls else 'Mean attention of all patches'
        figure = pictures.class_token(
            image, found.class_token[0], choice.layers, choice.heads, title=f'{what}\n{title}'
        )
        contact_sheet.save_figure(figure, folder / 'class_token.png', dpi=100)
    if 'rollout' in choice.kinds:
        arrays['rollout'] = found.rollout[0]
        start = 'the class token' if cls else 'the mean of all tokens'
        shown = [(f'from {start}', 100 * found.rollout[0])]
        text = f'Attention rollout\n{title}'
        figure = pictures.overlays(image, shown, title=text, unit='% of the rollout')
        contact_sheet.save_figure(figure, folder / 'rollout.png', dpi=100)
    if 'relevance' in choice.kinds and probabilities is not None:
        labels = np.array(
            choice.classes
            or predict.choose_outputs(probabilities, model.task, top_k=choice.top_k)[: choice.top_k]
        )
        maps = attention.relevance(model, pixels, labels[None])[0]
        arrays |= {'relevance': maps, 'relevance_labels': labels}
        captions = (
            f'{contact_sheet.shorten(model.class_names[label], 28)}  '
            f'{model.task.text(probabilities[label], label, percent=True)}'
            for label in labels
        )
        figure = pictures.overlays(
            image,
            list(zip(captions, maps, strict=True)),
            title=f'Relevance for a class, gradient-weighted attention\n{title}',
            unit='relevance (no unit)',
        )
        contact_sheet.save_figure(figure, folder / 'relevance.png', dpi=100)
    np.savez(folder / ARRAYS, **arrays)
    return found, probabilities


def _folder_name(path: str, taken: set[str]) -> str:
    """A name like the image's, that no other has on any file system; added to `taken`."""
    stem = 'stdin' if path == predict.STDIN else pathlib.PurePath(path).stem
    stem = re.sub(r'[^\w .+-]', '_', stem)[:_MAX_NAME].strip(' .') or 'image'
    name = _free_name(stem, lambda name: name.casefold() in taken)
    taken.add(name.casefold())
    return name


def _free_name(stem: str, is_taken: Callable[[str], bool]) -> str:
    """The first of stem, stem-2, stem-3, ... that is not taken."""
    names = itertools.chain([stem], (f'{stem}-{number}' for number in itertools.count(2)))
    return next(name for name in names if not is_taken(name))
