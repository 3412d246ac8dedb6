"""The training step: against float64 gradients and a NumPy update rule, on any topology."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import traverse_util

from vit_jax import models, optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.configs import common
from vit_jax.data import augment
from vit_jax.models import cpu

MODEL = {
    'num_classes': 5,
    'patches': {'size': (8, 8)},
    'hidden_size': 32,
    'transformer': {
        'mlp_dim': 64,
        'num_heads': 2,
        'num_layers': 1,
        'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}
STEPS = 5


def make_config(**changes) -> ml_collections.ConfigDict:
    config = common.get_defaults()
    config.update(base_lr=0.1, total_steps=20, warmup_steps=2, momentum=0.9, accum_steps=1)
    config.update(changes)
    return config


def make_batches(batch=16, size=16, count=STEPS):
    rng = np.random.default_rng(0)
    return [
        {
            'image': rng.uniform(0, 255, (batch, size, size, 3)).astype(np.float32),
            'label': rng.integers(0, 5, batch).astype(np.int32),
            'position': np.arange(batch, dtype=np.int32),
        }
        for _ in range(count)
    ]


made_params, made_steps = {}, {}


def make_params(model, size=16):
    if (key := (repr(model), size)) not in made_params:
        rng = np.random.default_rng(1)
        made_params[key] = jax.tree.map(
            lambda p: np.asarray(p) + 0.1 * rng.standard_normal(p.shape, np.float32),
            state_lib.init_params(model, size, seed=0),
        )
    return made_params[key]


def run_steps(config, params, batches, *, devices, fsdp=1, model=None, flip=False, skip=False):
    """The real thing: the jitted, sharded step. Returns the final state and the metrics."""
    model = model or models.VisionTransformer(**MODEL)
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    schedule = optim.create_learning_rate_schedule(
        config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
    )
    tx = optim.create_optimizer(config, schedule)
    state = state_lib.create_state(params, tx, mesh)
    # All that a step depends on: the same one is traced and compiled once.
    patched = (sharding.MIN_SIZE_TO_SHARD, cpu.CHUNK)
    key = (repr(model), config.to_json(), devices, fsdp, flip, skip, patched)
    if key not in made_steps:
        made_steps[key] = steps.make_train_step(
            model,
            tx,
            schedule,
            mesh,
            sharding.state_sharding(state, mesh),
            seed=config.seed,
            accum_steps=config.accum_steps,
            flip=flip,
            skip_nonfinite=skip,
        )
    step = made_steps[key]
    history = []
    for batch in batches:
        with jax.transfer_guard('disallow'):
            state, metrics = step(state, sharding.put_batch(batch, mesh))
        history.append(jax.device_get(metrics))
    assert step._alone._cache_size() == 1
    return jax.device_get(state), history


@jax.jit
@jax.value_and_grad
def reference_gradient(params, images, labels):
    """The plain mean loss."""
    model = models.VisionTransformer(**MODEL, dtype=jnp.float64)
    logits = model.apply({'params': params}, images, train=False)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def reference_steps(config, params, batches):
    """The same in NumPy, float64, with gradients of JAX in float64."""
    losses = []
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        leaves, structure = jax.tree.flatten(params)
        momentum = [np.zeros_like(leaf) for leaf in leaves]
        for count, batch in enumerate(batches):
            images = (batch['image'].astype(np.float64) - 127.5) / 127.5
            loss, grads = reference_gradient(
                jax.tree.unflatten(structure, leaves), images, batch['label']
            )
            losses.append(float(loss))
            grads = [np.asarray(g) for g in jax.tree.leaves(grads)]
            norm = np.sqrt(sum((g**2).sum() for g in grads))
            if config.grad_norm_clip and norm > config.grad_norm_clip:
                grads = [g * config.grad_norm_clip / norm for g in grads]
            progress = max(0, (count - config.warmup_steps)) / (
                config.total_steps - config.warmup_steps
            )
            rate = config.base_lr * 0.5 * (1 + np.cos(np.pi * progress))
            rate *= min(1, count / config.warmup_steps)
            decay = config.momentum
            if config.optim_dtype == 'bfloat16':
                decay = float(ml_dtypes.bfloat16(decay))
                momentum = [m.astype(ml_dtypes.bfloat16).astype(np.float64) for m in momentum]
            momentum = [decay * m + g for m, g in zip(momentum, grads, strict=True)]
            leaves = [p - rate * m for p, m in zip(leaves, momentum, strict=True)]
    return jax.tree.unflatten(structure, leaves), losses


def changes(new, old):
    return [
        np.asarray(a, np.float64) - np.asarray(b, np.float64)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    ]


@pytest.fixture(scope='module')
def reference():
    """`reference_steps`, once for each optimizer."""
    known = {}
    batches, params = make_batches(), make_params(models.VisionTransformer(**MODEL))

    def get(**settings):
        key = tuple(sorted(settings.items()))
        if key not in known:
            known[key] = reference_steps(make_config(**settings), params, batches)
        return batches, params, *known[key]

    return get


def set_chunk(monkeypatch, size):
    """Sets `cpu.CHUNK`, with a function that has not been traced with another size."""
    monkeypatch.setattr(cpu, 'CHUNK', size)
    fresh = cpu._by_platform(cpu._chunked_attention, cpu.dot_product_attention)
    monkeypatch.setattr(cpu, 'attention', fresh)


@pytest.mark.parametrize(
    ('devices', 'fsdp', 'accum_steps', 'clip'),
    [
        # Each pair of values once. Clipping would hide gradients that are too large by a factor.
        (1, 1, 1, 0.3), (1, 1, 4, 0.0), (2, 1, 1, 0.0), (2, 1, 4, 0.3),
        (4, 1, 1, 0.3), (4, 1, 4, 0.0), (4, 4, 1, 0.3), (4, 4, 4, 0.0),
    ],
)  # fmt: skip
def test_five_steps_equal_float64(reference, monkeypatch, devices, fsdp, accum_steps, clip):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)  # so that FSDP cuts this small model
    if clip:
        set_chunk(monkeypatch, 1)  # attention chunk by chunk; else all at once
    settings = {'grad_norm_clip': clip, 'optim_dtype': 'float32'}
    batches, params, expected, losses = reference(**settings)
    config = make_config(accum_steps=accum_steps, **settings)
    new, history = run_steps(config, params, batches, devices=devices, fsdp=fsdp)

    assert min(m['gradient_norm'] for m in history) > 0.3  # the clipped runs do clip
    np.testing.assert_allclose([m['train_loss'] for m in history], losses, atol=1e-5, rtol=0)
    ours, theirs = changes(new.params, params), changes(expected, params)
    largest = max(np.abs(change).max() for change in theirs)
    assert largest > 0.01
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest, rtol=0)


@pytest.mark.parametrize(
    ('devices', 'accum_steps', 'clip'), [(1, 1, 0.0), (2, 4, 0.3), (4, 1, 0.3), (4, 4, 0.0)]
)
def test_five_steps_with_bfloat16_momentum(reference, devices, accum_steps, clip):
    """As above; but where float32 and float64 fall on two sides of a rounding boundary of bfloat16,
    the stored momentum differs by its last bit, so a few elements may be off by what that bit
    moves.
    """
    settings = {'grad_norm_clip': clip, 'optim_dtype': 'bfloat16'}
    batches, params, expected, losses = reference(**settings)
    config = make_config(accum_steps=accum_steps, **settings)
    new, history = run_steps(config, params, batches, devices=devices)

    np.testing.assert_allclose([m['train_loss'] for m in history], losses, atol=1e-5, rtol=0)
    ours, theirs = (
        np.concatenate([c.ravel() for c in changes(tree, params)])
        for tree in (new.params, expected)
    )
    largest = np.abs(theirs).max()
    off = np.abs(ours - theirs)
    assert (off > 1e-4 * largest).mean() < 1e-3
    assert off.max() < 2**-8 * largest
    exact = reference(grad_norm_clip=clip, optim_dtype='float32')[2]
    exact = np.concatenate([c.ravel() for c in changes(exact, params)])
    assert (
        np.abs(exact - theirs) > 1e-4 * largest
    ).mean() > 0.05  # rounding is not lost in the noise


def test_logged_rate_is_the_one_applied():
    config = make_config(optim_dtype='float32', momentum=0.0, grad_norm_clip=0.0)
    params = make_params(models.VisionTransformer(**MODEL))
    _, history = run_steps(config, params, make_batches(), devices=1)
    np.testing.assert_allclose([m['lr'] for m in history][:3], [0, 0.05, 0.1], rtol=1e-6)
    first, _ = run_steps(config, params, make_batches()[:1], devices=1)
    jax.tree.map(np.testing.assert_array_equal, first.params, jax.device_get(params))  # rate 0


@pytest.mark.parametrize(('devices', 'fsdp', 'accum_steps'), [(1, 1, 1), (4, 4, 2)])
def test_a_step_that_is_not_finite_is_told_and_can_be_skipped(
    monkeypatch, devices, fsdp, accum_steps
):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    config = make_config(accum_steps=accum_steps)
    params = make_params(models.VisionTransformer(**MODEL))
    batches = make_batches(count=3)
    bad = {**batches[2], 'image': batches[2]['image'].copy()}
    bad['image'][13, 5, 5, 0] = np.inf
    where = {'devices': devices, 'fsdp': fsdp}

    broken, history = run_steps(config, params, [*batches[:2], bad], **where)
    assert [bool(m['finite']) for m in history] == [True, True, False]
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(broken.params))

    state, history = run_steps(config, params, [*batches[:2], bad], skip=True, **where)
    assert [bool(m['finite']) for m in history] == [True, True, False]
    assert [int(m['skipped']) for m in history] == [0, 0, 1]
    assert (int(state.step), int(state.skipped)) == (3, 1)
    # Nothing but the counts tells of the bad step.
    before, _ = run_steps(config, params, batches[:2], skip=True, **where)
    rates = [optax.tree.get(s.opt_state, 'count') for s in (before, state)]
    assert rates == [2, 3]
    counted = optax.tree.set(before.opt_state, count=rates[1])
    for new, old in ((state.params, before.params), (state.opt_state, counted)):
        jax.tree.map(np.testing.assert_array_equal, new, old)
    assert changes(state.params, params)[0].any()


def test_mirroring_is_the_same_on_any_topology():
    """Neither order nor number of devices matters, only the place in the global batch."""
    images = make_batches()[0]['image']
    place = np.arange(16)
    key = augment.step_key(0, 3, augment.FLIP)
    random_flip = jax.jit(augment.random_flip)
    flipped = np.asarray(random_flip(images, place, key))
    which = [not np.array_equal(a, b) for a, b in zip(flipped, images, strict=True)]
    for image, mirrored, changed in zip(images, flipped, which, strict=True):
        np.testing.assert_array_equal(mirrored, image[:, ::-1] if changed else image)
    assert 2 < sum(which) < 14
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(random_flip(images[order], place[order], key), flipped[order])
    many = random_flip(np.tile(np.float32([[0], [1]]), (4000, 1, 1, 1)), np.arange(4000), key)
    assert 0.47 < float(many[:, 0, 0, 0].mean()) < 0.53
    params = make_params(models.VisionTransformer(**MODEL))
    config = make_config(optim_dtype='float32')  # bfloat16 would round some values apart
    one, _ = run_steps(config, params, make_batches(), devices=1, flip=True)
    four, _ = run_steps(config, params, make_batches(), devices=4, flip=True)
    plain, _ = run_steps(config, params, make_batches(), devices=1, flip=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, four.params)
    assert max(np.abs(change).max() for change in changes(one.params, plain.params)) > 1e-3


def test_dropout_differs_by_step_micro_batch_and_device():
    """With all images alike, each image's loss tells its dropout mask."""
    transformer = {**MODEL['transformer'], 'dropout_rate': 0.5}
    model = models.VisionTransformer(**{**MODEL, 'transformer': transformer})
    params = make_params(model)
    batch = make_batches(batch=8)[0]
    batch['image'][:] = batch['image'][:1]
    batch['label'][:] = 0
    config = make_config(base_lr=0.0)

    def loss(accum_steps, devices, count=1):
        config.accum_steps = accum_steps
        return [
            float(m['train_loss'])
            for m in run_steps(config, params, [batch] * count, devices=devices, model=model)[1]
        ]

    one, again = loss(1, 1, count=3), loss(1, 1, count=3)
    assert one == again and len(set(one)) == 3  # a function of the step
    assert len({loss(4, 1)[0], loss(1, 4)[0], loss(2, 2)[0], one[0]}) == 4


