"""Fine-tuning, from top to bottom.

`train_and_evaluate` sets a run up (devices, data, model, weights or checkpoint), `_run_steps` is
the loop, and `_write_model_folders` makes the product. What the loop does in which order:

    1. get the batch of this step (a function of seed and step), put it on the devices
    2. the training step: one jitted call; the old state is donated to it
    3. look at the step before the last ones under way: was it finite, is the run to stop?
    4. every `progress_every` steps: read the metrics, write and show them
    5. every `eval_every` steps: evaluate on the whole test set, write metrics
    6. every `checkpoint_every` steps, and when the run is to stop: save, asynchronously

Metrics of a step are written before its checkpoint, so a resumed run has neither a gap nor a line
twice; and no state is saved before its step, and all before it, are known to be finite.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from vit_jax import (
    checkpoint,
    distributed,
    evaluate,
    model_folder,
    models,
    optim,
    preemption,
    resources,
    resume,
    sharding,
    steps,
    telemetry,
)
from vit_jax import config as config_lib
from vit_jax import state as state_lib
from vit_jax.analysis import cost
from vit_jax.checkpoint import adapt, catalog
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data import pipeline, sources
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError
from vit_jax.state import TrainState

MODEL_FOLDER = 'model'
BEST_MODEL_FOLDER = 'model_best'
# With nan_policy='skip': after so many skipped steps in a row nothing good will come any more.
MAX_SKIPPED_IN_A_ROW = 20


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same over a run."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    train: sources.Selection
    test: sources.Selection
    preprocess: Preprocess
    log: telemetry.Telemetry

    on_bad: pipeline.OncePerKey

    @property
    def threads(self) -> int | None:
        return self.config.data_threads or None


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
    platform = jax.default_backend()
    with contextlib.ExitStack() as stack:
        with distributed.together():
            if jax.process_index() == 0:
                stack.enter_context(resume.locked(workdir))
        checkpoints = stack.enter_context(
            workdir_lib.Checkpoints(workdir, keep=config.keep_checkpoints)
        )
        if (workdir / MODEL_FOLDER).exists() and config.total_steps in checkpoints.steps():
            _say_finished(config, workdir)
            return None

        with distributed.together():
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
            abstract = state_lib.abstract_state(model, tx, config.pp.crop, mesh)
            notes = []
            if checkpoints.steps():
                notes = _check_unchanged(workdir, config, train, test)
            need = resources.check_memory(
                config,
                num_classes=len(train.class_names),
                devices=jax.device_count(),
                platform=platform,
            )
            resources.check_disk(workdir, abstract, config.keep_checkpoints)

        restored = checkpoints.restore_latest(abstract)
        if restored:
            start, state = restored
            origin = f'resumed from step {start:,} in {workdir}'
        else:
            with distributed.together():
                params, origin = _initial_params(config, model)
            start, state = 0, state_lib.create_state(params, tx, mesh)
        accuracies = telemetry.read_metric(workdir, 'accuracy_test', up_to=start)

        log = telemetry.Telemetry(
            workdir,
            total_steps=config.total_steps,
            start_step=start,
            process_index=jax.process_index(),
        )
        stack.enter_context(log)
        on_bad = pipeline.OncePerKey(functools.partial(_report_bad, log))
        preprocess = config_lib.preprocess_of(config)
        run = _Run(config, workdir, mesh, train, test, preprocess, log, on_bad)
        if jax.process_index() == 0:
            telemetry.write_run_info(workdir, config, {resume.DATA_FILE: _describe(train, test)})
        _introduce(run, state, origin, notes, need)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        train_step = steps.make_train_step(
            model,
            tx,
            schedule,
            mesh,
            shardings,
            seed=config.seed,
            accum_steps=config.accum_steps,
            flip=config.pp.flip,
            skip_nonfinite=config.nan_policy == 'skip',
        )
        eval_step = steps.make_eval_step(model, mesh, shardings.params)
        try:
            with preemption.StopSignals() as signals:
                loop = _Loop(run, train_step, eval_step, checkpoints, signals, accuracies)
                state = loop.run_steps(state, start)
            _write_model_folders(run, state, abstract, checkpoints, loop.best())
        except jax.errors.JaxRuntimeError as error:
            explained = resources.out_of_memory(error, config, need)
            if explained is None:
                raise
            raise explained from error
        return state.params


class _Loop:
    """The loop over steps, and what it has to remember."""

    def __init__(self, run, train_step, eval_step, checkpoints, signals, accuracies):
        self._run: _Run = run
        self._train_step = train_step
        self._eval_step = eval_step
        self._checkpoints: workdir_lib.Checkpoints = checkpoints
        self._signals: preemption.StopSignals = signals
        self._accuracies: dict[int, float] = accuracies  # step -> test accuracy
        self._in_flight = collections.deque()  # (step, indices of the examples, metrics)
        self._skipped_in_a_row = 0
        self._stopping = False

    def best(self) -> int | None:
        """The first step of the best test accuracy; None if that is not asked for."""
        if not (self._run.config.keep_best and self._accuracies):
            return None
        return max(self._accuracies, key=self._accuracies.get)

    def run_steps(self, state: TrainState, start: int) -> TrainState:
        """Steps start + 1 to total_steps."""
        config, log, run = self._run.config, self._run.log, self._run
        if self.best() is not None:
            self._checkpoints.protect(self.best())
        if start and self._is_due(start, config.eval_every) and start not in self._accuracies:
            self._evaluate(start, state)  # it was stopped before, or while, it did
            self._leave_if_stopping(start)
        if start == config.total_steps:
            return state
        clock = _Clock()
        dataset = pipeline.train_dataset(
            run.train,
            run.preprocess,
            batch=config.batch,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            on_bad=run.on_bad,
        )
        with pipeline.train_batches(dataset, start=start, threads=run.threads) as batches:
            for step in range(start + 1, config.total_steps + 1):
                with clock.waiting():
                    batch = next(batches)
                examples = batch.pop('example')
                batch['stop'] = np.full_like(examples, bool(self._signals.received))
                # An implicit transfer would stall the device unnoticed; here it is an error.
                with jax.transfer_guard('disallow'):
                    state, metrics = self._train_step(state, sharding.put_batch(batch, run.mesh))
                self._in_flight.append((step, examples, metrics))
                clock.step_done(config.batch)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    log.timing(step, first_step_s=clock.restart())

                show = self._is_due(step, config.progress_every)
                assess = self._is_due(step, config.eval_every)
                save = self._is_due(step, config.checkpoint_every)
                self._settle(0 if show or assess or save else sharding.steps_ahead())
                if self._stopping:
                    self._settle(0)

                if show:
                    values = {name: v.item() for name, v in jax.device_get(metrics).items()}
                    log.metrics(step, **_for_the_log(values, config))
                    _report_progress(run, step, values, clock)
                    self._check_unreadable('train', values['replaced'], step * config.batch)

                if assess and not self._stopping:
                    with clock.paused():
                        save = self._evaluate(step, state) or save

                if save or self._stopping:
                    with clock.paused():
                        self._checkpoints.save(step, state)
                self._leave_if_stopping(step)
        return state

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self._run.config.total_steps

    def _settle(self, ahead: int) -> None:
        """Waits until at most `ahead` steps are under way, and looks at what the others gave."""
        while len(self._in_flight) > ahead:
            step, examples, metrics = self._in_flight.popleft()
            finite, stop = jax.device_get((metrics['finite'], metrics['stop']))
            # Every process sees the same `stop` at the same step. One that is alone need not wait
            # for the next step to learn of its own signal.
            self._stopping |= bool(stop)
            if jax.process_count() == 1:
                self._stopping |= bool(self._signals.received)
            if finite:
                self._skipped_in_a_row = 0
            else:
                self._not_finite(step, examples, metrics)

    def _not_finite(self, step: int, examples: np.ndarray, metrics: Any) -> None:
        """A step whose loss or gradient is not finite: stop, or say that it was skipped."""
        run = self._run
        loss, norm = jax.device_get((metrics['train_loss'], metrics['gradient_norm']))
        what = f'step {step:,}: the loss is {loss:.4g}, the norm of its gradient {norm:.4g}'
        indices = ', '.join(map(str, examples))
        which = f'examples of {run.train!r} in this batch: {indices}'
        if jax.process_count() > 1:
            which += f' (those of process {jax.process_index()})'
        self._skipped_in_a_row += 1
        if run.config.nan_policy == 'skip' and self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            run.log.info(f'WARNING: {what}; its update is skipped. The {which}')
            return
        self._checkpoints.wait()
        kept = self._checkpoints.steps()
        last = (
            f'The last good checkpoint is that of step {kept[-1]:,}, in {run.workdir}'
            if kept
            else 'No checkpoint was saved yet'
        )
        if run.config.nan_policy == 'skip':
            advice = f'{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped'
        else:
            advice = '--config.nan_policy=skip goes on without such updates'
        raise UserError(
            f'{what}. {last}. {advice}; a smaller --config.base_lr, more --config.warmup_steps or '
            f'--config.dtype=float32 may avoid it. The {which}'
        )

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Evaluates on the test examples, and says whether it is the best so far, and wanted."""
        run, before = self._run, self.best()
        # Alone, a run that is to stop does not finish the evaluation; the next one begins with it.
        alone = jax.process_count() == 1
        result = evaluate.evaluate(
            self._eval_step,
            state.params,
            run.test,
            run.preprocess,
            run.mesh,
            batch=run.config.batch_eval,
            threads=run.threads,
            on_bad=run.on_bad,
            should_stop=(lambda: bool(self._signals.received)) if alone else None,
        )
        if result is None:
            self._stopping = True
            return False
        metrics, speed = result
        run.log.metrics(step, **metrics)
        run.log.timing(step, img_sec_core_test=speed)
        top5 = ''
        if 'accuracy_top5_test' in metrics:
            top5 = f', top-5 {100 * metrics["accuracy_top5_test"]:.2f} %'
        run.log.info(
            f'step {step:,}: test accuracy {100 * metrics["accuracy_test"]:.2f} %{top5}, '
            f'loss {metrics["loss_test"]:.4f} ({len(run.test):,} images)'
        )
        self._check_unreadable('test', metrics.get('unreadable_test', 0), len(run.test))
        self._accuracies[step] = metrics['accuracy_test']
        if self.best() == before:
            return False
        self._checkpoints.protect(step)
        return True

    def _check_unreadable(self, split: str, count: float, seen: int) -> None:
        """Raises if more images than `max_unreadable` allows cannot be read."""
        run = self._run
        examples = len(run.train if split == 'train' else run.test)
        # Of the first pass, the whole set is the measure: one bad image in the first batch is none.
        if count > run.config.max_unreadable * max(seen, examples):
            raise UserError(
                f'{count:,.0f} of {seen:,} {split} images so far could not be read (they are named '
                f'above and in {run.workdir / telemetry.LOG_FILE}), and '
                f'--config.max_unreadable={run.config.max_unreadable:g} allows a share of that of '
                f'{examples:,} or more. Repair or remove them, or raise it'
            )

    def _leave_if_stopping(self, step: int) -> None:
        """Waits for the checkpoint of `step`, and ends the run, if it was asked to."""
        if not self._stopping:
            return
        self._checkpoints.wait()
        signum = self._signals.received or signal.SIGTERM  # another process got one
        message = (
            f'stopped by {signal.Signals(signum).name} after step {step:,} of '
            f'{self._run.config.total_steps:,}, which is saved in {self._run.workdir}. To go on, '
            f'run the same command again'
        )
        if '--workdir' not in ' '.join(sys.argv):
            message += f' (with --workdir {self._run.workdir})'
        self._run.log.note(message)
        raise preemption.PreemptedError(signum, message)


