"""EVA-02 and DINOv3 without timm: names of files, settings of folders, refusals by name."""

import json

import jax
import modules
import numpy as np
import pytest
from against_torch import check_equal
from safetensors.numpy import save_file

from vit_jax import models, variants
from vit_jax.checkpoint import formats, infer, key_tables, npz
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import pytorch as export
from vit_jax.inference import model_folder

ENCODER = dict(mlp_dim=64, num_heads=3, num_layers=2)
ENCODER |= dict(dropout_rate=0.0, attention_dropout_rate=0.0)
VIT = dict(model_name=None, patches={'size': (14, 14)}, hidden_size=192, classifier='token')
VIT |= dict(representation_size=None)
DINOV3 = VIT | dict(
    transformer=ENCODER | dict(layer_scale=True, qkv_bias='qv', add_position_embedding=False),
    registers=2,
    act='gelu',
    layer_norm_eps=1e-5,
    rotary={'form': 'dinov3', 'theta': 100.0},
)
EVA02 = VIT | dict(
    transformer=ENCODER | dict(gated_mlp=True, mlp_norm=True, qkv_bias='qv'),
    classifier='gap',
    class_token=True,
    fc_norm=True,
    act='silu',
    rotary={'form': 'axial', 'theta': 10_000.0, 'grid': 16},
)
BLOCK = 'Transformer/encoderblock_0'