def test_bfloat16_on_a_cpu_learns_at_real_sizes():
    """The sizes are those of Ti/16 at 64 pixels: matrix products that XLA gives to a library."""
    transformer = {**MODEL['transformer'], 'mlp_dim': 768, 'num_heads': 3}
    sizes = {'hidden_size': 192, 'transformer': transformer}
    model = models.VisionTransformer(**{**MODEL, **sizes}, dtype=jnp.bfloat16)
    params = make_params(model, size=64)
    batch = make_batches(batch=8, size=64)[0]
    config = make_config(base_lr=0.03, warmup_steps=0)
    state, metrics = run_steps(config, params, [batch] * 4, devices=1, model=model)
    losses = [float(m['train_loss']) for m in metrics]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    logits = steps.make_predict_step(model)(state.params, batch['image'])
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


def test_xla_knows_the_passes_that_are_left_out():
    """It accepts any name in silence; so this looks for what each pass does to a program."""

    def program(x, kernel):
        y = jax.lax.optimization_barrier(jnp.tanh(x @ kernel))
        return y @ kernel

    def compiled(options):
        square = jax.ShapeDtypeStruct((256, 256), jnp.float32)
        text = jax.jit(program, compiler_options=options).lower(square, square).compile().as_text()
        return {'barriers': 'opt-barrier(' in text, 'YNNPACK': '__ynn_fusion' in text}

    assert compiled(None) == {'barriers': False, 'YNNPACK': True}
    single = models.VisionTransformer(**MODEL)
    options = steps._compiler_options(single)
    assert compiled(options) == {'barriers': True, 'YNNPACK': False}
    options = steps._compiler_options(single.clone(dtype=jnp.bfloat16))
    assert compiled(options) == {'barriers': True, 'YNNPACK': True}


