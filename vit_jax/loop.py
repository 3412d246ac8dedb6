"""The training loop.

What it does in which order:

    1. get the batch of this step (a function of seed and step), put it on the devices
    2. the training step: one jitted call; the old state is donated to it
    3. look at the step before the last ones under way: was it finite, is the run to stop?
    4. every `progress_every` steps: read the metrics, write and show them
    5. every `eval_every` steps: evaluate on all validation images, or, where there are none, on
       the test images; write metrics
    6. every `checkpoint_every` steps, and when the run is to stop: save, asynchronously

After 3, 5 and 6, before the first step and after the last, `run.callbacks` are called. Where there
are validation images, `test_at_end` evaluates on the test images, which nothing has seen before.

Metrics of a step are written before its checkpoint, so a resumed run has neither a gap nor a line
twice; and no state is saved before its step, and all before it, are known to be finite.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import pathlib
import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from vit_jax import sharding
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data.dataset import Selection
from vit_jax.data.decode import BadImageError
from vit_jax.data.loader import BatchLoader
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reader import ImageCache, Reader, once_per_key
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.inference.task import ONE_CLASS, Task
from vit_jax.run import augmentation, cached_features, pairs, preemption, telemetry
from vit_jax.run.callbacks import Callbacks
from vit_jax.run.clock import TrainingClock
from vit_jax.run.evaluations import Evaluations, check_unreadable
from vit_jax.state import Checkpoint, TrainState

# With nan_policy='skip': after so many skipped steps in a row nothing good will come any more.
MAX_SKIPPED_IN_A_ROW = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same over a run."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    train: Selection | BatchStream
    val: Selection | None
    test: Selection
    preprocess: Preprocess
    log: telemetry.Telemetry
    callbacks: Callbacks
    task: Task = ONE_CLASS

    @property
    def watched(self) -> str:
        """The examples to evaluate on, on the way: 'val', or 'test' if there are none of it."""
        return 'test' if self.val is None else 'val'

    @property
    def threads(self) -> int | None:
        """Threads that read; None for as many as seem useful."""
        return self.config.data_threads or None


class Loop:
    """The loop over steps, and what it has to remember.

    Args:
      run: what stays the same.
      train_step: the compiled training step.
      compile_s: seconds that compiling it took.
      eval_step: of `steps.make_eval_step`, or of pairs.
      checkpoints: of the run.
    """

    def __init__(
        self,
        run: Run,
        train_step: Callable,
        compile_s: float,
        eval_step: Callable | pairs.Evaluation,
        checkpoints: workdir_lib.Checkpoints,
    ):
        self._run = run
        self._train_step = train_step
        self._compile_s = compile_s
        self._checkpoints = checkpoints
        self._on_bad = once_per_key(self._name_unreadable)
        cache = None
        if run.config.cache:
            cache = ImageCache(int(run.config.cache * 2**30))
        self._train_images: Reader | BatchStream = (
            run.train if isinstance(run.train, BatchStream) else Reader(run.train, cache)
        )
        self._features: cached_features.FeatureBatches | None = None
        self._signals = preemption.StopSignals()
        self._evaluations = Evaluations(
            run, eval_step, checkpoints, cache, self._on_bad, lambda: bool(self._signals.received)
        )
        self._sum_over_processes = sharding.make_sum_over_processes(run.mesh)
        self._in_flight: collections.deque[_Step] = collections.deque()
        self._replaced = 0  # unreadable examples of the steps that are settled
        self._skipped_in_a_row = 0
        self._stopping = False

    def best(self) -> int | None:
        """The first step of the best validation accuracy (or loss); None if it is not kept."""
        return self._evaluations.choice.best()

    def cache_features(self, evaluation: pairs.Evaluation, params: Any) -> None:
        """Trains on embeddings of the images, which are made here, from now on."""
        run = self._run
        assert not isinstance(run.train, BatchStream)
        self._features = cached_features.cached_batches(
            run.config, evaluation, params, run.train, run.mesh, self._on_bad
        )

    @contextlib.contextmanager
    def reading(self, start: int) -> Iterator[Iterator[dict[str, np.ndarray]]]:
        """Reads the batches of steps start + 1, ... ahead; the first one from now on."""
        if start >= self._run.config.total_steps:
            yield iter(())
            return
        with (
            contextlib.closing(self._batches(start)) as batches,
            concurrent.futures.ThreadPoolExecutor(1) as thread,
        ):
            first = thread.submit(next, batches)
            yield itertools.chain((future.result() for future in (first,)), batches)

    def _batches(self, start: int) -> Generator[dict[str, np.ndarray]]:
        run, config = self._run, self._run.config
        if self._features is not None:
            return self._features.from_step(start)
        if isinstance(self._train_images, BatchStream):
            return self._train_images.from_step(
                start,
                batch=config.batch // jax.process_count(),
                crop=config.pp.crop,
                exact=config.pp.exact,
                process_index=jax.process_index(),
            )
        loader = BatchLoader(
            self._train_images,
            run.preprocess,
            batch=config.batch,
            seed=config.seed,
            exact=config.pp.exact,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            augment=augmentation.host_augment_of(config, run.train),
            repeats=max(1, config.repeated_augmentation),
            balance=augmentation.balance_of(config, run.train),
            on_bad=self._on_bad,
        )
        return loader.from_step(start, threads=run.threads)

    def run_steps(
        self, first: Checkpoint, start: int, batches: Iterator[dict[str, np.ndarray]]
    ) -> tuple[TrainState, int]:
        """Steps start + 1 to the last one, from what there is after `start`.

        The last one is `total_steps`, or one after whose evaluation `patience` is at an end.

        Args:
          first: its arrays are donated.
          start: number of steps done.
          batches: of `reading`.

        Returns:
          The state after the last step, and how many steps it had.

        Raises:
          UserError: the loss is not finite, too many images cannot be read, a checkpoint cannot be
            written.
          PreemptedError: a signal came, and the state is saved.
        """
        config, log, run = self._run.config, self._run.log, self._run
        state, self._replaced = first.state(), int(first.replaced)
        del first
        self._evaluations.read(up_to=start)
        step = start
        with self._signals:
            if (
                start
                and self._is_due(start, config.eval_every)
                and not self._evaluations.are_done(start)
            ):
                self._evaluate(start, state, run.watched)  # it was stopped before, or while, it did
                self._leave_if_stopping(start)
            run.callbacks('on_start', start, state, {})
            clock = TrainingClock()
            over = self._evaluations.choice.is_over()
            while step < config.total_steps and not over:
                step += 1
                with clock.waiting():
                    batch = next(batches)
                state, metrics = self._dispatch(step, state, batch)
                clock.step_done(config.batch)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    log.timing(step, first_step_s=self._compile_s + clock.restart())

                show = step == 1 or self._is_due(step, config.progress_every)
                assess = self._is_due(step, config.eval_every)
                save = self._is_due(step, config.checkpoint_every)
                self._settle(0 if show or assess or save else sharding.steps_ahead())
                if self._stopping:
                    self._settle(0)
                told = run.callbacks('on_step', step, state, metrics)
                if run.callbacks.ended:
                    self._settle(0)
                    show = assess = over = True

                if show:
                    values = {name: v.item() for name, v in jax.device_get(metrics).items()}
                    told = _for_the_log(values, self._replaced, config) | told
                if told:
                    log.metrics(step, **told)
                if show:
                    _report_progress(run, step, values, clock)
                    check_unreadable(
                        run, 'train', self._train_images, self._replaced, step * config.batch
                    )

                if assess and not self._stopping:
                    with clock.paused():
                        save = self._evaluate(step, state, run.watched) or save
                        over = self._evaluations.choice.is_over() or run.callbacks.ended

                if save or over or self._stopping:
                    with clock.paused():
                        replaced = count_array(self._replaced, run.mesh)
                        self._checkpoints.save(step, Checkpoint.of(state, replaced))
                        run.callbacks('on_checkpoint', step, state, {})
                self._leave_if_stopping(step)
                if over and step < config.total_steps:
                    why = f'evaluations in a row without a better one: {config.patience} '
                    why += '(config.patience)'
                    if run.callbacks.ended:
                        why = 'a callback says so'
                    log.info(f'the run ends with step {step:,}: {why}')
        run.callbacks('on_end', step, state, {})
        return state, step

    def test_at_end(self, last: int, state: TrainState, chosen: int) -> None:
        """Evaluates on the test images, if there are validation images, and it was not done yet.

        Args:
          last: the last step, whose line of metrics it is.
          state: that was chosen.
          chosen: its step.
        """
        if self._run.val is None or not self._run.config.test_at_end:
            return
        if self._evaluations.are_done(last, 'test'):
            return
        with self._signals:
            self._evaluate(last, state, 'test', step_tested=chosen)
            self._leave_if_stopping(last)

    def _dispatch(
        self, step: int, state: TrainState, batch: dict[str, np.ndarray]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Starts a step; the host need not wait for what it gives."""
        names = ('image', 'label', 'position', 'weight')
        inputs = {name: batch[name] for name in names if name in batch}
        here = np.array([batch['replaced'].sum(), bool(self._signals.received)], np.int32)
        # An implicit transfer would stall the device unnoticed; here it is an error.
        with jax.transfer_guard('disallow'):
            with jax.profiler.StepTraceAnnotation('train', step_num=step):  # for `config.profile`
                on_devices = sharding.put_batch(inputs, self._run.mesh)
                state, metrics = self._train_step(state, on_devices)
            if not sharding.steps_ahead():  # two collectives at once mix up their messages on CPUs
                jax.block_until_ready(metrics)
            everywhere = self._sum_over_processes(here)
        self._in_flight.append(_Step(step, batch['example'], metrics, everywhere))
        return state, metrics

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self._run.config.total_steps

    def _settle(self, ahead: int) -> None:
        """Waits until at most `ahead` steps are under way, and looks at what the others gave."""
        while len(self._in_flight) > ahead:
            done = self._in_flight.popleft()
            finite, (replaced, stop) = jax.device_get((done.metrics['finite'], done.counts))
            self._replaced += int(replaced)
            # Every process sees the same `stop` at the same step. One that is alone need not wait
            # for the next step to learn of its own signal.
            alone = jax.process_count() == 1
            self._stopping |= bool(stop) or (alone and bool(self._signals.received))
            if finite:
                self._skipped_in_a_row = 0
            else:
                self._not_finite(done)

    def _not_finite(self, done: '_Step') -> None:
        """A step whose loss or gradient is not finite: stop, or say that it was skipped."""
        run, step, metrics = self._run, done.step, done.metrics
        loss, norm = jax.device_get((metrics['train_loss'], metrics['gradient_norm']))
        what = f'step {step:,}: the loss is {loss:.4g}, the norm of its gradient {norm:.4g}'
        indices = ', '.join(map(str, done.examples))
        which = f'examples of {run.train!r} in this batch: {indices}'
        if jax.process_count() > 1:
            which += f' (those of process {jax.process_index()})'
        self._skipped_in_a_row += 1
        if run.config.nan_policy == 'skip' and self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            run.log.info(
                f'WARNING: {what}; its update is skipped. The {which}', 'skipped', step=step
            )
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

    def task_of(self, params: Any) -> Task:
        """The task of the model of these parameters, see `Evaluations.task_of`."""
        return self._evaluations.task_of(params)

    def _evaluate(self, step: int, state: TrainState, split: str, **facts: float) -> bool:
        """See `Evaluations.run`; says whether the step is to be kept."""
        kept = self._evaluations.run(step, state, split, **facts)
        self._stopping |= kept is None
        return bool(kept)

    def _name_unreadable(self, error: BadImageError) -> None:
        self._run.log.note(f'WARNING: {error}', 'unreadable', image=error.key)

    def _leave_if_stopping(self, step: int) -> None:
        """Waits for the checkpoint of `step`, and ends the run, if it was asked to."""
        if not self._stopping:
            return
        self._checkpoints.wait()
        signum = self._signals.received or signal.SIGTERM  # another process got one
        message = (
            f'stopped by {signal.Signals(signum).name} after step {step:,} of '
            f'{self._run.config.total_steps:,}, which is saved in {self._run.workdir}. To go on, '
            'run the same command again'
        )
        name = signal.Signals(signum).name
        self._run.log.note(message, 'stopped', step=step, signal=name)
        raise preemption.PreemptedError(signum, message)


