"""Attention maps, rollout, distance, relevance and overlays, each against another computation."""

import dataclasses
import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.analysis import attention, embeddings
from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.errors import UserError
from vit_jax.export import pytorch as export
from vit_jax.inference import model_folder

SIDE = 24
COUNT = 9  # patches, 3 x 3
CLASSES = ('daisy', 'tulip', 'rose')
VIT = {
    'model_name': None,
    'patches': {'size': (8, 8)},
    'hidden_size': 12,
    'transformer': {
        'mlp_dim': 16,
        'num_heads': 2,
        'num_layers': 2,
        'attention_dropout_rate': 0.0,
        'dropout_rate': 0.0,
    },
    'classifier': 'token',
    'representation_size': None,
}
FAMILIES = {
    'token': VIT,
    'gap': VIT | {'classifier': 'gap'},
    'distilled': VIT | {'distilled': True},
    'hybrid': VIT
    | {'patches': {'size': (2, 2)}, 'resnet': {'num_layers': (), 'width_factor': 0.5}},
}
# Rows of the rollout or of R that the head reads.
READ = {'token': [0], 'gap': range(COUNT), 'distilled': [0, 1], 'hybrid': [0]}


@functools.cache
def made_up(family, attention='auto'):
    """A model with random weights, large enough that heads differ; and pixels [2, 24, 24, 3]."""
    config = FAMILIES[family]
    module = models.from_config(config, num_classes=3, attention=attention)
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    plain = module.clone(attention='xla')
    shapes = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x, train=False), image)
    leaves, tree = jax.tree.flatten(shapes['params'])
    rng = np.random.default_rng(0)
    params = tree.unflatten([rng.normal(0, 0.5, leaf.shape).astype(np.float32) for leaf in leaves])
    pixels = rng.uniform(0, 255, (2, SIDE, SIDE, 3)).astype(np.float32)
    preprocess = Preprocess(crop=SIDE)
    return model_folder.Model(module, params, config, CLASSES, preprocess, {}), pixels


@functools.cache
def maps(family):
    return attention.maps(*made_up(family))


@functools.cache
def weights(family):
    """[B, L, H, N, N] the attention weights of every block."""
    model, pixels = made_up(family)

    @jax.jit
    def recorded(params, pixels):
        _, out = models.apply_with_intermediates(
            model.model, params, normalize(pixels), attention_weights=True
        )
        names = [f'Transformer/encoderblock_{i}/attention_weights' for i in range(2)]
        return jnp.stack([out[name] for name in names], axis=1)

    return np.asarray(recorded(model.params, pixels))


@pytest.mark.parametrize('family', FAMILIES)
def test_rows_of_attention_sum_to_one(family):
    found = weights(family)
    special = {'gap': 0, 'distilled': 2}.get(family, 1)
    assert found.shape == (2, 2, 2, COUNT + special, COUNT + special)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=0, atol=1e-6)
    assert found.min() >= 0
    assert found.std(axis=-1).min() > 1e-3  # not uniform, so that what follows means something


@pytest.mark.parametrize('family', FAMILIES)
def test_class_token_maps_are_rows_of_attention(family):
    rows = weights(family).mean(axis=3) if family == 'gap' else weights(family)[:, :, :, 0]
    expected = rows[..., -COUNT:].reshape(2, 2, 2, 3, 3)
    found = maps(family).class_token
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize('family', FAMILIES)
def test_rollout_is_the_product_of_matrices(family):
    layers = weights(family).astype(np.float64).mean(axis=2)  # [B, L, N, N]
    rows = READ[family] if family == 'gap' else [0]
    for image in range(2):
        product = np.eye(layers.shape[-1])
        for layer in layers[image]:
            mixed = 0.5 * layer + 0.5 * np.eye(len(layer))
            product = (mixed / mixed.sum(axis=-1, keepdims=True)) @ product
        np.testing.assert_allclose(product.sum(axis=-1), 1, atol=1e-6)
        expected = product[list(rows)].mean(axis=0)[-COUNT:].reshape(3, 3)
        np.testing.assert_allclose(maps(family).rollout[image], expected, rtol=0, atol=1e-7)


