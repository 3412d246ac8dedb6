"""Augmentation on the device, inside the jitted training step."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

# Names of the random streams of a step, so that adding one does not change the others.
FLIP, DROPOUT, DEPTH, MIX, FLIP_VERTICAL, ERASE = 0, 1, 2, 3, 4, 5

# Of random erasing: shares of the image's area, smallest aspect ratio, boxes drawn.
ERASED_AREA, ERASED_ASPECT, ERASING_TRIES = (0.02, 1 / 3), 0.3, 10


def step_key(seed: int, step: jax.Array, stream: int) -> jax.Array:
    """The random key of one stream at one step; a pure function of its arguments.

    Args:
      seed: of the run.
      step: number of updates done, int32 scalar.
      stream: which use of randomness, one of the names above.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def draw(position: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform numbers in [0, 1) for each place, float32 [B, *shape].

    Args:
      position: [B] int32, the examples' places in the global batch. The draw depends on key and
        place alone, so it is the same on any number of devices and processes.
      key: of the step.
      shape: of the numbers of one place.
    """
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(position)
    return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys)


def random_flip(images: jax.Array, position: jax.Array, key: jax.Array, axis: int = 2) -> jax.Array:
    """Mirrors each image with probability one half.

    Args:
      images: [B, height, width, channels].
      position: [B] int32, the examples' places in the global batch. The draw depends on key and
        place alone, so it is the same on any number of devices and processes.
      key: of the step.
      axis: 2 for left to right, 1 for upside down.

    Returns:
      [B, height, width, channels].
    """
    flip = jax.vmap(lambda place: jax.random.bernoulli(jax.random.fold_in(key, place)))(position)
    return jnp.where(jnp.expand_dims(flip, (1, 2, 3)), jnp.flip(images, axis), images)


def random_erasing(
    images: jax.Array, position: jax.Array, key: jax.Array, share: float
) -> jax.Array:
    """Fills a random box of some images with noise.

    "Random Erasing" (https://arxiv.org/abs/1708.04896) as timm and DeiT have it: see `erasing_box`;
    the noise has mean 0 and deviation 1 in what the model sees, which is 127.5 grey levels.

    Args:
      images: [B, height, width, channels] in [0, 255].
      position: [B] int32, the examples' places in the global batch; see `random_flip`.
      key: of the step.
      share: of the images that it is done to, in [0, 1].

    Returns:
      float32 [B, height, width, channels]; noise may be outside of [0, 255].
    """

    def erase(image: jax.Array, place: jax.Array) -> jax.Array:
        of_choice, of_box, of_noise = jax.random.split(jax.random.fold_in(key, place), 3)
        box = erasing_box(jax.random.uniform(of_box, (ERASING_TRIES, 4)), *image.shape[:2])
        erased = (box > 0) & jax.random.bernoulli(of_choice, share)
        noise = 127.5 + 127.5 * jax.random.normal(of_noise, image.shape, jnp.float32)
        return jnp.where(jnp.expand_dims(erased, -1), noise, image)

    return jax.vmap(erase)(images.astype(jnp.float32), position)


def erasing_box(draws: jax.Array, height: int, width: int) -> jax.Array:
    """The box of random erasing, by timm's rule: 2 to 33 % of the area, of aspect 0.3 to 1 / 0.3.

    Args:
      draws: [tries, 4] in [0, 1), for each try area, aspect ratio (uniform in its logarithm), and
        place down and across. The first box that is smaller than the image counts.
      height: of the image, pixels.
      width: of the image, pixels.

    Returns:
      [height, width] float32, 1 inside, 0 outside; 0 everywhere if no box is smaller.
    """
    areas = (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draws[:, 0]) * height * width
    aspects = jnp.exp(jnp.log(ERASED_ASPECT) * (1 - 2 * draws[:, 1]))
    heights, widths = jnp.rint(jnp.sqrt(areas * aspects)), jnp.rint(jnp.sqrt(areas / aspects))
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    inside = []
    for sizes, side, places in ((heights, height, draws[:, 2]), (widths, width, draws[:, 3])):
        size = sizes[first]
        start = jnp.floor(places[first] * (side - size + 1))
        pixels = jnp.arange(side, dtype=jnp.float32)
        inside.append((pixels >= start) & (pixels < start + size))
    return (fits.any() & inside[0][:, None] & inside[1][None]).astype(jnp.float32)


def each(
    images: jax.Array,
    position: jax.Array,
    key_of: Callable[[int], jax.Array],
    *,
    flip: bool,
    flip_vertical: bool,
    erasing: float,
) -> jax.Array:
    """What is done to each image alone: mirroring, and random erasing.

    Args:
      images: [B, height, width, channels] in [0, 255].
      position: [B] int32, the examples' places in the global batch.
      key_of: gives the key of a stream of this step.
      flip: whether half are mirrored.
      flip_vertical: whether half are turned upside down.
      erasing: share of which a box is filled with noise.
    """
    if flip:
        images = random_flip(images, position, key_of(FLIP))
    if flip_vertical:
        images = random_flip(images, position, key_of(FLIP_VERTICAL), axis=1)
    if erasing:
        images = random_erasing(images, position, key_of(ERASE), erasing)
    return images


@dataclasses.dataclass(frozen=True)
class Mix:
    """How images are mixed with those of the places before them; the first one's is the last.

    mixup (https://arxiv.org/abs/1710.09412) blends two images; CutMix
    (https://arxiv.org/abs/1905.04899) puts a box of one into the other. Labels are mixed by the
    same shares. With both, each is drawn as often as the other.

    Attributes:
      mixup: both parameters of the Beta distribution of the first image's share; 0 for no mixup.
      cutmix: the same of CutMix, in which one minus the share is the box's area before it is cut at
        the border of the image; 0 for no CutMix.
      per_example: whether shares and boxes are drawn for each place, not once for the batch.
      classes: number of classes where labels are indices of them; 0 for other labels.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    per_example: bool = False
    classes: int = 0

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        previous: Callable[[jax.Array], jax.Array],
    ) -> dict[str, jax.Array]:
        """Mixes a global batch, whose row r is place r.

        Args:
          batch: `image` [B, height, width, channels], `label` [B, ...], and perhaps `weight` [B].
          key: of the step; draws depend on it and the places alone.
          previous: moves what is in each row to the next one, the last to the first.

        Returns:
          The batch, with `image` float32, and `label` float32: [B, classes] of indices of classes;
          `weight` mixed as labels are.
        """
        images, labels = batch['image'].astype(jnp.float32), batch['label']
        count, height, width = images.shape[:3]
        weights, shares = self.draw(key, count, height, width)
        weights = jnp.expand_dims(weights, -1)
        images = weights * images + (1 - weights) * previous(images)
        theirs = previous(labels)
        if self.classes:
            labels, theirs = (jax.nn.one_hot(x, self.classes) for x in (labels, theirs))
        mixed = {**batch, 'image': images}
        if 'weight' in batch:
            weight = batch['weight']
            mixed['weight'] = shares * weight + (1 - shares) * previous(weight)
        shares = jnp.expand_dims(shares, range(1, labels.ndim))
        return {**mixed, 'label': shares * labels + (1 - shares) * theirs}

    def draw(
        self, key: jax.Array, count: int, height: int, width: int
    ) -> tuple[jax.Array, jax.Array]:
        """Weights of each image's own pixels, and of its label.

        Returns:
          Both in [0, 1], float32: [B, height, width], [B]; or [1, height, width], [1] for all.
        """
        keys = key[None]
        if self.per_example:
            keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(count))
        return jax.vmap(lambda key: self._draw_one(key, height, width))(keys)

    def _draw_one(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """Weights of an image's own pixels [height, width], and of its label."""
        of_mixup, of_box, of_centre, of_choice = jax.random.split(key, 4)
        share = jax.random.beta(of_mixup, self.mixup, self.mixup) if self.mixup else 0.0
        share, weights = jnp.float32(share), jnp.full((height, width), share, jnp.float32)
        if self.cutmix:
            area = jax.random.beta(of_box, self.cutmix, self.cutmix)
            box = cutmix_box(area, jax.random.uniform(of_centre, (2,)), height, width)
            cut = jax.random.bernoulli(of_choice) if self.mixup else True
            weights = jnp.where(cut, 1.0 - box, weights)
            share = jnp.where(cut, 1.0 - box.mean(), share)
        return weights, share


def cutmix_box(share: jax.Array, centre: jax.Array, height: int, width: int) -> jax.Array:
    """The box that the other image fills, as timm's `rand_bbox` has it.

    Args:
      share: of the area outside the box, scalar.
      centre: [2] down and across, in [0, 1), of the sides of the image.
      height: of the image, pixels.
      width: of the image, pixels.

    Returns:
      [height, width] float32, 1 inside, 0 outside.
    """
    inside = []
    for place, side in zip(centre, (height, width), strict=True):
        half = jnp.floor(side * jnp.sqrt(1 - share)) // 2
        middle = jnp.floor(place * side)
        pixels = jnp.arange(side, dtype=jnp.float32)
        inside.append((pixels >= middle - half) & (pixels < middle + half))
    return (inside[0][:, None] & inside[1][None]).astype(jnp.float32)
