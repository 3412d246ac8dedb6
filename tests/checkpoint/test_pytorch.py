"""Weights to and from PyTorch libraries, with their real models where they are installed."""

import json
import pathlib

import jax
import modules
import numpy as np
import pytest

from vit_jax import checkpoint, models, variants
from vit_jax.checkpoint import formats, library_configs, npz
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import pytorch as export
from vit_jax.inference import model_folder

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'conformance'
NAMES = ('a rose', 'Gänseblümchen', 'tulip', 'oak', 'x/y', 'six', 'seven')
SIZES = dict(mlp_dim=64, num_heads=4, num_layers=2, attention_dropout_rate=0.0, dropout_rate=0.0)
VIT = {
    'model_name': None,
    'patches': {'size': (8, 8)},
    'hidden_size': 32,
    'transformer': SIZES,
    'classifier': 'token',
    'representation_size': None,
}
HYBRID = VIT | {'resnet': {'num_layers': (), 'width_factor': 1}, 'patches': {'size': (2, 2)}}


def _params(config, classes=7, size=32, seed=0):
    """Random weights of realistic scale."""
    model = models.from_config(config, num_classes=classes)
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    init = modules.shapes(model, images, train=False)
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        values = rng.normal(size=x.shape) * (0.2 if len(x.shape) > 1 else 0.1)
        return (values + ('scale' in str(path))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, init)


def _images(size=32):
    return np.random.default_rng(1).uniform(-1, 1, (3, size, size, 3)).astype(np.float32)


def _logits(config, params, images, classes=7):
    model = models.from_config(config, num_classes=classes)
    return np.asarray(modules.apply(model, params, images))


def _torch_logits(model, images):
    torch = pytest.importorskip('torch')
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return getattr(out, 'logits', out).numpy()


def _equal(a, b):
    a, b = npz.flatten(a), npz.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def _write(folder, params, to, config=VIT, image_size=32, class_names=NAMES, drop=()):
    module = models.from_config(config, num_classes=len(class_names))
    preprocess = Preprocess(image_size)
    model = model_folder.Model(module, params, config, class_names, preprocess, {})
    model, notes = export.drop_layers(model, drop)
    return notes + export.write(folder, model, to=to)


@pytest.fixture
def transformers():
    pytest.importorskip('torch')
    library = pytest.importorskip('transformers')
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def test_hugging_face_loads_what_is_written(tmp_path, transformers):
    params = _params(VIT)
    _write(tmp_path / 'hf', params, 'huggingface')
    model, info = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / 'hf', output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.id2label == dict(enumerate(NAMES))
    expected = _logits(VIT, params, _images())
    assert expected.std() > 0.5
    np.testing.assert_allclose(_torch_logits(model, _images()), expected, rtol=0, atol=1e-5)
    loaded = model_folder.load(tmp_path / 'hf')
    _equal(loaded.params, params)
    assert (loaded.class_names, loaded.image_size) == (NAMES, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['hf']


def test_hugging_face_deit_with_two_heads(tmp_path, transformers):
    config = VIT | {'distilled': True}
    params = _params(config)
    _write(tmp_path / 'hf', params, 'huggingface', config)
    model, info = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(
        tmp_path / 'hf', output_loading_info=True
    )
    assert not any(info.values()), info
    expected = _logits(config, params, _images())
    np.testing.assert_allclose(_torch_logits(model, _images()), expected, rtol=0, atol=1e-5)
    loaded = model_folder.load(tmp_path / 'hf')
    assert loaded.model_config['distilled']
    _equal(loaded.params, params)


def test_hugging_face_base_model_has_pre_logits(tmp_path, transformers):
    config = VIT | {'representation_size': 24}
    params = _params(config, classes=0)
    _write(tmp_path / 'hf', params, 'huggingface', config, class_names=())
    model, info = transformers.ViTModel.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(info.values()), info
    torch = pytest.importorskip('torch')
    with torch.no_grad():
        pooled = model(torch.from_numpy(_images().transpose(0, 3, 1, 2).copy())).pooler_output
    expected = _logits(config, params, _images(), classes=0)
    np.testing.assert_allclose(pooled.numpy(), expected, rtol=0, atol=1e-5)
    _equal(model_folder.load(tmp_path / 'hf').params, params)


@pytest.mark.parametrize('shards', [False, True])
def test_hugging_faces_own_files_are_read(tmp_path, transformers, shards):
    torch = pytest.importorskip('torch')
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=7, hidden_act='gelu_pytorch_tanh',
        layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / 'hf', max_shard_size='20KB' if shards else '1GB')
    assert (len(list((tmp_path / 'hf').glob('*.safetensors'))) > 1) == shards
    loaded = model_folder.load(tmp_path / 'hf')
    assert loaded.class_names[0] == 'class 0'  # LABEL_0 is no name
    logits = modules.apply(loaded.model, loaded.params, _images())
    np.testing.assert_allclose(logits, _torch_logits(model, _images()), rtol=0, atol=1e-5)
    # The names in memory are those of version 5; the files have the old ones.
    torch.save(model.state_dict(), tmp_path / 'v5.pth')
    assert formats.open_weights(tmp_path / 'v5.pth', num_heads=4).format == 'Hugging Face v5'
    _equal(checkpoint.load(tmp_path / 'v5.pth', num_heads=4), loaded.params)
    if shards:
        next((tmp_path / 'hf').glob('model-00002*')).unlink()
        with pytest.raises(UserError, match='model-00002.*not in the folder'):
            model_folder.load(tmp_path / 'hf')


