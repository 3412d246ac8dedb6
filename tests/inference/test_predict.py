import csv
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import threading

import modules
import numpy as np
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.data import batches, image_files
from vit_jax.data.decode import BadImageError
from vit_jax.data.examples import Example
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import onnx
from vit_jax.inference import contact_sheet, labels, model_folder, output, predict
from vit_jax.inference import onnx as onnx_model
from vit_jax.inference.classifier import classify

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'predict.py'
CLASSES = ('daisy', 'sunflower', 'Tulpe à fleurs')


@pytest.fixture(scope='module')
def folder(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp('run') / 'model'
    tiny_model(CLASSES, {'dataset': 'made up'}, path)
    return path


@pytest.fixture(scope='module')
def model(folder):
    return model_folder.load(folder)


@pytest.fixture(scope='module')
def exported(model, tmp_path_factory):
    """The same model as an ONNX file: nothing to compile, and nothing else may differ."""
    path = tmp_path_factory.mktemp('exported') / 'model.onnx'
    onnx.save(onnx.build(model), path)
    return path


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
    logits = modules.apply(model.model, model.params, (pixels[None] - 127.5) / 127.5)
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
    with pytest.raises(UserError, match=r'holds no images \(avif, bmp, gif, .*webp\)'):
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
    config = {**model.model_config, 'classifier': 'token_unpooled'}
    unpooled = with_module(model, models.from_config(config, num_classes=len(CLASSES)))
    with pytest.raises(UserError, match='not a score for each of its 3 classes'):
        list(predict.predict(unpooled, [images / 'single.png']))


def table(path, probabilities, class_names, **options):
    file = io.StringIO()
    write = output.make_writer(file, 'table', class_names, **options)
    write(path, probabilities)
    return file.getvalue()


def test_table():
    probabilities = np.array([0.004, 0.995, 0.001], np.float32)
    assert table('p.jpg', probabilities, CLASSES) == (
        'p.jpg\n  sunflower       0.9950\n  daisy           0.0040\n  Tulpe à fleurs  0.0010\n'
    )
    text = table('p.jpg', probabilities, CLASSES, top_k=1)
    assert text == 'p.jpg\n  sunflower       0.9950\n'


class Mean:
    """A classifier that gives each image its mean as logits of two classes; `seen` are batches."""

    class_names = ('dark', 'light')
    preprocess = Preprocess(crop=4)

    def __init__(self):
        self.seen = []

    def logits(self, pixels):
        self.seen.append(pixels.copy())
        mean = pixels.mean(axis=(1, 2, 3))
        return np.stack([255 - mean, mean], axis=1)


class Grey:
    """A source of images as grey as their index says, of which some cannot be read."""

    class_names = ('dark', 'light')
    exif = False

    def __init__(self, count, bad=(), on_read=lambda index: None):
        self.count, self.bad, self.on_read = count, bad, on_read

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.on_read(index)
        if index in self.bad:
            raise BadImageError(str(index), 'broken')
        return Example(np.full((5, 5, 3), index, np.uint8), index % 2, str(index))


def test_last_batch_is_smaller_and_order_is_kept():
    model = Mean()
    scored = list(classify(model, Grey(7), batch=3, on_bad=None))
    assert [data['example'].tolist() for data, _ in scored] == [[0, 1, 2], [3, 4, 5], [6]]
    np.testing.assert_array_equal(np.concatenate([logits[:, 1] for _, logits in scored]), range(7))
    assert [len(batch) for batch in model.seen] == [3, 3, 1]


def test_place_of_an_unreadable_image_is_taken_by_another_of_the_batch():
    """Black, say, would change the scales of an int8 model for the whole batch."""
    model, errors = Mean(), []
    ((data, _),) = classify(model, Grey(4, bad=(0, 2)), batch=4, on_bad=errors.append)
    assert [error.key for error in errors] == ['0', '2']
    assert data['readable'].tolist() == [False, True, False, True]
    np.testing.assert_array_equal(model.seen[0].mean(axis=(1, 2, 3)), [1, 1, 1, 3])


@pytest.mark.parametrize('score', [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_an_error_that_names_the_image(score):
    class Breaks(Mean):
        def logits(self, pixels):
            logits = super().logits(pixels)
            logits[logits[:, 1] == 3, 0] = score
            return logits

    with pytest.raises(UserError, match='scores that are NaN or infinite for 3'):
        list(classify(Breaks(), Grey(5), batch=2, on_bad=None))
    # What stands in the place of an unreadable image does not count.
    assert len(list(classify(Breaks(), Grey(4, bad=(2, 3)), batch=2, on_bad=[].append))) == 2


def test_next_batches_are_read_while_one_is_computed():
    reading_second = threading.Event()

    class Waits(Mean):
        def logits(self, pixels):
            # The first batch is computed only when the second one is being read.
            assert reading_second.wait(timeout=60)
            return super().logits(pixels)

    source = Grey(6, on_read=lambda index: index >= 2 and reading_second.set())
    assert len(list(classify(Waits(), source, batch=2, on_bad=None))) == 3


def test_reading_goes_no_further_ahead_than_it_should():
    read = []
    results = classify(Mean(), Grey(100, on_read=read.append), batch=1, on_bad=None)
    next(results)
    results.close()
    assert len(read) <= 2 + batches.READ_AHEAD


def test_other_errors_of_reading_are_raised():
    def fail(index):
        raise KeyError('a mistake in the program')

    with pytest.raises(KeyError):
        list(classify(Mean(), Grey(3, on_read=fail), batch=2, on_bad=None))


def test_patterns(images, monkeypatch):
    monkeypatch.chdir(images)
    assert predict.find_images(['b/*.*']) == ['b/10.png', 'b/2.PNG']
    assert predict.find_images(['**/*.jpeg']) == ['a/x.jpeg']
    assert predict.find_images(['?']) == predict.find_images(['a', 'b']), 'folders are walked'
    everything = [path for path in predict.find_images(['**']) if os.path.isdir(path)]
    assert everything == []
    (images / 'odd[1].png').write_bytes(b'')
    assert predict.find_images(['odd[1].png']) == ['odd[1].png'], 'a file that is there is meant'
    with pytest.raises(UserError, match=r'nothing matches b/\*\.jpg'):
        predict.find_images(['b/*.jpg'])


@pytest.mark.parametrize('content', [b'b/10.png\nb\r\n\n', b'b/10.png\0b\0', b'b/10.png\nb/*.*'])
def test_paths_from_standard_input(images, monkeypatch, content):
    monkeypatch.chdir(images)
    found = predict.find_images(['-', 'single.png'], stdin=io.BytesIO(content))
    assert found == ['b/10.png', 'b/10.png', 'b/2.PNG', 'single.png']


def test_standard_input_that_names_nothing(images, monkeypatch):
    monkeypatch.chdir(images)
    with pytest.raises(UserError, match='standard input is empty'):
        predict.find_images(['-'], stdin=io.BytesIO(b'\n'))
    # BMP files begin with BM, and so may paths.
    with pytest.raises(UserError, match=r'no file or folder BMW/1\.jpg'):
        predict.find_images(['-'], stdin=io.BytesIO(b'BMW/1.jpg\n'))


@pytest.mark.parametrize('name', ['single.png', 'a/y.Bmp', 'a/x/ü 1.webp', 'a/x.jpeg'])
def test_an_image_from_standard_input(model, images, name):
    content = (images / name).read_bytes()
    (piped,) = predict.find_images(['-'], stdin=io.BytesIO(content))
    (path, probabilities), (_, expected) = predict.predict(model, [piped, images / name])
    assert path == '-'
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_every_format_is_known_from_paths_on_standard_input():
    for format in image_files.FORMATS:
        file = io.BytesIO()
        Image.new('RGB', (16, 16)).save(file, format)
        assert image_files.looks_like_image(file.getvalue()), format
    for paths in (b'P6\nx.jpg\n', b'GIF89a/1.gif\n', b'II*\0MM\0*', b'0.jpg', b'RIFF/x.webp'):
        assert not image_files.looks_like_image(paths), paths


def test_choose_classes():
    probabilities = np.float32([0.1, 0.4, 0.1, 0.4])
    assert predict.choose_classes(probabilities).tolist() == [1, 3, 0, 2]
    assert predict.choose_classes(probabilities, top_k=3).tolist() == [1, 3, 0]
    assert predict.choose_classes(probabilities, threshold=0.4).tolist() == [1, 3]
    assert predict.choose_classes(probabilities, top_k=1, threshold=0.4).tolist() == [1]
    assert predict.choose_classes(probabilities, top_k=9, threshold=0.5).tolist() == []
    text = table('p\n.jpg', probabilities, 'abcd', threshold=0.5)
    assert text == 'p\\n.jpg\n  (no class of at least 0.5)\n'


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the command in this process, which knows JAX already: (status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location('predict_script', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*arguments, stdin=b''):
        monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, arguments)])
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin)))
        status = script.main()
        return status, *capsys.readouterr()

    return call


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