SCHEDULE = optim.create_learning_rate_schedule(20, 0.5, 'cosine', 2)


def abstract_state(devices, fsdp):
    model = models.VisionTransformer(**MODEL)
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    tx = optim.create_optimizer(make_config(), SCHEDULE)
    return model, mesh, tx, state_lib.abstract_state(model, tx, 32, mesh)


def lowered_step(devices, accum_steps, fsdp=1, batch=64):
    model, mesh, tx, abstract = abstract_state(devices, fsdp)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = steps.make_train_step(
        model, tx, SCHEDULE, mesh, shardings, seed=0, accum_steps=accum_steps
    )
    data = steps.abstract_batch(batch, 32, mesh)
    return step.lower(abstract, data).compile(), abstract


@pytest.fixture(scope='module')
def alone():
    """The program of one device, in the text of XLA."""
    return lowered_step(1, 1)[0].as_text()


def shapes_of(text, operation):
    """Element counts of what all calls of a collective operation give, in compiled HLO."""
    found = []
    for line in text.splitlines():
        match = re.search(rf'= (.*?) {operation}(-start)?\(', line)
        if match:
            for dims in re.findall(r'\w+\[([\d,]*)\]', match[1]):
                found.append(int(np.prod([int(d) for d in dims.split(',') if d] or [1])))
    return found


