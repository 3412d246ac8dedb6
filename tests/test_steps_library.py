"""The steps as parts of programs of one's own: transformations, losses, targets, optimizers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import losses, models, optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.data import augment
from vit_jax.errors import UserError

CLASSES = 3
VIT = {
    'patches': {'size': (8, 8)},
    'hidden_size': 8,
    'transformer': {
        'mlp_dim': 8,
        'num_heads': 2,
        'num_layers': 1,
        'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}


class Linear(nn.Module):
    """The smallest model there is; it compiles in no time."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(CLASSES, name='head')(images.reshape(images.shape[0], -1))


def make_batch(count=8, seed=0, **changes):
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 255, (count, 2, 4, 3)).astype(np.float32)
    return {'image': images, 'label': rng.integers(0, CLASSES, count).astype(np.int32)} | changes


def make_params(seed=1):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(0, 0.3, (24, CLASSES)).astype(np.float32)
    return {'head': {'kernel': kernel, 'bias': np.zeros(CLASSES, np.float32)}}


def logits_of(params, batch):
    images = batch['image'].reshape(len(batch['image']), -1).astype(np.float64) / 127.5 - 1
    return images @ params['head']['kernel'] + params['head']['bias']


def make_step(tx, devices=1, schedule=None, **options):
    """The jitted step, without mirroring, and a state."""
    mesh = sharding.create_mesh(1, jax.devices()[:devices])
    state = state_lib.create_state(make_params(), tx, mesh)
    options = {'seed': 0, 'flip': False} | options
    shardings = sharding.state_sharding(state, mesh)
    return steps.make_train_step(Linear(), tx, schedule, mesh, shardings, **options), state


def assert_close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize('devices', [1, 4])
def test_training_step_inside_other_programs(devices):
    step, state = make_step(optax.sgd(0.1, momentum=0.9), devices, accum_steps=2, flip=True)
    batches = [make_batch(seed=seed) for seed in range(3)]
    expected = [jax.tree.map(jnp.copy, state)]
    for batch in batches:
        expected.append(step(jax.tree.map(jnp.copy, expected[-1]), batch)[0])
    assert np.abs(expected[3].params['head']['kernel'] - expected[2].params['head']['kernel']).max()

    assert_close(jax.jit(step)(state, batches[0])[0], expected[1])
    assert_close(jax.jit(lambda: step(state, batches[0]))()[0], expected[1])  # no tracer goes in
    final, metrics = jax.lax.scan(step, state, stack(batches))
    assert_close(final, expected[3])
    assert metrics['train_loss'].shape == (3,)
    together, _ = jax.vmap(step, (0, None))(stack(expected[:2]), batches[1])
    assert_close(jax.tree.map(lambda x: x[1], together), expected[2])
    assert jax.eval_shape(step, state, batches[0])[0].step.dtype == np.int32


@pytest.mark.parametrize('mesh', ['none', 'of four'])
def test_the_pure_step_is_the_jitted_one(mesh):
    tx, batch = optax.sgd(0.1, momentum=0.9), make_batch()
    step, state = make_step(tx, 4, accum_steps=2)
    mesh = {'none': None, 'of four': sharding.create_mesh()}[mesh]
    pure = steps.train_step_fn(Linear(), tx, mesh=mesh, seed=0, accum_steps=2, flip=False)
    results = jax.jit(pure)(state, batch)
    assert_close(results, step(state, batch))


def test_differentiation_through_the_pure_step():
    """As in meta-learning, and in forward mode."""
    tx, batch = optax.sgd(0.1), make_batch()
    pure = steps.train_step_fn(Linear(), tx, seed=0, flip=False)
    new = state_lib.new_state(make_params(), tx)

    def after(scale):
        state = new.replace(params=jax.tree.map(lambda p: scale * p, new.params))
        return pure(pure(state, batch)[0], batch)[1]['train_loss']

    forward, reverse = (jax.jit(of(after))(1.0) for of in (jax.jacfwd, jax.grad))
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)
    assert abs(forward) > 1e-2


