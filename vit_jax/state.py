"""The training state: what a checkpoint holds and the training step transforms."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from vit_jax import groups, models, optim, sharding
from vit_jax.variants import sides


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Random keys and the place in the data are not in it: they follow from seed and step.

    Attributes:
      step: number of steps done, int32 scalar.
      params: parameters, float32.
      opt_state: the optimizer's.
      skipped: number of those steps that left the parameters as they were, because loss or
        gradient was not finite, int32 scalar.
    """

    step: jax.Array
    params: Mapping[str, Any]
    opt_state: optax.OptState
    skipped: jax.Array

    @property
    def model_params(self) -> Mapping[str, Any]:
        """What is evaluated and becomes the model: the moving averages where there are some."""
        if not isinstance(self.opt_state, optim.EmaState):
            return self.params
        return groups.combine(self.opt_state.average, self.params)


@flax.struct.dataclass
class Checkpoint(TrainState):
    """What is saved: the state, and what the host has counted meanwhile.

    Attributes:
      replaced: number of unreadable training examples, of all processes, for which another was
        used, int32 scalar.
    """

    replaced: jax.Array

    @classmethod
    def of(cls, state: TrainState, replaced: Any) -> 'Checkpoint':
        """`replaced`: an array, or its shape, dtype and sharding."""
        return cls(**vars(state), replaced=replaced)

    def state(self) -> TrainState:
        """The state alone."""
        values = dict(vars(self))
        del values['replaced']
        return TrainState(**values)


def init_params(
    model: nn.Module,
    image_size: int | tuple[int, int],
    seed: int,
    *,
    channels: int = 3,
    only: Collection[str] | None = None,
) -> Mapping[str, Any]:
    """New parameters, float32, made on the host's CPU and equal on every machine.

    Args:
      model: a module of `vit_jax.models`.
      image_size: side of the images, or their height and width, pixels.
      seed: of the initial values.
      channels: of the images.
      only: names of those that are wanted, joined by '/' ('head/kernel'); they have the values that
        they have among all. The compiler leaves out the others, which saves seconds.
    """

    @jax.jit
    def init(key: jax.Array) -> Mapping[str, Any]:
        params = _init(model, key, (1, *sides(image_size), channels))
        if only is None:
            return params
        flat = traverse_util.flatten_dict(params, sep='/')
        return traverse_util.unflatten_dict({name: flat[name] for name in only}, sep='/')

    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        return init(jax.random.key(seed))


def _init(model: nn.Module, key: jax.Array, image: tuple[int, ...]) -> Mapping[str, Any]:
    """New parameters of a model of images of this shape; a `models.LitModel` sees texts, too."""
    images = jnp.zeros(image, jnp.float32)
    if not isinstance(model, models.LitModel):
        return model.init(key, images, train=False)['params']
    tokens = jnp.zeros((1, model.pp['max_len']), jnp.int32)
    return model.init(key, images=images, tokens=tokens)['params']


def abstract_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_size: int | tuple[int, int],
    mesh: Mesh,
    *,
    channels: int = 3,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing anything.

    Args:
      model: a module of `vit_jax.models`.
      tx: the optimizer.
      image_size: side of the images, or their height and width, pixels.
      mesh: of `sharding.create_mesh`.
      channels: of the images.

    Returns:
      A `TrainState` of `jax.ShapeDtypeStruct`s.
    """

    def create() -> TrainState:
        params = _init(model, jax.random.key(0), (1, *sides(image_size), channels))
        return new_state(params, tx)

    shapes = jax.eval_shape(create)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.state_sharding(shapes, mesh),
    )


def create_state(
    params: Mapping[str, Any], tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state at step 0, on the devices.

    Args:
      params: nested dict of host arrays, the same in every process; copied.
      tx: the optimizer.
      mesh: of `sharding.create_mesh`.
    """
    params = sharding.put_tree(params, sharding.state_sharding(params, mesh))

    def create(params) -> TrainState:
        return new_state(params, tx)

    shardings = sharding.state_sharding(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)


def new_state(params: Mapping[str, Any], tx: optax.GradientTransformation) -> TrainState:
    """The state at step 0, of arrays as they are, as a pure function; see `create_state`."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), skipped=zero)
