"""Verifying exports: the bounds, the images, and what the child process finds."""

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import onnx
import pytest

from vit_jax import variants
from vit_jax.analysis import compare
from vit_jax.data.batches import eval_batches
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import formats, verify
from vit_jax.export import onnx as onnx_export
from vit_jax.export.options import Options

PHOTOS = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data' / 'photos'


def row(ours, theirs, output='logits'):
    """A row of images named 0, 1, ..., and whatever could not be compared."""
    ours, theirs = np.float32(ours), np.float32(theirs)
    found = compare.ExportRow(output, len(ours))
    found.add(ours, theirs, [str(i) for i in range(len(ours))], ours)
    return found


@pytest.mark.parametrize(
    'scale, limit', [(0.01, 1e-5), (1.0, 1e-5), (4.0, 4e-5), (10.0, 1e-4), (1000.0, 1e-4)]
)
def test_float32_limit_follows_the_scale_between_1_and_10(scale, limit):
    ours = np.array([[scale, 0.0, -scale / 2]])
    assert row(ours, ours).float32_limit == pytest.approx(limit)
    step = np.array([[0.0, 1.0, 0.0]])
    assert row(ours, ours + 0.9 * limit * step).passed('float32')
    assert not row(ours, ours + 1.1 * limit * step).passed('float32')


def test_float16_wants_the_cosine_and_the_class():
    ours = np.array([[8.0, 1.0, 0.0], [0.0, 8.0, 1.0]])
    assert row(ours, ours * 1.001).passed('float16')
    turned = row(ours, ours + np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.2]]))  # cosine 0.9997
    assert turned.difference.lowest_cosine < 0.9999 and not turned.passed('float16')
    # Two logits of 8: the rounding of float16 moves each by 2^-10 of 8.
    for gap, listed in ((0.015, True), (0.017, False)):
        near = row([[8.0, 8.0 - gap, 0.0]], [[8.0 - gap, 8.0, 0.0]])
        assert near.difference.lowest_cosine > 0.9999
        assert near.close == ([('0', 0, 1)] if listed else [])
        assert near.changed == ([] if listed else [('0', 0, 1)])
        assert near.passed('float16') == listed


def test_int8_is_held_to_cosines():
    rng = np.random.default_rng(0)
    ours = rng.standard_normal((50, 200))
    noise = rng.standard_normal((50, 200))
    assert row(ours, ours + 0.05 * noise).passed('int8')
    assert not row(ours, ours + 0.2 * noise).passed('int8')  # cosine 0.98 on average
    one = np.zeros((50, 1))
    one[7] = 0.5  # one image far off
    assert not row(ours, ours + one * noise).passed('int8')
    assert not row(ours, noise).passed('int8')


@pytest.mark.parametrize('dtype', compare.DTYPES)
def test_nan_and_infinity_pass_nothing(dtype):
    ours = [[1.0, 2.0], [3.0, 4.0]]
    assert row(ours, ours).passed(dtype)
    for bad in (np.nan, np.inf):
        found = row(ours, [[1.0, 2.0], [bad, 4.0]])
        assert not found.passed(dtype)
        found.add(np.float32(ours), np.float32(ours), ['a', 'b'], None)  # stays
        assert not found.passed(dtype)
        assert found.to_dict(dtype)['difference']['max'] is None


def test_what_cannot_be_compared_is_named():
    rows = {}
    ours = {'logits': np.zeros((2, 3), np.float32)}
    one = {'logits': np.zeros(3, np.float32)}  # a graph that answers the first image only
    assert compare.add_export(rows, ours, one, 'ab') == [
        'logits is float32 [3] at batch 2, expected float32 [2, 3]'
    ]
    double = {'logits': np.zeros((2, 3))}
    assert 'logits is float64 [2, 3]' in compare.add_export(rows, ours, double, 'ab')[0]
    assert not rows


def pixels_of(images):
    return np.concatenate(
        [data['image'] for data in eval_batches(images.source, Preprocess(crop=32), batch=7)]
    )


def test_photographs_are_always_at_hand():
    found = verify.images_for()
    images = pixels_of(found)
    assert images.shape == (verify.BATCH, 32, 32, 3) and len(found.keys) == verify.BATCH == 7
    for image in images:
        assert image.min() >= 0 and image.max() <= 255 and image.std() > 20
    distances = [np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]]
    assert min(distances) > 5  # grey levels


def test_images_of_the_user(tmp_path):
    photos = sorted(PHOTOS.rglob('*.jpg'))[:2]
    given = verify.images_for([str(path) for path in photos])
    assert len(given.keys) == 7 and given.keys[:3] == [*map(str, photos), str(photos[0])]
    assert given.description == '2 images of --images, repeated to make 7'
    assert len(pixels_of(given)) == 7
    (tmp_path / 'x.jpg').write_bytes(b'no image')
    with pytest.raises(UserError, match='x.jpg'):
        pixels_of(verify.images_for([str(tmp_path / 'x.jpg')]))
    with pytest.raises(UserError, match='no file or folder'):
        verify.images_for([str(tmp_path / 'none')])