def test_another_normalisation_is_folded_in(tmp_path, transformers):
    config = VIT
    params = _params(config)
    _write(tmp_path / 'hf', params, 'huggingface')
    processor = json.loads((tmp_path / 'hf' / 'preprocessor_config.json').read_text())
    mean, std = (np.float32(x) for x in formats.IMAGENET)
    processor |= {'image_mean': mean.tolist(), 'image_std': std.tolist()}
    (tmp_path / 'hf' / 'preprocessor_config.json').write_text(json.dumps(processor))
    loaded = model_folder.load(tmp_path / 'hf')
    assert 'folded into embedding' in str(loaded.source['notes'])
    theirs = ((_images() + 1) / 2 - mean[None, None, None]) / std[None, None, None]
    logits = modules.apply(loaded.model, loaded.params, _images())
    np.testing.assert_allclose(logits, _logits(config, params, theirs), rtol=0, atol=2e-5)


def _change(folder, **settings):
    """Changes settings of a config.json."""
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | settings))


def _our_logits(path, **kwargs):
    loaded = model_folder.load(path, **kwargs)
    return np.asarray(modules.apply(loaded.model, loaded.params, _images()))


@pytest.mark.parametrize(
    'settings',
    [
        {'hidden_act': 'gelu'},
        {'hidden_act': 'gelu_new'},
        {'hidden_act': 'relu', 'layer_norm_eps': 0.1},
        {'hidden_act': 'quick_gelu', 'num_attention_heads': 8},
        {'hidden_act': 'silu'},
    ],
    ids=str,
)
def test_hugging_face_settings_are_computed_as_stated(tmp_path, transformers, settings):
    params = _params(VIT)
    _write(tmp_path / 'hf', params, 'huggingface')
    plain = _our_logits(tmp_path / 'hf')
    _change(tmp_path / 'hf', **settings)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / 'hf')
    expected = _torch_logits(model, _images())
    logits = _our_logits(tmp_path / 'hf')
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    if settings != {'hidden_act': 'gelu_new'}:  # which is the tanh form
        assert np.abs(logits - plain).max() > 1e-4

    # And so written, to Hugging Face and to a model folder.
    loaded = model_folder.load(tmp_path / 'hf')
    export.write(tmp_path / 'again', loaded, to='huggingface')
    np.testing.assert_array_equal(_our_logits(tmp_path / 'again'), logits)
    np.testing.assert_array_equal(_our_logits(tmp_path / 'again/model.safetensors'), logits)
    model_folder.save(
        tmp_path / 'model',
        loaded.params,
        model_config=loaded.model_config,
        class_names=loaded.class_names,
        preprocess=loaded.preprocess,
        source={},
    )
    np.testing.assert_array_equal(_our_logits(tmp_path / 'model'), logits)


