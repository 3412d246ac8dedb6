"""The ViT module: structure, numbers of the original release, dtype, intermediates."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest

from vit_jax import models, variants
from vit_jax.checkpoint import npz
from vit_jax.models import attention

CONFORMANCE = pathlib.Path(__file__).parents[1] / 'fixtures/conformance'
CASES = sorted(
    name
    for name in json.loads((CONFORMANCE / 'index.json').read_text())
    if (CONFORMANCE / f'{name}.expected.npz').exists()
)

# The original release's test table, at 1000 classes and 224 px.
PARAMETERS = {
    'ViT-Ti_16': 5_717_416,
    'ViT-S_16': 22_050_664,
    'ViT-S_32': 22_878_952,
    'ViT-B_8': 86_576_872,
    'ViT-B_16': 86_567_656,
    'ViT-B_32': 88_224_232,
    'ViT-L_16': 304_326_632,
    'ViT-L_32': 306_535_400,
    'ViT-H_14': 632_045_800,
    'ViT-S_16-gap-norep': 22_049_896,
    'ViT-S_32-gap-norep': 22_878_184,
    'ViT-B_16-gap-norep': 86_566_120,
    'ViT-B_32-gap-norep': 88_222_696,
    'R+ViT-Ti_16': 6_337_704,
    'R26+ViT-S_32': 36_431_912,
    'R26+ViT-B_32': 101_383_976,
    'R50+ViT-B_16': 98_659_112,
    'R50+ViT-L_32': 328_994_856,
    'Mixer-B_16': 59_880_472,
    'Mixer-B_32': 60_293_428,
    'Mixer-L_16': 208_196_168,
    # Not of that table: the DeiT paper's, the PaddleViT course's.
    'DeiT-B_16': 87_338_192,
    'ViT-B_16-mlp-head': 87_158_248,
}


def analytic_count(config, classes=1000, size=224):
    """Of the sizes that no table gives: summed by hand."""
    patch = config['patches']['size'][0]
    tokens = (size // patch) ** 2
    if 'num_blocks' in config:
        d, s, c = config['hidden_dim'], config['tokens_mlp_dim'], config['channels_mlp_dim']
        block = 4 * d + (2 * tokens * s + s + tokens) + (2 * d * c + c + d)
        return 3 * patch**2 * d + d + config['num_blocks'] * block + 2 * d + d * classes + classes
    d, mlp = config['hidden_size'], config['transformer']['mlp_dim']
    extra = {'gap': 0, 'token': 1}[config['classifier']] + config.get('distilled', False)
    block = 4 * d + 4 * (d * d + d) + 2 * d * mlp + mlp + d
    heads = 2 if config.get('distilled') else 1
    return (
        3 * patch**2 * d + d + (tokens + 2 * extra) * d
        + config['transformer']['num_layers'] * block + 2 * d + heads * (d * classes + classes)
    )  # fmt: skip


TINY = {
    'num_classes': 7,
    'patches': {'size': (8, 8)},
    'hidden_size': 32,
    'transformer': {
        'mlp_dim': 64,
        'num_heads': 4,
        'num_layers': 2,
        'dropout_rate': 0.0,
        'attention_dropout_rate': 0.0,
    },
}


def random_images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def random_params(model, images, seed=0):
    """Non-zero everywhere, so that no part of the model is silent."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        noise = 0.15 * rng.standard_normal(leaf.shape, np.float32)
        return noise + np.float32(path[-1].key == 'scale')

    return jax.tree_util.tree_map_with_path(value, modules.shapes(model, images, train=False))


def compute(model, params, images, **options):
    """The logits, as one compiled program: much sooner than operation by operation."""
    apply = jax.jit(lambda p, x: model.apply({'params': p}, x, **{'train': False} | options))
    return apply(params, images)


def look_inside(model, params, images, **options):
    """The same with intermediates."""
    inside = jax.jit(lambda p, x: models.apply_with_intermediates(model, p, x, **options))
    return inside(params, images)


def abstract_params(model, size=224):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return modules.shapes(model, images, train=False)


@pytest.mark.parametrize('name', variants.VARIANTS)
def test_parameter_count_is_the_originals(name):
    config = variants.VARIANTS[name]
    params = modules.shapes_of(config, 1000, 224)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if name in PARAMETERS:
        assert count == PARAMETERS[name]
    if not {'resnet', 'mlp_head', 'act'} & config.keys():  # the later ones are in test_cost.py
        assert count == analytic_count(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}


