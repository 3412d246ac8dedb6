import functools
import pathlib
import zipfile

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vit_jax import checkpoint
from vit_jax.checkpoint import npz
from vit_jax.errors import UserError


def _vit_params(seed=0):
    """Linen names, with all that is special: twelve blocks, GroupNorm, pre_logits."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    block = {
        'LayerNorm_0': {'scale': array(4), 'bias': array(4)},
        'MultiHeadDotProductAttention_0': {
            'query': {'kernel': array(4, 2, 2)},
            'out': {'kernel': array(2, 2, 4)},
        },
        'LayerNorm_1': {'scale': array(4), 'bias': array(4)},
        'MlpBlock_0': {'Dense_0': {'kernel': array(4, 8)}, 'Dense_1': {'kernel': array(8, 4)}},
    }
    return {
        'conv_root': {'kernel': array(7, 7, 3, 64)},
        'gn_root': {'scale': array(64), 'bias': array(64)},
        'block1': {'unit1': {'gn1': {'scale': array(8)}, 'gn_proj': {'bias': array(8)}}},
        'Transformer': {f'encoderblock_{i}': block for i in range(12)},
        'pre_logits': {'kernel': array(4, 4), 'bias': array(4)},
        'head': {'kernel': array(4, 3), 'bias': array(3)},
    }


def _assert_equal_trees(a, b):
    a, b = npz.flatten(a), npz.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def test_save_writes_published_names_and_load_returns_linen_names(tmp_path):
    params = _vit_params()
    checkpoint.save(tmp_path / 'a.npz', params)
    with np.load(tmp_path / 'a.npz') as f:
        assert {k.split('/')[2] for k in f if k.startswith('Transformer/encoderblock_10/')} == {
            'LayerNorm_0', 'MultiHeadDotProductAttention_1', 'LayerNorm_2', 'MlpBlock_3',
        }  # fmt: skip
        assert f['gn_root/scale'].shape == (1, 1, 1, 64)
        assert f['block1/unit1/gn_proj/bias'].shape == (1, 1, 1, 8)
        assert all(f[k].dtype == np.float32 for k in f)
    assert all(
        info.compress_type == zipfile.ZIP_STORED
        for info in zipfile.ZipFile(tmp_path / 'a.npz').infolist()
    )
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']
    _assert_equal_trees(checkpoint.load(tmp_path / 'a.npz'), params)


def test_load_reads_linen_names(tmp_path):
    params = _vit_params()
    np.savez(tmp_path / 'linen.npz', **npz.flatten(params))
    _assert_equal_trees(checkpoint.load(tmp_path / 'linen.npz'), params)


def test_load_matches_blocks_by_number_and_not_by_text(tmp_path):
    np.savez(
        tmp_path / 'a.npz',
        **{
            f'Transformer/encoderblock_{i}/{module}/bias': np.full(1, float(i))
            for i in range(12)
            for module in npz.to_published(_vit_params())['Transformer']['encoderblock_0']
        },
    )
    blocks = checkpoint.load(tmp_path / 'a.npz')['Transformer']
    found = [blocks[f'encoderblock_{i}']['LayerNorm_1']['bias'][0] for i in range(12)]
    assert found == list(range(12))


def test_renaming_is_idempotent_and_inverse():
    params = _vit_params()
    published = npz.to_published(params)
    _assert_equal_trees(npz.to_published(published), published)
    _assert_equal_trees(npz.to_linen(published), params)
    _assert_equal_trees(npz.to_linen(params), params)


def test_save_is_reproducible_and_takes_jax_arrays(tmp_path):
    params = {'head': {'kernel': jnp.arange(6.0).reshape(2, 3), 'bias': jnp.ones(3, jnp.bfloat16)}}
    checkpoint.save(tmp_path / 'a.npz', params)
    checkpoint.save(tmp_path / 'b.npz', dict(params))
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    loaded = checkpoint.load(tmp_path / 'a.npz')
    np.testing.assert_array_equal(loaded['head']['bias'], np.ones(3, np.float32), strict=True)


@pytest.mark.parametrize('prefix', ['opt/target/', 'params/', 'target/'])
def test_load_finds_the_weights_beside_an_optimizer_state(tmp_path, prefix):
    step, moment = np.int32(3), np.zeros(2, np.float32)
    np.savez(
        tmp_path / 'a.npz',
        **{
            f'{prefix}head/bias': np.ones(2, np.float32),
            'opt/state/step': step,
            'opt/state/m': moment,
        },
    )
    _assert_equal_trees(
        checkpoint.load(tmp_path / 'a.npz'), {'head': {'bias': np.ones(2, np.float32)}}
    )


@pytest.mark.parametrize('dtype', [np.float16, np.float64, ml_dtypes.bfloat16, '>f4'])
def test_load_returns_float32(tmp_path, dtype):
    np.savez(tmp_path / 'a.npz', x=np.asfortranarray(np.array([[1.5, -2, 3], [0, 5, 6]], dtype)))
    expected = np.array([[1.5, -2, 3], [0, 5, 6]], np.float32)
    loaded = checkpoint.load(tmp_path / 'a.npz')['x']
    np.testing.assert_array_equal(loaded, expected, strict=True)
    assert loaded.flags.c_contiguous


def _parts():
    """Parts of trees, and trees of others, whose names look like those of another layout."""
    block = _vit_params()['Transformer']['encoderblock_0']
    one = np.ones(2, np.float32)
    vit = {
        'embedding': {'kernel': np.ones((4, 4, 3, 4), np.float32)},
        'Transformer': {'encoder_norm': {'scale': one}, 'encoderblock_0': block},
    }
    scanned = {'encoderblock': {'a': np.ones((3, 2), np.float32)}}
    return {
        'the last block': {'Transformer': {'encoderblock_11': block}, 'head': {'bias': one}},
        'two layers': {'lora': {'encoderblock_6': {'a': one}, 'encoderblock_11': {'a': one}}},
        'own numbers': {'stage_1': {'w': one}, 'stage_2': {'w': one}},
        'second norms': {'Transformer': {'encoderblock_1': {'LayerNorm_2': {'bias': one}}}},
        'block with a third norm': {'x': block | {'LayerNorm_2': {'bias': one}}},
        'half of a block': {'x': {'LayerNorm_0': {'bias': one}, 'MlpBlock_3': {'w': one}}},
        'embedding and norm only': vit | {'Transformer': {'encoder_norm': {'scale': one}}},
        'ViT without positions': vit,
        'positions at the top': vit | {'pos_embedding': np.ones((1, 9, 4), np.float32)},
        'positions of another kind': vit | {'pos_embedding': {'x': one, 'y': one}},
        'scanned blocks': {'Transformer': scanned},
        'blocks not stacked': {'Transformer': {'encoderblock': {'a': one, 'b': np.float32(1)}}},
        'two towers': {'img': vit, 'txt': {'head': {'bias': one}}, 't': np.float32(0.5)},
        'beside an optimizer': {'opt': {'mu': one}, 'params': {'w': one}, 'step': np.float32(3)},
        'names of collections': {'target': {'w': one}, 'params': one},
    }  # fmt: skip


@pytest.mark.parametrize('name', _parts())
def test_parts_of_a_tree_come_back_with_their_names(name, tmp_path):
    part = _parts()[name]
    checkpoint.save(tmp_path / 'a.npz', part)
    _assert_equal_trees(checkpoint.load(tmp_path / 'a.npz'), part)


def test_variables_are_written_as_their_parameters(tmp_path):
    params = _vit_params()
    checkpoint.save(tmp_path / 'a.npz', params)
    checkpoint.save(tmp_path / 'b.npz', flax.core.freeze({'params': params}))
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    assert not zipfile.ZipFile(tmp_path / 'a.npz').comment  # a whole model's file has no mark


def test_scalars_are_arrays_without_axes(tmp_path):
    checkpoint.save(tmp_path / 'a.npz', {'t': np.float32(3), 'u': jnp.float32(4), 'v': 0.5})
    expected = {'t': np.array(3, np.float32), 'u': np.array(4, np.float32)}
    _assert_equal_trees(
        checkpoint.load(tmp_path / 'a.npz'), expected | {'v': np.array(0.5, np.float32)}
    )


@pytest.mark.parametrize(
    ('tree', 'error', 'words'),
    [
        ({'w': [np.ones(2), np.ones(2)]}, TypeError, 'w is list; expected an array of floats'),
        ({'a': {'step': 3}}, TypeError, 'a/step is int; expected'),
        ({'step': np.int32(3)}, TypeError, 'step has type int32; expected'),
        ({'w': None}, TypeError, 'w is NoneType; expected'),
        ({'key': jax.random.key(0)}, TypeError, 'key has type key<fry>; expected'),
        ({'w': np.ones(2, np.complex64)}, TypeError, 'w has type complex64'),
        ({'w': jax.ShapeDtypeStruct((2,), np.float32)}, TypeError, 'w is ShapeDtypeStruct'),
        ({'a': {}, 'w': np.ones(2)}, TypeError, 'a is an empty dict'),
        ({}, TypeError, 'the tree is an empty dict'),
        ({'a': {0: np.ones(2)}}, TypeError, 'a has the key 0; expected a text'),
        ({'a/b': np.ones(2)}, UserError, "the tree has the key 'a/b'; expected a name"),
        ({'w': np.ones((0, 2))}, UserError, r'w has shape \(0, 2\)'),
        (functools.reduce(lambda t, _: {'a': t}, range(33), np.ones(1)), UserError, 'deeper'),
    ],
)  # fmt: skip
def test_what_no_file_can_hold_is_refused(tree, error, words, tmp_path):
    with pytest.raises(error, match=words):
        checkpoint.save(tmp_path / 'a.npz', tree)
    assert not list(tmp_path.iterdir())


def _write(path: pathlib.Path, **arrays):
    np.savez(path, **arrays)
    return path


def test_bad_files_are_named_with_reason_and_remedy(tmp_path):
    good = _write(tmp_path / 'good.npz', **{'head/kernel': np.ones((50, 40), np.float32)})
    data = good.read_bytes()
    cut, flipped, page = tmp_path / 'cut.npz', tmp_path / 'flipped.npz', tmp_path / 'page.npz'
    cut.write_bytes(data[: len(data) // 2])
    flipped.write_bytes(data[:4000] + bytes([data[4000] ^ 1]) + data[4001:])
    page.write_bytes(b'<html>404</html>')
    (tmp_path / 'empty.npz').write_bytes(b'')
    for bad in (cut, flipped, page, tmp_path / 'empty.npz'):
        with pytest.raises(UserError, match=r'not a readable \.npz file.*download it again') as e:
            checkpoint.load(bad)
        assert str(bad) in str(e.value)
    with pytest.raises(UserError, match='no such checkpoint file'):
        checkpoint.load(tmp_path / 'none.npz')
    with pytest.raises(UserError, match='is a folder'):
        checkpoint.load(tmp_path)


def test_wrong_content_is_refused(tmp_path):
    for name, array, message in [
        ('pickled', np.array([{}], dtype=object), r"cannot read the array 'pickled'.*pickled"),
        ('text', np.array(['a']), "'text' has type <U1"),
        ('steps', np.arange(3), "'steps' has type int64"),
    ]:
        path = _write(tmp_path / f'{name}.npz', **{name: array})
        with pytest.raises(UserError, match=message):
            checkpoint.load(path)
    for keys in (('a', 'a/b'), ('a/b', 'a')):
        with pytest.raises(UserError, match='array'):
            checkpoint.load(_write(tmp_path / 'clash.npz', **dict.fromkeys(keys, np.ones(1))))
    with zipfile.ZipFile(tmp_path / 'other.zip', 'w') as f:
        f.writestr('readme.txt', 'x')
    with pytest.raises(UserError, match='not a .npz checkpoint'):
        checkpoint.load(tmp_path / 'other.zip')
    with pytest.raises(UserError, match='holds no arrays'):
        checkpoint.load(_write(tmp_path / 'none.npz'))


def test_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path):
    checkpoint.save(tmp_path / 'a.npz', {'x': np.ones(3, np.float32)})
    before = (tmp_path / 'a.npz').read_bytes()
    with pytest.raises(TypeError, match='y has type int64'):
        checkpoint.save(tmp_path / 'a.npz', {'x': np.zeros(3, np.float32), 'y': np.arange(3)})
    assert (tmp_path / 'a.npz').read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']
    with pytest.raises(UserError, match='cannot write'):
        checkpoint.save(tmp_path / 'no_such_folder' / 'a.npz', {'x': np.ones(3, np.float32)})


@pytest.mark.parametrize(
    'name',
    [
        *('vit_token', 'vit_token_pre_logits', 'vit_gap', 'vit_unpooled', 'vit_token_unpooled'),
        *('vit_head_dim_80', 'hybrid_stem', 'hybrid_stages', 'mixer'),
    ],
)
def test_conformance_files_round_trip(name, tmp_path, shared_dir):
    _assert_round_trip(shared_dir / 'conformance' / f'{name}.checkpoint.npz', tmp_path)


def test_real_weights_round_trip(tmp_path, shared_dir):
    _assert_round_trip(shared_dir / 'weights' / 'deit_ti16_imagenet1k.npz', tmp_path)


def _assert_round_trip(path, tmp_path):
    params = checkpoint.load(path)
    for key, array in npz.flatten(params).items():
        if '/gn' in f'/{key}':
            assert array.ndim == 1
    checkpoint.save(tmp_path / 'again.npz', params)
    with np.load(path) as a, np.load(tmp_path / 'again.npz') as b:
        assert set(a) == set(b)
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert a[key].shape == b[key].shape
            assert a[key].tobytes() == b[key].tobytes()