def test_the_activation_of_hugging_faces_pooler(tmp_path, transformers):
    torch = pytest.importorskip('torch')
    config = VIT | {'representation_size': 24}
    _write(tmp_path / 'hf', _params(config, 0), 'huggingface', config, class_names=())
    _change(tmp_path / 'hf', pooler_act='relu')
    model = transformers.ViTModel.from_pretrained(tmp_path / 'hf').eval()
    with torch.no_grad():
        found = model(torch.from_numpy(_images().transpose(0, 3, 1, 2).copy()))
    features = _our_logits(tmp_path / 'hf')
    np.testing.assert_allclose(features, found.pooler_output, rtol=0, atol=1e-5)
    assert features.min() == 0


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'hidden_act': 'mish'}, "hidden_act 'mish'; known: gelu, "),
        ({'pooler_act': 'mish'}, "pooler_act 'mish'"),
        ({'model_type': 'clap'}, "model_type 'clap'; known: vit, "),
        ({'layer_norm_eps': 'small'}, 'is damaged'),
    ],
)
def test_hugging_face_settings_that_no_model_here_computes(tmp_path, settings, message):
    _write(tmp_path / 'hf', _params(VIT), 'huggingface')
    _change(tmp_path / 'hf', **settings)
    with pytest.raises(UserError, match=message):
        model_folder.load(tmp_path / 'hf')


TIMM_SETTINGS = {
    'relu': VIT | {'act': 'relu'},
    'gelu': VIT | {'act': 'gelu'},
    'gap with class token': VIT | {'classifier': 'gap', 'class_token': True, 'fc_norm': True},
    'max': VIT | {'classifier': 'max', 'fc_norm': True},
    'avgmax': VIT | {'classifier': 'avgmax', 'class_token': True, 'act': 'silu'},
}


@pytest.mark.parametrize('case', TIMM_SETTINGS)
def test_timm_settings_are_computed_as_stated(tmp_path, case):
    config = TIMM_SETTINGS[case]
    params = _params(config)
    _write(tmp_path / 'timm', params, 'timm', config)
    loaded = model_folder.load(tmp_path / 'timm')
    assert loaded.model_config == config
    logits = _our_logits(tmp_path / 'timm')
    np.testing.assert_array_equal(logits, _logits(config, params, _images()))
    timm = pytest.importorskip('timm')
    model = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True)
    np.testing.assert_allclose(_torch_logits(model, _images()), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'architecture, arguments, told',
    [
        ('vit_base_patch16_224', {}, (12, 'gelu', 1e-6, 'token', True, False)),
        ('vit_base_patch16_gap_224', {}, (16, 'gelu', 1e-6, 'gap', False, False)),
        ('vit_base_patch16_224.augreg', {'global_pool': 'avg'}, (12, 'gelu', 1e-6, 'gap', True, 1)),
        ('eva_large_patch14_196', {'fc_norm': False}, (16, 'gelu', 1e-6, 'gap', True, False)),
        (
            'vit_giantopt_patch16_siglip_gap_256',
            {'num_heads': 8},
            (8, 'gelu_tanh', 1e-6, 'gap', False, False),
        ),
    ],
)
def test_an_architecture_of_timm_has_settings_of_its_own(tmp_path, architecture, arguments, told):
    config = {'architecture': architecture, 'model_args': arguments, 'pretrained_cfg': {}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    known = library_configs.read(tmp_path)
    names = ('act', 'layer_norm_eps', 'classifier', 'class_token', 'fc_norm')
    assert (known['num_heads'], *(known['settings'][name] for name in names)) == told


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'act_layer': 'mish'}, "activation 'mish'"),
        ({'global_pool': 'avg'}, "states global_pool 'token', and timm would compute 'avg'"),
        ({'scale_mlp_norm': True}, 'scale_mlp_norm=True, which no model here computes'),
        ({'qk_norm': True}, 'configuration says qk_norm=True, its arrays .* qk_norm=False'),
        ({'reg_tokens': 4}, 'configuration says registers=4, its arrays .* registers=0'),
        ({'norm_layer': 'rmsnorm'}, "norm_layer='rmsnorm'"),
        ({'rope_theta': 3}, 'rope_theta=3, which is not known here'),
    ],
)
def test_settings_of_timm_that_no_model_here_computes(tmp_path, arguments, message):
    _write(tmp_path / 'timm', _params(VIT), 'timm')
    stated = json.loads((tmp_path / 'timm/config.json').read_text())['model_args']
    _change(tmp_path / 'timm', model_args=stated | arguments)
    with pytest.raises(UserError, match=message):
        model_folder.load(tmp_path / 'timm')