def test_command_top_k(main, folder, images):
    status, out, err = main('--model', folder, '--top_k', '1', images / 'single.png')
    assert (status, err) == (0, '')
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--model', 'MISSING', 'single.png'], 'MISSING'),
        (['--model', 'MISSING.onnx', 'single.png'], 'there is no ONNX file'),
        (['--model', 'FOLDER', 'nothing.png'], 'there is no file or folder'),
        (['--model', 'FOLDER', '--batch', '0', 'single.png'], 'at least 1; got 0'),
    ],
)
def test_command_errors_are_one_line(main, folder, images, arguments, message):
    paths = {'FOLDER': folder}
    names = ('single.png', 'nothing.png', 'MISSING', 'MISSING.onnx')
    paths |= {name: images / name for name in names}
    status, out, err = main(*(paths.get(argument, argument) for argument in arguments))
    assert (status, out) == (1, '')
    assert message in err and len(err.splitlines()) == 1


def test_command_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', str(SCRIPT), '--help'], capture_output=True, text=True
    )
    assert done.returncode == 0 and '--top_k' in done.stdout
    loaded = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'argparse' in loaded
    assert not loaded & {'jax', 'flax', 'numpy', 'vit_jax.inference.predict', 'vit_jax.models'}


def test_json_lines(main, exported, model, images):
    (images / 'b' / 'broken.jpg').write_bytes(b'no image')
    status, out, err = main('--model', exported, '--format', 'jsonl', '--top_k', 2, images / 'b')
    first, _, broken = map(json.loads, out.splitlines())
    probabilities = expected(model, images / 'b' / '10.png')
    best = np.argsort(-probabilities)[:2]
    assert first['image'] == str(images / 'b' / '10.png') and first.keys() == {
        'image',
        'predictions',
    }
    assert [(one['label'], one['class']) for one in first['predictions']] == [
        (label, CLASSES[label]) for label in best
    ]
    np.testing.assert_allclose(
        [one['probability'] for one in first['predictions']], probabilities[best], atol=2e-6
    )
    assert broken['image'].endswith('broken.jpg') and 'not an image' in broken['error']
    assert status == 1 and err.startswith('1 of 3 images could not be read:\n')


