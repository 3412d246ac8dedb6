import dataclasses
import io
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import model_folder, models, predict
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / 'scripts' / 'predict.py'
CLASSES = ('daisy', 'sunflower', 'Tulpe à fleurs')
MODEL_CONFIG = {
    'model_name': 'ViT-tiny',
    'patches': {'size': (8, 8)},
    'hidden_size': 8,
    'transformer': {
        'mlp_dim': 16,
        'num_heads': 2,
        'num_layers': 1,
        'attention_dropout_rate': 0.0,
        'dropout_rate': 0.0,
    },
    'classifier': 'token',
    'representation_size': None,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model folder with random weights, the head's too: every image gets its own answer."""
    model = models.from_config(MODEL_CONFIG, num_classes=len(CLASSES))
    params = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32), train=False)
    leaves, tree = jax.tree.flatten(params['params'])
    rng = np.random.default_rng(0)
    params = tree.unflatten([rng.normal(0, 0.5, leaf.shape).astype(np.float32) for leaf in leaves])
    path = tmp_path_factory.mktemp('run') / 'model'
    model_folder.save(
        path,
        params,
        model_config=MODEL_CONFIG,
        image_size=16,
        class_names=CLASSES,
        preprocess=Preprocess(crop=16).to_dict(),
        source={'dataset': 'made up'},
    )
    return path


@pytest.fixture(scope='module')
def model(folder):
    return model_folder.load(folder)


@pytest.fixture
def images(tmp_path):
    """Seven photos of different sizes and formats, five of them in two folders."""
    rng = np.random.default_rng(1)
    names = ['b/2.PNG', 'b/10.png', 'a/x/ü 1.webp', 'a/x.jpeg', 'a/y.Bmp', 'single.png', 'odd.img']
    for i, name in enumerate(names):
        pixels = rng.integers(0, 255, (20 + i, 31 - i, 3), np.uint8)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        suffix = name.rpartition('.')[2].lower()
        Image.fromarray(pixels).save(buffer, {'img': 'png'}.get(suffix, suffix), lossless=True)
        (tmp_path / name).write_bytes(buffer.getvalue())
    return tmp_path


def expected(model, path):
    """Probabilities of one image (no JPEG: decoded by Pillow here), spelled out."""
    pixels = model.preprocess.evaluate(np.asarray(Image.open(path).convert('RGB')))
    logits = model.model.apply(
        {'params': model.params}, (pixels[None] - 127.5) / 127.5, train=False
    )
    exp = np.exp(np.asarray(logits[0], np.float64))
    return exp / exp.sum()


class CountsCompilations:
    """Stands for the Flax module: counts how often it is traced."""

    def __init__(self, module):
        self.module, self.shapes = module, []

    def apply(self, variables, images, train):
        self.shapes.append(images.shape)
        return self.module.apply(variables, images, train=train)


def with_module(model, module):
    return dataclasses.replace(model, model=module)


def test_find_images_walks_folders_in_order_of_names(images):
    (images / '.hidden').mkdir()
    for name in ('a/notes.txt', 'a/.hidden.png', '.hidden/z.png'):
        (images / name).write_bytes(b'')
    found = predict.find_images([images / 'odd.img', images])
    assert [str(pathlib.Path(path).relative_to(images)) for path in found] == [
        'odd.img',
        'a/x/ü 1.webp',
        'a/x.jpeg',
        'a/y.Bmp',
        'b/10.png',
        'b/2.PNG',
        'single.png',
    ]


def test_find_images_refuses_what_holds_none(tmp_path):
    with pytest.raises(UserError, match='no images given'):
        predict.find_images([])
    with pytest.raises(UserError, match=r'no file or folder .*nothing\.jpg'):
        predict.find_images([tmp_path / 'nothing.jpg'])
    (tmp_path / 'notes.txt').write_bytes(b'')
    with pytest.raises(UserError, match=r'holds no images \(bmp, jpeg, jpg, png, webp\)'):
        predict.find_images([tmp_path])


@pytest.mark.parametrize('batch', [1, 2, 7, 32])
def test_probabilities_equal_the_model_applied_to_each_image(model, images, batch):
    paths = [path for path in predict.find_images([images]) if not path.endswith('jpeg')]
    assert len(paths) == 5
    results = list(predict.predict(model, paths, batch=batch))
    assert [path for path, _ in results] == paths
    for path, probabilities in results:
        assert probabilities.dtype == np.float32 and probabilities.shape == (len(CLASSES),)
        np.testing.assert_allclose(probabilities, expected(model, path), atol=1e-5)
    distinct = {tuple(np.round(probabilities, 4)) for _, probabilities in results}
    assert len(distinct) == len(paths), 'the test tells images apart'


def test_compiles_once_for_full_and_partial_batches(model, images):
    counting = CountsCompilations(model.model)
    paths = predict.find_images([images])
    assert len(list(predict.predict(with_module(model, counting), paths, batch=4))) == 6
    assert counting.shapes == [(4, 16, 16, 3)]


def test_no_batch_larger_than_the_images(model, images):
    counting = CountsCompilations(model.model)
    list(predict.predict(with_module(model, counting), [images / 'single.png'], batch=512))
    assert counting.shapes == [(1, 16, 16, 3)]


