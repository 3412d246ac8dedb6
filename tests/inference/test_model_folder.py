import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import ml_collections
import modules
import numpy as np
import pytest
from PIL import Image

from vit_jax import checkpoint, models, variants
from vit_jax.checkpoint import formats, npz
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'conformance'

CONFIG = {
    'model_name': None,
    'patches': {'size': (4, 4)},
    'hidden_size': 8,
    'transformer': {
        'mlp_dim': 16,
        'num_heads': 2,
        'num_layers': 2,
        'attention_dropout_rate': 0.0,
        'dropout_rate': 0.0,
    },
    'classifier': 'token',
    'representation_size': None,
}
NAMES = ('a rose', 'Gänseblümchen', 'x/y')


def _params(config=CONFIG, classes=3, size=12, seed=0):
    model = models.from_config(config, num_classes=classes)
    shapes = modules.shapes(model, np.zeros((1, size, size, 3), np.float32), train=False)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def _save(folder, params=None, **changes):
    arguments = {
        'model_config': ml_collections.ConfigDict(CONFIG),
        'class_names': NAMES,
        'preprocess': Preprocess(crop=12),
        'source': {'dataset': 'made up', 'steps': 3},
    }
    model_folder.save(folder, params or _params(), **(arguments | changes))
    return folder


def test_round_trip(tmp_path):
    params = _params()
    folder = _save(tmp_path / 'run' / 'model', params)
    assert sorted(os.listdir(folder)) == ['README.md', 'model.json', 'params.npz']
    assert os.listdir(tmp_path / 'run') == ['model']
    loaded = model_folder.load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.class_names == NAMES
    assert loaded.image_size == 12
    assert loaded.preprocess == Preprocess(crop=12)
    assert loaded.source == {'dataset': 'made up', 'steps': 3}
    assert loaded.model_config == CONFIG
    images = np.random.default_rng(1).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    expected, logits = (
        jax.jit(functools.partial(model.apply, train=False))({'params': weights}, images)
        for model, weights in (
            (models.from_config(CONFIG, num_classes=3), params),
            (loaded.model, loaded.params),
        )
    )
    np.testing.assert_array_equal(logits, expected)
    assert np.std(logits) > 0.1


def test_model_json_says_all_that_is_needed(tmp_path):
    config = variants.get_config('ViT-S_32')
    config.transformer.num_layers = 1
    params = _params(config, size=32)
    config.dtype = 'bfloat16'
    folder = _save(
        tmp_path / 'm',
        params,
        model_config=config,
        preprocess=Preprocess(crop=32),
    )
    description = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
    assert description['format_version'] == 1
    assert description['architecture']['variant'] == 'ViT-S_32'
    assert description['architecture']['num_classes'] == 3
    assert description['architecture']['config']['patches'] == {'size': [32, 32]}
    assert 'dtype' not in description['architecture']['config']
    assert description['value_range'] == [-1, 1]
    assert description['class_names'] == list(NAMES)
    assert description['versions']['jax'] == jax.__version__
    assert model_folder.load(folder).model_config['transformer']['num_layers'] == 1


def test_saving_again_replaces_the_folder(tmp_path):
    folder = _save(tmp_path / 'm')
    (folder / 'notes.txt').write_text('x')
    params = _params(seed=5)
    _save(folder, params)
    assert sorted(os.listdir(folder)) == ['README.md', 'model.json', 'params.npz']
    assert os.listdir(tmp_path) == ['m']
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(folder).params, params)


def test_failed_save_leaves_the_old_folder(tmp_path):
    folder = _save(tmp_path / 'm')
    before = (folder / 'model.json').read_bytes()
    with pytest.raises(TypeError, match='not JSON serializable'):
        _save(folder, _params(seed=1), source={'x': object()})
    assert (folder / 'model.json').read_bytes() == before
    assert os.listdir(tmp_path) == ['m']
    model_folder.load(folder)


def test_save_refuses_what_does_not_agree(tmp_path):
    with pytest.raises(ValueError, match='2 class names for a head of 3'):
        _save(tmp_path / 'm', class_names=NAMES[:2])
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'a.jpg').write_bytes(b'x')
    with pytest.raises(UserError, match='is not a model folder'):
        _save(tmp_path / 'photos')
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(UserError, match='cannot write .*Not a directory'):
        _save(tmp_path / 'file' / 'm')
    assert sorted(os.listdir(tmp_path)) == ['file', 'photos']


