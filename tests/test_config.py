"""From config files and flags to settings: precedence, weights, checks."""

import importlib
import pathlib
import re

import ml_collections
import modules
import pytest

from vit_jax import config as config_lib
from vit_jax import variants
from vit_jax.configs import b16, common, datasets
from vit_jax.errors import UserError

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))
NOT_A_RUN = ('common', 'datasets')
ARGUMENTS = {'vit': ('b16,cifar10',), 'augreg': ('R_Ti_16',)}
FILES = [name for name in CONFIGS if name not in NOT_A_RUN]


def load(name, *argument, **flags):
    """What `--config configs/NAME.py:ARGUMENT --config.KEY=VALUE` gives."""
    config = importlib.import_module(f'vit_jax.configs.{name}').get_config(*argument)
    config.lock()
    for key, value in flags.items():
        config.update_from_flattened_dict({key.replace('__', '.'): value})
    return config_lib.resolve(config, [key.replace('__', '.') for key in flags])


def leaves(config, prefix=''):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


@pytest.mark.parametrize('name', FILES)
def test_every_config_file_resolves_to_a_model(name):
    config = load(name, *ARGUMENTS.get(name, ()))
    unset = {key for key, value in leaves(config) if value is None}
    tower = 'model.image' if variants.has_two_towers(config.model) else 'model'
    assert unset <= {f'{tower}.{name}' for name in ('representation_size', 'act', 'layer_norm_eps')}
    modules.shapes_of(variants.image_tower(config.model), 5, config.pp.crop)
    named = variants.image_tower(config.model).get('model_name')
    assert named in {*variants.VARIANTS, 'ViT-digits', 'ViT-flowers'}
    text = (pathlib.Path(__file__).parents[1] / f'configs/{name}.py').read_text()
    assert f'--config configs/{name}.py' in text.split('"""')[1]


def test_b16_alone_is_the_papers_transfer_schedule():
    config = load('b16')
    assert config.model.model_name == 'ViT-B_16'
    assert config.pretrained == 'imagenet21k/ViT-B_16.npz'
    assert (config.dataset, config.pp.train, config.pp.test) == (
        'tf_flowers', 'train[:90%]', 'train[90%:]',
    )  # fmt: skip
    assert (config.pp.crop, config.batch, config.accum_steps) == (224, 512, 8)
    assert (config.base_lr, config.total_steps, config.warmup_steps) == (0.01, 500, 100)
    assert (config.decay_type, config.grad_norm_clip, config.optim_dtype) == (
        'cosine', 1.0, 'bfloat16',
    )  # fmt: skip


@pytest.mark.parametrize(
    ('argument', 'lr', 'steps', 'warmup', 'train', 'test'),
    [
        ('b16,cifar10', 0.01, 10_000, 500, 'train[:98%]', 'test'),
        ('b32,cifar10', 0.03, 10_000, 500, 'train[:98%]', 'test'),
        ('b16,cifar100', 0.03, 10_000, 500, 'train[:98%]', 'test'),
        ('l16,imagenet2012', 0.03, 20_000, 500, 'train[:99%]', 'validation'),
    ],
)
def test_vit_py_gives_the_originals_settings(argument, lr, steps, warmup, train, test):
    config = load('vit', argument)
    assert (config.base_lr, config.total_steps, config.warmup_steps) == (lr, steps, warmup)
    assert (config.pp.train, config.pp.test, config.pp.crop) == (train, test, 384)
    assert (config.batch, config.batch_eval, config.accum_steps) == (512, 512, 8)
    assert config.pretrained_dir == '.' and not config.pretrained
    assert config.dataset == argument.split(',')[1]


def test_vit_py_knows_every_model_by_the_originals_spelling():
    names = (
        'ti16 s16 b16 l16 h14 s16_gap_norep b16_gap_norep b8 s32 b32 l32 s32_gap_norep '
        'b32_gap_norep r_ti16 r50_b16 r26_b32 r26_s32 r50_l32 mixer_b16 mixer_b32 mixer_l16'
    )
    for name in names.split():
        config = load('vit', f'{name},cifar100')
        sizes = {'h14': 378, 'mixer_b16': 224, 'mixer_b32': 224, 'mixer_l16': 224}
        assert config.pp.crop == sizes.get(name, 384)
    assert load('vit', 'r26_s32,cifar10').model.model_name == 'R26+ViT-S_32'
    assert load('vit', 'b16_gap_norep,cifar10').model.model_name == 'ViT-B_16-gap-norep'


