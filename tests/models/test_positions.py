"""Images of other sizes, sequences of several lengths."""

import flax
import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoint import resize
from vit_jax.models.encoder import Encoder

ENCODER = {'mlp_dim': 16, 'num_heads': 2, 'num_layers': 2, 'dropout_rate': 0.0}
VIT = {'patches': {'size': (8, 8)}, 'hidden_size': 8, 'transformer': ENCODER}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(module, *args, **kwargs):
    shapes = modules.shapes(module, *args, **kwargs)
    return jax.tree.map(lambda x: 0.3 * random(*x.shape, seed=x.size), shapes)


def embedding_of(params):
    return params['Transformer']['posembed_input']['pos_embedding']


@pytest.mark.parametrize(
    ('old', 'new'), [((3, 3), (5, 4)), ((2, 7), (7, 2)), ((7, 7), (3, 9)), ((4, 4), (1, 1)),
                     ((1, 1), (2, 3)), ((5, 5), (5, 5))]
)  # fmt: skip
@pytest.mark.parametrize('distilled', [False, True])
def test_positions_are_resized_as_in_a_checkpoint(old, new, distilled):
    model = models.VisionTransformer(5, **VIT, distilled=distilled)
    prefix = 2 if distilled else 1
    embedding = random(1, prefix + old[0] * old[1], 8)
    params = {'Transformer': {'posembed_input': {'pos_embedding': embedding}}, 'cls': 0}
    resized = models.for_image_size(model, params, (8 * new[0], 8 * new[1]), grid=old)
    expected = resize.resize_position_embedding(
        embedding[:, prefix:], new[0] * new[1], grid=new, source_grid=old
    )
    ours = embedding_of(resized)
    assert ours.dtype == np.float32 and resized['cls'] == 0
    np.testing.assert_array_equal(ours[:, :prefix], embedding[:, :prefix])
    np.testing.assert_allclose(ours[:, prefix:], expected, atol=1e-6)
    if old == new:
        np.testing.assert_array_equal(ours, embedding)


def test_any_size_inside_a_program():
    """Forward and backward, at a size that the parameters were not made for."""
    model = models.VisionTransformer(5, **VIT)
    images = random(2, 24, 16, 3)
    params = random_params(model, jnp.zeros((1, 32, 32, 3)), train=False)

    @jax.jit
    def logits(params, images):
        params = models.for_image_size(model, params, images.shape[1:3])
        return model.apply({'params': params}, images, train=False)

    by_hand = jax.tree.map(jnp.copy, params)
    patches = resize.resize_position_embedding(embedding_of(params)[:, 1:], 6, grid=(3, 2))
    joined = np.concatenate([embedding_of(params)[:, :1], patches], axis=1)
    by_hand['Transformer']['posembed_input']['pos_embedding'] = joined
    expected = modules.apply(model, by_hand, images)
    np.testing.assert_allclose(logits(params, images), expected, atol=1e-5)
    gradient = jax.grad(lambda params: logits(params, images).sum())(params)
    parts = np.abs(embedding_of(gradient)[0, 1:]).max(axis=-1).reshape(4, 4)
    assert parts[:, [0, 3]].all() and not parts[:, 1:3].any()  # two columns are the outer ones

    # Never without being asked.
    with pytest.raises(flax.errors.ScopeParamShapeError):
        model.apply({'params': params}, images, train=False)


def test_the_grid_of_a_hybrid_is_that_of_its_features():
    hybrid = VIT | {'patches': {'size': (1, 2)}, 'resnet': {'num_layers': [1], 'width_factor': 0.5}}
    model = models.VisionTransformer(5, **hybrid, classifier='gap')
    old, new = (jnp.zeros((1, *size, 3)) for size in ((16, 16), (24, 40)))
    params = random_params(model, old, train=False)
    resized = models.for_image_size(model, params, (24, 40), grid=(4, 2))
    shapes = modules.shapes(model, new, train=False)
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(jnp.shape, shapes)


def test_what_cannot_be_resized_is_said():
    model = models.VisionTransformer(5, **VIT)
    params = {'Transformer': {'posembed_input': {'pos_embedding': random(1, 9, 8)}}}
    with pytest.raises(
        ValueError, match='8 position embeddings of patches are not a grid of 2 x 2'
    ):
        models.for_image_size(model, params, (16, 16))
    with pytest.raises(ValueError, match='20 x 16 pixels is not a whole number of 8 x 8 patches'):
        models.for_image_size(model, params, (20, 16), grid=(2, 4))
    with pytest.raises(ValueError, match='the model has no position embeddings'):
        models.for_image_size(model, {'Transformer': {}}, (16, 16))


@pytest.mark.parametrize('remat', ['', 'full'])
def test_padding_changes_nothing(remat):
    sizes = {**ENCODER, 'add_position_embedding': False}
    encoder = Encoder(**sizes, attention_dropout_rate=0.0, remat=remat)
    tokens, mask = random(3, 7, 8), np.arange(7)[None] < np.array([4, 7, 0])[:, None]
    params = random_params(encoder, tokens, train=False)

    @jax.jit
    def encode(tokens, mask=None):
        return encoder.apply({'params': params}, tokens, train=True, mask=mask)

    out = encode(tokens, mask)
    np.testing.assert_allclose(out[:1, :4], encode(tokens[:1, :4]), atol=1e-5)
    np.testing.assert_allclose(out[1], encode(tokens)[1], atol=1e-5)
    assert np.isfinite(out).all()  # also where there is no token at all
    gradient = jax.jit(jax.grad(lambda x: encode(x, mask)[0, :4].sum()))(tokens)
    assert np.abs(gradient[0, :4]).max() > 1e-3
    assert not gradient[0, 4:].any() and not gradient[1:].any()


def test_interceptors_see_what_goes_into_every_projection():
    model, seen = models.VisionTransformer(5, **VIT), {}

    def record(call, arrays, options, context):
        if context.method_name == '__call__' and type(context.module).__name__.startswith('Dense'):
            seen['/'.join(context.module.path)] = arrays[0].shape
        return call(*arrays, **options)

    with flax.linen.intercept_methods(record):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((2, 16, 16, 3)), train=False)
        )
    block = 'Transformer/encoderblock_1'
    attention = f'{block}/MultiHeadDotProductAttention_0'
    expected = {
        **{f'{attention}/{name}': (2, 5, 8) for name in ('query', 'key', 'value')},
        f'{attention}/out': (2, 5, 2, 4),
        f'{block}/MlpBlock_0/Dense_0': (2, 5, 8),
        f'{block}/MlpBlock_0/Dense_1': (2, 5, 16),
        'head': (2, 8),
    }
    assert {name: seen[name] for name in expected} == expected
