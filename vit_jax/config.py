"""From a config file and flags to the settings of a run.

Fills what is unset and checks what can be checked without data.

`main.py` and `train.py` see only what `resolve` returns: every knob of `configs/common.py` with a
value of its type.
"""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from vit_jax import files, variants
from vit_jax.checkpoint.resize import PATCH_METHODS
from vit_jax.configs import common, datasets
from vit_jax.data import remote, splits
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.randaugment import AUGREG
from vit_jax.errors import UserError
from vit_jax.models.attention import ATTENTION_IMPLEMENTATIONS
from vit_jax.models.layers import REMAT_POLICIES
from vit_jax.models.resnet import GROUPS
from vit_jax.run import checks, trackers, trained_part

DURATIONS = ('total_steps', 'epochs', 'total_examples')
MAX_CHANNELS = 1024  # of images
WEIGHT_KEYS = ('pretrained', 'model_or_filename', 'pretrained_dir')  # strongest first
_CHOICES = {
    'decay_type': ('cosine', 'linear', 'rsqrt', 'constant'),
    'optimizer': ('sgd', 'adamw', 'lion', 'lamb', 'muon', 'adafactor'),
    'optim_dtype': ('bfloat16', 'float32'),
    'dtype': ('', 'float32', 'bfloat16'),
    'attention': ATTENTION_IMPLEMENTATIONS,
    'patch_resize': PATCH_METHODS,
    'remat': ('', *REMAT_POLICIES),
    'nan_policy': ('stop', 'skip'),
    'tracker': ('', *trackers.NAMES),
    'loss': ('', 'softmax', 'sigmoid', 'mse', 'huber', 'contrastive', 'pairwise_sigmoid'),
    'augreg': ('', *AUGREG),
    'distillation': ('', 'hard', 'soft', 'patient'),
}
_AT_LEAST_ONE = (
    'batch', 'batch_eval', 'progress_every', 'eval_every', 'checkpoint_every', 'keep_checkpoints',
    'rsqrt_timescale',
)  # fmt: skip
_NOT_NEGATIVE = (
    'data_threads', 'cache', 'accum_steps', 'epochs', 'total_examples', 'warmup_steps',
    'cooldown_steps', 'base_lr', 'grad_norm_clip', 'momentum', 'weight_decay', 'seed',
    'max_unreadable', 'label_smoothing', 'layer_decay', 'ema_decay', 'ema_warmup_steps',
    'stochastic_depth', 'mixup', 'cutmix', 'color_jitter', 'random_erasing', 'patience',
    'repeated_augmentation', 'sam_rho', 'gsam_alpha', 'gsam_rho_min', 'lora_rank', 'lora_alpha',
    'lora_dropout',
)  # fmt: skip


def resolve(
    config: ml_collections.ConfigDict, flags: Iterable[str] = ()
) -> ml_collections.ConfigDict:
    """Fills every knob that neither the file nor a flag set, and settles which weights count.

    Args:
      config: what a config file's `get_config` returned, with flags applied.
      flags: paths of the knobs that flags set ('base_lr', 'pp.train'), see
        `config_flags.get_override_values`.

    Returns:
      A new, locked config in which every knob of `configs/common.py` has a value, only the chosen
      one of `pretrained`, `model_or_filename` (with `pretrained_dir`) and `pretrained_dir` is not
      empty, and `model` describes the architecture.

    Raises:
      UserError: there is no model, or a knob has an impossible value.
    """
    model = config.get('model')
    if not model:
        raise UserError(
            'the config has no model: set config.model = variants.get_config(NAME) in its file'
        )
    dataset = config.dataset or common.get_defaults().dataset
    resolved = common.get_defaults()
    # How long the training is that the warm-up was made for.
    duration, warm_up_of = 'total_steps', resolved.total_steps
    presets = config.get('dataset_presets', {})
    # May be called as a set is; see `sources.open_dataset`.
    path = remote.is_remote(dataset, '--config.dataset') or files.expand(dataset).exists()
    for layer in (
        {} if path else datasets.get_preset(dataset),
        presets.get('any', {}),
        {} if path and os.sep not in dataset else presets.get(dataset, {}),
        config,
    ):
        _overlay(resolved, _augreg(layer.get('augreg')))
        _overlay(resolved, layer)
        duration = _duration(layer, flags if layer is config else ()) or duration
        if layer.get('warmup_steps') is not None:
            warm_up_of = resolved.total_steps if duration == 'total_steps' else 0
    for key in DURATIONS[1:]:
        if key != duration:
            resolved[key] = type(resolved[key])(0)
    total, resolved.total_steps = resolved.total_steps, warm_up_of
    resolved.dataset = dataset
    if resolved.fold:  # a preset's splits are of the same examples
        resolved.pp.update(train=config.pp.train or '', test=config.pp.test or '')
    squash = resolved.pp.eval == 'squash'
    if config.pp.inception_crop is None and (
        (resolved.pp.resize and squash) or resolved.pp.resize_small
    ):  # `pp.resize` alone asks for "resize, then crop at random"
        resolved.pp.inception_crop = False
    chosen = choose_weights(resolved, flags)
    for key in WEIGHT_KEYS:
        # AugReg's files are looked for in `pretrained_dir`, as by the original.
        if key != chosen and (chosen, key) != ('model_or_filename', 'pretrained_dir'):
            resolved[key] = ''
    resolved.model = ml_collections.ConfigDict(model.to_dict())
    if duration == 'total_examples':
        total = max(1, round(resolved.total_examples / max(1, resolved.batch)))
    if duration != 'epochs':
        _set_steps(resolved, total)
    _check(resolved)
    return resolved.lock()


