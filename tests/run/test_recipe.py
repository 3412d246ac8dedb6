"""What of a recipe depends on the examples."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import small

from vit_jax import groups, losses, optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.errors import UserError
from vit_jax.inference.task import ONE_CLASS
from vit_jax.run import augmentation, recipe


def test_epochs_become_steps_of_the_training_set():
    config = small.knobs(epochs=2.0, total_steps=0, batch=2, warmup_steps=1).lock()
    recipe.settle_duration(config, small.images([0] * 5))
    assert config.total_steps == 5
    text = recipe.describe_schedule(config, small.images([0] * 5))
    assert '5 steps, 10 images, 2.0 epochs; learning rate up to 0.03, cosine, 1 of them' in text
    assert 'scaling' in text and text.endswith('gives 0.000117 for 2')
    text = recipe.describe_schedule(small.knobs(cooldown_steps=30), small.images([0] * 5))
    assert text.endswith('100 of them warmup, 30 of them cooldown')
    stream = small.stream()
    with pytest.raises(UserError, match='do not tell how many examples there are'):
        recipe.settle_duration(config, stream)


def test_losses_of_a_plain_run_are_the_plain_ones():
    found = recipe.losses_of(small.knobs(), small.images([0, 1, 2]), None)
    assert found == (losses.softmax_cross_entropy, None, ONE_CLASS)
    vectors = small.images(np.eye(3, dtype=np.float32))
    found = recipe.losses_of(small.knobs(), vectors, None)
    assert found == (losses.softmax_cross_entropy, losses.softmax_cross_entropy, ONE_CLASS)


def test_a_recipe_changes_the_loss_of_training_only():
    config = small.knobs(label_smoothing=0.1, class_weights='balanced')
    train = small.images([0, 0, 0, 1, 1, 2])
    loss_fn, evaluated, _ = recipe.losses_of(config, train, None)
    assert evaluated is None
    logits = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    batch = {'label': np.array([0, 2], np.int32)}
    weights = 6 / (3 * np.array([3, 2, 1]))
    same = losses.cross_entropy(smoothing=0.1, class_weights=weights)
    np.testing.assert_allclose(loss_fn(logits, batch, 0)[0], same(logits, batch, 0)[0], rtol=1e-6)
    vectors = small.images(np.eye(3, dtype=np.float32))
    smoothed, plain, task = recipe.losses_of(
        small.knobs(loss='sigmoid', label_smoothing=0.1), vectors, None
    )
    assert task.kind == 'several classes'
    batch = {'label': np.eye(3, dtype=np.float32)[:2]}
    expected = losses.sigmoid_cross_entropy(logits, batch, None)[0]
    np.testing.assert_allclose(plain(logits, batch, None)[0], expected, rtol=1e-6)
    assert abs(smoothed(logits, batch, None)[0] - expected) > 0.01


def test_labels_that_stand_in_records_are_read(monkeypatch):
    train = small.images([0, 0, 0, 1, 1, 2])
    known = recipe._class_weights(small.knobs(class_weights='balanced'), train)
    monkeypatch.setattr(type(train), 'labels', lambda self: None)
    read = recipe._class_weights(small.knobs(class_weights='balanced'), train)
    np.testing.assert_array_equal(known, read)
    assert recipe._class_weights(small.knobs(class_weights='1, 2,0.5'), train).tolist() == [
        1,
        2,
        0.5,
    ]


@pytest.mark.parametrize(
    ('knobs', 'train', 'message'),
    [
        ({'class_weights': '1,2'}, small.images([0, 1, 2]), 'nor 3 numbers .*: a, b, c'),
        ({'class_weights': '1,2,x'}, small.images([0, 1, 2]), 'nor 3 numbers'),
        ({'class_weights': '1,2,-1'}, small.images([0, 1, 2]), 'nor 3 numbers'),
        ({'class_weights': '1,2,inf'}, small.images([0, 1, 2]), 'nor 3 numbers'),
        (
            {'class_weights': 'balanced'},
            small.images(np.eye(3, dtype=np.float32)),
            'only examples that have one class',
        ),
        (
            {'class_weights': 'balanced'},
            small.stream(),
            'batches of an iterator do not tell',
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(knobs, train, message):
    with pytest.raises(UserError, match=message):
        recipe.losses_of(small.knobs(**knobs), train, None)


def test_knobs_of_the_loss_are_refused_beside_a_loss_of_ones_own():
    config = small.knobs(label_smoothing=0.1)
    with pytest.raises(UserError, match='label_smoothing=0.1 has no effect on a loss_fn'):
        recipe.losses_of(config, small.images([0]), losses.squared_error)


@pytest.mark.parametrize(
    ('knobs', 'own', 'message'),
    [
        ({'frozen': '.*'}, None, 'leaves no parameter to train'),
        ({'frozen': 'haed'}, None, "config.frozen: 'haed' fits no parameter"),
        ({'lr_mults': (('haed/.*', 2.0),)}, None, 'config.lr_mults: .* fits no parameter'),
        ({'wd_mults': (('.*', 1.0),)}, None, 'factors of config.weight_decay, which is 0'),
        ({'layer_decay': 0.75}, None, 'no encoderblock_0'),
        ({'layer_decay': 0.75}, optax.sgd(0.1), 'no effect on an optimizer of your own'),
        (
            {'sam_rho': 0.5, 'gsam_rho_min': 0.1},
            optax.sgd(0.1),
            'no effect on an optimizer of your own',
        ),
        ({'lr_mults': (('.*', 2.0),)}, optax.sgd(0.1), 'no effect on an optimizer of your own'),
    ],
)
def test_groups_that_do_not_fit_are_refused(knobs, own, message):
    with pytest.raises(UserError, match=message):
        recipe.optimizer_of(small.knobs(**knobs), lambda _: 0.1, own, lambda: ['head/kernel'])


def test_what_is_frozen_is_so_with_an_optimizer_of_ones_own():
    config = small.knobs(frozen='a')
    tx = recipe.optimizer_of(config, None, optax.adam(0.1), lambda: ['a', 'b'])
    state = tx.init({'a': np.ones(2), 'b': np.ones(3)})
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(), (3,), (3,)]
    own = optax.adam(0.1)
    assert recipe.optimizer_of(small.knobs(), None, own, lambda: 1 / 0) is own


def test_stochastic_depth_needs_blocks():
    config = small.knobs(stochastic_depth=0.1)
    with pytest.raises(UserError, match='this model, a Dense, has no others'):
        recipe.check_depth(config, nn.Dense(3))
    recipe.check_depth(small.knobs(), nn.Dense(3))


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_without_a_recipe_the_step_is_the_plain_one(optimizer):
    """No operation and no part of the state is there for what is off."""
    config, train = small.knobs(optimizer=optimizer), small.images([0, 1, 2])
    mesh = sharding.create_mesh(1, jax.devices()[:1])
    schedule = optim.schedule_of(config)
    tx = recipe.optimizer_of(config, schedule, None, lambda: 1 / 0)
    clip, dtype = optax.clip_by_global_norm(1.0), np.dtype('bfloat16')
    if optimizer == 'sgd':
        sgd = optax.sgd(schedule, momentum=0.9, accumulator_dtype=dtype)
        plain = optax.chain(clip, optax.identity(), sgd)
    else:
        mask = functools.partial(groups.map_names, lambda name: name == 'kernel')
        adamw = optax.adamw(schedule, mu_dtype=dtype, weight_decay=0.0, mask=mask)
        plain = optax.chain(clip, adamw)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return nn.Dense(3)(images.reshape(images.shape[0], -1))

    model, texts, states = Model(), [], []
    options = {
        'loss_fn': recipe.losses_of(config, train, None)[0],
        'mix': augmentation.mix_of(config, train),
        'depth_rate': config.stochastic_depth,
        'frozen': config.frozen,
        'flip': config.pp.flip,
        'flip_vertical': config.pp.flip_vertical,
        'erasing': config.random_erasing,
        'sharpness': optim.sharpness_of(config, schedule),
    }
    for used, given in ((tx, options), (plain, {})):
        state = state_lib.abstract_state(model, used, 8, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = steps.make_train_step(model, used, schedule, mesh, places, seed=0, **given)
        texts.append(step.lower(state, steps.abstract_batch(4, 8, mesh)).as_text())
        states.append(jax.tree.structure(state))
    assert texts[0] == texts[1] and states[0] == states[1]
