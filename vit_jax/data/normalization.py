"""Mean and standard deviation by which libraries scale the channels of images."""

import math
from collections.abc import Sequence

from vit_jax.errors import UserError

# (mean, standard deviation) of the channels that a model takes, in units of white.
Normalization = tuple[Sequence[float], Sequence[float]]
HALF: Normalization = ((0.5,) * 3, (0.5,) * 3)  # -> [-1, 1], what all models here take
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Normalization = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
NORMALIZATIONS = {'half': HALF, 'imagenet': IMAGENET, 'clip': CLIP}


def parse(text: str) -> Normalization | None:
    """What --normalization means: 'half', 'imagenet', 'clip', or 'M,M,M/S,S,S'; '' for None.

    Raises:
      UserError: anything else.
    """
    if not text or text in NORMALIZATIONS:
        return NORMALIZATIONS.get(text)
    try:
        mean, std = (tuple(map(float, part.split(','))) for part in text.split('/'))
        if len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError
    except ValueError as error:
        raise UserError(
            f'--normalization {text}: expected {", ".join(NORMALIZATIONS)}, or mean and standard '
            'deviation of each channel, of a range of [0, 1]: 0.5,0.5,0.5/0.25,0.25,0.25'
        ) from error
    return mean, std
