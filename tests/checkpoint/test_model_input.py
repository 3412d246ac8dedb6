"""What folders say of their input, beside what their own libraries make of it."""

import json
import math

import numpy as np
import pytest

from vit_jax import checkpoint
from vit_jax.checkpoint import model_input
from vit_jax.data import normalization
from vit_jax.data.normalization import CLIP, HALF, IMAGENET
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

VIT = {'model_type': 'vit', 'image_size': 224}
PROCESSORS = [
    {
        'image_processor_type': 'ViTImageProcessor', 'size': {'height': 64, 'width': 48},
        'resample': 3, 'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.5, 0.6, 0.7],
    },
    {'image_processor_type': 'ViTImageProcessor', 'size': 96},
    {'image_processor_type': 'DeiTImageProcessor'},
    {'image_processor_type': 'CLIPImageProcessor', 'size': 70, 'crop_size': 64},
    {'image_processor_type': 'BitImageProcessor', 'size': {'shortest_edge': 75}, 'crop_size': 64},
    {'image_processor_type': 'SiglipImageProcessor', 'rescale_factor': 1 / 127.5},
    {'image_processor_type': 'ViTImageProcessor', 'do_rescale': False},
    {'feature_extractor_type': 'ViTFeatureExtractor', 'size': 64, 'do_normalize': False},
    {'image_processor_type': 'CLIPImageProcessorFast', 'do_center_crop': None, 'size': [50, 60]},
]  # fmt: skip


def of_hugging_face(folder, processor, config=None):
    (folder / 'preprocessor_config.json').write_text(json.dumps(processor))
    return model_input.of_hugging_face(folder, config or {'model_type': 'vit'})