def test_distance_of_attention_known_by_hand():
    count = 6  # 2 x 3 patches, and a class token that gets attention, too
    grid, stride = (2, 3), (16.0, 16.0)
    uniform = np.full((1, 1, count + 1, count + 1), 1 / (count + 1), np.float32)
    centres = [(16 * i, 16 * j) for i in range(2) for j in range(3)]
    between = [np.hypot(a[0] - b[0], a[1] - b[1]) for a in centres for b in centres]
    found = attention.mean_distance(jnp.asarray(uniform), grid, stride)
    np.testing.assert_allclose(found, [[np.mean(between)]], rtol=1e-6)
    identity = np.eye(count + 1, dtype=np.float32)[None, None]
    assert float(attention.mean_distance(jnp.asarray(identity), grid, stride)[0, 0]) == 0
    # Everybody attends to the first patch, and three times as much to the class token.
    to_first = np.zeros((1, 1, count + 1, count + 1), np.float32)
    to_first[..., 0], to_first[..., 1] = 0.75, 0.25
    expected = np.mean([np.hypot(*centre) for centre in centres])
    found = attention.mean_distance(jnp.asarray(to_first), grid, stride)
    np.testing.assert_allclose(found, [[expected]], rtol=1e-6)
    only_class_token = np.zeros((1, 1, count + 1, count + 1), np.float32)
    only_class_token[..., 0] = 1
    assert float(attention.mean_distance(jnp.asarray(only_class_token), grid, stride)[0, 0]) == 0


@pytest.mark.parametrize('family', FAMILIES)
def test_distance_in_pixels_of_the_input(family):
    between = weights(family)[..., -COUNT:, -COUNT:].astype(np.float64)
    between /= between.sum(axis=-1, keepdims=True)
    place = np.stack(np.divmod(np.arange(COUNT), 3), axis=-1) * 8  # 8 pixels from token to token
    distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
    expected = (between * distance).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(maps(family).mean_distance, expected, rtol=1e-5)


def chefer(layers, gradients, rows):
    """R of one image, equations 5 and 6 of the paper, [L, H, N, N] -> [3, 3]."""
    identity = np.eye(layers.shape[-1])
    total = identity
    for layer, gradient in zip(layers, gradients, strict=True):
        total = total + np.maximum(gradient * layer, 0).mean(axis=0) @ total
    return (total - identity)[list(rows)].mean(axis=0)[-COUNT:].reshape(3, 3)


@pytest.mark.parametrize('family', ['gap', 'distilled'])  # what the head reads of each is its own
def test_relevance_by_finite_differences(family):
    model, pixels = made_up(family)
    names = [f'Transformer/encoderblock_{i}/attention_weights' for i in range(2)]
    shape = weights(family)[0, 0].shape
    step = 2.0**-7

    @jax.jit
    def slopes(params, image):
        def logits(offsets):
            return models.apply_with_intermediates(
                model.model,
                params,
                image,
                attention_weights=True,
                attention_offsets={name: offsets[i][None] for i, name in enumerate(names)},
            )[0][0]

        def slope(index):
            offset = jnp.zeros(2 * np.prod(shape)).at[index].set(step).reshape(2, *shape)
            return (logits(offset) - logits(-offset)) / (2 * step)

        return jax.vmap(slope)(jnp.arange(2 * np.prod(shape)))

    found = attention.relevance(model, pixels, np.array([[2, 0], [1, 2]]))
    assert found.shape == (2, 2, 3, 3) and found.min() >= 0
    gradients = np.asarray(slopes(model.params, normalize(pixels[1:]))).reshape(2, *shape, 3)
    for place, label in enumerate((1, 2)):
        expected = chefer(weights(family)[1], gradients[..., label], READ[family])
        np.testing.assert_allclose(found[1, place], expected, atol=2e-3 * expected.max())
    assert np.abs(found[1, 0] - found[1, 1]).max() > 0.05 * found[1].max()  # classes differ


