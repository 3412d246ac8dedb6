"""Which part of a model is trained: what is chosen, what is refused, and that the rest stays."""

import functools
import re

import jax
import numpy as np
import pytest
import small

from vit_jax import groups, models, optim, sharding, state, steps
from vit_jax.checkpoint import npz
from vit_jax.configs import common
from vit_jax.errors import UserError
from vit_jax.models import lora
from vit_jax.run import trained_part

TRANSFORMER = {
    'mlp_dim': 32, 'num_heads': 2, 'num_layers': 3, 'dropout_rate': 0.0,
    'attention_dropout_rate': 0.0,
}  # fmt: skip
VIT = {
    'num_classes': 3, 'patches': {'size': (8, 8)}, 'hidden_size': 16, 'transformer': TRANSFORMER,
}  # fmt: skip
MIXER = {
    'num_classes': 3, 'patches': {'size': (8, 8)}, 'num_blocks': 3, 'hidden_dim': 16,
    'tokens_mlp_dim': 8, 'channels_mlp_dim': 32,
}  # fmt: skip
MODELS = {
    'vit': models.VisionTransformer(**VIT),
    'deit': models.VisionTransformer(**VIT, distilled=True),
    'dinov2': models.VisionTransformer(
        **{**VIT, 'transformer': {**TRANSFORMER, 'layer_scale': True}}, registers=2
    ),
    'map': models.VisionTransformer(**VIT, classifier='map', class_token=False),
    'hybrid': models.VisionTransformer(
        **{**VIT, 'patches': {'size': (1, 1)}}, resnet={'num_layers': (1,), 'width_factor': 0.5}
    ),
    'mixer': models.MlpMixer(**MIXER),
}
RNG = np.random.RandomState(0)
PIXELS = RNG.randint(0, 256, (40, 16, 16, 3)).astype(np.uint8)
LABELS = RNG.randint(0, 3, 40)


def make_config(**changes):
    config = common.get_defaults()
    config.model = {'model_name': 'a tiny one'}
    config.update(changes)
    return config


@functools.cache
def names_of(name):
    model, size = MODELS[name], 64 if name == 'hybrid' else 16
    return groups.names_of(jax.eval_shape(lambda: state.init_params(model, size, seed=0)))


@pytest.mark.parametrize(
    ('model', 'train_only', 'trained'),
    [
        ('vit', 'head', {'head'}),
        ('deit', 'head', {'head', 'head_dist'}),
        ('vit', 'last:1', {'encoderblock_2', 'encoder_norm', 'head'}),
        ('deit', 'last:1', {'encoderblock_2', 'encoder_norm', 'head', 'head_dist'}),
        ('map', 'last:1', {'encoderblock_2', 'encoder_norm', 'MAPHead_0', 'head'}),
        ('hybrid', 'last:1', {'encoderblock_2', 'encoder_norm', 'head'}),
        ('mixer', 'last:2', {'MixerBlock_1', 'MixerBlock_2', 'pre_head_layer_norm', 'head'}),
        ('mixer', 'last:3', {'MixerBlock_0', 'MixerBlock_1', 'MixerBlock_2', 'pre_head_layer_norm',
                             'head'}),
    ],
)  # fmt: skip
def test_parts_of_the_depth(model, train_only, trained):
    names = names_of(model)
    frozen = trained_part.frozen_of(make_config(train_only=train_only), lambda: names)
    found = {
        name.removeprefix('Transformer/').split('/')[0]
        for name in names
        if not re.fullmatch(frozen, name)
    }
    assert found == trained
    assert not [  # whole parts
        name for name in names
        if re.fullmatch(frozen, name) and set(name.split('/')) & trained
    ]  # fmt: skip


