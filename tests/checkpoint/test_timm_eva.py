"""EVA-02 and DINOv3 as timm's class Eva: read, computed, written back."""

import contextlib
import functools
import inspect
import json
from unittest import mock

import pytest
from against_torch import check_equal, compute, distance, images, randomise

from vit_jax.export import pytorch as export
from vit_jax.inference import model_folder

SIZES = dict(img_size=(28, 42), embed_dim=48, depth=2, num_heads=4)
# Name -> architecture of timm, arguments, and what the model is here.
CASES = {
    'tiny': ('eva02_tiny_patch14_224', {}, dict(classifier='gap', fc_norm=True, act='silu')),
    'base': ('eva02_base_patch14_224', {}, dict(class_token=True)),
    'clip': (
        'eva02_base_patch16_clip_224',
        dict(patch_size=14),
        dict(classifier='token', rotary={'form': 'axial', 'theta': 10_000.0, 'grid': 16}),
    ),
    'eva': ('eva_giant_patch14_224', dict(mlp_ratio=2), dict(act='gelu')),
    'axial': (
        'eva_giant_patch14_224',
        dict(mlp_ratio=2, use_rot_pos_emb=True, rope_temperature=100.0),
        dict(rotary={'form': 'axial', 'theta': 100.0, 'grid': 0}),
    ),
    'registers': (
        'vit_medium_patch16_rope_reg1_gap_256',
        dict(patch_size=14, dynamic_img_size=False),
        dict(registers=1, classifier='gap'),
    ),
    'dinov3': (
        'vit_small_patch16_dinov3',
        dict(patch_size=14, dynamic_img_size=False),
        dict(classifier='gap', class_token=True, registers=4, layer_norm_eps=1e-5),
    ),
    'dinov3_qkvb': (
        'vit_small_plus_patch16_dinov3_qkvb',
        dict(patch_size=14, dynamic_img_size=False, global_pool='token'),
        dict(classifier='token', registers=4, rotary={'form': 'dinov3', 'theta': 100.0}),
    ),
}
each = pytest.mark.parametrize('name', CASES)


@pytest.fixture(scope='module')
def timm():
    return pytest.importorskip('timm', reason='timm is not installed: scripts/test.sh --peers')


@pytest.fixture(scope='module')
def case(timm, tmp_path_factory):
    """`case(name)`: (timm's model, its folder, ours), of random weights, made once."""

    @functools.cache
    def make(name):
        architecture, arguments, _ = CASES[name]
        arguments = SIZES | {'num_classes': 5} | arguments
        theirs = randomise(timm.create_model(architecture, **arguments))
        folder = tmp_path_factory.mktemp(name)
        write(folder, architecture, arguments, theirs.state_dict())
        return theirs, folder, model_folder.load(folder)

    return make


def write(folder, architecture, arguments, state):
    from safetensors.torch import save_file

    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, folder / 'model.safetensors'
    )
    stated = dict(mean=[0.5] * 3, std=[0.5] * 3, input_size=[3, 28, 42], crop_pct=1.0)
    described = dict(architecture=architecture, model_args=arguments, pretrained_cfg=stated)
    (folder / 'config.json').write_text(json.dumps(described))


def outputs_of(theirs, x, dtype):
    """In float64 with its positions, too, for which timm's functions say float32."""
    import torch
    from timm.layers import pos_embed_sincos

    wide = getattr(torch, dtype)
    owners = (pos_embed_sincos, *filter(inspect.isclass, vars(pos_embed_sincos).values()))
    functions = [f for owner in owners for f in vars(owner).values() if inspect.isfunction(f)]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for function in (f for f in functions if torch.float32 in (f.__defaults__ or ())):
            defaults = tuple(wide if d is torch.float32 else d for d in function.__defaults__)
            stack.enter_context(mock.patch.object(function, '__defaults__', defaults))
        stack.enter_context(mock.patch.object(torch, 'float32', wide))
        theirs.to(wide)
        if theirs.rope is not None:
            theirs.rope.init_non_persistent_buffers()
        return theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)).to(torch.float32)).numpy()


@each
def test_outputs_are_those_of_timm(name, case):
    theirs, _, model = case(name)
    assert CASES[name][2].items() <= model.model_config.items()
    x = images(model)
    for dtype, tolerance in (('float64', 1e-10), ('float32', 1e-5)):
        found, expected = compute(model, x, dtype), outputs_of(theirs, x, dtype)
        assert distance(found, expected) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize('name', ['eva02_small_patch14_224', 'vit_small_plus_patch16_dinov3_qkvb'])
def test_at_full_depth(name, timm, tmp_path):
    patch = 14 if 'patch14' in name else 16
    arguments = dict(img_size=(3 * patch, 4 * patch), num_classes=5, dynamic_img_size=False)
    theirs = randomise(timm.create_model(name, **arguments))
    write(tmp_path, name, arguments, theirs.state_dict())
    model = model_folder.load(tmp_path)
    assert model.model_config['transformer']['num_layers'] == 12
    x = images(model)
    assert distance(compute(model, x), outputs_of(theirs, x, 'float32')) < 1e-4


@each
def test_timm_reads_what_is_written(name, case, timm, tmp_path):
    _, _, model = case(name)
    export.write(tmp_path / 'timm', model, to='timm')
    theirs = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True).eval()
    x = images(model)
    assert distance(outputs_of(theirs, x, 'float32'), compute(model, x)) < 1e-5
    again = model_folder.load(tmp_path / 'timm')
    assert again.model_config == model.model_config
    check_equal(again.params, model.params)
