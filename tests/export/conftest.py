"""Small models of every family, with what JAX computes of them."""

import base64
import dataclasses
import functools
import http.server
import json
import lzma
import pathlib
import shutil
import subprocess
import tarfile
import threading
from typing import Any

import jax
import modules
import numpy as np
import pytest

from vit_jax import models
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.export import npm, web
from vit_jax.inference import model_folder, two_tower

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'

_ENCODER = {
    'mlp_dim': 48,
    'num_heads': 4,
    'num_layers': 2,
    'attention_dropout_rate': 0.0,
    'dropout_rate': 0.0,
}
_VIT = {
    'model_name': None,
    'patches': {'size': (8, 8)},
    'hidden_size': 24,  # so that K = 6 and its root is no power of two
    'transformer': _ENCODER,
    'classifier': 'token',
    'representation_size': None,
}
# name -> (config, side of the image)
CONFIGS = {
    'token': (_VIT, 32),
    'gap': (_VIT | {'classifier': 'gap'}, 32),
    'pre_logits': (_VIT | {'representation_size': 20}, 32),
    'gap_pre_logits': (_VIT | {'classifier': 'gap', 'representation_size': 20}, 32),
    'mlp_head': (_VIT | {'mlp_head': True}, 32),
    'distilled': (_VIT | {'distilled': True}, 32),
    'gelu': (_VIT | {'act': 'gelu', 'representation_size': 20, 'representation_act': 'relu'}, 32),
    'multi_label': (_VIT | {'multi_label': True}, 32),
    'avgmax': (
        _VIT
        | {'classifier': 'avgmax', 'class_token': True, 'fc_norm': True}
        | {'act': 'quick_gelu', 'layer_norm_eps': 0.01},
        32,
    ),
    'no_position_embedding': (
        _VIT | {'transformer': _ENCODER | {'add_position_embedding': False}},
        32,
    ),
    # The pieces that families of today are made of.
    'registers': (
        _VIT
        | {'registers': 2, 'classifier': 'token_gap'}
        | {'transformer': _ENCODER | {'layer_scale': True}},
        32,
    ),
    'map': (
        _VIT
        | {'classifier': 'map', 'patch_bias': False, 'registers': 2, 'register_positions': True}
        | {'transformer': _ENCODER | {'pre_norm': True}},
        32,
    ),
    'gated': (
        _VIT
        | {'classifier': 'gap', 'class_token': True, 'final_norm': False, 'act': 'silu'}
        | {'transformer': _ENCODER | {'gated_mlp': True, 'qk_norm': True}},
        32,
    ),
    'dinov3': (
        _VIT
        | {'rotary': {'form': 'dinov3', 'theta': 100.0}, 'registers': 2, 'hidden_size': 16}
        | {
            'transformer': _ENCODER
            | {'add_position_embedding': False, 'layer_scale': True, 'qkv_bias': 'qv'},
        },
        32,
    ),
    'eva02': (
        _VIT
        | {'rotary': {'form': 'axial', 'theta': 10_000.0, 'grid': 3}, 'hidden_size': 16}
        | {'classifier': 'gap', 'class_token': True, 'fc_norm': True, 'act': 'silu'}
        | {
            'transformer': _ENCODER
            | {'gated_mlp': True, 'mlp_norm': True, 'attention_norm': True}
            | {'qk_norm': True, 'qkv_bias': ''},
        },
        32,
    ),
    # Odd and even sides on the way, whose 'SAME' padding is even and uneven.
    'hybrid_root': (
        _VIT | {'patches': {'size': (1, 1)}, 'resnet': {'num_layers': (), 'width_factor': 0.5}},
        21,
    ),
    'hybrid_stages': (
        _VIT | {'patches': {'size': (2, 2)}, 'resnet': {'num_layers': (2, 1), 'width_factor': 0.5}},
        47,
    ),
    'mixer': (
        {
            'model_name': None,
            'patches': {'size': (8, 8)},
            'num_blocks': 2,
            'hidden_dim': 24,
            'tokens_mlp_dim': 20,
            'channels_mlp_dim': 48,
        },
        32,
    ),
}


@dataclasses.dataclass
class Case:
    """A model, images [7, side, side, 3], and what JAX makes of them."""

    model: model_folder.Model
    images: np.ndarray
    logits: np.ndarray
    values: dict[str, np.ndarray]


def made_up_model(config: dict[str, Any], side: int, classes: int = 5) -> model_folder.Model:
    """A model with random weights, whose logits are of unit scale."""
    module = models.from_config(config, num_classes=classes)
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = modules.shapes(module, image, train=False)
    rng = np.random.default_rng(0)

    def leaf(path, like):
        values = rng.standard_normal(like.shape, np.float32)
        if path[-1].key == 'scale':
            return 1 + np.float32(0.2) * values
        if path[-1].key != 'kernel':
            return np.float32(0.2) * values
        # Inputs of a layer: [D, H, K] is a projection to heads, all others end with their outputs.
        to_heads = len(like.shape) == 3 and path[-2].key != 'out'
        inputs = like.shape[0] if to_heads else like.size // like.shape[-1]
        return values / np.float32(np.sqrt(inputs))

    params = jax.tree_util.tree_map_with_path(leaf, shapes)
    names = tuple(f'Blüte {i}' for i in range(classes))
    return model_folder.Model(
        module, params, config, names, Preprocess(crop=side), {'dataset': 'made up'}
    )


