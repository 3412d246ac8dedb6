"""Low-rank adapters: what they compute, in the forms that models have."""

import functools

import jax
import modules
import numpy as np
import pytest
from flax import traverse_util

from vit_jax import models
from vit_jax.models import lora

VIT = {
    'num_classes': 5, 'patches': {'size': (8, 8)}, 'hidden_size': 16,
    'transformer': {
        'mlp_dim': 32, 'num_heads': 2, 'num_layers': 3, 'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}  # fmt: skip
MIXER = {
    'num_classes': 5, 'patches': {'size': (8, 8)}, 'num_blocks': 2, 'hidden_dim': 16,
    'tokens_mlp_dim': 8, 'channels_mlp_dim': 32,
}  # fmt: skip
EVERY = tuple(name for names in lora.GROUPS.values() for name in names)
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
WEIGHTS = RNG.standard_normal((4, 5)).astype(np.float32)


# Compiled quickly.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep='/')


@functools.partial(jit, static_argnames='model')
def _init(model):
    return model.init(jax.random.key(0), IMAGES, train=False)['params']


def init(model):
    return jax.device_get(_init(model))


def params_of(model):
    return modules.params_of(model, IMAGES, scale=0.1, train=False)


def vit(dora=False, **more):
    settings = lora.Lora(4, EVERY, alpha=6.0, dora=dora, dropout=more.pop('dropout', 0.0))
    return models.VisionTransformer(**VIT, lora=settings, **more)


def test_at_the_start_nothing_is_changed():
    """To the bit, in evaluation and in training; the base's parameters are as without adapters."""
    model, base = vit(), models.VisionTransformer(**VIT)
    params = init(model)
    jax.tree.map(np.testing.assert_array_equal, lora.without(params), init(base))
    for train in (False, True):
        pair = [models.for_training(m) if train else m for m in (model, base)]
        # In the plain form; that for CPUs has other products where an MLP has adapters.
        pair = [m.clone(cpu_training=False) for m in pair]
        a, b = (
            jit(m.apply, static_argnames='train')({'params': p}, IMAGES, train=train)
            for m, p in zip(pair, (params, lora.without(params)), strict=True)
        )
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('dora', [False, True])
def test_merged_equals_unmerged_in_every_form(dora):
    params = params_of(vit(dora))
    base = models.VisionTransformer(**VIT)
    plain = lora.merge(params, vit(dora).lora)
    assert plain.keys() == lora.without(params).keys() and len(flat(plain)) == len(flat(init(base)))
    expected = modules.apply(base, plain, IMAGES)
    before = modules.apply(base, lora.without(params), IMAGES)
    assert np.abs(expected - before).max() > 0.1
    for more in ({}, {'remat': 'full', 'scan_layers': True}):
        for model in (vit(dora, **more), models.for_training(vit(dora, **more))):
            found = jit(model.apply, static_argnames='train')(
                {'params': params}, IMAGES, train=model.cpu_training
            )
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)


def test_gradients_are_those_of_the_chain_rule_in_float64():
    """With W' = W + alpha / rank A B: dA = alpha / rank dW' B^T, dB = alpha / rank A^T dW'."""
    model, base = vit(), models.VisionTransformer(**VIT, dtype=np.float64)
    params = params_of(model)

    def loss(params, model, images):
        return (model.apply({'params': params}, images, train=True) * WEIGHTS).sum()

    train = models.for_training(model)
    found = flat(jit(jax.grad(lambda p: loss(p, train, IMAGES)))(params))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        whole = lora.merge(wide, model.lora)
        gradient = flat(jit(jax.grad(lambda p: loss(p, base, np.float64(IMAGES))))(whole))
    wide, seen = flat(wide), 0
    for name, kernel in gradient.items():
        layer = name.removesuffix('/kernel')
        if f'{layer}/lora_a' not in wide:
            continue
        a, b = wide[f'{layer}/lora_a'], wide[f'{layer}/lora_b']
        by_kernel = kernel.reshape(len(a), -1)
        for part, expected in (('a', by_kernel @ b.T), ('b', a.T @ by_kernel)):
            scale = max(1, np.abs(expected).max())
            np.testing.assert_allclose(
                found[f'{layer}/lora_{part}'] / scale, 1.5 * expected / scale, atol=2e-6,
                err_msg=name,
            )  # fmt: skip
        seen += 1
    assert seen == 3 * 6


def test_dropout_is_of_what_adapters_see_in_training_only():
    model = vit(dropout=0.5)
    params = params_of(model)

    @jit
    def train(params, seed):
        rngs = {'dropout': jax.random.key(seed)}
        return model.apply({'params': params}, IMAGES, train=True, rngs=rngs)

    one, other = train(params, 0), train(params, 1)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(one, train(params, 0))
    plain = modules.apply(vit(), params, IMAGES)
    np.testing.assert_array_equal(modules.apply(model, params, IMAGES), plain)
    # The layer itself sees all of it: where B is zeros, nothing is changed.
    zeros = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 0 if path[-1].key == 'lora_b' else p, params
    )
    expected = modules.apply(model, zeros, IMAGES)
    np.testing.assert_allclose(train(zeros, 0), expected, atol=1e-6)
    # In the mean it is what it is without.
    np.testing.assert_allclose(far_from_mean(0.25), 0, atol=0.05)