OPTIONS = {
    'everything': Options(
        layout='NCHW', probabilities=True, features=True, attention=True, preprocessing=True
    ),
    'float16': Options(dtype='float16', features=True),
    'int8': Options(dtype='int8'),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_onnx(case, tmp_path, name):
    model, options = case('token').model, OPTIONS[name]
    formats.write(tmp_path / 'x.onnx', model, 'onnx', options)
    assert [path.name for path in tmp_path.iterdir()] == ['x.onnx']
    outputs = verify.outputs_of(model, 'onnx', options)
    report = verify.verify(model, tmp_path / 'x.onnx', format='onnx', options=options)
    assert report.status == verify.VERIFIED, report.reasons
    assert [(r.output, r.batch) for r in report.rows] == [
        (o, b) for b in (1, 2, 7) for o in outputs
    ]
    assert report.facts['runtime'].startswith('onnxruntime ')
    assert not report.facts['imported_vit_jax']
    largest = max(r.difference.max for r in report.rows)
    assert (0 < largest < 1e-5) == (options.dtype == 'float32')


def damaged(tmp_path, model, change):
    """An ONNX file, changed, and what verification says."""
    proto = onnx_export.build(model)
    change(proto)
    onnx_export.save(proto, tmp_path / 'x.onnx')
    return verify.verify(model, tmp_path / 'x.onnx', format='onnx')


def test_one_changed_weight_is_noticed(case, tmp_path):
    def change(proto):
        (tensor,) = [t for t in proto.graph.initializer if t.name == 'head/bias']
        values = onnx.numpy_helper.to_array(tensor) + np.float32([0, 3e-5, 0, 0, 0])
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    report = damaged(tmp_path, case('token').model, change)
    assert report.status == verify.FAILED
    assert report.reasons == ['logits too far from JAX']
    assert report.rows[0].difference.max == pytest.approx(3e-5, rel=0.2)


def test_other_class_names_and_outputs_are_noticed(case, tmp_path):
    model = case('token').model

    def change(proto):
        (names,) = [p for p in proto.metadata_props if p.key == 'class_names']
        names.value = '["a", "b", "c", "d", "e"]'

    report = damaged(tmp_path, model, change)
    assert report.status == verify.FAILED and 'class names' in report.reasons[0]
    path = tmp_path / 'x.onnx'
    report = verify.verify(model, path, format='onnx', options=Options(probabilities=True))
    assert report.status == verify.FAILED
    assert report.reasons == ['its outputs are logits; expected probabilities']


def test_a_zero_head_proves_nothing(case, tmp_path):
    model = case('token').model
    head = jax.tree.map(np.zeros_like, model.params['head'])
    model = dataclasses.replace(model, params={**model.params, 'head': head})
    assert compare.zero_head(model.params)
    report = damaged(tmp_path, model, lambda _: None)
    assert report.status == verify.NOT_VERIFIED and 'all zeros' in report.verdict()
    assert verify.outputs_of(model, 'timm', Options()) == ('logits', 'features')


def test_a_runtime_that_is_not_installed(case, tmp_path, monkeypatch):
    (tmp_path / 'path').mkdir()
    (tmp_path / 'path' / 'torch.py').write_text('raise ImportError("no torch here")\n')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'path'))
    report = formats.export(case('token').model, tmp_path / 'hf', format='huggingface')
    assert report.status == verify.NOT_VERIFIED
    assert report.verdict() == (
        'not verified: torch is not installed (no torch here). To run and verify this format: '
        'pip install torch transformers'
    )
    assert (tmp_path / 'hf' / 'model.safetensors').is_file()
    assert (tmp_path / 'hf.verify.json').is_file()


def _hybrid():
    return variants.get_config('R+ViT-Ti_16').to_dict(), 64


@pytest.mark.parametrize(
    'library, name, form',
    [
        ('transformers', 'distilled', ''),
        ('torchvision', 'pre_logits', 'erf GELU'),
        ('timm', 'token', ''),
        ('timm', 'hybrid', 'its standardisation of weights'),
    ],
)
def test_libraries_of_pytorch(case, made_up, tmp_path, library, name, form):
    for package in ('torch', library):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed')
    model = made_up(*_hybrid()) if name == 'hybrid' else case(name).model
    target = {'transformers': 'huggingface'}.get(library, library)
    before = library in sys.modules  # because of another test
    report = formats.export(model, tmp_path / 'x', format=target)
    assert report.status == verify.VERIFIED, report.reasons
    assert report.own_form == form
    assert not report.facts['imported_vit_jax']
    if form:
        # What the library's own form costs was measured in the same run, and is in the page.
        assert report.own.max > 2 * max(r.difference.max for r in report.rows)
        page = tmp_path / 'x' / ('NOTE.md' if library == 'torchvision' else 'README.md')
        assert f'logits differ by {report.own.max:.1e} at most' in page.read_text()
    assert before or library not in sys.modules  # it ran in a process of its own
