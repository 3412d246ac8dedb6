"""Folders of open_clip, with its real models where it is installed."""

import json

import modules
import numpy as np
import pytest
from PIL import Image

from vit_jax.checkpoint import catalog, open_clip_configs
from vit_jax.data.preprocess import normalize
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

VISION = dict(image_size=32, layers=2, width=64, patch_size=8, head_width=16)
TINY = dict(image_size=160, timm_model_name='test_vit')
TEXT = dict(context_length=4, vocab_size=9, width=32, heads=2, layers=1)
INPUT = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], interpolation='bicubic')
# Name -> model_cfg of its own models, or of timm's.
CASES = {
    'OpenAI': dict(vision_cfg=VISION, quick_gelu=True),
    'CLIPA': dict(
        vision_cfg=VISION
        | dict(no_ln_pre=True, pool_type='avg', final_ln_after_pool=True, image_size=[32, 48])
    ),
    'other settings': dict(
        vision_cfg=VISION
        | dict(norm_kwargs={'eps': 1e-2}, ls_init_value=1e-4, mlp_ratio=3.3)
        | dict(act_kwargs={'approximate': 'tanh'}, pos_embed_type='sin_cos_2d')
    ),
    'mean of the patches': dict(vision_cfg=VISION | dict(pool_type='avg'), custom_text=True),
    'timm, projected': dict(
        vision_cfg=TINY | dict(timm_pool='avg', timm_proj='linear'), custom_text=True
    ),
    'timm, its head': dict(vision_cfg=TINY | dict(timm_pool='avg', timm_proj=''), custom_text=True),
}


def write(folder, config, **preprocess):
    described = {'model_cfg': config, 'preprocess_cfg': INPUT | preprocess}
    (folder / 'open_clip_config.json').write_text(json.dumps(described))


@pytest.mark.parametrize('case', CASES)
def test_features_and_pixels_are_those_of_open_clip(case, tmp_path):
    torch = pytest.importorskip('torch')
    open_clip = pytest.importorskip('open_clip', reason='open_clip is not installed')
    config = {'embed_dim': 24, 'text_cfg': TEXT, **CASES[case]}
    kind = open_clip.CustomTextCLIP if config.get('custom_text') else open_clip.CLIP
    theirs = kind(**{name: config[name] for name in config if name != 'custom_text'}).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.05)
    torch.save(theirs.state_dict(), tmp_path / 'open_clip_pytorch_model.bin')
    write(tmp_path, config)

    model = model_folder.load(tmp_path)
    assert catalog.resolve(str(tmp_path)) == tmp_path
    image = np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    transform = open_clip.image_transform(model.image_size, False, **INPUT)
    pixels = transform(Image.fromarray(image))[None]
    with torch.no_grad():
        expected = theirs.encode_image(pixels).numpy()
    seen = model.preprocess.evaluate(image)
    mean, std = (np.float32(INPUT[name])[None, None] for name in ('mean', 'std'))
    grey = 255 * (pixels[0].numpy().transpose(1, 2, 0) * std + mean)
    np.testing.assert_allclose(seen, grey, rtol=0, atol=1e-3)
    found = modules.apply(model.model, model.params, normalize(seen[None]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    'vision, message',
    [
        ({'attentional_pool': True}, 'attentional_pool=True, which no model here computes'),
        ({'pool_type': 'none'}, "pool_type='none', which no model here computes"),
        ({'layers': [3, 4, 6, 3]}, r'layers=\[3, 4, 6, 3\], which no model here computes'),
        ({'qk_norm': True}, 'qk_norm=True'),
        ({'rope': True}, 'rope=True, which is not known here'),
        (TINY | {'timm_proj': 'mlp'}, "timm_proj='mlp'"),
        (TINY | {'timm_proj': 'none', 'timm_pool': ''}, "global_pool=''"),
        ({'width': 'wide'}, 'is damaged'),
    ],
)
def test_settings_that_no_model_here_computes(vision, message, tmp_path):
    write(tmp_path, {'vision_cfg': VISION | vision})
    with pytest.raises(UserError, match=message):
        open_clip_configs.read(tmp_path)


def test_images_that_are_padded(tmp_path):
    write(tmp_path, {'vision_cfg': VISION}, resize_mode='longest')
    assert "'longest'" in open_clip_configs.read(tmp_path)['input'].refused


def test_a_folder_without_weights(tmp_path):
    write(tmp_path, {'vision_cfg': VISION})
    with pytest.raises(UserError, match=r'has no weights: none of .*open_clip_model.safetensors'):
        model_folder.load(tmp_path)