@pytest.mark.parametrize(
    'name', ['ViT-B_16', 'R+ViT-Ti_16', 'Mixer-B_32', 'vit_small_patch16_dinov3', 'DeiT-Ti_16']
)
def test_one_block_stands_for_all(name):
    """What the counts above rest on."""
    assert modules.shapes_of(variants.VARIANTS[name], 9, 224) == abstract_params(
        models.get_model(name, num_classes=9)
    )


def test_parameter_paths_and_shapes_are_the_originals():
    flat = npz.flatten(abstract_params(models.get_model('ViT-B_16', num_classes=21843)))
    block = 'Transformer/encoderblock_11'
    attention = f'{block}/MultiHeadDotProductAttention_0'
    expected = {
        'cls': (1, 1, 768),
        'embedding/kernel': (16, 16, 3, 768),
        'embedding/bias': (768,),
        'Transformer/posembed_input/pos_embedding': (1, 197, 768),
        f'{block}/LayerNorm_0/scale': (768,),
        f'{block}/LayerNorm_1/bias': (768,),
        f'{attention}/query/kernel': (768, 12, 64),
        f'{attention}/key/bias': (12, 64),
        f'{attention}/value/kernel': (768, 12, 64),
        f'{attention}/out/kernel': (12, 64, 768),
        f'{attention}/out/bias': (768,),
        f'{block}/MlpBlock_0/Dense_0/kernel': (768, 3072),
        f'{block}/MlpBlock_0/Dense_1/kernel': (3072, 768),
        'Transformer/encoder_norm/scale': (768,),
        'head/kernel': (768, 21843),
        'head/bias': (21843,),
    }
    assert {name: flat[name].shape for name in expected} == expected
    assert len(flat) == 200  # the released file has 202: two more of pre_logits


@pytest.mark.parametrize('case', CASES)
def test_logits_are_the_originals(case):
    check_conformance(CONFORMANCE, case)


def test_logits_of_hybrid_stages_are_the_originals(shared_dir):
    """Its 8 MB are not copied into the project."""
    assert len(CASES) == 8
    check_conformance(shared_dir / 'conformance', 'hybrid_stages')


def check_conformance(folder, case):
    config = json.loads((folder / 'index.json').read_text())[case]
    expected = np.load(folder / f'{case}.expected.npz')
    params = npz.open_file(folder / f'{case}.checkpoint.npz').read()
    model = models.from_config(config['config'])
    abstract = abstract_params(model, config['image_size'])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config['num_params']
    logits = compute(model, params, expected['images'])
    assert np.abs(expected['logits']).max() > 0.1  # zeros would prove nothing
    np.testing.assert_allclose(logits, expected['logits'], atol=1e-5, rtol=0)


def test_real_weights_give_the_originals_logits(shared_dir):
    reference = np.load(shared_dir / 'weights/deit_ti16_imagenet1k_reference.npz')
    params = npz.open_file(shared_dir / 'weights/deit_ti16_imagenet1k.npz').read()
    model = models.get_model('ViT-Ti_16', num_classes=1000)
    images = (reference['images'].astype(np.float32) - 127.5) / 127.5
    logits = compute(model, params, images)
    np.testing.assert_allclose(logits, reference['logits'], atol=1e-4, rtol=0)


def test_initial_values_are_the_originals():
    """The distributions, and the attention kernels exactly those of Flax's own module."""
    tokens = jnp.zeros((1, 5, 32))
    ours_module = attention.MultiHeadDotProductAttention(num_heads=4)
    theirs_module = nn.MultiHeadDotProductAttention(
        num_heads=4, kernel_init=nn.initializers.xavier_uniform()
    )
    key = jax.random.key(3)
    ours = jax.jit(lambda key: ours_module.init(key, tokens, deterministic=True)['params'])
    theirs = jax.jit(lambda key: theirs_module.init(key, tokens)['params'])
    jax.tree.map(np.testing.assert_array_equal, ours(key), theirs(key))

    model = models.VisionTransformer(**TINY, head_bias_init=-3.0)
    images = jnp.zeros((1, 64, 64, 3))
    init = jax.jit(lambda key: model.init(key, images, train=False)['params'])
    params = jax.device_get(init(key))
    assert not params['head']['kernel'].any() and not params['cls'].any()
    np.testing.assert_array_equal(params['head']['bias'], np.full(7, -3, np.float32))
    embedding = params['Transformer']['posembed_input']['pos_embedding']
    assert 0.018 < float(embedding.std()) < 0.022
    mlp_bias = params['Transformer']['encoderblock_0']['MlpBlock_0']['Dense_0']['bias']
    assert 0 < np.abs(mlp_bias).max() < 1e-5


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_rematerialisation_changes_memory_not_results(remat):
    images = random_images(4, 32, 32, 3)
    model = models.VisionTransformer(**TINY)
    params = random_params(model, images)

    def gradients(model):
        def loss(params):
            return (model.apply({'params': params}, images, train=True) ** 2).sum()

        return jax.jit(jax.grad(loss))

    plain = gradients(model)
    saving = gradients(models.VisionTransformer(**TINY, remat=remat))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        plain(params),
        saving(params),
    )
    barriers = [
        function.lower(params).as_text().count('optimization_barrier')
        for function in (plain, saving)
    ]
    assert barriers[1] - barriers[0] == TINY['transformer']['num_layers']


