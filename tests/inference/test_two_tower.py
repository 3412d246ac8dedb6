"""Image-text models as folders, and the classes of a zero-shot classifier."""

import dataclasses
import json

import modules
import numpy as np
import pytest

from vit_jax.checkpoint import npz
from vit_jax.commands import zeroshot
from vit_jax.data import decode
from vit_jax.errors import UserError
from vit_jax.inference import model_folder, predict, two_tower


def test_probabilities_are_the_softmax_of_cosines(towers, photos):
    """Against the module itself, by hand; also for a batch that is not full."""
    names = ('rose', 'tulips')
    classifier = two_tower.ZeroShotClassifier(towers, names)
    found = dict(predict.predict(classifier, photos, batch=2))
    pixels = [decode.load_image(path, towers.preprocess) for path in photos]
    tokens = towers.tokenizer([f'a photo of a {name}' for name in names])
    assert tokens[1].tolist() == [2, 3, 4, 5, 3, 7, 9, 0]
    zimg, ztxt, out = modules.apply(
        towers.model, towers.params, images=np.stack(pixels) / 127.5 - 1, tokens=tokens, train=None
    )
    logits = np.asarray(float(out['t'][0]) * zimg @ ztxt.T, np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose([found[path] for path in photos], expected, atol=1e-5)


def test_a_folder_gives_the_same_model_back(towers, tmp_path):
    two_tower.save(tmp_path / 'lit', towers)
    assert {path.name for path in (tmp_path / 'lit').iterdir()} == {
        'README.md',
        'model.json',
        'params.npz',
        'vocab.txt',
    }
    page = (tmp_path / 'lit/README.md').read_text()
    for words in (
        "vit_jax zeroshot --model lit --classes 'rose,tulip' photo.jpg",
        '37,361 parameters',
        'embeddings of length 1 with 20 numbers',
        "Texts: BERT's word pieces (`vocab.txt`), 8 tokens",
        towers.preprocess.describe(),
        'Made from: made up.',
        'Nothing was measured',
    ):
        assert words in page, page
    assert '\n\n\n' not in page
    loaded = two_tower.load(tmp_path / 'lit')
    texts = ['a rose', 'tulips', '']
    np.testing.assert_array_equal(loaded.embed_texts(texts), towers.embed_texts(texts))
    assert loaded.model == towers.model
    with pytest.raises(UserError, match='exists'):
        two_tower.save(tmp_path / 'lit', towers)


@pytest.mark.parametrize(
    ('file', 'content', 'message'),
    [
        ('model.json', None, 'is neither a folder of a two-tower model .* nor one of LiT-B16B'),
        ('model.json', '{}', 'does not describe a two-tower model'),
        ('vocab.txt', '[PAD]\n[UNK]\n[CLS]\n' + 'x\n', None),
        ('vocab.txt', '[PAD]\n[CLS]\n' + 'x\n', 'has no token for unknown words'),
        (
            'vocab.txt',
            '[UNK]\n[CLS]\n' + ''.join(f'{n}\n' for n in range(96)),
            'has 98 tokens, and the model has 97: it is not the vocabulary of',
        ),
        ('vocab.txt', None, 'the vocabulary .* cannot be read'),
        ('params.npz', None, 'no such checkpoint file'),
    ],
)
def test_a_damaged_folder_is_named(towers, tmp_path, file, content, message):
    folder = tmp_path / 'lit'
    two_tower.save(folder, towers)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    if message is None:  # fewer tokens than the model knows are no mistake
        two_tower.load(folder)
        return
    with pytest.raises(UserError, match=message):
        two_tower.load(folder)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'out_dim': [20, 21]},
            r'not those of the model: txt/head/bias is \(20,\)',
        ),
        ({'text_model': 'gpt'}, 'text_model'),
        ({'pp': {'tokenizer_name': 'bert', 'size': 32}}, 'max_len is missing'),
        ({'image': {'hidden_size': 'x'}}, 'no model can be built as described'),
        ({'text': {'words': 3}}, 'no model can be built as described'),
    ],
)
def test_a_description_that_cannot_be_true(towers, tmp_path, change, message):
    folder = tmp_path / 'lit'
    two_tower.save(folder, towers)
    described = json.loads((folder / 'model.json').read_text())
    (folder / 'model.json').write_text(json.dumps(described | change))
    with pytest.raises(UserError, match=message):
        two_tower.load(folder)


def test_the_helpers_of_the_original(towers, tmp_path, monkeypatch):
    """`load_variables`, `vocab_path`, `get_tokenizer`, `get_pp`, `get_image_preprocessing`."""
    released = tmp_path / 'vit_models/lit'
    released.mkdir(parents=True)
    npz.save(released / 'LiT-tiny.npz', towers.params)
    (released / 'LiT-tiny.txt').write_bytes(towers.vocabulary.read_bytes())
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path))
    model = towers.model.clone(model_name='LiT-tiny')
    assert model.vocab_path == 'gs://vit_models/lit/LiT-tiny.txt'
    np.testing.assert_array_equal(model.load_variables()['params']['t'], towers.params['t'])
    assert model.get_tokenizer()(['a rose']).tolist() == [[2, 3, 6, 0, 0, 0, 0, 0]]
    monkeypatch.chdir(tmp_path)  # a copy here comes first, as in the original
    npz.save('LiT-tiny.npz', {**towers.params, 't': np.ones(1, np.float32)})
    assert model.load_variables()['params']['t'] == 1
    (tmp_path / 'LiT-tiny.txt').write_text('[UNK]\n[CLS]\nrose')
    assert model.get_tokenizer().size == 3
    monkeypatch.setenv('VIT_JAX_BASE_URL', 'http://localhost:9')
    with pytest.raises(
        UserError, match=r'LiT-new\.npz.*put it at .*or name it with load_variables'
    ):
        model.clone(model_name='LiT-new').load_variables()
    (tmp_path / 'LiT-tiny.txt').unlink()

    white = np.full((16, 10, 3), 255, np.uint8)
    framed = np.pad(white[2:-2], ((2, 2), (0, 0), (0, 0)))  # above and below, black
    squashed, cropped = (
        model.clone(pp={**model.pp, 'size': 4}).get_image_preprocessing(crop=crop)([framed])
        for crop in (False, True)
    )
    assert squashed.shape == cropped.shape == (1, 4, 4, 3)
    assert squashed.mean() < 1 and cropped.mean() == 1
    features = model.get_pp(crop=True)({'image': framed, 'text': 'a rose', 'id': 7})
    assert features['image'].shape == (32, 32, 3) and features['id'] == 7
    assert features['tokens'].tolist() == [2, 3, 6, 0, 0, 0, 0, 0]


