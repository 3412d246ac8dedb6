"""Small models of every family, with what JAX computes of them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.data.preprocess import Preprocess
from vit_jax.inference import model_folder

_ENCODER = {
    'mlp_dim': 48,
    'num_heads': 4,
    'num_layers': 2,
    'attention_dropout_rate': 0.0,
    'dropout_rate': 0.0,
}
_VIT = {
    'model_name': None,
    'patches': {'size': (8, 8)},
    'hidden_size': 24,  # so that K = 6 and its root is no power of two
    'transformer': _ENCODER,
    'classifier': 'token',
    'representation_size': None,
}
# name -> (config, side of the image)
CONFIGS = {
    'token': (_VIT, 32),
    'gap': (_VIT | {'classifier': 'gap'}, 32),
    'pre_logits': (_VIT | {'representation_size': 20}, 32),
    'gap_pre_logits': (_VIT | {'classifier': 'gap', 'representation_size': 20}, 32),
    'mlp_head': (_VIT | {'mlp_head': True}, 32),
    'distilled': (_VIT | {'distilled': True}, 32),
    'gelu': (_VIT | {'act': 'gelu', 'representation_size': 20, 'representation_act': 'relu'}, 32),
    'multi_label': (_VIT | {'multi_label': True}, 32),
    'avgmax': (
        _VIT
        | {'classifier': 'avgmax', 'class_token': True, 'fc_norm': True}
        | {'act': 'quick_gelu', 'layer_norm_eps': 0.01},
        32,
    ),
    'no_position_embedding': (
        _VIT | {'transformer': _ENCODER | {'add_position_embedding': False}},
        32,
    ),
    # The pieces that families of today are made of.
    'registers': (
        _VIT
        | {'registers': 2, 'classifier': 'token_gap'}
        | {'transformer': _ENCODER | {'layer_scale': True}},
        32,
    ),
    'map': (
        _VIT
        | {'classifier': 'map', 'patch_bias': False, 'registers': 2, 'register_positions': True}
        | {'transformer': _ENCODER | {'pre_norm': True}},
        32,
    ),
    'gated': (
        _VIT
        | {'classifier': 'gap', 'class_token': True, 'final_norm': False, 'act': 'silu'}
        | {'transformer': _ENCODER | {'gated_mlp': True, 'qk_norm': True}},
        32,
    ),
    'dinov3': (
        _VIT
        | {'rotary': {'form': 'dinov3', 'theta': 100.0}, 'registers': 2, 'hidden_size': 16}
        | {
            'transformer': _ENCODER
            | {'add_position_embedding': False, 'layer_scale': True, 'qkv_bias': 'qv'},
        },
        32,
    ),
    'eva02': (
        _VIT
        | {'rotary': {'form': 'axial', 'theta': 10_000.0, 'grid': 3}, 'hidden_size': 16}
        | {'classifier': 'gap', 'class_token': True, 'fc_norm': True, 'act': 'silu'}
        | {
            'transformer': _ENCODER
            | {'gated_mlp': True, 'mlp_norm': True, 'attention_norm': True}
            | {'qk_norm': True, 'qkv_bias': ''},
        },
        32,
    ),
    # Odd and even sides on the way, whose 'SAME' padding is even and uneven.
    'hybrid_root': (
        _VIT | {'patches': {'size': (1, 1)}, 'resnet': {'num_layers': (), 'width_factor': 0.5}},
        21,
    ),
    'hybrid_stages': (
        _VIT | {'patches': {'size': (2, 2)}, 'resnet': {'num_layers': (2, 1), 'width_factor': 0.5}},
        47,
    ),
    'mixer': (
        {
            'model_name': None,
            'patches': {'size': (8, 8)},
            'num_blocks': 2,
            'hidden_dim': 24,
            'tokens_mlp_dim': 20,
            'channels_mlp_dim': 48,
        },
        32,
    ),
}


@dataclasses.dataclass
class Case:
    """A model, images [7, side, side, 3], and what JAX makes of them."""

    model: model_folder.Model
    images: np.ndarray
    logits: np.ndarray
    values: dict[str, np.ndarray]


def made_up_model(config: dict[str, Any], side: int, classes: int = 5) -> model_folder.Model:
    """A model with random weights, whose logits are of unit scale."""
    module = models.from_config(config, num_classes=classes)
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(0)

    def leaf(path, like):
        values = rng.standard_normal(like.shape, np.float32)
        if path[-1].key == 'scale':
            return 1 + np.float32(0.2) * values
        if path[-1].key != 'kernel':
            return np.float32(0.2) * values
        # Inputs of a layer: [D, H, K] is a projection to heads, all others end with their outputs.
        to_heads = len(like.shape) == 3 and path[-2].key != 'out'
        inputs = like.shape[0] if to_heads else like.size // like.shape[-1]
        return values / np.float32(np.sqrt(inputs))

    params = jax.tree_util.tree_map_with_path(leaf, shapes['params'])
    names = tuple(f'Blüte {i}' for i in range(classes))
    return model_folder.Model(
        module, params, config, names, Preprocess(crop=side), {'dataset': 'made up'}
    )


@functools.cache
def _case(name: str) -> Case:
    config, side = CONFIGS[name]
    model = made_up_model(config, side)
    images = np.random.default_rng(1).uniform(-1, 1, (7, side, side, 3)).astype(np.float32)
    compute = jax.jit(
        functools.partial(
            models.apply_with_intermediates, model.model, attention_weights=name != 'mixer'
        )
    )
    logits, values = jax.tree.map(np.asarray, compute(model.params, images))
    assert 0.1 < np.abs(logits).max() < 10
    return Case(model, images, logits, values)


@pytest.fixture
def case():
    """`case(name)`: the model of this name in `CONFIGS`, computed once in a session."""
    return _case


@pytest.fixture
def made_up():
    """`made_up(config, side, classes)`: any other model."""
    return made_up_model