def _changed(**arrays):
    """The parameters with these arrays, names joined by '/'; without those that are None."""
    flat = npz.flatten(_params()) | arrays
    kept = {name: leaf for name, leaf in flat.items() if leaf is not None}
    return npz.nest(kept, pathlib.Path('made up'))


@pytest.mark.parametrize(
    ('params', 'changes', 'words'),
    [
        ({'reg': np.ones((1, 4, 8), np.float32)}, {}, 'reg: unknown to the model'),
        ({'cls': None}, {}, '(?s)the weights do not agree.*cls .the checkpoint has no class token'),
        ({'head/bias': None}, {}, 'the weights do not agree'),
        ({'embedding/bias': np.ones(9, np.float32)}, {}, r'has shape \(9,\), expected \(8,\)'),
        ({'head/bias': np.array([0, np.nan, 0], np.float32)}, {}, 'head/bias has 1 values .* NaN'),
        (
            {}, {'preprocess': Preprocess(crop=16)},
            r'has position embeddings \(1, 10, 8\), the model has \(1, 17, 8\) for images of 16',
        ),
        ({}, {'preprocess': Preprocess(crop=13)}, 'no model can be built as described'),
        ({}, {'preprocess': Preprocess(crop=40_000)}, 'image_size is 40000, expected 1 to 8,192'),
        ({}, {'class_names': (1, 2, 3)}, r'class_names\[0\] is 1, expected a text'),
        ({}, {'model_config': CONFIG | {'unknown': 3}}, 'no model can be built as described'),
        ({}, {'model_config': {}}, "could not be loaded if it were written: 'patches'"),
    ],
)  # fmt: skip
def test_save_refuses_what_load_would_refuse(tmp_path, params, changes, words):
    with pytest.raises(UserError, match=words):
        _save(tmp_path / 'm', _changed(**params), **changes)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_head(tmp_path):
    params = {name: leaf for name, leaf in _params().items() if name != 'head'}
    loaded = model_folder.load(_save(tmp_path / 'm', params, class_names=()))
    assert loaded.class_names == () and loaded.model.num_classes == 0
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_damaged_folders(tmp_path):
    with pytest.raises(UserError, match='no such checkpoint file'):
        model_folder.load(tmp_path / 'none')
    folder = _save(tmp_path / 'run' / 'model')
    with pytest.raises(UserError, match=r'no model.json; did you mean .*run/model\?'):
        model_folder.load(tmp_path / 'run')
    with pytest.raises(UserError, match='knows its variant'):
        model_folder.load(folder, variant='ViT-B_16')

    good = (folder / 'model.json').read_text(encoding='utf-8')
    for text, message in [
        (good[:100], 'is damaged'),
        ('[]', 'is damaged'),
        (good.replace('"image_size"', '"size"'), 'is damaged .image_size is missing'),
        (good.replace('"format_version": 1', '"format_version": 2'), 'newer vit_jax'),
        (good.replace('vit_jax model', 'other'), 'does not describe a model'),
        (good.replace('"mlp_dim": 16', '"mlp_dim": 24'), r'Dense_0/kernel: has shape \(8, 16\)'),
        (good.replace('"num_classes": 3', '"num_classes": 4'), 'do not agree'),
        (good.replace('"image_size": 12', '"image_size": 16'), 'do not agree'),
        (re.sub('"(image_size|crop)": 12', r'"\1": 13', good), 'no model can be built'),
        (good.replace('"classifier": "token"', '"classifier": "tokn"'), 'no model can be built'),
    ]:
        (folder / 'model.json').write_text(text, encoding='utf-8')
        with pytest.raises(UserError, match=message):
            model_folder.load(folder)
    (folder / 'model.json').write_text(good, encoding='utf-8')
    checkpoint.save(folder / 'params.npz', _params(seed=9))
    with pytest.raises(UserError, match='SHA-256'):
        model_folder.load(folder)
    os.unlink(folder / 'params.npz')
    with pytest.raises(UserError, match='has no params.npz'):
        model_folder.load(folder)