def test_csv(main, exported, model, images):
    (images / 'b' / 'broken.jpg').write_bytes(b'no image')
    probabilities = expected(model, images / 'b' / '10.png')
    threshold = float(np.sort(probabilities)[-2]) - 1e-4
    _, out, _ = main(
        '--model', exported, '--format', 'csv', '--threshold', threshold, images / 'b' / '10.png',
        images / 'b' / 'broken.jpg',
    )  # fmt: skip
    header, *rows = csv.reader(out.splitlines())
    assert header == ['image', 'rank', 'label', 'class', 'probability', 'error']
    assert [row[1] for row in rows] == ['1', '2', '']
    assert [row[3] for row in rows[:2]] == [CLASSES[i] for i in np.argsort(-probabilities)[:2]]
    assert 'not an image' in rows[2][5]


def test_no_class_reaches_the_threshold(main, exported, images):
    command = ('--model', exported, '--threshold', 1, '--format')
    _, out, _ = main(*command, 'csv', images / 'single.png')
    assert out.splitlines()[1:] == [f'{images / "single.png"},,,,,']
    _, out, _ = main(*command, 'jsonl', images / 'single.png')
    assert json.loads(out)['predictions'] == []


def test_output_file_is_whole_or_absent(main, exported, images, monkeypatch):
    output = images / 'out.csv'
    command = ('--model', exported, '--format', 'csv', '--output', output, images / 'b')
    assert main(*command) == (0, '', '')
    assert len(output.read_text().splitlines()) == 1 + 2 * len(CLASSES)
    before = output.read_bytes()
    status, _, err = main(*command)
    assert status == 1 and err == (
        f'predict.py: --output {output} exists; name another file, or add --overwrite\n'
    )

    def fails(*args):
        raise UserError('the disk is gone')

    with monkeypatch.context() as patch:
        patch.setattr(onnx_model.OnnxClassifier, 'logits', fails)
        assert main(*command, '--overwrite')[0] == 1
    assert output.read_bytes() == before
    assert main(*command, '--overwrite', '--top_k', 1)[0] == 0
    assert len(output.read_text().splitlines()) == 3
    assert not [name for name in os.listdir(images) if name.endswith('.part')]


