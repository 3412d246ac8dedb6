"""vit_jax attention, as a user runs it."""

import importlib.util
import pathlib
import sys
import types

import jax
import modules
import numpy as np
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.analysis import attention_output
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.inference import model_folder

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'attention.py'
CLASSES = ('daisy', 'tulip, red', '$rose$')
CONFIG = {
    'model_name': None,
    'patches': {'size': (8, 8)},
    'hidden_size': 8,
    'transformer': {
        'mlp_dim': 8,
        'num_heads': 2,
        'num_layers': 2,
        'attention_dropout_rate': 0.0,
        'dropout_rate': 0.0,
    },
    'classifier': 'token',
    'representation_size': None,
}


def save(path, config, side=16):
    model = models.from_config(config, num_classes=len(CLASSES))
    image = np.zeros((1, side, side, 3), np.float32)
    leaves, tree = jax.tree.flatten(modules.shapes(model, image, train=False))
    rng = np.random.default_rng(0)
    params = tree.unflatten([rng.normal(0, 0.5, leaf.shape).astype(np.float32) for leaf in leaves])
    model_folder.save(
        path,
        params,
        model_config=config,
        class_names=CLASSES,
        preprocess=Preprocess(crop=side),
        source={},
    )
    return path


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp('run') / 'model', CONFIG)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Two photos of the same name, one of them on its side as its EXIF says, and a damaged one."""
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 36, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'a.png')
    (folder / 'turned').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # 90 degrees clockwise shows it upright
    Image.fromarray(np.rot90(pixels)).save(folder / 'turned' / 'a.png', exif=exif)
    (folder / 'z.jpg').write_bytes(b'\xff\xd8 no more')
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `main` in this process: starting JAX for each would take most of the time."""

    def run(*arguments):
        spec = importlib.util.spec_from_file_location('attention_script', SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', ['attention.py', *map(str, arguments)])
        code = module.main()
        out, err = capsys.readouterr()
        return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def test_everything_of_some_photos(run, model, photos, tmp_path):
    output = tmp_path / 'out'
    output.mkdir()  # an empty folder will do
    done = run('--model', model, '--output', output, '--top_k', 2, photos)
    assert done.returncode == 1  # one photo is damaged, the others are done
    assert '1 of 3 images could not be read' in done.stderr and 'z.jpg' in done.stderr
    files = sorted(str(path.relative_to(output)) for path in output.rglob('*.*'))
    each = ('arrays.npz', 'class_token.png', 'relevance.png', 'rollout.png')
    assert files == sorted(
        ['arrays.npz', 'attention_distance.png', 'patch_filters.png', 'position_similarity.png']
        + [f'{folder}/{name}' for folder in ('a', 'a-2') for name in each]
    )
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    for path in output.rglob('*.png'):
        picture = np.asarray(Image.open(path).convert('RGB'), np.float32)
        assert min(picture.shape[:2]) > 100 and picture.std() > 10, path
    with np.load(output / 'arrays.npz') as arrays:
        shapes = {name: arrays[name].shape for name in arrays}
    assert shapes == {
        'filter_components': (8, 8, 8, 3),
        'filter_variance_share': (8,),
        'position_similarity': (2, 2, 2, 2),
        'mean_distance': (2, 2, 2),
    }
    first, second = (dict(np.load(output / name / 'arrays.npz')) for name in ('a', 'a-2'))
    assert first['path'].item().endswith('a.png')
    assert first['class_names'].tolist() == list(CLASSES)
    assert first['class_token'].shape == (2, 2, 2, 2)
    assert first['rollout'].shape == (2, 2)
    assert first['relevance'].shape == (2, 2, 2)
    best = np.argsort(-first['probabilities'])[:2]
    assert first['relevance_labels'].tolist() == best.tolist()
    for name in ('class_token', 'rollout', 'relevance', 'probabilities'):
        np.testing.assert_array_equal(first[name], second[name])  # both are upright


def test_one_kind_of_a_named_class(run, model, photos, tmp_path):
    arguments = ('--what', 'relevance', '--classes', 'tulip, red', '--classes', '$rose$')
    done = run('--model', model, '--output', tmp_path / 'o', *arguments, photos / 'a.png')
    assert (done.returncode, done.stderr) == (0, '')
    assert sorted(path.name for path in (tmp_path / 'o' / 'a').iterdir()) == [
        'arrays.npz',
        'relevance.png',
    ]
    assert np.load(tmp_path / 'o' / 'a' / 'arrays.npz')['relevance_labels'].tolist() == [1, 2]


def test_distance_alone_makes_no_folder_for_each_image(run, model, photos, tmp_path):
    done = run('--model', model, '--output', tmp_path / 'o', '--what', 'distance', photos / 'a.png')
    assert done.returncode == 0
    assert sorted(path.name for path in (tmp_path / 'o').iterdir()) == [
        'arrays.npz',
        'attention_distance.png',
    ]


def test_without_images_the_model_alone_is_drawn(run, model, tmp_path):
    done = run('--model', model, '--output', tmp_path / 'o')
    assert (done.returncode, done.stderr) == (0, '')
    assert sorted(path.name for path in (tmp_path / 'o').iterdir()) == [
        'arrays.npz',
        'patch_filters.png',
        'position_similarity.png',
    ]


def test_nothing_is_written_if_no_image_can_be_read(run, model, photos, tmp_path):
    arguments = ('--what', 'rollout,class_token', photos / 'z.jpg')
    done = run('--model', model, '--output', tmp_path / 'o', *arguments)
    assert done.returncode == 1
    assert 'nothing was drawn' in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_hybrid_has_no_rgb_filters(run, tmp_path):
    config = CONFIG | {
        'patches': {'size': (2, 2)},
        'resnet': {'num_layers': (), 'width_factor': 0.5},
    }
    folder = save(tmp_path / 'model', config)
    done = run('--model', folder, '--output', tmp_path / 'o')
    assert done.returncode == 0
    assert 'Note: left out, patch_filters.png' in done.stderr
    done = run('--model', folder, '--output', tmp_path / 'p', '--what', 'filters')
    assert done.returncode == 1
    assert 'features of its ResNet' in done.stderr
    assert not (tmp_path / 'p').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--what', 'rolout', 'a.png'), 'nearest: rollout'),
        (('--layer', '2', 'a.png'), 'this model has numbers 0 to 1'),
        (('--head', 'x', 'a.png'), 'expected numbers such as'),
        (('--what', 'rollout', '--layer', '1', 'a.png'), '--layer is for class_token'),
        (('--what', 'rollout', '--classes', 'daisy', 'a.png'), '--classes is for relevance'),
        (('--classes', 'daisi', 'a.png'), "no class 'daisi'; the nearest is daisy"),
        (('--top_k', '0', 'a.png'), 'at least 1'),
        (('--what', 'rollout'), 'no images given'),
        (('--what', 'filters', 'a.png'), 'give no images'),
        (('nowhere.png',), 'no file or folder'),
        (('--model', 'x.onnx', 'a.png'), 'is an ONNX file'),
        (('--output', 'turned', 'a.png'), 'is not empty'),
        (('--output', 'a.png', 'a.png'), 'is a file'),
        (('--output', 'no/where', 'a.png'), 'there is no folder no'),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, model, photos, monkeypatch, arguments, message):
    monkeypatch.chdir(photos)
    before = sorted(photos.rglob('*'))
    done = run('--model', model, '--output', 'out', *arguments)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('attention.py: ') and message in done.stderr
    assert done.stderr.count('\n') == 1
    assert sorted(photos.rglob('*')) == before


