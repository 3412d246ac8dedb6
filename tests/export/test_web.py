"""The page: its pixels are ours, its files are whole, and a browser gives the model's answers."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import shutil
import subprocess
import tarfile

import cv2
import modules
import numpy as np
import pytest

from vit_jax import models
from vit_jax.data import resample
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import web
from vit_jax.inference import classifier, model_folder, predict

PAGE = pathlib.Path(__file__).parents[2] / 'vit_jax/export/page'


def settings():
    for name in resample.INTERPOLATIONS:
        if resample.can_alias(name):
            yield Preprocess(24, interpolation=name)
        yield Preprocess(24, interpolation=name, antialias=True)
        yield Preprocess((20, 28), 32, eval='resize_crop', interpolation=name, antialias=True)
    yield Preprocess((20, 28), (24, 32), eval='resize_crop', antialias=True, centre='half_even')
    yield Preprocess(24, 33, eval='squash_crop', whole_levels=True)
    yield Preprocess(24, eval='resize_crop', whole_levels=True)
    yield Preprocess(24, 33, eval='resize_crop', interpolation='bicubic', centre='half_even')


def test_pixels_of_the_page_are_those_of_this_package(monkeypatch):
    if shutil.which('node') is None:
        pytest.skip('needs Node.js')
    rng = np.random.default_rng(0)
    shapes = [(40, 61), (61, 40), (13, 9), (24, 24), (3, 350)]
    images = [rng.integers(0, 256, (*shape, 4), np.uint8) for shape in shapes]
    cases = list(itertools.product(images, settings()))
    sent = [
        {
            'height': image.shape[0],
            'width': image.shape[1],
            'data': base64.b64encode(image.tobytes()).decode(),
            'how': dataclasses.asdict(how),
        }
        for image, how in cases
    ]
    command = ['node', pathlib.Path(__file__).with_name('page_pixels.mjs'), PAGE / 'resample.js']
    done = subprocess.run(
        command, input=json.dumps(sent).encode(), capture_output=True, check=True, timeout=120
    )
    found = np.frombuffer(done.stdout, np.float32)
    for image, how in cases:
        size = 3 * how.size[0] * how.size[1]
        pixels, found = found[:size].reshape(*how.size, 3), found[size:]
        difference = np.abs(pixels - how.evaluate(image[..., :3]))
        far = difference > 0.01
        if how.whole_levels:
            # Only what is a whole level but for rounding may be cut off to its neighbour.
            with monkeypatch.context() as patch:
                patch.setattr(np, 'floor', lambda levels, out=None: levels)
                levels = how.evaluate(image[..., :3])
            assert difference.max() <= 1
            far &= np.abs(levels - np.rint(levels)) > 0.01
        assert not far.any(), how
    assert not found.size


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A small ViT with three classes."""
    config = dict(
        patches={'size': (8, 8)},
        hidden_size=32,
        transformer=dict(num_layers=2, mlp_dim=48, num_heads=4),
    )
    module = models.VisionTransformer(num_classes=3, **config)
    folder = tmp_path_factory.mktemp('web') / 'model'
    model_folder.save(
        folder,
        modules.params_of(module, np.zeros((1, 32, 32, 3), np.float32), train=False),
        model_config=config,
        class_names=('rose', '<b>tulip</b>', 'daisy'),
        preprocess=Preprocess(32, 40, eval='resize_crop', interpolation='bicubic', antialias=True),
        source={},
    )
    return model_folder.load(folder)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.png'
    cv2.imwrite(str(path), np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8))
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the runtime's form, without the runtime."""
    path = tmp_path / 'package.tgz'
    with tarfile.open(path, 'w:gz') as archive:
        for name in (*web._RUNTIME_FILES, *web._WEBGPU_FILES):
            info = tarfile.TarInfo(f'package/dist/{name}')
            info.size = 3
            archive.addfile(info, io.BytesIO(b'abc'))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(web, 'RUNTIME', dataclasses.replace(web.RUNTIME, integrity=digest))
    return path


def test_the_folder_is_whole(model, photo, package, tmp_path):
    site = tmp_path / 'site'
    weight = web.write(site, model, dtype='float32', examples=[photo], runtime=package)
    found = {path.name for path in site.iterdir()}
    assert found == {
        *(path.name for path in PAGE.iterdir() if path.name not in web._OF_TEXTS),
        *web._RUNTIME_FILES,
        *('model.onnx', 'model.json', 'example1.png'),
    }
    assert weight == sum(p.stat().st_size for p in site.iterdir() if p.name != 'example1.png')
    about = json.loads((site / 'model.json').read_text())
    assert about['class_names'] == list(model.class_names) and about['grid'] == [4, 4]
    assert Preprocess.from_dict(about['preprocessing']) == dataclasses.replace(
        model.preprocess, inception_crop=True
    )
    with pytest.raises(UserError, match='exists'):
        web.write(site, model, runtime=package)


def test_what_cannot_be_a_page_is_refused(model, photo, package, tmp_path, monkeypatch):
    def refused(message, changed=model, **options):
        with pytest.raises(UserError, match=message):
            web.write(tmp_path / 'site', changed, **{'runtime': package, **options})
        assert not (tmp_path / 'site').exists()

    refused('no classes', dataclasses.replace(model, class_names=()))
    refused('classes of its own', classes=['a'])
    refused('not an image', examples=[package])
    refused('cannot be read', examples=(), runtime=tmp_path / 'nothing.tgz')
    package.write_bytes(package.read_bytes() + b'x')
    refused('SHA-512 differs')
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    refused('npm, which is not installed', runtime='')


def test_a_browser_gives_the_answer_of_onnx_runtime(model, photo, tmp_path, browse):
    """Same file of 8-bit weights, same pixels (PNG): the same probabilities to 1e-4."""
    site = tmp_path / 'site'
    web.write(site, model, examples=[photo])
    told = browse(site)
    ((_, expected),) = predict.predict(
        classifier.open_classifier(site / 'model.onnx'), [str(photo)], batch=1
    )
    (figure,) = told['figures']
    np.testing.assert_allclose(figure['probabilities'], expected, atol=1e-4)
    assert '<b>tulip</b>' in told['text'] and figure['heat']
    assert not told['errors']