def test_the_step_of_a_vit_is_compiled_into_a_loop():
    """With the forms for training on CPUs."""
    model, tx, mesh = (
        models.VisionTransformer(CLASSES, **VIT),
        optax.sgd(0.1),
        sharding.create_mesh(),
    )
    state = state_lib.abstract_state(model, tx, 16, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = steps.make_train_step(model, tx, None, mesh, shardings, seed=0)
    batch = make_batch(image=np.zeros((8, 16, 16, 3), np.float32))
    text = jax.jit(functools.partial(jax.lax.scan, step)).lower(state, stack([batch])).as_text()
    assert 'optimization_barrier' in text


def test_prediction_step_inside_other_programs():
    step, params, pixels = steps.make_predict_step(Linear()), make_params(), make_batch()['image']
    expected = step(params, pixels)
    np.testing.assert_allclose(expected, logits_of(params, {'image': pixels}), atol=1e-5)
    pure = steps.predict_step_fn(Linear())
    count = jax.export.symbolic_shape('b')[0]
    exported = jax.export.export(step)(
        params, jax.ShapeDtypeStruct((count, *pixels.shape[1:]), np.float32)
    )
    for logits in (
        jax.jit(step)(params, pixels),
        jax.jit(lambda: step(params, pixels))(),
        jax.lax.map(lambda x: step(params, x), pixels[None])[0],
        jax.vmap(step, (0, None))(stack([params]), pixels)[0],
        jax.export.deserialize(exported.serialize()).call(params, pixels),
        jax.jit(pure)(params, pixels),
    ):
        assert_close(logits, expected)
    gradients = jax.grad(lambda p: step(p, pixels).sum())(params)
    np.testing.assert_allclose(gradients['head']['bias'], len(pixels))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def test_an_evaluation_batch_of_images_and_labels_is_enough():
    params, batch, mesh = make_params(), make_batch(), sharding.create_mesh(1, jax.devices()[:1])
    shardings = sharding.state_sharding(params, mesh)
    told = steps.make_eval_step(Linear(), mesh, shardings)(params, batch)
    right = logits_of(params, batch).argmax(-1) == batch['label']
    np.testing.assert_array_equal(np.asarray(told['rank']) == 0, right)


def test_targets_of_each_kind():
    """Each loss beside its formula in NumPy, through the step."""
    rng = np.random.default_rng(2)
    soft = softmax(rng.normal(size=(8, CLASSES)))
    many, real = rng.integers(0, 2, (8, CLASSES)), rng.normal(size=(8, CLASSES))
    batch, params = make_batch(), make_params()
    z = logits_of(params, batch)
    own = batch['label']
    cases = [
        (None, own, -np.log(softmax(z))[np.arange(8), own].mean()),
        (None, soft.astype(np.float32), -(soft * np.log(softmax(z))).sum(-1).mean()),
        (
            losses.sigmoid_cross_entropy,
            many.astype(np.int32),
            (np.log1p(np.exp(z)) - many * z).sum(-1).mean(),
        ),
        (losses.squared_error, real.astype(np.float32), ((z - real) ** 2).mean()),
    ]
    for loss_fn, label, expected in cases:
        step, state = make_step(optax.sgd(0.1), loss_fn=loss_fn, accum_steps=2)
        metrics = step(state, {'image': batch['image'], 'label': label})[1]
        np.testing.assert_allclose(metrics['train_loss'], expected, rtol=1e-5)
        assert ('accuracy_train' in metrics) == (label is own)
        if label is own:
            assert metrics['accuracy_train'] == (z.argmax(-1) == own).mean()


@pytest.mark.parametrize(('devices', 'accum_steps'), [(1, 1), (4, 2)])
def test_a_loss_of_ones_own(devices, accum_steps):
    """Its means over micro-batches and devices are those over the batch."""

    def loss_fn(logits, batch, params):
        decay = 0.1 * optax.tree.norm(params, squared=True)
        weighted = (batch['weight'] * (logits**2).sum(axis=-1)).mean()
        return weighted + decay, {'decay': decay, 'mean_weight': batch['weight'].mean(), 'one': 1}

    step, state = make_step(optax.sgd(1.0), devices, loss_fn=loss_fn, accum_steps=accum_steps)
    batch, params = make_batch(weight=np.linspace(0.1, 2, 8, dtype=np.float32)), make_params()
    new, metrics = step(state, batch)
    z = logits_of(params, batch)
    decay = 0.1 * (params['head']['kernel'] ** 2).sum()
    np.testing.assert_allclose(metrics['decay'], decay, rtol=1e-5)
    np.testing.assert_allclose(metrics['mean_weight'], batch['weight'].mean(), rtol=1e-6)
    weighted = (batch['weight'][:, None] * z**2).sum(-1).mean()
    np.testing.assert_allclose(metrics['train_loss'], weighted + decay, rtol=1e-5)
    gradient = (2 * batch['weight'][:, None] * z).mean(axis=0)
    np.testing.assert_allclose(new.params['head']['bias'], -gradient, rtol=1e-4)
    assert metrics['one'] == 1 and 'lr' not in metrics and 'accuracy_train' not in metrics


def test_weights_of_classes_do_not_depend_on_devices_and_micro_batches():
    """Sums are divided by the number of examples, so that parts of a batch add up to it."""
    loss_fn = losses.cross_entropy(smoothing=0.1, class_weights=(3.0, 0.1, 1.0))
    batch, found = make_batch(count=16), []
    for devices, accum_steps in ((1, 1), (4, 2)):
        step, state = make_step(optax.sgd(0.1), devices, loss_fn=loss_fn, accum_steps=accum_steps)
        found.append(jax.device_get(step(state, batch)[0].params))
    assert_close(*found)


def test_mixing_comes_before_devices_and_micro_batches(monkeypatch):
    """So that everybody has the same partner; one's own loss gets the mixed labels."""
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 16)
    mix = augment.Mix(mixup=0.5, cutmix=0.5, per_example=True, classes=CLASSES)
    batch, found = make_batch(count=16), []

    def loss_fn(logits, batch, params):
        loss, _ = losses.softmax_cross_entropy(logits, batch, params)
        return loss, {'first_train': batch['label'][:, 0].mean()}

    for devices, fsdp, accum_steps in ((1, 1, 1), (4, 1, 2), (4, 4, 2)):
        mesh, tx = sharding.create_mesh(fsdp, jax.devices()[:devices]), optax.sgd(0.1)
        state = state_lib.create_state(make_params(), tx, mesh)
        step = steps.make_train_step(
            Linear(), tx, None, mesh, sharding.state_sharding(state, mesh),
            seed=0, accum_steps=accum_steps, loss_fn=loss_fn, mix=mix,
        )  # fmt: skip
        new, metrics = step(state, sharding.put_batch(batch, mesh))
        found.append(jax.device_get((new.params, metrics['train_loss'], metrics['first_train'])))
    for other in found[1:]:
        assert_close(found[0], other)
    assert_close(found[0][2], (batch['label'] == 0).mean(), atol=0.2)


