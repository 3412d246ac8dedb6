"""Families of today, made by transformers' own classes: read, computed, written back, trained."""

import functools
import json
import shutil
from unittest import mock

import jax
import modules
import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
from against_torch import check_equal, compute, distance, images, randomise

from vit_jax import models
from vit_jax.analysis import compare
from vit_jax.checkpoint import formats, key_tables, npz
from vit_jax.data import normalization
from vit_jax.errors import UserError
from vit_jax.export import onnx as onnx_export
from vit_jax.export import pytorch as export
from vit_jax.export.options import Options
from vit_jax.inference import model_folder

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28)
SIZES |= dict(patch_size=14)
HALF = dict(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
TOWER = SIZES | dict(intermediate_size=96)
# Name -> class of transformers, its configuration, and what the model is here.
CASES = {
    'dinov2': (
        'Dinov2ForImageClassification',
        dict(num_labels=5),
        dict(classifier='token_gap', act='gelu'),
    ),
    'dinov2_features': ('Dinov2Model', dict(use_swiglu_ffn=True), dict(act='silu')),
    'dinov2_reg': (
        'Dinov2WithRegistersForImageClassification',
        dict(num_labels=5),
        dict(classifier='token_gap', registers=4),
    ),
    'dinov2_reg_features': (
        'Dinov2WithRegistersModel',
        dict(num_register_tokens=2, hidden_act='relu', layer_norm_eps=1e-3),
        dict(classifier='token', registers=2, act='relu', layer_norm_eps=1e-3),
    ),
    'dinov3': (
        'DINOv3ViTModel',
        TOWER | dict(num_register_tokens=3, image_size=(28, 42)),
        dict(classifier='token', registers=3, rotary={'form': 'dinov3', 'theta': 100.0}),
    ),
    'dinov3_gated': (
        'DINOv3ViTModel',
        TOWER
        | dict(num_register_tokens=4, use_gated_mlp=True, hidden_act='silu', rope_theta=50.0)
        | dict(query_bias=False, value_bias=False),
        dict(act='silu', rotary={'form': 'dinov3', 'theta': 50.0}),
    ),
    'ijepa': ('IJepaForImageClassification', TOWER | dict(num_labels=5), dict(classifier='gap')),
    'ijepa_features': ('IJepaModel', TOWER, dict(classifier='gap', layer_norm_eps=1e-12)),
    'mae_features': ('ViTMAEModel', TOWER | dict(mask_ratio=0.0), dict(layer_norm_eps=1e-12)),
    'siglip': (
        'SiglipForImageClassification',
        dict(num_labels=5, vision_config=TOWER),
        dict(classifier='gap'),
    ),
    'siglip_features': ('SiglipVisionModel', TOWER, dict(classifier='map')),
    'clip': (
        'CLIPForImageClassification',
        dict(num_labels=5, vision_config=TOWER),
        dict(classifier='gap', final_norm=False, class_token=True, act='quick_gelu'),
    ),
    'clip_features': (
        'CLIPVisionModel',
        TOWER | dict(hidden_act='gelu'),
        dict(classifier='token', act='gelu', layer_norm_eps=1e-5, patch_bias=False),
    ),
    'clip_projected': (
        'CLIPVisionModelWithProjection',
        TOWER | dict(projection_dim=40),
        dict(representation_size=40, representation_act='linear'),
    ),
}


@pytest.fixture(scope='module')
def transformers():
    pytest.importorskip('torch')
    library = pytest.importorskip('transformers')
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


@pytest.fixture(scope='module')
def case(transformers, tmp_path_factory):
    """`case(name)`: (transformers' model, ours), of random weights, made once."""

    @functools.cache
    def make(name):
        kind, settings, _ = CASES[name]
        model_class = getattr(transformers, kind)
        theirs = randomise(model_class(model_class.config_class(**{**SIZES, **settings})))
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        side = settings.get('image_size', SIZES['image_size'])
        size = dict(size={'shortest_edge': side}, do_center_crop=True, crop_size=side)
        if side != SIZES['image_size']:
            size = dict(size=dict(zip(('height', 'width'), side, strict=True)))
        (folder / 'preprocessor_config.json').write_text(json.dumps(HALF | size))
        theirs.name_or_path = folder
        return theirs, model_folder.load(folder)

    return make


def outputs_of(theirs, x, dtype='float32'):
    """Logits, or what the class gives of an image, [B, C] or [B, D]."""
    import torch

    pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(getattr(torch, dtype))
    order = {}
    if theirs.config.model_type == 'vit_mae':  # keeps the patches in theirs
        count = theirs.embeddings.patch_embeddings.num_patches
        order = {'noise': torch.arange(count).expand(len(x), -1)}
    # Angles of rotary positions are asked for as float32, by this name.
    with torch.no_grad(), mock.patch.object(torch, 'float32', pixels.dtype):
        theirs.to(pixels.dtype)
        for module in (m for m in theirs.modules() if hasattr(m, 'inv_freq')):
            theirs._init_weights(module)
        out = theirs(pixels, **order)
    theirs.float()
    for name in ('logits', 'image_embeds', 'pooler_output'):
        if name in out:
            return out[name].numpy()
    tokens = out['last_hidden_state'].numpy()
    return tokens[:, 0] if order else tokens.mean(axis=1)  # MAE and I-JEPA have no pooler


@pytest.mark.parametrize('name', CASES)
def test_outputs_are_those_of_transformers(name, case):
    theirs, model = case(name)
    x = images(model)
    assert model.image_size == (SIZES | CASES[name][1])['image_size']
    assert CASES[name][2].items() <= model.model_config.items()
    for dtype, tolerance in (('float32', 1e-5), ('float64', 1e-10)):
        assert distance(compute(model, x, dtype), outputs_of(theirs, x, dtype)) < tolerance


# Class, (width, heads, width of the MLP) of a model that there is, settings; layers.
WIDE = {
    'dinov2_reg L': ('Dinov2WithRegistersModel', (1024, 16, 0), {}, 2),
    'siglip So400m': ('SiglipVisionModel', (1152, 16, 4304), {}, 2),
    'clip H': (
        'CLIPVisionModelWithProjection',
        (1280, 16, 5120),
        dict(hidden_act='gelu', projection_dim=1024),
        2,
    ),
    'mae H': ('ViTMAEModel', (1280, 16, 5120), dict(mask_ratio=0.0), 2),
}
WIDER = {
    'ijepa H': ('IJepaModel', (1280, 16, 5120), {}, 2),
    'dinov2 g': ('Dinov2Model', (1536, 24, 0), dict(use_swiglu_ffn=True), 2),
    'siglip g-opt': ('SiglipVisionModel', (1536, 16, 6144), {}, 2),
    'clip bigG': ('CLIPVisionModel', (1664, 16, 8192), dict(hidden_act='gelu'), 2),
    'dinov2_reg L whole': ('Dinov2WithRegistersModel', (1024, 16, 0), {}, 24),
    'siglip L whole': ('SiglipVisionModel', (1024, 16, 4096), {}, 24),
    'clip L whole': ('CLIPVisionModelWithProjection', (1024, 16, 4096), {}, 24),
    'mae L whole': ('ViTMAEModel', (1024, 16, 4096), dict(mask_ratio=0.0), 24),
    'ijepa H whole': ('IJepaModel', (1280, 16, 5120), {}, 32),
}


@pytest.mark.parametrize(
    'name', [*WIDE, *(pytest.param(name, marks=pytest.mark.slow) for name in WIDER)]
)
def test_models_of_true_width(name, transformers, tmp_path):
    """One after the other, so that there are no two of them in memory."""
    kind, (width, heads, mlp_dim), settings, layers = (WIDE | WIDER)[name]
    settings = settings | dict(hidden_size=width, num_attention_heads=heads, image_size=56)
    settings |= {'intermediate_size': mlp_dim} if mlp_dim else {}
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**settings, num_hidden_layers=layers, patch_size=14)
    theirs = randomise(model_class(config))
    theirs.save_pretrained(tmp_path)
    x = np.random.default_rng(1).uniform(-1, 1, (2, 56, 56, 3)).astype(np.float32)
    expected = {dtype: outputs_of(theirs, x, dtype) for dtype in ('float32', 'float64')}
    del theirs
    model = model_folder.load(tmp_path, normalization=normalization.HALF)
    shutil.rmtree(tmp_path)
    for dtype, tolerance in (('float32', 1e-5 if layers == 2 else 1e-4), ('float64', 1e-10)):
        if dtype == 'float64' and name == 'ijepa H whole':
            continue  # which would take 8 GB
        found = distance(compute(model, x, dtype), expected[dtype])
        print(f'{name}, {layers} layers, {dtype}: {found:.1e} of the largest')
        assert found < tolerance


