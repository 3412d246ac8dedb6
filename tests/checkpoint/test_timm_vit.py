"""timm's own models of the class VisionTransformer, of true width: read, computed, written back."""

import pytest
from against_torch import check_equal, compute, distance, images, randomise

from vit_jax.export import pytorch as export
from vit_jax.inference import model_folder

# Architecture -> side of the images, classes, and what the model is here; 2 layers.
WIDE = {
    'deit3_base_patch16_224': (64, 5, dict(classifier='token')),
    'vit_medium_patch16_reg4_gap_256': (64, 5, dict(classifier='gap', registers=4)),
    'vit_huge_patch14_clip_quickgelu_224': (56, 0, dict(patch_bias=False, act='quick_gelu')),
}
WIDER = {
    'vit_so400m_patch14_siglip_224': (56, 0, dict(classifier='map', act='gelu_tanh')),
    'vit_base_patch14_reg4_dinov2': (56, 0, dict(registers=4)),
    'vit_giant_patch14_dinov2': (56, 0, dict(act='silu')),
    'vit_huge_patch14_gap_224': (56, 0, dict(classifier='gap')),
    'vit_base_patch16_siglip_gap_224': (64, 0, dict(classifier='gap')),
    'vit_so150m2_patch16_reg1_gap_256': (64, 5, dict(registers=1)),
}
WHOLE = {
    'deit3_base_patch16_224': (64, 5, dict(classifier='token')),
    'vit_medium_patch16_reg4_gap_256': (64, 5, dict(classifier='gap', registers=4)),
    'vit_base_patch16_siglip_224': (64, 0, dict(classifier='map')),
    'vit_base_patch16_clip_quickgelu_224': (64, 0, dict(patch_bias=False)),
    'vit_base_patch14_dinov2': (56, 0, dict(classifier='token')),
}


@pytest.mark.parametrize(
    'architecture, cases, tolerance',
    [
        *((name, WIDE, 1e-5) for name in WIDE),
        *(pytest.param(name, WIDER, 1e-5, marks=pytest.mark.slow) for name in WIDER),
        *(pytest.param(name, WHOLE, 1e-4, marks=pytest.mark.slow) for name in WHOLE),
    ],
)
def test_models_of_timm(architecture, cases, tolerance, tmp_path):
    torch = pytest.importorskip('torch')
    timm = pytest.importorskip('timm', reason='timm is not installed: scripts/test.sh --peers')
    side, classes, told = cases[architecture]
    arguments = dict(img_size=side, num_classes=classes)
    arguments |= {} if cases is WHOLE else {'depth': 2}
    plain = dict(mean=[0.5] * 3, std=[0.5] * 3)
    theirs = timm.create_model(architecture, **arguments, pretrained_cfg_overlay=plain)
    timm.models.save_for_hf(randomise(theirs), tmp_path / 'timm', model_args=arguments)
    model = model_folder.load(tmp_path / 'timm')
    assert told.items() <= model.model_config.items() and model.image_size == side

    x = images(model)
    for dtype, bound in (('float32', tolerance), ('float64', 1e-10)):
        pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(getattr(torch, dtype))
        with torch.no_grad():
            expected = theirs.to(pixels.dtype)(pixels).numpy()
        found = distance(compute(model, x, dtype), expected)
        print(f'{architecture}, {len(theirs.blocks)} layers, {dtype}: {found:.1e} of the largest')
        assert found < bound
    del theirs

    export.write(tmp_path / 'again', model, to='timm')
    again = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).eval()
    with torch.no_grad():
        back = again(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    assert distance(back, expected) < tolerance
    del again
    check_equal(model_folder.load(tmp_path / 'again').params, model.params)
