"""vit_jax inspect_checkpoint and vit_jax list_models, and what they look things up in."""

import functools
import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest

from vit_jax import models
from vit_jax.analysis import counts
from vit_jax.checkpoint import catalog, inspection, npz
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

FIXTURES = pathlib.Path(__file__).parent / 'fixtures' / 'conformance'


@pytest.fixture
def script(monkeypatch, run_script):
    """Runs a script in this process: (exit status, standard output, standard error)."""
    monkeypatch.setattr('signal.signal', lambda *_: None)  # for the script's own process only

    def run(name, *words):
        done = run_script(f'{name}.py', *words)
        return done.returncode, done.stdout, done.stderr

    return run


def token_weights():
    """The arrays of a file in the published naming, as they are there."""
    with np.load(FIXTURES / 'vit_token.checkpoint.npz') as file:
        return dict(file)


def test_inspection_of_a_published_file():
    path = FIXTURES / 'vit_token_pre_logits.checkpoint.npz'
    found = inspection.inspect(path)
    assert found.format == 'Google .npz'
    assert (found.image_size, found.num_classes, found.num_parameters) == (32, 7, 24_871)
    assert found.variant == (
        'no known variant (ViT, patch 8x8, hidden size 32, 2 layers, 4 heads, MLP 64)'
    )
    assert found.unusual == (
        'it has a layer pre_logits (dense, tanh), which fine-tuning leaves out',
    )
    assert found.mib == path.stat().st_size / 2**20
    arrays = {array.name: array for array in found.arrays}
    with np.load(path) as file:
        kernel = file['Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel']
    array = arrays['Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel']
    assert (array.shape, array.dtype) == ((32, 64), 'float32')
    assert array.mean == pytest.approx(kernel.mean(), abs=1e-6)
    assert array.std == pytest.approx(kernel.std(), rel=1e-5)
    assert (array.min, array.max) == (kernel.min(), kernel.max())
    text = f'{found}\n{found.table()}'
    assert re.search(r'\n  parameters  24,871 in 42 arrays\n', text)
    assert re.search(
        r'\nTransformer/encoderblock_1/MlpBlock_0/Dense_0/kernel +32x64 +float32 ', text
    )


def test_inspection_of_other_families():
    found = inspection.inspect(FIXTURES / 'hybrid_stem.checkpoint.npz')
    assert 'hybrid, patch 8x8, hidden size 32' in found.variant and found.image_size == 64
    found = inspection.inspect(FIXTURES / 'mixer.checkpoint.npz')
    assert found.variant == 'no known variant (Mixer, patch 8x8, hidden size 32, 2 layers, MLP 64)'


def test_zero_head_half_precision_and_zero_arrays(tmp_path):
    weights = token_weights()
    weights['head/kernel'] = np.zeros_like(weights['head/kernel'])
    weights['cls'] = np.zeros_like(weights['cls'])
    weights['embedding/kernel'] = weights['embedding/kernel'].astype(np.float16)
    bfloat16 = weights['embedding/bias'].astype(ml_dtypes.bfloat16)
    weights['embedding/bias'] = bfloat16.view('V2')
    np.savez(tmp_path / 'x.npz', **weights)
    found = inspection.inspect(tmp_path / 'x.npz')
    assert found.unusual == (
        'the head is all zeros: these weights are for fine-tuning only',
        'all zeros, and not biases: cls',
        'bfloat16, not float32: embedding/bias',
        'float16, not float32: embedding/kernel',
    )


def test_no_head(tmp_path):
    weights = {k: v for k, v in token_weights().items() if not k.startswith('head/')}
    np.savez(tmp_path / 'x.npz', **weights)
    found = inspection.inspect(tmp_path / 'x.npz')
    assert found.num_classes == 0 and 'none (no head)' in str(found)
    assert found.unusual == ('it has no head: it gives features, and a head has to be trained',)