@pytest.mark.parametrize('model', MODELS)
def test_parts_by_kind(model):
    names = names_of(model)
    for train_only, of_kind in (
        ('bias', lambda name: name.endswith('/bias')),
        ('norm', lambda name: 'norm' in name.lower() or re.search(r'/gn\w*/|^gn_root', name)),
        (r'.*/MlpBlock_0/.*|.*_mixing/.*|head/.*', lambda name: 'Mlp' in name or '_mixing' in name),
    ):
        frozen = trained_part.frozen_of(make_config(train_only=train_only), lambda: names)
        found = {name for name in names if not re.fullmatch(frozen, name)}
        expected = {name for name in names if name.startswith('head') or of_kind(name)}
        if train_only.startswith('.*'):
            expected = {name for name in expected if 'MAPHead' not in name or 'MlpBlock' in name}
            expected -= {name for name in names if name.startswith('head_dist')}
        assert found == expected, train_only


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train_only': 'last:0'}, "'last:0' is no number of last blocks.*from last:1 to last:3"),
        ({'train_only': 'last:4'}, 'from last:1 to last:3'),
        ({'train_only': 'last:-1'}, 'from last:1 to last:3'),
        ({'train_only': 'last:x'}, 'from last:1 to last:3'),
        ({'train_only': 'haed'}, r"'head', 'last:3', 'bias', 'norm'\): 'haed' fits no parameter"),
        ({'train_only': '(x'}, 'is no regular expression'),
        ({'train_only': '.*'}, "train_only='.*' trains all parameters: leave it out"),
        ({'train_only': 'embedding/.*'}, 'a new one is all zeros, so that nothing'),
        ({'frozen': 'head/.*'}, "config.frozen='head/.*' leaves the head as it is"),
        ({'train_only': 'head', 'frozen': 'cls'}, 'leave out one of them'),
        ({'train_only': 'head', 'lora_rank': 8}, "whatever config.train_only='head' says"),
        ({'frozen': 'cls', 'lora_rank': 8}, "whatever config.frozen='cls' says"),
        ({'dora': True}, 'config.dora=True has no effect without config.lora_rank'),
        ({'lora_targets': 'mlp'}, "lora_targets='mlp' has no effect without config.lora_rank"),
        ({'lora_rank': 2, 'lora_dropout': 1.0}, 'would leave nothing of what the adapters see'),
        ({'lora_rank': 2, 'lora_targets': 'attention,mpl'}, "'mpl' is not one of attention, mlp"),
        ({'lora_rank': 2, 'lora_targets': 'attention,gate'}, "no block.*has a layer of 'gate'"),
        ({'lora_rank': 17}, 'config.lora_rank=17: rank 17 is not from 1 to 16: the.*; use'),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message):
    config = make_config(**changes)
    with pytest.raises(UserError, match=message):
        trained_part.check(config)
        model = trained_part.adapted(config, MODELS['vit'])
        init = lambda: jax.eval_shape(lambda: state.init_params(model, 16, seed=0))  # noqa: E731
        trained_part.frozen_of(config, lambda: trained_part.names_of(config, init))


def test_adapters_of_attention_are_refused_for_a_mixer_and_for_other_models():
    config = make_config(lora_rank=2)
    model = trained_part.adapted(config, MODELS['mixer'])
    init = lambda: jax.eval_shape(lambda: state.init_params(model, 16, seed=0))  # noqa: E731
    with pytest.raises(UserError, match=r"has a layer of 'attention' \(a Mixer has mlp\)"):
        trained_part.names_of(config, init)
    with pytest.raises(UserError, match='and the model is a LitModel: leave it out'):
        trained_part.adapted(config, models.get_model('LiT-B16B'))


def test_a_step_is_the_same_on_any_devices(monkeypatch):
    """With micro-batches, and fully sharded; the base stays to the bit, SAM moves adapters only."""
    monkeypatch.setattr(sharding, 'MIN_SIZE_TO_SHARD', 64)
    config = make_config(lora_rank=4, lora_targets='out,Dense_1', dora=True, grad_norm_clip=0.0,
                         optim_dtype='float32')  # fmt: skip
    model = trained_part.adapted(config, MODELS['vit'])
    rng = np.random.default_rng(0)
    params = jax.device_get(state.init_params(model, 16, seed=0))
    params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), params)
    batch = {'image': PIXELS[:8].astype(np.float32), 'label': LABELS[:8].astype(np.int32)}
    frozen = trained_part.frozen_of(config, lambda: groups.names_of(params))
    tx = optim.trained_only(optim.create_optimizer(config, lambda _: 0.1), frozen)
    found = []
    for devices, fsdp, accum_steps in ((1, 1, 1), (2, 1, 2), (2, 2, 2)):
        mesh = sharding.create_mesh(fsdp, jax.devices()[:devices])
        start = state.create_state(params, tx, mesh)
        step = steps.make_train_step(
            model, tx, None, mesh, sharding.state_sharding(start, mesh), seed=0, flip=False,
            accum_steps=accum_steps, frozen=frozen, sharpness=optim.Sharpness(lambda _: 0.1),
        )  # fmt: skip
        end, _ = step(start, sharding.put_batch(batch, mesh))
        found.append(npz.flatten(jax.device_get(end.params)))
        moments = [leaf for leaf in jax.tree.leaves(end.opt_state) if leaf.ndim]
        assert len(moments) == 3 * 2 * 3 + 2  # adapters, and the head
    before = npz.flatten(params)
    for name, array in found[0].items():
        moved = name.endswith(lora.ARRAYS) or name.startswith('head/')
        assert (array.tobytes() != before[name].tobytes()) == moved, name
        for other in found[1:]:
            np.testing.assert_allclose(other[name], array, atol=2e-5, err_msg=name)
            assert moved or other[name].tobytes() == array.tobytes()