def test_what_a_bare_file_does_not_tell_is_assumed_aloud(tmp_path):
    torch = pytest.importorskip('torch')
    params = _params(VIT | {'representation_size': 24})
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in _timm_names(params).items()}
    torch.save(state, tmp_path / 'timm.pth')
    weights = formats.open_weights(tmp_path / 'timm.pth', num_heads=4)
    assert dict(weights.settings) == {'act': 'gelu', 'layer_norm_eps': 1e-6}
    assert 'activation gelu and LayerNorm epsilon 1e-06 are assumed' in str(weights)


@pytest.mark.parametrize('to', ['timm', 'torchvision'])
def test_a_library_with_one_epsilon(tmp_path, to):
    config = VIT | {'act': 'gelu', 'layer_norm_eps': 1e-12}
    notes = _write(tmp_path / 'small', _params(config), to, config)
    assert 'LayerNorm epsilon is 1e-6 there, 1e-12 here' in ' '.join(notes)
    config['layer_norm_eps'] = 0.01
    with pytest.raises(UserError, match='layer_norm_eps is 1e-6, not 0.01'):
        _write(tmp_path / 'large', _params(config), to, config)


TIMM_CASES = {
    'vit': VIT,
    'gap': VIT | {'classifier': 'gap'},
    'deit': VIT | {'distilled': True},
    'hybrid': HYBRID,
    'registers': VIT | {'registers': 2, 'transformer': SIZES | {'layer_scale': True}},
    'reg_gap': VIT | {'classifier': 'gap', 'registers': 2, 'register_positions': True},
    'siglip': VIT | {'classifier': 'map', 'transformer': SIZES | {'qk_norm': True}},
    'clip': VIT
    | {'patch_bias': False, 'transformer': SIZES | {'pre_norm': True}, 'layer_norm_eps': 1e-5},
    'gated': VIT | {'act': 'silu', 'transformer': SIZES | {'gated_mlp': True}},
}


def _timm_params(case):
    params = _params(TIMM_CASES[case])
    if case == 'registers':  # beside them, timm's class token has no position of its own
        holder = params['Transformer']['posembed_input']
        holder['pos_embedding'][:, 0] = 0
    return params


@pytest.mark.parametrize('case', TIMM_CASES)
def test_timm_loads_what_is_written(tmp_path, case):
    timm = pytest.importorskip('timm')
    config = TIMM_CASES[case]
    params = _timm_params(case)
    _write(tmp_path / 'timm', params, 'timm', config)
    model = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True)
    expected = _logits(config, params, _images())
    tolerance = 1e-4 if case == 'hybrid' else 1e-5
    np.testing.assert_allclose(_torch_logits(model, _images()), expected, rtol=0, atol=tolerance)
    data = timm.data.resolve_model_data_config(model)
    assert data['mean'] == data['std'] == (0.5,) * 3 or data['mean'] == [0.5] * 3
    assert (data['crop_mode'], data['crop_pct'], data['interpolation']) == ('squash', 1, 'bilinear')
    assert data['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('case', TIMM_CASES)
def test_timm_round_trip(tmp_path, case):
    config = TIMM_CASES[case]
    params = _timm_params(case)
    _write(tmp_path / 'timm', params, 'timm', config)
    loaded = model_folder.load(tmp_path / 'timm')
    _equal(loaded.params, params)
    assert (loaded.class_names, loaded.image_size) == (NAMES, 32)
    assert loaded.model_config == config


def test_timm_mixer(tmp_path):
    config = dict(variants.VARIANTS['Mixer-S_32'])
    params = _params(config, size=224)
    notes = _write(tmp_path / 'timm', params, 'timm', config, image_size=224)
    assert 'erf' in ' '.join(notes)
    loaded = model_folder.load(tmp_path / 'timm')
    assert (loaded.model_config['model_name'], loaded.image_size) == ('Mixer-S_32', 224)
    _equal(loaded.params, params)
    timm = pytest.importorskip('timm')
    torch = pytest.importorskip('torch')
    model = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True)
    for block in model.blocks:
        block.mlp_tokens.act = block.mlp_channels.act = torch.nn.GELU(approximate='tanh')
    expected = _logits(config, params, _images(224))
    np.testing.assert_allclose(
        _torch_logits(model, _images(224)), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )


