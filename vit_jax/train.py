"""Fine-tuning, from top to bottom.

`train_and_evaluate` sets a run up (devices, data, model, weights or checkpoint), `loop.Loop` goes
over the steps, and `run.product` writes what comes out.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import optax

from vit_jax import config as config_lib
from vit_jax import loop, losses, models, optim, sharding, steps
from vit_jax import state as state_lib
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data import sources as sources_lib
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.inference.task import SEVERAL, Task
from vit_jax.models import lora
from vit_jax.run import (
    augmentation,
    distributed,
    initial_weights,
    introduction,
    pairs,
    product,
    profiling,
    remote_workdir,
    resources,
    resume,
    run_info,
    telemetry,
)
from vit_jax.run.callbacks import Callbacks
from vit_jax.run.choice import Choice
from vit_jax.run.setup import Parts, Setup, Sources, set_up
from vit_jax.state import Checkpoint


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    sources: Sources | None = None,
    loss_fn: losses.LossFn | None = None,
    tx: optax.GradientTransformation | None = None,
    model: nn.Module | None = None,
    callbacks: Sequence[Any] = (),
) -> Mapping[str, Any] | None:
    """Trains a model, or goes on where an earlier run in the same workdir was stopped.

    With several processes (`distributed.start`) each of them calls this, with the same config, and
    a workdir on a disk that all of them see.

    Args:
      config: resolved, see `config.resolve`.
      workdir: folder of the run: checkpoints, `metrics.jsonl`, `timing.jsonl`, `train.log`,
        TensorBoard events, `config.json`, `data.json`, and at the end the model folder `model/`.
        An address (`gs://`, `s3://`) is for one process, see `run.remote_workdir`.
      sources: training and test examples, or training, validation and test examples, in place of
        the config's dataset: of `vit_jax.data` (`from_arrays`, `from_sequence`), or any `Source`;
        the first may be a `BatchStream`.
      loss_fn: in place of cross-entropy, see `losses.LossFn`. In evaluation it is given each
        example alone, and the means over all examples count.
      tx: the optimizer, in place of the config's, whose learning rate and weight decay then have no
        effect.
      model: in place of the config's: a module that gives [B, len(class_names)] for images [B,
        crop, crop, channels] in [-1, 1], with `train=` and only the collection `params`. One that a
        model folder cannot describe is left in the checkpoint of the last step.
      callbacks: objects that are called at points of the loop, see `run.callbacks`.

    Returns:
      The parameters (with `config.ema_decay`, their averages; adapters are merged into them), on
      the devices; None if the run was finished before and nothing was to do.

    Raises:
      UserError: data, weights, devices, memory, disk or workdir do not fit the config, before
        training starts; later, the loss is not finite, too many images cannot be read, or a
        checkpoint cannot be written.
      PreemptedError: SIGTERM or Ctrl-C came; the state is saved.
    """
    parts = Parts(sources, loss_fn, tx, model)
    if sources is not None:
        config = ml_collections.ConfigDict(config.to_dict() | {'dataset': ''}).lock()
    with remote_workdir.mirrored(workdir) as folder:
        return _train_in(folder, os.fspath(workdir), config, parts, Callbacks(callbacks))


def _train_in(
    workdir: pathlib.Path,
    name: str,
    config: ml_collections.ConfigDict,
    parts: Parts,
    called: Callbacks,
) -> Mapping[str, Any] | None:
    """`train_and_evaluate` in a folder of this machine, which messages call `name`."""
    if not config.epochs and _is_finished(config, workdir, name):
        return None
    with contextlib.ExitStack() as stack:
        with distributed.fail_together():
            if jax.process_index() == 0:
                stack.enter_context(resume.locked(workdir))
        with distributed.fail_together():
            setup = set_up(config, workdir, parts)
        if config.epochs and _is_finished(config, workdir, name):  # now it is known how many steps
            return None
        log = stack.enter_context(
            telemetry.Telemetry(
                workdir,
                name=name,
                total_steps=config.total_steps,
                process_index=jax.process_index(),
                settings=resume.learned_from(config),
                tracker=config.tracker,
            )
        )
        if config.profile and jax.process_index() == 0:
            profile = stack.enter_context(profiling.Profile(config.profile, workdir, log.info))
            called = Callbacks([profile, *called.objects])
        run = loop.Run(
            config,
            workdir,
            setup.mesh,
            setup.train,
            setup.val,
            setup.test,
            config_lib.preprocess_of(config),
            log,
            called,
            setup.task,
        )
        introduction.introduce(run, setup)
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

            again = '' if setup.pairs else ': the test images are predicted once more'
            log.info(f'writing the report{again}')
            report.write_at_end(workdir, log.info)
        return params


def _train(run: loop.Run, setup: Setup, checkpoints: workdir_lib.Checkpoints) -> Any:
    """Compiles, goes over the steps that are left, writes the product; returns the parameters."""
    begin = time.monotonic()
    taught = _teacher_params(run, setup)
    train_step = _compile(run, setup, taught)
    eval_step = _eval_step(setup)
    steps_loop = loop.Loop(
        run,
        lambda state, batch: train_step(state, batch, *taught),
        time.monotonic() - begin,
        eval_step,
        checkpoints,
    )
    # The first batch is read while the weights are; it is another one in the rare case that the
    # newest checkpoint turns out to be damaged.
    newest = max(checkpoints.steps(), default=0)
    with contextlib.ExitStack() as reading:
        if run.config.cache_features:  # those are of the weights
            first, start = _first_checkpoint(run, setup, checkpoints)
            run.log.info(f'embedding the images of {run.train!r}, once')
            steps_loop.cache_features(eval_step, first.params)
            newest = start
            batches = reading.enter_context(steps_loop.reading(start))
        else:
            batches = reading.enter_context(steps_loop.reading(newest))
            first, start = _first_checkpoint(run, setup, checkpoints)
        if start != newest:
            reading.close()
            batches = reading.enter_context(steps_loop.reading(start))
        resources.return_freed_memory()
        state, last = steps_loop.run_steps(first, start, batches)
        del first
    params, best = state.model_params, steps_loop.best() or last
    if best != last:
        del state  # makes room
        state, best = _restore_best(run, setup, checkpoints, best, last)
    steps_loop.test_at_end(last, state, best)
    # First, because the other one marks the run as finished.
    if best != last:
        task = steps_loop.task_of(state.model_params)
        _write_model_folder(run, setup, state.model_params, product.BEST_MODEL_FOLDER, best, task)
    del state
    task = steps_loop.task_of(params)
    _write_model_folder(run, setup, params, product.MODEL_FOLDER, last, task)
    return params if setup.lora is None else jax.jit(lambda p: lora.merge(p, setup.lora))(params)


def _eval_step(setup: Setup) -> Any:
    """The evaluation step, not yet compiled; of pairs, what evaluates on them."""
    shardings = _shardings(setup.abstract.params)
    image_step = steps.make_eval_step(
        setup.model, setup.mesh, shardings, setup.eval_loss, setup.task
    )
    if setup.pairs is None:
        return image_step
    assert isinstance(setup.model, models.LitModel)
    text_step = steps.make_text_step(setup.model, setup.mesh, shardings)
    return pairs.Evaluation(setup.pairs, image_step, text_step)


def _restore_best(
    run: loop.Run, setup: Setup, checkpoints: workdir_lib.Checkpoints, best: int, last: int
) -> tuple[state_lib.TrainState, int]:
    """The state of the best step, and its step; of the last one if the best one is lost."""
    better = checkpoints.restore(best, setup.abstract)
    if better is not None:
        return better.state(), best
    run.log.info(f'WARNING: no {product.BEST_MODEL_FOLDER}: the checkpoint of step {best} is lost')
    newest = checkpoints.restore(last, setup.abstract)
    if newest is None:
        raise UserError(f'{run.workdir}: the checkpoint of step {last}, just written, is lost')
    return newest.state(), last


def _teacher_params(run: loop.Run, setup: Setup) -> tuple[Any, ...]:
    """The teacher's parameters on the devices, as further arguments of the training step."""
    if setup.teacher is None:
        return ()
    run.log.info(f'teacher: {setup.teacher.description}')
    params = setup.teacher.params
    return (sharding.put_tree(params, sharding.state_sharding(params, run.mesh)),)


