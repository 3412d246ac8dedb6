"""Tensors as training scripts leave them: prefixes, copies, what is beside the weights."""

import argparse
import datetime
import json
import zipfile

import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import save_file

from vit_jax.checkpoint import formats, key_tables, npz, state_dicts
from vit_jax.errors import UserError

CONFIG = {
    'model_type': 'vit', 'hidden_act': 'gelu', 'layer_norm_eps': 1e-6, 'num_attention_heads': 2,
}  # fmt: skip


def params(seed=0, classes=3):
    """Of a ViT of one block, 8 wide; flat."""
    rng = np.random.default_rng(seed)
    block, attention = 'Transformer/encoderblock_0', 'MultiHeadDotProductAttention_0'
    shapes = {
        'cls': (1, 1, 8),
        'embedding/kernel': (4, 4, 3, 8),
        'embedding/bias': (8,),
        'Transformer/posembed_input/pos_embedding': (1, 5, 8),
        'Transformer/encoder_norm/scale': (8,),
        'Transformer/encoder_norm/bias': (8,),
        f'{block}/MlpBlock_0/Dense_0/kernel': (8, 16),
        f'{block}/MlpBlock_0/Dense_0/bias': (16,),
        f'{block}/MlpBlock_0/Dense_1/kernel': (16, 8),
        f'{block}/MlpBlock_0/Dense_1/bias': (8,),
        f'{block}/{attention}/out/kernel': (2, 4, 8),
        f'{block}/{attention}/out/bias': (8,),
        'head/kernel': (8, classes),
        'head/bias': (classes,),
    }
    for i in '01':
        shapes |= {f'{block}/LayerNorm_{i}/{kind}': (8,) for kind in ('scale', 'bias')}
    for name in ('query', 'key', 'value'):
        shapes |= {f'{block}/{attention}/{name}/kernel': (8, 2, 4)}
        shapes |= {f'{block}/{attention}/{name}/bias': (2, 4)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def tensors(library='timm', seed=0):
    named, lost = key_tables.from_params(params(seed), library)
    assert not lost
    return {name: np.asarray(array) for name, array in named.items()}


def prefixed(prefix, found):
    return {f'{prefix}{name}': array for name, array in found.items()}


def opened(path, found):
    save_file({name: np.ascontiguousarray(x) for name, x in found.items()}, path)
    return formats.open_weights(path, num_heads=2)


def equal(weights, seed=0, head=True):
    found = {name: np.asarray(x) for name, x in npz.flatten(weights.params).items()}
    expected = {n: x for n, x in params(seed).items() if head or not n.startswith('head/')}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(
    'prefix', ['module.', 'model.', 'backbone.', 'encoder.', 'timm_model.', 'module._orig_mod.']
)
@pytest.mark.parametrize('library', ['timm', 'Hugging Face', 'torchvision'])
def test_a_prefix_of_all_names_is_taken_off_and_said(tmp_path, prefix, library):
    weights = opened(tmp_path / 'a.safetensors', prefixed(prefix, tensors(library)))
    equal(weights)
    assert f'{prefix} was taken off all names' in weights.notes


def test_a_model_inside_another(tmp_path):
    found = tensors()
    head = {name: found.pop(name) for name in ('head.weight', 'head.bias')}
    inside = prefixed('backbone.', found)
    # With its head beside it, which has a place; without, where there is more than one.
    weights = opened(tmp_path / 'head.safetensors', inside | head)
    equal(weights)
    assert 'the weights are those under backbone.' in weights.notes
    more = {'head.mlp.0.weight': np.ones((2, 8), np.float32), **head}
    weights = opened(tmp_path / 'more.safetensors', inside | more)
    equal(weights, head=False)
    assert '3 other tensors are left out (head.mlp, head.weight, head.bias)' in ' '.join(
        weights.notes
    ) or '3 other tensors are left out' in str(weights)


def test_hugging_faces_own_prefix_is_nothing_to_talk_of(tmp_path):
    found = tensors('Hugging Face')
    base = {n: x for n, x in found.items() if not n.startswith('classifier')}
    head = {n: x for n, x in found.items() if n.startswith('classifier')}
    for outer in ('', 'model.'):
        whole = prefixed(outer, prefixed('vit.', base) | head)
        weights = opened(tmp_path / 'a.safetensors', whole)
        equal(weights)
        assert any('model. was taken off' in note for note in weights.notes) == bool(outer)
        assert 'those under' not in str(weights)


def test_of_copies_the_averaged_one_is_taken(tmp_path):
    teacher, student = tensors(seed=1), tensors(seed=2)
    both = prefixed('student.module.', student) | prefixed('teacher.', teacher)
    equal(opened(tmp_path / 'dino.safetensors', both), seed=1)
    moco = prefixed('module.base_encoder.', teacher) | prefixed('module.momentum.', student)
    equal(opened(tmp_path / 'moco.safetensors', moco), seed=1)
    with pytest.raises(UserError, match='several models, under one., two.: save the state dict'):
        opened(tmp_path / 'two.safetensors', prefixed('one.', teacher) | prefixed('two.', student))


def test_what_is_no_part_of_the_encoder_is_left_out_and_said(tmp_path):
    found = tensors('Hugging Face')
    ones = np.ones((8, 8), np.float32)
    found |= {
        'embeddings.position_ids': np.arange(5)[None],
        'bn.num_batches_tracked': np.array(7),
        'pooler.dense.weight': ones,
        'pooler.dense.bias': ones[0],
        'decoder.layers.0.weight': ones,
        'decoder_pos_embed': ones,
    }
    weights = opened(tmp_path / 'a.safetensors', found)
    equal(weights)  # among them no `pre_logits` in front of the head: a classifier has none
    assert '4 other tensors are left out (decoder.layers, decoder_pos_embed, pooler.dense)' in str(
        weights
    )


def test_arguments_and_numpys_numbers_beside_the_weights(tmp_path):
    torch = pytest.importorskip('torch')
    state = {name: torch.from_numpy(x.copy()) for name, x in tensors().items()}
    beside = {
        'args': argparse.Namespace(lr=0.1, name='run', nested=argparse.Namespace(a=1)),
        'best': np.float64(0.5),
        'epoch': np.int64(3),
    }
    for name in ('model', 'teacher'):
        torch.save({name: state, **beside}, tmp_path / 'a.pth')
        weights = formats.open_weights(tmp_path / 'a.pth', num_heads=2)
        equal(weights)
        assert ("the weights are those under 'teacher'" in weights.notes) == (name == 'teacher')
    torch.save({'model': state, 'when': datetime.date(2026, 1, 2)}, tmp_path / 'b.pth')
    with pytest.raises(UserError, match=r'has the Python object datetime.date in it') as error:
        formats.open_weights(tmp_path / 'b.pth')
    assert 'damaged' not in str(error.value)


@pytest.mark.parametrize('text, names', [('x' * 2000, ()), ('abc', ('hex',)), ('abc', ('utf-16',))])
def test_text_that_is_encoded_is_short_and_latin_1(tmp_path, text, names):
    torch = pytest.importorskip('torch')
    torch.save({'a': torch.zeros(2), 'b': np.float64(1), 'c': [text, *names]}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='which could take all memory'):
        formats.open_weights(tmp_path / 'a.pth', num_heads=2)


def test_flax_models_of_transformers(tmp_path):
    flat = {}
    for name, array in tensors('Hugging Face').items():
        module, _, kind = name.rpartition('.')
        if kind == 'weight' and array.ndim > 1:
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
            name = f'{module}.kernel'
        elif kind == 'weight':
            name = f'{module}.scale'
        flat['' if name.startswith('classifier') else 'vit.', name] = array
    tree = traverse_util.unflatten_dict({''.join(k): v for k, v in flat.items()}, sep='.')
    (tmp_path / 'flax_model.msgpack').write_bytes(serialization.msgpack_serialize(tree))
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    weights = formats.open_weights(tmp_path)
    equal(weights)
    assert weights.format == 'Hugging Face'
    file = tmp_path / 'flax_model.msgpack'
    for content in (b'', file.read_bytes()[:200], b'\x81\xa1a\x01'):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r'not a readable .msgpack file|expected an array'):
            formats.open_weights(tmp_path)


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('a.h5', b'\x89HDF\r\n\x1a\n', 'is an HDF5 file'),
        ('a.gguf', b'GGUF\3\0\0\0', 'is a GGUF file'),
        ('a.onnx', b'\x08\x08', 'is an ONNX file, which predict and evaluate run'),
        ('a.pth', b'\x1f\x8b\x08', 'is compressed with gzip'),
        ('a.npy', b'\x93NUMPY\1\0', 'is a single NumPy array'),
        ('a.safetensors', b'version https://git-lfs.github.com/spec/v1', 'pointer of Git LFS'),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        formats.open_weights(tmp_path / name)
    assert 'damaged' not in str(error.value)


