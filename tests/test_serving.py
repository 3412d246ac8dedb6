"""docs/serving.md and its example, and scripts/compare_preprocessing.py."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import load_image
from vit_jax.data.normalization import IMAGENET
from vit_jax.data.resample import resize_bilinear
from vit_jax.errors import UserError
from vit_jax.export import onnx
from vit_jax.export.options import Options
from vit_jax.inference import classifier, labels, predict

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / 'docs' / 'serving' / 'classify.py'
CLASSES = ('dandelion', 'daisy', 'tulips', 'sunflowers', 'roses')


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def example():
    return load(EXAMPLE)


@pytest.fixture(scope='module')
def model(tiny_model):
    return tiny_model(CLASSES)


@pytest.fixture
def photos(tmp_path):
    """A PNG, the same one lying with an EXIF orientation, one with alpha, and a JPEG."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (40, 61, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    Image.fromarray(np.rot90(pixels)).save(tmp_path / 'b_lying.png', exif=exif)
    alpha = rng.integers(0, 255, (40, 61, 1), np.uint8)
    Image.fromarray(np.concatenate([pixels[::-1], alpha], axis=2)).save(tmp_path / 'c_alpha.png')
    smooth = Image.fromarray(pixels).resize((300, 200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / 'd.jpg', quality=90)
    return [str(path) for path in sorted(tmp_path.iterdir())]


def test_the_page_shows_the_example_as_it_is():
    page = (ROOT / 'docs' / 'serving.md').read_text()
    (block,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    assert block == EXAMPLE.read_text()
    for link in re.findall(r'\]\((?!http)([^)]+)\)', page):
        assert (ROOT / 'docs' / link).exists(), link


@pytest.mark.parametrize('height, width', [(333, 500), (16, 24), (7, 5), (24, 24), (1, 1)])
def test_resize_of_the_example_is_that_of_training(example, height, width):
    image = np.random.default_rng(2).integers(0, 255, (height, width, 3), np.uint8)
    found = example.resize(image, (24, 24))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, resize_bilinear(image, 24), atol=1e-3)


@pytest.mark.parametrize(
    'options', [{}, {'probabilities': True, 'layout': 'NCHW'}, {'preprocessing': True}]
)
def test_the_example_says_what_predict_says(example, model, photos, tmp_path, options):
    path = tmp_path / 'model.onnx'
    onnx.save(onnx.build(model, Options(**options)), path)
    found = example.Classifier(str(path))
    assert found.class_names == list(CLASSES)
    expected = np.stack([p for _, p in predict.predict(classifier.open_classifier(path), photos)])
    probabilities = found(photos)
    assert probabilities.shape == (4, 5) and np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(probabilities[:3], expected[:3], atol=1e-5)
    np.testing.assert_allclose(probabilities[3], expected[3], atol=0.02)  # Pillow's JPEG decoder


@pytest.mark.parametrize(
    'pixels',
    [
        {'eval': 'resize_crop', 'resize': 29, 'interpolation': 'bicubic', 'antialias': True},
        {'eval': 'squash_crop', 'resize': 29, 'antialias': True},
        {'eval': 'resize_crop', 'resize': 27},
    ],
)
def test_the_example_has_other_forms_of_evaluation(example, model, photos, tmp_path, pixels):
    model = dataclasses.replace(model, preprocess=model.preprocess.but(pixels))
    onnx.save(onnx.build(model), tmp_path / 'model.onnx')
    opened = classifier.open_classifier(tmp_path / 'model.onnx')
    assert opened.preprocess == model.preprocess
    settings = example.Classifier(str(tmp_path / 'model.onnx')).preprocessing
    for photo in photos[:3]:
        found = example.read_image(photo, settings)
        ours = load_image(photo, opened.preprocess)
        np.testing.assert_allclose(found, ours, atol=1e-2)
    # And what was exported can be opened in yet another form.
    other = classifier.open_classifier(tmp_path / 'model.onnx', pixels={'eval': 'squash'})
    assert other.preprocess.eval == 'squash'
    with pytest.raises(UserError, match='no --normalization'):
        classifier.open_classifier(tmp_path / 'model.onnx', normalization=IMAGENET)


def test_the_example_needs_three_packages(model, photos, tmp_path):
    onnx.save(onnx.build(model), tmp_path / 'model.onnx')
    program = (
        'import runpy, sys, json\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")\n'
        'print(json.dumps(sorted(sys.modules)))\n'
    )
    words = [str(EXAMPLE), str(tmp_path / 'model.onnx'), *photos[:2]]
    done = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.argv = {words!r}\n{program}'],
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, modules = done.stdout.splitlines()
    roots = {name.partition('.')[0] for name in json.loads(modules)}
    assert {'onnxruntime', 'numpy', 'PIL'} <= roots
    assert not {'vit_jax', 'jax', 'torch', 'cv2', 'simplejpeg', 'onnx'} & roots
    assert [line for line in lines if not line.startswith('  ')] == photos[:2]
    assert len(lines) == 2 * (1 + len(CLASSES)) and lines[1:6] == lines[7:], 'turned upright'


def test_what_the_page_says_of_the_order_of_labels(shared_dir):
    alphabetical = tuple(sorted(CLASSES))
    same = [a == b for a, b in zip(CLASSES, alphabetical, strict=True)]
    assert same.count(True) == 1
    kept = alphabetical[labels.remap(CLASSES, alphabetical, 'x')[same.index(True)]]
    photos = predict.find_images([shared_dir / 'data' / 'flowers_folder'])
    assert len(photos) == 260
    assert sum(pathlib.Path(path).parent.name != kept for path in photos) == 208


def test_differences_of_preprocessing_are_measured(model, photos, tmp_path, monkeypatch, capsys):
    onnx.save(onnx.build(model), tmp_path / 'model.onnx')
    script = load(ROOT / 'scripts' / 'compare_preprocessing.py')
    command = ['compare_preprocessing.py', '--model', str(tmp_path / 'model.onnx')]
    monkeypatch.setattr(sys, 'argv', [*command, *photos])
    assert script.main() == 0
    rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()]
    assert rows[0][3] == 'same answer, of 4'
    by_name = {row[0]: row for row in rows[2:]}
    alone = by_name['its resize alone, on the same decoded pixels']
    assert float(alone[1]) <= float(alone[2]) < 1e-3 and alone[3] == '4 (100.0%)'
    rounding = by_name['pixels rounded to whole grey levels (uint8)']
    assert 0.2 < float(rounding[1]) < 0.3 and 0.4 < float(rounding[2]) <= 0.5
    page = (ROOT / 'docs' / 'serving.md').read_text()
    for name in by_name:  # sizes in names are those of the model's images
        assert name.split(' to ')[0].split(',')[0].split(' (')[0] in page
    monkeypatch.setattr(sys, 'argv', [*command, str(tmp_path / 'nothing.png')])
    assert script.main() == 1
    assert capsys.readouterr().err.count('\n') == 1