@pytest.mark.parametrize(('layers', 'heads'), [(12, 3), (12, 12), (1, 12), (24, 1), (24, 16)])
def test_the_picture_of_all_maps_is_not_a_strip_and_its_numbers_can_be_read(layers, heads):
    image = np.zeros((60, 90, 3), np.uint8)
    maps = np.random.default_rng(0).random((layers, heads, 3, 3), np.float32)
    figure = attention_output.pictures.class_token(
        image, maps, range(layers), range(heads), title='x'
    )
    width, height = figure.get_size_inches()
    assert 0.6 < width / height < 1.8
    ticks = [
        t for axes in figure.axes[:-1] for t in axes.get_xticklabels() + axes.get_yticklabels()
    ]
    assert {t.get_text() for t in ticks} == {str(i) for i in range(max(layers, heads))}
    # Shown 800 pixels wide, the numbers of layers and heads are still 8 pixels high.
    assert min(t.get_size() for t in ticks) / 72 / width * 800 >= 8


def test_a_mixer_has_no_attention(run, photos, tmp_path):
    config = {
        'model_name': None,
        'patches': {'size': (8, 8)},
        'num_blocks': 1,
        'hidden_dim': 8,
        'tokens_mlp_dim': 8,
        'channels_mlp_dim': 8,
    }
    folder = save(tmp_path / 'model', config)
    done = run('--model', folder, '--output', tmp_path / 'o', photos / 'a.png')
    assert done.returncode == 1
    assert 'an MLP-Mixer has no attention' in done.stderr
    assert not (tmp_path / 'o').exists()


def test_a_failure_leaves_nothing(model, photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(attention_output.contact_sheet, 'save_figure', full)
    choice = attention_output.Choice(('positions',), (0,), (0,))
    with pytest.raises(UserError, match='cannot write .*No space left'):
        attention_output.write(
            tmp_path / 'o', model_folder.load(model), [], choice, title='a model'
        )
    assert list(tmp_path.iterdir()) == []


def test_folders_have_names_of_their_own():
    taken = {'arrays.npz'}
    paths = (
        'x/a.jpg',
        'y/A.png',
        'a-2.jpg',
        '-',
        '.hidden',
        'ü.jpg',
        '..',
        'q/a.jpg',
        'b\nc\\.png',
    )
    names = [attention_output._folder_name(path, taken) for path in paths]
    assert names[:5] == ['a', 'A-2', 'a-2-2', 'stdin', 'hidden']
    assert names[5:] == ['ü', 'image', 'a-3', 'b_c_']
    assert attention_output._folder_name('arrays.npz.jpg', taken) == 'arrays.npz-2'


def test_the_default_folder_is_named_after_the_model(run, model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ('', '-2'):
        result = run('--model', model, '--what', 'class_token', '--layer', '-1', photos / 'a.png')
        folder = f'attention-{model.parent.name}{number}'
        assert result.returncode == 0 and folder in result.stdout
        assert any((tmp_path / folder).rglob('*.png'))