@pytest.mark.parametrize('family', ['token', 'distilled'])
def test_relevance_and_attention_of_transformers(family, tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    model, pixels = made_up(family)
    export.write(tmp_path / 'hf', model, to='huggingface')
    kind = 'DeiTForImageClassificationWithTeacher' if family == 'distilled' else (
        'ViTForImageClassification'
    )  # fmt: skip
    transformers.logging.disable_progress_bar()
    theirs = getattr(transformers, kind).from_pretrained(
        tmp_path / 'hf', attn_implementation='eager'
    ).eval()  # fmt: skip
    images = torch.from_numpy(normalize(pixels).transpose(0, 3, 1, 2).copy())
    out = theirs(pixel_values=images, output_attentions=True)
    found = attention.relevance(model, pixels, np.array([[0, 2], [1, 0]]))
    layers = torch.stack(out.attentions, dim=1).detach().numpy()
    np.testing.assert_allclose(weights(family), layers, rtol=0, atol=1e-6)
    np.testing.assert_allclose(maps(family).logits, out.logits.detach(), rtol=0, atol=1e-5)
    for image, labels in enumerate(((0, 2), (1, 0))):
        for place, label in enumerate(labels):
            gradients = torch.autograd.grad(
                out.logits[image, label], out.attentions, retain_graph=True
            )
            gradients = torch.stack(gradients, dim=1)[image].numpy()
            expected = chefer(layers[image], gradients, READ[family])
            np.testing.assert_allclose(found[image, place], expected, atol=1e-5 * expected.max())


def test_any_attention_implementation_gives_the_same():
    labels = np.array([[0], [1]])
    model, pixels = made_up('token', 'cudnn')  # here is no GPU: the kernel itself would fail
    found = attention.maps(model, pixels)
    for field in ('class_token', 'rollout', 'mean_distance', 'logits'):
        np.testing.assert_array_equal(getattr(found, field), getattr(maps('token'), field))
    np.testing.assert_array_equal(
        attention.relevance(model, pixels, labels),
        attention.relevance(made_up('token')[0], pixels, labels),
    )


def test_normal_use_knows_nothing_of_gradients_of_attention():
    model, pixels = made_up('token')
    init = functools.partial(model.model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), pixels)
    assert set(variables) == {'params'}
    plain = jax.jit(lambda p, x: model.model.apply({'params': p}, x, train=False))
    text = str(jax.make_jaxpr(plain)(model.params, pixels))
    # q k^T and softmax once in each block; no array of zeros as large as the weights is added.
    assert text.count('exp ') == 2
    assert 'broadcast_in_dim[shape=(2, 2, 10, 10)' not in text