def test_torchvision(tmp_path):
    for representation_size in (None, 24):
        config = VIT | {'representation_size': representation_size}
        params = _params(config)
        folder = tmp_path / f'tv{representation_size}'
        _write(folder, params, 'torchvision', config)
        loaded = model_folder.load(folder)
        _equal(loaded.params, params)
        assert loaded.class_names == NAMES
        # The file alone says as much.
        _equal(model_folder.load(folder / 'model.safetensors').params, params)
        assert 'approximate' in (folder / 'NOTE.md').read_text()
    torchvision = pytest.importorskip('torchvision')
    torch = pytest.importorskip('torch')
    from safetensors.torch import load_file

    arguments = json.loads((folder / 'config.json').read_text())['arguments']
    model = torchvision.models.VisionTransformer(**arguments)
    model.load_state_dict(load_file(folder / 'model.safetensors'))
    for module in model.modules():
        if isinstance(module, torch.nn.GELU):
            module.approximate = 'tanh'
    expected = _logits(config, params, _images())
    np.testing.assert_allclose(_torch_logits(model, _images()), expected, rtol=0, atol=1e-5)


def _timm_names(params):
    """The state dict of a jx_vit_* file, written out by hand: independent of the table."""
    flat = npz.flatten(params)
    block = 'Transformer/encoderblock_{}'
    attention = block + '/MultiHeadDotProductAttention_0'
    state = {
        'cls_token': flat['cls'],
        'pos_embed': flat['Transformer/posembed_input/pos_embedding'],
        'patch_embed.proj.weight': np.einsum('hwio->oihw', flat['embedding/kernel']),
        'patch_embed.proj.bias': flat['embedding/bias'],
        'norm.weight': flat['Transformer/encoder_norm/scale'],
        'norm.bias': flat['Transformer/encoder_norm/bias'],
    }
    for head in ('head', 'pre_logits'):
        theirs = 'pre_logits.fc' if head == 'pre_logits' else head
        state |= {
            f'{theirs}.weight': flat[f'{head}/kernel'].T,
            f'{theirs}.bias': flat[f'{head}/bias'],
        }
    for i in range(2):
        ours, mine, theirs = block.format(i), attention.format(i), f'blocks.{i}'
        state[f'{theirs}.attn.qkv.weight'] = np.concatenate(
            [np.einsum('dhk->hkd', flat[f'{mine}/{x}/kernel']).reshape(32, 32)
             for x in ('query', 'key', 'value')]
        )  # fmt: skip
        state[f'{theirs}.attn.qkv.bias'] = np.concatenate(
            [flat[f'{mine}/{x}/bias'].ravel() for x in ('query', 'key', 'value')]
        )
        out = np.einsum('hkd->dhk', flat[f'{mine}/out/kernel']).reshape(32, 32)
        state |= {
            f'{theirs}.attn.proj.weight': out,
            f'{theirs}.attn.proj.bias': flat[f'{mine}/out/bias'],
        }
        for n in (0, 1):
            state |= {
                f'{theirs}.norm{n + 1}.weight': flat[f'{ours}/LayerNorm_{n}/scale'],
                f'{theirs}.norm{n + 1}.bias': flat[f'{ours}/LayerNorm_{n}/bias'],
                f'{theirs}.mlp.fc{n + 1}.weight': flat[f'{ours}/MlpBlock_0/Dense_{n}/kernel'].T,
                f'{theirs}.mlp.fc{n + 1}.bias': flat[f'{ours}/MlpBlock_0/Dense_{n}/bias'],
            }
    return state


@pytest.mark.parametrize('wrapper', ['', 'model', 'state_dict'])
@pytest.mark.parametrize('legacy', [False, True])
def test_jx_vit_pth_files(tmp_path, wrapper, legacy):
    torch = pytest.importorskip('torch')
    params = _params(VIT | {'representation_size': 24})
    state = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in _timm_names(params).items()}
    if wrapper:
        state = {f'module.{k}': v for k, v in state.items()}
        state = {wrapper: state, 'epoch': 3}
    torch.save(state, tmp_path / 'jx.pth', _use_new_zipfile_serialization=not legacy)
    _equal(checkpoint.load(tmp_path / 'jx.pth', num_heads=4), params)
    with pytest.raises(
        UserError, match='number of attention heads.*no known model is 32 wide: .*--num_heads'
    ):
        checkpoint.load(tmp_path / 'jx.pth')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_safetensors(tmp_path, dtype):
    torch = pytest.importorskip('torch')
    from safetensors.torch import save_file

    params = _params(VIT | {'representation_size': 24})
    state = {
        k: torch.from_numpy(np.ascontiguousarray(v)).to(getattr(torch, dtype))
        for k, v in _timm_names(params).items()
    }
    save_file(state, tmp_path / 'half.safetensors')
    weights = formats.open_weights(tmp_path / 'half.safetensors', num_heads=4)
    assert {a.stored_dtype for a in jax.tree.leaves(weights.params)} == {dtype}
    for name, array in npz.flatten(weights.read()).items():
        expected = torch.from_numpy(npz.flatten(params)[name]).to(getattr(torch, dtype)).float()
        np.testing.assert_array_equal(array, expected.numpy(), strict=True)