def test_optimizer_state(tmp_path):
    weights = {f'opt/target/{k}': v for k, v in token_weights().items()}
    weights |= {f'opt/state/momentum/{k}': v for k, v in token_weights().items()}
    np.savez(tmp_path / 'ViT-S_16.npz', **weights)
    found = inspection.inspect(tmp_path / 'ViT-S_16.npz')
    assert found.num_parameters == 24_135
    assert any('under opt/target/' in note for note in found.notes)
    assert any('opt/state' in note for note in found.notes)
    assert found.catalogue.startswith('NOT the size in the catalogue: 252.57 MiB for sam/ViT-S_16')


def test_not_square(tmp_path):
    weights = token_weights()
    name = 'Transformer/posembed_input/pos_embedding'
    weights[name] = weights[name][:, :-1]
    np.savez(tmp_path / 'x.npz', **weights)
    assert 'cannot be told' in str(inspection.inspect(tmp_path / 'x.npz'))


def test_catalogue_by_name_and_by_what_it_is(tmp_path, monkeypatch):
    mib = (FIXTURES / 'vit_token.checkpoint.npz').stat().st_size / 2**20
    data = (FIXTURES / 'vit_token.checkpoint.npz').read_bytes()
    entries = [
        catalog.Checkpoint('gs://vit_models/sam/ViT-B_16.npz', 'ViT-B_16', 224, 7, 2 * mib),
        catalog.Checkpoint('gs://vit_models/gsam/ViT-B_16.npz', 'ViT-B_16', 224, 7, mib),
    ]
    monkeypatch.setattr(catalog, 'CHECKPOINTS', entries)
    for folder in ('sam', 'gsam', 'anywhere'):
        (tmp_path / 'vit_models' / folder).mkdir(parents=True)
        (tmp_path / 'vit_models' / folder / 'ViT-B_16.npz').write_bytes(data)

    def catalogue(folder):
        return inspection.inspect(tmp_path / 'vit_models' / folder / 'ViT-B_16.npz').catalogue

    assert catalogue('sam').startswith('NOT the size in the catalogue')  # the folder tells which
    assert catalogue('gsam') == f'the catalogue has {mib:g} MiB for gsam/ViT-B_16.npz'
    assert catalogue('anywhere') == f'the catalogue has {mib:g} MiB for gsam/ViT-B_16.npz'


def test_inspect_checkpoint_reports_nan_and_goes_on(script, tmp_path):
    weights = token_weights()
    weights['cls'][0, 0, 3] = np.nan
    np.savez(tmp_path / 'nan.npz', **weights)
    status, out, err = script(
        'inspect_checkpoint',
        tmp_path / 'nan.npz',
        tmp_path / 'none.npz',
        FIXTURES / 'vit_token.checkpoint.npz',
    )
    assert status == 1
    assert re.search(
        r"unusual +.*nan\.npz: the array 'cls' has 1 values \(of 32\) that are NaN", out
    )
    assert re.search(r'\ncls +1x1x32 +float32 +cannot be used, see above\n', out)
    assert out.count('parameters  24,135 in 40 arrays') == 2
    assert 'no such checkpoint file' in err and 'Traceback' not in err


def test_inspect_checkpoint_of_a_model_folder(script, tmp_path):
    config = json.loads((FIXTURES / 'index.json').read_text())['vit_token']['config']
    names = ['daisy', 'rose', 'tulip', 'dandelion', 'sunflower', 'aster', 'lily']
    model_folder.save(
        tmp_path / 'model',
        npz.open_file(FIXTURES / 'vit_token.checkpoint.npz').read(),
        model_config={k: v for k, v in config.items() if k != 'num_classes'},
        class_names=names,
        preprocess=model_folder.Preprocess(crop=32),
        source={},
    )
    status, out, _ = script('inspect_checkpoint', tmp_path / 'model', '--brief')
    assert status == 0
    assert 'format      model folder of vit_jax' in out
    assert 'classes     7: daisy, rose, tulip, dandelion, sunflower, ...' in out
    assert 'cls ' not in out


