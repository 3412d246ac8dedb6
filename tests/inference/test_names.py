"""Names that would do something to a terminal, a spreadsheet or a picture, from every source."""

import csv
import dataclasses
import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from safetensors import numpy

from vit_jax.checkpoint import inspection
from vit_jax.errors import UserError, printable, printable_lines
from vit_jax.export import onnx
from vit_jax.export import pytorch as export
from vit_jax.inference import classifier, contact_sheet, labels, model_folder, output

EVIL = ('\x1b[2J\x1b]0;title\x07', 'b\nfake.jpg\n  cat 1.0000', '=1+1\u202ex\x9b')
SHOWN = (r'\x1b[2J\x1b]0;title\x07', r'b\nfake.jpg\n  cat 1.0000', r'=1+1\u202ex\x9b')


def test_printable():
    assert tuple(map(printable, EVIL)) == SHOWN == tuple(map(printable, SHOWN))
    for kept in ('Gänseblümchen', '写真 1', '👩‍🌾', 'می‌خواهم', 'a\xa0b', r'C:\new'):
        assert printable(kept) == kept
    assert printable('\udcff\u2028\u2066\0\r') == r'\udcff\u2028\u2066\x00\r'
    assert str(UserError('a:\n  b\nvit_jax: done\x1b')) == 'a:\n  b' + r'\nvit_jax: done\x1b'
    assert printable_lines(7) == '7'


@pytest.fixture(scope='module')
def folder(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp('run') / 'model'
    tiny_model(EVIL, {'dataset': 'x'}, path)
    return path


def from_onnx(folder, tmp_path):
    onnx.save(onnx.build(model_folder.load(folder)), tmp_path / 'm.onnx')
    return classifier.open_classifier(tmp_path / 'm.onnx')


def from_file_of_names(text):
    def names(folder, tmp_path):
        (tmp_path / 'names').write_text(text, encoding='utf-8', newline='')
        return classifier.open_classifier(folder, labels=str(tmp_path / 'names'))

    return names


def from_hugging_face(folder, tmp_path):
    export.write(tmp_path / 'hf', model_folder.load(folder), to='huggingface')
    path = tmp_path / 'hf/config.json'
    config = json.loads(path.read_text())
    config['id2label'] = {str(i): name for i, name in enumerate(EVIL)}
    path.write_text(json.dumps(config))
    return model_folder.load(tmp_path / 'hf')


@pytest.mark.parametrize(
    'opened',
    [
        lambda folder, tmp_path: model_folder.load(folder),
        from_onnx,
        from_hugging_face,
        from_file_of_names(json.dumps(EVIL)),
        from_file_of_names(json.dumps({name: i for i, name in enumerate(EVIL)})),
    ],
    ids=['model folder', 'ONNX', 'Hugging Face', 'list', 'object'],
)
def test_class_names_of_every_source_are_escaped(opened, folder, tmp_path):
    assert opened(folder, tmp_path).class_names == SHOWN


def test_names_of_a_text_file(folder, tmp_path):
    text = f'{EVIL[0]}\nb\n{EVIL[2]}\n'
    assert from_file_of_names(text)(folder, tmp_path).class_names == (SHOWN[0], 'b', SHOWN[2])


def test_escaped_names_are_matched_with_those_of_the_data():
    assert labels.remap(EVIL[::-1], SHOWN, 'data') == (2, 1, 0)


@pytest.fixture
def evil_image(tmp_path):
    path = tmp_path / 'photos' / '\x1b[31mx\n  cat  1.0000\u202e.png'
    path.parent.mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path, 'png')
    os.link(path, path.with_name('@SUM(1).png'))
    (path.with_name('broken\x1b\n.png')).write_bytes(b'x')
    return path


@pytest.mark.parametrize('form', output.FORMATS)
def test_predictions_hold_no_raw_names(form, folder, evil_image, run_script):
    done = run_script('predict.py', '--model', folder, '--format', form, evil_image.parent)
    assert done.returncode == 1
    shown = done.stdout + done.stderr
    assert shown.replace('\n', '').isprintable()
    assert not any(line.startswith(('fake', '  cat')) for line in shown.splitlines())
    assert r'\x1b[2J' in shown.replace('\\\\', '\\') and r'broken\x1b\n.png' in shown
    if form == 'jsonl':  # what a program reads is the path
        assert str(evil_image) in {json.loads(line)['image'] for line in done.stdout.splitlines()}


def test_formulas_in_csv(folder, evil_image, run_script, monkeypatch):
    monkeypatch.chdir(evil_image.parent)
    words = ['predict.py', '--model', folder, '--format', 'csv', '@SUM(1).png']
    found = []
    for option in ([], ['--escape_formulas']):
        done = run_script(*words, *option)
        found.append([[row[0], row[3]] for row in csv.reader(io.StringIO(done.stdout))][1:])
    raw, escaped = map(sorted, found)
    assert ['@SUM(1).png', SHOWN[2]] in raw
    assert (
        sorted([f"'{path}", name if name[0] != '=' else f"'{name}"] for path, name in raw)
        == escaped
    )
    refused = run_script('predict.py', '--model', folder, '--escape_formulas', '@SUM(1).png')
    assert refused.returncode == 1 and 'goes with --format csv' in refused.stderr


def test_pictures_hold_no_raw_names(evil_image, monkeypatch, tmp_path):
    drawn, save = [], contact_sheet.save_figure

    def kept(figure, *arguments, **options):
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(contact_sheet, 'save_figure', kept)
    sheet = tmp_path / 'x.png'
    contact_sheet.save(sheet, [(str(evil_image), np.array([0.5, 0.4, 0.1]))], EVIL, title=EVIL[1])
    (figure,) = drawn
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, 'get_text'))]
    assert len([text for text in texts if text]) >= 5
    shown = ''.join(texts).replace('\n', '')  # our own: long names are wrapped
    assert printable(shown) == shown and r'fake.jpg\n' in shown, texts


def test_tensor_names(tmp_path, folder):
    evil = '\x1b[2Jextra\n  a\u202e'
    weights = dict(np.load(folder / 'params.npz'))
    np.savez(tmp_path / 'a.npz', **weights, **{evil: np.ones(3, np.float32)})
    export.write(tmp_path / 'timm', model_folder.load(folder), to='timm')
    file = tmp_path / 'timm/model.safetensors'
    numpy.save_file(numpy.load_file(file) | {evil: np.ones(3, np.float32)}, file)
    for path in (tmp_path / 'a.npz', tmp_path / 'timm'):
        with pytest.raises(UserError, match=r'\\x1b\[2Jextra\\n  a\\u202e') as error:
            model_folder.load(path)
        assert str(error.value).replace('\n', '').isprintable()
    array = inspection.Array(evil, (3,), 'float32', 0, 0, 0, 0)
    found = inspection.inspect(folder)
    shown = dataclasses.replace(found, arrays=(array,), notes=(evil,), path=evil)
    assert f'{shown}{shown.table()}'.replace('\n', '').isprintable()