@pytest.mark.parametrize('classifier', ['token', 'gap'])
@pytest.mark.parametrize('representation_size', [None, 6])
def test_bare_file_of_unnamed_architecture(tmp_path, classifier, representation_size):
    config = CONFIG | {'classifier': classifier, 'representation_size': representation_size}
    params = _params(config)
    checkpoint.save(tmp_path / 'a.npz', params)
    loaded = model_folder.load(tmp_path / 'a.npz')
    assert loaded.model_config == config
    assert loaded.image_size == loaded.preprocess.crop == 12
    assert loaded.class_names == ('class 0', 'class 1', 'class 2')
    assert loaded.source == {'file': str(tmp_path / 'a.npz'), 'format': 'Google .npz'}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def _zeros(config, classes, size):
    """Full-size parameters that take no memory (one zero, seen many times)."""
    shapes = modules.shapes_of(config, classes, size)
    return jax.tree.map(lambda x: np.broadcast_to(np.float32(1), x.shape), shapes)


def _pretend(monkeypatch, params, settings={}):  # noqa: B006
    """Any file holds `params`, and says these settings."""
    weights = checkpoint.Weights('made_up.npz', 'Google .npz', params, settings=settings)
    if 'posembed_input' not in params.get('Transformer', {'posembed_input': 0}):
        weights = dataclasses.replace(weights, image_size=64)  # nothing else tells it
    monkeypatch.setattr(formats, 'open_weights', lambda path, **kwargs: weights)


@pytest.mark.parametrize('name', variants.VARIANTS)
def test_variant_is_inferred_from_shapes(name, monkeypatch):
    config = variants.get_config(name)
    size = 4 * variants.token_stride(config)[0]
    # Shapes tell neither rotary positions nor the activation.
    told = {'rotary': config['rotary'].to_dict()} if 'rotary' in config else {}
    _pretend(monkeypatch, _zeros(config, 11, size), told)
    opened = model_folder.open_model('made_up.npz')
    assert opened.model_config['model_name'] == name.replace('_quickgelu', '')
    assert opened.image_size == size
    assert len(opened.class_names) == 11
    if name in ('ViT-Ti_16', 'R+ViT-Ti_16', 'Mixer-S_32', 'DeiT-Ti_16'):  # one of each family
        model_folder.check(opened)


def test_a_head_of_too_many_classes_is_refused(monkeypatch):
    params = _params()
    head = {'kernel': np.zeros((8, 1)), 'bias': np.zeros(1)}
    params['head'] = {
        name: np.broadcast_to(np.float32(0), (*leaf.shape[:-1], 1_000_001))
        for name, leaf in head.items()
    }
    _pretend(monkeypatch, params)
    with pytest.raises(UserError, match='a head of 1,000,001 classes; at most 1,000,000 fit'):
        model_folder.open_model('made_up.npz')


def test_bare_file_with_variant(tmp_path, monkeypatch, caplog):
    _pretend(monkeypatch, _zeros(variants.get_config('ViT-S_32'), 2, 64))
    assert model_folder.load('a.npz', variant='ViT-S_32').image_size == 64
    with pytest.raises(UserError, match='a.npz does not fit the model'):
        model_folder.load('a.npz', variant='ViT-B_32')
    with pytest.raises(UserError, match='unknown variant .*ViT-B_16'):
        model_folder.load('a.npz', variant='B/32')


def test_zero_head_is_pointed_out(tmp_path, caplog):
    params = _params()
    params['head'] = {name: np.zeros_like(leaf) for name, leaf in params['head'].items()}
    checkpoint.save(tmp_path / 'a.npz', params)
    with caplog.at_level(logging.WARNING):
        model_folder.load(tmp_path / 'a.npz')
    assert 'head of' in caplog.text and 'all zeros' in caplog.text


