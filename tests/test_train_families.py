"""Hybrids, Mixers, distilled models and the MLP head through whole runs: train, save, fine-tune."""

import importlib
import json

import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import models, train
from vit_jax.checkpoint import infer, npz
from vit_jax.configs import digits
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import pytorch as export_pytorch
from vit_jax.inference import model_folder
from vit_jax.run import initial_weights

VIT = {
    'patches': {'size': (8, 8)},
    'hidden_size': 16,
    'transformer': {
        'mlp_dim': 32,
        'num_heads': 2,
        'num_layers': 1,
        'attention_dropout_rate': 0.0,
        'dropout_rate': 0.0,
    },
    'classifier': 'token',
    'representation_size': None,
}
FAMILIES = {
    'hybrid': VIT | {
        'patches': {'size': (1, 1)}, 'resnet': {'num_layers': (1,), 'width_factor': 0.5},
    },
    'distilled': VIT | {'distilled': True},
    'mlp_head': VIT | {'mlp_head': True},
    'dinov2': VIT | {
        'registers': 2, 'classifier': 'token_gap', 'act': 'silu',
        'transformer': VIT['transformer'] | {'layer_scale': True, 'gated_mlp': True},
    },
    'clip_map': VIT | {
        'patch_bias': False, 'classifier': 'map',
        'transformer': VIT['transformer'] | {'pre_norm': True, 'qk_norm': True},
    },
    'dinov3': VIT | {
        'registers': 2, 'rotary': {'form': 'dinov3', 'theta': 100.0},
        'transformer': VIT['transformer'] | {
            'layer_scale': True, 'qkv_bias': 'qv', 'add_position_embedding': False,
        },
    },
    'eva02': VIT | {
        'classifier': 'gap', 'class_token': True, 'fc_norm': True, 'act': 'silu',
        'rotary': {'form': 'axial', 'theta': 10_000.0, 'grid': 2},
        'transformer': VIT['transformer'] | {
            'gated_mlp': True, 'mlp_norm': True, 'qkv_bias': 'qv',
        },
    },
    'mixer': {
        'patches': {'size': (4, 4)}, 'hidden_dim': 16, 'num_blocks': 1, 'tokens_mlp_dim': 8,
        'channels_mlp_dim': 32,
    },
}  # fmt: skip
NEW_WHEN_FINE_TUNED = {
    'hybrid': {'head'},
    'distilled': {'head', 'head_dist'},
    'mlp_head': {'head', 'head_hidden'},
    'dinov2': {'head'},
    'clip_map': {'head'},
    'dinov3': {'head'},
    'eva02': {'head'},
    'mixer': {'head'},
}


def make_config(family, **changes):
    config = digits.get_config()
    config.report = False
    config.model = {'model_name': f'{family}-digits', **FAMILIES[family]}
    config.pp.crop, config.pp.resize = 16, 0
    config.batch, config.batch_eval, config.total_steps, config.warmup_steps = 64, 360, 24, 3
    config.progress_every, config.eval_every, config.checkpoint_every = 4, 24, 24
    config.base_lr = 0.01
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


def shapes_of(model, side=16):
    """Of the parameters for images of this many pixels."""
    images = jnp.zeros((1, side, side, 3))
    return modules.shapes(model, images, train=False)


