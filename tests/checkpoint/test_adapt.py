import logging
import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import checkpoint
from vit_jax.checkpoint import adapt, infer, npz, resize
from vit_jax.errors import UserError

POSITIONS = 'Transformer/posembed_input/pos_embedding'


def _flat(grid=4, classes=7, pre_logits=0, cls=True, width=6, fill=None):
    rng = np.random.default_rng(0)

    def array(*shape):
        return (
            np.full(shape, fill, np.float32)
            if fill is not None
            else rng.normal(size=shape).astype(np.float32)
        )

    flat = {
        'embedding/kernel': array(8, 8, 3, width),
        POSITIONS: array(1, grid * grid + cls, width),
        'Transformer/encoder_norm/scale': array(width),
        'head/kernel': array(pre_logits or width, classes),
        'head/bias': array(classes),
    }
    if cls:
        flat['cls'] = array(1, 1, width)
    if pre_logits:
        flat |= {
            'pre_logits/kernel': array(width, pre_logits),
            'pre_logits/bias': array(pre_logits),
        }
    return flat


def _tree(flat):
    return flax.traverse_util.unflatten_dict(flat, sep='/')


def _adapt(flat, init, classifier='token', **kwargs):
    params, report = adapt.adapt(
        _tree(flat), _tree(init), classifier=classifier, source='file.npz', **kwargs
    )
    # Every array of the file and every parameter of the model is in the report, once.
    used = [*report.loaded, *report.resized]
    assert sorted([*used, *report.ignored]) == sorted(flat)
    assert sorted([*used, *report.initialised]) == sorted(init)
    return npz.flatten(params), report


def test_new_head_even_if_classes_agree():
    flat, init = _flat(), _flat(fill=0)
    params, report = _adapt(flat, init)
    assert params.keys() == init.keys()
    for name in flat:
        np.testing.assert_array_equal(
            params[name], (init if name.startswith('head') else flat)[name], strict=True
        )
    assert set(report.initialised) == set(report.ignored) == {'head/kernel', 'head/bias'}
    assert report.num_parameters == sum(
        flat[name].size for name in flat if not name.startswith('head')
    )
    assert str(report).splitlines() == [
        f'file.npz: 4 arrays loaded ({report.num_parameters:,} parameters)',
        '  grid of tokens: 4 x 4 (assumed square: model and checkpoint)',
        '  newly initialised: head/kernel, head/bias (a new head is trained)',
        '  ignored: head/kernel, head/bias (a new head is trained)',
    ]


def test_keep_head_keeps_one_that_fits():
    flat = _flat()
    params, report = _adapt(flat, _flat(fill=0), keep_head=True)
    np.testing.assert_array_equal(params['head/kernel'], flat['head/kernel'])
    assert not report.initialised and not report.ignored
    params, report = _adapt(flat, _flat(fill=0, classes=5), keep_head=True)
    assert not params['head/kernel'].any()
    assert report.initialised['head/bias'] == 'the head does not fit: 7 classes, the model has 5'
    # A head trained on pre_logits is of no use without them, even where its shape fits.
    params, report = _adapt(_flat(pre_logits=6), _flat(fill=0), keep_head=True)
    assert not params['head/kernel'].any()
    assert 'pre_logits' in report.initialised['head/kernel']


def test_pre_logits_follow_the_model():
    with_pre, without = _flat(pre_logits=5), _flat()
    _, report = _adapt(with_pre, without)
    assert 'representation_size is None' in report.ignored['pre_logits/kernel']
    params, report = _adapt(with_pre, _flat(pre_logits=5, fill=0))
    np.testing.assert_array_equal(params['pre_logits/kernel'], with_pre['pre_logits/kernel'])
    assert set(report.initialised) == {'head/kernel', 'head/bias'}
    _, report = _adapt(without, with_pre)
    assert report.initialised['pre_logits/bias'] == 'the checkpoint has no pre_logits layer'
    with pytest.raises(
        UserError, match=r'pre_logits/kernel: has shape \(6, 5\), expected \(6, 3\)'
    ):
        _adapt(with_pre, _flat(pre_logits=3))


def test_model_without_head():
    init = {name: leaf for name, leaf in _flat(fill=0).items() if not name.startswith('head')}
    _, report = _adapt(_flat(), init)
    assert report.ignored['head/kernel'] == 'the model has no head'


