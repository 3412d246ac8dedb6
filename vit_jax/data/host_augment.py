"""Augmentation of each training crop on the host, in whole grey levels.

RandAugment as AugReg has it (`randaugment`) or as timm has it, 3-Augment, colour jitter
(`pillow_operations`).
"""

import dataclasses
import re
from typing import Any

import numpy as np

from vit_jax.data.randaugment import RandAugment
from vit_jax.errors import UserError

CHANNELS = (1, 3)  # of images that it is for
MAX_MAGNITUDE, MAX_LAYERS = 30, 16
_LAYERS_AND_MAGNITUDE = re.compile(r'(\d{1,2}),(\d{1,2}(?:\.\d+)?)')
_TIMM = re.compile(r'rand((?:-(?:m|n|mstd|p|inc)\d{1,3}(?:\.\d{1,6})?)*)')


@dataclasses.dataclass(frozen=True)
class TimmRandAugment:
    """timm's RandAugment, whose operations all get stronger with the magnitude (its `inc1`).

    Each layer draws an operation and does it with probability `share`; of most the direction is
    drawn, too. From DeiT: https://arxiv.org/abs/2012.12877.

    Attributes:
      magnitude: mean of the strength of operations, 0 to 10.
      layers: operations for an image.
      std: standard deviation of the strength, which is then cut to 0 to 10.
      share: of layers that do something, in [0, 1].
    """

    magnitude: float = 10.0
    layers: int = 2
    std: float = 0.0
    share: float = 0.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another image of the same size and type, see `RandAugment`."""
        from vit_jax.data import pillow_operations as pillow  # Pillow takes a while to import

        def layers(picture: Any, rng: np.random.Generator) -> Any:
            for index in rng.integers(len(pillow.NAMES), size=self.layers):
                if rng.random() < self.share:
                    level = min(max(rng.normal(self.magnitude, self.std), 0.0), 10.0)
                    sign = 1 if rng.random() < 0.5 else -1
                    picture = pillow.OPERATIONS[pillow.NAMES[index]](picture, level / 10, sign)
            return picture

        return pillow.change(image, layers, rng)


@dataclasses.dataclass(frozen=True)
class HostAugment:
    """What is done to a crop, in the order of the attributes; nothing by default.

    Attributes:
      randaug: RandAugment.
      three_augment: whether each image is made grey, solarized or blurred, one of the three: DeiT
        III (https://arxiv.org/abs/2204.07118).
      color_jitter: j, for factors of brightness, contrast and saturation in [1 - j, 1 + j], in any
        order, as torchvision's `ColorJitter(j, j, j)`.
    """

    randaug: RandAugment | TimmRandAugment | None = None
    three_augment: bool = False
    color_jitter: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.randaug or self.three_augment or self.color_jitter)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> None:
        """Changes a crop in place; its pixels are cut off to whole grey levels before.

        Args:
          pixels: uint8 or float32 [height, width, 1 or 3] in [0, 255].
          rng: where the randomness comes from.
        """
        from vit_jax.data import pillow_operations as pillow

        image = np.clip(pixels, 0, 255).astype(np.uint8)
        if self.randaug:
            image = self.randaug(image, rng)
        if self.three_augment:
            image = pillow.change(image, pillow.grey_solarized_or_blurred, rng)
        if self.color_jitter:
            image = pillow.change(image, pillow.color_jitter(self.color_jitter), rng)
        pixels[...] = image


def randaug_of(text: str) -> RandAugment | TimmRandAugment | None:
    """RandAugment as `config.randaug` says it.

    Args:
      text: 'LAYERS,MAGNITUDE', as big_vision's `randaug(2,10)`; or as timm spells its own,
        'rand-m9-mstd0.5-inc1'. '' for none.

    Raises:
      UserError: it is neither.
    """
    if not text:
        return None
    if found := _LAYERS_AND_MAGNITUDE.fullmatch(text.replace(' ', '')):
        layers, magnitude = int(found[1]), float(found[2])
        if 1 <= layers <= MAX_LAYERS and magnitude <= MAX_MAGNITUDE:
            return RandAugment(layers, magnitude)
    if found := _TIMM.fullmatch(text):
        given = dict(re.findall(r'-([a-z]+)([\d.]+)', found[1]))
        made = TimmRandAugment(
            magnitude=float(given.get('m', 10)),
            layers=int(float(given.get('n', 2))),
            std=float(given.get('mstd', 0)),
            share=float(given.get('p', 0.5)),
        )
        if given.get('inc') == '1' and made.magnitude <= 10 and made.share <= 1:
            if 1 <= made.layers <= MAX_LAYERS and made.std <= 10:
                return made
    raise UserError(
        f"config.randaug={text!r} is neither 'LAYERS,MAGNITUDE' ('2,15'; at most {MAX_LAYERS} and "
        f"{MAX_MAGNITUDE}) nor one of timm's with increasing strength ('rand-m9-mstd0.5-inc1'; m "
        'and mstd at most 10, p at most 1, n layers)'
    )