def test_bare_file_that_is_no_vit(tmp_path):
    good = npz.flatten(_params())
    for drop, add, message in [
        ('', {'conv_root/kernel': np.ones((7, 7, 3, 64))}, 'gn_root/scale: missing'),
        ('', {'MixerBlock_0/LayerNorm_0/bias': np.ones(3)}, "'stem/kernel' is missing"),
        ('embedding/kernel', {}, "does not hold the weights .* 'embedding/kernel' is missing"),
        ('Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel', {}, 'Dense_0/kernel. is missing'),
        ('Transformer/posembed_input/pos_embedding', {}, "pos_embedding' is missing"),
        ('Transformer/encoder_norm/bias', {}, 'encoder_norm/bias: missing'),
        ('', {'extra/bias': np.ones(3)}, 'extra/bias: unknown'),
        ('', {'Transformer/posembed_input/pos_embedding': np.ones((1, 9, 8))}, 'not a square grid'),
    ]:
        flat = {name: leaf for name, leaf in good.items() if name != drop} | add
        np.savez(tmp_path / 'a.npz', **flat)
        with pytest.raises(UserError, match=message):
            model_folder.load(tmp_path / 'a.npz')


def test_real_weights(shared_dir):
    loaded = model_folder.load(shared_dir / 'weights' / 'deit_ti16_imagenet1k.npz')
    assert loaded.model_config['model_name'] == 'ViT-Ti_16'
    assert (loaded.image_size, len(loaded.class_names)) == (224, 1000)
    with np.load(shared_dir / 'weights' / 'deit_ti16_imagenet1k_reference.npz') as reference:
        images = (reference['images'].astype(np.float32) - 127.5) / 127.5
        apply = jax.jit(functools.partial(loaded.model.apply, train=False))
        logits = apply({'params': loaded.params}, images)
        np.testing.assert_allclose(logits, reference['logits'], rtol=0, atol=1e-4)


def test_a_folder_is_replaced_so_that_a_kill_loses_no_model(tmp_path):
    """What `files.atomic_folder` leaves when it is killed between its two renames."""
    old, new = _params(seed=1), _params(seed=2)
    killed = subprocess.Popen([sys.executable, '-c', ''])
    killed.wait()
    _save(tmp_path / f'.model.{killed.pid}.old', old)
    _save(tmp_path / f'.model.{killed.pid}.part', new)
    loaded = model_folder.load(tmp_path / 'model')
    jax.tree.map(np.testing.assert_array_equal, loaded.params, new)
    assert os.listdir(tmp_path) == ['model']


def test_what_a_running_writer_has_beside_the_folder_is_left_alone(tmp_path):
    running = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    try:
        part = tmp_path / f'.model.{running.pid}.part'
        part.mkdir()
        _save(tmp_path / 'model')
        assert sorted(os.listdir(tmp_path)) == [part.name, 'model']
    finally:
        running.communicate(b'\n')
    _save(tmp_path / 'model')
    assert os.listdir(tmp_path) == ['model']


def encoder(description):
    return description['architecture']['config']['transformer']


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda d: d['params'].update(file='../other/params.npz'), 'not a plain file name'),
        (lambda d: d['params'].update(file='/etc/passwd'), 'not a plain file name'),
        (lambda d: d['params'].update(file=['params.npz']), 'is damaged'),
        (lambda d: d.update(image_size=10**9), 'image_size is 1000000000, expected 1 to 8,192'),
        (lambda d: d.update(image_size='12'), "image_size is '12', expected a whole number"),
        (lambda d: d['preprocessing'].update(crop=10**9), 'preprocessing.crop is 1000000000'),
        (lambda d: d['preprocessing'].update(crop=16), 'do not agree'),
        (lambda d: encoder(d).update(num_layers=10**9), 'num_layers'),
        (lambda d: d['architecture']['config'].update(hidden_size=float('nan')), 'hidden_size'),
        (lambda d: d['architecture']['config'].update(patches=3), 'is damaged'),
        (lambda d: d['architecture'].update(config=3), 'expected an object'),
        (lambda d: d['architecture']['config'].update(unknown=3), 'no model can be built'),
        (lambda d: d['architecture'].update(num_classes=-1), 'is damaged'),
        (lambda d: d.update(class_names=[1, 2, 3]), r'class_names\[0\] is 1, expected a text'),
        (lambda d: d.update(class_names=['x' * 2000, 'b', 'c']), '2,000 characters'),
        (lambda d: d['preprocessing'].update(crop=12.0), 'crop is 12.0, expected a whole'),
        (lambda d: d['preprocessing'].update(inception_crop=1), 'expected true or false'),
        (lambda d: d['preprocessing'].update(resize=10**5), 'at most 8,192; got 100000'),
        (lambda d: d.update(value_range=[0, float('inf')]), r'value_range\[1\] is inf'),
        (lambda d: d.update(value_range=[0, 1, 2]), 'value_range is a list, expected a list of 2'),
        (lambda d: d.update(source=7), 'source is 7, expected an object'),
        (lambda d: d.clear(), 'does not describe'),
    ],
)  # fmt: skip
def test_a_description_from_elsewhere_is_not_trusted(tmp_path, change, words):
    folder = _save(tmp_path / 'model')
    (tmp_path / 'other').mkdir()
    shutil.copy(folder / 'params.npz', tmp_path / 'other' / 'params.npz')
    description = json.loads((folder / 'model.json').read_text())
    change(description)
    (folder / 'model.json').write_text(json.dumps(description))
    with pytest.raises(UserError, match=words):
        model_folder.load(folder)