def make(config, classes=5, size=(28, 42)):
    """A model of random weights."""
    module = models.from_config(config, num_classes=classes)
    image = np.zeros((1, *size, 3), np.float32)
    shapes = modules.shapes(module, image, train=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    names = tuple('abcde'[:classes])
    return model_folder.Model(module, params, config, names, Preprocess(size), {})


def named(model):
    """Its arrays under timm's names."""
    table = 'timm EVA-02' if model.model_config['act'] == 'silu' else 'timm EVA'
    tensors, lost = key_tables.from_params(npz.flatten(model.params), table)
    assert not lost
    return {name: np.asarray(array) for name, array in tensors.items()}


def rename(tensors, *words):
    for old, new in words:
        tensors = {name.replace(old, new): array for name, array in tensors.items()}
    return tensors


def of_dinov3s_authors(model):
    words = (('reg_token', 'storage_tokens'), ('.gamma_', '.ls'))
    tensors = rename(named(model), *words)
    for i in range(2):
        block = f'blocks.{i}'
        for n in (1, 2):
            tensors[f'{block}.ls{n}.gamma'] = tensors.pop(f'{block}.ls{n}')
        parts = [tensors.pop(f'{block}.attn.{x}_proj.weight') for x in 'qkv']
        tensors[f'{block}.attn.qkv.weight'] = np.concatenate(parts)
        q, v = (tensors.pop(f'{block}.attn.{x}_proj.bias') for x in 'qv')
        tensors[f'{block}.attn.qkv.bias'] = np.concatenate([q, np.full_like(q, 7), v])
        tensors[f'{block}.attn.qkv.bias_mask'] = np.repeat(np.float32([1, 0, 1]), len(q))
    periods = np.float32(100.0 ** (np.arange(16) / 16))
    rounded = (periods.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)  # as bfloat16
    tensors |= {'rope_embed.periods': rounded, 'mask_token': np.zeros((1, 192), np.float32)}
    return tensors | {'local_cls_norm.weight': np.ones(192, np.float32)}


def test_files_of_dinov3s_authors(tmp_path):
    model = make(DINOV3, classes=0)
    save_file(of_dinov3s_authors(model), tmp_path / 'dinov3_vits16_pretrain.safetensors')
    opened = model_folder.load(tmp_path / 'dinov3_vits16_pretrain.safetensors')
    check_equal(opened.params, model.params)
    assert opened.model_config == DINOV3
    assert opened.image_size == 224  # of the patches, nothing tells
    notes = str(opened.source['notes'])
    for words in (
        *('keys have no bias', 'computed in float32', "rotary positions {'form': 'dinov3'"),
        *('mask_token, for masked pre-training: 1', 'a norm of small crops', '224 pixels assumed'),
    ):
        assert words in notes
    assert 'heads' not in notes  # the periods tell


@pytest.mark.parametrize(
    ('name', 'array', 'message'),
    [
        ('rope_embed.periods', np.float32(50.0 ** (np.arange(16) / 16)), 'than theta 100 gives'),
        ('blocks.1.attn.qkv.bias_mask', np.ones(576, np.float32), 'other biases than that of keys'),
        ('cls_norm.weight', np.ones(192, np.float32), r'cls_norm.weight \(192,\)'),
    ],
)
def test_files_of_dinov3s_authors_that_compute_something_else(tmp_path, name, array, message):
    tensors = of_dinov3s_authors(make(DINOV3, classes=0)) | {name: array}
    save_file(tensors, tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match=message):
        formats.open_weights(tmp_path / 'a.safetensors')


@pytest.mark.parametrize('packed', [False, True])
def test_files_of_eva02s_authors(tmp_path, packed):
    config = EVA02
    if packed:  # without a norm, gate and first layer are one matrix
        config = EVA02 | dict(transformer=ENCODER | dict(gated_mlp=True, qkv_bias='qv'))
    model = make(config, size=(224, 224))
    words = [('mlp.fc1_g', 'mlp.w1'), ('mlp.fc1_x', 'mlp.w2'), ('mlp.fc2', 'mlp.w3')]
    tensors = rename(named(model), *words, ('mlp.norm', 'mlp.ffn_ln'))
    for part in ('weight', 'bias') if packed else ():
        for i in range(2):
            halves = [tensors.pop(f'blocks.{i}.mlp.w{n}.{part}') for n in (1, 2)]
            tensors[f'blocks.{i}.mlp.w12.{part}'] = np.concatenate(halves)
    for i in range(2):
        for x in 'qv':
            tensors[f'blocks.{i}.attn.{x}_bias'] = tensors.pop(f'blocks.{i}.attn.{x}_proj.bias')
    save_file(tensors | {'rope.freqs_cos': np.ones((4, 4), np.float32)}, tmp_path / 'a.safetensors')
    opened = model_folder.load(tmp_path / 'a.safetensors')
    check_equal(opened.params, model.params)
    assert opened.model_config == config
    assert 'tables of rotary positions, which are computed here: 1' in str(opened.source)

    # After pre-training, with its head in place of the classifier's.
    tensors = rename(tensors, ('head.', 'lm_head.'), ('fc_norm.', 'norm.'))
    save_file(tensors, tmp_path / 'b.safetensors')
    opened = model_folder.load(tmp_path / 'b.safetensors')
    check_equal(opened.params, {k: v for k, v in model.params.items() if k != 'head'})
    assert 'taken for fc_norm, as by timm' in str(opened.source)


@pytest.mark.parametrize('config', [DINOV3, EVA02], ids=['dinov3', 'eva02'])
def test_every_way_back_keeps_every_bit_and_setting(tmp_path, config):
    model = make(config)
    export.write(tmp_path / 'timm', model, to='timm')
    export.write(tmp_path / 'a.npz', model, to='npz')
    model_folder.save(
        tmp_path / 'model',
        model.params,
        model_config=config,
        class_names=model.class_names,
        preprocess=model.preprocess,
        source={},
    )
    for path in ('timm', 'a.npz', 'model', 'model/params.npz', 'timm/model.safetensors'):
        again = model_folder.load(tmp_path / path)
        check_equal(again.params, model.params)
        given = {k: v for k, v in again.model_config.items() if v is not None}
        assert given == {k: v for k, v in config.items() if v is not None}, path
        assert again.preprocess.size == (28, 42)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(rope_grid_indexing='xy'), "rope_grid_indexing='xy', which no model here computes"),
        (dict(attn_type='rope'), "attn_type='rope', which no model here computes"),
        (dict(use_post_norm=True), 'use_post_norm=True, which no model here computes'),
        (dict(attn_only_layer_scale=True), 'attn_only_layer_scale=True'),
        (dict(rope_type='mixed'), "rope_type='mixed', rope_rotate_half=False"),
        (dict(rope_rotate_half=True), "rope_type='cat', rope_rotate_half=True"),
        (dict(ref_feat_shape=[16, 8]), r'ref_feat_shape=\[16, 8\], which no model here'),
        (dict(global_pool='map'), "global_pool='map'; known: token, avg, max"),
        (dict(use_post_transformer_norm=True), 'two norms behind its blocks'),
        (dict(dino=1), 'the argument dino=1, which is not known here'),
        (dict(qkv_bias=False), "qkv_bias='', its arrays are those of a model with qkv_bias='qv'"),
        (dict(scale_mlp=False), 'mlp_norm=False, its arrays are those of a model with'),
    ],
)
def test_settings_of_timm_that_no_model_here_computes(tmp_path, arguments, message):
    export.write(tmp_path / 'timm', make(EVA02), to='timm')
    place = tmp_path / 'timm/config.json'
    stated = json.loads(place.read_text())
    stated['model_args'] |= arguments
    stated.pop('global_pool')
    place.write_text(json.dumps(stated))
    with pytest.raises(UserError, match=message):
        model_folder.load(tmp_path / 'timm')