@pytest.mark.parametrize('distilled', [False, True])
def test_the_last_block_computes_only_what_is_read_if_asked_to(distilled):
    whole = models.VisionTransformer(**TINY, distilled=distilled)
    part = models.for_inference(whole)
    images = random_images(2, 32, 32, 3)
    params = random_params(whole, images)

    def program(model):
        def loss(params):
            logits = model.clone(dtype=jnp.float64).apply({'params': params}, images, train=False)
            return (logits**2).sum()

        return jax.jit(jax.value_and_grad(loss)).lower(wide)

    with jax.enable_x64(True):  # float32 differs by rounding, by how much depends on the processor
        wide = jax.tree.map(np.float64, params)
        programs = [program(model) for model in (part, whole)]
        results = [program.compile()(wide) for program in programs]
        flops = [program.cost_analysis()['flops'] for program in programs]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(results))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * largest), *results
    )
    assert flops[0] < 0.8 * flops[1]  # of two blocks
    # What is recorded is not what decides.
    shapes = [
        jax.eval_shape(lambda m=model: models.apply_with_intermediates(m, params, images))[1]
        for model in (part, whole)
    ]
    tokens = 2 if distilled else 1
    assert [out['encoded'].shape[1] for out in shapes] == [tokens, 16 + tokens]


class OwnEncoder(nn.Module):
    """As a user of the original release might have one: it knows none of our arguments."""

    width: int

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.width, name='own')(x)


def test_an_encoder_of_ones_own_gets_no_argument_it_does_not_know():
    arguments = {**TINY, 'encoder': OwnEncoder, 'transformer': {'width': 32}}
    images = jnp.zeros((1, 32, 32, 3))
    model = models.for_training(models.VisionTransformer(**arguments))
    logits, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, train=False)
    )
    assert variables['params']['Transformer']['own']['kernel'].shape == (32, 32)
    assert logits.shape == (1, 7)
    with pytest.raises(ValueError, match="remat='full': OwnEncoder has no such attribute"):
        abstract_params(models.VisionTransformer(**arguments, remat='full'), 32)


def test_all_intermediates_without_touching_the_code():
    model = models.VisionTransformer(**TINY, representation_size=24)
    images = random_images(2, 32, 32, 3)
    params = random_params(model, images)
    logits, out = look_inside(model, params, images, attention_weights=True)
    np.testing.assert_allclose(logits, compute(model, params, images), atol=1e-6)
    shapes = {name: value.shape for name, value in out.items()}
    for block in ('Transformer/encoderblock_0', 'Transformer/encoderblock_1'):
        assert shapes[f'{block}/tokens'] == (2, 17, 32)
        assert shapes[f'{block}/attention_weights'] == (2, 4, 17, 17)
        np.testing.assert_allclose(out[f'{block}/attention_weights'].sum(-1), 1, atol=1e-5)
    assert shapes['patch_embedding'] == (2, 4, 4, 32)
    assert shapes['encoded'] == (2, 17, 32)
    assert shapes['pre_logits'] == (2, 24)
    head = params['head']
    np.testing.assert_allclose(
        out['pre_logits'] @ head['kernel'] + head['bias'][None], logits, atol=1e-5
    )
    before, after = (
        out['Transformer/with_position_embedding'],
        out['Transformer/encoderblock_0/tokens'],
    )
    halves = [out[f'Transformer/encoderblock_0/{half}'] for half in ('self_attention', 'mlp')]
    np.testing.assert_allclose(before + halves[0] + halves[1], after, atol=1e-5)
    _, plain = jax.eval_shape(lambda: models.apply_with_intermediates(model, params, images))
    assert not [name for name in plain if 'attention_weights' in name]


