"""Towers of image-text models as ONNX and StableHLO: the original's numbers, JAX's, and what goes
with them.
"""

import base64
import json
import lzma
import pathlib

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from vit_jax import models
from vit_jax.checkpoint import npz
from vit_jax.errors import UserError
from vit_jax.export import onnx_text, tower, verify
from vit_jax.export.options import Options
from vit_jax.inference import classifier, two_tower

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
IMAGE = dict(
    patches={'size': (8, 8)},
    hidden_size=24,
    transformer=dict(num_layers=2, mlp_dim=48, num_heads=4),
)
TEXT = dict(width=32, num_layers=2, mlp_dim=48, num_heads=4)


def run(proto, tokens):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=['CPUExecutionProvider']
    )
    (found,) = session.run(['features'], {'tokens': tokens})
    return found


@pytest.fixture(scope='module')
def towers(tmp_path_factory):
    """`towers(kind)`: a small model with random weights and a tokenizer."""
    folder = tmp_path_factory.mktemp('vocabularies')
    (folder / 'bert.txt').write_text('[PAD]\n[UNK]\n[CLS]\na\nphoto\nof\nrose\n##s\ndog\n')
    source = json.loads(
        lzma.decompress((FIXTURES / 'tokenizers/sentencepiece.json.xz').read_bytes())
    )
    (folder / 'siglip.model').write_bytes(base64.b64decode(source['model']))
    tokenizers = pytest.importorskip('tokenizers')
    words = ['<end>', 'a', 'photo', 'of', 'rose', 'dog', '<unk>']
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='<unk>')
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single='$A <end>', special_tokens=[('<end>', 0)]
    )
    made.save(str(folder / 'clip.json'))
    kinds = {
        'bert': dict(
            text_model='bert',
            text=dict(hidden_size=32, mlp_dim=48, num_layers=2, num_heads=4, vocab_size=9)
            | dict(act='gelu', layer_norm_eps=1e-3),
            out_dim=20,
            pp={'tokenizer_name': 'bert', 'size': 32, 'max_len': 7},
        ),
        'clip': dict(
            text_model='text_transformer',
            text=TEXT | dict(vocab_size=7, causal=True, end_token=0, act='quick_gelu'),
            image=IMAGE | dict(act='quick_gelu'),
            out_dim=20,
            pp={'tokenizer_name': 'json', 'size': 32, 'max_len': 9, 'pad_token': '<end>'},
        ),
        'siglip': dict(
            text_model='text_transformer',
            text=TEXT | dict(vocab_size=2_000),
            image=IMAGE | dict(classifier='map'),
            out_dim=(None, 24),
            pp={'tokenizer_name': 'sentencepiece', 'size': 32, 'max_len': 8, 'canonical': True},
            bias_init=-10.0,
        ),
    }
    files = {'bert': 'bert.txt', 'clip': 'clip.json', 'siglip': 'siglip.model'}

    def make(kind):
        model = models.LitModel(**{'image': IMAGE, **kinds[kind]})
        images = np.zeros((1, 32, 32, 3), np.float32)
        tokens = np.zeros((1, model.pp['max_len']), np.int32)
        shapes = jax.eval_shape(
            lambda: model.init(jax.random.key(0), images=images, tokens=tokens)
        )['params']
        rng = np.random.default_rng(0)

        def leaf(path, like):
            values = rng.standard_normal(like.shape, np.float32)
            if path[-1].key == 'scale':
                return 1 + np.float32(0.2) * values
            if path[-1].key not in ('kernel', 'embedding'):
                return np.float32(0.2) * values
            return values / np.float32(np.sqrt(like.size // like.shape[-1]) or 1)

        params = jax.tree_util.tree_map_with_path(leaf, shapes)
        return two_tower.TwoTowers(model, params, folder / files[kind], {'made': 'up'})

    cache = {}
    return lambda kind: cache[kind] if kind in cache else cache.setdefault(kind, make(kind))


@pytest.mark.parametrize('opset', [17, 20])
@pytest.mark.parametrize('name', ['lit_bert', 'lit_bert_image_unprojected', 'lit_text_transformer'])
def test_features_are_the_original_releases(name, opset):
    case = json.loads((FIXTURES / 'conformance/lit_index.json').read_text())[name]
    arguments = {key: case[key] for key in ('image', 'text_model', 'text', 'out_dim')}
    model = models.LitModel(**arguments, pp={'max_len': case['max_len']})
    params = npz.open_file(FIXTURES / f'conformance/{name}.checkpoint.npz', whole=True).read()
    expected = np.load(FIXTURES / f'conformance/{name}.expected.npz')
    proto = onnx_text.build(model, params, Options(opset=opset))
    onnx.checker.check_model(proto, full_check=True)
    for batch in (1, 4):
        found = run(proto, expected['tokens'][:batch])
        np.testing.assert_allclose(found, expected['text_embeddings'][:batch], atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', ['bert', 'clip', 'siglip'])
def test_a_text_tower_is_that_of_jax(towers, kind):
    """On texts, and on random tokens with padding of every length, also with no end at all."""
    made = towers(kind)
    tokens = tower.tokens_for(made)
    if kind == 'clip':
        tokens = np.concatenate([tokens, np.full((1, 9), 3, np.int32)])
        assert not (tokens[-1] == 0).any()
    expected = np.asarray(made.model.apply({'params': made.params}, tokens=tokens)[1])
    assert np.ptp(expected, axis=0).max() > 0.1
    for dtype, atol in (('float32', 1e-5), ('float16', 5e-3)):
        proto = onnx_text.build(made.model, made.params, Options(dtype=dtype))
        np.testing.assert_allclose(run(proto, tokens), expected, atol=atol, rtol=0)


def test_exported_with_all_that_using_it_needs(towers, tmp_path):
    made = towers('siglip')
    path = tmp_path / 'texts.onnx'
    report = tower.export(made, path, tower='text', format='onnx')
    assert report.status == verify.VERIFIED and report.facts['imported_vit_jax'] is False
    assert {row.batch for row in report.rows} == {1, 2, 7}
    assert (tmp_path / 'texts.onnx.vocab.model').read_bytes() == made.vocabulary.read_bytes()
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata['temperature']) == made.temperature
    assert json.loads(metadata['bias']) == made.bias
    assert metadata['tokenizer'] == 'sentencepiece' and json.loads(metadata['max_len']) == 8
    assert json.loads(metadata['tokenizer_settings']) == {'canonical': True}
    assert metadata['vocabulary'] == 'texts.onnx.vocab.model'
    (given,) = session.get_inputs()
    assert (given.name, given.shape, given.type) == ('tokens', ['batch', 8], 'tensor(int32)')
    with pytest.raises(UserError, match='text tower'):
        classifier.open_classifier(path)
    with pytest.raises(UserError, match='exists'):
        tower.export(made, path, tower='text', format='onnx')


def test_both_towers_as_onnx_give_the_logits(towers, tmp_path):
    """From files alone: temperature * images @ texts, as the model says."""
    made = towers('clip')
    for name in ('image', 'text'):
        report = tower.export(made, tmp_path / f'{name}.onnx', tower=name, format='onnx')
        assert report.status == verify.VERIFIED
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 32, 32, 3)).astype(np.float32)
    image, text = (
        onnxruntime.InferenceSession(tmp_path / f'{name}.onnx') for name in ('image', 'text')
    )
    texts = ['a photo of a rose', 'dog']
    (zimg,) = image.run(['features'], {'image': pixels / 127.5 - 1})
    (ztxt,) = text.run(['features'], {'tokens': made.tokenizer(texts)})
    temperature = json.loads(image.get_modelmeta().custom_metadata_map['temperature'])
    zero_shot = two_tower.ZeroShotClassifier(made, texts, ('{}',))
    np.testing.assert_allclose(
        temperature * zimg @ ztxt.T, zero_shot.logits(pixels), atol=1e-5, rtol=0
    )
    with pytest.raises(UserError, match='without classification head'):
        classifier.open_classifier(tmp_path / 'image.onnx')


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_smaller_text_towers(towers, tmp_path, dtype):
    made = towers('bert')
    path = tmp_path / 'texts.onnx'
    report = tower.export(made, path, tower='text', format='onnx', options=Options(dtype=dtype))
    assert report.status == verify.VERIFIED
    stored = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    small = {'float16': onnx.TensorProto.FLOAT16, 'int8': onnx.TensorProto.INT8}[dtype]
    assert stored[{'float16': 'embedding/rows', 'int8': 'embedding/integers'}[dtype]] == small