def test_what_is_wrong_with_a_loss_is_said():
    batch = make_batch()

    def trace(batch=batch, **options):
        step, state = make_step(optax.sgd(0.1), **options)
        jax.eval_shape(step, state, batch)

    with pytest.raises(UserError, match=r'labels int32 \[8, 1\] do not fit .* takes \[8\]'):
        trace({**batch, 'label': batch['label'][:, None]})
    with pytest.raises(UserError, match=r'labels int32 \[8\] do not fit .* takes \[8, 3\]'):
        trace(loss_fn=losses.squared_error)
    with pytest.raises(UserError, match=r"metric 'each' has shape \(8,\); metrics are scalars"):
        trace(loss_fn=lambda z, batch, params: (z.mean(), {'each': z[:, 0]}))
    with pytest.raises(UserError, match=r"cannot be called 'lr'"):
        trace(loss_fn=lambda z, batch, params: (z.mean(), {'lr': z.mean()}))
    with pytest.raises(UserError, match='a batch of 8 is not a multiple of 1 devices x 3 micro'):
        trace(accum_steps=3)


def test_images_of_other_shapes_and_labels_of_tokens():
    """With what a model is initialised for: height, width and number of channels."""
    model = models.VisionTransformer(CLASSES, **VIT, classifier='unpooled')
    tx, mesh = optax.sgd(0.1), sharding.create_mesh()
    state = state_lib.abstract_state(model, tx, (16, 24), mesh, channels=5)
    assert state.params['embedding']['kernel'].shape == (8, 8, 5, 8)
    shapes = jax.eval_shape(lambda: state_lib.init_params(model, (16, 24), 0, channels=5))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state.params)
    batch = steps.abstract_batch(8, (16, 24), mesh, channels=5)
    batch['label'] = jax.ShapeDtypeStruct((8, 6), jnp.int32)
    new, metrics = jax.eval_shape(steps.train_step_fn(model, tx, seed=0), state, batch)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert metrics['train_loss'].shape == metrics['accuracy_train'].shape == ()


def labels_of_parts(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params)


