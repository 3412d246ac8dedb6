"""The shapes that docstrings claim: B 2, N 5 or 16, D 32, H 4, P 8, C 7."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax import models, variants
from vit_jax.models import attention, encoder, layers, mixer, resnet, vit

B, N, D, H, C = 2, 5, 32, 4, 7
ENCODER = dict(mlp_dim=64, num_heads=H, num_layers=2)
VIT = dict(patches={'size': (8, 8)}, hidden_size=D, transformer=ENCODER)
TOKENS = (B, N, D)

MODULES = {
    'attention': (attention.MultiHeadDotProductAttention(H), TOKENS, TOKENS),
    'MLP': (layers.MlpBlock(9), (2, 3, 4, 5), (2, 3, 4, 5)),
    'head': (layers.head(C, name='head', dtype=jnp.float32), TOKENS, (B, N, C)),
    'patches': (
        layers.patch_embedding(D, (4, 2), name='stem', dtype=jnp.float32), (B, 8, 8, 3),
        (B, 2, 4, D),
    ),
    'positions': (encoder.AddPositionEmbs(), TOKENS, TOKENS),
    'identity': (vit.IdentityLayer(), TOKENS, TOKENS),
    'block': (encoder.Encoder1DBlock(64, H), TOKENS, TOKENS),
    'last block': (encoder.Encoder1DBlock(64, H, outputs=2), TOKENS, (B, 2, D)),
    'encoder': (encoder.Encoder(**ENCODER), TOKENS, TOKENS),
    'encoder, outputs': (encoder.Encoder(**ENCODER, outputs=2), TOKENS, (B, 2, D)),
    'mixer block': (mixer.MixerBlock(6, 64), TOKENS, TOKENS),
    'convolution': (resnet.StdConv(6, (3, 3), (2, 2)), (B, 7, 6, 4), (B, 4, 3, 6)),
    'unit': (resnet.ResidualUnit(32, (2, 2)), (B, 7, 6, 32), (B, 4, 3, 128)),
    'stage': (resnet.ResNetStage(2, 32, (2, 2)), (B, 7, 6, 32), (B, 4, 3, 128)),
}  # fmt: skip
OPTIONS = {
    'attention': {'deterministic': True},
    'MLP': {'deterministic': True},
    'block': {'deterministic': True},
    'last block': {'deterministic': True},
    'encoder': {'train': False},
    'encoder, outputs': {'train': False},
}


def output_of(module, shape, **options):
    """Shape and dtype of what a module gives for an array, without computing it."""
    return jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, **options)[0],
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )


@pytest.mark.parametrize('name', MODULES)
def test_modules(name):
    module, given, expected = MODULES[name]
    assert output_of(module, given, **OPTIONS.get(name, {})).shape == expected


def test_attention():
    seen = []

    def transform(weights):
        seen.append((weights.shape, weights.dtype))
        return weights

    query, key = (jax.ShapeDtypeStruct((B, n, H, 8), jnp.bfloat16) for n in (3, N))
    out = jax.eval_shape(
        lambda q, k, v: attention.dot_product_attention(q, k, v, transform), query, key, key
    )
    assert (out.shape, out.dtype) == ((B, 3, H, 8), jnp.bfloat16)
    assert seen == [((B, H, 3, N), jnp.float32)]


@pytest.mark.parametrize('stages', [(), (1,), (1, 1)])
def test_backbone_has_the_stride_of_the_table(stages):
    class Hybrid(vit.nn.Module):
        @vit.nn.compact
        def __call__(self, x):
            return resnet.backbone(x, num_layers=stages, width_factor=0.5)

    stride = variants.resnet_stride(stages)
    channels = 256 * 0.5 * 2 ** (len(stages) - 1) if stages else 32
    assert output_of(Hybrid(), (B, 33, 64, 3)).shape == (
        B, -(-33 // stride), 64 // stride, channels,
    )  # fmt: skip


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ('changes', 'classes', 'expected'),
    [
        ({}, C, (B, C)),
        ({}, 0, (B, D)),
        ({'classifier': 'gap', 'representation_size': 24}, 0, (B, 24)),
        ({'classifier': 'unpooled'}, C, (B, 24, C)),
        ({'classifier': 'token_unpooled'}, 0, (B, 25, D)),
        ({'distilled': True}, C, (B, C)),
        ({'distilled': True}, 0, (B, D)),
        ({'mlp_head': True}, C, (B, C)),
        ({'mlp_head': True, 'head_tokens_only': True}, C, (B, C)),
        ({'classifier': 'unpooled', 'head_tokens_only': True}, C, (B, 24, C)),
    ],
)
def test_vision_transformer(changes, classes, expected, dtype):
    """On an image that is not square, of 4 x 6 patches."""
    model = models.VisionTransformer(**VIT | changes, num_classes=classes, dtype=dtype)
    out = output_of(model, (B, 32, 48, 3), train=False)
    assert (out.shape, out.dtype) == (expected, jnp.float32 if classes else dtype)


@pytest.mark.parametrize('classes', [0, C])
def test_mlp_mixer(classes):
    sizes = dict(num_blocks=1, hidden_dim=D, tokens_mlp_dim=6, channels_mlp_dim=64)
    model = models.MlpMixer(patches={'size': (8, 8)}, num_classes=classes, **sizes)
    assert output_of(model, (B, 32, 48, 3), train=True).shape == (B, classes or D)


@pytest.mark.parametrize('family', ['vit', 'distilled', 'hybrid', 'mixer'])
def test_intermediates(family):
    changes = {
        'vit': VIT,
        'distilled': VIT | {'distilled': True},
        'hybrid': VIT
        | {'patches': {'size': (1, 2)}, 'resnet': {'num_layers': [1, 1], 'width_factor': 0.5}},
        'mixer': dict(
            patches={'size': (8, 8)},
            num_blocks=2,
            hidden_dim=D,
            tokens_mlp_dim=6,
            channels_mlp_dim=64,
        ),
    }
    model = models.from_config(changes[family], num_classes=C)
    images = jax.ShapeDtypeStruct((B, 32, 32, 3), jnp.float32)

    def look_inside(images):
        params = model.init(jax.random.key(0), images, train=False)['params']
        return models.apply_with_intermediates(
            model, params, images, attention_weights=family != 'mixer'
        )

    logits, out = jax.eval_shape(look_inside, images)
    assert logits.shape == (B, C)
    shapes = {name: value.shape for name, value in out.items()}
    grid = (4, 2) if family == 'hybrid' else (4, 4)
    tokens = grid[0] * grid[1] + {'mixer': 0, 'distilled': 2}.get(family, 1)
    expected = {'patch_embedding': (B, *grid, D), 'encoded': (B, tokens, D)}
    expected['pre_logits'] = (B, 2, D) if family == 'distilled' else (B, D)
    halves = ('tokens_mlp', 'channels_mlp') if family == 'mixer' else ('self_attention', 'mlp')
    for i in range(2):
        block = f'MixerBlock_{i}' if family == 'mixer' else f'Transformer/encoderblock_{i}'
        expected |= {f'{block}/{name}': (B, tokens, D) for name in ('tokens', *halves)}
        if family != 'mixer':
            expected[f'{block}/attention_weights'] = (B, H, tokens, tokens)
    if family != 'mixer':
        expected['Transformer/with_position_embedding'] = (B, tokens, D)
    if family == 'hybrid':
        expected['resnet'] = (B, 4, 4, 256)
    assert shapes == expected
