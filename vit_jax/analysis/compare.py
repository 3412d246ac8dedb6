"""Comparing two implementations of a model, number by number, and judging what is found.

Both run in float32 and in float64. Where the float64 runs agree to a dozen digits, both compute
the same function, and what is left between the float32 runs is rounding; the distance of each
float32 run from float64 shows whose. What runs the other side is not this module's business: see
`scripts/check_parity.py`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.data.preprocess import normalize

LOGITS_TOLERANCE = 1e-4  # what float32 logits of trained weights may differ by
ROUNDING = 2.0  # two float32 results may lie on opposite sides of the exact one

Outputs = Mapping[str, np.ndarray]

_TOKENS = re.compile(r'(?:Transformer/)?((?:encoderblock|MixerBlock)_\d+)/tokens')


def outputs_of(
    model: Any, params: Mapping[str, Any], dtype: Any = np.float32
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function that computes what two implementations are compared by.

    Args:
        model: a Flax module of `vit_jax.models`; its own dtype does not matter.
        params: its parameters, nested dict of arrays.
        dtype: float32 or float64 (on a CPU or an NVIDIA GPU), of parameters and of all of the
            computation. Matrix products are not rounded to TF32 or bfloat16.

    Returns:
        A function of images [B, height, width, 3] in [-1, 1] that returns 'resnet' (of hybrids) [B,
        h, w, F], 'patch_embedding' [B, N, D], the tokens after each block ('encoderblock_0' or
        'MixerBlock_0', ...) [B, N, D], 'pre_logits' (what the head reads) and, if there is a head,
        'logits', all of `dtype`.
    """
    dtype = np.dtype(dtype)
    wide = dtype == np.float64
    model = model.clone(dtype=dtype)
    with jax.enable_x64(wide):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)

    @jax.jit
    def apply(params, images):
        return models.apply_with_intermediates(model, params, images)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with jax.enable_x64(wide), jax.default_matmul_precision('highest'):
            logits, found = jax.device_get(apply(params, jnp.asarray(images, dtype)))
        patches = found['patch_embedding']
        outputs = {'resnet': found['resnet']} if 'resnet' in found else {}
        outputs['patch_embedding'] = patches.reshape(len(patches), -1, patches.shape[-1])
        outputs |= {m[1]: found[name] for name in found if (m := _TOKENS.fullmatch(name))}
        outputs['pre_logits'] = found['pre_logits']
        return outputs | ({'logits': logits} if model.num_classes else {})

    return run


def made_up_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Images that are no photos but have coarse and fine structure and fill the range of values.

    Args:
        count: number of images.
        size: side, pixels.
        seed: any integer; the same gives the same images.

    Returns:
        float32 [count, size, size, 3] in [-1, 1], multiples of a grey level apart.
    """
    rng = np.random.default_rng(seed)
    areas = rng.uniform(0, 255, (count, 7, 7, 3))
    rows = np.arange(size) * 7 // size
    pixels = areas[:, rows][:, :, rows] + rng.normal(0, 30, (count, size, size, 3))
    return normalize(np.clip(np.rint(pixels), 0, 255).astype(np.float32))


@dataclasses.dataclass
class Difference:
    """How far two arrays are apart, over any number of batches.

    Attributes:
        max: largest absolute difference; NaN if there is a NaN on a side.
        mean: mean absolute difference.
        agree: vectors (along the last axis) whose largest element is at the same place in both.
        vectors: number of vectors.
    """

    max: float = 0.0
    mean: float = 0.0
    agree: int = 0
    vectors: int = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Takes in a batch, two arrays of one shape."""
        if a.shape != b.shape:
            raise ValueError(f'shapes {a.shape} and {b.shape} cannot be compared')
        distance = np.abs(a.astype(np.float64) - b)
        agree = a.argmax(-1) == b.argmax(-1)
        total = self.mean * self.vectors + distance.mean(-1).sum()
        self.vectors += agree.size
        self.mean = float(total / self.vectors)
        self.max = float(np.maximum(self.max, distance.max()))  # keeps a NaN, as max() does not
        self.agree += int(agree.sum())

    def to_dict(self) -> dict[str, float | int]:
        """As JSON has it; not finite becomes None."""
        numbers = dataclasses.asdict(self)
        return {k: v if np.isfinite(v) else None for k, v in numbers.items()}