def far_from_mean(rate):
    """How far the mean over 4,000 masks of a linear model's adapters is from that without."""
    settings = {**VIT, 'transformer': {**VIT['transformer'], 'num_layers': 1}}
    model = models.VisionTransformer(
        **settings, act='linear', lora=lora.Lora(2, ('Dense_1',), dropout=rate)
    )
    params = params_of(model)

    def encoded(seed):
        rngs = {'dropout': jax.random.key(seed)}
        _, told = model.apply(
            {'params': params}, IMAGES[:1], train=True, rngs=rngs, mutable=['intermediates']
        )
        return told['intermediates']['Transformer']['encoderblock_0']['tokens'][0]

    mean = jit(lambda seeds: jax.vmap(encoded)(seeds).mean(axis=0))(np.arange(4000))
    _, told = model.apply({'params': params}, IMAGES[:1], train=False, mutable=['intermediates'])
    return mean - told['intermediates']['Transformer']['encoderblock_0']['tokens'][0]


def test_which_layers_get_them():
    adapters = lora.Lora(2, ('query', 'Dense_1'), dora=True)
    model = models.VisionTransformer(**VIT, classifier='map', class_token=False, lora=adapters)
    names = flat(init(model))
    found = {name.rpartition('/')[0] for name in names if 'lora' in name}
    assert found == {
        f'Transformer/encoderblock_{i}/{layer}'
        for i in range(3)
        for layer in ('MultiHeadDotProductAttention_0/query', 'MlpBlock_0/Dense_1')
    }
    block = 'Transformer/encoderblock_0/MlpBlock_0/Dense_1'
    shapes = {name: names[f'{block}/{name}'].shape for name in lora.ARRAYS}
    assert shapes == {'lora_a': (32, 2), 'lora_b': (2, 16), 'lora_magnitude': (16,)}
    kernel = names[f'{block}/kernel'].astype(np.float64)
    np.testing.assert_allclose(names[f'{block}/lora_magnitude'], np.sqrt((kernel**2).sum(0)), 1e-6)
    assert 0.9 < np.abs(names[f'{block}/lora_a']).max() * np.sqrt(32) <= 1


def test_a_mixer_has_them_in_both_of_its_mlps():
    model = models.MlpMixer(**MIXER, lora=lora.Lora(2, EVERY))
    params = params_of(model)
    assert sum(name.endswith('lora_a') for name in flat(params)) == 2 * 4
    expected = modules.apply(models.MlpMixer(**MIXER), lora.merge(params, model.lora), IMAGES)
    for each in (model, models.for_training(model)):
        found = modules.apply(each, params, IMAGES, train=True)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_layers_without_adapters_keep_their_form_for_cpus():
    """Attention alone has them, with dropout and DoRA: an MLP's hidden layer is not kept."""
    adapters = lora.Lora(2, ('query',), dropout=0.1, dora=True)
    model = models.for_training(models.VisionTransformer(**VIT, lora=adapters))

    def operations(model, params):
        def loss(params, key):
            rngs = {'dropout': key}
            return model.apply({'params': params}, IMAGES, train=True, rngs=rngs).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params, jax.random.key(0)))

    plain = model.clone(lora=None)
    counts = [
        operations(m, init(m)).count('optimization_barrier') for m in (model, plain)
    ]  # fmt: skip
    assert counts[0] == counts[1] > 0


def test_a_rank_beyond_the_matrix_is_refused():
    model = models.VisionTransformer(**VIT, lora=lora.Lora(17, ('query',)))
    with pytest.raises(ValueError, match='rank 17 is not from 1 to 16: the layer query is a matr'):
        init(model)
    with pytest.raises(TypeError, match='lora is a Lora or None, not 8'):
        models.MlpMixer(**MIXER, lora=8)
