"""Runs on images with texts: what they learn, what comes out, and what they refuse."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import pytest
import tensorboard.backend.event_processing.event_file_loader as event_files

from vit_jax import config as config_lib
from vit_jax import models, train
from vit_jax import state as state_lib
from vit_jax.analysis import report
from vit_jax.checkpoint import bert, npz
from vit_jax.configs import lit, lit_digits
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.inference import two_tower
from vit_jax.run import pairs

LOCKED = {'frozen': 'img/.*', 'cache_features': True, 'total_steps': 12, 'warmup_steps': 2}


def make_config(**changes) -> ml_collections.ConfigDict:
    """Coloured digits, with towers that compile in a moment."""
    config = lit_digits.get_config()
    config.model.image.hidden_size, config.model.image.patches.size = 16, (8, 8)
    config.model.image.transformer.update(mlp_dim=32, num_heads=2, num_layers=1)
    config.model.text.update(hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2)
    config.model.out_dim = 16
    config.pp.train, config.pp.test = 'train[:200]', 'train[-40:]'
    config.batch, config.batch_eval, config.total_steps, config.warmup_steps = 32, 24, 40, 4
    config.progress_every, config.eval_every, config.checkpoint_every = 5, 20, 10
    config.compile_cache, config.report, config.base_lr = '', False, 0.01
    config.update_from_flattened_dict(changes)
    return config_lib.resolve(config, changes)


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def column(workdir, name):
    return [line[name] for line in lines(workdir) if name in line]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run from start to end, on 4 devices, whose output several tests look at."""
    workdir = tmp_path_factory.mktemp('pairs') / 'run'
    params = train.train_and_evaluate(make_config(report=True), workdir)
    return workdir, jax.device_get(params)


def test_the_loss_falls_and_retrieval_is_measured(finished):
    workdir, _ = finished
    losses = column(workdir, 'train_loss')
    assert np.mean(losses[-3:]) < 0.85 * losses[0]
    assert len(column(workdir, 'temperature')) == len(losses) == 9
    assert [line['step'] for line in lines(workdir) if 'mean_recall_test' in line] == [20, 40]
    assert column(workdir, 'text_to_image_recall10_test')[-1] > 0.4  # by chance, 0.25
    assert (
        'step 40: test recall at 1 / 5 / 10: image to text' in (workdir / 'train.log').read_text()
    )
    (events,) = workdir.glob('events.out.*')
    found = {
        v.tag for e in event_files.EventFileLoader(str(events)).Load() for v in e.summary.value
    }
    assert {'test/mean_recall', 'test/image_to_text_median_rank', 'train/temperature'} <= found


def test_the_product_is_a_two_tower_folder_that_says_the_same(finished):
    """Recalls of the folder, computed here from scratch, are those of metrics.jsonl."""
    workdir, params = finished
    towers = two_tower.load(workdir / 'model')
    jax.tree.map(np.testing.assert_array_equal, towers.params, params)
    assert '| `mean_recall_test` |' in (workdir / 'model/README.md').read_text()
    assert (workdir / 'model/vocab.txt').read_text().startswith('[PAD]\n[UNK]\n[CLS]\n')
    test = sources.open_dataset('digits_captions', columns='caption=').select('train[-40:]')
    pixels = np.stack([towers.preprocess.evaluate(test[i].image) for i in range(40)])
    texts = [(i, caption) for i in range(40) for caption in test[i].label]
    cosines = np.asarray(towers.embed_images(pixels), np.float64)
    cosines = cosines @ towers.embed_texts([caption for _, caption in texts]).T
    right = np.array([[text in test[i].label for _, text in texts] for i in range(40)])
    last = next(line for line in lines(workdir)[::-1] if 'loss_test' in line)
    for name, rows, own in (
        ('image_to_text', cosines, right),
        ('text_to_image', cosines.T, right.T),
    ):
        best = np.where(own, rows, -1).max(axis=1, keepdims=True)
        # Some others are as near but for rounding.
        low, high = (((rows > best + far) & ~own).sum(axis=1) for far in (1e-6, -1e-6))
        assert (high - low).mean() < 1
        for k in (1, 5, 10):
            found = last[f'{name}_recall{k}_test']
            assert np.mean(high < k) - 1e-6 <= found <= np.mean(low < k) + 1e-6
    logits = towers.temperature * cosines[:, ::2]
    softmax = [np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (logits, logits.T)]
    loss = -np.mean([np.log(np.diag(p)) for p in softmax])
    assert last['loss_test'] == pytest.approx(loss, rel=1e-4)


def test_the_report_shows_recalls(finished):
    page = (finished[0] / 'report.html').read_text()
    assert 'Image to text, recall at 1 / 5 / 10, test' in page and 'Retrieval' in page
    assert 'pairs of images and texts have no classes' in page
    assert '</html>' in report.render([report.run_files.read(finished[0])] * 2)


