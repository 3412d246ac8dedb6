"""LiT: numbers of the original release, counts, what is left out, gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest

from vit_jax import models, variants
from vit_jax.checkpoint import npz

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures/conformance'
CASES = ('lit_bert', 'lit_bert_image_unprojected', 'lit_text_transformer')
# The original release's own numbers.
PARAMETERS = {
    'LiT-B16B': 195_871_489,
    'LiT-B16B_2': 195_280_897,
    'LiT-L16L': 638_443_521,
    'LiT-L16S': 331_140_353,
    'LiT-L16Ti': 311_913_089,
}


def load_case(name):
    case = json.loads((FIXTURES / 'lit_index.json').read_text())[name]
    names = ('image', 'text_model', 'text', 'out_dim')
    model = models.LitModel(**{name: case[name] for name in names})
    params = npz.open_file(FIXTURES / f'{name}.checkpoint.npz', whole=True).read()
    return model, params, np.load(FIXTURES / f'{name}.expected.npz')


@pytest.mark.parametrize('name', CASES)
def test_embeddings_equal_the_original_release(name):
    model, params, expected = load_case(name)
    zimg, ztxt, out = jax.jit(model.apply)(
        {'params': params}, images=expected['images'], tokens=expected['tokens']
    )
    for ours, theirs in (
        (zimg, 'image_embeddings'),
        (ztxt, 'text_embeddings'),
        (out['t'], 'temperature'),
        (out['img/norm'], 'image_norms'),
        (out['txt/norm'], 'text_norms'),
        (out['img/normalized'], 'image_embeddings'),
        (out['txt/normalized'], 'text_embeddings'),
    ):
        np.testing.assert_allclose(ours, expected[theirs], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_are_those_of_the_original_release(name):
    model = models.get_model(name)
    length, size = model.pp['max_len'], model.pp['size']
    variables = jax.eval_shape(
        lambda images, tokens: model.init(jax.random.key(0), images=images, tokens=tokens),
        jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == PARAMETERS[name]


def test_a_tower_alone_and_padding_that_nothing_reads():
    model, params, expected = load_case('lit_bert')
    zimg, ztxt, out = modules.apply(model, params, tokens=expected['tokens'], train=None)
    assert zimg is None and 'img/norm' not in out and ztxt.shape[0] == len(expected['tokens'])
    zimg, none, _ = modules.apply(model, params, images=expected['images'], train=None)
    assert none is None and zimg.shape == expected['image_embeddings'].shape
    short = expected['tokens'][:, :6]
    padded = np.pad(short, ((0, 0), (0, 4)))
    np.testing.assert_allclose(
        modules.apply(model, params, tokens=padded, train=None)[1],
        modules.apply(model, params, tokens=short, train=None)[1],
        atol=1e-6,
    )


def test_the_epsilon_of_bert_is_seen_on_small_activations():
    """LayerNorm of tokens of variance v has variance v / (v + 1e-12)."""
    model, params, expected = load_case('lit_bert')
    encoder = params['txt']['BertEncoder_0']
    encoder['embedder'] = jax.tree.map(lambda leaf: 1e-5 * leaf, encoder['embedder'])
    _, state = model.apply(
        {'params': params},
        tokens=expected['tokens'],
        capture_intermediates=lambda module, _: module.name == 'layer_norm',
    )
    (normed,) = state['intermediates']['txt']['BertEncoder_0']['layer_norm']['__call__']
    scale, bias = (np.asarray(encoder['layer_norm'][key]) for key in ('scale', 'bias'))
    variance = ((np.asarray(normed) - bias) / scale).var(-1)
    token, position, segment = (
        np.asarray(encoder['embedder'][f'embedders_{kind}_ids']['embedding'], np.float64)
        for kind in ('token', 'position', 'segment')
    )
    tokens = expected['tokens']
    before = (token[tokens] + position[: tokens.shape[1]] + segment[0]).var(-1)
    np.testing.assert_allclose(variance, before / (before + 1e-12), rtol=1e-4)


def test_what_cannot_be_a_model_is_refused():
    model, params, expected = load_case('lit_bert')
    with pytest.raises(ValueError, match="unknown text model 'gpt': one of bert, text_transformer"):
        model.clone(text_model='gpt').apply({'params': params}, tokens=expected['tokens'])
    with pytest.raises(ValueError, match='a length of at most 32, not'):
        model.apply({'params': params}, tokens=np.ones((1, 33), np.int32))
    with pytest.raises(ValueError, match='has an image and a text tower'):
        variants.get_config('LiT-B16B')
    assert hash(model) == hash(model.clone())