def test_attention_weights_are_there_whatever_the_implementation():
    images = random_images(1, 32, 32, 3)
    model = models.VisionTransformer(**TINY)
    params = random_params(model, images)
    cudnn = models.VisionTransformer(**TINY, attention='cudnn')
    _, ours = look_inside(model, params, images, attention_weights=True)
    _, theirs = look_inside(cudnn, params, images, attention_weights=True)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_cudnn_attention_says_what_it_needs(dtype):
    if dtype == jnp.bfloat16 and jax.default_backend() == 'gpu':
        pytest.skip('a GPU has it')
    model = models.VisionTransformer(**TINY, attention='cudnn', dtype=dtype)
    images = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(ValueError, match=r'NVIDIA GPUs, in 16-bit types'):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    dropping = {**TINY['transformer'], 'attention_dropout_rate': 0.1}
    model = models.VisionTransformer(**TINY | {'transformer': dropping}, attention='cudnn')
    rngs = dict.fromkeys(('params', 'dropout'), jax.random.key(0))
    with pytest.raises(ValueError, match="'cudnn' has no dropout: use 'xla'"):
        jax.eval_shape(lambda: model.init(rngs, images, train=True))


def test_dropout_is_active_in_training_only():
    config = {**TINY, 'transformer': {**TINY['transformer'], 'dropout_rate': 0.5}}
    attention = {**TINY, 'transformer': {**TINY['transformer'], 'attention_dropout_rate': 0.5}}
    images = random_images(2, 32, 32, 3)
    for case in (config, attention):
        model = models.VisionTransformer(**case)
        params = random_params(model, images)

        @jax.jit
        def train(key, model=model, params=params):
            rngs = {'dropout': key}
            return model.apply({'params': params}, images, train=True, rngs=rngs)

        first, again, other = (np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.allclose(first, other)
        plain = compute(models.VisionTransformer(**TINY), params, images)
        np.testing.assert_array_equal(compute(model, params, images), plain)


@pytest.mark.parametrize(
    ('changes', 'size', 'message'),
    [
        ({}, 36, 'whole number of 8 x 8 patches'),
        ({'classifier': 'mean'}, 32, "unknown classifier 'mean'"),
        ({'attention': 'flash'}, 32, "unknown attention 'flash'"),
        ({'remat': 'all'}, 32, "unknown remat 'all'"),
        ({'hidden_size': 30}, 32, 'not divisible by num_heads'),
    ],
)
def test_impossible_arguments_are_named(changes, size, message):
    model = models.VisionTransformer(**{**TINY, **changes})
    with pytest.raises(ValueError, match=message):
        abstract_params(model, size)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: 'ViT-B_16'"):
        models.get_model('ViT-B16', num_classes=5)


@pytest.mark.gpu
def test_cudnn_attention_equals_xla_on_a_gpu():
    images = random_images(4, 224, 224, 3)
    args = {'num_classes': 10, 'dtype': jnp.bfloat16}
    model = models.get_model('ViT-Ti_16', **args)
    params = random_params(model, images)
    cudnn = models.get_model('ViT-Ti_16', attention='cudnn', **args)
    ours = compute(model, params, images)
    theirs = compute(cudnn, params, images)
    assert jnp.abs(ours - theirs).max() < 0.05 * jnp.abs(ours).max()


@pytest.mark.parametrize('classifier', ['gap', 'max', 'avgmax'])
def test_pooling_of_the_patches_leaves_the_class_token_out(classifier):
    sizes = dict(mlp_dim=16, num_heads=2, num_layers=1, dropout_rate=0.0)
    arguments = dict(patches={'size': (8, 8)}, hidden_size=8, transformer=sizes, class_token=True)
    model = models.VisionTransformer(
        num_classes=0, classifier=classifier, fc_norm=True, **arguments
    )
    assert model.prefix_tokens == 1
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), jnp.float32)
    params = random_params(model, images)
    params['fc_norm'] = {'scale': np.ones(8, np.float32), 'bias': np.zeros(8, np.float32)}
    assert 'cls' in params and 'encoder_norm' not in params['Transformer']
    features, found = look_inside(model, params, images)
    patches = found['encoded'][:, 1:]
    assert patches.shape == (2, 6, 8)
    mean, largest = patches.mean(axis=1), patches.max(axis=1)
    pooled = {'gap': mean, 'max': largest, 'avgmax': (mean + largest) / 2}[classifier]
    pooled = pooled - pooled.mean(axis=1, keepdims=True)
    expected = pooled / np.sqrt((pooled**2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_unknown_settings_are_errors():
    sizes = dict(mlp_dim=16, num_heads=2, num_layers=1)
    for wrong, message in (
        ({'act': 'gelu_erf'}, "unknown activation 'gelu_erf': one of gelu_tanh, gelu, "),
        ({'class_token': False}, "classifier 'token' reads a class token"),
    ):
        model = models.VisionTransformer(
            2, patches={'size': (8, 8)}, hidden_size=8, transformer=sizes, **wrong
        )
        with pytest.raises(ValueError, match=message):
            abstract_params(model, 8)