def _for_the_log(values: dict[str, Any], config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What of a step's metrics goes to metrics.jsonl: counts only where there is something."""
    learned = {
        name: values[name] for name in ('train_loss', 'accuracy_train', 'gradient_norm', 'lr')
    }
    if config.nan_policy == 'skip':
        learned['skipped_steps'] = values['skipped']
    if values['replaced']:
        learned['replaced_images'] = values['replaced']
    return learned


def _check_unchanged(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    train: sources.Selection,
    test: sources.Selection,
) -> list[str]:
    """Raises if the run in the workdir began with other settings or examples; see `resume`."""
    notes = resume.check_config(workdir / telemetry.CONFIG_FILE, config.to_dict())
    resume.check_data(workdir / resume.DATA_FILE, _describe(train, test))
    return notes


def _describe(train: sources.Selection, test: sources.Selection) -> dict[str, Any]:
    """What the examples are, for the next run in the workdir to compare."""
    return {
        'class_names': list(train.class_names),
        **{
            name: {'split': s.spec, 'examples': len(s), 'fingerprint': s.fingerprint()}
            for name, s in (('train', train), ('test', test))
        },
    }


def _report_progress(run: _Run, step: int, values: dict[str, float], clock: '_Clock') -> None:
    """Shows the progress line and writes the timing since the last one."""
    if not clock.images:  # The first step: its time was that of compiling.
        return
    images, seconds, waited = clock.lap()
    eta = clock.seconds_per_step() * (run.config.total_steps - step)
    stats = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
    memory = {'device_memory_peak': stats['peak_bytes_in_use']} if stats else {}
    run.log.timing(
        step,
        img_sec_core_train=images / seconds / run.mesh.devices.size,
        data_wait=waited / seconds,
        eta_s=eta,
        **memory,
    )
    run.log.progress(
        step,
        loss=values['train_loss'],
        accuracy=values['accuracy_train'],
        lr=values['lr'],
        images_per_sec=images / seconds,
        data_wait=waited / seconds,
        eta_s=eta,
    )


def _initial_params(config: ml_collections.ConfigDict, model: Any) -> tuple[Mapping[str, Any], str]:
    """Parameters to start from, on the host, and where they come from, for people."""
    init = jax.device_get(state_lib.init_params(model, config.pp.crop, config.seed))
    path = _weights_path(config)
    if path is None:
        return init, 'new weights (no pretrained ones were asked for)'
    # PyTorch's files do not tell the number of heads; the model does.
    weights = checkpoint.open_weights(
        path, num_heads=config.model.get('transformer', {}).get('num_heads', 0)
    )
    params, report = adapt.adapt(
        weights.params,
        init,
        classifier=config.model.get('classifier', 'gap'),
        keep_head=config.keep_head,
        source=f'{path} ({weights.format})',
    )
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


def _report_bad(log: telemetry.Telemetry, error: BadImageError) -> None:
    """Names an unreadable image; called once for each."""
    log.note(f'WARNING: {error}')


def _introduce(
    run: _Run, state: TrainState, origin: str, notes: list[str], need: cost.Memory
) -> None:
    """Says what is about to run on what."""
    config, log = run.config, run.log
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = run.mesh.devices.flat[0]
    dtype = config_lib.compute_dtype(config, jax.default_backend())
    how = 'data parallel' if run.mesh.shape['fsdp'] == 1 else f'fsdp={run.mesh.shape["fsdp"]}'
    log.info(
        f'model: {config.model.model_name}, {count:,} parameters, {dtype}, '
        f'{config.pp.crop} px, on {run.mesh.devices.size} x {device.device_kind} ({how}'
        f'{f", {jax.process_count()} processes" if jax.process_count() > 1 else ""}), '
        f'about {need.total / 2**30:.1f} GiB each'
    )
    names = run.train.class_names
    shown = ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
    log.info(f'data: {run.train!r}, tested on {run.test!r}; {len(names)} classes: {shown}')
    common = sources.overlap(run.train, run.test)
    if common:
        log.info(
            f'WARNING: {common:,} of the {len(run.test):,} test images are trained on as well: '
            'set both --config.pp.train and --config.pp.test'
        )
    log.info(f'weights: {origin}')
    if notes:
        log.info(f'settings that changed since this run began: {"; ".join(notes)}')
    log.info(f'workdir: {run.workdir}')


def _say_finished(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        print(
            f'{workdir}: this run is finished ({config.total_steps:,} steps); its model is '
            f'{workdir / MODEL_FOLDER}. For another run use another --workdir.'
        )


def _write_model_folders(
    run: _Run,
    state: TrainState,
    abstract: TrainState,
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
    _write_model_folder(run, state.params, MODEL_FOLDER, last)


def _write_model_folder(run: _Run, params: Any, name: str, step: int) -> None:
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
        image_size=config.pp.crop,
        class_names=run.train.class_names,
        preprocess=run.preprocess.to_dict(),
        source={
            'weights': next((config[key] for key in config_lib.WEIGHT_KEYS if config[key]), ''),
            'dataset': config.dataset,
            'train': run.train.spec,
            'test': run.test.spec,
            'steps': step,
        },
    )
    run.log.info(f'model folder: {folder}' + (f' (step {step:,})' if name != MODEL_FOLDER else ''))


class _Clock:
    """Time of training alone: without the first step (compiling), evaluation and saving."""

    def __init__(self):
        self.images = 0  # since the last lap
        self._steps = 0
        self._waited = 0.0
        self._begin = self._lap = time.monotonic()

    def restart(self) -> float:
        """Forgets what was so far, and returns how long it took, in seconds."""
        took = time.monotonic() - self._begin
        self.__init__()
        return took

    def step_done(self, images: int) -> None:
        """Counts a step of so many images."""
        self.images += images
        self._steps += 1

    def lap(self) -> tuple[int, float, float]:
        """Images, seconds, and seconds of waiting for data since the last lap, without pauses."""
        now = time.monotonic()
        result = self.images, now - self._lap, self._waited
        self._lap, self.images, self._waited = now, 0, 0.0
        return result

    def seconds_per_step(self) -> float:
        """Mean since the first step, pauses included: what a step costs in the long run."""
        return (time.monotonic() - self._begin) / max(1, self._steps)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what runs in it as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what runs in it out of the lap."""
        start = time.monotonic()
        yield
        self._lap += time.monotonic() - start
