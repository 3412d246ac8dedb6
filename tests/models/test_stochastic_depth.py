"""Stochastic depth: what is left out how often, and that it is the same on any topology."""

import jax
import jax.numpy as jnp
import modules
import numpy as np
import optax
import pytest

from vit_jax import models, sharding, steps
from vit_jax import state as state_lib
from vit_jax.data import augment
from vit_jax.models import stochastic_depth

VIT = {
    'num_classes': 3, 'patches': {'size': (8, 8)}, 'hidden_size': 16,
    'transformer': {
        'mlp_dim': 16, 'num_heads': 2, 'num_layers': 3, 'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}  # fmt: skip
MIXER = {
    'num_classes': 3, 'patches': {'size': (8, 8)}, 'num_blocks': 3, 'hidden_dim': 16,
    'tokens_mlp_dim': 8, 'channels_mlp_dim': 16,
}  # fmt: skip
MODELS = {
    'vit': models.VisionTransformer(**VIT),
    'scan, remat': models.VisionTransformer(**VIT, scan_layers=True, remat='dots'),
    'mixer': models.MlpMixer(**MIXER),
}
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0, 255, (16, 16, 16, 3)).astype(np.float32)


def make_params(model):
    params = state_lib.init_params(model, 16, seed=0)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), params)


def test_mean_and_variance_of_the_factors():
    """Of each branch: mean 1, variance p / (1 - p), with p linear from 0 to the rate."""
    names = models.block_names(MODELS['vit'])
    draws = augment.draw(np.arange(8000), augment.step_key(0, 3, augment.DEPTH), (3, 2))
    collection = stochastic_depth.factors(0.6, names, draws)
    for layer, share in enumerate([0, 0.3, 0.6]):
        factor = np.asarray(collection['Transformer'][f'encoderblock_{layer}']['factor'])
        assert factor.shape == (8000, 2)
        expected = share / (1 - share)
        np.testing.assert_allclose(factor.mean(0), 1, atol=4 * np.sqrt(expected / 8000) + 1e-6)
        np.testing.assert_allclose(factor.var(0), expected, atol=0.1)
        assert set(np.unique(factor)) <= {0.0, np.float32(1 / (1 - share)), np.float32(1)}
        if layer:  # branches and images are drawn on their own
            assert abs(np.corrcoef(factor[:, 0], factor[:, 1])[0, 1]) < 0.05
            assert abs(np.corrcoef(factor[1:, 0], factor[:-1, 0])[0, 1]) < 0.05


@pytest.mark.parametrize('name', MODELS)
def test_a_branch_is_left_out_or_scaled_image_by_image(name):
    """As in a model whose last layers of the branches are multiplied by the factor."""
    model = MODELS[name]
    params, blocks = make_params(model), models.block_names(model)
    draws = RNG.uniform(size=(2, 3, 2)).astype(np.float32)
    collection = stochastic_depth.factors(0.6, blocks, draws)
    images = IMAGES[:2] / 127.5 - 1
    apply = jax.jit(lambda variables, images: model.apply(variables, images, train=True))
    together = apply({'params': params, stochastic_depth.COLLECTION: collection}, images)
    whole = apply({'params': params}, images)
    ends = [('MultiHeadDotProductAttention_0', 'out'), ('MlpBlock_0', 'Dense_1')]
    if name == 'mixer':
        ends = [('token_mixing', 'Dense_1'), ('channel_mixing', 'Dense_1')]
    for image in range(2):
        scaled = jax.tree.map(jnp.copy, params)
        for layer, path in enumerate(blocks):
            block = scaled
            for part in path:
                block = block[part]
            for branch, (module, dense) in enumerate(ends):
                share = 0.3 * layer
                factor = (draws[image, layer, branch] >= share) / (1 - share)
                block[module][dense] = jax.tree.map(lambda p, f=factor: f * p, block[module][dense])
        alone = apply({'params': scaled}, images[image : image + 1])
        np.testing.assert_allclose(together[image], alone[0], atol=1e-4)
    assert np.abs(together - whole).max() > 1e-2


def losses(devices, fsdp, accum_steps):
    model, tx = MODELS['vit'], optax.sgd(0.1)
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    state = state_lib.create_state(make_params(model), tx, mesh)
    step = steps.make_train_step(
        model, tx, None, mesh, sharding.state_sharding(state, mesh),
        seed=0, flip=False, accum_steps=accum_steps, depth_rate=0.6,
    )  # fmt: skip
    batch = {'image': IMAGES, 'label': np.arange(16, dtype=np.int32) % 3}
    batch['position'] = np.arange(16, dtype=np.int32)
    found = []
    for _ in range(2):
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        found.append(float(metrics['train_loss']))
    return found, jax.device_get(state.params)


def test_it_is_the_same_on_any_topology(monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    found, params = losses(1, 1, 1)
    for where in ((2, 1, 2), (4, 4, 2)):
        others, theirs = losses(*where)
        np.testing.assert_allclose(others, found, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), theirs, params)
    model = MODELS['vit']
    logits = modules.apply(model, make_params(model), IMAGES / 127.5 - 1)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, np.arange(16) % 3).mean()
    assert abs(plain - found[0]) > 1e-3


def test_only_our_blocks_can_be_left_out():
    assert models.block_names(MODELS['mixer'])[2] == ('MixerBlock_2',)
    own = models.VisionTransformer(**{**VIT, 'encoder': models.MlpMixer})
    assert models.block_names(own) == []
