"""Resizes what depends on the input: position embeddings and the patch embedding's kernel."""

import math

import numpy as np
from scipy import ndimage

from vit_jax.errors import UserError

# Ways to make a kernel for another patch size, see `resize_patch_embedding`.
PATCH_METHODS = ('pseudo-inverse', 'bilinear')


def resize_position_embedding(
    embedding: np.ndarray,
    count: int,
    *,
    grid: tuple[int, int] | None = None,
    source_grid: tuple[int, int] | None = None,
    source: str = 'the checkpoint',
) -> np.ndarray:
    """Resizes a grid of position embeddings, bilinearly, with the corners aligned.

    By `scipy.ndimage.zoom(grid, order=1)`, which the original release uses, too: the outermost
    positions of the old and of the new grid coincide. (`jax.image.resize` and timm align the outer
    *edges* of the patches, which gives other values.)

    Args:
        embedding: [1, rows * columns, hidden_size] float32, of the patches alone.
        count: positions of the result.
        grid: (rows, columns) of the result; None for a square.
        source_grid: (rows, columns) of `embedding`; None for a square.
        source: name of the checkpoint for errors.

    Returns:
        [1, count, hidden_size], of the dtype of `embedding`.

    Raises:
        UserError: the old or the new grid is not square and was not given, or does not agree with
            the number of positions.
    """
    embedding = np.asarray(embedding)
    rows, columns = grid_of(embedding.shape[1], source_grid, source, source)
    new_rows, new_columns = grid_of(count, grid, 'the model', source)
    values = embedding[0].reshape(rows, columns, -1).astype(np.float64)
    # 'nearest': rounding must not bring the last position outside, where 'constant' has zeros.
    values = ndimage.zoom(
        values, (new_rows / rows, new_columns / columns, 1), order=1, mode='nearest'
    )
    return values.reshape(1, count, -1).astype(embedding.dtype)


def resize_position_embedding_bicubic(
    embedding: np.ndarray,
    grid: tuple[int, int],
    source_grid: tuple[int, int],
    *,
    antialias: bool,
) -> np.ndarray:
    """Resizes a grid of position embeddings as PyTorch's `interpolate(mode='bicubic')` does.

    As classes of transformers do, which take images of any size: with the outer edges of the
    patches aligned, by the kernel of Keys 1981, https://doi.org/10.1109/TASSP.1981.1163711,
    equation 15.

    Args:
        embedding: [1, rows * columns, hidden_size], of the patches alone.
        grid: (rows, columns) of the result.
        source_grid: (rows, columns) of `embedding`.
        antialias: whether the kernel grows with the reduction. PyTorch has a = -1/2 in the kernel
            then, and else -3/4.

    Returns:
        [1, new rows * new columns, hidden_size], of the dtype of `embedding`.
    """
    embedding = np.asarray(embedding)
    rows, columns = (
        _bicubic(old, new, antialias) for old, new in zip(source_grid, grid, strict=True)
    )
    values = embedding.reshape(*source_grid, -1)
    resized = np.einsum('yh,xw,hwd->yxd', rows, columns, values, optimize=True)
    return resized.reshape(1, -1, embedding.shape[-1]).astype(embedding.dtype)


def _bicubic(old: int, new: int, antialias: bool) -> np.ndarray:
    """The matrix [new, old] that resizes an axis; float64."""
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    wide, a = (max(old / new, 1), -0.5) if antialias else (1, -0.75)
    first = math.floor(-2 * wide - 1)  # what lies beyond the edges, too
    places = np.arange(first, old - first)
    distance = np.abs(places - centres[:, None]) / wide
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    matrix = np.zeros((new, old))
    if antialias:  # what lies beyond does not count
        matrix += weights[:, -first : old - first]
        return matrix / matrix.sum(axis=1, keepdims=True)
    np.add.at(matrix.T, places.clip(0, old - 1), weights.T)  # and else it is the outermost one
    return matrix


def resize_patch_embedding(
    kernel: np.ndarray, size: tuple[int, int], method: str = 'pseudo-inverse'
) -> np.ndarray:
    """Resizes the kernel of a patch embedding to another patch size.

    By the pseudo-inverse, the rule of FlexiViT (Beyer et al. 2022, https://arxiv.org/abs/2212.08013,
    section 3.4) and big_vision: a patch that is resized (bilinearly, without antialiasing) and then
    embedded with the new kernel gives what the old kernel gave for the patch. For larger patches
    exactly, for smaller ones as nearly as can be (least squares). Or bilinearly, as if the kernel
    were an image: then outputs grow with the number of pixels of a patch.

    Args:
        kernel: [height, width, channels, hidden_size] float32.
        size: the new (height, width) of a patch, pixels.
        method: one of `PATCH_METHODS`.

    Returns:
        [*size, channels, hidden_size] of the dtype of `kernel`.
    """
    import cv2

    kernel = np.asarray(kernel)
    # An identity that is resized is the matrix [new, old] that resizes.
    rows, columns = (
        cv2.resize(np.eye(old), (old, new), interpolation=cv2.INTER_LINEAR)
        for old, new in zip(kernel.shape[:2], size, strict=True)
    )
    if method == 'pseudo-inverse':
        rows, columns = np.linalg.pinv(rows.T), np.linalg.pinv(columns.T)
    resized = np.einsum('yh,xw,hwcd->yxcd', rows, columns, kernel, optimize=True)
    return resized.astype(kernel.dtype)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Gives the kernel of a first layer another number of input channels, by timm's rule.

    One channel gets the sum over the old ones: a grey image, seen as equal red, green and blue,
    embeds as before. Other numbers repeat the old channels in turn, scaled by old / new, so that
    activations keep their size.

    Args:
        kernel: [height, width, old channels, features] float32.
        channels: the new number.

    Returns:
        [height, width, channels, features] of the dtype of `kernel`.
    """
    kernel = np.asarray(kernel)
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = kernel[:, :, np.arange(channels) % old]
    return repeated * kernel.dtype.type(old / channels)


def square(count: int) -> tuple[int, int] | None:
    """(rows, columns) of a square of `count` positions; None if there is no such square."""
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None


def grid_of(count: int, grid: tuple[int, int] | None, owner: str, source: str) -> tuple[int, int]:
    """(rows, columns) of `count` positions: `grid` if it has as many, a square if it is None.

    Raises:
        UserError: neither, named with `owner`, whose positions they are, and the checkpoint.
    """
    found = grid or square(count)
    if not found or found[0] * found[1] != count or count < 1:
        shape = f'grid of {grid[0]} x {grid[1]}' if grid else 'square grid'
        argument = 'source_grid' if owner == source else 'grid'
        raise UserError(
            f'{source}: cannot resize the position embeddings: {owner} has {count} positions, '
            f'which is not a {shape}. Say {argument}=(rows, columns), or use square images'
        )
    return found