@pytest.mark.parametrize(
    ('argument', 'model', 'stages'),
    [
        ('R_Ti_16', 'R+ViT-Ti_16', 0),
        ('R50_L_32', 'R50+ViT-L_32', 4),
        ('L_16', 'ViT-L_16', None),
        (
            'B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-'
            'lr_0.03-res_384',
            'ViT-B_16',
            None,
        ),
    ],
)
def test_augreg_py_gives_the_originals_settings(argument, model, stages):
    config = load('augreg', argument, dataset='oxford_iiit_pet')
    assert config.model.model_name == model
    assert config.model.transformer.dropout_rate == 0
    hybrid = config.model.get('resnet')
    assert (len(hybrid.num_layers) if hybrid else None) == stages
    assert config.model_or_filename == argument and not config.pretrained
    assert config.pretrained_dir == 'gs://vit_models/augreg'
    assert (config.base_lr, config.total_steps, config.warmup_steps) == (0.03, 500, 100)
    assert (config.pp.train, config.pp.test, config.pp.crop) == ('train', 'test', 384)
    assert load('augreg', argument, dataset='cifar10').pp.train == 'train'
    assert load('augreg', argument, dataset='tf_flowers').pp.test == 'train[90%:]'
    assert load('augreg', argument, dataset='/my/photos').pp.test == ''  # the folder's own
    assert load('augreg', argument, pp__train='train[:90%]').pp.train == 'train[:90%]'


def test_augreg_py_names_the_models_there_are():
    with pytest.raises(ValueError, match="unknown AugReg model 'Mixer'.* R_Ti_16, R26_S_32"):
        load('augreg', 'Mixer-B_16')


def test_mixer_base16_cifar10_is_the_originals():
    config = load('mixer_base16_cifar10')
    assert (config.dataset, config.pp.train, config.pp.test) == ('cifar10', 'train[:98%]', 'test')
    assert (config.total_steps, config.warmup_steps, config.base_lr) == (10_000, 500, 0.03)
    assert (config.pp.crop, config.batch, config.pretrained_dir) == (224, 512, '.')
    assert config.model.model_name == 'Mixer-B_16'


def test_precedence_default_preset_file_table_file_flag():
    assert load('b16').warmup_steps == 100  # the default
    assert load('b16', 'cifar10').total_steps == 10_000  # the dataset's preset
    assert load('b16', dataset='cifar10').total_steps == 10_000  # also when a flag chose the set
    assert load('b16', dataset='cifar10').pp.train == 'train[:98%]'
    assert load('b16', 'cifar10', total_steps=7, warmup_steps=1).total_steps == 7  # a flag
    assert load('b16', pp__crop=384).pp.crop == 384
    config = common.get_config()
    config.model = importlib.import_module('vit_jax.configs.b16').get_config().model
    config.dataset = 'cifar10'
    table = ml_collections.ConfigDict({'total_steps': 8, 'warmup_steps': 2})
    config.dataset_presets.cifar10 = table
    assert config_lib.resolve(config).total_steps == 8  # the file's table beats the preset
    config.total_steps = 9
    assert config_lib.resolve(config).total_steps == 9  # what the file sets beats its table


