"""Comparing what a model computes here with what it computes elsewhere: differences and limits.

*Parity* (`scripts/check_parity.py`, `ParityRow`): the same weights in PyTorch. Both sides run in
float32 and in float64. Where the float64 runs agree to a dozen digits, both compute the same
function, and what is left between the float32 runs is rounding; the distance of each float32 run
from float64 shows whose.

*Verification of an export* (`export/verify.py`, `ExportRow`): an exported file against JAX in exact
float32. The limits depend on the type that the file computes in:

float32
    The largest absolute difference of an output is at most 1e-5 times its largest absolute value,
    that value taken as at least 1 and at most 10: 1e-5 for outputs of unit scale, 1e-4 for the
    logits of trained weights (about 10). Two correct float32 programs that add up in another order
    differ by about a tenth of that. Attention weights have a limit of 1e-3: the softmax magnifies
    the rounding of its large scores (JAX's own float32 is up to 8e-5 from its float64 for a trained
    Ti/16), and an error there (a head, a block, the scale) shows in the first decimals.
float16
    The cosine of every image's vector with JAX's is above 0.9999, and the most probable class is
    the same. A class may differ only where JAX's two best logits are closer than the rounding of
    float16, 2 * 2^-10 times the largest absolute logit of the image (each of the two by one unit in
    the last of its 11 bits); such images are listed.
int8
    The cosine of every image's vector with JAX's is above 0.95, and the mean over images above
    0.99. Dynamic quantisation rounds weights and activations to 8 bits, which costs accuracy: a
    trained Ti/16, the size that suffers most, has 0.9945 at the lowest and 0.9982 on average over
    260 photos. The limit leaves 5 times that error (1 - cosine) and is far from a broken model (an
    unrelated vector has cosine 0). How often the most probable class is the same is measured and
    shown; nothing depends on it.

A NaN is within no limit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LOGITS_TOLERANCE = 1e-4  # between float32 logits of trained weights
ROUNDING = 2.0  # two float32 results may lie on opposite sides of the exact one

DTYPES = ('float32', 'float16', 'int8')
FLOAT32_RELATIVE = 1e-5
FLOAT32_SCALES = (1.0, 10.0)
FLOAT32_ATTENTION = 1e-3
FLOAT16_COSINE = 0.9999
FLOAT16_UNIT = 2.0**-10
INT8_COSINE = 0.95
INT8_MEAN_COSINE = 0.99

LIMITS = {
    'float32': f'differences of at most {FLOAT32_RELATIVE:.0e} of the largest value (taken as '
    f'{FLOAT32_SCALES[0]:.0f} to {FLOAT32_SCALES[1]:.0f}); of attention weights '
    f'{FLOAT32_ATTENTION:.0e}',
    'float16': f'cosine with JAX above {FLOAT16_COSINE} for every image, and the same top-1 unless '
    'the two classes are closer in JAX than the rounding of float16',
    'int8': f'cosine with JAX above {INT8_COSINE} for every image, and above {INT8_MEAN_COSINE} on '
    'average; top-1 is shown, and not part of the limit',
}

SCORES = ('logits', 'probabilities')  # outputs with a most probable class

Outputs = Mapping[str, np.ndarray]


def compiled(
    compute: Callable[[Any, jax.Array], dict[str, jax.Array]],
    params: Mapping[str, Any],
    dtype: Any = np.float32,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function of (parameters, images), compiled for exact arithmetic and given its parameters.

    Args:
        compute: the function; computes in the type of its arguments.
        params: nested dict of arrays.
        dtype: float32 or float64 (on a CPU or an NVIDIA GPU), of parameters and images. Matrix
            products are not rounded to TF32 or bfloat16.

    Returns:
        A function of images [B, height, width, 3] that gives NumPy arrays.
    """
    wide = np.dtype(dtype) == np.float64
    with jax.enable_x64(wide):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    apply = jax.jit(compute)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with jax.enable_x64(wide), jax.default_matmul_precision('highest'):
            return jax.device_get(apply(params, jnp.asarray(images, dtype)))

    return run


def zero_head(params: Mapping[str, Any]) -> bool:
    """Whether there is a head, all zeros: logits then do not depend on the image."""
    heads = [params[name] for name in ('head', 'head_dist') if name in params]
    return bool(heads) and not any(np.any(head['kernel']) for head in heads)