class Stop:
    def on_step(self, step, state, metrics):
        if step == 9:
            raise KeyboardInterrupt


def test_locked_images_are_embedded_once_and_an_interrupted_run_goes_on(finished, tmp_path):
    """From the image tower of another run; with and without the cache, and with a stop."""
    start = {'pretrained': str(finished[0] / 'model'), 'vocabulary': 'digits'}
    told = npz.flatten(finished[1])
    image = {name: leaf for name, leaf in told.items() if name.startswith('img/')}
    changes = {**LOCKED, 'pretrained': _image_tower(finished[0], tmp_path), 'vocabulary': 'digits'}
    assert start['pretrained'] != changes['pretrained']
    workdirs = [tmp_path / name for name in ('cached', 'not', 'stopped')]
    made = []
    for workdir, cache in zip(workdirs[:2], (True, False), strict=True):
        config = make_config(**{**changes, 'cache_features': cache})
        made.append(npz.flatten(jax.device_get(train.train_and_evaluate(config, workdir))))
        for name, leaf in image.items():
            np.testing.assert_array_equal(made[-1][name], leaf, err_msg=name)
    log = (workdirs[0] / 'train.log').read_text()
    assert 'embedding the images of digits_captions train[:200] (200 examples), once' in log
    for name, leaf in made[0].items():
        np.testing.assert_allclose(made[1][name], leaf, atol=2e-3, err_msg=name)
    losses = [column(workdir, 'train_loss') for workdir in workdirs[:2]]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert losses[0][-1] < losses[0][0]
    with pytest.raises(KeyboardInterrupt):
        config = make_config(**changes, checkpoint_every=4)
        train.train_and_evaluate(config, workdirs[2], callbacks=[Stop()])
    again = npz.flatten(jax.device_get(train.train_and_evaluate(config, workdirs[2])))
    for name, leaf in made[0].items():
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)
    assert column(workdirs[2], 'train_loss') == losses[0]


@pytest.fixture(scope='module')
def libraries(tmp_path_factory):
    """Folders of a CLIP and of a BERT, as transformers writes them."""
    torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
    root = tmp_path_factory.mktemp('libraries')
    sizes = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        vocab_size=20, max_position_embeddings=8,
    )  # fmt: skip
    torch.manual_seed(0)
    vision = sizes | dict(image_size=16, patch_size=8)
    clip = transformers.CLIPConfig(
        text_config=sizes | dict(eos_token_id=19), vision_config=vision, projection_dim=12
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.CLIPModel(clip).save_pretrained(root / 'clip')
    symbols = [*'abcdefghi', *(f'{c}</w>' for c in 'abcdefghi'), '<|startoftext|>', '<|endoftext|>']
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8).save_pretrained(
        root / 'clip'
    )
    transformers.CLIPImageProcessor(size=16, crop_size=16).save_pretrained(root / 'clip')
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(root / 'bert')
    (root / 'bert/vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', *'abc']))
    return root


def initial(config):
    """What a run starts from: the settled config, flat parameters, where they come from."""
    of_pairs = pairs.open_pairs(config)
    model = models.from_config(config.model)
    shapes = jax.eval_shape(lambda: state_lib.init_params(model, config.pp.crop, 0))
    params, told = of_pairs.initial_params(config, model, shapes, frozen=config.frozen)
    return of_pairs, npz.flatten(params), told


def test_towers_of_other_libraries(finished, libraries, tmp_path):
    clip = two_tower.load(libraries / 'clip')
    expected = npz.flatten(clip.params)
    both = make_config(pretrained=str(libraries / 'clip'), vocabulary='')
    of_pairs, params, told = initial(both)
    assert params.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(params[name], leaf, err_msg=name)
    assert of_pairs.vocabulary == clip.vocabulary and both.model.text_model == 'text_transformer'
    assert 'the weights were made for other pixels' in told
    # The image tower of CLIP, locked, with another crop, and BERT with an own head.
    config = make_config(
        pretrained=str(libraries / 'clip'), pretrained_text=str(libraries / 'bert'), vocabulary='',
        **{'model.image': both.model.image.to_dict(), 'model.out_dim': 12, 'pp.crop': 24},
    )  # fmt: skip
    of_pairs, params, told = initial(config)
    assert of_pairs.vocabulary == libraries / 'bert/vocab.txt' and of_pairs.tokenizer.size == 6
    for name, leaf in expected.items():
        if name.startswith('img/') and not name.endswith('pos_embedding'):
            np.testing.assert_array_equal(params[name], leaf, err_msg=name)
    positions = params['img/Transformer/posembed_input/pos_embedding']
    assert positions.shape == (1, 10, 32) and params['txt/head/kernel'].shape == (32, 12)
    source = npz.flatten(bert.open_folder(libraries / 'bert').source.read())
    for name, leaf in source.items():
        np.testing.assert_array_equal(params[f'txt/{name}'], leaf, err_msg=name)
    assert f'text tower: {libraries / "bert"}' in told and params['t'] == np.log(10.0, dtype='f4')
    with pytest.raises(UserError, match='crop=17'):
        initial(make_config(pretrained=str(libraries / 'clip'), vocabulary='', **{'pp.crop': 17}))


