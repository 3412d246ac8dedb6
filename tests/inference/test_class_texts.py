"""Prompts, and the embeddings of classes, computed once."""

import logging

import modules
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.inference import class_texts, two_tower

NAMES = ('rose', 'tulips', 'daisy')


def spied(towers, monkeypatch):
    """The lists of texts that are embedded from now on."""
    lists, embed = [], towers.embed_texts
    monkeypatch.setattr(towers, 'embed_texts', lambda texts: lists.append(texts) or embed(texts))
    return lists


def test_the_80_prompts_are_those_of_clip():
    assert len(set(class_texts.CLIP80)) == 80
    assert all(prompt.count('{}') == 1 for prompt in class_texts.CLIP80)
    assert class_texts.read_prompts('clip80') == class_texts.CLIP80
    assert class_texts.CLIP80[0] == 'a bad photo of a {}.'
    assert class_texts.CLIP80[-1] == 'a tattoo of the {}.'


def test_prompts_are_averaged_on_the_sphere(towers):
    """Each of length 1, and their mean: in float64; a text tower compiled once for 240 texts."""
    before = towers._embed_tokens._cache_size()
    found = class_texts.embed_classes(towers, NAMES, class_texts.CLIP80, cache=False)
    assert towers._embed_tokens._cache_size() == before + 1
    texts = [prompt.replace('{}', name) for name in NAMES for prompt in class_texts.CLIP80]
    tokens = towers.tokenizer(texts)
    _, _, out = modules.apply(towers.model, towers.params, tokens=tokens, train=None)
    features = np.asarray(out['txt/logits'], np.float64)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    expected = features.reshape(3, 80, -1).mean(1)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    classifier = two_tower.ZeroShotClassifier(towers, NAMES, class_texts.CLIP80)
    pixels = np.full((1, 32, 32, 3), 100, np.float32)
    logits = towers.temperature * np.asarray(towers.embed_images(pixels)) @ expected.T
    np.testing.assert_allclose(classifier.logits(pixels), logits, rtol=1e-4)


def test_embeddings_are_kept_and_taken_again(towers, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    lists = spied(towers, monkeypatch)

    def embed(names=NAMES, prompts=('a {}',), cache=True):
        return class_texts.embed_classes(towers, names, prompts, cache=cache)

    first = embed()
    np.testing.assert_array_equal(embed(), first)
    assert len(lists) == 1
    (file,) = (tmp_path / 'cache/texts').iterdir()
    assert b'rose' not in file.read_bytes()
    for change in ({'names': NAMES[::-1]}, {'prompts': ('{}',)}, {'cache': False}):
        embed(**change)
    assert len(lists) == 4
    kept = dict(towers.params)
    towers.params['t'] = towers.params['t'] + 1  # which no embedding of a text depends on
    embed()
    assert len(lists) == 4
    towers.params['txt'] = {
        **kept['txt'],
        'head': {n: 2 * a for n, a in kept['txt']['head'].items()},
    }
    embed()
    towers.params.update(kept)
    assert len(lists) == 5
    content = file.read_bytes()
    middle = len(content) // 2
    damaged = [content[:middle], b'', content.replace(content[middle : middle + 8], b'\0' * 8)]
    for number, bad in enumerate(damaged):
        file.write_bytes(bad)
        with caplog.at_level(logging.WARNING):
            np.testing.assert_array_equal(embed(), first)
        assert len(lists) == 6 + number and 'is damaged and made anew' in caplog.text
        assert file.read_bytes() == content
        caplog.clear()


def test_a_cache_that_cannot_be_written(towers, tmp_path, monkeypatch, caplog):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'file'))
    found = class_texts.embed_classes(towers, NAMES, ('{}',), cache=True)
    assert found.shape == (3, 20) and 'are not kept' in caplog.text


def test_prompts_that_are_read(tmp_path):
    file = tmp_path / 'prompts.txt'
    file.write_text('a {}\n\n  the {}  \n')
    assert class_texts.read_prompts(str(file)) == ('a {}', 'the {}')
    assert class_texts.read_prompts('') == class_texts.PROMPTS
    assert class_texts.read_prompts('one {}') == ('one {}',)
    file.write_text('\n')
    for words, message in (
        (str(file), 'has 0 prompts'),
        ('clip90', "'clip90' is no prompt, .* clip80"),
    ):
        with pytest.raises(UserError, match=message):
            class_texts.read_prompts(words)


def test_a_prompt_without_a_place_for_the_name(towers):
    with pytest.raises(UserError, match="'a photo' has not"):
        two_tower.ZeroShotClassifier(towers, ('rose',), ('a photo',))
    with pytest.raises(UserError, match='there is no text to embed'):
        towers.embed_texts([])
