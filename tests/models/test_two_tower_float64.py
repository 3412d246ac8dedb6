"""LiT in float64 NumPy, from the papers: other sizes than those of the conformance cases."""

import functools

import jax
import numpy as np
import pytest

from vit_jax import models

ENCODER = dict(mlp_dim=24, num_heads=2, num_layers=1)
IMAGE = dict(patches={'size': (4, 4)}, hidden_size=16, transformer=ENCODER, classifier='token')
HYBRID = {
    **IMAGE,
    'patches': {'size': (1, 1)},
    'resnet': {'num_layers': (1, 1), 'width_factor': 0.5},
}
BERT = dict(hidden_size=40, mlp_dim=24, num_layers=3, num_heads=5, vocab_size=31, max_length=9)
TEXT = dict(width=12, num_layers=3, mlp_dim=20, num_heads=3, vocab_size=19)
# Text tower, its arguments, image tower, out_dim.
CASES = {
    'one size for both': ('bert', BERT, IMAGE, 14),
    'a list': ('bert', BERT, {**IMAGE, 'classifier': 'gap'}, [6, 6]),
    'no head at all': ('bert', {**BERT, 'hidden_size': 20, 'num_segments': 1}, IMAGE, (None, None)),
    'no image head': ('text_transformer', TEXT, HYBRID, (None, 16)),
    'deeper': ('text_transformer', {**TEXT, 'num_layers': 5, 'num_heads': 1}, IMAGE, (9, 9)),
}


def layer_norm(x, p, epsilon):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p['scale'] + p['bias']


def dense(x, p):
    return x @ p['kernel'].reshape(x.shape[-1], -1) + p['bias'].reshape(-1)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, p, heads, seen):
    """Each head's softmax-weighted values [L, D]; `seen` [L] tells what is looked at."""
    length = x.shape[0]
    q, k, v = (dense(x, p[n]).reshape(length, heads, -1) for n in ('query', 'key', 'value'))
    scores = np.einsum('qhd,khd->hqk', q, k) / np.sqrt(q.shape[-1])
    scores = np.where(seen[None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum('hqk,khd->qhd', weights, v).reshape(length, -1)


def bert(tokens, p, text):
    encoder, norm = p['BertEncoder_0'], functools.partial(layer_norm, epsilon=1e-12)
    embeddings = {n.split('_')[1]: t['embedding'] for n, t in encoder['embedder'].items()}
    x = embeddings['token'][tokens] + embeddings['position'][: len(tokens)]
    x = norm(x + embeddings['segment'][0], encoder['layer_norm'])
    layers = encoder['encoder_block']['layer_sequence']
    for index in range(text['num_layers']):
        block = layers[f'layers_{index}']
        a, m = block['attention_block'], block['mlp_block']
        y = attention(x, a['attention_layer'], text['num_heads'], tokens > 0)
        x = norm(x + dense(y, a['dense_layer']), a['layer_norm'])
        y = gelu(dense(x, m['mlp']['dense_layer']))
        x = norm(x + dense(y, m['dense_layer']), m['layer_norm'])
    return x[0]


def text_transformer(tokens, p, text):
    norm = functools.partial(layer_norm, epsilon=1e-6)
    x = p['Embed_0']['embedding'][tokens] + p['pos_embedding'][0]
    for index in range(text['num_layers']):
        block = p['Encoder_0'][f'encoderblock_{index}']
        a, m = block['MultiHeadDotProductAttention_0'], block['MlpBlock_0']
        everything = np.ones(len(tokens), bool)
        y = attention(norm(x, block['LayerNorm_0']), a, text['num_heads'], everything)
        x = x + dense(y, a['out'])
        y = gelu(dense(norm(x, block['LayerNorm_1']), m['Dense_0']))
        x = x + dense(y, m['Dense_1'])
    return norm(x, p['Encoder_0']['encoder_norm'])[-1]


def unit(x, p):
    """The embedding of features [B, D]: head, length and what has length 1."""
    x = dense(x, p['head']) if 'head' in p else x
    length = np.sqrt((x**2).sum(-1, keepdims=True))
    return x, length, x / (length + 1e-8)


@pytest.mark.parametrize('case', CASES)
def test_embeddings_are_those_of_float64(case):
    kind, text, image, out_dim = CASES[case]
    model = models.LitModel(image=image, text_model=kind, text=text, out_dim=out_dim)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(1, text['vocab_size'], (4, 7)).astype(np.int32)
    tokens[1:3, 3:] = 0
    init = functools.partial(model.init, jax.random.key(0), images=images, tokens=tokens)

    def leaf(path, like):
        values = rng.normal(size=like.shape).astype(np.float32) * np.float32(0.3)
        return values + np.float32(path[-1].key == 'scale')

    params = jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init)['params'])
    zimg, ztxt, out = jax.jit(model.apply)({'params': params}, images=images, tokens=tokens)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    tower = {'bert': bert, 'text_transformer': text_transformer}[kind]
    features = np.stack([tower(row, exact['txt'], text) for row in tokens])
    logits, length, unit_length = unit(features, exact['txt'])
    np.testing.assert_allclose(ztxt, unit_length, atol=1e-5)
    np.testing.assert_allclose(out['txt/norm'], length, rtol=1e-5)
    np.testing.assert_allclose(out['txt/pre_logits'], features, atol=1e-5 * abs(features).max())
    if 'head' in exact['txt']:
        np.testing.assert_allclose(out['txt/logits'], logits, atol=1e-5 * abs(logits).max())
    inside = {'bert': 'txt/transformed', 'text_transformer': 'txt/embedded'}[kind]
    assert out[inside].shape[:2] == tokens.shape

    tower = models.VisionTransformer(**image, num_classes=0)
    bare = {name: leaf for name, leaf in params['img'].items() if name != 'head'}
    features = jax.jit(functools.partial(tower.apply, train=False))({'params': bare}, images)
    _, length, unit_length = unit(np.asarray(features, np.float64), exact['img'])
    np.testing.assert_allclose(zimg, unit_length, atol=1e-5)
    np.testing.assert_allclose(out['img/norm'], length, rtol=1e-5)
    np.testing.assert_allclose(out['t'], np.exp(exact['t']), rtol=1e-6)
    assert out['t'].shape == (1,)


def test_sizes_of_bert_by_name_or_as_a_mapping():
    import ml_collections

    sizes = dict(hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12)
    tokens, shapes = np.ones((1, 3), np.int32), []
    for text in (ml_collections.ConfigDict({'config': 'base'}), sizes):
        model = models.LitModel(image=IMAGE, text_model='bert', text=text, out_dim=(None, 8))
        init = functools.partial(model.init, jax.random.key(0), tokens=tokens)
        shapes.append(jax.tree.map(np.shape, jax.eval_shape(init)))
    assert shapes[0] == shapes[1]
    model = models.LitModel(image=IMAGE, text_model='bert', text={'config': 'huge'})
    with pytest.raises(ValueError, match="unknown size of BERT 'huge': one of base, large"):
        jax.eval_shape(functools.partial(model.init, jax.random.key(0), tokens=tokens))
