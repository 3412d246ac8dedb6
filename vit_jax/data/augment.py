"""Augmentation on the device, inside the jitted training step."""

import jax
import jax.numpy as jnp

# Names of the random streams of a step, so that adding one does not change the others.
FLIP, DROPOUT, DEPTH = 0, 1, 2


def step_key(seed: int, step: jax.Array, stream: int) -> jax.Array:
    """The random key of one stream at one step; a pure function of its arguments.

    Args:
      seed: of the run.
      step: number of updates done, int32 scalar.
      stream: which use of randomness, `FLIP`, `DROPOUT` or `DEPTH`.
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


def random_flip(images: jax.Array, position: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half.

    Args:
      images: [B, height, width, channels].
      position: [B] int32, the examples' places in the global batch. The draw depends on key and
        place alone, so it is the same on any number of devices and processes.
      key: of the step.

    Returns:
      [B, height, width, channels].
    """
    flip = jax.vmap(lambda place: jax.random.bernoulli(jax.random.fold_in(key, place)))(position)
    return jnp.where(jnp.expand_dims(flip, (1, 2, 3)), jnp.flip(images, axis=2), images)