def products_of(text):
    """Multiply-accumulates of all matrix products in compiled HLO."""
    shapes = {
        name: [int(d) for d in dims.split(',') if d]
        for name, dims in re.findall(r'(%[\w.\-]+) = \w+\[([\d,]*)\]', text)
    }
    return sum(
        math.prod(shapes[name]) * math.prod(shapes[left][int(d)] for d in contracted.split(','))
        for name, left, contracted in re.findall(
            r'(%[\w.\-]+) = \S+ dot\((%[\w.\-]+),.*lhs_contracting_dims={([\d,]+)}', text
        )
    )


@pytest.mark.parametrize(
    ('devices', 'accum_steps', 'fsdp'), [(4, 1, 1), (4, 4, 1), (4, 1, 4), (4, 4, 4), (2, 4, 1)]
)
def test_each_device_does_its_share_and_no_image_is_gathered(
    monkeypatch, alone, devices, accum_steps, fsdp
):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 2**12)
    assert not shapes_of(alone, 'all-reduce')
    compiled, abstract = lowered_step(devices, accum_steps, fsdp)
    text = compiled.as_text()
    # The body of the loop over micro-batches is counted once, and runs accum_steps times.
    share = products_of(text) * accum_steps / products_of(alone)
    assert 1 <= share * devices < 1.01, share

    image_elements = 64 * 32 * 32 * 3
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    moved = {name: shapes_of(text, name) for name in ('all-gather', 'all-to-all', 'all-reduce')}
    largest = max(leaf.size for leaf in jax.tree.leaves(abstract.params))
    assert largest < image_elements / 16  # so that a gathered micro-batch would show
    for name, sizes in moved.items():
        assert max(sizes, default=0) <= largest or name == 'all-reduce', (name, sizes)
    if fsdp == 1:
        assert not moved['all-gather'] and not moved['all-to-all']
        assert parameters <= sum(moved['all-reduce']) <= parameters + 8  # and loss, accuracy
        bodies = re.findall(r'body=%?([\w.\-]+)', text)
        assert bool(bodies) >= (accum_steps > 1)
        for body in bodies:
            block = text.split(f'%{body} ', 1)[1].split('\n}\n', 1)[0]
            assert 'all-reduce' not in block


