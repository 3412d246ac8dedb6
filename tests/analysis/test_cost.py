"""Parameters, FLOPs and memory: published figures, the real modules, and XLA's own counts."""

import collections
import math
import time

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from vit_jax import models, optim, variants
from vit_jax.analysis import cost, cost_report, counts, devices, summary
from vit_jax.analysis.architecture import Architecture
from vit_jax.errors import UserError

# At 1000 classes and 224 pixels, as the original's tests have them, and as published of DeiT and
# the model with the hidden layer in its head.
PARAMETERS = {
    'ViT-B_16': 86_567_656,
    'ViT-B_32': 88_224_232,
    'ViT-L_16': 304_326_632,
    'ViT-L_32': 306_535_400,
    'ViT-H_14': 632_045_800,
    'ViT-B_8': 86_576_872,
    'ViT-S_16': 22_050_664,
    'ViT-S_32': 22_878_952,
    'ViT-Ti_16': 5_717_416,
    'ViT-B_16-gap-norep': 86_566_120,
    'ViT-B_32-gap-norep': 88_222_696,
    'ViT-S_16-gap-norep': 22_049_896,
    'ViT-S_32-gap-norep': 22_878_184,
    'R+ViT-Ti_16': 6_337_704,
    'R26+ViT-B_32': 101_383_976,
    'R26+ViT-S_32': 36_431_912,
    'R50+ViT-B_16': 98_659_112,
    'R50+ViT-L_32': 328_994_856,
    'Mixer-B_16': 59_880_472,
    'Mixer-B_32': 60_293_428,
    'Mixer-L_16': 208_196_168,
    'DeiT-B_16': 87_338_192,
    'ViT-B_16-mlp-head': 87_158_248,
    # Those of timm 1.0.31; its class token has a position of its own only in the first.
    'vit_giant_patch14_dinov2': 1_136_306_664,
    'vit_base_patch14_reg4_dinov2': 86_496_232 + 768,
    'deit3_base_patch16_224': 86_585_320 + 768,
}
# With 5 classes; with 21843 classes and a representation layer.
FIVE = {
    'ViT-B_16': 85_802_501,
    'ViT-B_32': 87_459_077,
    'ViT-L_16': 303_306_757,
    'ViT-L_32': 305_515_525,
    'ViT-H_14': 630_771_205,
    'DeiT-B_16': 85_807_882,
}
IMAGENET21K = {
    'ViT-B_16': (768, 103_186_515),
    'ViT-B_32': (768, 104_843_091),
    'ViT-L_16': (1024, 326_740_307),
    'ViT-L_32': (1024, 328_949_075),
    'ViT-H_14': (1280, 660_385_363),
}
# Multiply-accumulates at 1000 classes, in units of 10^9: torchvision's figures.
MACS = {
    ('ViT-B_16', 224): 17.564,
    ('ViT-B_32', 224): 4.409,
    ('ViT-L_16', 224): 61.555,
    ('ViT-L_32', 224): 15.378,
    ('ViT-H_14', 224): 167.295,
    ('ViT-B_16', 384): 55.48,
    ('ViT-L_16', 384): 191.07,
}


def smaller(name, **changes):
    """A variant with other sizes, as a plain dict."""
    config = variants.get_config(name).to_dict()
    for key, value in changes.items():
        inside = 'transformer' in config and key in config['transformer']
        (config['transformer'] if inside else config)[key] = value
    return config


def test_published_numbers_of_parameters():
    for name, expected in PARAMETERS.items():
        assert counts.parameters(variants.get_config(name), 1000, 224) == expected, name
    for name, expected in FIVE.items():
        assert counts.parameters(variants.get_config(name), 5, 224) == expected, name
    for name, (width, expected) in IMAGENET21K.items():
        config = smaller(name, representation_size=width)
        assert counts.parameters(config, 21843, 224) == expected, name


@pytest.mark.parametrize(('name', 'size'), MACS)
def test_published_multiply_accumulates(name, size):
    macs = counts.forward_macs(variants.get_config(name), 1000, size)
    digits = 2 if size == 384 else 3
    assert round(macs / 1e9, digits) == MACS[name, size]