@pytest.mark.parametrize('processor', PROCESSORS, ids=str)
def test_pixels_and_scale_are_transformers(tmp_path, processor):
    transformers = pytest.importorskip('transformers')
    told = of_hugging_face(tmp_path, processor)
    library = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend='pil')
    image = np.random.default_rng(0).integers(0, 256, (91, 120, 3), np.uint8)
    expected = library(image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
    mean, std = map(np.array, told.normalization)
    found = (told.preprocess.evaluate(image) / 255 - mean) / std
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('name', ['ConvNext', 'Beit', 'Perceiver', 'Levit', 'Siglip2'])
def test_another_processor_is_not_taken_for_a_vits(tmp_path, name):
    """Their rules are others: a share of the centre, another filter, patches that are padded."""
    processor = {'image_processor_type': f'{name}ImageProcessor', 'size': 28, 'image_mean': 0.25}
    told = of_hugging_face(tmp_path, processor)
    assert f"the image processor '{name}ImageProcessor'" in told.refused
    assert told.preprocess is None and told.normalization[0] == (0.25,) * 3


def test_the_scale_of_a_processor(tmp_path):
    no_mean = {'rescale_factor': 1 / 127.5, 'do_normalize': False}
    mean, std = of_hugging_face(tmp_path, no_mean).normalization
    np.testing.assert_allclose([mean, std], [[0] * 3, [0.5] * 3])
    assert of_hugging_face(tmp_path, {}).normalization == HALF  # not a rounding away from it
    assert of_hugging_face(tmp_path, {'image_mean': 0.25}).normalization[0] == (0.25,) * 3
    for setting in ({'do_pad': True}, {'do_flip_channel_order': True}, {'rescale_offset': True}):
        with pytest.raises(UserError, match=next(iter(setting))):
            of_hugging_face(tmp_path, setting)


@pytest.mark.parametrize(
    ('processor', 'named'),
    [
        ({'resample': 7}, 'resample 7'),
        ({'size': {'longest_edge': 80}}, 'longest_edge'),
        ({'size': {'shortest_edge': 80}}, 'without do_center_crop'),
        ({'do_resize': False, 'do_center_crop': True, 'crop_size': 64}, 'do_resize=false'),
        ({'size': 64, 'do_center_crop': True, 'crop_size': 80}, 'at least pp.crop=80'),
    ],
)
def test_pixels_that_are_not_computed_are_named(tmp_path, processor, named):
    told = of_hugging_face(tmp_path, processor)
    assert named in told.refused and told.preprocess is None and told.normalization == HALF


def test_a_processor_for_another_size_than_the_models(tmp_path):
    processor = {'image_processor_type': 'BitImageProcessor', 'size': {'shortest_edge': 256}}
    told = of_hugging_face(tmp_path, processor, {'model_type': 'dinov2', 'image_size': 518})
    assert (told.preprocess.crop, told.preprocess.resize) == (518, 592)
    assert told.notes == (
        'its preprocessor_config.json makes images of 224 pixels and the model takes 518: the same '
        'is done at that size',
    )


def test_what_is_known_of_families(tmp_path):
    for kind, normalization_, crop in (
        ('vit', HALF, 0), ('dinov2', IMAGENET, 224), ('clip', CLIP, 224), ('siglip', HALF, 0)
    ):  # fmt: skip
        told = model_input.of_hugging_face(tmp_path, {'model_type': kind, 'image_size': 224})
        assert (told.normalization, told.preprocess.resize) == (normalization_, crop)
        assert 'is assumed' in told.notes[0] and '--normalization' in told.notes[0]


def test_timm():
    stated = {
        'input_size': [3, 224, 224], 'interpolation': 'bicubic', 'crop_pct': 0.9,
        'crop_mode': 'center', 'mean': [0.5] * 3, 'std': [0.5] * 3,
    }  # fmt: skip
    told = model_input.of_timm({'architecture': 'vit_base_patch16_224', 'pretrained_cfg': stated})
    assert told == model_input.ModelInput(
        224,
        HALF,
        Preprocess(
            224, 248, eval='resize_crop', interpolation='bicubic', antialias=True,
            centre='half_even',
        ),
    )  # fmt: skip
    wide = {**stated, 'input_size': [3, 32, 128], 'crop_mode': 'squash', 'crop_pct': 1.0}
    told = model_input.of_timm({'architecture': 'x', 'pretrained_cfg': wide})
    assert (told.image_size, told.preprocess.eval) == ((32, 128), 'squash')
    told = model_input.of_timm(
        {'architecture': 'x', 'pretrained_cfg': stated | {'crop_mode': 'border'}}
    )
    assert "crop_mode 'border'" in told.refused
    told = model_input.of_timm({'architecture': 'deit_tiny_patch16_224'})
    assert told.normalization == IMAGENET and 'is assumed' in told.notes[0]


@pytest.mark.parametrize(
    'preprocess',
    [
        Preprocess(224, interpolation='bicubic', antialias=True),
        Preprocess(224, 256, eval='resize_crop', interpolation='bicubic', antialias=True),
        Preprocess(384, 397, eval='squash_crop', interpolation='lanczos', antialias=True),
        Preprocess((32, 48), antialias=True),
        Preprocess((32, 64), 72, eval='resize_crop', antialias=True),
    ],
)
def test_what_is_written_for_others_reads_the_same(tmp_path, preprocess):
    written = model_input.to_hugging_face(preprocess)
    assert of_hugging_face(tmp_path, written) == model_input.ModelInput(0, HALF, preprocess)
    if isinstance(preprocess.crop, tuple) and preprocess.resize:
        with pytest.raises(UserError, match='one crop_pct'):
            model_input.to_timm(preprocess)
        return
    size = [3, *preprocess.size]
    stated = {'input_size': size, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    stated |= model_input.to_timm(preprocess)
    told = model_input.of_timm({'architecture': 'x', 'pretrained_cfg': stated}).preprocess
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    np.testing.assert_array_equal(told.evaluate(image), preprocess.evaluate(image))


def test_names_of_normalisations():
    assert normalization.parse('') is None and normalization.parse('clip') == CLIP
    assert normalization.parse('0.5,0.25/1,2') == ((0.5, 0.25), (1, 2))
    for text in ('imagnet', '1,2,3', '1/2/3', '1,2/3', '0,0,0/1,1,0', f'{math.nan}/1'):
        with pytest.raises(UserError, match='expected half, imagenet, clip'):
            normalization.parse(text)


def test_folders_of_the_shared_cases(shared_dir):
    cases = shared_dir / 'cases/weights'
    weights = checkpoint.open_weights(cases / 'hf_rescale')
    assert 'standard deviation 0.5, 0.5, 0.5) was folded in' in str(weights)
    # Pixels p make 2 p of [0, 1] there, so that black is 0: here -1, at half the kernel.
    plain = checkpoint.open_weights(cases / 'hf_rescale', normalization=HALF)
    kernel, theirs = (np.asarray(w.params['embedding']['kernel']) for w in (weights, plain))
    np.testing.assert_allclose(kernel, theirs, rtol=1e-6)
    shift = np.asarray(weights.params['embedding']['bias']) - plain.params['embedding']['bias']
    np.testing.assert_allclose(shift, theirs.sum(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)
    said = str(checkpoint.open_weights(cases / 'hf_no_preprocessor'))
    assert 'no preprocessor_config.json' in said and 'makes images of' not in said
    model = model_folder.load(cases / 'hf_rescale', pixels={'eval': 'resize_crop', 'resize': 72})
    assert model.preprocess.describe() == 'short side 72, bilinear, antialiased, centre crop 64'
    with pytest.raises(UserError, match='--resize 72 has no effect'):
        model_folder.load(cases / 'hf_rescale', pixels={'resize': 72})
