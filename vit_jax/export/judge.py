"""Judging what an exported model computes against what JAX computes in exact float32.

Bounds, by the type that the exported model computes in:

float32
    The largest absolute difference of an output is at most 1e-5 times its largest absolute value,
    that value taken as at least 1 and at most 10: 1e-5 for outputs of unit scale, 1e-4 for the
    logits of trained weights (about 10). Two correct float32 programs that add up in another order
    differ by about a tenth of that. Attention weights are held to 1e-3: the softmax magnifies the
    rounding of its large scores (JAX's own float32 is up to 8e-5 from its float64 for a trained
    Ti/16), and what is wrong there (a head, a block, the scale) shows in the first decimals.
float16
    The cosine of every image's vector with JAX's is above 0.9999, and the most probable class is
    the same. A class may differ only where JAX's two best logits are closer than the rounding of
    float16, 2 * 2^-10 times the largest absolute logit of the image (each of the two by one unit in
    the last of its 11 bits); such images are listed.
int8
    The cosine of every image's vector with JAX's is above 0.95, and the mean over images above
    0.99. Dynamic quantisation rounds weights and activations to 8 bits, which costs accuracy: a
    trained Ti/16, the size that suffers most, has 0.9945 at the lowest and 0.9982 on average over
    260 photos. The bound leaves 5 times that error (1 - cosine) and is far from a broken model (an
    unrelated vector has cosine 0). How often the most probable class is the same is measured and
    shown, not judged.

No bound is passed by a NaN.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.analysis import compare as parity

DTYPES = ('float32', 'float16', 'int8')

FLOAT32_RELATIVE = 1e-5
FLOAT32_SCALES = (1.0, 10.0)
FLOAT32_ATTENTION = 1e-3
FLOAT16_COSINE = 0.9999
FLOAT16_UNIT = 2.0**-10
INT8_COSINE = 0.95
INT8_MEAN_COSINE = 0.99

SCORES = ('logits', 'probabilities')  # outputs with a most probable class


@dataclasses.dataclass
class Row:
    """One output at one batch size, over all images it was run on.

    Attributes:
        output: its name, see `reference.py`.
        batch: images at once.
        difference: the exported model's from JAX's.
        images: number of images.
        largest: largest absolute value of JAX's.
        lowest_cosine: of an image's values, as a vector, with JAX's.
        sum_cosine: over images.
        close: (image, JAX's class, the exported model's) where those differ and JAX's two best are
            within the rounding of float16.
        changed: the same where they differ by more.
    """

    output: str
    batch: int
    difference: parity.Difference = dataclasses.field(default_factory=parity.Difference)
    images: int = 0
    largest: float = 0.0
    lowest_cosine: float = 1.0
    sum_cosine: float = 0.0
    close: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    changed: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    def add(
        self, ours: np.ndarray, theirs: np.ndarray, keys: Sequence[str], logits: np.ndarray | None
    ) -> None:
        """Takes in a batch.

        Args:
            ours: JAX's, [b, ...].
            theirs: the exported model's.
            keys: names of the images, b.
            logits: JAX's, where the output is one of `SCORES`.

        Raises:
            ValueError: the shapes are not the same.
        """
        self.difference.add(ours, theirs)
        self.images += len(keys)
        self.largest = float(np.maximum(self.largest, np.abs(ours).max()))
        cosines = _cosines(ours, theirs)
        self.lowest_cosine = float(np.minimum(self.lowest_cosine, cosines.min()))
        self.sum_cosine += float(cosines.sum())
        if logits is not None:
            self._compare_classes(theirs, keys, logits)

    def _compare_classes(self, theirs, keys, logits) -> None:
        best, found = logits.argmax(axis=-1), theirs.argmax(axis=-1)
        for place in zip(*np.nonzero(best != found), strict=True):
            scores = logits[place]
            gap = scores[best[place]] - scores[found[place]]
            within = gap <= 2 * FLOAT16_UNIT * np.abs(scores).max()
            entry = (keys[place[0]], int(best[place]), int(found[place]))
            (self.close if within else self.changed).append(entry)

    @property
    def mean_cosine(self) -> float:
        """Over images."""
        return self.sum_cosine / max(self.images, 1)

    @property
    def float32_limit(self) -> float:
        """The largest difference allowed in float32."""
        if self.output == 'attention':
            return FLOAT32_ATTENTION
        low, high = FLOAT32_SCALES
        return FLOAT32_RELATIVE * min(max(self.largest, low), high)

    def passed(self, dtype: str) -> bool:
        """Whether it keeps the bound of a type of `DTYPES`."""
        if dtype == 'float32':
            return self.difference.max <= self.float32_limit
        if dtype == 'float16':
            return self.lowest_cosine > FLOAT16_COSINE and not self.changed
        return self.lowest_cosine > INT8_COSINE and self.mean_cosine > INT8_MEAN_COSINE

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """As JSON has it."""
        return {
            'output': self.output,
            'batch': self.batch,
            'images': self.images,
            'largest_value': _finite(self.largest),
            'difference': self.difference.to_dict(),
            'lowest_cosine': _finite(self.lowest_cosine),
            'mean_cosine': _finite(self.mean_cosine),
            'limit': self.float32_limit if dtype == 'float32' else bound(dtype),
            'passed': self.passed(dtype),
            'top1_differs_within_rounding': [list(entry) for entry in self.close],
            'top1_differs': [list(entry) for entry in self.changed],
        }


def table(rows: Sequence[Row], dtype: str) -> Any:
    """The rows as a `rich.table.Table`."""
    import rich.box
    import rich.table

    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ('output', 'batch', 'images', 'largest', 'max diff', 'mean diff'):
        shown.add_column(name, justify='left' if name == 'output' else 'right', no_wrap=True)
    last = ('limit',) if dtype == 'float32' else ('cosine', 'mean')
    for name in ('same top-1', *last, ''):
        shown.add_column(name, justify='right', no_wrap=True)
    for row in rows:
        difference = row.difference
        same = f'{difference.agree} of {difference.vectors}' if row.output in SCORES else ''
        numbers = (f'{row.lowest_cosine:.6f}', f'{row.mean_cosine:.6f}')
        shown.add_row(
            row.output,
            str(row.batch),
            str(row.images),
            f'{row.largest:.3g}',
            f'{difference.max:.1e}',
            f'{difference.mean:.1e}',
            same,
            *((f'{row.float32_limit:.1e}',) if dtype == 'float32' else numbers),
            'ok' if row.passed(dtype) else 'TOO FAR',
        )
    return shown


def bound(dtype: str) -> str:
    """What is asked of a type of `DTYPES`, in a sentence."""
    if dtype == 'float32':
        low, high = FLOAT32_SCALES
        return (
            f'differences of at most {FLOAT32_RELATIVE:.0e} of the largest value (taken as '
            f'{low:.0f} to {high:.0f}); of attention weights {FLOAT32_ATTENTION:.0e}'
        )
    if dtype == 'float16':
        return (
            f'cosine with JAX above {FLOAT16_COSINE} for every image, and the same top-1 unless '
            'the two classes are closer in JAX than the rounding of float16'
        )
    return (
        f'cosine with JAX above {INT8_COSINE} for every image, and above {INT8_MEAN_COSINE} on '
        'average; top-1 is shown, not judged'
    )


def compare(
    rows: dict[tuple[str, int], Row],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    keys: Sequence[str],
) -> list[str]:
    """Takes a batch into `rows`, under (output, batch size).

    Args:
        rows: grows.
        ours: JAX's outputs, at least those that are judged, and `logits` if there are any.
        theirs: the exported model's; what is in it is judged.
        keys: names of the images.

    Returns:
        What cannot be compared, a sentence each: an output of another shape or type.
    """
    problems = []
    for name, array in theirs.items():
        expected = ours[name]
        if array.shape != expected.shape or array.dtype != np.float32:
            problems.append(
                f'{name} is {array.dtype} {list(array.shape)} at batch {len(keys)}, expected '
                f'float32 {list(expected.shape)}'
            )
            continue
        row = rows.setdefault((name, len(keys)), Row(name, len(keys)))
        row.add(expected, array, keys, ours.get('logits') if name in SCORES else None)
    return problems


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[b] float64, of the values of each image; 1 where both are all zeros."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    product = (a * b).sum(axis=1)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same_zeros = ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(same_zeros, 1.0, product / np.where(norms == 0, 1.0, norms))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
