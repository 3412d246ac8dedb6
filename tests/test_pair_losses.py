"""Losses of pairs of images and texts: the whole batch counts, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import losses, models, sharding, steps
from vit_jax import state as state_lib

B, L = 16, 6
ENCODER = {'mlp_dim': 16, 'num_heads': 2, 'num_layers': 1}
IMAGE = {
    'patches': {'size': (4, 4)},
    'hidden_size': 16,
    'transformer': {**ENCODER, 'dropout_rate': 0.0, 'attention_dropout_rate': 0.0},
}
TEXTS = {
    'bert': {'hidden_size': 16, 'vocab_size': 32, 'max_length': L, **ENCODER},
    'text_transformer': {'width': 16, 'vocab_size': 32, **ENCODER},
}


def make_model(text_model='bert', **arguments):
    return models.LitModel(
        image=IMAGE,
        text_model=text_model,
        text=TEXTS[text_model],
        out_dim=(12, 12),
        pp={'max_len': L},
        temperature_init=10.0,
        **arguments,
    )


def make_batch():
    rng = np.random.default_rng(0)
    return {
        'image': rng.uniform(0, 255, (B, 8, 8, 3)).astype(np.float32),
        'label': rng.integers(0, 32, (B, L)).astype(np.int32),
        'position': np.arange(B, dtype=np.int32),
    }


def formula(kind, x, y, t, b):
    """The loss of all B pairs as the papers write it: no trick, one [B, B] matrix."""
    logits = t * x @ y.T
    if kind == 'contrastive':
        own = jnp.diag(logits)
        rows, columns = (jnp.log(jnp.exp(logits).sum(axis)) for axis in (1, 0))
        return ((rows - own).mean() + (columns - own).mean()) / 2
    sign = 2 * jnp.eye(len(x)) - 1
    return jnp.log(1 + jnp.exp(-sign * (logits + b))).sum() / len(x)


@pytest.fixture(scope='module')
def reference():
    """Parameters, loss and gradient of each kind, in float64 of the whole batch at once."""
    batch, found = make_batch(), {}
    for kind, bias, text in (
        ('contrastive', None, 'bert'),
        ('sigmoid', -2.0, 'text_transformer'),
    ):
        model = make_model(text, bias_init=bias)
        params = state_lib.init_params(model, 8, seed=0)
        rng = np.random.default_rng(1)
        leaves, structure = jax.tree.flatten(params)
        leaves = [np.asarray(p + 0.1 * rng.standard_normal(p.shape), np.float32) for p in leaves]
        params = jax.tree.unflatten(structure, leaves)

        def loss(params, model=model, kind=kind):
            pixels = (batch['image'].astype(np.float64) - 127.5) / 127.5
            x, y, out = model.clone(dtype=jnp.float64).apply(
                {'params': params}, images=pixels, tokens=batch['label']
            )
            return formula(kind, x, y, out['t'][0], out['b'][0] if 'b' in out else 0.0)

        with jax.enable_x64(True):
            wide = jax.tree.map(lambda p: p.astype(np.float64), params)
            told = jax.device_get(jax.jit(jax.value_and_grad(loss))(wide))
        found[kind] = model, params, *told
    return found


@pytest.mark.parametrize('kind', ['contrastive', 'sigmoid'])
@pytest.mark.parametrize(('devices', 'fsdp'), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_the_gradient_is_that_of_the_whole_batch(reference, monkeypatch, kind, devices, fsdp):
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    model, params, expected, gradient = reference[kind]
    mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
    if kind == 'contrastive':
        loss_fn = losses.contrastive(mesh)
    else:  # 16 texts in chunks of 5 or 6, the last one filled up
        loss_fn = losses.pairwise_sigmoid(mesh, chunk=7)
    tx = optax.sgd(1.0)
    state = state_lib.create_state(params, tx, mesh)
    step = steps.make_train_step(
        model, tx, None, mesh, sharding.state_sharding(state, mesh), seed=0, flip=False,
        loss_fn=loss_fn,
    )  # fmt: skip
    new, metrics = step(state, sharding.put_batch(make_batch(), mesh))
    np.testing.assert_allclose(metrics['train_loss'], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics['temperature'], np.exp(params['t'][0]), rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
    paths = jax.tree_util.tree_leaves_with_path(gradient)
    for (path, g), a, b in zip(
        paths, jax.tree.leaves(params), jax.tree.leaves(jax.device_get(new.params)), strict=True
    ):
        np.testing.assert_allclose(a - b, g, atol=1e-5 * largest, err_msg=str(path))
    names = {'t', *('b' for _ in [0] if kind == 'sigmoid')}
    assert all(np.abs(gradient[name]).max() > 1e-3 for name in names)
