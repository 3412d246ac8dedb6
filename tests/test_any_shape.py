"""Models of images that are not square squares of patches, from a folder through every command."""

import dataclasses
import json

import jax
import modules
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from vit_jax import checkpoint, models, train
from vit_jax import config as config_lib
from vit_jax import state as state_lib
from vit_jax.analysis import architecture, attention, counts, embeddings, summary
from vit_jax.checkpoint import infer, inspection
from vit_jax.configs import digits
from vit_jax.data import sources
from vit_jax.data.decode import load_image
from vit_jax.data.preprocess import Preprocess, normalize
from vit_jax.data.resample import resize_bilinear
from vit_jax.errors import UserError
from vit_jax.export import onnx, pytorch, stablehlo
from vit_jax.export.options import Options
from vit_jax.inference import classifier, metrics, model_folder, predict
from vit_jax.inference.task import ONE_CLASS
from vit_jax.run import initial_weights

SIZES = {'mlp_dim': 16, 'num_heads': 2, 'num_layers': 2}
VIT = {'model_name': None, 'patches': {'size': (8, 8)}, 'hidden_size': 8, 'transformer': SIZES}
TOKEN = VIT | {'classifier': 'token'}
WIDE_PATCH = TOKEN | {'patches': {'size': (8, 16)}}
HYBRID = VIT | {
    'classifier': 'gap', 'patches': {'size': (1, 2)},
    'resnet': {'num_layers': (1, 1), 'width_factor': 0.5},
}  # fmt: skip
MIXER = {
    'model_name': None, 'patches': {'size': (8, 8)}, 'hidden_dim': 8, 'num_blocks': 2,
    'tokens_mlp_dim': 4, 'channels_mlp_dim': 16,
}  # fmt: skip
# (16, 64) has 2 x 8 patches, as many as a square of 4 x 4.
CASES = [
    (TOKEN, (32, 48)), (TOKEN, (16, 64)), (WIDE_PATCH, (16, 64)), (HYBRID, (32, 64)),
    (MIXER, (16, 64)),
]  # fmt: skip
NAMES = ('daisy', 'rose', 'tulip')


