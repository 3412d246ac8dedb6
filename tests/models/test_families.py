"""Hybrids, Mixers, distilled models, the MLP head: what is their own, and what all share."""

import functools
import json

import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest

from vit_jax import models, variants
from vit_jax.checkpoint import npz
from vit_jax.models import resnet

ENCODER = {
    'mlp_dim': 64,
    'num_heads': 4,
    'num_layers': 1,
    'dropout_rate': 0.0,
    'attention_dropout_rate': 0.0,
}
VIT = {'patches': {'size': (8, 8)}, 'hidden_size': 32, 'transformer': ENCODER}
FAMILIES = {
    'vit': VIT | {'representation_size': 24},
    'hybrid': VIT | {
        'patches': {'size': (1, 1)}, 'resnet': {'num_layers': [1, 2], 'width_factor': 0.5},
    },
    'distilled': VIT | {'distilled': True},
    'mlp_head': VIT | {'mlp_head': True},
    'mixer': {
        'patches': {'size': (8, 8)}, 'hidden_dim': 32, 'num_blocks': 2, 'tokens_mlp_dim': 24,
        'channels_mlp_dim': 64,
    },
}  # fmt: skip
MATRIX_PRODUCTS = {  # patch embedding, head, 8 in a block of an encoder, 4 in one of a Mixer
    'vit': 3 + 8, 'hybrid': 2 + 8 + 1 + 4 + 4 + 3, 'distilled': 3 + 8, 'mlp_head': 3 + 8,
    'mixer': 2 + 8,
}  # fmt: skip

# Compiles sooner.
SMALL_HYBRID = FAMILIES['hybrid'] | {
    'resnet': {'num_layers': [1], 'width_factor': 0.5},
}

each_family = pytest.mark.parametrize('family', FAMILIES)


def create(family, **overrides):
    config = SMALL_HYBRID if family == 'small_hybrid' else FAMILIES[family]
    return models.from_config(config, **{'num_classes': 7, **overrides})


