"""scripts/check_parity.py and its references: PyTorch against ours, and how the check fails."""

import importlib.util
import json
import os
import pathlib
import re
import struct
import zlib

import jax
import modules
import numpy as np
import pytest

from vit_jax import models
from vit_jax.analysis import compare
from vit_jax.checkpoint import npz
from vit_jax.data import decode
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

ROOT = pathlib.Path(__file__).parents[2]
FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'conformance'
CASES = {
    name: case
    for name, case in json.loads((FIXTURES / 'index.json').read_text()).items()
    if (FIXTURES / f'{name}.checkpoint.npz').exists()
}


@pytest.fixture(scope='module')
def parity():
    pytest.importorskip('torch', reason='PyTorch is not installed (requirements-test.txt)')
    from benchmarks import parity

    return parity


@pytest.fixture
def check(parity):
    return lambda model, **options: parity.check(str(model), **{'limit': 2, 'batch': 1} | options)


def write_model(path, config, size, *, head='random'):
    """A file of made-up weights, nowhere zero (but for the head on request), of trained scale."""
    model = models.from_config(config)
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = modules.shapes(model, image, train=False)
    rng = np.random.default_rng(0)

    def array(keys, leaf):
        name = '/'.join(key.key for key in keys)
        values = rng.standard_normal(leaf.shape, np.float32)
        if name.endswith('kernel'):  # keeps the variance
            is_query_key_value = re.search('/(query|key|value)/', name)
            inputs = leaf.shape[:1] if is_query_key_value else leaf.shape[:-1]
            return values / np.float32(np.prod(inputs) ** 0.5)
        if name.endswith('gn3/scale'):  # training starts at 0: a unit changes its input a little
            return 0.2 + 0.02 * values
        return 1 + 0.1 * values if name.endswith('scale') else 0.1 * values

    params = jax.tree_util.tree_map_with_path(array, shapes)
    if head == 'zero':
        params['head'] = jax.tree.map(np.zeros_like, params['head'])
    npz.save(path, params)
    return path


TINY = dict(
    num_classes=5,
    patches={'size': (8, 8)},
    hidden_size=32,
    transformer=dict(
        mlp_dim=48, num_heads=2, num_layers=2, dropout_rate=0.0, attention_dropout_rate=0.0
    ),
)