def test_every_misfit_is_listed():
    flat, init = _flat(), _flat(classes=5)
    del flat['Transformer/encoder_norm/scale']
    flat |= {
        'embedding/kernel': np.zeros((16, 16, 3, 5), np.float32),
        'extra/bias': np.zeros(3, np.float32),
    }
    with pytest.raises(UserError) as e:
        _adapt(flat, init)
    message = str(e.value)
    assert '3 of its arrays' in message
    assert 'Transformer/encoder_norm/scale: missing, expected (6,)' in message
    assert 'embedding/kernel: has shape (16, 16, 3, 5), expected (8, 8, 3, 6)' in message
    assert 'extra/bias: unknown to the model, has shape (3,)' in message
    assert 'patch 16x16, hidden size 5' in message and 'patch 8x8, hidden size 6' in message


def test_a_mixer_of_another_image_size_is_told_what_to_do():
    tokens = 'MixerBlock_0/token_mixing/Dense_0/kernel'
    trees = [_tree({tokens: np.zeros((count, 8), np.float32)}) for count in (49, 64)]
    with pytest.raises(
        UserError, match=r'for 49 tokens, the model has 64; use .*--config\.pp\.crop'
    ):
        adapt.adapt(*trees, classifier='gap', source='mixer.npz')


@pytest.mark.parametrize('classifier', ['token', 'token_unpooled', 'gap', 'unpooled'])
def test_position_embeddings_are_resized_to_the_grid(classifier):
    cls = classifier in ('token', 'token_unpooled')
    flat, init = _flat(grid=4, cls=cls), _flat(grid=7, cls=cls, fill=0)
    params, report = _adapt(flat, init, classifier)
    assert report.resized == {POSITIONS: ((1, 16 + cls, 6), (1, 49 + cls, 6))}
    assert f'resized: {POSITIONS} ({1}, {16 + cls}, 6) -> (1, {49 + cls}, 6)' in str(report)
    old, new = flat[POSITIONS], params[POSITIONS]
    assert new.dtype == np.float32
    np.testing.assert_array_equal(new[:, :cls], old[:, :cls])
    # Corners coincide; 7 points over 4 put every second new point on an old one.
    np.testing.assert_allclose(
        new[0, cls:].reshape(7, 7, 6)[::2, ::2], old[0, cls:].reshape(4, 4, 6), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(('old', 'new'), [(14, 24), (24, 14), (2, 5), (5, 1), (1, 3), (7, 2)])
def test_resize_equals_scipy_zoom_of_order_1(old, new):
    scipy_ndimage = pytest.importorskip('scipy.ndimage')
    grid = np.random.default_rng(old).normal(size=(old, old, 3)).astype(np.float32)
    expected = scipy_ndimage.zoom(grid, (new / old, new / old, 1), order=1)
    assert expected.shape == (new, new, 3)
    resized = resize.resize_position_embedding(grid.reshape(1, old * old, 3), new * new)
    np.testing.assert_allclose(resized[0].reshape(new, new, 3), expected, rtol=0, atol=1e-5)


def test_resize_conformance():
    fixtures = pathlib.Path(__file__).parents[1] / 'fixtures'
    with np.load(fixtures / 'conformance' / 'position_embedding_resize.npz') as cases:
        expected = {name: cases[name] for name in cases if name != 'input'}
        assert len(expected) == 4
        for name, grid in expected.items():
            patches = cases['input'][:, 1:]
            resized = resize.resize_position_embedding(patches, grid.shape[1] - 1)
            assert resized.dtype == grid.dtype
            np.testing.assert_allclose(resized, grid[:, 1:], rtol=0, atol=1e-5, err_msg=name)


def test_grids_that_cannot_be_resized():
    square = _flat(grid=4)
    oblong = square | {POSITIONS: np.zeros((1, 13, 6), np.float32)}
    with pytest.raises(UserError, match='file.npz has 12 positions, which is not a square grid'):
        _adapt(oblong, square)
    with pytest.raises(UserError, match='the model has 12 positions'):
        _adapt(square, oblong)
    with pytest.raises(UserError, match='12 positions, which is not a grid of 5 x 2'):
        _adapt(square, oblong, grid=(5, 2))


def test_grids_that_are_not_square():
    square, oblong = _flat(grid=4), _flat(fill=0)
    oblong[POSITIONS] = np.zeros((1, 1 + 3 * 5, 6), np.float32)
    params, report = _adapt(square, oblong, grid=(3, 5))
    grid = square[POSITIONS][0, 1:].reshape(4, 4, 6)
    scipy_ndimage = pytest.importorskip('scipy.ndimage')
    expected = scipy_ndimage.zoom(grid, (3 / 4, 5 / 4, 1), order=1)
    np.testing.assert_allclose(params[POSITIONS][0, 1:].reshape(3, 5, 6), expected, atol=1e-5)
    assert 'bilinear' in report.methods[POSITIONS]
    back, _ = _adapt({**square, POSITIONS: params[POSITIONS]}, square, source_grid=(3, 5))
    assert back[POSITIONS].shape == (1, 17, 6)


def test_the_report_names_the_grids_and_which_are_assumed():
    square, large = _flat(grid=4), _flat(grid=6, fill=0)
    _, report = _adapt(square, large)
    assert (report.source_grid, report.grid) == ((4, 4), (6, 6))
    assert report.assumed == ('model', 'checkpoint')
    assert 'grid of tokens: 4 x 4 -> 6 x 6 (assumed square: model and checkpoint)' in str(report)
    params, report = _adapt(square, large, grid=(3, 12))  # 36 tokens, as a square has
    assert 'grid of tokens: 4 x 4 -> 3 x 12 (assumed square: checkpoint)' in str(report)
    expected = resize.resize_position_embedding(square[POSITIONS][:, 1:], 36, grid=(3, 12))
    np.testing.assert_array_equal(params[POSITIONS][:, 1:], expected)
    _, report = _adapt(square, large, grid=(3, 12), source_grid=(2, 8))
    assert str(report).splitlines()[2] == '  grid of tokens: 2 x 8 -> 3 x 12'
    no_positions = {name: leaf for name, leaf in square.items() if name != POSITIONS}
    _, report = _adapt(no_positions, no_positions, grid=(3, 12))
    assert report.grid is None and 'grid' not in str(report)


def test_as_many_tokens_in_another_grid():
    square, model = _flat(grid=4), _flat(grid=4, fill=0)
    with pytest.raises(UserError, match="16 positions, as many as the model's grid 2 x 8: is its"):
        _adapt(square, model, grid=(2, 8))
    params, report = _adapt(square, model, grid=(2, 8), source_grid=(4, 4))
    assert report.methods[POSITIONS] == 'bilinear' and not report.assumed
    assert not np.array_equal(params[POSITIONS], square[POSITIONS])
    np.testing.assert_array_equal(params[POSITIONS][:, 0], square[POSITIONS][:, 0])
    params, report = _adapt(square, model, grid=[2, 8], source_grid=[2, 8])
    np.testing.assert_array_equal(params[POSITIONS], square[POSITIONS])
    assert not report.resized
    oblong = _flat() | {POSITIONS: np.ones((1, 13, 6), np.float32)}  # no square: the same images
    for grids in ({}, {'grid': (3, 4)}, {'source_grid': (3, 4)}):
        _, report = _adapt(oblong, oblong, **grids)
        assert not report.resized
        assert report.grid == report.source_grid == ((3, 4) if grids else None)
    with pytest.raises(UserError, match='the model has 12 positions, which is not a grid of 5 x 2'):
        _adapt(oblong, oblong, grid=(5, 2))
    without = {name: leaf for name, leaf in oblong.items() if name != 'cls'}
    without[POSITIONS] = oblong[POSITIONS][:, 1:]
    params, _ = _adapt(oblong, without, 'gap')  # what grid it is does not matter
    np.testing.assert_array_equal(params[POSITIONS], oblong[POSITIONS][:, 1:])


def test_new_parameters_are_allowed_by_name():
    flat = _flat()
    new = {'Transformer/registers': np.ones((1, 4, 6)), 'Transformer/q/lora_a': np.ones(2)}
    init = _flat(fill=0) | new
    with pytest.raises(UserError, match=r'Transformer/registers: missing, expected \(1, 4, 6\)'):
        _adapt(flat, init, allow_new=['*/lora_a'])
    params, report = _adapt(flat, init, allow_new=['*/lora_a', 'Transformer/reg'])
    for name in new:
        assert report.initialised[name] == 'not in the checkpoint, as allow_new permits'
        np.testing.assert_array_equal(params[name], new[name])
    params, report = _adapt(flat | new, init, allow_new='Transformer/')  # taken where it is there
    assert set(report.initialised) == {'head/kernel', 'head/bias'}
    with pytest.raises(UserError, match="allow_new names 'registers', which the model does not"):
        _adapt(flat, init, allow_new=['registers'])


def test_class_token_to_mean_pooling_and_back():
    token, gap = _flat(grid=4), _flat(grid=4, cls=False)
    params, report = _adapt(token, {k: np.zeros_like(v) for k, v in gap.items()}, 'gap')
    np.testing.assert_array_equal(params[POSITIONS], token[POSITIONS][:, 1:])
    assert report.ignored['cls'] == "the model (classifier 'gap') has no class token"
    assert 'without the place of class token' in str(report)
    init = {k: np.ones_like(v) for k, v in _flat(grid=7).items()}
    params, report = _adapt(gap, init)
    assert params['cls'].all() and not params[POSITIONS][:, 0].any()
    np.testing.assert_allclose(params[POSITIONS][0, -1], gap[POSITIONS][0, -1], atol=1e-6)
    assert report.initialised['cls'] == 'the checkpoint has no class token'
    assert report.resized[POSITIONS] == ((1, 16, 6), (1, 50, 6))


def test_distillation_token_comes_and_goes():
    plain = _flat(grid=4)
    rng = np.random.default_rng(5)
    distilled = plain | {
        'dist': rng.normal(size=(1, 1, 6)).astype(np.float32),
        POSITIONS: rng.normal(size=(1, 18, 6)).astype(np.float32),
        'head_dist/kernel': rng.normal(size=(6, 7)).astype(np.float32),
        'head_dist/bias': rng.normal(size=7).astype(np.float32),
    }
    params, report = _adapt(distilled, plain, keep_head=True)
    expected = distilled[POSITIONS][:, [0, *range(2, 18)]]
    np.testing.assert_array_equal(params[POSITIONS], expected)
    assert report.ignored['head_dist/bias'] == 'the model has no distillation head'
    params, report = _adapt(plain, distilled, keep_head=True)
    assert not params[POSITIONS][:, 1].any()
    np.testing.assert_array_equal(params[POSITIONS][:, 2:], plain[POSITIONS][:, 1:])
    assert set(report.initialised) == {'dist', 'head_dist/kernel', 'head_dist/bias'}


@pytest.mark.parametrize('channels', [1, 4, 5])
@pytest.mark.parametrize('first', ['embedding/kernel', 'conv_root/kernel'])
def test_other_channel_counts(channels, first):
    flat = {first: np.random.default_rng(1).normal(size=(2, 2, 3, 6)).astype(np.float32)}
    params, report = _adapt(flat, {first: np.zeros((2, 2, channels, 6), np.float32)})
    new, old = params[first], flat[first]
    if channels == 1:
        np.testing.assert_allclose(new[:, :, 0], old.sum(2), rtol=1e-6)
    else:
        for channel in range(channels):
            np.testing.assert_allclose(
                new[:, :, channel], old[:, :, channel % 3] * 3 / channels, rtol=1e-6
            )
    assert 'channels' in report.methods[first]


@pytest.mark.parametrize(('old', 'new'), [(4, 8), (8, 4), (4, 7), (16, 14)])
def test_other_patch_size_by_flexivits_rule(old, new):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(old, old, 3, 5)).astype(np.float32)
    init = {'embedding/kernel': np.zeros((new, new, 3, 5), np.float32)}
    resized = _adapt({'embedding/kernel': kernel}, init)[0]['embedding/kernel']
    # The definition, with another library's bilinear resize: the matrix of the whole 2-D resize.
    basis = np.eye(old * old, dtype=np.float32).reshape(-1, old, old)
    matrix = jax.image.resize(basis, (old * old, new, new), 'bilinear', antialias=False)
    matrix = np.asarray(matrix, np.float64).reshape(old * old, new * new)
    expected = np.linalg.pinv(matrix) @ kernel.reshape(old * old, -1).astype(np.float64)
    np.testing.assert_allclose(
        resized.reshape(new * new, -1), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )
    if new > old:  # then embeddings of resized patches equal those of the patches
        patch = rng.normal(size=old * old)
        np.testing.assert_allclose(
            (patch @ matrix) @ resized.reshape(new * new, -1),
            patch @ kernel.reshape(old * old, -1),
            rtol=0,
            atol=1e-4,
        )