@pytest.mark.parametrize(
    ('name', 'changes', 'steps', 'warmup'),
    [
        ('b16', {'total_steps': 50}, 50, 10),  # as 100 of 500
        ('b16', {'total_steps': 50, 'dataset': 'cifar10'}, 50, 2),  # as 500 of 10,000
        ('b16', {'total_steps': 50, 'warmup_steps': 7}, 50, 7),  # a flag wins
        ('b16', {'warmup_steps': 7}, 500, 7),
        ('b16', {'total_steps': 1}, 1, 0),
        ('digits', {'total_steps': 200}, 200, 20),
        ('digits', {}, 600, 60),
        ('augreg', {'total_steps': 100}, 100, 20),  # as the original's run on tf_flowers
        ('augreg', {'dataset': 'cifar10'}, 500, 100),
    ],
)
def test_a_warm_up_that_was_not_set_is_the_same_share_of_the_steps(name, changes, steps, warmup):
    config = load(name, *(['R_Ti_16'] if name == 'augreg' else []), **changes)
    assert (config.total_steps, config.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize(
    ('name', 'changes', 'steps', 'warmup'),
    [
        ('b16', {'total_examples': 51_200}, 100, 20),  # as 100 of 500
        ('b16', {'total_examples': 51_200, 'warmup_steps': 7}, 100, 7),
        ('b16', {'total_examples': 1}, 1, 0),
        ('b16', {'epochs': 10.0}, 20, 4),  # of 1,000 images
        ('b16', {'epochs': 10.0, 'dataset': 'cifar10'}, 20, 1),  # as 500 of 10,000
        ('b16', {'epochs': 10.0, 'warmup_steps': 7}, 20, 7),
        ('b16', {'epochs': 10.0, 'batch': 64}, 156, 31),
        ('digits', {'epochs': 0.5, 'batch': 100}, 5, 0),  # a flag beats the file's steps
        ('digits', {'epochs': 0.0}, 600, 60),
    ],
)
def test_durations_in_examples_and_epochs(name, changes, steps, warmup):
    config = load(name, **changes)
    config_lib.set_epochs(config, 1_000)
    assert (config.total_steps, config.warmup_steps) == (steps, warmup)
    config_lib.set_epochs(config, 1_000)  # again, as a second run with the same config does
    assert (config.total_steps, config.warmup_steps) == (steps, warmup)


def test_the_stronger_layer_says_how_long_to_train():
    config = importlib.import_module('vit_jax.configs.b16').get_config()
    config.epochs = 90.0  # a file's
    assert config_lib.resolve(config).epochs == 90
    config.total_steps = 7  # and a flag's
    resolved = config_lib.resolve(config, ['total_steps'])
    assert (resolved.total_steps, resolved.epochs) == (7, 0)
    with pytest.raises(UserError, match='total_steps=7 and config.epochs=90.0 both say'):
        config_lib.resolve(config)
    with pytest.raises(UserError, match='both say how long'):
        load('b16', epochs=3.0, total_examples=4)
    with pytest.raises(UserError, match='warmup_steps=30 leaves nothing'):
        config_lib.set_epochs(load('b16', epochs=10.0, warmup_steps=30), 1_000)


def test_resolving_leaves_the_file_untouched_and_locks():
    config = importlib.import_module('vit_jax.configs.b16').get_config()
    resolved = config_lib.resolve(config)
    assert config.batch is None
    with pytest.raises(AttributeError):
        resolved.no_such_knob = 1


@pytest.mark.parametrize(
    ('name', 'flags', 'kept'),
    [
        ('b16', {}, {'pretrained': 'imagenet21k/ViT-B_16.npz'}),
        ('b16', {'pretrained': 'x.npz'}, {'pretrained': 'x.npz'}),
        ('b16', {'pretrained': ''}, {}),
        ('b16', {'pretrained_dir': 'd'}, {'pretrained_dir': 'd'}),
        ('b16', {'model_or_filename': 'B_16'}, {'model_or_filename': 'B_16'}),
        ('b16', {'model_or_filename': 'B_16', 'pretrained_dir': 'd'},
         {'model_or_filename': 'B_16', 'pretrained_dir': 'd'}),
        ('b16', {'pretrained': 'x', 'model_or_filename': 'y', 'pretrained_dir': 'd'},
         {'pretrained': 'x'}),
        ('digits', {}, {}),
        ('digits', {'pretrained_dir': 'd'}, {'pretrained_dir': 'd'}),
    ],
)  # fmt: skip
def test_which_weights_count(name, flags, kept):
    config = load(name, **flags)
    assert {key: config[key] for key in config_lib.WEIGHT_KEYS if config[key]} == kept


@pytest.mark.parametrize(
    ('name', 'randaug', 'mixup'),
    [('', '', 0.0), ('none', '', 0.0), ('light1', '2,0', 0.0), ('light2', '2,10', 0.2),
     ('medium1', '2,15', 0.2), ('medium2', '2,15', 0.5), ('strong1', '2,20', 0.5),
     ('strong2', '2,20', 0.8)],
)  # fmt: skip
def test_settings_of_augreg_are_randaug_and_mixup(name, randaug, mixup):
    config = load('b16', augreg=name)
    assert (config.randaug, config.mixup) == (randaug, mixup)
    config = load('b16', augreg=name, mixup=0.1)
    assert (config.randaug, config.mixup) == (randaug, 0.1)


def test_a_setting_of_augreg_in_a_files_table_counts_as_well():
    file = b16.get_config()
    file.dataset_presets = {'any': {'augreg': 'light2', 'mixup': 0.0}}
    config = config_lib.resolve(file)
    assert (config.randaug, config.mixup) == ('2,10', 0.0)


def test_resize_alone_asks_for_random_crops():
    assert load('b16').pp.inception_crop
    config = load('b16', pp__resize=256)
    assert not config.pp.inception_crop and config_lib.preprocess_of(config).resize == 256
    config = load('b16', pp__resize_small=256)
    assert not config.pp.inception_crop and config_lib.preprocess_of(config).resize_small == 256


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'pp__crop': 225}, 'not a multiple of the patch size 16: use --config.pp.crop=224 or 240'),
        ({'pp__crop': 5}, 'use --config.pp.crop=16'),
        ({'optimizer': 'adam'}, "'adam' is not one of 'sgd', 'adamw', 'lion'"),
        ({'decay_type': 'step'}, "'step' is not one of 'cosine', 'linear', 'rsqrt', 'constant'"),
        ({'dtype': 'float16'}, "is not one of '', 'float32', 'bfloat16'"),
        ({'batch': 0}, 'config.batch=0 must be at least 1'),
        ({'base_lr': float('nan')}, 'config.base_lr=nan must be at least 0'),
        ({'layer_decay': 1.1}, 'it is at most 1'),
        ({'gsam_alpha': 0.6}, 'config.gsam_alpha=0.6 has no effect without config.sam_rho'),
        ({'sam_rho': 0.1, 'gsam_rho_min': 0.2}, 'config.sam_rho=0.1 the largest: use less'),
        ({'mix_per_example': True}, 'has no effect without config.mixup or config.cutmix'),
        ({'mixup': 0.2, 'batch': 1, 'accum_steps': 1}, 'config.batch=1 has only one'),
        ({'distillation': 'hard'}, "config.distillation='hard' needs a teacher"),
        ({'teacher': 'x.npz'}, 'teaches nothing without config.distillation'),
        (
            {'distillation': 'hard', 'teacher': 'x', 'distillation_alpha': 1.5},
            'is a share, from 0 to 1',
        ),
        (
            {'distillation': 'soft', 'teacher': 'x', 'distillation_temperature': 0.0},
            'must be above 0',
        ),
        (
            {'distillation': 'patient', 'teacher': 'x', 'label_smoothing': 0.1},
            'asks the teacher and not the labels',
        ),
        ({'augreg': 'medium'}, "'medium' is not one of '', 'none', 'light1'"),
        ({'repeated_augmentation': 3}, 'a batch of 512 cannot .* use --config.batch=513'),
        (
            {'repeated_augmentation': 512, 'mixup': 0.2},
            'config.batch=512 has only one, 512 times: use a larger batch',
        ),
        (
            {'balanced_sampling': True, 'class_weights': 'balanced'},
            'would both make up for the sizes of classes',
        ),
        ({'pp__resize_small': 200}, 'must be 0 .* or from pp.crop=224'),
        ({'pp__resize_small': 256, 'pp__inception_crop': True}, 'both say how training images'),
        ({'randaug': '2'}, "config.randaug='2' is neither 'LAYERS,MAGNITUDE'"),
        ({'random_erasing': 1.5}, 'is a share of the images, at most 1'),
        ({'color_jitter': -0.1}, 'config.color_jitter=-0.1 must be at least 0'),
        ({'randaug': '2,10', 'three_augment': True}, 'stands in place of RandAugment'),
        ({'augreg': 'light1', 'three_augment': True}, 'stands in place of RandAugment'),
        ({'stochastic_depth': 1.0}, 'would leave out the last block always'),
        ({'ema_decay': 1.0}, 'would leave the average where it begins'),
        ({'ema_warmup_steps': 5}, 'has no effect without config.ema_decay'),
        ({'ema_decay': 0.9, 'ema_warmup_steps': 500}, 'is not shorter than the 500 steps'),
        ({'lr_mults': ('head', 2.0)}, "'head' is no pair of a regular expression and a number"),
        ({'wd_mults': (('.*', -1.0),)}, 'is no pair'),
        ({'label_smoothing': 1.0}, 'a share below 1'),
        ({'loss': 'huber', 'huber_delta': 0.0}, 'config.huber_delta=0.0 must be above 0'),
        ({'huber_delta': 2.0}, "no effect with config.loss='': set config.loss='huber'"),
        ({'test_at_end': False}, 'add --config.report=False'),
        ({'patience': -1}, 'config.patience=-1 must be at least 0'),
        ({'tracker': 'x'}, "'x' is not one of '', 'mlflow', 'wandb'"),
        ({'loss': 'focal'}, "'focal' is not one of '', 'softmax', 'sigmoid', 'mse', 'huber'"),
        ({'eval_every': 0}, 'config.eval_every=0 must be at least 1'),
        ({'cache': -1.0}, 'config.cache=-1.0 must be at least 0'),
        ({'data_threads': -1}, 'config.data_threads=-1 must be at least 0'),
        (
            {'total_steps': 100, 'warmup_steps': 100},
            'warmup_steps=100 leaves nothing .* use --config.warmup_steps=10',
        ),
        ({'total_steps': 0}, 'config.total_steps=0 must be at least 1'),
        (
            {'total_steps': 100, 'cooldown_steps': 81},
            'more than config.total_steps=100: use --config.cooldown_steps=16',
        ),
        ({'pp__resize': 256, 'pp__inception_crop': True}, 'drop one of them'),
        ({'pp__resize': 200}, 'at least pp.crop=224'),
        ({'model.classifier': 'unpooled'}, "train with 'token' or 'gap'"),
        ({'model.transformer.num_heads': 7}, 'is not divisible by'),
        (
            {'attention': 'cudnn', 'model.transformer.attention_dropout_rate': 0.1},
            "config.attention='cudnn' has no dropout",
        ),
    ],
)
def test_impossible_values_are_named_with_what_to_do(flags, message):
    with pytest.raises(UserError, match=message):
        load('b16', **flags)


