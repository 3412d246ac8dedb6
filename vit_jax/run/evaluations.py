"""Evaluations of a run, on the way and at its end: what they tell, and which step is chosen."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from vit_jax import evaluate
from vit_jax.checkpoint import workdir as workdir_lib
from vit_jax.data.reader import ImageCache, OnBad, Reader
from vit_jax.data.stream import BatchStream
from vit_jax.errors import UserError
from vit_jax.inference import retrieval, several
from vit_jax.inference.task import SEVERAL, Task
from vit_jax.run import pairs, telemetry
from vit_jax.run.choice import Choice
from vit_jax.state import TrainState

if TYPE_CHECKING:
    from vit_jax import loop


class Evaluations:
    """Evaluates on the validation and test images of a run.

    Args:
      run: what stays the same.
      eval_step: of `steps.make_eval_step`, or of pairs.
      checkpoints: of the run.
      cache: for decoded images; None for none.
      on_bad: is told of images that cannot be read.
      should_stop: says whether the run is to stop.

    Attributes:
      choice: what is chosen by the evaluations so far.
    """

    def __init__(
        self,
        run: 'loop.Run',
        eval_step: Callable | pairs.Evaluation,
        checkpoints: workdir_lib.Checkpoints,
        cache: ImageCache | None,
        on_bad: OnBad,
        should_stop: Callable[[], bool],
    ):
        self._run, self._eval_step, self._checkpoints = run, eval_step, checkpoints
        self._on_bad, self._should_stop = on_bad, should_stop
        self._images = {'test': Reader(run.test, cache)}
        if run.val is not None:
            self._images['val'] = Reader(run.val, cache)
        self.choice = Choice(run.config)

    def read(self, up_to: int) -> None:
        """Takes over the evaluations of an earlier part of the run, until this step."""
        best = self.choice.read(self._run.workdir, up_to=up_to).best()
        if best is not None:
            self._checkpoints.protect(best)

    def are_done(self, step: int, split: str = '') -> bool:
        """Whether `metrics.jsonl` has that of a step; without a split, on `run.watched`."""
        name = f'loss_{split or self._run.watched}'
        return step in telemetry.read_metric(self._run.workdir, name, up_to=step)

    def run(self, step: int, state: TrainState, split: str, **facts: float) -> bool | None:
        """Evaluates, writes the metrics, and protects the checkpoint of the best step so far.

        Args:
          step: how many were done.
          state: to evaluate.
          split: 'val' or 'test'.
          **facts: to write with the metrics.

        Returns:
          Whether this step is the best so far, and to be kept; None if the run is to stop, and
          nothing was written.
        """
        run, images = self._run, self._images[split]
        # Alone, a run that is to stop does not finish the evaluation; the next one begins with it.
        alone = jax.process_count() == 1
        examples = run.val if split == 'val' and run.val is not None else run.test
        if isinstance(self._eval_step, pairs.Evaluation):
            measure: Callable = functools.partial(self._eval_step, source=examples)
        else:
            measure = functools.partial(evaluate.evaluate, self._eval_step, task=run.task)
        result = measure(
            state.model_params,
            images,
            preprocess=run.preprocess,
            mesh=run.mesh,
            batch=run.config.batch_eval,
            split=split,
            threads=run.threads,
            on_bad=self._on_bad,
            should_stop=self._should_stop if alone else None,
        )
        if result is None:
            return None
        metrics, speed = result
        tested = int(facts.get('step_tested', step))  # of the state
        metrics |= run.callbacks('on_eval', tested, state, metrics)
        run.log.metrics(step, **metrics, **facts)
        run.log.timing(step, **{f'img_sec_core_{split}': speed})
        which = {'val': 'validation', 'test': 'test'}[split]
        run.log.info(
            f'step {tested:,}: {which} {_in_words(metrics, split)} ({len(images):,} images)',
            'evaluated',
            step=step,
        )
        check_unreadable(run, split, images, metrics.get(f'unreadable_{split}', 0), len(images))
        if split != 'val' or not self.choice.add(step, metrics):
            return False
        self._checkpoints.protect(step)
        return True

    def task_of(self, params: Any) -> Task:
        """The task of the model that these parameters are of.

        Where an image may have several classes, its threshold is the best on validation images.
        """
        run = self._run
        if run.task.kind != SEVERAL or run.val is None:
            return run.task
        assert not isinstance(self._eval_step, pairs.Evaluation)  # whose task is another
        found = evaluate.collect(
            self._eval_step,
            params,
            self._images['val'],
            run.preprocess,
            run.mesh,
            batch=run.config.batch_eval,
            threads=run.threads,
            on_bad=self._on_bad,
        )
        assert found is not None  # nothing stops it
        threshold = several.choose_threshold(evaluate.Outputs.of(found), run.task)
        return dataclasses.replace(run.task, threshold=threshold, chosen_on=repr(run.val))


def check_unreadable(
    run: 'loop.Run', split: str, images: Reader | BatchStream, count: float, seen: int
) -> None:
    """Raises if more images than `max_unreadable` allows cannot be read."""
    if isinstance(images, BatchStream):  # reads no images
        return
    examples = len(images)
    # Of the first pass, the whole set is the measure: one bad image in the first batch is none.
    if count > run.config.max_unreadable * max(seen, examples):
        raise UserError(
            f'{count:,.0f} of {seen:,} {split} images so far could not be read (they are named '
            f'above and in {run.workdir / telemetry.LOG_FILE}), and '
            f'--config.max_unreadable={run.config.max_unreadable:g} allows a share of that of '
            f'{examples:,} or more. Repair or remove them, or raise it'
        )


def _in_words(metrics: dict[str, float], split: str) -> str:
    """Accuracy, if there is one, and whatever else was measured on the split."""
    rest, parts = {name.removesuffix(f'_{split}'): metrics[name] for name in metrics}, []
    rest.pop('unreadable', None)  # is told on its own
    if 'mean_recall' in rest:
        return f'{retrieval.in_words(metrics, split)}, loss {rest["loss"]:.4f}'
    for name, words in (('accuracy', 'accuracy'), ('accuracy_top5', 'top-5')):
        if name in rest:
            parts.append(f'{words} {100 * rest.pop(name):.2f} %')
    return ', '.join(parts + [f'{name} {rest[name]:.4f}' for name in rest])