class Stop:
    def on_step(self, step, state, metrics):
        if step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """Weights to start from, of another number of classes."""
    changes = {'num_classes': 7, 'transformer': {**TRANSFORMER, 'num_layers': 2}}
    model = models.VisionTransformer(**VIT | changes, classifier='gap')
    path = tmp_path_factory.mktemp('base') / 'base.npz'
    npz.save(path, jax.device_get(state.init_params(model, 16, seed=3)))
    return path


ADAPTED = {
    'model.transformer.num_layers': 2, 'total_steps': 4, 'warmup_steps': 1,
    'lora_rank': 4, 'dora': True, 'lora_dropout': 0.2, 'lora_targets': 'attention,mlp',
    'ema_decay': 0.5, 'accum_steps': 2, 'base_lr': 0.1,
}  # fmt: skip


@pytest.fixture(scope='module')
def finished(base, tmp_path_factory):
    workdir, states = tmp_path_factory.mktemp('adapted') / 'run', []

    class Copy:
        def on_step(self, step, state, metrics):
            states.append(jax.device_get(state))

    params = small.run(small.run_config(pretrained=str(base), **ADAPTED), workdir, [Copy()])
    return workdir, jax.device_get(params), states


def test_a_run_ends_in_merged_weights_and_leaves_the_base_as_it_was(base, finished):
    workdir, params, states = finished
    start, last = npz.flatten(npz.open_file(base).read()), npz.flatten(states[-1].params)
    for name, array in start.items():
        if not name.startswith('head/'):
            assert last[name].tobytes() == array.tobytes(), name
    for name, array in last.items():
        if name.endswith('lora_magnitude'):  # which begins as the lengths of the weights' columns
            kernel = start[f'{name.rpartition("/")[0]}/kernel'].astype(np.float64)
            lengths = np.sqrt((kernel.reshape(-1, array.size) ** 2).sum(axis=0))
            assert 0 < np.abs(array / lengths - 1).max() < 0.1, name
    saved = npz.flatten(npz.open_file(workdir / 'model/params.npz').read())
    average = states[-1].model_params
    settings = lora.Lora(4, tuple(n for part in lora.GROUPS.values() for n in part), dora=True)
    merged = npz.flatten(jax.device_get(lora.merge(average, settings)))
    assert saved.keys() == npz.flatten(params).keys() == merged.keys()
    assert not any('lora' in name for name in saved)
    for name, array in npz.flatten(params).items():
        np.testing.assert_array_equal(saved[name], array)
        np.testing.assert_allclose(merged[name], array, atol=1e-6)
    query = 'Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel'
    assert np.abs(saved[query] - start[query]).max() > 1e-4
    log = (workdir / 'train.log').read_text()
    assert '9,699 parameters, of which 2,067 (21.31%) are trained' in log


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(base, finished, tmp_path):
    whole, params, _ = finished
    config = small.run_config(pretrained=str(base), **ADAPTED)
    with pytest.raises(KeyboardInterrupt):
        small.run(config, tmp_path / 'run', [Stop()])
    again = jax.device_get(small.run(config, tmp_path / 'run'))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (tmp_path / 'run/metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()


def test_less_is_computed_and_kept_for_a_part():
    """The compiler's account of operations and of temporary memory, beside that of all."""

    def cost(**knobs):
        config = make_config(optim_dtype='float32', **knobs)
        model = trained_part.adapted(config, MODELS['vit'])
        params = jax.eval_shape(lambda: state.init_params(model, 16, seed=0))
        frozen = trained_part.frozen_of(config, lambda: groups.names_of(params))
        mesh = sharding.create_mesh(devices=jax.devices()[:1])
        tx = optim.trained_only(optim.create_optimizer(config, lambda _: 0.1), frozen)
        start = state.abstract_state(model, tx, 16, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, start)
        step = steps.make_train_step(model, tx, None, mesh, shardings, seed=0, frozen=frozen)
        compiled = step.lower(start, steps.abstract_batch(64, 16, mesh)).compile()
        moments = sum(leaf.size for leaf in jax.tree.leaves(start.opt_state))
        memory = compiled.memory_analysis().temp_size_in_bytes
        return np.array([compiled.cost_analysis()['flops'], memory, moments])

    full = cost()
    head, last, adapters = (
        cost(**knobs) / full for knobs in ({'train_only': 'head'}, {'train_only': 'last:1'},
                                           {'lora_rank': 1, 'lora_targets': 'query,value'})
    )  # fmt: skip
    assert (head < (0.4, 0.5, 0.02)).all(), head
    assert (last < (0.65, 0.7, 0.5)).all(), last
    assert (adapters < (0.85, 1.0, 0.1)).all(), adapters