@functools.cache
def images_and_params(family):
    """Two images, and parameters that are non-zero everywhere."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    params = modules.shapes(create(family), jnp.zeros((1, 32, 32, 3)), train=False)
    # Around 1 for what scales, wide enough for kernels that no part of the model is silent.
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: (
            np.float32(path[-1].key == 'scale')
            + rng.standard_normal(p.shape, np.float32)
            * (0.3 if path[-1].key != 'kernel' else np.float32(np.prod(p.shape[:-1]) ** -0.5))
        ),
        params,
    )
    return images, params


@functools.cache
def logits_in_float32(family):
    images, params = images_and_params(family)
    model = create(family)
    return jax.jit(lambda p, x: model.apply({'params': p}, x, train=False))(params, images)


@functools.cache
def look_inside(family):
    images, params = images_and_params(family)
    model = create(family)
    return jax.jit(lambda p, x: models.apply_with_intermediates(model, p, x))(params, images)


def abstract_params(model, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return modules.shapes(model, images, train=False)


def matrix_products(function, *args):
    """Types of the operands of every matrix product and convolution: ('bf16', 'bf16')."""
    found = []
    for line in function.lower(*args).as_text().splitlines():
        if 'stablehlo.dot_general' in line or 'stablehlo.convolution' in line:
            operands = line.rsplit(' : ', 1)[1].split('->')[0]
            found.append(tuple(o.rsplit('x', 1)[1].rstrip('>) ') for o in operands.split(', ')))
    return found


@each_family
def test_dtype_reaches_every_matrix_product(family):
    images, params = images_and_params(family)
    model = create(family, dtype=jnp.bfloat16)
    function = jax.jit(lambda p, x: model.apply({'params': p}, x, train=False))
    products = matrix_products(function, params, images)
    assert products == [('bf16', 'bf16')] * MATRIX_PRODUCTS[family]
    rounded, exact = function(params, images), logits_in_float32(family)
    assert rounded.dtype == exact.dtype == jnp.float32
    assert 0 < float(jnp.abs(rounded - exact).max()) < 0.1 * float(jnp.abs(exact).max())


@each_family
def test_float64_reaches_everything(family):
    """So that a float64 run tells which side of a comparison rounds."""
    images, params = images_and_params(family)
    single = logits_in_float32(family)
    with jax.enable_x64(True):
        model = create(family, dtype=jnp.float64)
        wide = jax.tree.map(lambda p: np.asarray(p, np.float64), (params, images))
        function = jax.jit(lambda p, x: model.apply({'params': p}, x, train=False))
        double = np.asarray(function(*wide))
        assert double.dtype == np.float64
        text = function.lower(*wide).as_text()
        assert 'xf32>' not in text and 'tensor<f32>' not in text
    assert 0 < np.abs(double - single).max() < 1e-5


@pytest.mark.parametrize('family', ['small_hybrid', 'mixer'])
def test_rematerialisation_changes_memory_not_results(family):
    images, params = images_and_params(family)

    def gradients(remat):
        model = create(family, remat=remat)
        loss = lambda p: (model.apply({'params': p}, images, train=True) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))

    plain, saving = gradients(''), gradients('full')
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        plain(params),
        saving(params),
    )
    # One for each block: two of the Mixer; of the hybrid, one residual unit and one of the encoder.
    barriers = [
        function.lower(params).as_text().count('stablehlo.optimization_barrier')
        for function in (plain, saving)
    ]
    assert barriers[1] - barriers[0] == 2
    with pytest.raises(ValueError, match="unknown remat 'some'"):
        abstract_params(create(family, remat='some'), 32)


@pytest.mark.parametrize('name', variants.VARIANTS)
def test_token_stride_gives_the_grid(name):
    config = variants.get_config(name).to_dict()
    stride, _ = variants.token_stride(config)
    # What comes behind the patches has no part in it.
    depth = 'num_blocks' if variants.is_mixer(config) else 'num_layers'
    config.get('transformer', config)[depth] = 1
    side = 3 * stride  # not 224: so that stride and patch are not mixed up
    params = npz.flatten(abstract_params(models.from_config(config, num_classes=2), side))
    if variants.is_mixer(config):
        assert params['MixerBlock_0/token_mixing/Dense_0/kernel'].shape[0] == 9
    elif 'Transformer/posembed_input/pos_embedding' in params:  # DINOv3 has rotary ones alone
        first = ('cls' in params) + ('dist' in params)
        first += config.get('registers', 0) if config.get('register_positions') else 0
        assert params['Transformer/posembed_input/pos_embedding'].shape[1] == 9 + first


def test_standardised_convolution_is_its_formula():
    rng = np.random.default_rng(0)
    kernel = rng.normal(3, 0.5, (3, 3, 4, 5)).astype(np.float32)
    images = rng.standard_normal((2, 6, 6, 4)).astype(np.float32)
    flat = kernel.astype(np.float64).reshape(-1, 5)
    standard = (flat - flat.mean(0)) / (np.sqrt(flat.var(0)) + 1e-5)
    padded = np.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)])  # SAME for stride 2, even sizes
    expected = np.zeros((2, 3, 3, 5))
    for y, x in np.ndindex(3, 3):
        patch = padded[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3].reshape(2, -1)
        expected[:, y, x] = patch @ standard
    variables = {'params': {'kernel': kernel}}
    ours = resnet.StdConv(5, (3, 3), (2, 2)).apply(variables, images)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    # Standardised in float32 also in a bfloat16 model: rounded to 8 bits first, weights of this
    # mean would have lost half of their spread.
    variables = {'params': {'kernel': kernel + 100}}
    rounded = resnet.StdConv(5, (3, 3), (2, 2), jnp.bfloat16).apply(variables, images)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(np.float32), expected, atol=0.1)


def test_hybrid_parameters_have_the_published_names_and_shapes():
    params = npz.flatten(abstract_params(models.get_model('R50+ViT-B_16', num_classes=1000), 384))
    expected = {
        'conv_root/kernel': (7, 7, 3, 64),
        'gn_root/scale': (64,),
        'block1/unit1/conv1/kernel': (1, 1, 64, 64),
        'block1/unit1/conv3/kernel': (1, 1, 64, 256),
        'block1/unit1/conv_proj/kernel': (1, 1, 64, 256),
        'block1/unit1/gn_proj/bias': (256,),
        'block2/unit1/conv1/kernel': (1, 1, 256, 128),
        'block2/unit1/conv_proj/kernel': (1, 1, 256, 512),
        'block3/unit9/conv1/kernel': (1, 1, 1024, 256),
        'block3/unit9/conv3/kernel': (1, 1, 256, 1024),
        'embedding/kernel': (1, 1, 1024, 768),
        'Transformer/posembed_input/pos_embedding': (1, 577, 768),
    }
    assert {name: params[name].shape for name in expected} == expected
    assert len(params) == 356
    assert sum(leaf.size for leaf in params.values()) == 98_950_952
    assert 'block1/unit2/conv_proj/kernel' not in params and 'conv_root/bias' not in params
    stem = npz.flatten(abstract_params(models.get_model('R+ViT-Ti_16', num_classes=1000), 224))
    assert stem['embedding/kernel'].shape == (8, 8, 64, 192)
    assert stem['Transformer/posembed_input/pos_embedding'].shape == (1, 50, 192)
    assert len(stem) == 203


def test_mixer_parameters_have_the_published_names_and_shapes():
    params = npz.flatten(abstract_params(models.get_model('Mixer-B_16', num_classes=21843), 224))
    expected = {
        'stem/kernel': (16, 16, 3, 768),
        'MixerBlock_11/token_mixing/Dense_0/kernel': (196, 384),
        'MixerBlock_11/token_mixing/Dense_1/bias': (196,),
        'MixerBlock_0/channel_mixing/Dense_1/kernel': (3072, 768),
        'MixerBlock_0/LayerNorm_1/scale': (768,),
        'pre_head_layer_norm/bias': (768,),
        'head/kernel': (768, 21843),
    }
    assert {name: params[name].shape for name in expected} == expected
    assert len(params) == 150
    assert sum(leaf.size for leaf in params.values()) == 75_908_739


def test_a_new_residual_unit_is_its_shortcut():
    images = jnp.ones((1, 4, 4, 128))
    unit = resnet.ResidualUnit(32)
    output, _ = jax.jit(lambda x: unit.init_with_output(jax.random.key(0), x))(images)
    np.testing.assert_array_equal(output, images)


def test_intermediates_of_hybrid_and_mixer():
    _, out = look_inside('small_hybrid')
    assert out['resnet'].shape == (2, 8, 8, 128)
    assert out['patch_embedding'].shape == (2, 8, 8, 32)

    logits, out = look_inside('mixer')
    params = images_and_params('mixer')[1]
    shapes = {name: value.shape for name, value in out.items()}
    assert shapes['patch_embedding'] == (2, 4, 4, 32) and shapes['encoded'] == (2, 16, 32)
    np.testing.assert_allclose(
        out['MixerBlock_0/tokens'] + out['MixerBlock_1/tokens_mlp']
        + out['MixerBlock_1/channels_mlp'],
        out['MixerBlock_1/tokens'],
        atol=1e-5,
    )  # fmt: skip
    head = params['head']
    np.testing.assert_allclose(
        out['pre_logits'] @ head['kernel'] + head['bias'][None], logits, atol=1e-5
    )


def test_a_distilled_model_averages_its_two_heads():
    images, params = images_and_params('distilled')
    assert params['dist'].shape == (1, 1, 32)
    assert params['Transformer']['posembed_input']['pos_embedding'].shape == (1, 18, 32)
    logits, out = look_inside('distilled')
    assert out['pre_logits'].shape == (2, 2, 32)
    encoded = np.asarray(out['encoded'])
    heads = [params[name] for name in ('head', 'head_dist')]
    # The class token comes first, then the distillation token.
    parts = [encoded[:, i] @ h['kernel'] + h['bias'][None] for i, h in enumerate(heads)]
    assert np.abs(parts[0] - parts[1]).max() > 0.1
    np.testing.assert_allclose(logits, (parts[0] + parts[1]) / 2, atol=1e-5)
    model = create('distilled', num_classes=0)
    features = jax.jit(lambda p: model.apply({'params': p}, images, train=False))(params)
    np.testing.assert_allclose(features, encoded[:, :2].mean(axis=1), atol=1e-5)


def test_the_distillation_token_stands_between_class_token_and_patches():
    """It has the second position embedding: without it, the rest is a ViT's."""
    params = images_and_params('distilled')[1]
    _, out = look_inside('distilled')
    tokens = out['Transformer/with_position_embedding']
    positions = params['Transformer']['posembed_input']['pos_embedding']
    for place, name in enumerate(('cls', 'dist')):
        expected = params[name][0, 0] + positions[0, place]
        np.testing.assert_allclose(tokens[0, place], expected, atol=1e-6)