def test_images_are_as_large_as_a_folder_makes_them(tmp_path):
    """DINOv3's positions fit them, whatever image_size its config.json states."""
    export.write(tmp_path / 'hf', make(DINOV3, classes=0), to='huggingface')
    place = tmp_path / 'hf/preprocessor_config.json'
    stated = json.loads(place.read_text())
    place.write_text(json.dumps(stated | {'size': {'height': 56, 'width': 56}}))
    assert model_folder.load(tmp_path / 'hf').image_size == 56
    place.write_text(json.dumps(stated | {'size': {'height': 50, 'width': 50}}))
    with pytest.raises(UserError, match='makes images of 50 pixels, which is not a multiple'):
        model_folder.load(tmp_path / 'hf')


def test_settings_of_transformers_that_no_model_here_computes(tmp_path):
    export.write(tmp_path / 'hf', make(DINOV3, classes=0), to='huggingface')
    place = tmp_path / 'hf/config.json'
    stated = json.loads(place.read_text())
    place.write_text(json.dumps(stated | {'mlp_bias': False}))
    with pytest.raises(UserError, match='mlp_bias=false, which no model here computes'):
        model_folder.load(tmp_path / 'hf')
    place.write_text(json.dumps(stated | {'key_bias': True}))
    with pytest.raises(UserError, match="qkv_bias='qkv', its arrays are .*qkv_bias='qv'"):
        model_folder.load(tmp_path / 'hf')


@pytest.mark.parametrize(
    ('config', 'to', 'message'),
    [
        (DINOV3, 'huggingface', 'DINOv3 without a head only .*; timm has it'),
        (EVA02, 'huggingface', 'rotary positions of the form of DINOv3 only'),
        (DINOV3 | dict(registers=0), 'huggingface', 'its DINOv3 has registers'),
        (DINOV3, 'torchvision', 'no place for LayerScale, register tokens, rotary positions'),
        (EVA02 | dict(act='gelu'), 'timm', 'its Eva has the activation silu, not gelu'),
        (
            EVA02 | dict(transformer=EVA02['transformer'] | dict(qkv_bias='qkv')),
            'timm',
            'biases of queries and values, or none of the three',
        ),
    ],
)
def test_what_a_library_has_no_place_for(tmp_path, config, to, message):
    with pytest.raises(UserError, match=message):
        export.write(tmp_path / 'x', make(config), to=to)


@pytest.mark.parametrize('name', [n for n in variants.VARIANTS if 'dinov3' in n or 'eva02' in n])
def test_variants_are_told_by_their_arrays_and_settings(name):
    """Also ViT-7B, of which nothing but shapes is made."""
    config = variants.VARIANTS[name]
    shapes = modules.shapes_of(config, 0, 224)
    told = ('classifier', 'class_token', 'rotary', 'act', 'layer_norm_eps')
    settings = {key: config[key] for key in told if key in config}
    found = infer.architecture(shapes, name, settings=settings)
    assert found['model_name'] == name and found == found | config
    assert infer.architecture(shapes, name, variant=name)['rotary'] == config['rotary']


def test_settings_of_a_file_that_are_no_rotary_positions(tmp_path):
    model = make(DINOV3)
    for rotary in ('dinov3', {'form': 'dinov3'}, {'form': 'other', 'theta': 1.5}, {'theta': 'x'}):
        npz.save(tmp_path / 'a.npz', model.params, {'rotary': rotary})
        with pytest.raises(UserError, match='rotary positions that no model here has'):
            model_folder.load(tmp_path / 'a.npz')
    npz.save(tmp_path / 'a.npz', model.params, {})
    with pytest.raises(UserError, match='pos_embedding'):
        model_folder.load(tmp_path / 'a.npz')