@dataclasses.dataclass
class Row:
    """One output compared.

    Attributes:
        float32: ours from the other side's, both in float32.
        ours: our float32 from our float64: our rounding.
        theirs: the other side's float32 from its own float64: its rounding.
        float64: ours from the other side's, both in float64.
        largest: largest absolute value.
    """

    float32: Difference = dataclasses.field(default_factory=Difference)
    ours: Difference = dataclasses.field(default_factory=Difference)
    theirs: Difference = dataclasses.field(default_factory=Difference)
    float64: Difference = dataclasses.field(default_factory=Difference)
    largest: float = 0.0

    @property
    def is_rounding(self) -> bool:
        """Whether the float32 runs differ by no more than their own rounding explains.

        That is twice the larger of the two distances from float64, and no false alarm: of one
        function, two results are no further apart than both distances together.
        """
        return self.float32.max <= ROUNDING * max(self.ours.max, self.theirs.max)

    def add(self, ours: np.ndarray, theirs: np.ndarray, ours64: np.ndarray, theirs64: np.ndarray):
        """Takes in a batch of this output."""
        self.float32.add(ours, theirs)
        self.ours.add(ours, ours64)
        self.theirs.add(theirs, theirs64)
        self.float64.add(ours64, theirs64)
        self.largest = float(np.maximum(self.largest, np.abs(theirs64).max()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            'ours_minus_reference': self.float32.to_dict(),
            'ours_minus_own_float64': self.ours.to_dict(),
            'reference_minus_own_float64': self.theirs.to_dict(),
            'ours_minus_reference_in_float64': self.float64.to_dict(),
            'largest_value': self.largest if np.isfinite(self.largest) else None,
            'is_rounding': self.is_rounding,
        }


def add(rows: dict[str, Row], ours: Outputs, theirs: Outputs, ours64: Outputs, theirs64: Outputs):
    """Takes in a batch of all outputs that the other side has; the order of `rows` is its order.

    Raises:
        ValueError: the other side has an output that we do not have, or not of this shape.
    """
    for name, array in theirs.items():
        if name not in ours:
            raise ValueError(f'the reference gives {name}, which our model does not')
        row = rows.setdefault(name, Row())
        row.add(ours[name], array, ours64[name], theirs64[name])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement on a comparison.

    Attributes:
        passed: whether `difference` is within `limit` (a NaN is not).
        output: what was judged: 'logits', or 'pre_logits' where logits prove nothing.
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


def judge(rows: Mapping[str, Row], *, zero_head: bool, tolerance: float | None = None) -> Verdict:
    """Judges by the logits, or, where there are none or they are all zero, by what the head reads.

    Args:
        rows: see `add`.
        zero_head: whether the head's kernel is all zeros, so that logits do not depend on the rest.
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


def table(rows: Mapping[str, Row]) -> str:
    """The rows as text, a line each."""
    lines = [
        f'{"":16} {"largest":>8} | {"ours - PyTorch, float32":^26} | {"from own float64":^19} '
        f'| {"both in":^9}',
        f'{"":16} {"value":>8} | {"max":>8} {"mean":>8} {"argmax":>8} | {"ours":>9} {"PyTorch":>9} '
        f'| {"float64":>9}',
    ]
    for name, row in rows.items():
        same = row.float32
        mark = '' if row.is_rounding else '  more than rounding'
        lines.append(
            f'{name:16} {row.largest:8.3g} | {same.max:8.1e} {same.mean:8.1e} '
            f'{100 * same.agree / same.vectors:7.5g}% | {row.ours.max:9.1e} {row.theirs.max:9.1e} '
            f'| {row.float64.max:9.1e}{mark}'
        )
    return '\n'.join(lines)