def _compile(run: loop.Run, setup: Setup, taught: tuple[Any, ...]) -> jax.stages.Compiled:
    """The training step, compiled from shapes alone; refused if it needs more memory than there is.

    Raises:
      UserError: see `resources.check_memory`.
    """
    config = run.config
    state = setup.abstract.state()
    train_step = steps.make_train_step(
        setup.student,
        setup.tx,
        setup.schedule,
        setup.mesh,
        _shardings(state),
        seed=config.seed,
        accum_steps=config.accum_steps,
        flip=config.pp.flip,
        flip_vertical=config.pp.flip_vertical,
        erasing=config.random_erasing,
        skip_nonfinite=config.nan_policy == 'skip',
        loss_fn=setup.train_loss,
        frozen=setup.frozen,
        depth_rate=config.stochastic_depth,
        mix=augmentation.mix_of(config, setup.train),
        sharpness=optim.sharpness_of(config, setup.schedule),
        teacher=setup.teacher and setup.teacher.model,
        teacher_shardings=_shardings(taught[0]) if taught else None,
    )
    run.log.info('compiling the training step: seconds, or a minute or two for a large model')
    before = resources.resident_bytes()
    compiled = train_step.lower(state, setup.batch, *taught).compile()
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
    run: loop.Run, setup: Setup, checkpoints: workdir_lib.Checkpoints
) -> tuple[Checkpoint, int]:
    """What to start from, and its step; the files of the run are open from here on."""
    restored = checkpoints.restore_latest(setup.abstract)
    if restored:
        start, first = restored
        text, event = f'resumed from step {start:,} in {run.workdir}', 'resumed'
        facts: dict[str, Any] = {'step': start}
        if isinstance(setup.train, BatchStream) and start < run.config.total_steps:
            text += f'; {setup.train!r} begin again, so that others follow than without the stop'
    else:
        start = 0
        with distributed.fail_together():
            params, text = setup.initial_params(run.config)
        state = state_lib.create_state(params, setup.tx, setup.mesh)
        first = Checkpoint.of(state, replaced=loop.count_array(0, setup.mesh))
        event, facts = 'weights', {'source': initial_weights.name_of(run.config)}
    run.log.start(start)
    if jax.process_index() == 0:
        run_info.write(run.workdir, run.config, {resume.DATA_FILE: setup.data})
    run.log.info(f'weights: {text}', event, **facts)
    return first, start


