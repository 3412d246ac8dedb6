"""Fine-tuning, from top to bottom.

`train_and_evaluate` sets a run up (devices, data, model, weights or checkpoint), `_run_steps` is
the loop, and `_write_model_folder` makes the product. What the loop does in which order:

    1. get the batch of this step (a function of seed and step), put it on the devices
    2. the training step: one jitted call; the old state is donated to it
    3. every `progress_every` steps: read the metrics, write and show them
    4. every `eval_every` steps: evaluate on the whole test set, write metrics
    5. every `checkpoint_every` steps: save, asynchronously

Metrics of a step are written before its checkpoint, so a resumed run has neither a gap nor a line
twice.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from vit_jax import checkpoint, evaluate, model_folder, models, optim, sharding, steps, telemetry
from vit_jax import config as config_lib
from vit_jax import state as state_lib
from vit_jax.checkpoint import adapt, catalog
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data import pipeline, sources
from vit_jax.data.preprocess import Preprocess
from vit_jax.state import TrainState

MODEL_FOLDER = 'model'


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

    @property
    def threads(self) -> int | None:
        return self.config.data_threads or None


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> Mapping[str, Any] | None:
    """Trains a model, or goes on where an earlier run in the same workdir was stopped.

    Args:
      config: resolved, see `config.resolve`.
      workdir: folder of the run: checkpoints, `metrics.jsonl`, `timing.jsonl`, `train.log`,
        TensorBoard events, `config.json`, and at the end the model folder `model/`.

    Returns:
      The parameters, on the devices; None if the run was finished before and nothing was to do.

    Raises:
      UserError: data, weights, devices or workdir do not fit the config; raised before training
        starts.
    """
    workdir = pathlib.Path(workdir)
    with workdir_lib.Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        if (workdir / MODEL_FOLDER).exists() and config.total_steps in checkpoints.steps():
            _say_finished(config, workdir)
            return None

        config_lib.check_devices(config, jax.device_count(), jax.default_backend())
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
            dtype=jnp.dtype(config_lib.compute_dtype(config, jax.default_backend())),
            attention=config.attention,
            remat=config.remat,
        )
        schedule = optim.create_learning_rate_schedule(
            config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
        )
        tx = optim.create_optimizer(config, schedule)

        abstract = state_lib.abstract_state(model, tx, config.pp.crop, mesh)
        restored = checkpoints.restore_latest(abstract)
        if restored:
            start, state = restored
            origin = f'resumed from step {start:,} in {workdir}'
        else:
            params, origin = _initial_params(config, model)
            start, state = 0, state_lib.create_state(params, tx, mesh)

        log = telemetry.Telemetry(
            workdir,
            total_steps=config.total_steps,
            start_step=start,
            enabled=jax.process_index() == 0,
        )
        with log:
            run = _Run(config, workdir, mesh, train, test, config_lib.preprocess_of(config), log)
            if jax.process_index() == 0:
                telemetry.write_run_info(workdir, config)
            _introduce(run, state, origin)
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
            )
            eval_step = steps.make_eval_step(model, mesh, shardings.params)
            if start < config.total_steps:
                state = _run_steps(run, state, start, train_step, eval_step, checkpoints)
            _write_model_folder(run, state)
            return state.params


def _run_steps(run, state, start, train_step, eval_step, checkpoints) -> TrainState:
    """The loop: steps start + 1 to total_steps."""
    config, log = run.config, run.log
    dataset = pipeline.train_dataset(
        run.train,
        run.preprocess,
        batch=config.batch,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    clock = _Clock()
    in_flight = collections.deque()
    with pipeline.train_batches(dataset, start=start, threads=run.threads) as batches:
        for step in range(start + 1, config.total_steps + 1):
            last = step == config.total_steps

            with clock.waiting():
                batch = next(batches)
            del batch['example']
            # An implicit transfer would stall the device unnoticed; here it is an error.
            with jax.transfer_guard('disallow'):
                state, metrics = train_step(state, sharding.put_batch(batch, run.mesh))
            in_flight.append(metrics)
            if len(in_flight) > sharding.steps_ahead():
                jax.block_until_ready(in_flight.popleft())
            clock.step_done(config.batch)
            if step == start + 1:
                jax.block_until_ready(metrics)
                log.timing(step, first_step_s=clock.restart())

            if step % config.progress_every == 0 or last:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                log.metrics(step, **values)
                _report_progress(run, step, values, clock)

            if step % config.eval_every == 0 or last:
                with clock.paused():
                    _evaluate(run, step, state.params, eval_step)

            if step % config.checkpoint_every == 0 or last:
                with clock.paused():
                    checkpoints.save(step, state)
    return state


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


def _evaluate(run: _Run, step: int, params: Any, eval_step: Any) -> None:
    """Evaluates on the test examples; writes and shows the result."""
    metrics, speed = evaluate.evaluate(
        eval_step,
        params,
        run.test,
        run.preprocess,
        run.mesh,
        batch=run.config.batch_eval,
        threads=run.threads,
    )
    run.log.metrics(step, **metrics)
    run.log.timing(step, img_sec_core_test=speed)
    top5 = ''
    if 'accuracy_top5_test' in metrics:
        top5 = f', top-5 {100 * metrics["accuracy_top5_test"]:.2f} %'
    run.log.info(
        f'step {step:,}: test accuracy {100 * metrics["accuracy_test"]:.2f} %{top5}, '
        f'loss {metrics["loss_test"]:.4f} ({len(run.test):,} images)'
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


def _introduce(run: _Run, state: TrainState, origin: str) -> None:
    """Says what is about to run on what."""
    config, log = run.config, run.log
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = run.mesh.devices.flat[0]
    dtype = config_lib.compute_dtype(config, jax.default_backend())
    how = 'data parallel' if run.mesh.shape['fsdp'] == 1 else f'fsdp={run.mesh.shape["fsdp"]}'
    log.info(
        f'model: {config.model.model_name}, {count:,} parameters, {dtype}, '
        f'{config.pp.crop} px, on {run.mesh.devices.size} x {device.device_kind} ({how})'
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
    log.info(f'workdir: {run.workdir}')


def _say_finished(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        print(
            f'{workdir}: this run is finished ({config.total_steps:,} steps); its model is '
            f'{workdir / MODEL_FOLDER}. For another run use another --workdir.'
        )


def _write_model_folder(run: _Run, state: TrainState) -> None:
    """Writes the product of the run: weights, architecture, preprocessing and class names."""
    # Gathered on every device first, for the case that each holds a part only.
    whole = jax.jit(lambda params: params, out_shardings=sharding.replicated(run.mesh))(
        state.params
    )
    if jax.process_index():
        return
    config = run.config
    folder = run.workdir / MODEL_FOLDER
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
            'steps': config.total_steps,
        },
    )
    run.log.info(f'model folder: {folder}')


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