def random_params(model):
    """Of a model for 16 x 16 pixels."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), shapes_of(model))


@pytest.mark.parametrize('family', FAMILIES)
def test_each_family_trains_and_is_saved(family, tmp_path):
    config = make_config(family)
    params = jax.device_get(train.train_and_evaluate(config, tmp_path / 'run'))
    lines = [json.loads(x) for x in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    losses = [line['train_loss'] for line in lines if 'train_loss' in line]
    assert np.log(10) - 0.05 < losses[0] < np.log(10) + 0.5  # the head starts from zeros
    assert losses[-1] < losses[0] - 0.3

    # The model folder holds the same parameters, and what builds the same module.
    model = model_folder.load(tmp_path / 'run/model')
    jax.tree.map(np.testing.assert_array_equal, dict(model.params), dict(params))
    assert model.model == models.from_config(config.model, num_classes=10)


@pytest.mark.parametrize('family', FAMILIES)
def test_all_but_the_heads_of_a_checkpoint_is_where_fine_tuning_starts(family, tmp_path):
    config = make_config(family, pretrained=str(tmp_path / 'weights.npz'))
    ten, three = (models.from_config(config.model, num_classes=classes) for classes in (10, 3))
    params = random_params(ten)
    npz.save(tmp_path / 'weights.npz', params)
    start, origin = initial_weights.initial_params(config, three, shapes_of(three))
    assert start.keys() == params.keys()
    for name in start.keys() - NEW_WHEN_FINE_TUNED[family]:
        jax.tree.map(np.testing.assert_array_equal, start[name], params[name])
    for name in start.keys() & {'head', 'head_dist'}:
        assert not np.any(start[name]['kernel']) and start[name]['kernel'].shape[1] == 3
    assert 'newly initialised: head' in origin


LIBRARIES = {
    'clip_b16': 'huggingface', 'deit3_b16': 'timm', 'dinov2_s14': 'huggingface', 'mae_b16': 'timm',
    'ijepa_h14': 'huggingface', 'reg4_gap_m16': 'timm', 'siglip_b16': 'huggingface',
}  # fmt: skip


@pytest.mark.parametrize(
    'name, trains',
    [
        *((name, name in ('dinov2_s14', 'siglip_b16')) for name in LIBRARIES),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in LIBRARIES),
    ],
)
def test_a_family_of_another_library_is_fine_tuned_by_its_config(name, trains, tmp_path):
    """From a folder of that library, of a small model whose positions are a larger grid."""
    config = importlib.import_module(f'vit_jax.configs.{name}').get_config('digits')
    sizes = {'hidden_size': 16, 'transformer.num_heads': 2, 'transformer.num_layers': 1}
    sizes |= {'transformer.mlp_dim': 64 if name == 'dinov2_s14' else 32, 'model_name': 'small'}
    patch = config.model.patches.size[0]
    with config.unlocked():
        config.model.update_from_flattened_dict(sizes)
        small = {
            'batch': 8,
            'accum_steps': 1,
            'batch_eval': 360,
            'total_steps': 2,
            'warmup_steps': 1,
        }
        small |= {'eval_every': 2, 'checkpoint_every': 2, 'progress_every': 1, 'report': False}
        small |= {'pp.crop': 2 * patch, 'pp.resize': 0, 'pretrained': str(tmp_path / 'weights')}
        config.update_from_flattened_dict(small)
    config = config_lib.resolve(config)

    described = {**config.model.to_dict(), 'model_name': None}
    if name == 'dinov2_s14':  # without a head, its class gives the class token
        described['classifier'] = 'token'
    model = models.from_config(described, num_classes=0)
    rng, shapes = np.random.default_rng(0), shapes_of(model, 3 * patch)
    weights = jax.tree.map(lambda p: rng.normal(0, 0.2, p.shape).astype(np.float32), shapes)
    trained = model_folder.Model(model, weights, described, (), Preprocess(3 * patch), {})
    export_pytorch.write(tmp_path / 'weights', trained, to=LIBRARIES[name])

    ten = models.from_config(config.model, num_classes=10)
    start, origin = initial_weights.initial_params(config, ten, shapes_of(ten, 2 * patch))
    assert 'newly initialised: head/' in origin and '3 x 3 -> 2 x 2' in origin
    before, expected = npz.flatten(start), npz.flatten(weights)
    assert before.keys() - expected.keys() == {'head/kernel', 'head/bias'}
    for key in expected.keys() - {'Transformer/posembed_input/pos_embedding'}:
        np.testing.assert_array_equal(before[key], expected[key], err_msg=key)
    if not trains:
        return
    train.train_and_evaluate(config, tmp_path / 'run')
    made = model_folder.load(tmp_path / 'run/model')
    assert (made.model.act, made.model.layer_norm_eps) == (ten.act, ten.layer_norm_eps)
    after = npz.flatten(made.params)
    assert all(np.any(after[key] != before[key]) for key in before if key.endswith('kernel'))


def test_weights_of_a_plain_vit_start_a_distilled_one_and_one_with_an_mlp_head(tmp_path):
    """What a released ViT gives `configs/deit_*.py` and `configs/b16_mlp_head.py`."""
    plain = models.from_config(VIT, num_classes=10)
    weights = random_params(plain)
    npz.save(tmp_path / 'vit.npz', weights)
    for family in ('distilled', 'mlp_head'):
        config = make_config(family, pretrained=str(tmp_path / 'vit.npz'))
        model = models.from_config(config.model, num_classes=10)
        start, _ = initial_weights.initial_params(config, model, shapes_of(model))
        block = 'encoderblock_0'
        jax.tree.map(
            np.testing.assert_array_equal,
            start['Transformer'][block],
            dict(weights)['Transformer'][block],
        )
        tokens = 2 if family == 'distilled' else 1
        positions = start['Transformer']['posembed_input']['pos_embedding']
        expected = weights['Transformer']['posembed_input']['pos_embedding']
        np.testing.assert_array_equal(positions[:, tokens:], expected[:, 1:])


def test_weights_of_other_rotary_positions_are_refused(tmp_path):
    config = make_config('dinov3', pretrained=str(tmp_path / 'weights.npz'))
    model = models.from_config(config.model, num_classes=10)
    other = {'rotary': {'form': 'dinov3', 'theta': 50.0}}
    npz.save(tmp_path / 'weights.npz', random_params(model), other)
    with pytest.raises(UserError, match='with rotary positions {.*50.*}, and the config says {.*'):
        train.train_and_evaluate(config, tmp_path / 'run')
    config = make_config('dinov3', pretrained=str(tmp_path / 'weights.npz'))
    config.model.rotary.theta = 50.0
    params, _ = initial_weights.initial_params(config, model, shapes_of(model, 24))
    jax.tree.map(
        np.testing.assert_array_equal, params['embedding'], random_params(model)['embedding']
    )


def test_a_mixer_does_not_take_weights_of_another_size(tmp_path):
    config = make_config('mixer')
    model = models.from_config(config.model, num_classes=10)
    npz.save(tmp_path / 'mixer.npz', random_params(model))
    larger = make_config('mixer', **{'pretrained': str(tmp_path / 'mixer.npz'), 'pp.crop': 32})
    with pytest.raises(UserError, match='token_mixing'):
        initial_weights.initial_params(larger, model, shapes_of(model, 32))


def test_fine_tuning_starts_from_the_function_that_the_weights_were_trained_with(tmp_path, capsys):
    settings = {'act': 'relu', 'layer_norm_eps': 0.01}
    described = {'model_name': None, **VIT, **settings}
    model = models.from_config(described, num_classes=3)
    trained = model_folder.Model(
        model, random_params(model), described, ('a', 'b', 'c'), Preprocess(16), {}
    )
    export_pytorch.write(tmp_path / 'hf', trained, to='huggingface')
    model_folder.save(
        tmp_path / 'model',
        trained.params,
        model_config=described,
        class_names=trained.class_names,
        preprocess=trained.preprocess,
        source={},
    )
    short = {'total_steps': 1, 'warmup_steps': 0, 'eval_every': 1, 'checkpoint_every': 1}
    for name in ('hf', 'model'):
        config = make_config('mlp_head', pretrained=str(tmp_path / name), **short)
        train.train_and_evaluate(config, tmp_path / 'run' / name)
        made = model_folder.load(tmp_path / 'run' / name / 'model')
        assert {key: getattr(made.model, key) for key in settings} == settings
        assert settings.items() <= made.model_config.items()
        kept = infer.settings(made.model_config, made.params, made.preprocess)
        assert settings.items() <= kept.items()

    # The run knows it, when the weights are gone; and its own config may say something else.
    config = make_config('mlp_head', pretrained=str(tmp_path / 'hf'), **short)
    (tmp_path / 'run/hf/model').rename(tmp_path / 'moved')
    (tmp_path / 'hf').rename(tmp_path / 'gone')
    train.train_and_evaluate(config, tmp_path / 'run/hf')
    assert model_folder.load(tmp_path / 'run/hf/model').model.act == 'relu'

    config = make_config('mlp_head', pretrained=str(tmp_path / 'model'))
    with config.unlocked():
        config.model.act = 'gelu'
    made = models.from_config(config.model, num_classes=10)
    _, text = initial_weights.initial_params(config, made, shapes_of(made))
    assert 'trained with act relu, and this run computes gelu' in text

    config = make_config('mlp_head', pretrained=str(tmp_path / 'gone'))
    config.model.transformer.num_heads = 4
    with pytest.raises(UserError, match='gone states 2 attention heads, and not 4'):
        train.train_and_evaluate(config, tmp_path / 'other')
