"""BERT of Hugging Face as a text tower: what position 0 gives is that of its own class."""

import json
import shutil

import modules
import numpy as np
import pytest

from vit_jax import models
from vit_jax.checkpoint import bert
from vit_jax.data import text
from vit_jax.errors import UserError

SIZES = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80)
VOCABULARY = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'rose', '##s', *map(str, range(50))]


@pytest.fixture(scope='module')
def torch():
    return pytest.importorskip('torch')


@pytest.fixture(scope='module')
def theirs(torch):
    """BertForPreTraining: BERT under a prefix, with pooler and heads."""
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(
        **SIZES, vocab_size=len(VOCABULARY) + 3, max_position_embeddings=20
    )
    model = transformers.BertForPreTraining(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(scope='module')
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('bert')
    theirs.save_pretrained(folder)
    (folder / 'vocab.txt').write_text('\n'.join(VOCABULARY) + '\n')
    return folder


def change(folder, tmp_path, **settings):
    """A copy of the folder whose config.json says something else."""
    shutil.copytree(folder, tmp_path / 'bert')
    config = json.loads((folder / 'config.json').read_text())
    (tmp_path / 'bert/config.json').write_text(json.dumps(config | settings))
    return tmp_path / 'bert'


def compare(torch, tower, theirs):
    """Features of position 0 against theirs; texts of several lengths, padded with zeros."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, len(VOCABULARY), (4, 11))
    tokens *= np.arange(11) < np.array([[11], [7], [2], [1]])
    mask = torch.from_numpy(tokens > 0).long()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens), attention_mask=mask).last_hidden_state[:, 0]
    model = models.text.BertModel(**tower.text)
    found = modules.apply(model, tower.source.read(), tokens.astype(np.int32), train=None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('act', ['gelu', 'gelu_new'])
def test_features_are_those_of_transformers(act, torch, theirs, folder, tmp_path):
    copy = change(folder, tmp_path, hidden_act=act, layer_norm_eps=1e-3)
    base = type(theirs.bert).from_pretrained(copy).eval()
    tower = bert.open_folder(copy)
    assert tower.text['act'] == {'gelu': 'gelu', 'gelu_new': 'gelu_tanh'}[act]
    assert tower.vocabulary == copy / 'vocab.txt' and tower.pp == {'tokenizer_name': 'bert'}
    assert any('left out (bert, cls)' in note for note in tower.source.notes)
    compare(torch, tower, base)


def test_old_names_and_files_of_pytorch(torch, theirs, folder, tmp_path):
    """As in Google's own bert-base-uncased: gamma and beta, buffers, no prefix."""
    old = dict(theirs.bert.state_dict())
    for new, name in (('weight', 'gamma'), ('bias', 'beta')):
        old = {n.replace(f'LayerNorm.{new}', f'LayerNorm.{name}'): t for n, t in old.items()}
    old['embeddings.position_ids'] = torch.arange(20)[None]
    for name in ('config.json', 'vocab.txt'):
        shutil.copy(folder / name, tmp_path)
    torch.save(old, tmp_path / 'pytorch_model.bin')
    compare(torch, bert.open_folder(tmp_path), theirs.bert)


def test_a_vocabulary_that_transformers_saved(folder, tmp_path):
    """Its version 5 writes tokenizer.json alone."""
    transformers = pytest.importorskip('transformers')
    copy = change(folder, tmp_path)
    transformers.BertTokenizer.from_pretrained(folder).save_pretrained(copy)
    (copy / 'vocab.txt').unlink()
    file = bert.open_folder(copy).vocabulary
    assert file == copy / 'tokenizer.json'
    of_lines, of_json = (text.BertTokenizer(f, 6) for f in (folder / 'vocab.txt', file))
    texts = ['A rose', 'roses, 7 8', '', 'x']
    np.testing.assert_array_equal(of_json(texts), of_lines(texts))
    text.save_vocabulary(of_json, tmp_path / 'again.txt')
    assert (tmp_path / 'again.txt').read_text().split('\n')[:-1] == VOCABULARY
    file.write_text('{"model": {"vocab": {"[CLS]": 0, "[UNK]": 2}}}')
    with pytest.raises(UserError, match='is no tokenizer.json of BERT'):
        bert.open_folder(copy)


def test_it_is_the_text_tower_of_a_model(folder):
    """Its tree is that of LitModel's text tower, but for the head."""
    import jax

    tower = bert.open_folder(folder)
    encoder = dict(num_layers=1, num_heads=2, mlp_dim=8)
    image = dict(patches={'size': (8, 8)}, hidden_size=16, transformer=encoder)
    model = models.LitModel(image=image, text=tower.text, out_dim=(None, 16))
    tokens = np.ones((1, 5), np.int32)
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens=tokens))
    expected = init['params']['txt']
    assert expected.pop('head')['kernel'].shape == (48, 16)
    found = tower.source.read()
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'model_type': 'roberta'}, "the model_type 'roberta'; the text towers known are: bert"),
        ({'position_embedding_type': 'relative_key'}, 'position_embedding_type=relative_key'),
        ({'is_decoder': True}, 'is_decoder=True, which no text tower here computes'),
        ({'hidden_act': 'mish'}, "hidden_act 'mish'"),
        ({'num_attention_heads': 5}, 'num_attention_heads=5, which does not divide a width of 48'),
        ({'layer_norm_eps': '0'}, 'layer_norm_eps=0; expected'),
        ({'num_hidden_layers': 2}, 'num_hidden_layers=2, and the weights have 3'),
        ({'vocab_size': 7}, 'vocab_size=7, and the weights have 60'),
    ],
)
def test_a_configuration_of_another_model_is_refused(settings, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        bert.open_folder(change(folder, tmp_path, **settings))


def test_arrays_that_do_not_go_together(torch, theirs, folder, tmp_path):
    copy = change(folder, tmp_path)
    (copy / 'model.safetensors').unlink()
    state = theirs.bert.state_dict()
    for change_to in (None, torch.zeros(20, 40)):
        state['embeddings.position_embeddings.weight'] = change_to
        torch.save({n: t for n, t in state.items() if t is not None}, copy / 'pytorch_model.bin')
        message = (
            r"lacks '.*position_ids" if change_to is None else r'position_ids.* \(20, 40\), exp'
        )
        with pytest.raises(UserError, match=message):
            bert.open_folder(copy)


def test_files_that_are_missing_or_of_another_model(torch, folder, tmp_path):
    copy = change(folder, tmp_path)
    (copy / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
    with pytest.raises(UserError, match='do_lower_case=False, which no text tower here computes'):
        bert.open_folder(copy)
    (copy / 'tokenizer_config.json').unlink()
    (copy / 'vocab.txt').write_text('[UNK]\n[CLS]\n' + '\n'.join(map(str, range(70))))
    with pytest.raises(UserError, match='has 72 tokens, and the model has 60'):
        bert.open_folder(copy)
    (copy / 'vocab.txt').write_text('[CLS]\na\n')
    with pytest.raises(UserError, match='has no token for unknown words'):
        bert.open_folder(copy)
    (copy / 'vocab.txt').unlink()
    with pytest.raises(UserError, match=r'has neither vocab\.txt, .* nor tokenizer\.json'):
        bert.open_folder(copy)
    (copy / 'model.safetensors').unlink()
    torch.save({'weight': torch.zeros(3)}, copy / 'pytorch_model.bin')
    with pytest.raises(UserError, match='has no BERT'):
        bert.open_folder(copy)
    (copy / 'config.json').unlink()
    with pytest.raises(UserError, match=r'has no config\.json; expected a folder of BERT'):
        bert.open_folder(copy)