@pytest.mark.parametrize('name', ['dinov2_features', 'dinov2_reg'])
def test_positions_are_resized_to_the_pixels_of_the_folder_as_the_class_does(name, case, tmp_path):
    """The released folders of DINOv2 have positions of 518 pixels, and make images of 224."""
    theirs, _ = case(name)
    shutil.copytree(theirs.name_or_path, tmp_path / 'hf')
    processor = dict(size={'shortest_edge': 64}, do_center_crop=True, crop_size=56)
    for crop in (56, 14):
        processor['crop_size'] = crop
        (tmp_path / 'hf/preprocessor_config.json').write_text(json.dumps(HALF | processor))
        model = model_folder.load(tmp_path / 'hf')
        assert model.image_size == crop and 'as its class does' in str(model.source)
        x = images(model)
        assert distance(compute(model, x), outputs_of(theirs, x)) < 1e-5
    # For converting, they stay what they are.
    kept = model_folder.open_model(tmp_path / 'hf')
    assert kept.image_size == SIZES['image_size'] and 'they stay so' in str(kept.source)
    model_folder.check(kept)
    processor['crop_size'] = 32
    (tmp_path / 'hf/preprocessor_config.json').write_text(json.dumps(HALF | processor))
    with pytest.raises(UserError, match='32 pixels, which is not a multiple of the patch size 14'):
        model_folder.load(tmp_path / 'hf')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('width', 'heads', 'layers', 'hidden'),
    [(384, 6, 12, 1536), (1280, 20, 2, 5120), (512, 4, 40, 1024)],
    ids=['ViT-S', 'two layers of ViT-H+', 'ViT-7B, an eighth as wide'],
)
def test_dinov3_in_its_true_depth_or_width(width, heads, layers, hidden, transformers, tmp_path):
    gated = layers != 12
    config = transformers.DINOv3ViTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=hidden,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act='silu' if gated else 'gelu',
        image_size=(48, 64),
    )
    theirs = randomise(transformers.DINOv3ViTModel(config))
    theirs.save_pretrained(tmp_path)
    size = dict(size=dict(height=48, width=64))
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(HALF | size))
    model = model_folder.load(tmp_path)
    x = images(model)
    tolerance = 1e-5 if layers == 2 else 1e-4
    assert distance(compute(model, x), outputs_of(theirs, x)) < tolerance


