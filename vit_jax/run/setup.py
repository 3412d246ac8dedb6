"""What a run is made of: devices, data, model, optimizer, and the weights to start from.

All of it is described, and refused where it does not fit, before anything is computed.
"""

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from vit_jax import checkpoint, groups, losses, models, optim, sharding, steps, variants
from vit_jax import config as config_lib
from vit_jax import state as state_lib
from vit_jax.checkpoint import adapt, catalog, infer
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data import own, sources, splits
from vit_jax.data.dataset import Selection
from vit_jax.data.examples import Source, weights_of
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.inference.task import ONE_CLASS, Task
from vit_jax.models import lora, positions
from vit_jax.run import (
    augmentation,
    distillation,
    pairs,
    product,
    recipe,
    resources,
    resume,
    run_info,
    trackers,
    trained_part,
)
from vit_jax.state import Checkpoint

# Training, perhaps validation, and test examples.
# All examples, for `config.fold`; or training, perhaps validation, and test examples.
Sources = (
    tuple[Source]
    | tuple[Source | BatchStream, Source]
    | tuple[Source | BatchStream, Source, Source]
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What of a run is the caller's own, see `train_and_evaluate`; None: what the config says."""

    sources: Sources | None = None
    loss_fn: losses.LossFn | None = None
    tx: optax.GradientTransformation | None = None
    model: nn.Module | None = None


@dataclasses.dataclass
class Setup:
    """What is made of the config before anything is computed."""

    mesh: Mesh
    train: Selection | BatchStream
    val: Selection | None
    test: Selection
    parts: Parts
    model: nn.Module
    student: nn.Module  # the same, as it is trained
    teacher: distillation.Teacher | None
    architecture: Mapping[str, Any]  # what a model folder says of it
    no_folder: str  # why there cannot be one; '' where there can
    train_loss: losses.LossFn
    eval_loss: losses.LossFn | None  # None where the class is all that counts
    task: Task
    pairs: pairs.Pairs | None  # of images and texts
    schedule: optax.Schedule | None
    tx: optax.GradientTransformation
    frozen: str  # pattern of the parameters that stay as they are; '' for none
    abstract: Checkpoint  # shapes, dtypes and shardings of what is saved
    batch: dict[str, jax.ShapeDtypeStruct]  # those of a training batch
    memory: int  # bytes that the device had before anything was compiled
    need: resources.Memory  # what it takes at least; later, what the compiled step takes
    data: dict[str, Any]  # for data.json
    changed: list[str]  # settings that are others than when the run began

    @property
    def lora(self) -> lora.Lora | None:
        """The model's adapters."""
        return getattr(self.model, 'lora', None)


def set_up(config: ml_collections.ConfigDict, workdir: pathlib.Path, parts: Parts) -> Setup:
    """Opens the data and describes the model; everything that can be refused early is."""
    platform = jax.default_backend()
    config_lib.check_devices(config, jax.device_count(), platform)
    mesh = sharding.create_mesh(config.fsdp)
    of_pairs = None
    if variants.has_two_towers(config.model) or isinstance(parts.model, models.LitModel):
        pairs.check_given(vars(parts))
        of_pairs = pairs.open_pairs(config)
    train, val, test = _open(config, parts, of_pairs)
    recipe.settle_duration(config, train)
    model, no_folder = parts.model, ''
    if model is None:
        model = models.from_config(
            config.model,
            num_classes=len(train.class_names),
            dtype=jnp.dtype(config_lib.compute_dtype(config, platform)),
            attention=config.attention,
            remat=config.remat,
            scan_layers=config.scan_layers,
        )
    model = trained_part.adapted(config, model)
    recipe.check_depth(config, model)
    augmentation.check(config, train)
    if of_pairs is None:
        train_loss, eval_loss, task = recipe.losses_of(config, train, parts.loss_fn)
    else:
        train_loss, eval_loss, task = pairs.loss_of(of_pairs, mesh), None, ONE_CLASS
    teacher = distillation.teacher_of(config, train, task, parts.loss_fn is not None)
    student = distillation.student_of(config, model)
    train_loss = distillation.loss_of(config, train_loss)
    schedule = optim.schedule_of(config) if parts.tx is None else None

    init = functools.partial(
        state_lib.init_params, model, config.pp.crop, config.seed, channels=train.channels
    )
    names = functools.cache(lambda: trained_part.names_of(config, lambda: jax.eval_shape(init)))
    tx = recipe.optimizer_of(config, schedule, parts.tx, names)
    frozen = trained_part.frozen_of(config, names)
    if config.scan_layers and frozen and parts.model is None:
        lowest = groups.lowest_block(frozen, names())
        model, student = model.clone(scan_from=lowest), student.clone(scan_from=lowest)
    state = state_lib.abstract_state(model, tx, config.pp.crop, mesh, channels=train.channels)
    batch = steps.abstract_batch(
        config.batch, config.pp.crop, mesh, channels=train.channels, exact=config.pp.exact
    )
    if of_pairs is not None:
        assert isinstance(train, Selection) and isinstance(model, models.LitModel)
        pairs.check(config, train, state, frozen)
        if config.cache_features:
            batch['image'] = pairs.features(model, state.params, batch['image'])
    label = train.label_dtype
    batch['label'] = jax.ShapeDtypeStruct(
        (config.batch, *label.shape), label.base, sharding=batch['label'].sharding
    )
    if isinstance(train, Selection) and weights_of(train) is not None:
        batch['weight'] = jax.ShapeDtypeStruct(
            (config.batch,), jnp.float32, sharding=batch['label'].sharding
        )
    if eval_loss is not None:  # what fails in evaluation is known before a step is done
        image = jax.ShapeDtypeStruct((1, *batch['image'].shape[1:]), jnp.float32)
        one = {
            'image': image,
            'label': jax.ShapeDtypeStruct((1, *label.shape), label.base),
            'example': jax.ShapeDtypeStruct((1,), jnp.int32),
            'readable': jax.ShapeDtypeStruct((1,), jnp.bool_),
        }
        jax.eval_shape(steps.eval_step_fn(model, eval_loss, task), state.params, one)
    if config.sincos_positions:
        recipe.check_positions(state.params)
    data = _describe({'train': train, 'val': val, 'test': test}, parts, state)
    if teacher is not None:
        data['teacher'] = teacher.fingerprint
    if of_pairs is not None:
        data['vocabulary'] = of_pairs.digest()
    tower = 'model.image' if of_pairs else 'model'
    changed, resumes = [], bool(workdir_lib.saved_steps(workdir))
    if resumes:
        before = resume.read_config(workdir / run_info.CONFIG_FILE)
        _settle(config, {name: before.get(f'{tower}.{name}') for name in infer.EVERY_MODEL})
        changed = resume.check_config(workdir / run_info.CONFIG_FILE, config.to_dict())
        resume.check_data(workdir / resume.DATA_FILE, data)
    resources.check_cache(config)
    trackers.check(config.tracker)
    memory = resources.memory_of(jax.local_devices()[0])
    need = resources.least_memory(config, state, batch)
    resources.check_memory(config, need, memory)
    resources.check_disk(workdir, state, config.keep_checkpoints)
    if not resumes:  # missing weights are known, or downloaded, before minutes of compiling
        path = None if of_pairs and of_pairs.towers else weights_path(config)
        told = _open_weights(config, path).settings if path else {}
        _settle(config, told)
        _check_rotary(config, told)
    architecture = config.model.to_dict()
    if parts.model is None:
        described = variants.image_tower(architecture)
        settled: dict[str, Any] = {name: described[name] for name in infer.EVERY_MODEL}
        if isinstance(model, models.LitModel):
            settled = {'image': {**model.image, **settled}}
        model, student = model.clone(**settled), student.clone(**settled)
    if parts.model is not None:
        try:
            architecture = product.architecture_of(model, len(train.class_names))
        except UserError as error:
            no_folder = str(error)
    abstract = Checkpoint.of(state, replaced=state.skipped)
    return Setup(
        mesh=mesh,
        train=train,
        val=val,
        test=test,
        parts=parts,
        model=model,
        student=student,
        teacher=teacher,
        architecture=architecture,
        no_folder=no_folder,
        train_loss=train_loss,
        eval_loss=eval_loss,
        task=task,
        pairs=of_pairs,
        schedule=schedule,
        tx=tx,
        frozen=frozen,
        abstract=abstract,
        batch=batch,
        memory=memory,
        need=need,
        data=data,
        changed=changed,
    )


def _settle(config: ml_collections.ConfigDict, told: Mapping[str, Any]) -> None:
    """Fills in activation and epsilon, where the config does not say: from the weights, or the run.

    What neither says is as the released models have it.
    """
    with config.unlocked():
        tower = variants.image_tower(config.model)
        for name in infer.EVERY_MODEL:
            if tower.get(name) is None:
                found = told.get(name)
                default = getattr(models.VisionTransformer, name)
                tower[name] = default if found is None else found


def _check_rotary(config: ml_collections.ConfigDict, told: Mapping[str, Any]) -> None:
    """Refuses rotary positions that the weights to start from were not trained with."""
    found, ours = told.get('rotary'), variants.image_tower(config.model.to_dict()).get('rotary')
    if 'rotary' in told and found != ours:
        raise UserError(
            f'the weights were trained with rotary positions {found}, and the config says {ours}: '
            'take a config of their family, and --config.model.rotary.theta and grid as theirs'
        )


def _open(
    config: ml_collections.ConfigDict, parts: Parts, of_pairs: pairs.Pairs | None
) -> tuple[Selection | BatchStream, Selection | None, Selection]:
    """The training, validation and test examples."""
    validate = config_lib.chooses(config)
    if parts.sources is not None:
        return _open_own(config.pp.val, parts.sources, validate, config.fold)
    return sources.open_three(
        config.dataset,
        train_split=config.pp.train,
        val_split=config.pp.val,
        test_split=config.pp.test,
        validate=validate,
        tfds_data_dir=config.tfds_data_dir,
        tfds_manual_dir=config.tfds_manual_dir,
        channels=config.pp.channels,
        columns=config.columns,
        image_root=config.image_root,
        group=config.group,
        fold=config.fold,
        tokenizer=None if of_pairs is None else of_pairs.tokenizer,
        max_unreadable=config.max_unreadable,
    )


def _open_own(
    share: str, given: Sources, validate: bool, fold: str
) -> tuple[Selection | BatchStream, Selection | None, Selection]:
    """The caller's examples; validation ones, where none are given, are held out of training."""
    first, *rest = given
    train = first if isinstance(first, BatchStream) else own.as_selection(first, 'sources[0]')
    others = [own.as_selection(each, f'sources[{i}]') for i, each in enumerate(rest, 1)]
    if bool(fold) == bool(others) or (fold and isinstance(train, BatchStream)):
        raise UserError(
            f'config.fold={fold!r} is of one source of examples, (data,), that is divided: '
            'without it there are two, (train, test), or three, (train, val, test)'
        )
    if fold and isinstance(train, Selection):
        train, tested = train.fold(fold)
        others = [tested]
    for other, what in zip(reversed(others), ('test', 'validation'), strict=False):
        for name in ('class_names', 'channels', 'label_dtype'):
            of_train, of_other = getattr(train, name), getattr(other, name)
            if of_train != of_other:
                raise UserError(
                    f'{name} of training and {what} examples differ: {of_train!s:.100} and '
                    f'{of_other!s:.100}; give both the same'
                )
    if len(others) == 2:
        if share:
            raise UserError(
                f'config.pp.val={share!r} has no effect with validation examples of your own, the '
                'second of three sources: leave out one of them'
            )
        return train, others[0], others[1]
    if not share and not validate:
        return train, None, others[0]
    if share and not splits.is_share(share):
        raise UserError(
            f'config.pp.val={share!r}: sources of your own have no splits; write a share of the '
            "training examples such as '10%', or give three sources: (train, val, test)"
        )
    if isinstance(train, BatchStream):
        raise UserError(
            'no validation examples can be held out of batches that another library makes: give '
            'three sources, (train, val, test)'
        )
    return *train.hold_out(share.strip() or sources.HELD_OUT), others[0]


def _describe(
    examples: Mapping[str, Selection | BatchStream | None],
    parts: Parts,
    state: state_lib.TrainState,
) -> dict[str, Any]:
    """What the examples and the caller's own parts are, for the next run in the workdir to compare.

    Of functions there is a name, of model and optimizer what shapes the state.
    """
    found = {name: source for name, source in examples.items() if source is not None}
    told: dict[str, Any] = {'class_names': list(found['train'].class_names)}
    for name, source in found.items():
        told[name] = {
            'split': source.spec,
            'examples': len(source) if isinstance(source, Selection) else None,
            'fingerprint': source.fingerprint(),
        }
    if parts.loss_fn is not None:
        told['loss_fn'] = _function_name(parts.loss_fn)
    if parts.model is not None:
        told['model'] = f'{type(parts.model).__name__} {_digest(state.params)}'
    if parts.tx is not None:
        told['tx'] = _digest(state.opt_state)
    return told


def _function_name(function: Any) -> str:
    """Its name; of a `functools.partial` the arguments, too."""
    if not isinstance(function, functools.partial):
        return getattr(function, '__qualname__', type(function).__name__)
    given = [repr(value) for value in function.args]
    given += [f'{name}={value!r}' for name, value in function.keywords.items()]
    return f'{_function_name(function.func)}({", ".join(given)})'


def _digest(shapes: Any) -> str:
    """Tells trees of different names, shapes or types from each other."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    text = '\n'.join(f'{jax.tree_util.keystr(p)} {x.shape} {x.dtype}' for p, x in leaves)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def initial_params(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    shapes: Mapping[str, Any],
    channels: int = 3,
    frozen: str = '',
    of_pairs: pairs.Pairs | None = None,
) -> tuple[Mapping[str, Any], str]:
    """Parameters of these shapes to start from, on the host, and where they come from.

    Of those that are `frozen` it says which are new, and stay so.
    """
    init = functools.partial(
        state_lib.init_params, model, config.pp.crop, config.seed, channels=channels
    )
    if of_pairs is not None:
        return _initial_towers(config, model, shapes, of_pairs, init, frozen)
    path = weights_path(config)
    adapters = [name for name in groups.names_of(shapes) if name.endswith(lora.ARRAYS)]
    shapes = lora.without(shapes)
    if path is None:
        params = jax.device_get(init())
        if config.sincos_positions:
            grid = infer.token_grid(shapes, config_lib.preprocess_of(config).crop)
            params = positions.with_sincos(params, grid) if grid else params
        return params, 'new weights (no pretrained ones were asked for)'
    weights = _open_weights(config, path)
    params, report, told = _fitted(config, weights, f'{path} ({weights.format})', model, shapes)
    if new_names := [*report.initialised, *adapters]:
        params = lora.started(_with_new(params, init(only=new_names)))
    return params, '\n  '.join([told, *_new_and_frozen(report.initialised, frozen)])


def _fitted(
    config: ml_collections.ConfigDict,
    weights: checkpoint.Weights,
    source: str,
    model: nn.Module,
    shapes: Mapping[str, Any],
    keep_head: bool = False,
) -> tuple[Mapping[str, Any], adapt.Report, str]:
    """Weights of an image model at these shapes, what was done to them, and all of it in words."""
    ours = isinstance(model, models.VisionTransformer)
    grid = infer.token_grid(shapes, config_lib.preprocess_of(config).crop) if ours else None
    source_grid, assumed = _source_grid(weights, grid)
    params, report = adapt.adapt(
        weights.params,
        shapes,
        grid=grid,
        source_grid=source_grid,
        classifier=variants.image_tower(config.model).get('classifier', 'gap'),
        keep_head=keep_head or config.keep_head,
        patch_resize=config.patch_resize,
        source=source,
    )
    other = [
        f'the weights were trained with {name} {told}, and this run computes {ours}'
        for name, told in weights.settings.items()
        if name in (*infer.EVERY_MODEL, 'classifier')
        and (ours := getattr(model, name, told)) != told
    ]
    notes = [*weights.notes, *assumed, *other, *_other_pixels(weights, config)]
    return params, report, '\n  '.join([str(report), *notes])


def _initial_towers(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    shapes: Mapping[str, Any],
    of_pairs: pairs.Pairs,
    init: Callable[..., Mapping[str, Any]],
    frozen: str,
) -> tuple[Mapping[str, Any], str]:
    """`initial_params` of two towers; `init` makes new ones."""
    known, told = of_pairs.start()
    path = None if of_pairs.towers else weights_path(config)
    if path:
        known['img'] = _open_weights(config, path)
    if 'img' in known:
        image, weights = models.from_config({**model.image, 'num_classes': 0}), known['img']
        source = f'{weights.path} ({weights.format})'
        fitted, _, words = _fitted(config, weights, source, image, shapes['img'], keep_head=True)
        known['img'], told = fitted, [f'image tower: {words}', *told]
    else:
        told = ['image tower: new weights', *told]
    params, missing = pairs.checked(known, shapes)
    if missing:
        params = _with_new(params, init(only=missing))
    told += _new_and_frozen(missing, frozen)
    return jax.tree.map(np.asarray, params), '\n  '.join(told)


def _new_and_frozen(new: Iterable[str], frozen: str) -> list[str]:
    """A warning, if some of the new parameters stay as they are."""
    stay = [name for name in new if frozen and re.fullmatch(frozen, name)]
    return [f'WARNING: new, and not trained: {adapt.shorten(stay, 4)}'] if stay else []


def _with_new(params: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters, and new ones in the places that they leave."""
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(jax.device_get(new))
    return traverse_util.unflatten_dict(flat)


def _source_grid(
    weights: checkpoint.Weights, grid: adapt.Grid | None
) -> tuple[adapt.Grid | None, list[str]]:
    """(rows, columns) of the weights' patches, None where their number tells; and what is assumed.

    Args:
      weights: to start from.
      grid: of the model's patches.
    """
    if weights.image_size:
        return infer.token_grid(weights.params, weights.image_size), []
    square = infer.square_grid(weights.params)
    if not grid or not square or grid == square or grid[0] * grid[1] != square[0] ** 2:
        return None, []
    return square, [
        f'their {square[0] ** 2} positions are taken for a square of {square[0]} x {square[0]} '
        f'patches, not for {grid[0]} x {grid[1]}: nothing tells'
    ]


def _other_pixels(weights: checkpoint.Weights, config: ml_collections.ConfigDict) -> list[str]:
    """A sentence on the pixels that the weights were made for, if evaluation sees others."""
    ours, theirs = config_lib.preprocess_of(config), weights.preprocess
    evaluates = f'this run evaluates {ours.describe()}'
    if weights.refused:
        return [f'the weights were made for {weights.refused}; {evaluates}']
    if theirs is None or theirs.at(ours.crop).describe() == ours.describe():
        return []
    theirs = theirs.at(ours.crop)
    flags = [
        f'--config.pp.{name}={getattr(theirs, name)}'
        for name in ('eval', 'resize', 'interpolation', 'antialias')
        if getattr(theirs, name) != getattr(ours, name)
    ]
    return [
        f'the weights were made for other pixels: {theirs.describe()}; {evaluates}. For theirs: '
        + ' '.join(flags)
    ]


def _open_weights(config: ml_collections.ConfigDict, path: pathlib.Path) -> checkpoint.Weights:
    # PyTorch's files do not tell the number of heads; the model does.
    tower = variants.image_tower(config.model)
    num_heads = tower.get('transformer', {}).get('num_heads', 0)
    return checkpoint.open_weights(path, num_heads=num_heads)


def weights_path(config: ml_collections.ConfigDict) -> pathlib.Path | None:
    """The file that the config names, downloaded if need be; None for no weights."""
    if config.pretrained:
        return catalog.resolve(config.pretrained)
    if config.model_or_filename:
        return catalog.resolve_augreg(
            config.model_or_filename, pretrained_dir=config.pretrained_dir
        )
    if config.pretrained_dir:
        name = variants.image_tower(config.model).model_name
        return catalog.resolve(f'{config.pretrained_dir.rstrip("/")}/{name}.npz')
    return None


def weights_name(config: ml_collections.ConfigDict) -> str:
    """The weights as the config names them; '' for none."""
    return next((config[key] for key in config_lib.WEIGHT_KEYS if config[key]), '')
