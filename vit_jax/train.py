"""Fine-tuning, from top to bottom.

`train_and_evaluate` sets a run up (devices, data, model, weights or checkpoint), `loop.Loop` goes
over the steps, and `_write_model_folders` makes the product.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import traverse_util
from jax.sharding import Mesh

from vit_jax import checkpoint, loop, models, optim, sharding, steps
from vit_jax import config as config_lib
from vit_jax import state as state_lib
from vit_jax.checkpoint import adapt, catalog
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data import sources
from vit_jax.data.dataset import Selection
from vit_jax.inference import model_folder
from vit_jax.run import distributed, resources, resume, run_info, telemetry
from vit_jax.state import Checkpoint

MODEL_FOLDER = 'model'
BEST_MODEL_FOLDER = 'model_best'


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> Mapping[str, Any] | None:
    """Trains a model, or goes on where an earlier run in the same workdir was stopped.

    With several processes (`distributed.start`) each of them calls this, with the same config, and
    a workdir on a disk that all of them see.

    Args:
      config: resolved, see `config.resolve`.
      workdir: folder of the run: checkpoints, `metrics.jsonl`, `timing.jsonl`, `train.log`,
        TensorBoard events, `config.json`, `data.json`, and at the end the model folder `model/`.

    Returns:
      The parameters, on the devices; None if the run was finished before and nothing was to do.

    Raises:
      UserError: data, weights, devices, memory, disk or workdir do not fit the config, before
        training starts; later, the loss is not finite, too many images cannot be read, or a
        checkpoint cannot be written.
      PreemptedError: SIGTERM or Ctrl-C came; the state is saved.
    """
    workdir = pathlib.Path(workdir)
    finished = config.total_steps in workdir_lib.saved_steps(workdir)
    if finished and (workdir / MODEL_FOLDER).exists():
        _say_finished(config, workdir)
        return None
    with contextlib.ExitStack() as stack:
        with distributed.fail_together():
            if jax.process_index() == 0:
                stack.enter_context(resume.locked(workdir))
        with distributed.fail_together():
            setup = _set_up(config, workdir)
        log = stack.enter_context(
            telemetry.Telemetry(
                workdir, total_steps=config.total_steps, process_index=jax.process_index()
            )
        )
        run = loop.Run(
            config,
            workdir,
            setup.mesh,
            setup.train,
            setup.test,
            config_lib.preprocess_of(config),
            log,
        )
        _introduce(run, setup)
        checkpoints = stack.enter_context(
            workdir_lib.Checkpoints(workdir, keep=config.keep_checkpoints)
        )
        try:
            params = _train(run, setup, checkpoints)
        except jax.errors.JaxRuntimeError as error:
            explained = resources.out_of_memory(error, config, setup.need)
            if explained is None:
                raise
            raise explained from error
        if config.report and jax.process_index() == 0:
            from vit_jax.analysis import report  # draws pictures, and only here

            log.info('writing the report: the test images are predicted once more')
            report.write_at_end(workdir, log.info)
        return params


@dataclasses.dataclass
class _Setup:
    """What is made of the config before anything is computed."""

    mesh: Mesh
    train: Selection
    test: Selection
    model: nn.Module
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    abstract: Checkpoint  # shapes, dtypes and shardings of what is saved
    batch: dict[str, jax.ShapeDtypeStruct]  # those of a training batch
    memory: int  # bytes that the device had before anything was compiled
    need: resources.Memory  # what it takes at least; later, what the compiled step takes
    changed: list[str]  # settings that are others than when the run began


def _set_up(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> _Setup:
    """Opens the data and describes the model; everything that can be refused early is."""
    platform = jax.default_backend()
    config_lib.check_devices(config, jax.device_count(), platform)
    mesh = sharding.create_mesh(config.fsdp)
    train, test = sources.open_sources(
        config.dataset,
        train_split=config.pp.train,
        test_split=config.pp.test,
        tfds_data_dir=config.tfds_data_dir,
        tfds_manual_dir=config.tfds_manual_dir,
    )
    model = models.from_config(
        config.model,
        num_classes=len(train.class_names),
        dtype=jnp.dtype(config_lib.compute_dtype(config, platform)),
        attention=config.attention,
        remat=config.remat,
    )
    schedule = optim.create_learning_rate_schedule(
        config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
    )
    tx = optim.create_optimizer(config, schedule)
    state = state_lib.abstract_state(model, tx, config.pp.crop, mesh)
    batch = steps.abstract_batch(config.batch, config.pp.crop, mesh, exact=config.pp.exact)
    changed, resumes = [], bool(workdir_lib.saved_steps(workdir))
    if resumes:
        changed = resume.check_config(workdir / run_info.CONFIG_FILE, config.to_dict())
        resume.check_data(workdir / resume.DATA_FILE, _describe(train, test))
    resources.check_cache(config)
    memory = resources.memory_of(jax.local_devices()[0])
    need = resources.least_memory(config, state, batch)
    resources.check_memory(config, need, memory)
    resources.check_disk(workdir, state, config.keep_checkpoints)
    if not resumes:
        _weights_path(config)  # missing ones are known, or downloaded, before minutes of compiling
    abstract = Checkpoint.of(state, replaced=state.skipped)
    return _Setup(mesh, train, test, model, schedule, tx, abstract, batch, memory, need, changed)


def _train(run: loop.Run, setup: _Setup, checkpoints: workdir_lib.Checkpoints) -> Any:
    """Compiles, goes over the steps that are left, writes the product; returns the parameters."""
    begin = time.monotonic()
    train_step = _compile(run, setup)
    steps_loop = loop.Loop(
        run,
        train_step,
        time.monotonic() - begin,
        steps.make_eval_step(setup.model, setup.mesh, _shardings(setup.abstract.params)),
        checkpoints,
    )
    # The first batch is read while the weights are; it is another one in the rare case that the
    # newest checkpoint turns out to be damaged.
    newest = max(checkpoints.steps(), default=0)
    with contextlib.ExitStack() as reading:
        batches = reading.enter_context(steps_loop.reading(newest))
        first, start = _first_checkpoint(run, setup, checkpoints)
        if start != newest:
            reading.close()
            batches = reading.enter_context(steps_loop.reading(start))
        resources.return_freed_memory()
        params = steps_loop.run_steps(first, start, batches).params
    _write_model_folders(run, params, setup.abstract, checkpoints, steps_loop.best())
    return params


def _compile(run: loop.Run, setup: _Setup) -> jax.stages.Compiled:
    """The training step, compiled from shapes alone; refused if it needs more memory than there is.

    Raises:
      UserError: see `resources.check_memory`.
    """
    config = run.config
    state = setup.abstract.state()
    train_step = steps.make_train_step(
        setup.model,
        setup.tx,
        setup.schedule,
        setup.mesh,
        _shardings(state),
        seed=config.seed,
        accum_steps=config.accum_steps,
        flip=config.pp.flip,
        skip_nonfinite=config.nan_policy == 'skip',
    )
    run.log.info('compiling the training step: seconds, or a minute or two for a large model')
    before = resources.resident_bytes()
    compiled = train_step.lower(state, setup.batch).compile()
    grown = resources.resident_bytes() - before
    with distributed.fail_together():
        setup.need = resources.compiled_memory(setup.need, compiled, grown)
        resources.check_memory(config, setup.need, setup.memory)
    about = resources.gib(setup.need.total)
    parts = dataclasses.asdict(setup.need) | {'total': setup.need.total}
    run.log.info(f'memory: training takes about {about} on each device', 'compiled', **parts)
    return compiled


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _first_checkpoint(
    run: loop.Run, setup: _Setup, checkpoints: workdir_lib.Checkpoints
) -> tuple[Checkpoint, int]:
    """What to start from, and its step; the files of the run are open from here on."""
    restored = checkpoints.restore_latest(setup.abstract)
    if restored:
        start, first = restored
        text, event = f'resumed from step {start:,} in {run.workdir}', 'resumed'
        facts: dict[str, Any] = {'step': start}
    else:
        start = 0
        with distributed.fail_together():
            params, text = _initial_params(run.config, setup.model, setup.abstract.params)
        state = state_lib.create_state(params, setup.tx, setup.mesh)
        first = Checkpoint.of(state, replaced=loop.count_array(0, setup.mesh))
        event, facts = 'weights', {'source': _weights_name(run.config)}
    run.log.start(start)
    if jax.process_index() == 0:
        data = _describe(setup.train, setup.test)
        run_info.write(run.workdir, run.config, {resume.DATA_FILE: data})
    run.log.info(f'weights: {text}', event, **facts)
    return first, start


def _describe(train: Selection, test: Selection) -> dict[str, Any]:
    """What the examples are, for the next run in the workdir to compare."""
    return {
        'class_names': list(train.class_names),
        **{
            name: {'split': s.spec, 'examples': len(s), 'fingerprint': s.fingerprint()}
            for name, s in (('train', train), ('test', test))
        },
    }


def _initial_params(
    config: ml_collections.ConfigDict, model: nn.Module, shapes: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str]:
    """Parameters of these shapes to start from, on the host, and where they come from."""
    init = functools.partial(state_lib.init_params, model, config.pp.crop, config.seed)
    path = _weights_path(config)
    if path is None:
        params = jax.device_get(init())
        return params, 'new weights (no pretrained ones were asked for)'
    # PyTorch's files do not tell the number of heads; the model does.
    weights = checkpoint.open_weights(
        path, num_heads=config.model.get('transformer', {}).get('num_heads', 0)
    )
    params, report = adapt.adapt(
        weights.params,
        shapes,
        classifier=config.model.get('classifier', 'gap'),
        keep_head=config.keep_head,
        source=f'{path} ({weights.format})',
    )
    if report.initialised:
        new = jax.device_get(init(only=report.initialised))
        flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(new)
        params = traverse_util.unflatten_dict(flat)
    return params, '\n  '.join([str(report), *weights.notes])


def _weights_path(config: ml_collections.ConfigDict) -> pathlib.Path | None:
    """The file that the config names, downloaded if need be; None for no weights."""
    if config.pretrained:
        return catalog.resolve(config.pretrained)
    if config.model_or_filename:
        return catalog.resolve_augreg(
            config.model_or_filename, pretrained_dir=config.pretrained_dir
        )
    if config.pretrained_dir:
        return catalog.resolve(f'{config.pretrained_dir.rstrip("/")}/{config.model.model_name}.npz')
    return None


def _weights_name(config: ml_collections.ConfigDict) -> str:
    """The weights as the config names them; '' for none."""
    return next((config[key] for key in config_lib.WEIGHT_KEYS if config[key]), '')


def _introduce(run: loop.Run, setup: _Setup) -> None:
    """Says what is about to run on what."""
    config, log = run.config, run.log
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.abstract.params))
    devices, kind = run.mesh.devices.size, run.mesh.devices.flat[0].device_kind
    dtype, processes = config_lib.compute_dtype(config, jax.default_backend()), jax.process_count()
    how = 'data parallel' if run.mesh.shape['fsdp'] == 1 else f'fsdp={run.mesh.shape["fsdp"]}'
    how += f', {processes} processes' if processes > 1 else ''
    log.info(
        f'model: {config.model.model_name}, {count:,} parameters, {dtype}, '
        f'{config.pp.crop} px, on {devices} x {kind} ({how})',
        'started',
        dtype=dtype,
        devices=devices,
        kind=kind,
        processes=processes,
    )
    names = run.train.class_names
    shown = ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
    log.info(f'data: {run.train!r}, tested on {run.test!r}; {len(names)} classes: {shown}')
    common = run.train.overlap(run.test)
    if common:
        log.info(
            f'WARNING: {common:,} of the {len(run.test):,} test images are trained on as well: '
            'set both --config.pp.train and --config.pp.test'
        )
    if processes > 1:
        log.info(
            f'{processes} processes: when one ends too early, so do the others; the same '
            'commands again go on from the last checkpoint'
        )
    if setup.changed:
        log.info(f'settings that changed since this run began: {"; ".join(setup.changed)}')
    log.info(f'workdir: {run.workdir}')


def _say_finished(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        print(
            f'{workdir}: this run is finished ({config.total_steps:,} steps); its model is '
            f'{workdir / MODEL_FOLDER}. For another run use another --workdir.'
        )


def _write_model_folders(
    run: loop.Run,
    params: Any,
    abstract: Checkpoint,
    checkpoints: workdir_lib.Checkpoints,
    best: int | None,
) -> None:
    """Writes the product of the run, and the best of it where that was asked for and is another."""
    last = run.config.total_steps
    # First, because the other one marks the run as finished.
    if best not in (None, last):
        better = checkpoints.restore(best, abstract)
        if better is None:
            run.log.info(f'WARNING: no {BEST_MODEL_FOLDER}: the checkpoint of step {best} is lost')
        else:
            _write_model_folder(run, better.params, BEST_MODEL_FOLDER, best)
    _write_model_folder(run, params, MODEL_FOLDER, last)


def _write_model_folder(run: loop.Run, params: Any, name: str, step: int) -> None:
    """Writes weights, architecture, preprocessing and class names."""
    # Gathered on every device first, for the case that each holds a part only.
    whole = jax.jit(lambda params: params, out_shardings=sharding.replicated(run.mesh))(params)
    if jax.process_index():
        return
    config = run.config
    folder = run.workdir / name
    model_folder.save(
        folder,
        jax.device_get(whole),
        model_config=config.model.to_dict(),
        class_names=run.train.class_names,
        preprocess=run.preprocess,
        source={
            'weights': _weights_name(config),
            'dataset': config.dataset,
            'train': run.train.spec,
            'test': run.test.spec,
            'steps': step,
        },
    )
    of = f' (step {step:,})' if name != MODEL_FOLDER else ''
    run.log.info(f'model folder: {folder}{of}', 'saved_model', step=step)