@pytest.mark.parametrize(
    ('name', 'flags', 'message'),
    [
        ('r26_s32', {'pp__crop': 240}, 'not a multiple of .* 32: use --config.pp.crop=224 or 256'),
        ('r50_b16', {'pp__crop': 232}, 'not a multiple of .* 16: use --config.pp.crop=224 or 240'),
        ('r_ti16', {'model.resnet.width_factor': 0}, 'gives 0 channels, .* multiple of 32: use 1'),
        ('r_ti16', {'pretrained': '', 'pp__crop': 200}, 'pixels per token, 32: use .*192 or 224'),
        ('mixer_b16', {'pp__crop': 384}, 'released ones are made for 224 px'),
        ('mixer_b16', {'pretrained_dir': 'gs://mixer_models/sam', 'pp__crop': 256}, 'for 224 px'),
        ('mixer_b16', {'pretrained': 'mixer_models/sam/Mixer-B_16', 'pp__crop': 256}, 'for 224 px'),
        ('mixer_s32', {'pp__crop': 225}, 'patch size 32: use --config.pp.crop=224 or 256'),
        ('mixer_s32', {'attention': 'xla'}, 'Mixer-S_32 is an MLP-Mixer, which has no attention'),
        ('deit_s16', {'model.classifier': 'gap'}, 'config.model.distilled goes with'),
        ('deit_s16', {'model.representation_size': 64}, 'config.model.distilled goes with'),
        ('b16_mlp_head', {'model.classifier': 'unpooled'}, "train with 'token' or 'gap'"),
    ],
)
def test_impossible_values_of_each_family(name, flags, message):
    with pytest.raises(UserError, match=message):
        load(name, **flags)