def test_head_with_a_hidden_layer_is_a_head():
    hidden = {'head_hidden/kernel': np.ones((6, 6), np.float32)}
    _, report = _adapt(_flat(), _flat(fill=0) | hidden, keep_head=True)
    assert 'hidden layer' in report.initialised['head_hidden/kernel']
    params, report = _adapt(_flat() | hidden, _flat(fill=0) | hidden, keep_head=True)
    assert not report.initialised and params['head_hidden/kernel'].all()


def test_dtype_and_container_of_the_model():
    init = flax.core.freeze(
        _tree({name: jnp.zeros(a.shape, jnp.bfloat16) for name, a in _flat(grid=3).items()})
    )
    params, _ = adapt.adapt(_tree(_flat()), init, classifier='token', source='x')
    assert jax.tree.structure(params) == jax.tree.structure(init)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def test_abstract_parameters():
    init = jax.eval_shape(lambda: _tree(_flat()))
    params, _ = adapt.adapt(_tree(_flat()), init, classifier='token', keep_head=True, source='x')
    np.testing.assert_array_equal(params['head']['bias'], _flat()['head/bias'])
    params, _ = adapt.adapt(_tree(_flat()), init, classifier='token', source='x')
    assert isinstance(params['head']['bias'], jax.ShapeDtypeStruct)