OPTIMIZERS = {
    'adamw': lambda: optax.adamw(lambda count: 0.1 / (1 + count)),
    'adafactor': lambda: optax.adafactor(0.01),
    'lion': lambda: optax.lion(0.01),
    'muon': lambda: optax.contrib.muon(0.01),
    'schedule_free': lambda: optax.contrib.schedule_free_sgd(0.1),
    'prodigy': optax.contrib.prodigy,
    'sam': lambda: optax.contrib.sam(
        optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    ),
    'inject_hyperparams': lambda: optax.inject_hyperparams(optax.adam)(lambda count: 0.1),
    'frozen parts': lambda: optax.multi_transform(
        {'kernel': optax.sgd(0.1, momentum=0.9), 'bias': optax.set_to_zero()}, labels_of_parts
    ),
    'MultiSteps': lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    'reduce_on_plateau': lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    'polyak_sgd': optax.polyak_sgd,
    'lbfgs': optax.lbfgs,
}  # fmt: skip


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_keeps_the_types_of_its_state(name):
    tx = OPTIMIZERS[name]()
    state = jax.eval_shape(lambda: state_lib.new_state(make_params(), tx))
    step = steps.train_step_fn(Linear(), tx, seed=0, skip_nonfinite=True)
    new = jax.eval_shape(step, state, make_batch())[0]
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_optimizers_get_the_loss():
    batch = make_batch()
    # Polyak: the rate is the loss over the squared norm of its gradient.
    step, state = make_step(optax.polyak_sgd(max_learning_rate=1e6, variant='sps'))
    old = jax.device_get(state.params)
    new, metrics = step(state, batch)
    moved = optax.tree.norm(optax.tree.sub(new.params, old))
    expected = metrics['train_loss'] / metrics['gradient_norm']
    np.testing.assert_allclose(moved, expected, rtol=1e-4)

    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.0, atol=100.0)
    step, state = make_step(optax.chain(optax.sgd(0.01), plateau))
    for _ in range(4):
        state, _ = step(state, batch)
    assert optax.tree.get(state.opt_state, 'scale') == 0.5


@pytest.mark.parametrize('devices', [1, 4])
def test_a_line_search_evaluates_the_loss_of_the_batch(devices):
    step, state = make_step(optax.lbfgs(), devices, accum_steps=2)
    batch, found = make_batch(), []
    for _ in range(4):
        state, metrics = step(state, batch)
        found.append(float(metrics['train_loss']))
    assert found == sorted(found, reverse=True) and found[-1] < 0.2 * found[0]
    assert 0 < optax.tree.get(state.opt_state, 'value') < found[-1]  # that of the accepted step


@pytest.mark.parametrize('injected', [False, True])
def test_after_a_skipped_step_the_logged_rate_is_the_one_applied(injected):
    def schedule(count):
        return 0.1 * (1 - count / 6)

    sgd = optax.inject_hyperparams(optax.sgd) if injected else optax.sgd
    tx = optax.chain(optax.trace(0.0), sgd(schedule))
    step, state = make_step(tx, schedule=schedule, skip_nonfinite=True)
    good = make_batch()
    bad = {**good, 'image': np.full_like(good['image'], np.inf)}
    for count, batch in enumerate([good, bad, bad, good, good]):
        old = jax.device_get(state)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics['lr'], schedule(count), rtol=1e-6)
        moved = optax.tree.norm(optax.tree.sub(state.params, old.params))
        if batch is bad:
            assert moved == 0 and not metrics['finite']
            assert_close(state.opt_state[0], old.opt_state[0])
        else:
            applied = moved / metrics['gradient_norm']
            np.testing.assert_allclose(applied, metrics['lr'], rtol=1e-4)
    assert metrics['skipped'] == 2


def test_strict_promotion_of_types_and_ranks():
    schedule = optim.create_learning_rate_schedule(20, 0.1, 'cosine', 2)
    tx = optax.sgd(schedule, momentum=0.9)
    model = models.VisionTransformer(CLASSES, **VIT)
    state = state_lib.abstract_state(model, tx, 16, sharding.create_mesh())
    batch = make_batch(image=np.zeros((8, 16, 16, 3), np.uint8))
    told = {'example': np.arange(8), 'readable': np.ones(8, bool)}
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        train = steps.train_step_fn(model, tx, schedule, seed=0, accum_steps=2, skip_nonfinite=True)
        jax.eval_shape(train, state, batch)
        jax.eval_shape(steps.eval_step_fn(model), state.params, batch | told)
        jax.eval_shape(steps.predict_step_fn(model), state.params, batch['image'])


@pytest.mark.parametrize(('dtype', 'accum_steps'), [('float32', 1), ('float32', 2), ('float64', 2)])
def test_types_under_x64(dtype, accum_steps):
    """A float32 model stays float32; parameters are that in any case."""
    with jax.enable_x64(True):
        model, tx = models.VisionTransformer(CLASSES, **VIT), optax.sgd(0.1, momentum=0.9)
        model = model.clone(dtype=jnp.dtype(dtype))
        state = state_lib.abstract_state(model, tx, 16, sharding.create_mesh())
        batch = make_batch(image=np.zeros((8, 16, 16, 3), np.float32))
        step = steps.train_step_fn(model, tx, seed=0, accum_steps=accum_steps)
        new, metrics = jax.eval_shape(step, state, batch)
    types = {str(leaf.dtype) for leaf in jax.tree.leaves((state, new))}
    assert types == {'float32', 'int32'}
    assert metrics['train_loss'].dtype == dtype
    assert {str(x.dtype) for x in metrics.values()} == {'float32', 'int32', 'bool', dtype}
