"""Blocks as a loop, beside the same blocks one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models

ENCODER = {
    'mlp_dim': 16,
    'num_heads': 2,
    'num_layers': 4,
    'dropout_rate': 0.0,
    'attention_dropout_rate': 0.0,
}
VIT = {'patches': {'size': (8, 8)}, 'hidden_size': 8, 'transformer': ENCODER}


def random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), tree)


def setup(**changes):
    """A model one by one, its parameters and images."""
    model = models.from_config(VIT | changes, num_classes=5)
    images = random_like(jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)['params'])
    return model, random_like(shapes), images


@pytest.mark.parametrize('remat', ['', 'dots'])
@pytest.mark.parametrize('purpose', [models.for_inference, models.for_training])
def test_logits_and_gradients_are_those_of_blocks_one_by_one(remat, purpose):
    with jax.enable_x64(True):
        plain, params, images = setup(remat=remat, dtype=jnp.float64)
        params = jax.tree.map(jnp.float64, params)
        # In two loops where blocks are recomputed.
        looped = plain.clone(scan_layers=True, scan_from=1 if remat else 0)

        def loss(model, params):
            return (model.apply({'params': params}, images, train=True) ** 2).sum()

        (value, gradients), (expected, others) = (
            jax.jit(jax.value_and_grad(lambda p, m=model: loss(m, p)))(params)
            for model in (purpose(looped), purpose(plain))
        )
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(others))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * largest), gradients, others
    )


def test_all_blocks_but_the_last_are_traced_once():
    plain, params, images = setup()

    def softmaxes(model):
        text = str(
            jax.make_jaxpr(lambda p: model.apply({'params': p}, images, train=False))(params)
        )
        return text.count('reduce_max')

    assert (softmaxes(plain), softmaxes(plain.clone(scan_layers=True))) == (4, 2)


def test_what_can_be_read_out_is_the_same():
    plain, params, images = setup()
    looped = plain.clone(scan_layers=True)
    shapes = [
        jax.eval_shape(lambda m=model: m.init(jax.random.key(0), images, train=False))
        for model in (plain, looped)
    ]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])

    def gradients_with_respect_to_weights(model):
        def read(offsets):
            logits, out = models.apply_with_intermediates(
                model, params, images, attention_weights=True, attention_offsets=offsets
            )
            return logits.sum(), out

        names = [f'Transformer/encoderblock_{i}/attention_weights' for i in range(4)]
        offsets = {name: jnp.zeros((2, 2, 5, 5)) for name in names}
        return jax.jit(jax.value_and_grad(read, has_aux=True))(offsets)

    ours, theirs = map(gradients_with_respect_to_weights, (looped, plain))
    assert ours[0][1].keys() == theirs[0][1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


def test_every_layer_has_its_own_dropout():
    """Where blocks have equal parameters, equal masks would give equal changes."""
    encoder = {**ENCODER, 'dropout_rate': 0.5}
    model, params, images = setup(transformer=encoder)
    model = model.clone(scan_layers=True)

    @jax.jit
    def read(seed):
        rngs = {'dropout': jax.random.key(seed)}
        options = {'train': True, 'rngs': rngs, 'mutable': ['intermediates']}
        logits, state = model.apply({'params': params}, images, **options)
        blocks = state['intermediates']['Transformer']
        return logits, [blocks[f'encoderblock_{i}']['mlp'][0] == 0 for i in range(4)]

    logits, dropped = read(0)
    assert all(0.3 < mask.mean() < 0.7 for mask in dropped)
    assert all((dropped[i] != dropped[i + 1]).any() for i in range(3))
    assert (read(0)[0] == logits).all() and (read(1)[0] != logits).any()


def test_a_mixer_has_no_loop():
    mixer = {'patches': {'size': (8, 8)}, 'hidden_dim': 8, 'num_blocks': 1, 'tokens_mlp_dim': 4,
             'channels_mlp_dim': 4}  # fmt: skip
    assert not hasattr(models.from_config(mixer, num_classes=5, scan_layers=False), 'scan_layers')
    with pytest.raises(ValueError, match='scan_layers: an MLP-Mixer does not have it'):
        models.from_config(mixer, num_classes=5, scan_layers=True)