def test_lists_and_images_are_piped_in(main, exported, images):
    paths = f'{images / "single.png"}\n'.encode()
    status, listed, _ = main('--model', exported, '--top_k', 1, '-', stdin=paths)
    assert status == 0 and listed.splitlines()[0] == str(images / 'single.png')
    content = (images / 'single.png').read_bytes()
    _, piped, _ = main('--model', exported, '--top_k', 1, '-', stdin=content)
    assert piped.splitlines() == ['-', listed.splitlines()[1]]


def test_contact_sheet(main, exported, images, monkeypatch):
    (images / 'b' / 'broken.jpg').write_bytes(b'no image')
    (images / 'single.png').rename(images / '$x$ 写真.png')  # no formula; no such letters
    sheet = images / 'sheet.png'
    monkeypatch.setattr(contact_sheet, 'MAX_IMAGES', 2)
    status, _, err = main(
        '--model', exported, '--contact_sheet', sheet, images / 'b', images / '$x$ 写真.png'
    )
    assert status == 1
    assert err.splitlines()[0] == f'{sheet} shows the first 2 of 3 images'
    with Image.open(sheet) as picture:
        assert picture.format == 'PNG' and min(picture.size) > 200
        assert np.asarray(picture.convert('L')).std() > 10
    monkeypatch.setattr(contact_sheet, 'MAX_IMAGES', 48)
    main('--model', exported, '--contact_sheet', sheet, '--overwrite', images / '$x$ 写真.png')
    status, _, err = main('--model', exported, '--contact_sheet', sheet, images / 'b')
    assert status == 1 and 'exists' in err


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--top_k', '0'], '--top_k is the number of classes to show, at least 1; got 0'),
        (['--top_k', '-3'], 'at least 1; got -3'),
        (['--threshold', '1.5'], '--threshold is a probability, from 0 to 1; got 1.5'),
        (['--threshold', 'nan'], 'from 0 to 1; got nan'),
        (['--labels', 'imagenet1k'], 'has 1,000 names, but'),
        (['--labels', 'nowhere.txt'], 'there is no file of labels nowhere.txt'),
        (['--output', 'nowhere/x.csv'], 'there is no folder nowhere'),
        (['--contact_sheet', '.'], '. is a folder'),
        (['*.gif'], 'nothing matches *.gif'),
    ],
)
def test_mistakes_are_told_in_one_line(main, exported, images, arguments, message):
    status, out, err = main('--model', exported, images / 'single.png', *arguments)
    assert (status, out) == (1, '')
    assert err.startswith('predict.py: ') and message in err and err.count('\n') == 1


def test_many_classes_show_the_best(main, model, images, monkeypatch):
    wide = dataclasses.replace(
        model,
        model=models.from_config(model.model_config, num_classes=1000),
        params={
            **model.params,
            'head': {
                'kernel': np.zeros((8, 1000), np.float32),
                'bias': np.arange(1000, dtype=np.float32) / 100,
            },
        },
        class_names=labels.numbered(1000),
    )
    monkeypatch.setattr(model_folder, 'load', lambda path, **kwargs: wide)
    status, out, err = main('--model', 'x.npz', images / 'single.png')
    assert status == 0
    assert err.splitlines()[-1] == (
        'Note: the 5 most probable of 1,000 classes (--top_k 1000 for all)'
    )
    names = [line.rsplit(maxsplit=1)[0].strip() for line in out.splitlines()[1:]]
    assert names == list(labels.imagenet1k()[:-6:-1]), 'a model of 1,000 classes without names'
    _, out, _ = main('--model', 'x.npz', '--labels', 'none', '--top_k', 1000, images / 'single.png')
    assert len(out.splitlines()) == 1001 and 'class 999 ' in out


def test_progress_bar_is_for_terminals_and_not_in_the_output(exported, images):
    pty = pytest.importorskip('pty', reason='there are no pseudo-terminals here')
    ours, theirs = pty.openpty()
    command = [sys.executable, str(SCRIPT), '--model', str(exported), '--format', 'csv', images]
    with os.fdopen(ours, 'rb', buffering=0) as terminal:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        shown = b''
        try:
            while piece := terminal.read(65536):
                shown += piece
        except OSError:  # How Linux tells that nobody has the other end any more.
            pass
        out, _ = child.communicate()
    assert child.returncode == 0 and b'6/6' in shown
    assert len(out.splitlines()) == 1 + 6 * len(CLASSES) and b'\x1b' not in out