@functools.cache
def _case(name: str) -> Case:
    config, side = CONFIGS[name]
    model = made_up_model(config, side)
    images = np.random.default_rng(1).uniform(-1, 1, (7, side, side, 3)).astype(np.float32)
    compute = jax.jit(
        functools.partial(
            models.apply_with_intermediates, model.model, attention_weights=name != 'mixer'
        )
    )
    logits, values = jax.tree.map(np.asarray, compute(model.params, images))
    assert 0.1 < np.abs(logits).max() < 10
    return Case(model, images, logits, values)


@pytest.fixture
def case():
    """`case(name)`: the model of this name in `CONFIGS`, computed once in a session."""
    return _case


@pytest.fixture
def made_up():
    """`made_up(config, side, classes)`: any other model."""
    return made_up_model


_IMAGE = dict(
    patches={'size': (8, 8)},
    hidden_size=24,
    transformer=dict(num_layers=2, mlp_dim=48, num_heads=4),
)
_TEXT = dict(width=32, num_layers=2, mlp_dim=48, num_heads=4)


@pytest.fixture(scope='session')
def towers(tmp_path_factory):
    """`towers(kind)`: a small model with random weights and a tokenizer."""
    folder = tmp_path_factory.mktemp('vocabularies')
    (folder / 'bert.txt').write_text('[PAD]\n[UNK]\n[CLS]\na\nphoto\nof\nrose\n##s\ndog\n')
    source = json.loads(
        lzma.decompress((FIXTURES / 'tokenizers/sentencepiece.json.xz').read_bytes())
    )
    (folder / 'siglip.model').write_bytes(base64.b64decode(source['model']))
    tokenizers = pytest.importorskip('tokenizers')
    symbols = ['<end>', '<unk>', *'abcdefghijklmnopqrstuvwxyz', 'ro', 'se', 'rose']
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {symbol: i for i, symbol in enumerate(symbols)},
            [('r', 'o'), ('s', 'e'), ('ro', 'se')],
            unk_token='<unk>',
        )
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
            text=_TEXT | dict(vocab_size=31, causal=True, end_token=0, act='quick_gelu'),
            image=_IMAGE | dict(act='quick_gelu'),
            out_dim=20,
            pp={'tokenizer_name': 'json', 'size': 32, 'max_len': 16, 'pad_token': '<end>'},
        ),
        'siglip': dict(
            text_model='text_transformer',
            text=_TEXT | dict(vocab_size=2_000),
            image=_IMAGE | dict(classifier='map'),
            out_dim=(None, 24),
            pp={'tokenizer_name': 'sentencepiece', 'size': 32, 'max_len': 8, 'canonical': True},
            bias_init=-10.0,
        ),
    }
    files = {'bert': 'bert.txt', 'clip': 'clip.json', 'siglip': 'siglip.model'}

    def make(kind):
        model = models.LitModel(**{'image': _IMAGE, **kinds[kind]})
        images = np.zeros((1, 32, 32, 3), np.float32)
        tokens = np.zeros((1, model.pp['max_len']), np.int32)
        shapes = modules.shapes(model, images=images, tokens=tokens)
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


# What drives the browser; of Microsoft, released every month.
_PLAYWRIGHT = npm.Package(
    'playwright-core',
    '1.64.1',
    'BC4s8y6SEVA6Q1rSxZTto8hI1KUI3xXlHGZgvGqP4IqPdI/a6FX9H29IDNz7vKo9l21b6LfYosScPL6M3xxyDQ==',
)


@pytest.fixture(scope='session')
def packages():
    """Skips where the packages of a page cannot be had."""
    if shutil.which('node') is None:
        pytest.skip('needs Node.js')
    try:
        return [package.fetch() for package in (web.RUNTIME, web.TOKENIZERS, _PLAYWRIGHT)]
    except UserError as error:
        pytest.skip(f'needs packages of npm: {error}')


@pytest.fixture
def browse(packages, tmp_path):
    """`browse(site, **more)`: what `page_browser.mjs` saw of a page."""
    browser = shutil.which('chromium') or shutil.which('google-chrome')
    if browser is None:
        pytest.skip('needs Chromium')
    with tarfile.open(packages[-1]) as archive:
        archive.extractall(tmp_path / 'playwright', filter='data')

    def run(site, **more):
        handler = functools.partial(_Quiet, directory=str(site))
        with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            request = {
                'playwright': str(tmp_path / 'playwright/package'),
                'browser': browser,
                'address': f'http://127.0.0.1:{server.server_address[1]}/',
                **more,
            }
            script = pathlib.Path(__file__).with_name('page_browser.mjs')
            done = subprocess.run(
                ['node', script], input=json.dumps(request), capture_output=True, text=True,
                timeout=240,
            )  # fmt: skip
            server.shutdown()
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
