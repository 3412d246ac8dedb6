"""What is recognised: big_vision's ways of keeping weights; files that are not to be trusted."""

import functools
import io
import json
import pathlib
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import modules
import numpy as np
import pytest

from vit_jax import checkpoint, models, variants
from vit_jax.checkpoint import formats, npz
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'conformance'

POSITIONS = 'Transformer/posembed_input/pos_embedding'


def _vit(cls=True, layers=3, width=8, pre_logits=0):
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def layer(*shape):
        return {'kernel': array(*shape), 'bias': array(*shape[1:])}

    def norm():
        return {'scale': array(width), 'bias': array(width)}

    blocks = {}
    for i in range(layers):
        out = {'kernel': array(2, width // 2, width), 'bias': array(width)}
        blocks[f'encoderblock_{i}'] = {
            'LayerNorm_0': norm(),
            'MultiHeadDotProductAttention_0': {
                **{name: layer(width, 2, width // 2) for name in ('query', 'key', 'value')},
                'out': out,
            },
            'LayerNorm_1': norm(),
            'MlpBlock_0': {'Dense_0': layer(width, 16), 'Dense_1': layer(16, width)},
        }
    params = {
        'embedding': {'kernel': array(4, 4, 3, width), 'bias': array(width)},
        'Transformer': {
            'posembed_input': {'pos_embedding': array(1, 9 + cls, width)},
            **blocks,
            'encoder_norm': norm(),
        },
        'head': layer(width, 5),
    }
    return params | ({'cls': array(1, 1, width)} if cls else {})


def _logits(path):
    model = model_folder.load(path)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    apply = jax.jit(functools.partial(model.model.apply, train=False))
    return np.asarray(apply({'params': model.params}, images))


def _big_vision(params, scan=False):
    """The same model as big_vision keeps it."""
    flat = npz.flatten(params)
    position = flat.pop(POSITIONS)
    if 'cls' in flat:
        flat['cls'] = flat['cls'] + position[:, :1]
        position = position[:, 1:]
    flat['pos_embedding'] = position
    if scan:
        for name in [name for name in flat if '/encoderblock_0/' in name]:
            layers = [flat.pop(name.replace('block_0', f'block_{i}')) for i in range(3)]
            flat[name.replace('encoderblock_0', 'encoderblock')] = np.stack(layers)
    return flat


@pytest.mark.parametrize(
    ('prefix', 'scan', 'cls'),
    [  # every prefix with and without scan, with and without a class token; both in all four ways
        *((prefix, cls, cls) for prefix in ('', 'params/', 'img/') for cls in (True, False)),
        *(
            (prefix, not cls, cls)
            for prefix in ('params/img/', 'opt/target/')
            for cls in (True, False)
        ),
    ],
)
def test_big_vision_files(tmp_path, prefix, scan, cls):
    params = _vit(cls)
    flat = {f'{prefix}{name}': leaf for name, leaf in _big_vision(params, scan).items()}
    others = {'params/img/': ['params/txt/head/bias', 'params/t'], 'img/': ['txt/head/bias', 't']}
    for name in others.get(prefix, ['opt/state/0/mu/head/bias']):
        flat[name] = np.zeros(3, np.float32)
    np.savez(tmp_path / 'bv.npz', **flat)
    weights = formats.open_weights(tmp_path / 'bv.npz')
    assert weights.format == 'big_vision .npz'
    for said in ('position embeddings', 'other arrays are left out', *(['scan'] * scan)):
        assert said in str(weights)
    if 'img/' in prefix:  # beside texts, a head gives an embedding: features are compared
        params = {name: leaf for name, leaf in params.items() if name != 'head'}
    checkpoint.save(tmp_path / 'google.npz', params)
    assert formats.open_weights(tmp_path / 'google.npz').format == 'Google .npz'
    np.testing.assert_allclose(
        _logits(tmp_path / 'bv.npz'), _logits(tmp_path / 'google.npz'), rtol=0, atol=1e-5
    )


def test_bfloat16_is_stored_as_raw_bytes(tmp_path):
    params = _vit()
    half = {k: v.astype(ml_dtypes.bfloat16).view('V2') for k, v in npz.flatten(params).items()}
    np.savez(tmp_path / 'half.npz', **half)
    weights = formats.open_weights(tmp_path / 'half.npz')
    assert {leaf.stored_dtype for leaf in jax.tree.leaves(weights.params)} == {'bfloat16'}
    for name, array in npz.flatten(weights.read()).items():
        expected = npz.flatten(params)[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(array, expected, strict=True)


def test_fixed_position_embeddings_are_made(tmp_path):
    flat = {k: v for k, v in npz.flatten(_vit(cls=False)).items() if k != POSITIONS}
    np.savez(tmp_path / 'a.npz', **{f'params/{k}': v for k, v in flat.items()})
    weights = formats.open_weights(tmp_path / 'a.npz')
    assert 'sine-cosine' in str(weights)
    position = npz.flatten(weights.read())[POSITIONS][0].reshape(56, 56, 8)  # 224 / 4
    y, x = 7, 30
    omega = np.array([1, 1e-4])
    expected = np.concatenate([f(c * omega) for c in (x, y) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(position[y, x], expected, atol=1e-6)


def test_the_image_tower_of_siglip(tmp_path):
    """As big_vision stores it: beside the text tower, position embeddings at the top."""
    config = variants.get_config('vit_base_patch16_siglip_224').to_dict() | {'hidden_size': 8}
    config['transformer'] |= {'mlp_dim': 16, 'num_heads': 2, 'num_layers': 2}
    model = models.from_config(config, num_classes=0)
    images = np.zeros((1, 32, 32, 3), np.float32)
    params = modules.params_of(model, images, train=False)
    stored = {**params, 'Transformer': dict(params['Transformer'])}
    stored['pos_embedding'] = stored['Transformer'].pop('posembed_input')['pos_embedding']
    others = {'params/txt/head/bias': np.ones(3), 'params/t': np.ones(1), 'params/b': np.ones(1)}
    flat = {f'params/img/{name}': array for name, array in npz.flatten(stored).items()}
    np.savez(tmp_path / 'a.npz', **flat, **others)
    opened = model_folder.load(tmp_path / 'a.npz')
    assert (opened.model_config['classifier'], opened.image_size) == ('map', 32)
    assert '3 other arrays are left out (params/txt, params/t, params/b)' in str(opened.source)
    for name, array in npz.flatten(params).items():
        np.testing.assert_array_equal(npz.flatten(opened.params)[name], array)


def test_layers_that_do_not_agree(tmp_path):
    flat = _big_vision(_vit(), scan=True)
    name = 'Transformer/encoderblock/LayerNorm_0/bias'
    np.savez(tmp_path / 'a.npz', **flat | {name: flat[name][:2]})
    with pytest.raises(UserError, match='same number of layers'):
        checkpoint.load(tmp_path / 'a.npz')


def _header(shape, dtype='<f4'):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {'descr': dtype, 'fortran_order': False, 'shape': shape}
    )
    return buffer.getvalue()


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_size_that_the_file_does_not_have(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w', compression) as f:
        f.writestr('head/kernel.npy', _header((50_000, 50_000)) + bytes(900))
    with pytest.raises(UserError, match="'head/kernel' declares 10,000,000,.*the file holds"):
        formats.open_weights(tmp_path / 'a.npz')
    # The same with the directory of the zip file saying so, too.
    data = bytearray((tmp_path / 'a.npz').read_bytes())
    directory = data.index(b'PK\x01\x02')
    data[directory + 24 : directory + 28] = struct.pack('<I', 4_000_000_128)
    (tmp_path / 'a.npz').write_bytes(data)
    with pytest.raises(UserError, match='a.npz'):
        checkpoint.load(tmp_path / 'a.npz')


def test_names_that_are_paths(tmp_path):
    for key in ('../../etc/cron.d/x', '/etc/passwd', 'a//b', 'a/../b', 'c:\\x', ''):
        with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as f:
            f.writestr(f'{key}.npy', _header((1,)) + bytes(4))
        with pytest.raises(UserError, match='is not the name of an array'):
            checkpoint.load(tmp_path / 'a.npz')


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    array = np.zeros((3, 4), np.float32)
    array[1, 2] = value
    np.savez(tmp_path / 'a.npz', **{'head/kernel': array})
    with pytest.raises(UserError, match="a.npz: the array 'head/kernel' has 1 values .of 12."):
        checkpoint.load(tmp_path / 'a.npz')
    formats.open_weights(tmp_path / 'a.npz')  # only reading shows it


def test_large_finite_values_are_no_error(tmp_path):
    array = np.full(1000, 3e38, np.float32)  # their sum overflows
    np.savez(tmp_path / 'a.npz', **{'head/bias': array})
    np.testing.assert_array_equal(checkpoint.load(tmp_path / 'a.npz')['head']['bias'], array)


class _Code:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_no_code_of_a_file_runs(tmp_path):
    torch = pytest.importorskip('torch')
    witness = str(tmp_path / 'witness')
    (tmp_path / 'a.pth').write_bytes(pickle.dumps({'head.weight': _Code(witness)}))
    torch.save({'head.weight': _Code(witness)}, tmp_path / 'b.pth')
    np.savez(tmp_path / 'c.npz', **{'head/bias': np.array([_Code(witness)], dtype=object)})
    for name in ('a.pth', 'b.pth', 'c.npz'):
        with pytest.raises(UserError, match='could run code') as e:
            checkpoint.load(tmp_path / name)
        assert name in str(e.value)
    assert not (tmp_path / 'witness').exists()


def test_damaged_and_renamed_files(tmp_path):
    torch = pytest.importorskip('torch')
    from safetensors.numpy import save_file

    params = npz.flatten(_vit())
    save_file(params, tmp_path / 'good.safetensors')
    torch.save({k: torch.from_numpy(v) for k, v in params.items()}, tmp_path / 'good.pth')
    np.savez(tmp_path / 'good.npz', **params)
    contents = {
        kind: (tmp_path / f'good.{kind}').read_bytes() for kind in ('npz', 'pth', 'safetensors')
    }
    for kind, data in contents.items():
        bad = tmp_path / f'bad.{kind}'
        for cut in (0, 5, len(data) // 2, len(data) - 1):
            bad.write_bytes(data[:cut])
            with pytest.raises(UserError, match=str(bad)):
                checkpoint.load(bad)
        # Under another name a file is still what it is.
        for name in contents:
            (tmp_path / f'renamed.{name}').write_bytes(data)
            loaded = npz.flatten(checkpoint.load(tmp_path / f'renamed.{name}'))
            assert loaded.keys() == params.keys()
    huge = json.dumps(
        {'a': {'dtype': 'F32', 'shape': [50_000, 50_000], 'data_offsets': [0, 10**10]}}
    )
    (tmp_path / 'huge.safetensors').write_bytes(struct.pack('<Q', len(huge)) + huge.encode())
    with pytest.raises(UserError, match='huge.safetensors is not a readable'):
        checkpoint.load(tmp_path / 'huge.safetensors')
    save_file({'a': np.arange(3)}, tmp_path / 'whole.safetensors')
    with pytest.raises(UserError, match="'a' has type I64"):
        checkpoint.load(tmp_path / 'whole.safetensors')


def test_folders_that_are_no_weights(tmp_path):
    with pytest.raises(UserError, match='is a folder without config.json'):
        checkpoint.load(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match='has no weights: none of model.safetensors'):
        checkpoint.load(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match='cannot read .*config.json'):
        checkpoint.load(tmp_path)
    (tmp_path / 'config.json').write_text('{"id2label": 3}')
    with pytest.raises(UserError, match='config.json" is damaged|config.json is damaged'):
        checkpoint.load(tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    index = {'weight_map': {'a': '../../secret.safetensors'}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='not in the folder'):
        checkpoint.load(tmp_path)


def test_mixed_up_and_wrong_variant(tmp_path):
    params = _vit()
    checkpoint.save(tmp_path / 'a.npz', params)
    with pytest.raises(UserError, match='a.npz does not fit the model.*\n.*hidden|missing'):
        model_folder.load(tmp_path / 'a.npz', variant='ViT-S_32')
    with pytest.raises(UserError, match='does not fit the model'):
        model_folder.load(tmp_path / 'a.npz', variant='Mixer-B_16')
    block = params['Transformer']['encoderblock_1']
    block['MlpBlock_0']['Dense_0'], block['MlpBlock_0']['Dense_1'] = (
        block['MlpBlock_0']['Dense_1'], block['MlpBlock_0']['Dense_0'],
    )  # fmt: skip
    checkpoint.save(tmp_path / 'mixed.npz', params)
    with pytest.raises(UserError, match=r'encoderblock_1/MlpBlock_0/Dense_0/kernel: has shape'):
        model_folder.load(tmp_path / 'mixed.npz')


@pytest.mark.parametrize('tokens', [{}, {'dist': np.zeros((1, 1, 8), np.float32)}])
def test_no_places_for_patches(tmp_path, tokens):
    params = _vit() | tokens
    params['Transformer']['posembed_input']['pos_embedding'] = np.zeros((1, 1, 8), np.float32)
    checkpoint.save(tmp_path / 'a.npz', params)
    with pytest.raises(UserError, match='positions are not a square grid'):
        model_folder.load(tmp_path / 'a.npz')


@pytest.mark.parametrize(
    'case, block', [('vit_token', 'encoderblock'), ('mixer', 'MixerBlock'), ('vit_gap', '')]
)
def test_a_model_with_a_block_missing_is_no_smaller_one(tmp_path, case, block):
    arrays = dict(np.load(FIXTURES / f'{case}.checkpoint.npz'))
    if not block:  # and one of three, in between
        block = 'encoderblock'
        arrays |= {n.replace('block_1/', 'block_2/'): x for n, x in arrays.items()}
        arrays = {n: x for n, x in arrays.items() if f'{block}_1/' not in n}
    else:
        arrays = {n: x for n, x in arrays.items() if f'{block}_0/' not in n}
    np.savez(tmp_path / 'a.npz', **arrays)
    with pytest.raises(UserError, match=rf'a.npz.*{block}_\d.* is missing'):
        model_folder.load(tmp_path / 'a.npz')


def test_an_image_tower_beside_texts_is_no_classifier(tmp_path):
    arrays = dict(np.load(FIXTURES / 'vit_token.checkpoint.npz'))
    tower = {f'params/img/{name}': x for name, x in arrays.items()}
    np.savez(tmp_path / 'lit.npz', **tower, **{'params/txt/head/bias': np.ones(3, np.float32)})
    loaded = model_folder.load(tmp_path / 'lit.npz')
    assert loaded.class_names == () and 'head' not in loaded.params
    assert 'is left out: it knows no classes' in ' '.join(loaded.source['notes'])
    assert 'head' in checkpoint.load(tmp_path / 'lit.npz')
