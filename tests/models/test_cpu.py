"""The forms for training on CPUs, beside the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.models import attention, cpu

ENCODER = {
    'mlp_dim': 24,
    'num_heads': 2,
    'num_layers': 1,
    'dropout_rate': 0.0,
    'attention_dropout_rate': 0.0,
}
VIT = {'patches': {'size': (8, 8)}, 'hidden_size': 16, 'transformer': ENCODER}
MODELS = {
    'vit': VIT | {'representation_size': 8},
    'distilled': VIT | {'distilled': True, 'transformer': {**ENCODER, 'dropout_rate': 0.3}},
    'gap': VIT | {
        'classifier': 'gap', 'mlp_head': True, 'remat': 'dots',
        'transformer': {**ENCODER, 'attention_dropout_rate': 0.3},
    },
    'relu': VIT | {'act': 'relu', 'layer_norm_eps': 0.01, 'classifier': 'max', 'fc_norm': True},
    'hybrid': VIT | {
        'patches': {'size': (1, 1)}, 'resnet': {'num_layers': [1], 'width_factor': 0.5},
        'remat': 'full',
    },
    'mixer': {
        'patches': {'size': (8, 8)}, 'hidden_dim': 16, 'num_blocks': 1, 'tokens_mlp_dim': 24,
        'channels_mlp_dim': 32, 'act': 'gelu', 'layer_norm_eps': 0.01,
    },
}  # fmt: skip


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def loss_and_gradients(model):
    """The program of parameters and images that gives a loss and its gradients."""

    def loss(params, images):
        logits = model.apply(
            {'params': params}, images, train=True, rngs={'dropout': jax.random.key(1)}
        )
        return (logits * random(*logits.shape, seed=2, dtype=logits.dtype)).sum()

    quick = {'xla_backend_optimization_level': 0}
    return jax.jit(jax.value_and_grad(loss), compiler_options=quick)


@pytest.mark.parametrize('name', MODELS)
def test_a_training_model_gives_the_values_and_gradients_of_the_plain_one(name):
    """In float64. What is 0 but for rounding, as the gradient of a key's bias, is held to the
    largest gradient.
    """
    with jax.enable_x64(True):
        plain = models.from_config(MODELS[name], num_classes=5, dtype=jnp.float64)
        plain = models.for_inference(plain)  # masks of dropout have the shape of the tokens
        images = random(3, 32, 32, 3, dtype=jnp.float64)
        shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), images, train=False))
        params = jax.tree.map(lambda s: 0.5 * random(*s.shape, dtype=jnp.float64), shapes)
        trained = models.for_training(plain)
        assert trained != plain
        (value, gradients), (other, others) = (
            loss_and_gradients(model)(params['params'], images) for model in (plain, trained)
        )
        np.testing.assert_allclose(value, other, rtol=1e-12)
        largest = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
            assert a.dtype == b.dtype == np.float64
            np.testing.assert_allclose(a, b, atol=1e-12 * largest, rtol=0)


def test_the_gradient_of_the_bias_of_keys_is_nothing_but_rounding():
    """It shifts all logits of a query alike. Relative to itself, it differs between any two ways
    to compute it.
    """
    with jax.enable_x64(True):
        model = models.from_config(VIT, num_classes=5, dtype=jnp.float64)
        images = random(3, 32, 32, 3, dtype=jnp.float64)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        params = jax.tree.map(lambda s: 0.5 * random(*s.shape, dtype=jnp.float64), shapes)
        _, gradients = loss_and_gradients(model)(params['params'], images)
    attention = gradients['Transformer']['encoderblock_0']['MultiHeadDotProductAttention_0']
    assert np.abs(attention['query']['bias']).max() > 1e-3
    assert np.abs(attention['key']['bias']).max() < 1e-14


def test_switched_off_it_changes_no_program_and_forward_mode_works():
    model = models.from_config(VIT, num_classes=5)
    images = random(2, 32, 32, 3)
    params = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()

    def value(model):
        apply = lambda p: model.apply(p, images, train=True)  # noqa: E731
        return jax.jit(lambda p: jax.jvp(apply, (p,), (p,)))(params)

    assert all(np.isfinite(x).all() for x in value(model))
    with pytest.raises(TypeError, match='forward-mode'):
        value(models.for_training(model))


def test_the_program_follows_the_platform_that_it_is_lowered_for():
    """On a GPU, it is that of the plain form; exported for both, it has both."""
    model = models.from_config(VIT, num_classes=5)
    images = random(2, 32, 32, 3)
    params = jax.jit(lambda: model.init(jax.random.key(0), images, train=False)['params'])()
    plain, trained = map(
        loss_and_gradients, (models.for_inference(model), models.for_training(model))
    )

    def operations(function, *platforms):
        text = function.trace(params, images).lower(lowering_platforms=platforms).as_text()
        return [text.count(f'stablehlo.{name}') for name in ('while', 'optimization_barrier')]

    assert operations(trained, 'cuda') == operations(plain, 'cuda') == [0, 0]
    assert operations(plain, 'cpu') == [0, 0]
    assert operations(trained, 'cpu') == [1, 1]  # attention in chunks, GELU computed again
    exported = jax.export.export(trained, platforms=['cpu', 'cuda'])(params, images)
    assert exported.mlir_module().count('stablehlo.case') > 1
    value, gradients = jax.export.deserialize(exported.serialize()).call(params, images)
    expected, others = plain(params, images)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, others)


def set_chunk(monkeypatch, size):
    """Sets `cpu.CHUNK`, with a function that has not been traced with another size."""
    monkeypatch.setattr(cpu, 'CHUNK', size)
    fresh = cpu._by_platform(cpu._chunked_attention, cpu.dot_product_attention)
    monkeypatch.setattr(cpu, 'attention', fresh)


@pytest.mark.parametrize(
    # On the 4 devices of these tests, with 5 * 3 * 17 = 255 weights an image.
    ('batch', 'chunk', 'chunks'),
    [(8, 1, 2), (7, 1, 7), (16, 600, 2), (8, 2**30, 1)],
)
def test_attention_in_chunks_equals_attention_at_once(monkeypatch, batch, chunk, chunks):
    set_chunk(monkeypatch, chunk)
    arrays = [random(batch, tokens, 3, 16, seed=tokens) for tokens in (5, 17, 17)]
    arrays[2] = arrays[2][::-1]
    at_once, ours = (
        jax.vjp(function, *arrays) for function in (attention.dot_product_attention, cpu.attention)
    )
    np.testing.assert_array_equal(at_once[0], ours[0])
    grad = random(batch, 5, 3, 16, seed=2)
    for a, b in zip(at_once[1](grad), ours[1](grad), strict=True):
        assert jnp.abs(a).max() > 1e-2
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert f' length={chunks}\n' in str(jax.make_jaxpr(ours[1])(grad))


def test_layer_norm_in_bfloat16_computes_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (4, 64)), jnp.bfloat16)
    scale, bias = jnp.ones(64), jnp.zeros(64)
    y, back = jax.vjp(cpu.layer_norm(1e-6), x, scale, bias)
    assert y.dtype == jnp.float32
    wide = np.float64(x)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    # In bfloat16, squares of 100 would be rounded by up to 32, and the variance is 1.
    assert np.abs(np.float64(y) - expected).max() < 0.02
    gradients = back(jnp.ones_like(y))
    assert [leaf.dtype for leaf in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_layer_norm_of_equal_values_is_the_bias():
    """Their variance is 0, or by rounding below: neither NaN nor infinity."""
    x = jnp.full((2, 16), 1234.567, jnp.float32)
    scale, bias = jnp.ones(16), jnp.arange(16, dtype=jnp.float32)
    y, back = jax.vjp(lambda x: cpu.layer_norm(1e-6)(x, scale, bias), x)
    assert np.abs(y - bias[None]).max() < 0.2  # of the mean, the last digit times 1 / sqrt(epsilon)
    assert np.isfinite(back(y)[0]).all()