def test_list_models(script):
    status, out, _ = script('list_models', 'B_16', 'imagenet21k/')
    rows = [line.split('  ') for line in out.splitlines()]
    names = [next(cell.strip() for cell in row if '.npz' in cell) for row in rows[1:]]
    assert status == 0
    assert names == [
        'imagenet21k/ViT-B_16.npz',
        'imagenet21k/R50+ViT-B_16.npz',
        'mixer_models/imagenet21k/Mixer-B_16.npz',
    ]
    assert 'ViT-B_16 ' in out and ' 394 ' in out and 'ImageNet 84.53 %' in out
    status, out, _ = script('list_models', 'imagenet21k/ViT-B_16', '--addresses')
    assert 'https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz' in out
    status, out, _ = script('list_models')
    count = len(catalog.CHECKPOINTS) + len(catalog.LIBRARY_CHECKPOINTS)
    assert len(out.splitlines()) == count + 2  # the head, and what ~ means
    status, out, _ = script('list_models', 'facebook/dinov2-small')
    assert re.search(r'dinov2 +~84 +518 +0 +facebook/dinov2-small +Apache-2.0 +ImageNet 81', out)
    status, out, err = script('list_models', 'B_17')
    assert status == 1 and err == 'list_models.py: nothing has B_17\n'
    status, out, _ = script('list_models', '--variants')
    assert status == 0 and len(out.splitlines()) == len(models.variants.VARIANTS) + 1
    assert re.search(r'\nR50\+ViT-B_16 +16 +768 +12\n', out)


def test_released_checkpoints_are_consistent():
    names = [checkpoint.name for checkpoint in catalog.CHECKPOINTS]
    assert len(set(names)) == len(names)
    for checkpoint in catalog.CHECKPOINTS:
        assert checkpoint.variant in models.variants.VARIANTS
        assert checkpoint.resolution in (224, 384)
        if match := re.search(r'-res_(\d+)', checkpoint.name):
            assert checkpoint.resolution == int(match[1])
        if checkpoint.name.startswith('augreg/'):
            resnet, size, patch = re.match(
                r'augreg/(?:(R\d*)_)?(Ti|S|B|L)_(\d+)-i', checkpoint.name
            ).groups()
            expected = f'ViT-{size}_{patch}' if resnet is None else f'{resnet}+ViT-{size}_{patch}'
            assert checkpoint.variant == expected


def test_weights_of_other_libraries_are_of_models_that_are_here():
    for checkpoint in catalog.LIBRARY_CHECKPOINTS:
        config = models.variants.get_config(checkpoint.variant)
        stride = models.variants.token_stride(config)
        assert all(checkpoint.resolution % pixels == 0 for pixels in stride)
        assert checkpoint.licence and checkpoint.source.count('/') == 1


def test_sizes_in_the_catalogue_are_those_of_the_parameters():
    @functools.cache
    def mib_of(variant, num_classes, size, has_pre_logits):
        config = models.variants.get_config(variant).to_dict()
        if has_pre_logits:
            config['representation_size'] = config['hidden_size']
        return 4 * counts.parameters(config, num_classes, size) / 2**20

    for c in catalog.CHECKPOINTS:
        mib = mib_of(c.variant, c.num_classes, c.resolution, c.name.startswith('imagenet21k/'))
        if c.name == 'sam/ViT-S_16.npz':
            mib *= 3
        # Listings are rounded, to 0.01 GiB at the worst.
        assert c.mib == pytest.approx(mib, abs=1, rel=5e-3), c.name


def test_errors_are_for_people(tmp_path):
    (tmp_path / 'x.npz').write_bytes(b'<html>')
    with pytest.raises(UserError, match='is not a readable .npz file'):
        inspection.inspect(tmp_path / 'x.npz')
    with pytest.raises(UserError, match='unknown variant'):
        inspection.inspect(FIXTURES / 'vit_token.checkpoint.npz', variant='ViT-B16')


@pytest.mark.parametrize(
    ('text', 'message'),
    [('{"image_size"', 'it is not JSON'), ('[' * 10**5, 'nested too deeply'), ('{}', 'image_size')],
)
def test_inspect_checkpoint_of_a_damaged_model_folder(script, tmp_path, text, message):
    (tmp_path / 'model.json').write_text(text)
    status, out, err = script('inspect_checkpoint', tmp_path)
    assert (status, out) == (1, '')
    assert message in err and err.count('\n') == 1
