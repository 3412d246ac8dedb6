"""Retrieval: images found by their texts, and texts by their images.

Shapes: N images, T texts, C size of the embeddings. An image may have several texts.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

RECALLS = (1, 5, 10)
DIRECTIONS = ('image_to_text', 'text_to_image')
_AT_ONCE = 1 << 22  # products


def metrics(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, content: np.ndarray
) -> dict[str, float]:
    """How well each image finds one of its texts among all, and each text its image.

    Where images share a text, each of them is right for it, and so is each copy of it for them. Of
    equal cosines, the one of lower index comes first.

    Args:
      images: unit embeddings, float32 [N, C].
      texts: likewise [T, C].
      owner: the image that each text belongs to, int [T]; each image has a text.
      content: equal numbers for equal texts, int [T].

    Returns:
      For both of `DIRECTIONS`: `{direction}_recall1`, `5` and `10`, the share of the queries for
      which a right one is among the first so many, and `{direction}_median_rank`, counted from 1;
      and `mean_recall`, the mean of the six recalls.
    """
    found, recalls = {}, []
    for direction, ranks in zip(DIRECTIONS, _ranks(images, texts, owner, content), strict=True):
        for first in RECALLS:
            recalls.append(float((ranks < first).mean()))
            found[f'{direction}_recall{first}'] = recalls[-1]
        found[f'{direction}_median_rank'] = float(np.median(ranks)) + 1
    return found | {'mean_recall': float(np.mean(recalls))}


def _ranks(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, content: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many come before the first right text of each image [N], right image of each text [T]."""
    content = np.unique(content, return_inverse=True)[1]
    of_images = np.empty(len(images), np.int64)
    for rows, cosines in _products(images, texts):
        own = (owner >= rows.start) & (owner < rows.stop)
        has = np.zeros((len(cosines), content.max() + 1), bool)  # the image, the content
        has[owner[own] - rows.start, content[own]] = True
        of_images[rows] = _before(cosines, has[:, content])
    of_texts = np.empty(len(texts), np.int64)
    for rows, cosines in _products(texts, images):
        contents, place = np.unique(content[rows], return_inverse=True)
        same = np.isin(content, contents)
        has = np.zeros((len(contents), len(images)), bool)  # the content, the image
        has[np.searchsorted(contents, content[same]), owner[same]] = True
        of_texts[rows] = _before(cosines, has[place])
    return of_images, of_texts


def _before(cosines: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many columns come before the first right one in each row; all if it is not finite."""
    first = np.where(right, cosines, -np.inf).argmax(axis=1)[:, None]
    own = np.take_along_axis(cosines, first, axis=1)
    columns = np.arange(cosines.shape[1])[None]
    count = ((cosines > own) | ((cosines == own) & (columns < first))).sum(axis=1)
    return np.where(np.isfinite(own[:, 0]), count, cosines.shape[1])


def loss(
    kind: str, images: np.ndarray, texts: np.ndarray, temperature: float, bias: float
) -> float:
    """The loss of N pairs in one batch, in float64, see `losses`.

    Args:
      kind: 'contrastive' or 'pairwise_sigmoid'.
      images: unit embeddings [N, C].
      texts: of the text of each image, likewise.
      temperature: t.
      bias: b, of the sigmoid.
    """
    total = 0.0
    if kind == 'pairwise_sigmoid':
        for rows, cosines in _products(images, texts):
            logits = temperature * cosines.astype(np.float64) + bias
            own = np.arange(rows.start, rows.stop)[:, None] == np.arange(len(texts))[None]
            total += np.logaddexp(0, np.where(own, -logits, logits)).sum()
        return float(total / len(images))
    for x, y in ((images, texts), (texts, images)):
        for rows, cosines in _products(x, y):
            logits = temperature * cosines.astype(np.float64)
            own = logits[np.arange(len(logits)), np.arange(rows.start, rows.stop)]
            total += (np.logaddexp.reduce(logits, axis=1) - own).sum() / 2
    return float(total / len(images))


def _products(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows of x at a time, and their products with all of y."""
    size = max(1, math.ceil(_AT_ONCE / len(y)))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, x[rows] @ y.T


def words(direction: str) -> str:
    """One of `DIRECTIONS` for people."""
    return direction.replace('_', ' ')


def in_words(values: dict[str, Any], split: str) -> str:
    """A line on the metrics of a split, for people.

    Args:
      values: `metrics`, with the name of the split at the end of each name.
      split: 'val' or 'test'.
    """
    parts = []
    for direction in DIRECTIONS:
        shares = (100 * values[f'{direction}_recall{first}_{split}'] for first in RECALLS)
        median = values[f'{direction}_median_rank_{split}']
        told = ' / '.join(f'{share:.1f}' for share in shares)
        parts.append(f'{words(direction)} {told} % (median rank {median:g})')
    names = ' / '.join(map(str, RECALLS))
    return f'recall at {names}: {", ".join(parts)}'
