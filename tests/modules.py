"""What tests do with Flax modules. Each makes one program: to compile operation by operation, as
JAX does outside of `jit`, takes seconds.
"""

import functools
import re

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from vit_jax import models, variants


def shapes(module, *inputs, **named):
    """What `module.init` makes of these inputs, as nested dicts of shapes; traced once."""
    inputs, named = jax.tree.map(_abstract, (inputs, named))
    return _shapes(module, inputs, tuple(named.items()))


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, 'shape') else x


@functools.cache
def _shapes(module, inputs, named):
    arrays = {name: x for name, x in named if hasattr(x, 'shape')}
    options = {name: x for name, x in named if name not in arrays}
    init = functools.partial(module.init, **options)
    return jax.eval_shape(init, jax.random.key(0), *inputs, **arrays)['params']


def params_of(module, *inputs, seed=0, scale=0.2, **named):
    """Random parameters, float32 on the host: around 1 for what scales, else around 0."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            np.float32(path[-1].key == 'scale') + scale * rng.standard_normal(x.shape, np.float32)
        ),
        shapes(module, *inputs, **named),
    )


def apply(module, params, *inputs, train=False, **named):
    """What `module.apply` gives, for arrays by place and by name; `train=None` is not passed on."""
    return _apply(module, params, inputs, named, train)


@functools.partial(jax.jit, static_argnames=('module', 'train'))
def _apply(module, params, inputs, named, train):
    options = {} if train is None else {'train': train}
    return module.apply({'params': params}, *inputs, **named, **options)


@functools.partial(jax.jit, static_argnames='module')
def look_inside(module, params, images):
    """What `models.apply_with_intermediates` gives."""
    return models.apply_with_intermediates(module, params, images)


def shapes_of(config, num_classes, size):
    """What `model.init` makes for images of this side, as nested dicts of shapes.

    One block is traced, and stands for all: to trace those of a large model takes a second.
    """
    one = ml_collections.ConfigDict(config).to_dict()
    blocks = one if variants.is_mixer(one) else one['transformer']
    key = 'num_blocks' if variants.is_mixer(one) else 'num_layers'
    depth, blocks[key] = blocks[key], 1
    module = models.from_config(one, num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    flat = {}
    for name, leaf in traverse_util.flatten_dict(shapes['params'], sep='/').items():
        copies = depth if re.search('(encoderblock|MixerBlock)_0/', name) else 1
        flat |= {name.replace('lock_0/', f'lock_{i}/', 1): leaf for i in range(copies)}
    return traverse_util.unflatten_dict(flat, sep='/')
