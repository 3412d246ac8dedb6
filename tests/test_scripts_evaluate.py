"""vit_jax evaluate and what it is made of: metrics, pictures, tables."""

import csv
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from PIL import Image
from pyarrow import parquet

from vit_jax import evaluate as training_evaluation
from vit_jax import sharding, steps
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.evaluate import Outcomes
from vit_jax.export import onnx
from vit_jax.inference import classifier, contact_sheet, labels, metrics_report, model_folder
from vit_jax.inference import metrics as metrics_lib

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / 'scripts' / 'evaluate.py'
CLASSES = ('aster', 'daisy', 'iris', 'lily', 'poppy', 'rose', 'tulip')


@pytest.fixture(scope='module')
def run(tiny_model, tmp_path_factory):
    """`photos/{train,test}/CLASS`, a model folder and ONNX files of the same model."""
    root = tmp_path_factory.mktemp('run')
    rng = np.random.default_rng(3)
    for label, name in enumerate(CLASSES):
        for split in ('train', 'test'):
            folder = root / 'photos' / split / name
            folder.mkdir(parents=True)
            for i in range(3 if split == 'test' else 1):
                pixels = rng.integers(0, 255 - 20 * label, (18, 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    source = {'dataset': str(root / 'photos'), 'train': 'train', 'test': 'test'}
    model = tiny_model(CLASSES, source, root / 'model')
    onnx.save(onnx.build(model), root / 'model.onnx')
    return root


@pytest.fixture
def main(run_script):
    """Runs the command in this process: (status, stdout, stderr)."""

    def call(*words):
        done = run_script('evaluate.py', *words)
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of a command."""
    for name in ('draw_confusion', 'draw_reliability'):
        monkeypatch.setattr(metrics_report, name, lambda *_, **__: Figure((1, 1)))


def outcomes(logits, labels, readable):
    return Outcomes(labels, readable, **training_evaluation.outcomes(logits, labels))


def test_metrics_by_hand():
    # Labels a, a, b, b, b and c that cannot be read; predicted a, b, b, b, a.
    logits = np.log(np.float32(
        [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.5, 0.3], [0.1, 0.9, 1e-9], [0.4, 0.3, 0.3],
         [0.2, 0.2, 0.6]]
    ))  # fmt: skip
    wanted = np.array([0, 0, 1, 1, 1, 2])
    readable = np.array([True] * 5 + [False])
    found = metrics_lib.compute(outcomes(logits, wanted, readable), 'abc')
    assert (found.count, found.unreadable, found.accuracy_top5) == (6, 1, None)
    assert found.accuracy == pytest.approx(3 / 6), 'the unreadable one is not right'
    assert found.loss == pytest.approx(-np.log([0.7, 0.3, 0.5, 0.9, 0.3]).mean(), abs=1e-6)
    assert found.confusion.toarray().tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert found.support.tolist() == [2, 3, 1]
    np.testing.assert_allclose(found.precision, [1 / 2, 2 / 3, np.nan])
    np.testing.assert_allclose(found.recall, [1 / 2, 2 / 3, 0])
    np.testing.assert_allclose(found.f1, [1 / 2, 2 / 3, 0])
    assert found.macro(found.precision) == pytest.approx((1 / 2 + 2 / 3) / 3)
    # confidences 0.7 right, 0.6 wrong, 0.5 right, 0.9 right, 0.4 wrong: each in a bin of its own.
    assert found.calibration.expected_error == pytest.approx((0.3 + 0.6 + 0.5 + 0.1 + 0.4) / 5)
    told = found.to_dict()
    assert told['confusion']['counts'] == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 2]]
    assert [tuple(pair.values()) for pair in told['most_confused']] == [
        ('a', 'b', 1, 1 / 2), ('b', 'a', 1, 1 / 3)
    ]  # fmt: skip
    text = json.dumps(told, allow_nan=False)
    assert json.loads(text)['classes'][2] == {
        'class': 'c', 'precision': None, 'recall': 0.0, 'f1': 0.0, 'support': 1,
    }  # fmt: skip


def test_calibration_by_hand():
    confidence = np.array([0.0, 0.05, 0.1, 0.35, 0.3, 1.0, 0.95])
    right = np.array([0, 0, 1, 1, 0, 1, 1], bool)
    found = metrics_lib.calibrate(confidence, right, bins=10)
    assert found.count.tolist() == [3, 0, 1, 1, 0, 0, 0, 0, 0, 2], 'bins are open on the left'
    np.testing.assert_allclose(found.accuracy[[0, 2, 3, 9]], [1 / 3, 0, 1, 1])
    np.testing.assert_allclose(found.confidence[[0, 2, 3, 9]], [0.05, 0.3, 0.35, 0.975])
    assert np.isnan(found.accuracy[1])
    gaps = np.array([1 / 3 - 0.05, 0.3, 0.65, 0.025])
    assert found.expected_error == pytest.approx((gaps * [3, 1, 1, 2]).sum() / 7)
    assert found.largest_error == pytest.approx(0.65)


def test_agrees_with_the_evaluation_of_a_training_run(run, tmp_path):
    """On photos that are all there, and with one that cannot be read."""
    for file in (run / 'photos').rglob('*.png'):
        copy = tmp_path / 'photos' / file.relative_to(run / 'photos')
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b'broken' if copy.match('test/iris/1.png') else file.read_bytes())
    model = model_folder.load(run / 'model')
    opened = classifier.JaxClassifier(model)
    mesh = sharding.create_mesh(1)
    step = steps.make_eval_step(model.model, mesh, NamedSharding(mesh, PartitionSpec()))
    for root, unreadable in ((run, 0), (tmp_path, 1)):
        source = sources.open_dataset(str(root / 'photos')).select('test+train')
        errors = []
        expected, _ = training_evaluation.evaluate(
            step, model.params, source, model.preprocess, mesh, batch=8, on_bad=errors.append
        )
        told, reported = metrics_lib.collect(opened, source, model_labels=range(7), batch=5)
        found = metrics_lib.compute(told, CLASSES)
        assert found.accuracy == pytest.approx(expected['accuracy_test'])
        assert found.accuracy_top5 == pytest.approx(expected['accuracy_top5_test'])
        assert found.loss == pytest.approx(expected['loss_test'], rel=1e-5)
        assert 0 < found.accuracy < found.accuracy_top5 < 1, 'the test tells them apart'
        assert [one.key for one in reported] == [one.key for one in errors]
        assert found.unreadable == expected.get('unreadable_test', 0) == unreadable
        assert found.support.tolist() == [4] * 7 and found.confusion.sum() == 28 - unreadable


def test_the_three_sources_of_a_model_agree(run, main, tmp_path, request):
    results = []
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join(CLASSES))
    weights = run / 'model' / 'params.npz'
    bare = (weights, '--labels', names, '--dataset', run / 'photos')
    for i, words in enumerate([(run / 'model',), (run / 'model.onnx',), bare]):
        output = tmp_path / f'evaluation{i}'
        status, out, err = main('--model', *words, '--output', output, '--batch', 8)
        assert (status, err) == (0, ''), 'the model tells which images its training held out'
        out = ' '.join(out.split())  # the title of a table is broken where the line ends
        assert f'on {run / "photos"} test (21 examples)' in out and 'top-5 accuracy' in out
        results.append(json.loads((output / 'evaluation.json').read_text()))
        for picture in ('confusion_matrix.png', 'reliability.png'):
            with Image.open(output / picture) as opened:
                assert opened.format == 'PNG'
                assert i or np.asarray(opened.convert('L')).std() > 10
        if not i:
            request.getfixturevalue('no_pictures')  # once is enough
    first, second, third = results
    assert first['images'] == 21 and first['model_source']['test'] == 'test'
    for other in (second, third):
        assert other['confusion'] == first['confusion']
        assert other['loss'] == pytest.approx(first['loss'], rel=1e-5)
        assert [entry['class'] for entry in other['classes']] == list(CLASSES)


def test_classes_are_matched_by_name(run, main, no_pictures, tmp_path):
    """The same photos under names in another order: another label for each, the same result."""
    turned = {'daisy': 'a daisy', 'tulip': 'A tulip', 'aster': 'z aster'}
    for file in (run / 'photos' / 'test').rglob('*.png'):
        name = turned.get(file.parent.name, file.parent.name)
        copy = tmp_path / 'photos' / name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    names = tmp_path / 'names.json'
    names.write_text(json.dumps([turned.get(name, name) for name in CLASSES]))
    words = ('--model', run / 'model.onnx', '--output')
    main(*words, tmp_path / 'plain')
    status, _, _ = main(
        *words, tmp_path / 'turned', '--dataset', tmp_path / 'photos', '--split', 'train',
        '--labels', names,
    )  # fmt: skip
    plain, other = (
        json.loads((tmp_path / name / 'evaluation.json').read_text())
        for name in ('plain', 'turned')
    )
    assert status == 0 and other['labels_of_data_in_model'] == [6, 1, 2, 3, 4, 5, 0]
    assert other['confusion'] == plain['confusion'] and other['accuracy'] == plain['accuracy']
    status, _, err = main('--model', run / 'model.onnx', '--dataset', tmp_path / 'photos')
    assert status == 1 and err.count('\n') == 1
    assert '3 of the 7 classes' in err and "none of the model's 7 classes" in err
    class_map = tmp_path / 'map.txt'
    class_map.write_text('\n'.join(f'{new}\t{CLASSES.index(old)}' for old, new in turned.items()))
    main(*words, tmp_path / 'map', '--dataset', tmp_path / 'photos', '--class_map', class_map)
    mapped = json.loads((tmp_path / 'map' / 'evaluation.json').read_text())
    assert mapped['confusion'] == plain['confusion']


def test_unreadable_images_are_reported(run, main, no_pictures, tmp_path):
    for i, name in enumerate(CLASSES):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        source = run / 'photos' / 'test' / name / '0.png'
        content = b'broken' if i == 2 else source.read_bytes()
        (tmp_path / 'photos' / name / '0.png').write_bytes(content)
    words = ('--model', run / 'model.onnx', '--dataset', tmp_path / 'photos', '--split', 'train')
    status, out, err = main(*words, '--output', tmp_path / 'out')
    bad = tmp_path / 'photos' / 'iris' / '0.png'
    assert status == 1 and 'of these unreadable, counted as wrong' in out
    assert err.splitlines()[0] == '1 of 7 images could not be read:' and f'  {bad}: ' in err
    found = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    assert (found['images'], found['unreadable'], found['classes'][2]['recall']) == (7, 1, 0.0)
    assert [entry['image'] for entry in found['unreadable_images']] == [str(bad)]
    for name in CLASSES:
        (tmp_path / 'photos' / name / '0.png').write_bytes(b'broken')
    status, out, err = main(*words)
    assert (status, out) == (1, '')
    assert err == 'evaluate.py: not one of the 7 images to evaluate on can be read\n'


def test_what_each_image_was_taken_for(run, main, tmp_path):
    shutil.copytree(run / 'photos', tmp_path / 'photos')
    (tmp_path / 'photos/test/iris/1.png').write_bytes(b'broken')
    words = ('--model', run / 'model.onnx', '--dataset', tmp_path / 'photos', '--predictions')
    for name in ('a.csv', 'a.parquet'):
        assert main(*words, tmp_path / name)[0] == 1, 'one image cannot be read'
    with open(tmp_path / 'a.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / 'a.parquet').to_pylist()
    assert len(rows) == len(table) == 21
    for row, typed in zip(rows, table, strict=True):
        assert [str('' if value is None else value) for value in typed.values()] == [*row.values()]
        assert pathlib.Path(row['image']).parent.name == row['true']
        if row['readable'] == 'True':
            assert (row['rank'] == '1') == (row['predicted'] == row['true'])
            assert 0 < typed['probability'] <= typed['confidence'] <= 1
        else:
            assert row['image'].endswith('iris/1.png') and row['predicted'] == row['rank'] == ''
    status, _, err = main(*words, tmp_path / 'a.csv')
    assert status == 1 and 'exists' in err
    assert 'NAME.csv or NAME.parquet' in main(*words, tmp_path / 'a.txt')[2]


def test_output_is_whole_new_and_replaced_on_request_only(
    run, main, no_pictures, tmp_path, monkeypatch
):
    words = ('--model', run / 'model.onnx', '--output')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
    for extra, message in (((), 'exists'), (('--overwrite',), 'is not an earlier evaluation')):
        status, out, err = main(*words, tmp_path / 'mine', *extra)
        assert (status, out) == (1, '') and message in err and err.count('\n') == 1
    assert os.listdir(tmp_path / 'mine') == ['thesis.txt']
    assert 'there is no folder' in main(*words, tmp_path / 'no' / 'where')[2]
    assert main(*words, tmp_path / 'out')[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(metrics_report, 'draw_reliability', lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(*words, tmp_path / 'out', '--overwrite')
    assert len(os.listdir(tmp_path / 'out')) == 3
    assert main(*words, tmp_path / 'out', '--overwrite')[0] == 0
    assert sorted(os.listdir(tmp_path)) == ['mine', 'out']


@pytest.mark.parametrize(
    'words, message',
    [
        (('--dataset', 'digits'), 'none of the model'),
        (('--dataset', 'digits', '--labels', 'none', '--split', 'tset'), 'tset'),
        (('--labels', 'imagenet1k'), 'has 1,000 names, but'),
        (('--batch', '0'), 'at least 1; got 0'),
        (('--dataset', './nowhere'), 'there is no folder ./nowhere'),
    ],
)
def test_mistakes_are_told_in_one_line(run, main, words, message):
    status, out, err = main('--model', run / 'model.onnx', *words)
    assert (status, out) == (1, '')
    assert err.startswith('evaluate.py: ') and message in err and err.count('\n') == 1


def test_weights_do_not_tell_the_dataset_nor_the_names(run, main):
    weights = run / 'model' / 'params.npz'
    status, _, err = main('--model', weights)
    assert status == 1 and 'name a --dataset' in err
    status, _, err = main('--model', weights, '--dataset', 'digits')
    assert status == 1 and 'the model has 7 classes without names' in err


def test_split_is_the_one_that_training_holds_out(main, tiny_model, tmp_path, caplog):
    """On digits that is a fifth of them, as configs/datasets.py says."""
    path = tmp_path / 'digits.onnx'
    onnx.save(onnx.build(tiny_model(labels.numbered(10))), path)
    status, out, _ = main('--model', path, '--dataset', 'digits')
    out = ' '.join(out.split())
    assert status == 0 and f'{path} on digits train[80%:] (359 examples)' in out
    assert (
        'the model has no class names; its classes are taken for those of the data' in caplog.text
    )


def many_classes(count):
    """Metrics of 5 images of each; the first half of the classes is never mistaken."""
    rng = np.random.default_rng(0)
    wanted = np.repeat(np.arange(count), 5)
    logits = rng.normal(0, 1, (5 * count, count)).astype(np.float32)
    logits[np.arange(5 * count), wanted] += np.where(wanted < count // 2, 90, 1)
    names = [f'[b]class {i}[/b]' if i else '$a$ 写' for i in range(count)]
    return metrics_lib.compute(outcomes(logits, wanted, np.ones(5 * count, bool)), names)


def test_a_thousand_classes_make_a_small_file():
    found = many_classes(1000)
    assert len(json.dumps(found.to_dict(), indent=1)) < 500_000
    counts = found.to_dict()['confusion']['counts']
    assert sum(images for _, _, images in counts) == 5000
    pairs = found.to_dict()['most_confused']
    assert len(pairs) == metrics_lib.MAX_PAIRS
    assert [p['images'] for p in pairs] == sorted((p['images'] for p in pairs), reverse=True)


def test_the_confusion_of_many_classes_has_the_worst_first(monkeypatch):
    monkeypatch.setattr(metrics_report, 'MAX_CLASSES', 50)
    found = many_classes(110)
    title = 'runs/' + 'long/' * 50
    axes, _ = (figure := metrics_report.draw_confusion(found, title=title)).axes
    rows = [text.get_text() for text in axes.get_yticklabels()]
    dense = found.confusion.toarray()
    mistakes = dense.sum(axis=0) + dense.sum(axis=1) - 2 * dense.diagonal()
    shown = mistakes[[found.class_names.index(name) for name in rows]].tolist()
    assert shown == sorted(mistakes.tolist(), reverse=True)[:50]
    assert axes.get_xticklabels()[-1].get_text() == '(other classes)'
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    assert 'the 50 of 110 classes with most mistakes, the worst first' in figure.get_suptitle()
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    # Where the picture is shrunk to a page of 1,100 px, its title can still be read.
    assert figure._suptitle.get_fontsize() * 1100 / (72 * figure.get_figwidth()) > 9


def test_captions_of_long_names_stay_apart(tmp_path):
    names = [f'{name} of a very long name, another name, a third one' * 2 for name in CLASSES]
    Image.new('RGB', (40, 30)).save(tmp_path / 'a.png')
    figures, save = [], contact_sheet.save_figure

    def kept(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contact_sheet, 'save_figure', kept)
        shown = [(str(tmp_path / 'a.png'), np.ones(7, np.float32) / 7)] * 5
        contact_sheet.save(tmp_path / 'x.png', shown, names, title='title ' * 60)
    (figure,) = figures
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in (*figure.texts, figure._suptitle)]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    apart = [not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]
             if a.bounds != b.bounds]  # fmt: skip
    assert all(apart) and len(figure.texts) >= 5 * 3
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)


def test_many_classes_in_tables(tmp_path):
    found = many_classes(100)
    contact_sheet.save_figure(metrics_report.draw_confusion(found, title='$t$'), tmp_path / 'x.png')
    from rich import console

    out = console.Console(width=200, record=True, file=open(os.devnull, 'w'))
    out.print(metrics_report.tables(found, title='[b]t[/b]'))
    text = out.export_text()
    out.file.close()
    assert 'The 30 of 100 classes with the lowest F1' in text and '[b]class' in text
    assert 'often taken for' in text


def test_one_image_that_can_be_read_is_needed():
    nothing = outcomes(np.zeros((2, 3), np.float32), np.array([0, -1]), np.zeros(2, bool))
    with pytest.raises(UserError, match='not one of the 2 images'):
        metrics_lib.compute(nothing, 'abc')
