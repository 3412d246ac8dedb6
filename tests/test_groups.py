"""Groups of parameters: rates and decay by name and layer; what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from vit_jax import groups, models, optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.configs import common
from vit_jax.errors import UserError

VIT = {
    'num_classes': 5, 'patches': {'size': (8, 8)}, 'hidden_size': 16,
    'transformer': {
        'mlp_dim': 32, 'num_heads': 2, 'num_layers': 3, 'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}  # fmt: skip
BLOCK = 'Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel'
LOWER = r'cls|embedding/.*|Transformer/(posembed_input|encoderblock_[01])/.*'
ALL_BUT_HEAD = '(?!head/).*'


def make_params():
    rng = np.random.default_rng(1)
    params = state_lib.init_params(models.VisionTransformer(**VIT), 16, seed=0)
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), params)
    flat = traverse_util.flatten_dict(jax.device_get(params), sep='/')
    flat['cls'] = np.full_like(flat['cls'], -0.0)  # to which adding 0 would make a difference
    return traverse_util.unflatten_dict(flat, sep='/')


def make_config(**changes):
    config = common.get_defaults()
    config.update(optim_dtype='float32', grad_norm_clip=0.0)
    config.update(changes)
    return config


def make_batch():
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (16, 16, 16, 3)).astype(np.float32)
    return {'image': images, 'label': rng.integers(0, 5, 16).astype(np.int32)}


def make_step(config, frozen='', devices=1, fsdp=1):
    model, mesh = (
        models.VisionTransformer(**VIT),
        sharding.create_mesh(fsdp, jax.devices()[:devices]),
    )
    tx = optim.trained_only(optim.create_optimizer(config, lambda _: 0.1), frozen)
    state = state_lib.create_state(make_params(), tx, mesh)
    step = steps.make_train_step(
        model, tx, None, mesh, sharding.state_sharding(state, mesh),
        seed=0, accum_steps=config.accum_steps, flip=False, frozen=frozen,
    )  # fmt: skip
    return step, state, mesh


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep='/')


def test_layer_decay_is_that_of_timm():
    """timm's groups: 0 is the stem, block i is i + 1, the norm and the head come last."""
    vit = ['cls', 'embedding/bias', 'Transformer/posembed_input/pos_embedding', BLOCK]
    vit += [BLOCK.replace('_1/', '_2/', 1), BLOCK.replace('_1/', '_0/', 1)]
    vit += ['Transformer/encoder_norm/scale', 'head/kernel', 'pre_logits/bias']
    factor = groups.layer_decay(0.75, vit)
    exponents = [4, 4, 4, 2, 1, 3, 0, 0, 0]
    assert [factor(name) for name in vit] == [0.75**e for e in exponents]
    mixer = ['stem/kernel', 'MixerBlock_0/token_mixing/Dense_0/bias', 'pre_head_layer_norm/bias']
    assert [groups.layer_decay(0.5, mixer)(name) for name in mixer] == [0.25, 0.5, 1]
    hybrid = [*vit, 'block1/unit1/conv1/kernel', 'conv_root/kernel', 'dist', 'head_dist/bias']
    factor = groups.layer_decay(0.75, hybrid)
    assert [factor(name) for name in hybrid[-4:]] == [0.75**4, 0.75**4, 0.75**4, 1]
    with pytest.raises(UserError, match='this model has no encoderblock_0'):
        groups.layer_decay(0.75, ['head/kernel'])


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'muon'])
def test_rates_of_parameters_are_multiplied(optimizer):
    params = make_params()
    rng = np.random.default_rng(2)
    grads = jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), params)
    config = make_config(optimizer=optimizer, weight_decay=0.1)
    found = []
    decay = groups.layer_decay(0.75, groups.names_of(params))
    for factor in (None, decay):
        tx = optim.create_optimizer(config, lambda _: 0.1, factor)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        found.append((flat(updates), jax.tree.structure(state).num_leaves))
    assert found[0][1] == found[1][1]  # factors are no state
    for name, plain in found[0][0].items():
        np.testing.assert_allclose(found[1][0][name], decay(name) * plain, rtol=1e-6)