def test_a_block_has_12hh_13h_parameters():
    for name in ('ViT-Ti_16', 'ViT-B_16', 'ViT-H_14'):
        config = variants.get_config(name)
        (block,) = (p for p in counts.parts(config, 5, 224) if p.name == 'block')
        h = config.hidden_size
        assert block.parameters == block.repeat * (12 * h * h + 13 * h)


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        ('ViT-Ti_16', dict(representation_size=48)),
        ('ViT-S_16-gap-norep', {}),
        ('R26+ViT-S_32', {}),
        ('R+ViT-Ti_16', {}),
        ('Mixer-S_32', dict(num_blocks=2)),
        ('DeiT-Ti_16', {}),
        ('ViT-B_16-mlp-head', {}),
        ('vit_giant_patch14_reg4_dinov2', dict(classifier='token_gap', patches={'size': (16, 16)})),
        ('vit_so150m2_patch16_reg1_gap_256', {}),
        ('ViT-Ti_16', dict(classifier='map', patch_bias=False, final_norm=False)),
    ],
)
def test_the_formulas_have_every_array_of_the_module(name, changes):
    config = smaller(name, **(changes | ({} if 'num_blocks' in changes else dict(num_layers=2))))
    model = models.from_config(config, num_classes=7)
    image = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
    params = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False)['params'], image
    )
    expected = collections.Counter(leaf.shape for leaf in jax.tree.leaves(params))
    found = collections.Counter()
    for part in counts.parts(config, 7, 96):
        found.update(dict.fromkeys(part.shapes, 0))
        for shape in part.shapes:
            found[shape] += part.repeat
    assert found == expected


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
@pytest.mark.parametrize('optim_dtype', ['bfloat16', 'float32'])
def test_the_optimizer_takes_what_the_real_one_takes(optimizer, optim_dtype):
    config = smaller('ViT-Ti_16', num_layers=1)
    model = models.from_config(config, num_classes=5)
    knobs = ml_collections.ConfigDict(
        dict(
            optimizer=optimizer,
            optim_dtype=optim_dtype,
            grad_norm_clip=1.0,
            weight_decay=0.0,
            momentum=0.9,
            wd_mults=(('.*kernel', 1.0),),
        )
    )
    tx = optim.create_optimizer(knobs, optim.create_learning_rate_schedule(10, 0.1, 'cosine', 1))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False)['params'], image
    )
    real = jax.eval_shape(tx.init, params)
    plan = cost.Plan(batch=1, optimizer=optimizer, optim_dtype=optim_dtype)
    memory = cost.training_memory(Architecture('one block', config, 5, 32), plan)
    assert memory.optimizer == sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(real)
    )
    assert memory.weights == sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(params))


def compiled_beside_formula(config, batch=24, **changes):
    """Bytes of the compiled training step; the formula's; floating-point operations of XLA."""
    of = Architecture('small', config, 5, 224)
    plan = cost.Plan(batch=batch, platform='cpu', **changes)
    size, flops = cost.compile_training(of, plan)
    return size, cost.training_memory(of, plan), flops


def test_the_formula_agrees_with_compiled_steps_of_today():
    """And rematerialisation does save memory on a CPU, which takes a compiler option of `steps`."""
    config = smaller('ViT-Ti_16', num_layers=4)
    temporary = {}
    for remat in ('', 'dots', 'full'):
        size, memory, _ = compiled_beside_formula(config, remat=remat)
        assert memory.total == pytest.approx(size, rel=0.1), remat
        temporary[remat] = size - memory.weights - memory.optimizer - memory.inputs
    assert temporary['dots'] < temporary[''] and temporary['full'] < 0.6 * temporary['']
    size, memory, _ = compiled_beside_formula(smaller('Mixer-S_32', num_blocks=2))
    assert memory.total == pytest.approx(size, rel=0.1)


def test_floating_point_operations_agree_with_a_compiled_step():
    """XLA counts the body of a loop once, so its count needs an attention that has none."""
    config = smaller('ViT-Ti_16', num_layers=2)
    size, memory, flops = compiled_beside_formula(config, attention='xla', batch=8)
    macs = counts.training_macs(config, 5, 224) - counts.unused_macs(config, 224, training=True)
    assert 2 * 8 * macs == pytest.approx(flops, rel=0.02)
    assert memory.total == pytest.approx(size, rel=0.1)