def test_no_images_give_no_predictions(model):
    assert list(predict.predict(model, [])) == []


def test_exif_rotation_is_honoured(model, tmp_path):
    pixels = np.random.default_rng(2).integers(0, 255, (16, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'upright.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored must be turned by 90 degrees clockwise to stand upright
    Image.fromarray(np.rot90(pixels)).save(tmp_path / 'turned.png', exif=exif)
    Image.fromarray(np.rot90(pixels)).save(tmp_path / 'lying.png')
    paths = [tmp_path / name for name in ('upright.png', 'turned.png', 'lying.png')]
    upright, turned, lying = (result for _, result in predict.predict(model, paths))
    np.testing.assert_array_equal(turned, upright)
    assert np.abs(lying - upright).max() > 1e-3


def test_unreadable_images_are_reported_and_change_nothing_else(model, images):
    good = predict.find_images([images])
    undisturbed = dict(predict.predict(model, good, batch=4))
    (images / 'a' / 'broken.jpg').write_bytes(b'\xff\xd8 no more')
    (images / 'b' / 'empty.png').write_bytes(b'')
    mixed = predict.find_images([images]) + [str(images / 'gone.png')]
    errors = []
    results = dict(predict.predict(model, mixed, batch=4, on_error=errors.append))
    assert [pathlib.Path(error.key).name for error in errors] == [
        'broken.jpg',
        'empty.png',
        'gone.png',
    ]
    assert errors[2].reason == 'the file cannot be read (No such file or directory)'
    assert results.keys() == undisturbed.keys()
    for path, probabilities in results.items():
        np.testing.assert_allclose(probabilities, undisturbed[path], atol=1e-6)
    with pytest.raises(BadImageError, match=r'broken\.jpg'):
        list(predict.predict(model, mixed))


def test_only_unreadable_images(model, images):
    (images / 'broken.png').write_bytes(b'x')
    errors = []
    assert not list(predict.predict(model, [images / 'broken.png'], on_error=errors.append))
    assert len(errors) == 1


def test_batch_must_be_positive(model):
    with pytest.raises(UserError, match='at least 1; got 0'):
        predict.predict(model, ['x.png'], batch=0)


def test_models_without_one_vector_of_scores_are_refused(model, images):
    config = {**MODEL_CONFIG, 'classifier': 'token_unpooled'}
    unpooled = with_module(model, models.from_config(config, num_classes=len(CLASSES)))
    with pytest.raises(UserError, match='not a score for each of its 3 classes'):
        list(predict.predict(unpooled, [images / 'single.png']))


def test_format_prediction():
    probabilities = np.array([0.004, 0.995, 0.001], np.float32)
    assert predict.format_prediction('p.jpg', probabilities, CLASSES) == (
        'p.jpg\n  sunflower       0.9950\n  daisy           0.0040\n  Tulpe à fleurs  0.0010'
    )
    text = predict.format_prediction('p.jpg', probabilities, CLASSES, top_k=1)
    assert text == 'p.jpg\n  sunflower       0.9950'


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_prints_every_class_and_reports_bad_images(folder, model, images):
    (images / 'b' / 'broken.jpg').write_bytes(b'no image')
    done = run('--model', folder, images / 'single.png', images / 'b')
    assert done.returncode == 1
    good = [str(images / name) for name in ('single.png', 'b/10.png', 'b/2.PNG')]
    lines = done.stdout.splitlines()
    assert lines[::4] == good
    for i, path in enumerate(good):
        shown = [line.rsplit(maxsplit=1) for line in lines[4 * i + 1 : 4 * i + 4]]
        probabilities = expected(model, path)
        order = np.argsort(-probabilities)
        assert [name.strip() for name, _ in shown] == [CLASSES[label] for label in order]
        np.testing.assert_allclose([float(p) for _, p in shown], probabilities[order], atol=1e-4)
    errors = done.stderr.splitlines()
    assert errors[0] == '1 of 4 images could not be read:'
    assert errors[1].startswith(f'  {images / "b" / "broken.jpg"}: ') and len(errors) == 2


def test_command_top_k(folder, images):
    done = run('--model', folder, '--top_k', '1', images / 'single.png')
    assert (done.returncode, done.stderr) == (0, '')
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--model', 'MISSING', 'single.png'], 'MISSING'),
        (['--model', 'FOLDER', 'nothing.png'], 'there is no file or folder'),
        (['--model', 'FOLDER', '--batch', '0', 'single.png'], 'at least 1; got 0'),
    ],
)
def test_command_errors_are_one_line(folder, images, arguments, message):
    paths = {'MISSING': images / 'MISSING', 'FOLDER': folder, '--model': '--model'}
    paths |= {name: images / name for name in ('single.png', 'nothing.png')}
    done = run(*(paths.get(argument, argument) for argument in arguments))
    assert done.returncode == 1
    assert done.stdout == ''
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_command_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', str(SCRIPT), '--help'], capture_output=True, text=True
    )
    assert done.returncode == 0 and '--top_k' in done.stdout
    loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'argparse' in loaded
    assert not loaded & {'jax', 'flax', 'numpy', 'vit_jax', 'vit_jax.predict'}