def test_load_pretrained_logs_the_report(tmp_path, caplog):
    checkpoint.save(tmp_path / 'a.npz', _tree(_flat()))
    init = _tree(_flat(fill=0, grid=2))
    with caplog.at_level(logging.INFO, 'vit_jax.checkpoint'):
        params = checkpoint.load_pretrained(
            pretrained_path=tmp_path / 'a.npz',
            init_params=init,
            model_config={'classifier': 'token'},
        )
    assert 'resized' in caplog.text and str(tmp_path / 'a.npz') in caplog.text
    assert not params['head']['kernel'].any()
    params = checkpoint.load_pretrained(
        pretrained_path=tmp_path / 'a.npz', init_params=init, model_config={}, keep_head=True
    )
    assert params['head']['kernel'].any()


def test_load_pretrained_takes_the_size_of_images(tmp_path, caplog):
    checkpoint.save(tmp_path / 'a.npz', _tree(_flat(grid=4)))

    def load(init, **kwargs):
        arguments = {'pretrained_path': tmp_path / 'a.npz', 'model_config': {}}
        return checkpoint.load_pretrained(init_params=_tree(init), **arguments, **kwargs)

    oblong = _flat(grid=6, fill=0)  # 36 tokens of 8 x 8 pixels
    with caplog.at_level(logging.INFO, 'vit_jax.checkpoint'):
        params = load(oblong, image_size=(24, 100))  # the last 4 columns make no patch
    assert 'grid of tokens: 4 x 4 -> 3 x 12 (assumed square: checkpoint)' in caplog.text
    jax.tree.map(np.testing.assert_array_equal, params, load(oblong, grid=(3, 12)))
    jax.tree.map(np.testing.assert_array_equal, load(oblong), load(oblong, image_size=48))
    with pytest.raises(UserError, match='the model has 36 positions, which is not a grid of 3 x 3'):
        load(oblong, image_size=24)
    with pytest.raises(UserError, match='say the same: give one'):
        load(oblong, image_size=48, grid=(6, 6))
    for size in (4, (48, 0), (48,), (48, 48, 3)):
        with pytest.raises(UserError, match='image_size=.* should be .height, width. in pixels'):
            load(oblong, image_size=size)
    assert load(oblong | {'reg': np.ones(3)}, allow_new=['reg'])['reg'].all()
    hybrid = {'conv_root/kernel': np.ones((7, 7, 3, 4)), 'embedding/kernel': np.ones((1, 1, 8, 6))}
    hybrid |= {f'block{i}/unit1/conv1/kernel': np.ones((1, 1, 4, 4)) for i in (1, 2, 3)}
    positions = {POSITIONS: np.ones((1, 10, 6))}
    assert infer.token_grid(_tree(hybrid | positions), (33, 64)) == (3, 4)
    assert infer.token_grid(_tree(hybrid), 64) is None
    with pytest.raises(UserError, match='give grid=.rows, columns., not image_size'):
        infer.token_grid(_tree(positions), 64)


@pytest.mark.parametrize('wrong', [(0, 16), (-4, -4), (4, 4, 1), (4.0, 4.0), 'ab', 16, ()])
@pytest.mark.parametrize('argument', ['grid', 'source_grid'])
def test_impossible_grids(argument, wrong):
    square = {POSITIONS: np.zeros((1, 16, 8), np.float32)}
    with pytest.raises(UserError, match=rf'{argument}=.*two numbers from 1 up'):
        _adapt(square, square, **{argument: wrong})