@pytest.mark.parametrize('name', ['image', 'text'])
def test_stablehlo(towers, tmp_path, name):
    made = towers('bert')
    path = tmp_path / 'tower.stablehlo'
    report = tower.export(made, path, tower=name, format='stablehlo')
    assert report.status == verify.VERIFIED and report.facts['imported_vit_jax'] is False
    told = json.loads((tmp_path / 'tower.stablehlo.json').read_text())
    assert told['tower'] == name and told['temperature'] == made.temperature
    assert told['outputs'] == {'features': ['batch', 20]}
    if name == 'text':
        assert told['input'] == {'shape': ['batch', 7], 'dtype': 'int32'}
        assert (tmp_path / told['vocabulary']).read_bytes() == made.vocabulary.read_bytes()


def test_an_export_that_computes_something_else_is_not_left(towers, tmp_path, monkeypatch):
    made = towers('clip')
    other = models.LitModel(
        **{n: getattr(made.model, n) for n in ('image', 'text_model', 'out_dim', 'pp')},
        text=dict(made.model.text) | {'causal': False},
    )
    wrong = onnx_text.build(other, made.params)
    monkeypatch.setattr(onnx_text, 'build', lambda *_: wrong)
    with pytest.raises(UserError, match='features too far from JAX'):
        tower.export(made, tmp_path / 'texts.onnx', tower='text', format='onnx')
    assert not list(tmp_path.iterdir())


def test_the_command(towers, tmp_path, run_script):
    folder, output = tmp_path / 'model', tmp_path / 'texts.onnx'
    two_tower.save(folder, towers('bert'))

    def export(*words, to=output):
        return run_script(
            'export.py', '--model', folder, '--format', 'onnx', '--output', to, *words
        )

    done = export('--tower', 'text')
    assert done.returncode == 0 and 'text tower, 7 tokens' in done.stdout, done.stderr
    assert 'texts.onnx: written, verified' in done.stdout
    for words, message in (
        ([], 'has two towers: --tower image or --tower text'),
        (['--tower', 'text', '--layout', 'NCHW'], '--layout goes with --tower image'),
        (['--tower', 'text', '--images', folder], '--images goes with --tower image'),
        (['--tower', 'image', '--probabilities'], 'no --probabilities'),
        (['--tower', 'image', '--format', 'npz'], 'onnx or stablehlo, not npz'),
        (['--vocabulary', 'x'], '--vocabulary goes with --tower'),
    ):
        other = tmp_path / ('other.npz' if 'npz' in words else 'other.onnx')
        done = export(*words, to=other)
        assert done.returncode == 1 and message in done.stderr, (words, done.stderr)
        assert not other.exists()
