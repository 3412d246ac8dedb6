"""Rotary positions of patches: queries and keys are turned by angles that tell rows and columns.

Source: https://arxiv.org/abs/2104.09864; for images EVA-02 (https://arxiv.org/abs/2303.11331,
section 2) and DINOv3 (https://arxiv.org/abs/2508.10104, section 3.2).

Shapes: B batch, N tokens, Q of them that are turned, H heads, K head size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.layers import at_least_float32

FORMS = ('axial', 'dinov3')


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Turns queries or keys. Two numbers of a head are a point, which angle a turns about 0.

    The K / 2 angles of a patch are place * theta^(-j / (K / 4)), j from 0 to K / 4 - 1: those of
    its row first, then those of its column. Tokens in front of the patches are not turned.

    Attributes:
      form: 'axial': places are 0, 1, 2, ..., and neighbours (2i, 2i + 1) are points, as in EVA-02;
        'dinov3': places are those of the patches' centres in an image from -2 pi to 2 pi, and i
        and i + K / 2 are points.
      theta: base of the frequencies; 10,000 of EVA-02, 100 of DINOv3.
      grid: of 'axial', how many rows and columns the images of pre-training had, onto which places
        are scaled; 0 leaves them as they are.
      shape: rows and columns of the patches.
      prefix: how many tokens stand in front of them.
    """

    form: str
    theta: float
    grid: int = 0
    shape: tuple[int, int] = (0, 0)
    prefix: int = 0

    def __post_init__(self) -> None:
        """Checks the attributes: raises `ValueError`."""
        if self.form not in FORMS:
            raise ValueError(f'unknown rotary form {self.form!r}: one of {", ".join(FORMS)}')
        numbers = isinstance(self.theta, int | float) and type(self.grid) is int
        if not numbers or not 1 < self.theta < 1e12 or not 0 <= self.grid <= 10_000:
            raise ValueError(f'rotary theta {self.theta!r}, grid {self.grid!r}: no such positions')
        if self.grid and self.form != 'axial':
            raise ValueError(f"rotary form {self.form!r} scales its places itself: no 'grid'")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Queries or keys [B, Q, H, K] of the first Q tokens; the same, turned."""
        wide = x.astype(at_least_float32(x.dtype))
        angles = self.angles(x.shape[-1])[None, : x.shape[1], None]
        cos, sin = (jnp.asarray(f(angles), wide.dtype) for f in (np.cos, np.sin))
        if self.form == 'axial':
            first, second = wide[..., 0::2], wide[..., 1::2]
        else:
            first, second = jnp.split(wide, 2, axis=-1)
        points = first * cos - second * sin, second * cos + first * sin
        if self.form == 'axial':
            turned = jnp.stack(points, axis=-1).reshape(x.shape)
        else:
            turned = jnp.concatenate(points, axis=-1)
        return turned.astype(x.dtype)

    def angles(self, head_size: int) -> np.ndarray:
        """Angles [N, K / 2] float64 of all tokens, 0 of those in front.

        Raises:
          ValueError: K is not a multiple of 4.
        """
        return _angles(self, head_size)


@functools.lru_cache(maxsize=8)
def _angles(rotary: Rotary, head_size: int) -> np.ndarray:
    if head_size % 4:
        raise ValueError(f'rotary positions need heads of a multiple of 4, not of {head_size}')
    count = head_size // 4
    frequencies = float(rotary.theta) ** (-np.arange(count) / count)
    rows, columns = (_places(rotary, length)[:, None] * frequencies for length in rotary.shape)
    patches = np.empty((*rotary.shape, 2 * count))
    patches[..., :count] = rows[:, None]
    patches[..., count:] = columns[None]
    return np.concatenate([np.zeros((rotary.prefix, 2 * count)), patches.reshape(-1, 2 * count)])


def _places(rotary: Rotary, length: int) -> np.ndarray:
    """Of as many rows or columns: [length] float64."""
    index = np.arange(length)
    if rotary.form == 'dinov3':
        return 2 * np.pi * ((2 * index + 1) / length - 1)
    return index * (rotary.grid / length if rotary.grid else 1.0)