def test_position_embeddings_of_the_patches_alone(tmp_path):
    params = _params(VIT)
    state = _timm_names(_params(VIT | {'representation_size': 24}) | params)
    state = {k: v for k, v in state.items() if 'pre_logits' not in k}
    state['pos_embed'] = state['pos_embed'][:, 1:]
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, tmp_path / 'a.safetensors')
    weights = formats.open_weights(tmp_path / 'a.safetensors', num_heads=4)
    assert 'zeros were put there' in str(weights)
    position = weights.read()['Transformer']['posembed_input']['pos_embedding']
    assert not position[:, 0].any()
    np.testing.assert_array_equal(position[:, 1:], state['pos_embed'])


def test_unknown_tensors_are_listed(tmp_path):
    from safetensors.numpy import save_file

    state = {k: np.ascontiguousarray(v) for k, v in
             _timm_names(_params(VIT | {'representation_size': 24})).items()}  # fmt: skip
    save_file(state | {'blocks.0.gamma_3': np.ones(32, np.float32)}, tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match=r'architecture.*\n  blocks.0.gamma_3 \(32,\)'):
        checkpoint.load(tmp_path / 'a.safetensors', num_heads=4)
    with pytest.raises(UserError, match='which does not fit timm tensors for .* of 5 heads'):
        checkpoint.load(tmp_path / 'a.safetensors', num_heads=5)
    save_file({'weight': np.ones(3, np.float32)}, tmp_path / 'b.safetensors')
    with pytest.raises(UserError, match='is of no known kind'):
        checkpoint.load(tmp_path / 'b.safetensors')


def test_safetensors_with_our_names(tmp_path):
    from safetensors.numpy import save_file

    params = _params(VIT)
    save_file(npz.flatten(params), tmp_path / 'a.safetensors')
    _equal(checkpoint.load(tmp_path / 'a.safetensors'), params)


# What each format cannot express, by what is named.
CONFORMANCE = {
    'vit_token': {},
    'vit_token_unpooled': {},
    'vit_token_pre_logits': {'timm': 'no pre_logits', 'huggingface': 'pre_logits'},
    'vit_gap': {'torchvision': 'mean pooling'},
    'vit_unpooled': {'torchvision': 'mean pooling'},
    'vit_head_dim_80': {},
    'hybrid_stem': {'huggingface': 'hybrid', 'torchvision': 'hybrid'},
    'mixer': {'timm': 'no Mixer of patch 8', 'huggingface': 'MLP-Mixer', 'torchvision': 'Mixer'},
}


@pytest.mark.parametrize('to', export.TARGETS)
@pytest.mark.parametrize('case', CONFORMANCE)
def test_every_model_comes_back_bit_equal_or_is_refused(tmp_path, case, to):
    opened = model_folder.open_model(FIXTURES / f'{case}.checkpoint.npz')
    destination = tmp_path / ('again.npz' if to == 'npz' else 'again')
    if lost := CONFORMANCE[case].get(to):
        with pytest.raises(UserError, match=f'{to} cannot express this model.*{lost}'):
            export.write(destination, opened, to=to)
        assert not list(tmp_path.iterdir())
        return
    export.write(destination, opened, to=to)
    loaded = model_folder.load(destination)
    _equal(loaded.params, checkpoint.load(FIXTURES / f'{case}.checkpoint.npz'))
    assert loaded.image_size == opened.image_size


def test_dropping_pre_logits(tmp_path):
    config = VIT | {'representation_size': 32}
    params = _params(config)
    for to in ('timm', 'huggingface'):
        with pytest.raises(UserError, match='pre_logits.*--drop pre_logits'):
            _write(tmp_path / to, params, to, config)
        notes = _write(tmp_path / to, params, to, config, drop=('pre_logits',))
        assert 'train a new' in ' '.join(notes)
        _equal(
            model_folder.load(tmp_path / to).params,
            {name: leaf for name, leaf in params.items() if name != 'pre_logits'},
        )
    with pytest.raises(UserError, match=r'head does not fit.*\(24, 7\)'):
        narrow = VIT | {'representation_size': 24}
        _write(tmp_path / 'x', _params(narrow), 'timm', narrow, drop=('pre_logits',))
    with pytest.raises(UserError, match="cannot drop 'head'"):
        _write(tmp_path / 'x', params, 'timm', config, drop=('head',))