def set_epochs(config: ml_collections.ConfigDict, examples: int) -> None:
    """Fills in `total_steps`, and the warm-up that goes with it, if the config gives epochs.

    Args:
      config: resolved; changed.
      examples: in the training set.

    Raises:
      UserError: warm-up and cool-down leave nothing of so few steps.
    """
    if config.epochs:
        with config.unlocked():
            _set_steps(config, max(1, round(config.epochs * examples / config.batch)))
        checks.check_schedule(config)


def _set_steps(config: ml_collections.ConfigDict, total: int) -> None:
    """`total_steps`, which until now are those that the warm-up was made for; 0: for any."""
    if config.total_steps:
        config.warmup_steps = config.warmup_steps * total // config.total_steps
    config.total_steps = total


def _duration(layer: Mapping[str, Any], flags: Iterable[str]) -> str:
    """Which of `DURATIONS` a layer sets, a flag before a file; empty for none.

    Raises:
      UserError: several.
    """
    given = [key for key in DURATIONS if layer.get(key)]
    given = [key for key in given if key in set(flags)] or given
    if len(given) > 1:
        values = ' and '.join(f'config.{key}={layer[key]}' for key in given)
        raise UserError(f'{values} both say how long to train: leave out one of them')
    return given[0] if given else ''


def choose_weights(config: ml_collections.ConfigDict, flags: Iterable[str] = ()) -> str:
    """Which of the three ways to name the weights counts.

    `pretrained` beats `model_or_filename`, which beats `pretrained_dir`; what a flag set beats what
    the file set, so `--config.pretrained_dir=DIR` replaces the `pretrained` of `configs/b16.py`.

    Returns:
      'pretrained', 'model_or_filename' or 'pretrained_dir', or an empty string: no weights.
    """
    given = [key for key in WEIGHT_KEYS if key in set(flags)]
    if given == ['pretrained_dir'] and config.model_or_filename and not config.pretrained:
        return 'model_or_filename'  # configs/augreg.py with another folder
    return next((key for key in given or WEIGHT_KEYS if config[key]), '')


def preprocess_of(config: ml_collections.ConfigDict) -> Preprocess:
    """The preprocessing that a resolved config asks for."""
    return Preprocess(
        crop=config.pp.crop,
        resize=config.pp.resize,
        inception_crop=config.pp.inception_crop,
        resize_small=config.pp.resize_small,
        eval=config.pp.eval,
        interpolation=config.pp.interpolation,
        antialias=config.pp.antialias,
    )


def chooses(config: ml_collections.ConfigDict) -> bool:
    """Whether a run chooses by what it measures, which takes validation images."""
    return config.keep_best or config.patience > 0 or not config.test_at_end


def compute_dtype(config: ml_collections.ConfigDict, platform: str) -> str:
    """The dtype of activations: what the config says, or bfloat16 on GPU and float32 on CPU."""
    return config.dtype or ('float32' if platform == 'cpu' else 'bfloat16')


DETERMINISTIC_FLAG = '--xla_gpu_deterministic_ops=true'