def test_the_mlp_head_is_dense_relu_dropout_dense():
    images, params = images_and_params('mlp_head')
    logits, out = look_inside('mlp_head')
    hidden = params['head_hidden']
    x = np.maximum(out['pre_logits'] @ hidden['kernel'] + hidden['bias'][None], 0)
    expected = x @ params['head']['kernel'] + params['head']['bias'][None]
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    dropping = FAMILIES['mlp_head'] | {'transformer': {**ENCODER, 'num_layers': 0}}
    dropping['transformer']['dropout_rate'] = 0.5
    model = models.from_config(dropping, num_classes=7)
    rngs = [{'dropout': jax.random.key(i)} for i in range(2)]
    apply = jax.jit(lambda rngs: model.apply({'params': params}, images, train=True, rngs=rngs))
    first, second = map(apply, rngs)
    assert not jnp.allclose(first, second)


@pytest.mark.parametrize(
    ('family', 'changes', 'size', 'message'),
    [
        ('hybrid', {'patches': {'size': (3, 3)}}, 32, r'32 x 32 pixels \(4 x 4 after the ResNet\)'),
        ('mixer', {}, 36, 'an image of 36 x 36 pixels is not a whole number of 8 x 8 patches'),
        ('distilled', {'classifier': 'gap'}, 32, "a distilled model has classifier 'token'"),
        ('distilled', {'representation_size': 8}, 32, 'neither representation_size nor mlp_head'),
        ('distilled', {'mlp_head': True}, 32, 'neither representation_size nor mlp_head'),
    ],
)
def test_impossible_arguments_are_named(family, changes, size, message):
    with pytest.raises(ValueError, match=message):
        abstract_params(create(family, **changes), size)


@each_family
def test_a_config_from_json_builds_the_same_module(family):
    read = models.from_config(json.loads(json.dumps(FAMILIES[family])), num_classes=7)
    assert read == create(family)


def test_a_mixer_takes_no_attention():
    assert isinstance(models.get_model('Mixer-S_16', num_classes=2), models.MlpMixer)
    assert models.get_model('Mixer-S_16', num_classes=2, attention='auto')
    with pytest.raises(ValueError, match='an MLP-Mixer has no attention'):
        models.get_model('Mixer-S_16', num_classes=2, attention='xla')
    with pytest.raises(ValueError, match='an MLP-Mixer has no attention'):
        images, params = images_and_params('mixer')
        models.apply_with_intermediates(create('mixer'), params, images, attention_weights=True)
