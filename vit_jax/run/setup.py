"""What a run is made of: devices, data, model, loss and optimizer.

All of it is described, and refused where it does not fit, before anything is computed.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from vit_jax import config as config_lib
from vit_jax import groups, losses, models, optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data import own, sources, splits
from vit_jax.data.dataset import Selection
from vit_jax.data.examples import Source, weights_of
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.inference.task import ONE_CLASS, Task
from vit_jax.models import lora
from vit_jax.run import (
    augmentation,
    distillation,
    initial_weights,
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

    def initial_params(self, config: ml_collections.ConfigDict) -> tuple[Mapping[str, Any], str]:
        """Parameters to start from, see `initial_weights.initial_params`."""
        told = (self.abstract.params, self.train.channels, self.frozen)
        if self.pairs is None:
            return initial_weights.initial_params(config, self.model, *told)
        assert isinstance(self.model, models.LitModel)
        return self.pairs.initial_params(config, self.model, *told)


def set_up(config: ml_collections.ConfigDict, workdir: pathlib.Path, parts: Parts) -> Setup:
    """Opens the data and describes the model; everything that can be refused early is."""
    platform = jax.default_backend()
    config_lib.check_devices(config, jax.device_count(), platform)
    mesh = sharding.create_mesh(config.fsdp)
    of_pairs = pairs.of_run(config, vars(parts))
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
        train_loss, eval_loss, task = of_pairs.loss(mesh), None, ONE_CLASS
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
    batch = _abstract_batch(config, train, mesh)
    if of_pairs is not None:
        assert isinstance(train, Selection) and isinstance(model, models.LitModel)
        batch['image'] = pairs.check(config, train, model, state.params, frozen, batch['image'])
    if eval_loss is not None:  # what fails in evaluation is known before a step is done
        one = _abstract_example(batch)
        jax.eval_shape(steps.eval_step_fn(model, eval_loss, task), state.params, one)
    if config.sincos_positions:
        recipe.check_positions(state.params)
    data = _describe({'train': train, 'val': val, 'test': test}, parts, state)
    if teacher is not None:
        data['teacher'] = teacher.fingerprint
    if of_pairs is not None:
        data['vocabulary'] = of_pairs.digest()
    changed, resumes = [], bool(workdir_lib.saved_steps(workdir))
    if resumes:
        before = resume.read_config(workdir / run_info.CONFIG_FILE)
        initial_weights.settle_as_begun(config, before)
        changed = resume.check_config(workdir / run_info.CONFIG_FILE, config.to_dict())
        resume.check_data(workdir / resume.DATA_FILE, data)
    resources.check_cache(config)
    trackers.check(config.tracker)
    memory = resources.memory_of(jax.local_devices()[0])
    need = resources.least_memory(config, state, batch)
    resources.check_memory(config, need, memory)
    resources.check_disk(workdir, state, config.keep_checkpoints)
    if not resumes:  # missing weights are known, or downloaded, before minutes of compiling
        open_named = of_pairs.open_named if of_pairs else initial_weights.open_named
        initial_weights.settle(config, open_named(config))
    architecture = config.model.to_dict()
    if parts.model is None:
        model, student = (initial_weights.as_settled(config, each) for each in (model, student))
    else:
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


def _abstract_batch(
    config: ml_collections.ConfigDict, train: Selection | BatchStream, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch."""
    batch = steps.abstract_batch(
        config.batch, config.pp.crop, mesh, channels=train.channels, exact=config.pp.exact
    )
    spread, label = batch['label'].sharding, train.label_dtype
    batch['label'] = jax.ShapeDtypeStruct((config.batch, *label.shape), label.base, sharding=spread)
    if isinstance(train, Selection) and weights_of(train) is not None:
        batch['weight'] = jax.ShapeDtypeStruct((config.batch,), jnp.float32, sharding=spread)
    return batch


def _abstract_example(
    batch: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.ShapeDtypeStruct]:
    """What evaluation sees of one example, given a training batch."""
    image, label = batch['image'], batch['label']
    return {
        'image': jax.ShapeDtypeStruct((1, *image.shape[1:]), jnp.float32),
        'label': jax.ShapeDtypeStruct((1, *label.shape[1:]), label.dtype),
        'example': jax.ShapeDtypeStruct((1,), jnp.int32),
        'readable': jax.ShapeDtypeStruct((1,), jnp.bool_),
    }


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