@dataclasses.dataclass
class Difference:
    """How far two arrays are apart, over any number of batches.

    Attributes:
        max: largest absolute difference; NaN if there is a NaN on a side.
        mean: mean absolute difference.
        agree: vectors (along the last axis) whose largest element is at the same place in both.
        vectors: number of vectors.
        worst: the image that has the largest difference: its name, or its number.
        images: number of images.
        largest: largest absolute value of the second array.
        lowest_cosine: of an image's values, as a vector, in one array with those in the other.
        sum_cosine: over images.
    """

    max: float = 0.0
    mean: float = 0.0
    agree: int = 0
    vectors: int = 0
    worst: int | str = 0
    images: int = 0
    largest: float = 0.0
    lowest_cosine: float = 1.0
    sum_cosine: float = 0.0

    def add(self, a: np.ndarray, b: np.ndarray, keys: Sequence[str] = ()) -> None:
        """Takes in a batch, two arrays [b, ...] of one shape; `keys` are names of the images."""
        if a.shape != b.shape:
            raise ValueError(f'shapes {a.shape} and {b.shape} cannot be compared')
        with np.errstate(invalid='ignore', over='ignore'):  # not finite shows in the result
            distance = np.abs(a.astype(np.float64) - b)
            cosines = _cosines(a, b)
        agree = a.argmax(-1) == b.argmax(-1)
        total = self.mean * self.vectors + distance.mean(-1).sum()
        self.vectors += agree.size
        self.mean = float(total / self.vectors)
        of_images = distance.reshape(len(distance), -1).max(axis=1)
        if not of_images.max() <= self.max:
            worst = int(of_images.argmax())  # of a NaN, the first one
            self.worst = keys[worst] if keys else self.images + worst
        self.max = float(np.maximum(self.max, of_images.max()))  # keeps a NaN, as max() does not
        self.agree += int(agree.sum())
        self.images += len(a)
        self.largest = float(np.maximum(self.largest, np.abs(b).max()))
        self.lowest_cosine = float(np.minimum(self.lowest_cosine, cosines.min()))
        self.sum_cosine += float(cosines.sum())

    @property
    def mean_cosine(self) -> float:
        """Over images."""
        return self.sum_cosine / max(self.images, 1)

    def to_dict(self) -> dict[str, float | int | str | None]:
        """As JSON has it; not finite becomes None."""
        counts = {'agree': self.agree, 'vectors': self.vectors, 'worst': self.worst}
        return {'max': _finite(self.max), 'mean': _finite(self.mean), **counts}