def use_deterministic_operations() -> None:
    """Makes XLA choose GPU operations that give the same bits every time (a CPU always does).

    To be called before anything runs on a device. The flag excludes operations whose result depends
    on the order of atomic additions, and choosing among algorithms by timing them.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    if DETERMINISTIC_FLAG not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {DETERMINISTIC_FLAG}'.strip()


def check_devices(config: ml_collections.ConfigDict, devices: int, platform: str) -> None:
    """Checks that batch, mesh and attention fit the devices.

    Args:
      config: resolved.
      devices: how many take part, over all processes.
      platform: 'cpu' or 'gpu', see `jax.default_backend`.

    Raises:
      UserError: the batch cannot be shared equally (the message names one that can), or cuDNN
        cannot run.
    """
    parts = devices * max(1, config.accum_steps)
    if config.batch % parts:
        nearest = max(1, round(config.batch / parts)) * parts
        raise UserError(
            f'config.batch={config.batch} cannot be shared by {devices} device{"s" * (devices > 1)}'
            f' in {max(1, config.accum_steps)} accumulation steps each: it must be a multiple of '
            f'{parts}. '
            f'Use --config.batch={nearest}, or another --config.accum_steps'
        )
    fsdp = devices if config.fsdp == -1 else config.fsdp
    if fsdp < 1 or devices % fsdp:
        raise UserError(
            f'config.fsdp={config.fsdp} does not divide the {devices} devices: use -1 (all), '
            '1 (data parallel) or a divisor'
        )
    if config.deterministic and platform == 'gpu':
        if DETERMINISTIC_FLAG not in os.environ.get('XLA_FLAGS', ''):
            raise UserError(
                'config.deterministic=True needs XLA_FLAGS=' + DETERMINISTIC_FLAG + ' in the '
                'environment before JAX starts (`python -m vit_jax.main` sets it)'
            )
        if config.attention == 'cudnn':
            raise UserError(
                "config.attention='cudnn' adds gradients in any order, which "
                'config.deterministic=True excludes: use --config.attention=xla'
            )
    if config.attention == 'cudnn' and (platform, compute_dtype(config, platform)) != (
        'gpu',
        'bfloat16',
    ):
        raise UserError(
            "config.attention='cudnn' runs on NVIDIA GPUs, in bfloat16: use --config.attention=auto"
        )


def _overlay(target: ml_collections.ConfigDict, layer: Mapping[str, Any]) -> None:
    """Writes what `layer` has set over `target`.

    Raises:
      UserError: the layer has a knob that does not exist.
    """
    for key, value in layer.items():
        if value is None or key in ('model', 'dataset_presets'):
            continue
        if key not in target:
            raise UserError(
                f'the config sets {key!r}, which is no knob; `vit_jax train --help` lists them'
            )
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            _overlay(target[key], value)
        else:
            target[key] = value


def _check(config: ml_collections.ConfigDict) -> None:
    for key in ('tfds_data_dir', 'tfds_manual_dir', 'compile_cache'):
        if remote.scheme_of(config[key]):
            raise UserError(f'config.{key}={config[key]} has to be a folder on this machine')
    for key, choices in _CHOICES.items():
        if config[key] not in choices:
            names = ', '.join(repr(choice) for choice in choices)
            raise UserError(f'config.{key}={config[key]!r} is not one of {names}')
    for keys, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for key in keys:
            if not config[key] >= least:  # so that NaN fails
                raise UserError(f'config.{key}={config[key]} must be at least {least}')
    if config.fold:
        splits.fold_of(config.fold)
        if config.pp.test:
            raise UserError(
                f'config.fold={config.fold!r} tests on a fold of the training images, and '
                f'config.pp.test={config.pp.test!r} on others: leave out one of them'
            )
    if config.report and not config.test_at_end:
        raise UserError(
            'config.report=True predicts the test images, which config.test_at_end=False leaves '
            'alone: add --config.report=False'
        )
    weights = next((key for key in WEIGHT_KEYS if config[key]), '')
    if config.sincos_positions and weights:
        raise UserError(
            f'config.sincos_positions=True is for new weights, and config.{weights} brings '
            'positions with it: leave out one of them'
        )
    checks.check_recipe(config)
    trained_part.check(config)
    if config.profile:
        checks.profiled(config.profile)
    if not config.epochs:
        checks.check_schedule(config)
    if config.pp.resize and config.pp.inception_crop and config.pp.eval == 'squash':
        raise UserError(
            f'config.pp.resize={config.pp.resize} has no effect with '
            'config.pp.inception_crop=True: drop one of them '
            '(pp.resize alone means: resize, then crop at random), or evaluate with '
            "config.pp.eval='resize_crop'"
        )
    preprocess_of(config)
    if not 1 <= config.pp.channels <= MAX_CHANNELS:
        raise UserError(f'config.pp.channels={config.pp.channels} is not from 1 to {MAX_CHANNELS}')
    check_model(config)


def _augreg(name: str | None) -> dict[str, Any]:
    """The knobs of one of AugReg's settings; of a name that is none, nothing."""
    return dict(zip(('randaug', 'mixup'), AUGREG.get(name or '', ()), strict=False))