def test_programs_are_named(tmp_path):
    for file, member, words in (
        ('a.pt', 'a/constants.pkl', 'is a TorchScript program; save its weights'),
        ('a.keras', 'model.weights.h5', 'is a Keras model'),
    ):
        with zipfile.ZipFile(tmp_path / file, 'w') as archive:
            archive.writestr(member, b'')
        with pytest.raises(UserError, match=words):
            formats.open_weights(tmp_path / file)


@pytest.mark.parametrize(
    'name, words',
    [
        ('adapter_config.json', r'is an adapter \(LoRA\)'),
        ('saved_model.pb', "is TensorFlow's SavedModel"),
    ],
)
def test_other_kinds_of_folders_are_named(tmp_path, name, words):
    for files in ([name], [name, 'config.json']):
        for file in files:
            (tmp_path / file).write_text('{}')
        with pytest.raises(UserError, match=words):
            formats.open_weights(tmp_path)


def test_nothing_is_changed_of_a_plain_state_dict():
    found = tensors()
    cleaned, notes = state_dicts.clean(found, 'x')
    assert (cleaned, notes) == (found, [])


def test_heads_that_no_file_tells_are_a_guess_said_in_every_command(tmp_path, run_script, caplog):
    """MoCo v3's ViT-S: 384 wide, with 12 heads, where others of that width have 6."""
    from vit_jax.checkpoint import inspection

    rng = np.random.default_rng(0)
    wide = {
        name: rng.standard_normal([384 if side == 8 else side for side in array.shape], np.float32)
        for name, array in tensors().items()
        if 'qkv' not in name
    }
    wide['blocks.0.attn.qkv.weight'] = rng.standard_normal((3 * 384, 384), np.float32)
    wide['blocks.0.attn.qkv.bias'] = rng.standard_normal(3 * 384, np.float32)
    save_file(wide, tmp_path / 'moco.safetensors')
    found = inspection.inspect(tmp_path / 'moco.safetensors')
    assert '6 heads, activation gelu, LayerNorm epsilon 1e-06, classifier token' in str(found)
    assert '6 heads assumed: files of this kind do not tell; --num_heads' in str(found)
    found = inspection.inspect(tmp_path / 'moco.safetensors', num_heads=12)
    assert 'computes    12 heads' in str(found)
    assert '12 heads, as asked for: files of this kind do not tell' in str(found)
    for options, words in ((), '6 heads assumed'), (('--num_heads', '12'), '12 heads, as asked'):
        target = tmp_path / f'a{len(options)}.npz'
        done = run_script(
            'convert.py', tmp_path / 'moco.safetensors', target, '--to', 'npz', *options
        )
        assert done.returncode == 0 and words in done.stdout
        assert ('assumed: files' in caplog.text) == (not options)  # as in any loading
        caplog.clear()
    # What was assumed stays in the file: its activation is not that of Google's files.
    assert formats.open_weights(tmp_path / 'a0.npz').settings == {'act': 'gelu'}