@dataclasses.dataclass
class ParityRow:
    """One output of two implementations.

    Attributes:
        float32: ours from the other side's, both in float32.
        ours: our float32 from our float64: our rounding.
        theirs: the other side's float32 from its own float64: its rounding.
        float64: ours from the other side's, both in float64.
    """

    float32: Difference = dataclasses.field(default_factory=Difference)
    ours: Difference = dataclasses.field(default_factory=Difference)
    theirs: Difference = dataclasses.field(default_factory=Difference)
    float64: Difference = dataclasses.field(default_factory=Difference)

    @property
    def is_rounding(self) -> bool:
        """Whether the float32 runs differ by no more than their own rounding explains.

        That is twice the larger of the two distances from float64, and no false alarm: of one
        function, two results are no further apart than both distances together.
        """
        return self.float32.max <= ROUNDING * max(self.ours.max, self.theirs.max)

    def add(
        self, ours: np.ndarray, theirs: np.ndarray, ours64: np.ndarray, theirs64: np.ndarray
    ) -> None:
        """Takes in a batch of this output."""
        self.float32.add(ours, theirs)
        self.ours.add(ours, ours64)
        self.theirs.add(theirs, theirs64)
        self.float64.add(ours64, theirs64)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            'ours_minus_reference': self.float32.to_dict(),
            'ours_minus_own_float64': self.ours.to_dict(),
            'reference_minus_own_float64': self.theirs.to_dict(),
            'ours_minus_reference_in_float64': self.float64.to_dict(),
            'largest_value': _finite(self.float64.largest),
            'is_rounding': self.is_rounding,
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a parity check.

    Attributes:
        passed: whether `difference` is within `limit` (a NaN is not).
        output: what decides: 'logits', or 'pre_logits' where logits prove nothing.
        difference: largest absolute difference of it.
        limit: what was allowed.
        why: where the limit comes from.
    """

    passed: bool
    output: str
    difference: float
    limit: float
    why: str

    def __str__(self) -> str:
        word = 'PASS' if self.passed else 'FAIL'
        relation = 'within' if self.passed else 'beyond'
        return (
            f'{word}: {self.output} differ by {self.difference:.2g}, {relation} the limit of '
            f'{self.limit:.2g} ({self.why})'
        )


def parity_verdict(
    rows: Mapping[str, ParityRow], *, zero_head: bool, tolerance: float | None = None
) -> Verdict:
    """Decides by the logits, or, where there are none or they are all zero, by what the head reads.

    Args:
        rows: of each output.
        zero_head: see `zero_head`.
        tolerance: the limit; by default 1e-4, or twice the distance of the other side's float32 run
            from its float64 run if that is more.
    """
    output = 'logits' if 'logits' in rows and not zero_head else 'pre_logits'
    row = rows[output]
    rounding = ROUNDING * row.theirs.max
    if tolerance is not None:
        limit, why = tolerance, '--tolerance'
    elif rounding > LOGITS_TOLERANCE:
        limit, why = rounding, "twice the distance of PyTorch's float32 from its float64"
    else:
        limit, why = LOGITS_TOLERANCE, 'the default'
    return Verdict(row.float32.max <= limit, output, row.float32.max, limit, why)


@dataclasses.dataclass
class ExportRow:
    """One output of an exported model at one batch size, over all images it was run on.

    Attributes:
        output: its name, see `export/outputs.py`.
        batch: images at once.
        difference: the exported model's from JAX's.
        close: (image, JAX's class, the exported model's) where those differ and JAX's two best are
            within the rounding of float16.
        changed: the same where they differ by more.
    """

    output: str
    batch: int
    difference: Difference = dataclasses.field(default_factory=Difference)
    close: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    changed: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    def add(
        self, ours: np.ndarray, theirs: np.ndarray, keys: Sequence[str], logits: np.ndarray | None
    ) -> None:
        """Takes in a batch of JAX's and the exported model's values, [b, ...], of one shape.

        `keys` are names of the images; `logits` JAX's, where the output is one of `SCORES`.
        """
        self.difference.add(theirs, ours, keys)
        if logits is None:
            return
        best, found = logits.argmax(axis=-1), theirs.argmax(axis=-1)
        for place in zip(*np.nonzero(best != found), strict=True):
            scores = logits[place]
            gap = scores[best[place]] - scores[found[place]]
            within = gap <= 2 * FLOAT16_UNIT * np.abs(scores).max()
            entry = (keys[place[0]], int(best[place]), int(found[place]))
            (self.close if within else self.changed).append(entry)

    @property
    def float32_limit(self) -> float:
        """The largest difference allowed in float32."""
        if self.output == 'attention':
            return FLOAT32_ATTENTION
        low, high = FLOAT32_SCALES
        return FLOAT32_RELATIVE * min(max(self.difference.largest, low), high)

    def passed(self, dtype: str) -> bool:
        """Whether it is within the limit of a type of `DTYPES`."""
        found = self.difference
        if dtype == 'float32':
            return found.max <= self.float32_limit
        if dtype == 'float16':
            return found.lowest_cosine > FLOAT16_COSINE and not self.changed
        return found.lowest_cosine > INT8_COSINE and found.mean_cosine > INT8_MEAN_COSINE

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """As JSON has it."""
        found = self.difference
        return {
            'output': self.output,
            'batch': self.batch,
            'images': found.images,
            'largest_value': _finite(found.largest),
            'difference': found.to_dict(),
            'lowest_cosine': _finite(found.lowest_cosine),
            'mean_cosine': _finite(found.mean_cosine),
            'limit': self.float32_limit if dtype == 'float32' else LIMITS[dtype],
            'passed': self.passed(dtype),
            'top1_differs_within_rounding': [list(entry) for entry in self.close],
            'top1_differs': [list(entry) for entry in self.changed],
        }


def add_export(
    rows: dict[tuple[str, int], ExportRow], ours: Outputs, theirs: Outputs, keys: Sequence[str]
) -> list[str]:
    """Takes a batch into `rows`, under (output, batch size).

    Args:
        rows: grows.
        ours: JAX's, at least those that are compared, and `logits` if there are any.
        theirs: the exported model's, all of which are compared.
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
        row = rows.setdefault((name, len(keys)), ExportRow(name, len(keys)))
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
    return value if np.isfinite(value) else None