def test_weight_decay_of_parameters_by_name():
    params = make_params()
    zeros = jax.tree.map(np.zeros_like, params)
    mults = (('head/.*', 2.0), ('.*/scale', 0.5), ('.*encoderblock_0/.*', 0), ('.*/kernel', 1.0))
    config = make_config(weight_decay=0.1, wd_mults=mults)
    tx = optim.create_optimizer(config, lambda _: 1.0)
    updates = flat(jax.jit(tx.update)(zeros, tx.init(params), params)[0])
    for name, p in flat(params).items():
        factor = 0.0
        if name.startswith('head/'):
            factor = 2
        elif name.endswith('/scale'):
            factor = 0.5
        elif name.endswith('/kernel') and 'encoderblock_0' not in name:
            factor = 1
        np.testing.assert_allclose(updates[name], -0.1 * factor * p, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ('frozen', 'devices', 'fsdp', 'accum_steps'),
    [(LOWER, 1, 1, 1), (ALL_BUT_HEAD, 4, 1, 2), (LOWER, 4, 4, 2)],
)
def test_frozen_parameters_stay_and_the_others_learn(
    monkeypatch, frozen, devices, fsdp, accum_steps
):
    """As with all gradients but theirs."""
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    config = make_config(optimizer='adamw', weight_decay=0.1, accum_steps=accum_steps)
    step, state, mesh = make_step(config, frozen, devices, fsdp)
    before, batch = flat(state.params), make_batch()
    trained = [name for name in before if not groups.re.fullmatch(frozen, name)]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(trained)
    for _ in range(2):
        state, metrics = step(state, sharding.put_batch(batch, mesh))
    after = flat(state.params)

    model, params, total = models.VisionTransformer(**VIT), make_params(), 0.0
    tx = optim.create_optimizer(config, lambda _: 0.1)

    def loss_of(part):
        logits = model.apply({'params': part}, batch['image'] / 127.5 - 1, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    opt_state, gradient = tx.init(params), jax.jit(jax.grad(loss_of))
    for _ in range(2):
        grads = gradient(params)
        total = sum((flat(grads)[name] ** 2).sum() for name in trained)
        updates, opt_state = tx.update(grads, opt_state, params)
        kept = groups.map_names(lambda name: name in trained, params)
        params = jax.tree.map(lambda k, p, u: p + u if k else p, kept, params, updates)
    np.testing.assert_allclose(metrics['gradient_norm'], np.sqrt(total), rtol=1e-3)
    for name, expected in flat(params).items():
        if name not in trained:
            assert after[name].tobytes() == before[name].tobytes(), name
        elif not name.endswith('/key/bias'):  # whose gradient is rounding alone
            np.testing.assert_allclose(after[name], expected, atol=2e-3, rtol=0, err_msg=name)
            assert np.abs(after[name] - before[name]).max() > 0.01, name


def test_there_is_no_backward_pass_below_the_lowest_trained_parameter():
    """A backward pass takes twice the forward pass; with one block of three, a third of that."""

    def cost(frozen):
        step, state, mesh = make_step(make_config(), frozen)
        compiled = step.lower(state, sharding.put_batch(make_batch(), mesh)).compile()
        return compiled.cost_analysis()['flops']

    whole, lower, head = (cost(frozen) for frozen in ('', LOWER, ALL_BUT_HEAD))
    assert head < 0.4 * whole and head < lower < 0.65 * whole


def test_the_lowest_block_that_is_trained():
    names = groups.names_of(make_params())
    for frozen, lowest in (('', 0), (LOWER, 2), (ALL_BUT_HEAD, 3), ('.*/kernel', 0)):
        assert groups.lowest_block(frozen, names) == lowest
    assert groups.lowest_block('', ['head/kernel']) == 0


def test_partition_and_combine():
    params = {'a': {'b': 1, 'c': 2}, 'd': 3}
    trained, frozen = groups.partition(params, 'a/.*|e')
    assert jax.tree.leaves(trained) == [3] and jax.tree.leaves(frozen) == [1, 2]
    assert groups.combine(trained, frozen) == params
    assert groups.partition(params, '') == (params, None)
    assert groups.combine(params, None) is params
    assert groups.names_of(params) == ['a/b', 'a/c', 'd']
    assert jnp.float32(groups.factor_of((('a/.*', 2), ('.*', 3)), 1.0)('a/b')) == 2


@pytest.mark.parametrize(
    ('patterns', 'message'),
    [
        (['(x'], 'is no regular expression'),
        (['.*', 'haed/.*'], "'haed/.*' fits no parameter.*such as a/b; names begin with a/..., d/"),
        (['a'], 'fits no parameter'),
    ],
)
def test_patterns_that_fit_nothing_are_refused(patterns, message):
    with pytest.raises(UserError, match=message):
        groups.check_patterns('config.frozen', patterns, ['a/b', 'a/c', 'd/e'])