@pytest.mark.parametrize('missing', ['kernel', 'bias'])
def test_weights_with_half_a_head(tmp_path, missing):
    weights = npz.open_file(FIXTURES / 'vit_token.checkpoint.npz').read()
    del weights['head'][missing]
    npz.save(tmp_path / 'half.npz', weights)
    with pytest.raises(
        UserError, match=f'do not agree with the architecture(.|\\n)*head/{missing}'
    ):
        model_folder.load(tmp_path / 'half.npz')


def test_a_description_nested_without_end(tmp_path):
    folder = _save(tmp_path / 'model')
    (folder / 'model.json').write_text('[' * 200_000)
    with pytest.raises(UserError, match='is damaged'):
        model_folder.load(folder)
    (folder / 'model.json').unlink()
    os.mkfifo(folder / 'model.json')
    with pytest.raises(UserError, match='no model.json'):
        model_folder.load(folder)


@pytest.mark.parametrize(
    'command',
    [
        ('predict.py', 'PHOTO'),
        ('evaluate.py', '--dataset', 'digits', '--split', 'train[:20]'),
        ('attention.py', '--what', 'filters', '--output', 'FOLDER/drawn'),
        ('summary.py',),
    ],
)
def test_released_names_are_models_of_every_command(command, run_script, tmp_path, monkeypatch):
    """A file that was downloaded before; without it, and offline, the message names --model."""
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('VIT_JAX_BASE_URL', 'http://127.0.0.1:9')  # nothing listens there
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('NO_PROXY', '*')
    photo = tmp_path / 'photo.png'
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(photo)
    words = [
        word.replace('PHOTO', str(photo)).replace('FOLDER', str(tmp_path)) for word in command[1:]
    ]
    missing = run_script(command[0], '--model', 'imagenet21k/ViT-B_16', *words)
    assert missing.returncode == 1 and missing.stderr.count('\n') == 1
    assert missing.stderr.endswith('or name it with --model FILE\n'), missing.stderr
    released = tmp_path / 'cache/vit_models/imagenet21k/ViT-B_16.npz'
    released.parent.mkdir(parents=True, exist_ok=True)
    params = _params(classes=10)
    npz.save(released, params)
    done = run_script(command[0], '--model', 'imagenet21k/ViT-B_16', *words)
    assert done.returncode == 0, done.stderr


def test_the_page_of_a_model_folder(tmp_path):
    """What was trained, on what, and how well; names cannot become markup."""
    names = ('rose', '[x](http://y)', '<b>\n# tulip')
    source = {'weights': 'ViT-Ti_16.npz', 'dataset': 'photos', 'train': 'train', 'test': 'test'}
    source |= {'steps': 1500, 'metrics': {'accuracy_test': 0.25}}
    page = (_save(tmp_path / 'flowers', class_names=names, source=source) / 'README.md').read_text()
    for words in (
        r'3 classes an image shows: rose, \[x\](http://y), \<b\>\\n\# tulip.',
        'vit_jax predict --model flowers photo.jpg',
        r'Began from: ViT-Ti\_16.npz.',
        'Trained on: photos, split train, 1,500 steps.',
        Preprocess(crop=12).describe(),
        '| `accuracy_test` | 0.2500 |',
    ):
        assert words in page, page
    page = (_save(tmp_path / 'plain', source={}) / 'README.md').read_text()
    assert 'Nothing was measured' in page and 'Trained on' not in page and '\n\n\n' not in page