class _Step(NamedTuple):
    """A step that was dispatched."""

    step: int
    examples: np.ndarray  # indices of those of this process
    metrics: dict[str, jax.Array]
    counts: Any  # over all processes: replaced examples, and how many were asked to stop


def count_array(count: int, mesh: Mesh) -> jax.Array:
    """A count of the host as an array that can be saved."""
    return sharding.put_tree(np.int32(count), sharding.replicated(mesh))


def _for_the_log(
    values: dict[str, Any], replaced: int, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """What of a step's metrics goes to metrics.jsonl: counts only where there is something."""
    learned = {name: values[name] for name in values if name not in ('finite', 'skipped')}
    if config.nan_policy == 'skip':
        learned['skipped_steps'] = values['skipped']
    if replaced:
        learned['replaced_images'] = replaced
    return learned


def _report_progress(run: Run, step: int, values: dict[str, float], clock: TrainingClock) -> None:
    """Shows the progress line and writes the timing since the last one."""
    speed = {}
    if clock.images:  # nothing was timed at the first step
        images, seconds, waited = clock.lap()
        speed = {
            'images_per_sec': images / seconds,
            'data_wait': waited / seconds,
            'eta_s': clock.seconds_per_step() * (run.config.total_steps - step),
        }
        stats = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        memory = {'device_memory_peak': stats['peak_bytes_in_use']} if stats else {}
        run.log.timing(
            step,
            img_sec_core_train=images / seconds / run.mesh.devices.size,
            data_wait=speed['data_wait'],
            eta_s=speed['eta_s'],
            **memory,
        )
    run.log.progress(
        step,
        loss=values['train_loss'],
        accuracy=values.get('accuracy_train'),
        lr=values.get('lr'),
        **speed,
    )