def make(config, size, channels=3, **pixels):
    module = models.from_config(config, num_classes=len(NAMES))
    image = jax.ShapeDtypeStruct((1, *size, channels), np.float32)
    shapes = modules.shapes(module, image, train=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return model_folder.Model(module, params, config, NAMES, Preprocess(size, **pixels), {})


def logits_of(model, image):
    return np.asarray(modules.apply(model.model, model.params, image))


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (60, 45, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return str(tmp_path / 'photo.png')


@pytest.mark.parametrize(('config', 'size'), CASES)
def test_folder_files_and_graphs_of_a_model(tmp_path, photo, config, size):
    model = make(config, size)
    model_folder.save(
        tmp_path / 'm', model.params, model_config=config, class_names=NAMES,
        preprocess=model.preprocess, source={},
    )  # fmt: skip
    assert json.loads((tmp_path / 'm/model.json').read_text())['image_size'] == list(size)
    for opened in (
        model_folder.load(tmp_path / 'm'),
        model_folder.load(tmp_path / 'm/params.npz'),  # the size is in the file itself
    ):
        assert (opened.image_size, opened.preprocess) == (size, model.preprocess)
        assert opened.model.patches['size'] == config['patches']['size']
    pixels = load_image(photo, opened.preprocess)
    assert pixels.shape == (*size, 3)
    image = normalize(pixels[None])
    expected = logits_of(model, image)
    ((_, probabilities),) = predict.predict(opened, [photo])
    np.testing.assert_allclose(probabilities, ONE_CLASS.values(expected)[0], atol=1e-6)

    onnx.save(onnx.build(model), tmp_path / 'm.onnx')
    (found,) = onnxruntime.InferenceSession(tmp_path / 'm.onnx').run(None, {'image': image})
    np.testing.assert_allclose(found, expected, atol=2e-5)
    ((_, again),) = predict.predict(classifier.open_classifier(tmp_path / 'm.onnx'), [photo])
    np.testing.assert_allclose(again, probabilities, atol=1e-5)
    exported = stablehlo.build(model, Options(layout='NCHW'))
    assert exported.in_avals[0].shape[1:] == (3, *size)
    assert f'image size  {size[0]} x {size[1]} px' in str(inspection.inspect(tmp_path / 'm'))


@pytest.mark.parametrize('channels', [1, 4, 13])
@pytest.mark.parametrize('config', [TOKEN, HYBRID, MIXER], ids=['vit', 'hybrid', 'mixer'])
def test_any_number_of_channels(tmp_path, photo, config, channels):
    size = (16, 64) if config is MIXER else (32, 64)
    model = make(config, size, channels)
    model_folder.save(
        tmp_path / 'm', model.params, model_config=config, class_names=NAMES,
        preprocess=model.preprocess, source={},
    )  # fmt: skip
    opened = model_folder.load(tmp_path / 'm')
    assert opened.channels == channels
    raw = np.random.default_rng(3).integers(0, 256, (50, 90, channels), np.uint8)
    np.save(tmp_path / 'image.npy', raw)
    image = normalize(model.preprocess.evaluate(raw)[None])
    expected = ONE_CLASS.values(logits_of(model, image))[0]
    onnx.save(onnx.build(model), tmp_path / 'm.onnx')
    for what in (opened, classifier.open_classifier(tmp_path / 'm.onnx')):
        ((_, found),) = predict.predict(what, [str(tmp_path / 'image.npy')])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        if channels == 1:  # what is no array is seen in grey
            ((_, grey),) = predict.predict(what, [photo])
            as_grey = np.asarray(Image.open(photo).convert('L'))[..., None]
            np.save(tmp_path / 'grey.npy', as_grey)
            ((_, same),) = predict.predict(what, [str(tmp_path / 'grey.npy')])
            np.testing.assert_array_equal(grey, same)
        else:
            with pytest.raises(UserError, match='has to be an array, or a .npy file'):
                list(predict.predict(what, [photo]))
    assert stablehlo.build(model).in_avals[0].shape[1:] == (*size, channels)
    leaves = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert counts.parameters(config, len(NAMES), size, channels) == leaves
    of = architecture.find('', str(tmp_path / 'm'))
    assert (of.channels, of.image_size) == (channels, size) and f'{channels} channels' in str(of)
    assert summary.layers(model.model, size, channels)[0].parameters == leaves


@pytest.mark.parametrize(('config', 'channels'), [(TOKEN, 5), (WIDE_PATCH, 3), (HYBRID, 1)])
def test_the_same_in_pytorch(tmp_path, config, channels):
    pytest.importorskip('torch')
    from benchmarks import parity

    model = make(config, (32, 64), channels)
    model_folder.save(
        tmp_path / 'm', model.params, model_config=config, class_names=NAMES,
        preprocess=model.preprocess, source={},
    )  # fmt: skip
    found = parity.check(str(tmp_path / 'm'), limit=2, say=lambda _: None)
    assert found['passed'] and found['image_size'] == (32, 64)


@pytest.mark.parametrize('to', ['huggingface', 'timm'])
def test_channels_in_folders_of_other_libraries(tmp_path, to):
    model = make(TOKEN, (32, 48), 5)
    pytorch.write(tmp_path / 'x', model, to=to)
    image = np.random.default_rng(2).uniform(-1, 1, (2, 32, 48, 5)).astype(np.float32)
    loaded = model_folder.load(tmp_path / 'x')
    np.testing.assert_array_equal(logits_of(loaded, image), logits_of(model, image))
    with pytest.raises(UserError, match='3 channels, not 5'):
        pytorch.write(tmp_path / 'y', make(TOKEN, (32, 32), 5), to='torchvision')
    # A mean for each channel is folded in; one for another number is refused.
    mean = ((0.1, 0.2, 0.3, 0.4, 0.5), (0.2,) * 5)
    folded = model_folder.load(tmp_path / 'x', normalization=mean)
    theirs = (image.astype(np.float64) / 2 + 0.5 - mean[0]) / mean[1]
    np.testing.assert_allclose(
        logits_of(folded, image), logits_of(model, theirs.astype(np.float32)), atol=1e-4
    )
    with pytest.raises(UserError, match='cannot be folded'):
        model_folder.load(tmp_path / 'x', normalization=((0.1, 0.2, 0.3), (0.2, 0.2, 0.3)))


def test_fine_tuning_on_other_channels(tmp_path):
    """Folders of .npy files, through training and evaluation; RGB weights adapted by the rule."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(8):
            np.save(
                tmp_path / 'data' / name / f'{i}.npy', rng.integers(0, 256, (20, 40, 4), np.uint8)
            )
    pytorch.write(tmp_path / 'rgb.npz', make(TOKEN, (16, 32)), to='npz')
    config = training_config(
        **{'dataset': str(tmp_path / 'data'), 'pretrained': str(tmp_path / 'rgb.npz'),
           'pp.crop': (16, 32), 'pp.resize': 0, 'pp.channels': 4, 'model.classifier': 'token',
           'batch': 8, 'batch_eval': 8, 'accum_steps': 0, 'total_steps': 2, 'warmup_steps': 1,
           'progress_every': 1, 'eval_every': 2, 'report': False}
    )  # fmt: skip
    train.train_and_evaluate(config, tmp_path / 'run')
    log = (tmp_path / 'run/train.log').read_text()
    assert (
        'resized: embedding/kernel (8, 8, 3, 8) -> (8, 8, 4, 8) (channels repeated and scaled'
        in log
    )
    model = model_folder.load(tmp_path / 'run/model')
    assert (model.channels, model.image_size) == (4, (16, 32))
    test = sources.open_dataset(str(tmp_path / 'data'), channels=4).select('train')
    found, unreadable = metrics.collect(
        classifier.JaxClassifier(model), test, model_labels=(0, 1, 2), batch=8
    )
    assert not unreadable and len(found.label) == 24


@pytest.mark.parametrize(('config', 'size'), CASES[:4])
def test_reports_of_a_model(config, size):
    model = make(config, size)
    leaves = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert counts.parameters(config, len(NAMES), size) == leaves
    of = architecture.Architecture('m', config, len(NAMES), size)
    assert f'm, {size[0]} x {size[1]} px' in str(of)
    rows = summary.layers(model.model, size)
    assert rows[0].parameters == leaves
    # The formula counts the products that the module has.
    np.testing.assert_allclose(
        rows[0].flops / 2, counts.forward_macs(config, len(NAMES), size), rtol=0.35
    )
    grid = infer.token_grid(model.params, size)
    pixels = np.zeros((1, *size, 3), np.float32)
    maps = attention.maps(model, pixels)
    assert maps.rollout.shape == (1, *grid)
    assert embeddings.position_similarity(model).shape == grid * 2


@pytest.mark.parametrize('to', ['huggingface', 'timm'])
@pytest.mark.parametrize(('config', 'size'), CASES[:3])
def test_folders_of_other_libraries(tmp_path, to, config, size):
    model = make(config, size)
    pytorch.write(tmp_path / 'x', model, to=to)
    loaded = model_folder.load(tmp_path / 'x')
    assert (loaded.image_size, loaded.preprocess) == (size, model.preprocess)
    image = np.random.default_rng(2).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    np.testing.assert_array_equal(logits_of(loaded, image), logits_of(model, image))
    if to == 'huggingface':
        transformers = pytest.importorskip('transformers')
        torch = pytest.importorskip('torch')
        theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / 'x').eval()
        with torch.inference_mode():
            found = theirs(torch.from_numpy(image).permute(0, 3, 1, 2)).logits.numpy()
        np.testing.assert_allclose(found, logits_of(model, image), atol=1e-5)


def test_torchvision_has_squares_only(tmp_path):
    with pytest.raises(UserError, match='its images are square, not 32 x 48'):
        pytorch.write(tmp_path / 'x', make(TOKEN, (32, 48)), to='torchvision')


def test_a_size_that_the_arrays_cannot_have_is_refused(tmp_path):
    model = make(TOKEN, (16, 64))
    pytorch.write(tmp_path / 'x', model, to='huggingface')
    config = json.loads((tmp_path / 'x/config.json').read_text())
    for size, said in (((16, 48), '2 x 6 tokens, and it has 16'), ((16, 60), 'is not a multiple')):
        (tmp_path / 'x/config.json').write_text(json.dumps(config | {'image_size': size}))
        with pytest.raises(UserError, match=said):
            model_folder.load(tmp_path / 'x')


def test_the_shared_case_is_computed_as_it_says(shared_dir):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    folder = shared_dir / 'cases/weights/hf_32x48'
    model = model_folder.load(folder)
    assert model.image_size == (32, 48)
    image = np.random.RandomState(0).rand(4, 32, 48, 3).astype(np.float32) * 2 - 1
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(image).permute(0, 3, 1, 2)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, image), expected, atol=1e-5)


def training_config(**changes):
    config = digits.get_config()
    config.model.hidden_size, config.model.patches.size = 8, (8, 8)
    config.model.transformer.update(SIZES)
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config)


@pytest.mark.parametrize('crop', [(16, 64), [16, 64]])
def test_fine_tuning_knows_both_grids(tmp_path, crop):
    pytorch.write(tmp_path / 'npz.npz', make(TOKEN, (32, 32)), to='npz')
    pytorch.write(tmp_path / 'wide', make(TOKEN, (16, 64)), to='huggingface')
    for pretrained, said in (
        ('npz.npz', 'taken for a square of 4 x 4 patches, not for 2 x 8: nothing tells'),
        ('wide', 'grid of tokens: 2 x 8\n'),
    ):
        config = training_config(
            **{'pretrained': str(tmp_path / pretrained), 'pp.crop': crop, 'pp.resize': 0,
               'model.classifier': 'token'}
        )  # fmt: skip
        module = models.from_config(config.model, num_classes=10)
        shapes = jax.eval_shape(lambda m=module: state_lib.init_params(m, (16, 64), 0))
        _, origin = initial_weights.initial_params(config, module, shapes)
        assert said in f'{origin}\n'


@pytest.mark.parametrize('method', ['pseudo-inverse', 'bilinear'])
def test_weights_of_another_patch_size(tmp_path, method):
    """By the pseudo-inverse, a patch that is enlarged gives what it gave; bilinearly, more."""
    model = make(TOKEN, (32, 32))
    pytorch.write(tmp_path / 'a.npz', model, to='npz')
    config = training_config(
        **{'pretrained': str(tmp_path / 'a.npz'), 'pp.crop': (48, 64), 'pp.resize': 0,
           'model.classifier': 'token', 'model.patches.size': (12, 16), 'patch_resize': method}
    )  # fmt: skip
    module = models.from_config(config.model, num_classes=10)
    shapes = jax.eval_shape(lambda: state_lib.init_params(module, (48, 64), 0))
    params, origin = initial_weights.initial_params(config, module, shapes)
    assert f'(8, 8, 3, 8) -> (12, 16, 3, 8) ({method}' in origin
    patch = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype(np.float32)
    larger = resize_bilinear(patch, (12, 16))
    old, new = (
        np.einsum('hwc,hwcd->d', image, kernel)
        for image, kernel in (
            (patch, model.params['embedding']['kernel']), (larger, params['embedding']['kernel'])
        )
    )  # fmt: skip
    assert np.allclose(new, old, rtol=1e-3, atol=1e-2) == (method == 'pseudo-inverse')
    if method == 'bilinear':
        flat = np.asarray(params['embedding']['kernel']).mean(axis=(0, 1))
        np.testing.assert_allclose(
            flat, model.params['embedding']['kernel'].mean(axis=(0, 1)), atol=0.05
        )


def test_impossible_sizes_are_named():
    for changes, said in (
        ({'pp.crop': (32, 100)}, r'use --config.pp.crop=\(32,96\) or \(40,104\)'),
        ({'pp.crop': (32, 64, 3)}, 'pp.crop is the side'),
        ({'pp.crop': '32x64'}, 'pp.crop is the side'),
        ({'model.patches.size': (8, 0)}, 'height, width. of a patch'),
        ({'patch_resize': 'cubic'}, "'pseudo-inverse', 'bilinear'"),
        ({'pp.channels': 0}, 'pp.channels=0 is not from 1'),
    ):
        with pytest.raises(UserError, match=said):
            training_config(**{'pp.resize': 0, **changes})


def test_a_map_lies_over_what_the_model_sees():
    image = np.arange(100 * 60, dtype=np.uint8).reshape(100, 60, 1)
    pp = Preprocess((16, 64), 64, eval='resize_crop')
    wide = dataclasses.replace(pp, crop=(16, 64), resize=(20, 64))
    assert Preprocess(16).seen(image) is image
    assert pp.seen(image).shape == (16, 60, 1) and pp.seen(image)[0, 0] == image[42, 0]
    assert wide.seen(image).shape == (15, 60, 1)


def test_weights_of_a_square_that_could_be_another_grid_stay_one(tmp_path):
    """Nothing tells that 16 positions are no square: it is assumed, and resizing says so."""
    model = make(TOKEN, (32, 32))
    checkpoint.save(tmp_path / 'a.npz', model.params)
    assert model_folder.load(tmp_path / 'a.npz').image_size == 32
