"""A small model of images and texts, and photos."""

import json
import pathlib

import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoint import npz
from vit_jax.inference import two_tower

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
WORDS = ('a', 'photo', 'of', 'rose', 'tulip', 'daisy', '##s')


@pytest.fixture(scope='module')
def towers(tmp_path_factory):
    """The smallest model of the conformance cases, with a vocabulary of our own."""
    folder = FIXTURES / 'conformance'
    case = json.loads((folder / 'lit_index.json').read_text())['lit_bert']
    names = ('image', 'text_model', 'text', 'out_dim')
    pp = {'tokenizer_name': 'bert', 'size': case['size'], 'max_len': 8}
    model = models.LitModel(**{name: case[name] for name in names}, pp=pp)
    vocabulary = tmp_path_factory.mktemp('vocabulary') / 'words.txt'
    vocabulary.write_text('\n'.join(('[PAD]', '[UNK]', '[CLS]', *WORDS)))
    params = npz.open_file(folder / 'lit_bert.checkpoint.npz', whole=True).read()
    return two_tower.TwoTowers(model, params, vocabulary, {'file': 'made up'})


@pytest.fixture
def photos(tmp_path):
    import cv2

    rng = np.random.default_rng(0)
    paths = [tmp_path / f'{index}.png' for index in range(3)]
    for path in paths:
        cv2.imwrite(str(path), rng.integers(0, 256, (40, 50, 3), np.uint8))
    return [str(path) for path in paths]