def test_a_mixer_may_have_another_size_where_the_weights_are_not_the_released_ones():
    assert load('mixer_b16', pretrained='', pp__crop=256).pp.crop == 256
    assert load('mixer_b16', pretrained='runs/mixer/model', pp__crop=128).pp.crop == 128


@pytest.mark.parametrize(
    ('flags', 'devices', 'message'),
    [
        ({'batch': 100}, 1, r'by 1 device in 8 .* multiple of 8\. Use --config.batch=(96|104)'),
        ({'batch': 8}, 4, r'4 devices in 8 .* multiple of 32\. Use --config.batch=32'),
        ({'fsdp': 3}, 4, 'does not divide the 4 devices'),
        ({'attention': 'cudnn'}, 1, 'runs on NVIDIA GPUs, in bfloat16'),
    ],
)
def test_batch_and_devices_must_fit(flags, devices, message):
    with pytest.raises(UserError, match=message):
        config_lib.check_devices(load('b16', **flags), devices, 'cpu')
    config_lib.check_devices(load('b16', accum_steps=0, batch=4, fsdp=-1), 4, 'cpu')
    config_lib.check_devices(load('b16', attention='cudnn'), 1, 'gpu')
    assert config_lib.compute_dtype(load('b16'), 'gpu') == 'bfloat16'
    assert config_lib.compute_dtype(load('b16'), 'cpu') == 'float32'
    assert config_lib.compute_dtype(load('b16', dtype='bfloat16'), 'cpu') == 'bfloat16'


