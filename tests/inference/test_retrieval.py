"""Retrieval between images and texts, against sorting."""

import numpy as np
import pytest

from vit_jax.inference import retrieval

RNG = np.random.default_rng(0)


def unit(*shape):
    x = RNG.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def expected(images, texts, owner, content):
    """By sorting all of each list, one query after the other."""
    pairs = set(zip(owner, content, strict=True))
    cosines = images.astype(np.float64) @ texts.astype(np.float64).T
    of_images, of_texts = [], []
    for image, row in enumerate(cosines):
        order = sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))
        of_images.append(
            next(place for place, j in enumerate(order) if (image, content[j]) in pairs)
        )
    for text, column in enumerate(cosines.T):
        order = sorted(range(len(column)), key=lambda i, column=column: (-column[i], i))
        rights = (place for place, i in enumerate(order) if (i, content[text]) in pairs)
        of_texts.append(next(rights))
    found = {}
    for name, ranks in (('image_to_text', of_images), ('text_to_image', of_texts)):
        for k in (1, 5, 10):
            found[f'{name}_recall{k}'] = sum(rank < k for rank in ranks) / len(ranks)
        found[f'{name}_median_rank'] = np.median([rank + 1 for rank in ranks])
    recalls = [value for name, value in found.items() if 'recall' in name]
    return found | {'mean_recall': sum(recalls) / 6}


@pytest.mark.parametrize('at_once', [100, 1 << 22])
@pytest.mark.parametrize('texts_of_an_image, contents', [(1, 0), (4, 0), (1, 9), (4, 30)])
def test_recalls_and_ranks_are_those_of_sorting(monkeypatch, at_once, texts_of_an_image, contents):
    """Also where several images have the same text: each of them is right for it."""
    monkeypatch.setattr(retrieval, '_AT_ONCE', at_once)
    counts = RNG.integers(1, texts_of_an_image + 1, 40)
    owner = np.repeat(np.arange(40), counts)
    images = unit(40, 8)
    texts = images[owner] + 0.8 * unit(len(owner), 8)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    content = RNG.integers(100, 100 + contents, len(owner)) if contents else np.arange(len(owner))
    found = retrieval.metrics(images, texts, owner, content)
    assert found == pytest.approx(expected(images, texts, owner, content))
    if contents:
        alone = retrieval.metrics(images, texts, owner, np.arange(len(owner)))
        assert found['text_to_image_recall1'] > alone['text_to_image_recall1']
        assert found['image_to_text_recall1'] > alone['image_to_text_recall1']
    assert 0.2 < found['mean_recall'] < 1
    assert found['image_to_text_recall1'] < found['image_to_text_recall5']


def test_a_model_that_gives_the_same_for_all_finds_nothing():
    same = np.tile(unit(1, 8), (50, 1))
    each = np.arange(50)
    found = retrieval.metrics(same, same, each, each)
    assert found['text_to_image_recall1'] == found['image_to_text_recall1'] == 1 / 50
    assert found['text_to_image_median_rank'] == 25.5
    broken = retrieval.metrics(np.full_like(same, np.nan), same, each, each)
    assert broken['mean_recall'] == 0


def test_the_loss_of_a_set_is_its_formula(monkeypatch):
    monkeypatch.setattr(retrieval, '_AT_ONCE', 100)
    x, y = unit(30, 8), unit(30, 8)
    logits = 7 * x.astype(np.float64) @ y.T.astype(np.float64)
    softmax = [np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (logits, logits.T)]
    contrastive = -np.mean([np.log(np.diag(p)) for p in softmax])
    assert retrieval.loss('contrastive', x, y, 7.0, 0.0) == pytest.approx(contrastive, rel=1e-6)
    sign = 2 * np.eye(30) - 1
    sigmoid = np.log(1 + np.exp(-sign * (logits - 3))).sum() / 30
    assert retrieval.loss('pairwise_sigmoid', x, y, 7.0, -3.0) == pytest.approx(sigmoid, rel=1e-6)