def test_bright_square_is_where_the_overlay_says():
    """A model whose class token attends to bright patches, on photos that are not square."""
    model, _ = made_up('token')
    zeros = jax.tree.map(np.zeros_like, dict(model.params))
    zeros['embedding']['kernel'][..., 0] = 1 / 192  # mean brightness, in [-1, 1]
    zeros['embedding']['kernel'][..., 1] = -1 / 192
    for layer in ('encoderblock_0', 'encoderblock_1'):
        block = zeros['Transformer'][layer]
        block['LayerNorm_0']['scale'][:] = 1
        own = block['MultiHeadDotProductAttention_0']
        own['query']['bias'][:, 0] = 2
        own['key']['kernel'][0, :, 0] = 2  # bright patches have a positive first number
    model = dataclasses.replace(model, params=zeros)
    for height, width, top, left in ((120, 402, 0, 268), (300, 90, 200, 30)):
        # One of 3 x 3 patches of the squashed image is white.
        tall, wide = height // 3, width // 3
        image = np.zeros((height, width, 3), np.uint8)
        image[top : top + tall, left : left + wide] = 255
        pixels = model.preprocess.evaluate(image)[None]
        found = attention.maps(model, pixels)
        for heat in (found.rollout[0], found.class_token[0, 0, 0], found.class_token[0, 1, 1]):
            assert np.unravel_index(heat.argmax(), heat.shape) == (top // tall, left // wide)
            drawn = attention.overlay(np.zeros_like(image), heat).astype(int).sum(axis=-1)
            assert drawn.shape == (height, width)
            rows, columns = np.nonzero(drawn > 0.95 * drawn.max())
            assert top <= rows.min() and rows.max() < top + tall
            assert left <= columns.min() and columns.max() < left + wide


@pytest.mark.parametrize('shape', [(64, 64), (60, 100), (33, 17)])
def test_overlay_of_a_hand_made_map(shape):
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 1
    drawn = attention.overlay(np.zeros((*shape, 3)), heat).astype(float)
    light = drawn.sum(axis=-1) - drawn.sum(axis=-1).min()
    centre = [
        (light.sum(axis=1 - i) * (np.arange(shape[i]) + 0.5)).sum() / light.sum() for i in (0, 1)
    ]
    # The patch's centre, to a tenth of a patch.
    np.testing.assert_allclose(
        centre, [1.5 * shape[0] / 4, 2.5 * shape[1] / 4], atol=max(shape) / 40
    )
    # Its colour there is the map's brightest.
    y, x = int(1.5 * shape[0] / 4), int(2.5 * shape[1] / 4)
    assert drawn[y, x].sum() >= 0.9 * drawn.sum(axis=-1).max()


def test_overlay_shows_image_and_map():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 24, 3), np.uint8)
    heat = rng.normal(size=(5, 3)).astype(np.float32)
    drawn = attention.overlay(image, heat)
    assert (drawn.shape, drawn.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(drawn, attention.overlay(image.astype(np.float32), heat))
    np.testing.assert_array_equal(drawn, attention.overlay(image, 3 * heat - 7))  # its own range
    grey = cv2.cvtColor(drawn, cv2.COLOR_RGB2GRAY).astype(float)
    assert np.corrcoef(grey.ravel(), image.mean(axis=-1).ravel())[0, 1] > 0.3
    # A map without differences is all minimum: the image, darkened.
    flat = attention.overlay(image, np.full((5, 3), 0.2))
    assert flat.max() <= 0.4 * 255 + 3
    with pytest.raises(ValueError, match='NaN'):
        attention.overlay(image, np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match=r'\[height, width, 3\]'):
        attention.overlay(image[..., 0], heat)


def test_what_has_no_attention_says_so():
    mixer = models.get_model('Mixer-S_32', num_classes=3)
    model = dataclasses.replace(made_up('token')[0], model=mixer)
    with pytest.raises(UserError, match='MLP-Mixer has no attention'):
        attention.maps(model, made_up('token')[1])
    with pytest.raises(UserError, match='MLP-Mixer has no attention'):
        embeddings.position_similarity(model)
    model, pixels = made_up('token')
    for classifier in ('unpooled', 'token_unpooled'):
        other = dataclasses.replace(model, model=model.model.clone(classifier=classifier))
        with pytest.raises(UserError, match=f'{classifier!r} gives a result for every token'):
            attention.maps(other, pixels)
    with pytest.raises(UserError, match='no classification head'):
        attention.relevance(dataclasses.replace(model, class_names=()), pixels, np.zeros((2, 1)))
    with pytest.raises(UserError, match='labels of this model are 0 to 2'):
        attention.relevance(model, pixels, np.array([[0], [3]]))
    with pytest.raises(ValueError, match=r'must be \[2, K\]'):
        attention.relevance(model, pixels, np.array([0, 1]))


def test_filters_of_known_components():
    rng = np.random.default_rng(0)
    model, _ = made_up('token')
    basis = np.linalg.qr(rng.normal(size=(192, 3)))[0].T  # three orthogonal pictures of 8 x 8 x 3
    factors = np.linalg.qr(rng.normal(size=(12, 4)) - [[0, 0, 0, 1]])[0][:, :3]
    factors -= factors.mean(axis=0)
    u, scales, v = np.linalg.svd(factors * [5, 2, 1] @ basis, full_matrices=False)
    kernel = (u * scales @ v + rng.normal(size=192)).T.reshape(8, 8, 3, 12)  # and a common mean
    params = dict(model.params) | {'embedding': {'kernel': kernel.astype(np.float32)}}
    model = dataclasses.replace(model, params=params)
    components, share = embeddings.filter_components(model)
    assert components.shape == (12, 8, 8, 3)
    np.testing.assert_allclose(share[:3], scales[:3] ** 2 / (scales**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-6)
    assert share[3] < 1e-9
    for component, row in zip(components[:3], v, strict=False):
        np.testing.assert_allclose(abs((component.reshape(-1) * row).sum()), 1, rtol=1e-5)
        assert component.max() == np.abs(component).max()
    assert embeddings.filter_components(model, 2)[0].shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match='features of its ResNet'):
        embeddings.filter_components(made_up('hybrid')[0])


@pytest.mark.parametrize('family', FAMILIES)
def test_similarity_of_positions(family):
    model, _ = made_up(family)
    found = embeddings.position_similarity(model)
    assert found.shape == (3, 3, 3, 3)
    stored = model.params['Transformer']['posembed_input']['pos_embedding'][0][-COUNT:]
    a, b = stored.reshape(3, 3, -1)[1, 2], stored.reshape(3, 3, -1)[2, 0]
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found[1, 2, 2, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(np.einsum('ijij->ij', found), 1, rtol=1e-6)
    np.testing.assert_array_equal(found, found.transpose(2, 3, 0, 1))


def test_positions_of_real_weights_are_a_grid(shared_dir):
    """As in the paper's figure: near patches are similar, those of a row or column more so."""
    model = model_folder.load(shared_dir / 'weights' / 'deit_ti16_imagenet1k.npz')
    found = embeddings.position_similarity(model)[7, 7]
    assert found.shape == (14, 14)
    assert found[7, 8] > 0.5 > found[0, 0] + 0.3
    assert min(found[7, 10], found[10, 7]) > found[10, 10]
    components, share = embeddings.filter_components(model)
    assert components.shape == (28, 16, 16, 3)
    assert share[0] > share[-1] and 0.3 < share.sum() < 0.8