def test_attention_in_chunks_gathers_no_tokens(monkeypatch):
    """Each device loops over its own images."""
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 2**12)
    set_chunk(monkeypatch, 1)
    compiled, abstract = lowered_step(4, 1, fsdp=4)
    text = compiled.as_text()
    assert re.search(r'known_trip_count[^0-9]*16', text)  # 64 images on 4 devices
    assert 'f32[1,16,1,17,2,16]' in text  # keys of the 16 images of a device, one in each chunk
    largest = max(leaf.size for leaf in jax.tree.leaves(abstract.params))
    assert largest < 64 * 17 * 32 / 4  # so that the tokens of one device would show
    for name in ('all-gather', 'all-to-all', 'collective-permute'):
        assert max(shapes_of(text, name), default=0) <= largest, name


def test_fsdp_holds_a_part_of_every_large_array(monkeypatch):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    *_, abstract = abstract_state(4, fsdp=4)
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    part = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(abstract)
    )
    assert part < 0.3 * whole


def test_evaluation_tells_what_became_of_each_example():
    model = models.VisionTransformer(**{**MODEL, 'num_classes': 9})
    params = make_params(model)
    mesh = sharding.create_mesh(1, jax.devices()[:4])
    params = sharding.put_tree(params, sharding.state_sharding(params, mesh))
    step = steps.make_eval_step(model, mesh, sharding.state_sharding(params, mesh))
    rng = np.random.default_rng(5)
    batch = {
        'image': rng.uniform(0, 255, (16, 16, 16, 3)).astype(np.float32),
        'label': rng.integers(0, 9, 16).astype(np.int32),
        'readable': np.arange(16) % 3 > 0,
        'example': np.int32([*rng.permutation(13), -1, -1, -1]),
    }
    told = jax.device_get(step(params, sharding.put_batch(batch, mesh)))
    assert all(np.array_equal(told[name], batch[name]) for name in batch if name != 'image')
    apply = jax.jit(functools.partial(model.apply, train=False))
    logits = apply({'params': jax.device_get(params)}, batch['image'] / 127.5 - 1)
    logits = np.asarray(logits, np.float64)
    loss = np.log(np.exp(logits).sum(-1)) - logits[np.arange(16), batch['label']]
    order = np.argsort(-logits, axis=-1)
    np.testing.assert_allclose(-told['log_probability'], loss, rtol=1e-5)
    np.testing.assert_allclose(
        told['confidence'], np.exp(logits).max(-1) / np.exp(logits).sum(-1), rtol=1e-5
    )
    assert np.array_equal(told['predicted'], order[:, 0])
    assert np.array_equal(told['rank'], np.argmax(order == batch['label'][:, None], axis=-1))


def first_update(tx, grads, params):
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(
        grads, params
    )


def test_adamw_and_weight_decay_are_optax_on_kernels_only():
    params = {'head': {'kernel': np.ones((2, 2), np.float32), 'bias': np.ones(2, np.float32)}}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    config = make_config(optimizer='adamw', weight_decay=0.1, optim_dtype='float32')
    tx = optim.create_optimizer(config, lambda _: 0.01)
    updates = first_update(tx, grads, params)
    expected = first_update(optax.adam(0.01), grads, params)
    np.testing.assert_allclose(updates['head']['bias'], expected['head']['bias'])
    np.testing.assert_allclose(
        updates['head']['kernel'], expected['head']['kernel'] - 0.01 * 0.1, rtol=1e-6
    )
    config = make_config(weight_decay=0.5, grad_norm_clip=0.0, optim_dtype='float32')
    tx = optim.create_optimizer(config, lambda _: 0.01)
    updates = first_update(tx, grads, params)
    np.testing.assert_allclose(updates['head']['kernel'], -0.01 * (0.1 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(updates['head']['bias'], -0.01 * 0.1, rtol=1e-6)


@pytest.mark.parametrize('optimizer', ['muon', 'adafactor'])
def test_optimizers_of_whole_arrays_are_the_same_on_any_topology(monkeypatch, optimizer):
    """But for the bias of keys, which changes no attention: its gradient is rounding alone."""
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    config = make_config(optimizer=optimizer, base_lr=0.003, optim_dtype='float32')
    params = make_params(models.VisionTransformer(**MODEL))
    found = []
    for accum_steps, where in ((1, {'devices': 1}), (2, {'devices': 4, 'fsdp': 4})):
        config.accum_steps = accum_steps
        new, _ = run_steps(config, params, make_batches(), **where)
        found.append(traverse_util.flatten_dict(new.params, sep='/'))
    for name, old in traverse_util.flatten_dict(params, sep='/').items():
        if not name.endswith('/key/bias'):
            one, four = (new[name] - old for new in found)
            assert np.abs(one).max() > 1e-4, name
            np.testing.assert_allclose(one, four, atol=2e-5, rtol=0, err_msg=name)