@pytest.mark.parametrize('name', ['clip', 'siglip', 'dinov2', 'clip_features'])
def test_a_config_that_names_no_class(name, case, tmp_path):
    """As `config.save_pretrained` writes it: whether it is a classifier, the arrays tell."""
    theirs, model = case(name)
    shutil.copytree(theirs.name_or_path, tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    del config['architectures']
    (tmp_path / 'hf/config.json').write_text(json.dumps(config))
    assert model_folder.load(tmp_path / 'hf').model_config == model.model_config


def test_the_encoder_of_mae(transformers, tmp_path):
    """Of the whole model for pre-training, decoder and all; written back as a plain ViT."""
    import torch

    decoder = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = transformers.ViTMAEConfig(
        **TOWER, mask_ratio=0.0, **{f'decoder_{name}': size for name, size in decoder.items()}
    )
    whole = randomise(transformers.ViTMAEForPreTraining(config))
    whole.save_pretrained(tmp_path / 'mae')
    model = model_folder.load(tmp_path / 'mae', normalization=normalization.HALF)
    assert 'other tensors are left out (decoder.' in str(model.source)
    assert model.model_config['layer_norm_eps'] == 1e-12
    export.write(tmp_path / 'vit', model, to='huggingface')
    plain = transformers.ViTModel.from_pretrained(tmp_path / 'vit', add_pooling_layer=False)
    x = images(model)
    pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    noise = torch.arange(4).expand(3, 4).float()  # keeps the order of the patches
    with torch.no_grad():
        tokens = whole.vit(pixels, noise=noise).last_hidden_state.numpy()
        again = plain.eval()(pixels).last_hidden_state.numpy()
    _, found = modules.look_inside(model.model, model.params, x)
    for expected in (tokens, again):
        assert distance(found['encoded'], expected) < 1e-5
    assert distance(compute(model, x), tokens[:, 0]) < 1e-5
    flat = npz.flatten(model_folder.load(tmp_path / 'vit').params)
    for key, array in npz.flatten(model.params).items():
        np.testing.assert_array_equal(flat[key], array, err_msg=key)


@pytest.mark.parametrize('kind', ['CLIP', 'Siglip'])
def test_of_image_and_text_the_image_tower_is_taken(kind, transformers, tmp_path):
    import torch

    text = TOWER | dict(vocab_size=9, max_position_embeddings=4, eos_token_id=1)
    text |= dict(pad_token_id=0, bos_token_id=1)
    config = getattr(transformers, f'{kind}Config')(
        vision_config=TOWER, text_config={k: text[k] for k in text if k not in ('image_size',)},
    )  # fmt: skip
    theirs = randomise(getattr(transformers, f'{kind}Model')(config))
    theirs.save_pretrained(tmp_path)
    weights = formats.open_weights(tmp_path)
    assert 'the text tower: ' in str(weights) and 'tensors are left out' in str(weights)
    mean, deviation = normalization.CLIP if kind == 'CLIP' else normalization.HALF
    model = model_folder.load(tmp_path)
    x = images(model)
    pixels = ((x + 1) / 2 - np.float32(mean)[None, None, None]) / np.float32(deviation)
    with torch.no_grad():
        out = theirs.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
    expected = getattr(out, 'pooler_output', out)
    assert distance(compute(model, x), expected.numpy()) < 1e-5


def test_open_clips_names(case, tmp_path):
    """The same model as OpenAI and open_clip name it, written out by hand."""
    theirs, model = case('clip_projected')
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    tower = 'vision_model.'
    tower += '' if f'{tower}post_layernorm.weight' in state else 'vision_model.'
    named = {
        'visual.class_embedding': state[f'{tower}embeddings.class_embedding'],
        'visual.positional_embedding': state[f'{tower}embeddings.position_embedding.weight'],
        'visual.conv1.weight': state[f'{tower}embeddings.patch_embedding.weight'],
        'visual.proj': state['visual_projection.weight'].T,
        'logit_scale': np.zeros(()),
        'ln_final.bias': np.zeros(3),
    }
    for ours, name in (('ln_pre', 'pre_layrnorm'), ('ln_post', 'post_layernorm')):
        for part in ('weight', 'bias'):
            named[f'visual.{ours}.{part}'] = state[f'{tower}{name}.{part}']
    for i in range(2):
        block, layer = f'visual.transformer.resblocks.{i}', f'{tower}encoder.layers.{i}'
        for part in ('weight', 'bias'):
            named[f'{block}.attn.in_proj_{part}'] = np.concatenate(
                [state[f'{layer}.self_attn.{x}_proj.{part}'] for x in 'qkv']
            )
            for ours, name in (
                *(('attn.out_proj', 'self_attn.out_proj'), ('ln_1', 'layer_norm1')),
                *(('ln_2', 'layer_norm2'), ('mlp.c_fc', 'mlp.fc1'), ('mlp.c_proj', 'mlp.fc2')),
            ):
                named[f'{block}.{ours}.{part}'] = state[f'{layer}.{name}.{part}']
    assert key_tables.recognise(named) == 'OpenCLIP'
    found, notes = key_tables.to_params(named, 'OpenCLIP', 4, 'x')
    assert 'the text tower: 2 tensors are left out' in notes
    expected = npz.flatten(model.params)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    # As its folder.
    vision = dict(layers=2, width=48, head_width=12, mlp_ratio=2.0, image_size=28, patch_size=14)
    config = {'model_cfg': {'vision_cfg': vision, 'quick_gelu': True}}
    config['preprocess_cfg'] = {'mean': [0.5] * 3, 'std': [0.5] * 3}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(config))
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(array, np.float32) for key, array in named.items()},
        tmp_path / 'open_clip_model.safetensors',
    )
    again, x = model_folder.load(tmp_path), images(model)
    assert again.model_config['act'] == 'quick_gelu'
    assert distance(compute(again, x), outputs_of(theirs, x)) < 1e-5