def test_what_is_new_and_locked_is_said():
    _, _, told = initial(make_config(frozen='img/.*'))
    assert 'WARNING: new, and not trained: img/' in told


def _image_tower(workdir, tmp_path) -> str:
    """Weights of images alone, as `vit_jax` knows them everywhere."""
    params = npz.open_file(workdir / 'model/params.npz', whole=True).read()
    npz.save(tmp_path / 'image.npz', params['img'])
    return str(tmp_path / 'image.npz')


def test_both_towers_of_a_folder_go_on_with_the_sigmoid_loss(finished, tmp_path):
    config = make_config(
        pretrained=str(finished[0] / 'model'), vocabulary='', loss='pairwise_sigmoid',
        total_steps=6, warmup_steps=1, eval_every=6, base_lr=0.001, fsdp=2, **{'pp.val': '10%'},
    )  # fmt: skip
    train.train_and_evaluate(config, tmp_path / 'run')
    losses = column(tmp_path / 'run', 'train_loss')
    assert losses[-1] < losses[0] and column(tmp_path / 'run', 'bias')[0] == -10
    assert column(tmp_path / 'run', 'mean_recall_val')[0] > 0.2
    towers = two_tower.load(tmp_path / 'run/model')
    assert towers.bias == pytest.approx(-10, abs=0.1) and towers.model.text_model == 'bert'
    log = (tmp_path / 'run/train.log').read_text()
    assert f'text tower: {finished[0] / "model"}' in log


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (
            {'label_smoothing': 0.1},
            'label_smoothing=0.1: pairs of images and texts have no classes',
        ),
        ({'mixup': 0.2}, 'mixup=0.2: pairs'),
        ({'class_weights': 'balanced'}, 'class_weights=.*: pairs'),
        ({'balanced_sampling': True}, 'balanced_sampling=True: pairs'),
        ({'repeated_augmentation': 2}, 'in a batch with two of its texts'),
        ({'layer_decay': 0.7}, 'from block to block of one tower'),
        ({'accum_steps': 2}, 'is compared with all others of the batch'),
        ({'loss': 'softmax'}, "loss='softmax' is of labels; .* 'contrastive' or"),
        ({'cache_features': True, 'pp.flip': True}, 'pp.flip=True the images change from step'),
        ({'pp.channels': 1}, 'see colours'),
    ],
)
def test_what_the_settings_refuse(changes, words):
    with pytest.raises(UserError, match=words):
        make_config(**changes)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'batch': 208}, 'batch=208 is more than the 200 training images'),
        ({'vocabulary': ''}, 'a new text tower needs a vocabulary: --config.vocabulary=vocab.txt'),
        ({'vocabulary': 'no.txt'}, 'the vocabulary .*no.txt cannot be read'),
        ({'vocabulary': 'no.json'}, 'neither a .txt .* nor a .model'),
        ({'cache_features': True}, r"img/\S* is trained: add --config.frozen='img/"),
        ({'dataset': 'digits', 'pp.train': '', 'pp.test': ''}, 'digits_captions has the same'),
        ({'model.text.vocab_size': 7}, 'is not the vocabulary of this model'),
        ({'pretrained_text': 'nowhere'}, 'nowhere has no config.json'),
    ],
)
def test_what_a_run_refuses_before_it_begins(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train.train_and_evaluate(make_config(**changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_knobs_of_pairs_are_of_two_towers():
    from vit_jax.configs import digits

    for changes in ({'vocabulary': 'digits'}, {'cache_features': True}, {'loss': 'contrastive'}):
        config = digits.get_config()
        config.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match='use configs/lit.py'):
            config_lib.resolve(config, changes)


def test_a_loss_of_ones_own_is_not_of_pairs(tmp_path):
    with pytest.raises(UserError, match='loss_fn: pairs .* are trained on by what the config'):
        train.train_and_evaluate(make_config(), tmp_path / 'run', loss_fn=lambda *_: (0.0, {}))


def test_lit_is_that_of_the_paper():
    config = config_lib.resolve(lit.get_config())
    assert config.frozen == 'img/.*' and config.cache_features
    assert config.model.image.model_name == 'ViT-B_16' and config.model.text.config == 'base'
    assert pathlib.Path(config.pretrained).name == 'ViT-B_16.npz'
    assert (config.pp.train, config.total_steps) == ('train', 5000)