def test_rematerialised_products_are_those_of_the_formula():
    """Exactly, counted in the program as it is given to XLA."""
    config = {**smaller('ViT-Ti_16', num_layers=2), 'classifier': 'gap'}
    images = jnp.zeros((3, 96, 96, 3))
    found = {}
    for remat in ('', 'dots', 'full'):
        model = models.from_config(config, num_classes=5, attention='xla', remat=remat)
        params = jax.eval_shape(
            lambda model=model: model.init(jax.random.key(0), images, train=False)['params']
        )
        gradient = jax.grad(
            lambda p, model=model: model.apply({'params': p}, images, train=False).sum()
        )
        program = jax.make_jaxpr(gradient)(params).jaxpr
        found[remat] = sum(flops for _, flops in summary.products(program))
    plain = counts.training_macs(config, 5, 96)
    assert found[''] == 2 * 3 * plain
    for remat in ('dots', 'full'):
        more = 2 * 3 * (counts.training_macs(config, 5, 96, remat) - plain)
        assert found[remat] - found[''] == more > 0, remat


def needed(batch=64, name='ViT-B_16', image_size=224, **changes):
    of = Architecture(name, variants.get_config(name), 5, image_size)
    return cost.training_memory(of, cost.Plan(batch=batch, **{'dtype': 'bfloat16'} | changes))


def test_memory_follows_its_knobs():
    plain = needed().total
    assert needed(remat='full').total < needed(remat='dots').total < plain
    assert needed(accum_steps=8).total < plain < needed(dtype='float32').total
    assert needed(attention='cudnn').total < plain == needed(attention='xla').total
    assert needed(optimizer='adamw').optimizer > needed(optim_dtype='float32').optimizer
    assert needed(devices=4, fsdp=4).weights == pytest.approx(needed().weights / 4, rel=0.01)
    assert needed(devices=4).inputs == needed().inputs / 4
    # On a CPU bfloat16 saves nothing, and 'auto' keeps no attention weights.
    cpu = needed(platform='cpu').total
    assert cpu < needed(platform='cpu', attention='xla').total
    full, dots = (needed(platform='cpu', remat=remat).total for remat in ('full', 'dots'))
    assert full < dots < cpu
    assert cpu == needed(platform='cpu', dtype='float32').total


def test_every_variant_has_a_cost_on_every_platform_in_no_time():
    start = time.process_time()
    calls = 0
    for name in variants.VARIANTS:
        for platform in ('cpu', 'gpu'):
            for dtype in cost.BYTES:
                for remat in ('', 'dots', 'full'):
                    memory = needed(name=name, platform=platform, dtype=dtype, remat=remat)
                    assert memory.total > memory.weights + memory.optimizer
                    calls += 1
    assert (time.process_time() - start) / calls < 0.05


def test_the_largest_batch_is_the_largest():
    memory, of = 16 * 2**30, Architecture('ViT-B_16', variants.get_config('ViT-B_16'), 5, 224)
    plan = cost.Plan(batch=1, dtype='bfloat16', accum_steps=8)
    largest = cost.largest_batch(memory, cost.training_memory, of, plan)
    assert largest % 8 == 0
    sizes = [needed(largest + more, accum_steps=8).total for more in (0, 8)]
    assert sizes[0] <= memory < sizes[1]
    assert cost.largest_batch(2**20, cost.inference_memory, of, plan) == 0


def test_images_per_second():
    # 1 TFLOP/s, half of it, 250 MMACs: 0.5e12 / 0.5e9.
    target = cost_report.Target(devices.Device('own', 1, 1.0, 0.1, ''), 1.0, 0.5)
    for count, dtype, rate in ((1, 'bfloat16', 1000), (4, 'bfloat16', 4000), (4, 'float32', 400)):
        plan = cost.Plan(batch=4, dtype=dtype, devices=count)
        assert target.images_per_second(250_000_000, plan) == pytest.approx(rate)


def test_an_image_that_is_no_whole_number_of_patches():
    with pytest.raises(UserError, match='multiples of 16 pixels: use 224 or 240'):
        needed(image_size=230)


def test_devices():
    assert devices.get('RTX 4090').memory_gib == 24
    with pytest.raises(UserError, match="nearest: 'h200'"):
        devices.get('h20')
    own = devices.choose('', 10.0, 5.0, 'float32')
    assert (own.memory_gib, own.peak_float32) == (10, 5)
    with pytest.raises(UserError, match='give both'):
        devices.choose('', 10.0, None, 'float32')
    with pytest.raises(UserError, match='above 0'):
        devices.choose('l4', -1.0, None, 'float32')