def test_what_has_no_place_is_refused(tmp_path):
    hidden = VIT | {'mlp_head': True}
    for to in ('timm', 'huggingface', 'torchvision'):
        with pytest.raises(UserError, match='no place for .*head_hidden'):
            _write(tmp_path / 'a', _params(hidden), to, hidden)
        with pytest.raises(UserError, match='unpooled'):
            _write(tmp_path / 'a', _params(VIT), to, VIT | {'classifier': 'token_unpooled'})
    distilled = VIT | {'distilled': True}
    with pytest.raises(UserError, match='no distillation token'):
        _write(tmp_path / 'a', _params(distilled), 'torchvision', distilled)
    with pytest.raises(UserError, match='always has a head'):
        _write(tmp_path / 'a', _params(VIT, classes=0), 'torchvision', class_names=())
    with pytest.raises(UserError, match='looks like the name of a file'):
        _write(tmp_path / 'a.safetensors', _params(VIT), 'timm')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').write_text('x')
    with pytest.raises(UserError, match='full exists'):
        _write(tmp_path / 'full', _params(VIT), 'timm')
    assert [p.name for p in tmp_path.iterdir()] == ['full']


def test_a_failed_write_leaves_nothing(tmp_path):
    params = _params(VIT)
    params['head']['bias'][0] = np.nan
    checkpoint.save(tmp_path / 'a.npz', params)
    opened = model_folder.open_model(tmp_path / 'a.npz')
    for to in export.TARGETS:
        with pytest.raises(UserError, match="a.npz: the array 'head/bias' has 1 values .* NaN"):
            _write(tmp_path / f'to_{to}', opened.params, to)
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']


def test_convert_script(tmp_path, run_script):
    preprocess = model_folder.Preprocess(crop=32)
    params = _params(VIT)
    model_folder.save(
        tmp_path / 'model', params, model_config=VIT, class_names=NAMES,
        preprocess=preprocess, source={},
    )  # fmt: skip
    run = run_script('convert.py', tmp_path / 'model', tmp_path / 'tv', '--to', 'torchvision')
    assert run.returncode == 0, run.stderr
    assert 'written for torchvision' in run.stdout and 'NOTE.md' in run.stdout
    loaded = model_folder.load(tmp_path / 'tv')
    _equal(loaded.params, params)
    assert loaded.class_names == NAMES
    run = run_script('convert.py', tmp_path / 'tv', tmp_path / 'tv', '--to', 'npz')
    assert run.returncode == 1 and run.stderr.startswith('convert.py: ') and 'exists' in run.stderr


@pytest.mark.parametrize('kind', ['DeiTForImageClassification', 'DeiTModel'])
def test_a_distillation_token_that_no_head_reads(tmp_path, transformers, kind):
    torch = pytest.importorskip('torch')
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    config = transformers.DeiTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        out = model(torch.from_numpy(_images().transpose(0, 3, 1, 2).copy()))
    processor = {'image_processor_type': 'ViTImageProcessor', 'size': 32, 'image_mean': [0.5] * 3}
    processor |= {'image_std': [0.5] * 3, 'resample': 2}
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(processor))
    expected = out.logits if kind.endswith('Classification') else out.pooler_output
    np.testing.assert_allclose(_our_logits(tmp_path), expected, rtol=0, atol=1e-5)
    loaded = model_folder.load(tmp_path)
    assert 'kept as a register token' in str(loaded.source['notes'])
    assert 'dist' in checkpoint.load(tmp_path)  # as fine-tuning a distilled model takes it


@pytest.mark.parametrize(
    'settings', [{'num_hidden_layers': 1}, {'hidden_size': 16}, {'intermediate_size': 32}], ids=str
)
def test_sizes_that_a_config_states_are_those_of_the_arrays(tmp_path, settings):
    _write(tmp_path / 'hf', _params(VIT), 'huggingface')
    _change(tmp_path / 'hf', **settings)
    with pytest.raises(UserError, match='they do not belong together'):
        model_folder.load(tmp_path / 'hf')
