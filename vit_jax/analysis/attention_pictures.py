"""Pictures of what `attention` and `embeddings` compute, as Matplotlib figures.

Shapes: L layers, H heads, [h, w] the grid of patches. Images are [height, width, 3] uint8, upright
and in their own aspect ratio: a map covers the whole image, see `attention.overlay`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.analysis import attention
from vit_jax.errors import extra
from vit_jax.inference import contact_sheet
from vit_jax.variants import in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
LONGER_SIDE = 480  # of an image in a figure, pixels
_SHEET = 1920  # of all maps of one figure together, the longer side
_TILE = (48, 320)  # of one map: least and most
_GAP = 4  # pixels between maps


def shrink(image: np.ndarray, longer_side: int = LONGER_SIDE) -> np.ndarray:
    """The image, made smaller if its longer side has more pixels than `longer_side`; uint8."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((longer_side, longer_side))
    return np.asarray(picture)


def class_token(
    image: np.ndarray, maps: np.ndarray, layers: Sequence[int], heads: Sequence[int], *, title: str
) -> 'Figure':
    """The map of every layer and head over the image.

    Layers go down and heads across, or the other way round where there are more heads; where one
    is many times the other, the rows are cut into several panels beside each other, so that the
    picture is about as wide as high and not a strip.

    Args:
      image: [height, width, 3] uint8.
      maps: [L, H, h, w] all maps of the image.
      layers: which to draw, from 0.
      heads: which to draw, from 0.
      title: of the figure.
    """
    with extra('report'):
        import matplotlib

    down, across = ('layer (0 is nearest to the image)', layers), ('head', heads)
    if len(heads) > len(layers):
        down, across, maps = across, down, maps.swapaxes(0, 1)
    (down_label, rows), (across_label, columns) = down, across
    shape = image.shape[1] * len(columns) / image.shape[0]  # width by height, of a single row
    panels = min(
        range(1, len(rows) + 1), key=lambda n: abs(math.log(n * shape / -(-len(rows) // n)))
    )
    each = -(-len(rows) // panels)
    panels = -(-len(rows) // each)
    side = min(max(_SHEET // max(each, panels * len(columns)), _TILE[0]), _TILE[1])
    small = shrink(image, side)
    height, width = (size + _GAP for size in small.shape[:2])
    sheet = panels * len(columns) * width / 100, each * height / 100  # inches
    size = 10 * max(1.0, max(sheet) / 6)  # of the letters, points: read also when shown small
    figure = _figure(
        sheet[0] + (panels + 6) * size / 30 + 1, sheet[1] + size / 5, title, fontsize=1.2 * size
    )
    places = figure.subplots(1, panels, squeeze=False)[0]
    for number, axes in enumerate(places):
        some = rows[number * each : (number + 1) * each]
        tiles = np.stack(
            [[attention.overlay(small, maps[row, column]) for column in columns] for row in some]
        )
        axes.imshow(_tiled(tiles, np.uint8(255)))
        axes.set_anchor('N')
        axes.set_xticks([(i + 0.5) * width for i in range(len(columns))], list(map(str, columns)))
        axes.set_yticks([(i + 0.5) * height for i in range(len(some))], list(map(str, some)))
        axes.set_xlabel(across_label, fontsize=size)
        axes.tick_params(labelsize=size)
        _bare(axes)
    places[0].set_ylabel(down_label, fontsize=size)
    scale = matplotlib.cm.ScalarMappable(cmap='inferno')
    bar = figure.colorbar(scale, ax=places, ticks=[0, 1], shrink=0.6, pad=0.02)
    bar.ax.set_yticklabels(['least', 'most'], fontsize=size)
    bar.set_label('attention, in the range of each map', fontsize=size)
    return figure


def overlays(
    image: np.ndarray, maps: Sequence[tuple[str, np.ndarray]], *, title: str, unit: str
) -> 'Figure':
    """The image, and beside it the same with each map over it.

    Args:
      image: [height, width, 3] uint8.
      maps: (caption, [h, w] map) of each.
      title: of the figure.
      unit: what the numbers of the maps are, for the colour bars.
    """
    with extra('report'):
        import matplotlib

    small = shrink(image)
    height, width = (size / 120 for size in small.shape[:2])
    panels = 1 + len(maps)
    columns = min(panels, 4)
    rows = math.ceil(panels / columns)
    figure = _figure(max(columns * (width + 1.1), 6), rows * (height + 0.6) + 0.6, title)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    places[0].imshow(small)
    places[0].set_title('image', fontsize=10)
    for axes, (caption, heat) in zip(places[1:], maps, strict=False):
        axes.imshow(attention.overlay(small, heat))
        axes.set_title(caption, fontsize=10, parse_math=False)
        limits = matplotlib.colors.Normalize(float(heat.min()), float(heat.max()))
        scale = matplotlib.cm.ScalarMappable(limits, cmap='inferno')
        bar = figure.colorbar(scale, ax=axes, shrink=0.8, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.set_label(unit, fontsize=9)
    for axes in places:
        axes.axis('off')
    return figure


def distance(
    mean_distance: np.ndarray, *, images: int, image_size: int | tuple[int, int], title: str
) -> 'Figure':
    """Mean attention distance of every head over depth, as in figure 7 of the ViT paper.

    Args:
      mean_distance: [L, H] pixels, the mean over images.
      images: how many they are, for the caption.
      image_size: of the model's input, side or (height, width), pixels.
      title: of the figure.
    """
    figure = _figure(7.5, 5, title)
    axes = figure.subplots()
    layers, heads = mean_distance.shape
    colours = np.arange(heads) % 20
    for layer in range(layers):
        axes.scatter([layer] * heads, mean_distance[layer], c=colours, cmap='tab20', vmax=20, s=24)
    axes.plot(mean_distance.mean(axis=1), color='dimgray', linewidth=1, label='mean of the heads')
    axes.set_xlabel('layer (0 is nearest to the image); a point is a head')
    axes.set_ylabel(f'mean attention distance (pixels of {in_words(image_size)})')
    axes.set_ylim(bottom=0)
    axes.locator_params(axis='x', integer=True)
    axes.grid(alpha=0.3)
    axes.legend(title=f'{images:,} image{"" if images == 1 else "s"}')
    return figure


def filters(components: np.ndarray, share: np.ndarray, *, title: str) -> 'Figure':
    """Principal components of the filters that embed RGB patches.

    Args:
      components: [count, P, P, 3], see `embeddings.filter_components`; each is scaled to its own
        range, 0 is grey.
      share: [count] of the variance, in [0, 1].
      title: of the figure.
    """
    columns = min(7, len(components))
    rows = math.ceil(len(components) / columns)
    figure = _figure(max(1.25 * columns, 6), 1.5 * rows + 0.9, title)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places:
        axes.axis('off')
    for axes, component, part in zip(places, components, share, strict=False):
        largest = np.abs(component).max() or 1
        axes.imshow(0.5 + 0.5 * component / largest, interpolation='nearest')
        axes.set_title(f'{100 * part:.1f} %', fontsize=8)
    size = components.shape[1:3]
    figure.supxlabel(
        f'{size[0]} x {size[1]} pixels each, grey is 0; % of the variance of all filters '
        f'(together {100 * share.sum():.0f} %)',
        fontsize=9,
    )
    return figure


def positions(similarity: np.ndarray, *, title: str) -> 'Figure':
    """A grid of grids: a patch's tile shows how similar all position embeddings are to its own.

    Args:
      similarity: [h, w, h, w] cosines, see `embeddings.position_similarity`.
      title: of the figure.
    """
    height, width = similarity.shape[:2]
    # Several screen pixels to a patch, and a gap that can be seen, also for large grids.
    enlarged = max(1, round(700 / (height * width)))
    tiles = similarity.repeat(enlarged, axis=2).repeat(enlarged, axis=3)
    sheet = _tiled(tiles, np.float32(np.nan))
    figure = _figure(9, 8, title)
    axes = figure.subplots()
    picture = axes.imshow(sheet, vmin=-1, vmax=1, cmap='viridis', interpolation='nearest')
    places = range(0, height, max(1, math.ceil(height / 16)))
    axes.set_xticks([(i + 0.5) * (width * enlarged + _GAP) for i in places], map(str, places))
    axes.set_yticks([(i + 0.5) * (height * enlarged + _GAP) for i in places], map(str, places))
    axes.set_xlabel('column of the patch')
    axes.set_ylabel('row of the patch')
    _bare(axes)
    figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.02).set_label(
        'cosine similarity to the position embedding of each patch'
    )
    return figure


def _figure(width: float, height: float, title: str, **style: float) -> 'Figure':
    """An empty figure, in inches."""
    figure = contact_sheet.new_figure(width, height)
    figure.suptitle(title, parse_math=False, **style)
    return figure


def _tiled(tiles: np.ndarray, background) -> np.ndarray:
    """[rows, columns, height, width, ...] to one picture with gaps in the background's value."""
    rows, columns, height, width, *rest = tiles.shape
    full = np.full((rows, columns, height + _GAP, width + _GAP, *rest), background, tiles.dtype)
    full[:, :, :height, :width] = tiles
    joined = full.swapaxes(1, 2).reshape(rows * (height + _GAP), columns * (width + _GAP), *rest)
    return joined[:-_GAP, :-_GAP]


def _bare(axes: 'Axes') -> None:
    """Labels without a frame and ticks."""
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