@pytest.mark.parametrize('name', CASES)
def test_reference_gives_the_originals_logits(name):
    torch = pytest.importorskip('torch', reason='PyTorch is not installed')
    from benchmarks import torch_reference as reference

    expected = np.load(FIXTURES / f'{name}.expected.npz')
    weights = reference.read_weights(FIXTURES / f'{name}.checkpoint.npz')
    classifier = CASES[name]['config'].get('classifier', '')
    images = torch.from_numpy(expected['images'])
    outputs = reference.build(weights, classifier=classifier, image_size=images.shape[1])(images)
    np.testing.assert_allclose(outputs['logits'], expected['logits'], rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', [n for n in CASES if 'unpooled' not in n])  # shapes do not tell it
def test_our_models_agree_with_pytorch(check, name):
    result = check(FIXTURES / f'{name}.checkpoint.npz', tolerance=1e-5)
    assert result['passed']
    (reference, *_) = result['references']
    uses_transformers = CASES[name]['config'].get('classifier') == 'token' and 'hybrid' not in name
    expected = 'ViT of transformers' if uses_transformers else 'benchmarks/torch_reference.py'
    assert reference['name'].startswith(expected)
    blocks = [row for row in reference['rows'] if 'lock_' in row]
    assert len(blocks) == 2
    for row in reference['rows'].values():
        assert row['ours_minus_reference_in_float64']['max'] < 1e-12
        assert row['ours_minus_reference']['agree'] == row['ours_minus_reference']['vectors']
    assert result['weights_read'] == 'from the file, by code of its own'
    assert reference['erf_gelu']['max'] > 20 * reference['verdict']['difference']


def test_deit_and_mlp_head(check, tmp_path):
    for extra in (dict(distilled=True), dict(mlp_head=True)):
        path = write_model(tmp_path / 'm.npz', TINY | extra, 16)
        result = check(path, tolerance=1e-5)
        assert result['passed']
        assert result['references'][0]['name'].startswith('benchmarks/torch_reference.py')


def test_unpooled_model_folder(check, tmp_path):
    config = CASES['vit_token_unpooled']['config']
    model_config = {k: v for k, v in config.items() if k != 'num_classes'}
    model_folder.save(
        tmp_path / 'model',
        npz.open_file(FIXTURES / 'vit_token_unpooled.checkpoint.npz').read(),
        model_config=model_config,
        class_names=[str(i) for i in range(7)],
        preprocess=model_folder.Preprocess(crop=32),
        source={},
    )
    result = check(tmp_path / 'model', tolerance=1e-5)
    assert result['passed']
    assert result['references'][0]['rows']['logits']['ours_minus_reference']['vectors'] == 2 * 17


def test_perturbed_array_fails_from_its_block_on(check, parity):
    path = FIXTURES / 'vit_token.checkpoint.npz'  # published names; both spellings mean the same
    weights = np.load(path)
    for key in ('MlpBlock_3/Dense_0/kernel', 'MlpBlock_0/Dense_0/kernel'):
        name = f'Transformer/encoderblock_1/{key}'
        perturbed = parity._perturb(weights, name)
        changed = [n for n in weights if not np.array_equal(weights[n], perturbed[n])]
        assert changed == ['Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel']
    result = check(path, perturb=name)
    assert not result['passed']
    rows = result['references'][0]['rows']
    off = [name for name, row in rows.items() if not row['is_rounding']]
    assert off == ['encoderblock_1', 'pre_logits', 'logits']


def test_perturbation_that_is_none_is_refused(check, tmp_path):
    path = write_model(tmp_path / 'm.npz', TINY, 16, head='zero')
    with pytest.raises(UserError, match=r'no array head/kernle; nearest: head/kernel'):
        check(path, perturb='head/kernle')
    with pytest.raises(UserError, match='head/kernel is all zeros'):
        check(path, perturb='head/kernel')


def test_zero_head_is_compared_by_the_features(check, tmp_path, capsys):
    path = write_model(tmp_path / 'm.npz', TINY | dict(representation_size=12), 16, head='zero')
    result = check(path)
    assert result['passed'] and result['zero_head']
    (reference,) = result['references']
    assert reference['verdict']['output'] == 'pre_logits'
    assert reference['rows']['logits']['largest_value'] == 0
    assert 'prove nothing' in capsys.readouterr().out
    result = check(path, perturb='pre_logits/kernel')
    assert not result['passed']
    assert result['references'][0]['verdict']['output'] == 'pre_logits'


def test_images_and_limit(check):
    photos = FIXTURES.parent / 'data' / 'photos'
    result = check(FIXTURES / 'vit_token.checkpoint.npz', images=[str(photos)], limit=2, batch=2)
    assert result['images'].startswith('2 images from ')
    assert result['references'][0]['rows']['logits']['ours_minus_reference']['vectors'] == 2


def test_references_that_cannot_be_had(check):
    with pytest.raises(UserError, match='transformers has only'):
        check(FIXTURES / 'vit_gap.checkpoint.npz', reference='transformers')
    with pytest.raises(UserError, match='timm has no such model'):
        check(FIXTURES / 'vit_token.checkpoint.npz', reference='timm')


def test_rotary_positions_that_no_reference_has_are_refused(check, tmp_path):
    """The arrays are those of a plain ViT."""
    params = npz.open_file(FIXTURES / 'vit_token.checkpoint.npz').read()
    rotary = {'rotary': {'form': 'axial', 'theta': 100.0}}
    npz.save(tmp_path / 'a.npz', params, rotary)
    with pytest.raises(UserError, match='has rotary positions, of weights alone'):
        check(tmp_path / 'a.npz')


def test_real_weights(check, shared_dir):
    pytest.importorskip('transformers')
    result = check(shared_dir / 'weights' / 'deit_ti16_imagenet1k.npz', limit=1)
    assert result['passed'] and result['variant'] == 'ViT-Ti_16'
    assert result['references'][0]['rows']['encoderblock_11']['largest_value'] > 10


def test_hugging_face_folder_is_loaded_by_transformers_itself(check, run_script, tmp_path):
    pytest.importorskip('transformers')
    source, folder = FIXTURES / 'vit_token.checkpoint.npz', tmp_path / 'hf'
    result = run_script('convert.py', source, folder, '--to', 'huggingface')
    assert result.returncode == 0, result.stderr
    result = check(folder, tolerance=1e-5)
    assert result['passed']
    assert result['weights_read'].startswith('by transformers itself, with the settings in ')


def test_what_a_folder_does_not_tell_of_its_input_is_the_same_on_both_sides(check, tmp_path):
    """transformers assumes nothing; we assume ImageNet's, and say so."""
    transformers = pytest.importorskip('transformers')
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.Dinov2Config(**sizes, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    result = check(tmp_path)
    assert result['passed'] and "ImageNet's mean and deviation" in ' '.join(result['notes'])
    assert check(tmp_path, normalization=((0.4,) * 3, (0.1,) * 3))['passed']
    # Its class has a mean and a deviation, too: CLIP's.
    settings = {'image_processor_type': 'BitImageProcessor', 'crop_size': 28}
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(settings))
    assert check(tmp_path)['passed']
    assert not check(tmp_path, normalization=((0.4,) * 3, (0.1,) * 3))['passed']


@pytest.mark.parametrize(
    'cases',
    [
        ('12 heads', 'not square', 'rotary'),
        pytest.param(
            ('relu', 'erf GELU', 'epsilon 1e-2', 'pooling', 'normalisation', 'scale of pixels'),
            marks=pytest.mark.slow,
        ),
    ],
    ids=len,
)
def test_the_check_notices_when_our_side_ignores_what_a_folder_states(parity, cases):
    pytest.importorskip('transformers')
    from benchmarks import parity_self_test

    lines = []
    assert parity_self_test.run(lines.append, cases)
    for line in lines:  # of another size, there is nothing to compare
        ends = 'refused' if line.startswith('not square') else 'FAIL'
        assert 'as stated: PASS' in line and f'ignored: {ends}' in line


def test_the_check_notices_when_our_side_ignores_timms_pooling(parity):
    pytest.importorskip('timm', reason='timm is not installed')
    from benchmarks import parity_self_test

    lines = []
    assert parity_self_test.run(lines.append, ['mean of patches'])
    assert 'as stated: PASS' in lines[0] and 'ignored: FAIL' in lines[0]


def test_the_self_test_fails_where_the_check_passes(parity, monkeypatch):
    from benchmarks import parity_self_test

    monkeypatch.setattr(parity_self_test, '_ends', lambda folder, ours: 'PASS')
    monkeypatch.setattr(parity_self_test, '_write', lambda folder, *_: _write_configs(folder))
    lines = []
    assert not parity_self_test.run(lines.append, ['relu'])
    assert lines == ['relu             as stated: PASS     ignored: PASS      WRONG']


def _write_configs(folder):
    folder.mkdir()
    for name in ('config', 'preprocessor_config'):
        (folder / f'{name}.json').write_text('{}')


def test_timm(check, shared_dir):
    pytest.importorskip('timm', reason='timm is not installed')
    path = shared_dir / 'weights' / 'deit_ti16_imagenet1k.npz'
    assert check(path, limit=1, reference='timm')['passed']


FULL_SIZE = {
    'ViT-B_16': dict(num_classes=21843, representation_size=768),  # as in imagenet21k
    'ViT-B_32': dict(num_classes=1000),
    'ViT-L_16': dict(num_classes=1000),
    'R50+ViT-B_16': dict(num_classes=1000),
    'R26+ViT-S_32': dict(num_classes=1000),
    'R+ViT-Ti_16': dict(num_classes=1000),
    'Mixer-B_16': dict(num_classes=1000),
    'DeiT-B_16': dict(num_classes=1000),
    'ViT-H_14': dict(num_classes=1000),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', FULL_SIZE)
def test_full_size(check, tmp_path, name):
    config = models.variants.get_config(name).to_dict() | FULL_SIZE[name]
    if name == 'ViT-H_14':  # one block of its width: all of it takes 20 GB
        config['transformer']['num_layers'] = 1
    path = write_model(tmp_path / 'x.npz', config, 224)
    result = check(path, tolerance=1e-5)
    path.unlink()
    assert result['passed']
    rows = result['references'][0]['rows'].values()
    assert max(row['ours_minus_reference_in_float64']['max'] for row in rows) < 1e-11


def test_command_line(run_script, tmp_path):
    pytest.importorskip('torch', reason='PyTorch is not installed (requirements-test.txt)')
    model = FIXTURES / 'vit_token.checkpoint.npz'
    result = run_script('check_parity.py', '--model', model, '--json', '--perturb', 'cls')
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    assert found['passed'] is False and found['perturbed'] == 'cls'
    assert 'FAIL: logits differ by' in result.stderr
    result = run_script('check_parity.py', '--model', tmp_path / 'none.npz')
    assert result.returncode == 2
    assert result.stderr.startswith('check_parity.py: ') and result.stderr.count('\n') == 1


def test_images_that_cannot_be_read_are_one_line(run_script, tmp_path, monkeypatch):
    pytest.importorskip('torch', reason='PyTorch is not installed (requirements-test.txt)')
    monkeypatch.setattr(decode, 'MAX_BYTES', 1000)
    os.mkfifo(tmp_path / 'pipe.jpg')  # would block
    (tmp_path / 'large.jpg').write_bytes(bytes(1001))
    (tmp_path / 'text.jpg').write_text('no image')
    content = b'\x89PNG\r\n\x1a\n'
    header = struct.pack('>IIBBBBB', 50_000, 50_000, 8, 2, 0, 0, 0)  # claims 7 GB of pixels
    for kind, data in ((b'IHDR', header), (b'IDAT', b'')):
        content += struct.pack('>I', len(data)) + kind + data
        content += struct.pack('>I', zlib.crc32(kind + data))
    (tmp_path / 'bomb.png').write_bytes(content)
    model = FIXTURES / 'vit_token.checkpoint.npz'
    for name, why in (
        ('pipe.jpg', 'it is not a regular file'),
        ('large.jpg', 'too many to read'),
        ('text.jpg', ''),
        ('bomb.png', 'pixels'),
    ):
        result = run_script('check_parity.py', '--model', model, '--images', tmp_path / name)
        assert result.returncode == 2
        assert result.stderr.startswith(f'check_parity.py: cannot use image {tmp_path / name}: ')
        assert why in result.stderr and result.stderr.count('\n') == 1


def test_without_pytorch(run_script, monkeypatch):
    find_spec = importlib.util.find_spec
    hidden = lambda name, *a: None if name == 'torch' else find_spec(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, 'find_spec', hidden)
    result = run_script('check_parity.py', '--model', FIXTURES / 'vit_token.checkpoint.npz')
    assert result.returncode == 2
    assert 'torch is not installed. `bash scripts/setup.sh --test`' in result.stderr


# The verdict, without a model.


def row(ours=0.0, theirs=0.0):
    exact = np.ones((1, 2, 3))
    found = compare.ParityRow()
    found.add(exact + ours, exact + theirs, exact, exact)
    return found


def test_limit_is_1e4_or_twice_the_rounding():
    assert compare.parity_verdict({'logits': row(9e-5)}, zero_head=False).passed
    verdict = compare.parity_verdict({'logits': row(2e-4)}, zero_head=False)
    assert not verdict.passed and verdict.limit == 1e-4
    verdict = compare.parity_verdict({'logits': row(8e-4, 3e-4)}, zero_head=False)
    assert verdict.passed and verdict.limit == pytest.approx(6e-4)
    assert not compare.parity_verdict({'logits': row(1.0e-3, 3e-4)}, zero_head=False).passed
    # A given tolerance replaces both.
    assert not compare.parity_verdict(
        {'logits': row(8e-4, 3e-4)}, zero_head=False, tolerance=4e-4
    ).passed
    assert compare.parity_verdict({'logits': row(2e-4)}, zero_head=False, tolerance=3e-4).passed


def test_nan_never_passes():
    for rows in ({'logits': row(np.nan)}, {'logits': row(0.0, np.nan)}):
        verdict = compare.parity_verdict(rows, zero_head=False)
        assert not verdict.passed
        assert not rows['logits'].is_rounding
    difference = compare.Difference()
    difference.add(np.ones((1, 2)), np.array([[np.nan, 1.0]]))
    difference.add(np.ones((1, 2)), np.ones((1, 2)))
    assert np.isnan(difference.max) and difference.to_dict()['max'] is None


def test_difference_over_batches_is_that_over_all():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 3, 4))
    whole, parts = compare.Difference(), compare.Difference()
    whole.add(a, b)
    parts.add(a[:2], b[:2])
    parts.add(a[2:], b[2:])
    assert whole.max == parts.max == np.abs(a - b).max()
    assert whole.worst == parts.worst == np.abs(a - b).max(axis=(1, 2)).argmax()
    assert whole.mean == pytest.approx(parts.mean) == pytest.approx(np.abs(a - b).mean())
    assert (whole.agree, whole.vectors) == (parts.agree, 15)
    with pytest.raises(ValueError, match='cannot be compared'):
        whole.add(a, b[:, :1])


def test_made_up_images(parity):
    images = parity.made_up_images(2, 33)
    assert images.shape == (2, 33, 33, 3) and images.dtype == np.float32
    assert images.min() == -1 and images.max() == 1
    np.testing.assert_array_equal(images, parity.made_up_images(2, 33))
    assert not np.array_equal(images, parity.made_up_images(2, 33, seed=1))