@pytest.mark.parametrize('name', [name for name in CASES if name != 'mae_features'])
def test_transformers_reads_what_is_written(name, case, tmp_path, transformers):
    _, model = case(name)
    export.write(tmp_path / 'hf', model, to='huggingface')
    config = transformers.AutoConfig.from_pretrained(tmp_path / 'hf')
    theirs, info = getattr(transformers, config.architectures[0]).from_pretrained(
        tmp_path / 'hf', output_loading_info=True
    )
    assert not any(info.values()), info
    x = images(model)
    assert distance(outputs_of(theirs.eval(), x), compute(model, x)) < 1e-5
    again = model_folder.load(tmp_path / 'hf')
    assert again.model_config == model.model_config
    check_equal(again.params, model.params)


@pytest.mark.parametrize('name', CASES)
def test_onnx_computes_the_same(name, case):
    _, model = case(name)
    proto = onnx_export.build(model, Options(features=not model.model.num_classes))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    x = images(model)
    assert distance(session.run(None, {'image': x})[0], compute(model, x)) < 1e-5


@pytest.mark.parametrize('name', CASES)
def test_gradients_of_fine_tuning_are_those_of_float64(name, case):
    """In the forms for training on a CPU."""
    _, model = case(name)
    x = images(model)
    labels = np.eye(5, dtype=np.float32)[: len(x)]

    def gradients(module, dtype):
        def loss(params, x):
            logits = module.apply({'params': params}, x, train=True)[:, :5]
            return -(labels * jax.nn.log_softmax(logits)).sum(axis=1).mean()

        run = compare.compiled(jax.grad(loss), model.params, np.dtype(dtype))
        return npz.flatten(run(x))

    expected = gradients(model.model.clone(dtype=np.dtype('float64')), 'float64')
    found = gradients(models.for_training(model.model), 'float32')
    largest = max(np.abs(array).max() for array in expected.values())
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-5 * largest, err_msg=key)