def _is_finished(config: ml_collections.ConfigDict, workdir: pathlib.Path, name: str) -> bool:
    """Whether the run has all its steps and its model folder; then says so."""
    last = max(workdir_lib.saved_steps(workdir), default=0)
    finished = last == config.total_steps or Choice(config).read(workdir, up_to=last).is_over()
    if not (finished and (workdir / product.MODEL_FOLDER).exists()):
        return False
    if jax.process_index() == 0:
        print(
            f'{name}: this run is finished ({last:,} steps); its model is '
            f'{name}/{product.MODEL_FOLDER}. For another run use another --workdir.'
        )
    return True


def _write_model_folder(
    run: loop.Run, setup: Setup, params: Any, name: str, step: int, task: Task
) -> None:
    """Writes a product of the run: the parameters of a step, on the devices."""
    if setup.no_folder:
        _say_no_folder(run, setup.no_folder, step)
        return
    source = {
        'weights': initial_weights.name_of(run.config),
        'dataset': sources_lib.lasting_name(run.config.dataset),
        **{name: run.config[name] for name in sources_lib.TOLD if run.config[name]},
        'train': run.train.spec,
        **({} if run.val is None else {'val': run.val.spec}),
        'test': run.test.spec,
        'train_fingerprint': setup.data['train']['fingerprint'],
    }
    made = product.Product(
        run.workdir,
        run.mesh,
        setup.architecture,
        run.train.class_names,
        run.preprocess,
        source,
        task,
        setup.lora,
        setup.pairs,
    )
    if setup.lora is not None:
        _write_adapter(run, setup, made, params, name)
    try:
        folder = made.write(params, name, step)
    except UserError as error:
        if setup.parts.model is None:
            raise
        _say_no_folder(run, str(error), step)
        return
    of = f' (step {step:,})' if name != product.MODEL_FOLDER else ''
    if task.kind == SEVERAL:
        on = f'chosen on {task.chosen_on}' if task.chosen_on else 'not chosen: no config.pp.val'
        of += f'; a class is found from a probability of {task.threshold:g} on ({on})'
    run.log.info(f'model folder: {folder}{of}', 'saved_model', step=step)


def _write_adapter(
    run: loop.Run, setup: Setup, made: product.Product, params: Any, name: str
) -> None:
    """Writes adapters and head alone, beside the model folder of this name."""
    whole = made.gathered(lambda params: params, params)
    if setup.lora is None or jax.process_index():
        return
    from vit_jax.export import adapters

    whole = jax.device_get(whole)
    folder = run.workdir / name.replace(product.MODEL_FOLDER, product.ADAPTER_FOLDER, 1)
    model = made.model(lora.without(whole))
    kind = adapters.write(folder, whole, setup.lora, model, made.source['weights'])
    use = f"PEFT, on transformers' {kind}" if kind else 'vit_jax convert --adapter only'
    run.log.info(f'adapter: {folder} (for {use})')


def _say_no_folder(run: loop.Run, reason: str, step: int) -> None:
    """Of a model of one's own, of which a folder cannot hold every one."""
    run.log.info(
        f'WARNING: no model folder: {reason}. The parameters are in the checkpoint of step '
        f'{step:,} in {run.workdir}'
    )