def check_model(config: ml_collections.ConfigDict) -> None:
    """Checks the architecture, and that crop and attention fit it.

    Raises:
      UserError: it is none that can be built, or they do not fit.
    """
    model = variants.image_tower(config.model)
    patch = tuple(model.patches['size'])
    if len(patch) != 2 or not all(type(side) is int and side >= 1 for side in patch):
        raise UserError(
            f'config.model.patches.size={patch} should be (height, width) of a patch, pixels'
        )
    try:
        variants.token_grid(model, preprocess_of(config).crop)
    except ValueError as error:
        why, sizes = error.args
        raise UserError(
            f'config.pp.crop={config.pp.crop} {why} --config.pp.crop={sizes}'
        ) from error
    if variants.is_mixer(model):
        _check_mixer(config)
    else:
        _check_vit(config, model)


def _check_mixer(config: ml_collections.ConfigDict) -> None:
    if config.attention != 'auto':
        raise UserError(
            f'config.attention={config.attention!r}: {config.model.model_name} is an MLP-Mixer, '
            'which has no attention; leave it out'
        )
    if config.scan_layers:
        raise UserError(
            f'config.scan_layers=True: {config.model.model_name} is an MLP-Mixer, whose blocks are '
            'not looped over; leave it out'
        )
    # Other files may be made for another size; reading them tells.
    weights = config.pretrained or config.pretrained_dir
    released = re.match(r'(gs://|https://storage.googleapis.com/)?mixer_models/', weights)
    if released and preprocess_of(config).crop != 224 and not pathlib.Path(weights).exists():
        raise UserError(
            f'config.pp.crop={config.pp.crop}: a Mixer has weights for each token, and the '
            'released ones are made for 224 px. Use --config.pp.crop=224, or train from nothing '
            'with --config.pretrained='
        )


def _check_vit(config: ml_collections.ConfigDict, model: ml_collections.ConfigDict) -> None:
    if 'unpooled' in model.classifier:
        raise UserError(
            f'config.model.classifier={model.classifier!r} gives one output per '
            "token; train with 'token' or 'gap'"
        )
    if model.get('distilled') and (
        model.classifier != 'token' or model.representation_size or model.get('mlp_head')
    ):
        raise UserError(
            'config.model.distilled goes with config.model.classifier=token and the two heads of a '
            'DeiT, without representation_size and mlp_head'
        )
    if model.get('resnet'):
        width = int(64 * model.resnet.width_factor)
        if width < 1 or width % GROUPS:
            raise UserError(
                f'config.model.resnet.width_factor={model.resnet.width_factor} gives {width} '
                f'channels, which must be a multiple of {GROUPS}: use 1'
            )
    transformer = model.transformer
    if model.hidden_size % transformer.num_heads:
        raise UserError(
            f'config.model.hidden_size={model.hidden_size} is not divisible by '
            f'config.model.transformer.num_heads={transformer.num_heads}'
        )
    if config.attention not in ('auto', 'xla') and transformer.attention_dropout_rate:
        raise UserError(
            f"config.attention={config.attention!r} has no dropout: use 'xla', or "
            'config.model.transformer.attention_dropout_rate=0'
        )


def default_workdir(config_file: str, dataset: str) -> pathlib.Path:
    """`runs/<config>-<dataset>`: configs/b16.py on '/data/my photos' gives runs/b16-my_photos."""
    stem = pathlib.Path(config_file.split('.py')[0]).name
    name = ''.join(c if c.isalnum() or c in '-_.' else '_' for c in pathlib.Path(dataset).name)
    return pathlib.Path('runs') / f'{stem}-{name or "data"}'
