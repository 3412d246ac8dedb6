"""A picture of images with what a model says about them."""

import math
import os
import pathlib
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vit_jax import files
from vit_jax.errors import extra, printable
from vit_jax.inference import predict
from vit_jax.inference.task import ONE_CLASS, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES = 48
SHOWN_CLASSES = 3
_THUMBNAIL = 240  # longer side, pixels
# Inches: an image, what is between two, a line of text.
_SIDE, _GAP, _LINE = 2.0, 0.4, 0.16
_NAME_LENGTH = 34  # characters of a file's name that fit above an image
# Of the classes below it: size of the font, and characters that fit into a line.
_FIRST_CLASS, _OTHER_CLASS = (9, 28), (7.5, 38)
_MAX_CLASS_NAME = 70  # characters


def save(
    path: str | os.PathLike[str],
    predictions: Sequence[tuple[str, np.ndarray]],
    class_names: Sequence[str],
    *,
    title: str,
    task: Task = ONE_CLASS,
    threshold: float = 0.0,
) -> None:
    """Draws each image with its most probable classes; long names take several lines.

    Args:
      path: the PNG file to write, whatever its suffix.
      predictions: paths and `Task.values`, at most `MAX_IMAGES`; the images are read once more.
      class_names: in label order.
      title: of the sheet.
      task: of the model.
      threshold: only classes of at least this probability.
    """
    captions = [_caption(values, class_names, task, threshold) for _, values in predictions]
    _draw(path, [file for file, _ in predictions], predict.read_image, captions, title)


def save_similar(
    path: str | os.PathLike[str], found: Sequence[tuple[str, float]], *, title: str
) -> None:
    """Draws images with how similar each is to what was looked for, a cosine.

    Args:
      path: the PNG file to write, whatever its suffix.
      found: paths and cosines; the first `MAX_IMAGES` are drawn.
      title: of the sheet.
    """
    found = found[:MAX_IMAGES]
    captions = [[(f'{cosine:.3f}', _FIRST_CLASS[0], 'normal')] for _, cosine in found]
    _draw(path, [file for file, _ in found], predict.read_image, captions, title)


def save_pairs(
    path: str | os.PathLike[str],
    pairs: Sequence[tuple[str, str, str]],
    read: Callable[[str], np.ndarray],
    *,
    title: str,
) -> None:
    """Draws pairs of images beside each other.

    Args:
      path: the PNG file to write, whatever its suffix.
      pairs: names of both images, and what to write below; the first `MAX_IMAGES` / 2 are drawn.
      read: gives the pixels of an image by its name, uint8 [height, width, 3].
      title: of the sheet.
    """
    pairs = pairs[: MAX_IMAGES // 2]
    images = [name for pair in pairs for name in pair[:2]]
    captions = [[(text, _FIRST_CLASS[0], 'normal')] for pair in pairs for text in (pair[2], '')]
    _draw(path, images, read, captions, title, columns=2 * min(len(pairs), 3))


# A line below an image: text, size of the font, weight.
_Line = tuple[str, float, str]


def _draw(
    path: str | os.PathLike[str],
    images: Sequence[str],
    read: Callable[[str], np.ndarray],
    captions: Sequence[Sequence[_Line]],
    title: str,
    columns: int = 0,
) -> None:
    """Draws images, which `read` gives by their names, with the lines below each."""
    columns = columns or min(len(images), max(3, math.ceil(math.sqrt(1.5 * len(images)))))
    starts = range(0, len(images), columns)
    heights = [
        _SIDE + _GAP + _LINE * (2 + max(map(len, captions[start : start + columns])))
        for start in starts
    ]
    width, head = max(5, (_SIDE + _GAP) * columns + _GAP), 0.7
    height = sum(heights) + head
    figure = new_figure(width, height, layout=None)
    set_title(figure, printable(title))
    top = height - head
    for start, row_height in zip(starts, heights, strict=True):
        for place in range(start, min(start + columns, len(images))):
            left = (width - (_SIDE + _GAP) * columns + _GAP) / 2 + (_SIDE + _GAP) * (place - start)
            bottom = top - _LINE - _SIDE
            axes = figure.add_axes((left / width, bottom / height, _SIDE / width, _SIDE / height))
            axes.axis('off')
            file = images[place]
            axes.imshow(_thumbnail(read(file)))
            # parse_math: a $ in a name of a file or class is a $.
            name = shorten(pathlib.PurePath(file).name, _NAME_LENGTH)
            axes.set_title(name, fontsize=8, color='dimgray', parse_math=False)
            for line, (text, size, weight) in enumerate(captions[place]):
                figure.text(
                    (left + _SIDE / 2) / width, (bottom - 0.05 - _LINE * line) / height, text,
                    ha='center', va='top', fontsize=size, fontweight=weight, parse_math=False,
                )  # fmt: skip
        top -= row_height
    with files.atomic_file(path) as part:
        save_figure(figure, part, dpi=100)


def new_figure(
    width: float, height: float, *, layout: Literal['constrained'] | None = 'constrained'
) -> 'Figure':
    """An empty figure of matplotlib, in inches."""
    with extra('report'):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def set_title(figure: 'Figure', title: str, size: float = 10) -> None:
    """Writes a title of so many points above a figure, in as many lines as its width takes."""
    characters = int(120 * figure.get_figwidth() / size)
    lines = [line for text in title.split('\n') for line in textwrap.wrap(text, characters)]
    figure.suptitle('\n'.join(lines), fontsize=size, parse_math=False)


def save_figure(figure: 'Figure', path: str | os.PathLike[str], **options: Any) -> None:
    """Writes a PNG file, whatever its suffix; options as of `Figure.savefig`."""
    with warnings.catch_warnings():
        # Characters that no font here has are drawn as boxes.
        warnings.filterwarnings('ignore', message='Glyph .* missing from', category=UserWarning)
        figure.savefig(path, format='png', **options)


def _caption(
    values: np.ndarray, class_names: Sequence[str], task: Task, threshold: float
) -> list[_Line]:
    """The most probable classes, or the numbers."""
    lines: list[_Line] = []
    chosen = predict.choose_outputs(values, task, top_k=SHOWN_CLASSES, threshold=threshold)
    if not len(chosen):
        return [('(none)', _OTHER_CLASS[0], 'normal')]
    for place, label in enumerate(chosen.tolist()[:SHOWN_CLASSES]):
        size, characters = _OTHER_CLASS if place else _FIRST_CLASS
        name = shorten(class_names[label], _MAX_CLASS_NAME)
        text = f'{name} {printable(task.text(values[label], label, percent=True))}'
        weight = 'normal' if place else 'bold'
        lines += [(line, size, weight) for line in textwrap.wrap(text, characters)]
    return lines


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # On a square of white: all captions are on one line, and images keep their proportions.
    side = max(picture.size)
    square = Image.new('RGB', (side, side), 'white')
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square)


def shorten(text: str, length: int) -> str:
    """A text for a picture, of at most about `length` characters: begin and end of a longer one."""
    text = printable(text)
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f'{text[:half]}…{text[-half:]}'