def test_a_file_that_sets_no_knob_of_ours_is_told_so():
    config = common.get_config()
    with pytest.raises(UserError, match='has no model'):
        config_lib.resolve(config)
    config.model = importlib.import_module('vit_jax.configs.b16').get_config().model
    config.learning_rate = 3
    with pytest.raises(UserError, match="'learning_rate', which is no knob"):
        config_lib.resolve(config)


def test_presets_are_found_however_the_name_is_spelt():
    small = {'tf_flowers', 'oxford_flowers102', 'oxford_iiit_pet'}
    pairs = {'digits_captions', 'coco_captions'}
    large = {'cifar10', 'cifar100', 'imagenet2012', 'digits'}
    assert small | large | pairs == set(datasets.PRESETS)
    assert datasets.get_preset('cifar10:3.0.2') == datasets.get_preset('cifar10')
    assert not datasets.get_preset('/my/photos')


@pytest.mark.parametrize('spelling', ['cifar10', 'cifar10/', './cifar10'])
def test_a_folder_takes_nothing_of_the_set_of_its_name(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'cifar10').mkdir()
    found, plain = load('b16', dataset=spelling), load('b16', dataset=str(tmp_path))
    assert found.pp.train == found.pp.test == ''
    assert (found.total_steps, found.warmup_steps) == (plain.total_steps, plain.warmup_steps)
    found = config_lib.resolve(
        importlib.import_module('vit_jax.configs.vit').get_config('b16,cifar10')
    )
    assert found.pp.test == '' and found.base_lr == common.get_defaults().base_lr


def test_every_knob_has_an_effect():
    """Each is read somewhere in the package (`config.KNOB`), so none is dead."""
    root = pathlib.Path(__file__).parents[1] / 'vit_jax'
    text = '\n'.join(path.read_text() for path in root.rglob('*.py') if path.name != 'config.py')
    text += (root / 'config.py').read_text().split('def preprocess_of')[1].split('def check')[0]
    for key, _ in leaves(common.get_defaults()):
        assert re.search(rf'config\.{re.escape(key)}\b', text), key


def test_default_workdir():
    named = config_lib.default_workdir
    assert str(named('configs/b16.py', 'tf_flowers')) == 'runs/b16-tf_flowers'
    assert str(named('configs/vit.py:b16,cifar10', 'cifar10')) == 'runs/vit-cifar10'
    assert str(named('b16.py', '/data/my photos/')) == 'runs/b16-my_photos'