def test_classes_that_are_none(towers):
    for names, message in (((), 'one is missing'), (('a', 'a'), "'a' is there twice")):
        with pytest.raises(UserError, match=message):
            two_tower.ZeroShotClassifier(towers, names)


def test_the_command(towers, photos, tmp_path, run_script, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'lit'
    two_tower.save(folder, towers)
    done = run_script('zeroshot.py', '--model', folder, '--classes', 'rose, tulip', *photos)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('rose') == done.stdout.count('tulip') == 3
    digits = 'zero,one,two,three,four,five,six,seven,eight,nine'
    done = run_script(
        'zeroshot.py',
        '--model',
        folder,
        '--dataset',
        'digits',
        '--split',
        'train[:5%]',
        '--classes',
        digits,
    )
    assert done.returncode == 0 and 'nine' in done.stdout, done.stderr
    assert len(list((tmp_path / 'cache/texts').iterdir())) == 2


def test_what_the_command_refuses(towers, photos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'lit'
    two_tower.save(folder, towers)
    for words, message in (
        (['--classes', 'a,b'], 'name either images or a --dataset'),
        (photos, '--classes says what the images may show'),
        (['--dataset', 'digits', '--classes', 'a,b'], '--classes names 2 classes, and'),
        ([*photos, '--classes', 'a', '--prompts', 'none.txt'], 'none.txt'),
        ([*photos, '--classes', 'a' * 100_000, '--prompts', 'b'], "'b' is no prompt"),
        ([*photos, '--classes', 'none.txt'], '--classes: there is no file none.txt'),
        ([*photos, '--classes', 'a', '--top_k', '-1'], '--top_k is how many to show'),
        ([*photos, '--query', ' ', '--top_k', '1'], '--query has no word in it'),
        ([*photos, '--query', 'rose', '--contact_sheet', 'no/x.png'], 'there is no folder no'),
    ):
        monkeypatch.setattr('sys.argv', ['zeroshot.py', '--model', str(folder), *words])
        assert zeroshot.main() == 1
        assert message in capsys.readouterr().err


def test_images_are_ranked_by_a_text(towers, photos, tmp_path):
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'no image')
    found, errors = two_tower.rank(
        towers, 'a rose', predict.Images([*photos, str(broken)]), batch=2
    )
    pixels = np.stack([decode.load_image(path, towers.preprocess) for path in photos])
    cosines = np.asarray(towers.embed_images(pixels) @ towers.embed_texts(['a rose'])[0])
    assert [path for path, _ in found] == [photos[i] for i in (-cosines).argsort()]
    np.testing.assert_allclose([cosine for _, cosine in found], np.sort(cosines)[::-1], atol=1e-6)
    assert [error.key for error in errors] == [str(broken)]


def test_a_zero_shot_classifier_is_saved_as_a_model_folder(towers, photos, tmp_path):
    """Predicting and ONNX give what the texts gave; a model with a projection and one without."""
    from vit_jax.export import onnx
    from vit_jax.export.options import Options
    from vit_jax.inference import classifier as classifier_lib

    names = ('rose', 'tulips')
    towers.source |= {'file': 'runs/x/model', 'metrics': {'mean_recall_test': 0.5}}
    classifier = two_tower.ZeroShotClassifier(towers, names)
    two_tower.save_classifier(tmp_path / 'zero', towers, classifier)
    expected = dict(predict.predict(classifier, photos, batch=2))
    page = (tmp_path / 'zero/README.md').read_text()
    assert 'embeddings of texts, one for each class: "a photo of a {}".' in page, page
    assert '- Made from: runs/x/model.' in page and 'recall' not in page
    model = model_folder.load(tmp_path / 'zero')
    assert model.class_names == names and model.preprocess == towers.preprocess
    onnx.save(onnx.build(model, Options()), tmp_path / 'zero.onnx')
    for path in (tmp_path / 'zero', tmp_path / 'zero.onnx'):
        found = dict(predict.predict(classifier_lib.open_classifier(path), photos, batch=2))
        np.testing.assert_allclose(
            [found[photo] for photo in photos], [expected[photo] for photo in photos], atol=1e-5
        )


def test_pixels_are_cut_to_whole_grey_levels(towers, photos):
    pixels = decode.load_image(photos[0], towers.preprocess)
    exact = decode.load_image(photos[0], dataclasses.replace(towers.preprocess, whole_levels=False))
    np.testing.assert_array_equal(pixels, np.floor(exact))
    assert (pixels != exact).any()
