"""A picture of images with what a model says about them."""

import math
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_jax.errors import extra, printable
from vit_jax.inference import predict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_IMAGES = 48
SHOWN_CLASSES = 3
_THUMBNAIL = 240  # longer side, pixels
_NAME_LENGTH = 26  # characters that fit above an image


def save(
    path: str | os.PathLike[str],
    predictions: Sequence[tuple[str, np.ndarray]],
    class_names: Sequence[str],
    *,
    title: str,
) -> None:
    """Draws each image with its most probable classes.

    Args:
      path: the PNG file to write, whatever its suffix.
      predictions: paths and probabilities, at most `MAX_IMAGES`; the images are read once more.
      class_names: in label order.
      title: of the sheet.
    """
    columns = min(len(predictions), max(3, math.ceil(math.sqrt(1.5 * len(predictions)))))
    rows = math.ceil(len(predictions) / columns)
    figure = new_figure(max(5, 2.1 * columns), 2.9 * rows + 0.6)
    # parse_math: a $ in a name of a file or class is a $.
    figure.suptitle(printable(title), fontsize=11, parse_math=False)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis('off')
        if place < len(predictions):
            _draw(axes, *predictions[place], class_names)
    # tight: the captions of the last row, too.
    save_figure(figure, path, dpi=100, bbox_inches='tight', pad_inches=0.15)


def new_figure(width: float, height: float) -> 'Figure':
    """An empty figure of matplotlib, in inches."""
    with extra('report'):
        from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure: 'Figure', path: str | os.PathLike[str], **options: Any) -> None:
    """Writes a PNG file, whatever its suffix; options as of `Figure.savefig`."""
    with warnings.catch_warnings():
        # Characters that no font here has are drawn as boxes.
        warnings.filterwarnings('ignore', message='Glyph .* missing from', category=UserWarning)
        figure.savefig(path, format='png', **options)


def _draw(axes: 'Axes', path: str, probabilities: np.ndarray, class_names: Sequence[str]) -> None:
    axes.imshow(_thumbnail(predict.read_image(path)))
    axes.set_title(
        shorten(pathlib.PurePath(path).name), fontsize=8, color='dimgray', parse_math=False
    )
    best = predict.choose_classes(probabilities, top_k=SHOWN_CLASSES)
    lines = [f'{shorten(class_names[label])}  {100 * probabilities[label]:.1f} %' for label in best]
    for line, text in enumerate(lines):
        axes.text(
            0.5,
            -0.03 - 0.11 * line,
            text,
            transform=axes.transAxes,
            ha='center',
            va='top',
            fontsize=9 if line == 0 else 7.5,
            fontweight='bold' if line == 0 else 'normal',
            parse_math=False,
        )


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # On a square of white: all captions are on one line, and images keep their proportions.
    side = max(picture.size)
    square = Image.new('RGB', (side, side), 'white')
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square)


def shorten(text: str, length: int = _NAME_LENGTH) -> str:
    """A text for a picture, of at most about `length` characters: begin and end of a longer one."""
    text = printable(text)
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f'{text[:half]}…{text[-half:]}'
