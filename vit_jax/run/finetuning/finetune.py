"""From photos to the best model that there is time for, and a number that can be trusted.

The images are divided: to fit to, to choose by, to test on. A linear classifier on frozen features
(the probe) comes first; with the rest of the time weights are trained, from the probe's head on
(Kumar et al. 2022, https://arxiv.org/abs/2202.10054): short runs choose what and how fast, a long
one does it. The weights between the probe and the best of these are candidates, too (WiSE-FT,
https://arxiv.org/abs/2109.01903). Of all, the best on the validation images is the model; it alone
is then tested. In the folder:

    model/           the one that was chosen
    report.html      all of it, for people
    plan.json        what was decided, for --plan
    finetune.json    how far it is, and what came out
    config.py        what all runs have in common
    probe/           the model with the head of the probe
    features/        of the frozen model
    runs/            runs of training
    between/         the best model between the probe and a run

The same command goes on where it stopped, with the time that is left.
"""

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from vit_jax import files, train
from vit_jax.data.decode import BadImageError
from vit_jax.errors import UserError
from vit_jax.inference import (
    feature_files,
    features,
    model_folder,
    output,
    probe_choice,
    probes,
    soup,
)
from vit_jax.inference import metrics as metrics_lib
from vit_jax.inference.classifier import JaxClassifier
from vit_jax.run import product, telemetry
from vit_jax.run.finetuning import look, plans, trials
from vit_jax.run.finetuning.clock import Clock, Measured, Watch
from vit_jax.run.finetuning.plans import BETWEEN, PROBE, Plan, Run
from vit_jax.run.finetuning.results import Fitted, Outcome, Score, score_of

PLAN_FILE, STATE_FILE, REPORT_FILE = 'plan.json', 'finetune.json', 'report.html'
FEATURES, MODEL = 'features', product.MODEL_FOLDER
_SAVE_SECONDS = 3.0
_PATIENCE = 1.5  # times the time that a short run is expected to take, after which it is ended
_SHARES = (0.2, 0.4, 0.6, 0.8)  # of what was trained, between the probe and it
_BETWEEN_SECONDS = 6.0  # to compile the evaluation of them
_REPORT_SECONDS = 20.0  # for tests of the chosen one beside the images, and the report


class Finetune:
    """A fine-tuning under way.

    Args:
      folder: of all.
      plan: new, or that of before.
      replay: whether the plan is complete, and the clock has no say.
      minutes: that it may take.
      started: when the program began, `time.monotonic()`.
      say: gets lines for people.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        plan: Plan,
        *,
        replay: bool,
        minutes: float,
        started: float,
        say: Callable[[str], None],
    ):
        self._folder, self._plan, self._replay = folder.absolute(), plan, replay
        self._state: dict[str, Any] = {'spent': 0.0, 'seconds': 60 * minutes, 'scores': {}}
        if (folder / STATE_FILE).exists():
            self._state |= files.read_json(folder / STATE_FILE) | {'seconds': 60 * minutes}
        seconds = math.inf if replay else 60 * minutes
        self.clock = Clock(seconds, self._state['spent'], started, self._note)
        self._say_line = say
        self._parts: look.Parts  # of `run`
        self._tries: tuple[trials.Trial, ...]

    def run(self, parts: look.Parts, model: model_folder.Model) -> Outcome:
        """Does all that is left to do.

        Args:
          parts: the images.
          model: to start from.

        Raises:
          UserError: the images or the model cannot be used.
          PreemptedError: a signal came; the same command goes on.
        """
        self._parts, self._tries = parts, trials.to_try(model.model_config)
        plans.write_config(self._folder, self._plan, model.model_config)
        for line in look.look(parts):
            self._say(line)
        fitted, unreadable = self._probe(parts, model)
        while (run := self._next()) is not None:
            self._train(run)
        self._interpolate()
        self._choose(model, fitted)
        return self._test(parts, model, fitted, unreadable)

    def _say(self, text: str) -> None:
        self._say_line(f'{self.clock} {text}')

    def _note(self, spent: float) -> None:
        self._write(spent=spent)

    def _write(self, **values: Any) -> None:
        self._state |= values
        files.write_json(self._folder / STATE_FILE, self._state)

    def _extract(
        self, name: str, source: Any, model: model_folder.Model
    ) -> tuple[feature_files.Features, list[BadImageError]]:
        """Features of images; also notes their speed, without that of the first batch."""
        done, begin, last = 0, 0.0, 0.0
        keep = self._folder / FEATURES / name

        def advance(images: int) -> None:
            nonlocal done, begin, last
            show(images)
            self.clock.tick()
            last = time.monotonic()
            begin, done = (last, 0) if not begin else (begin, done + images)

        with output.progress_bar(len(source), shares_terminal=True) as show:
            found = features.extract(model, source, batch=plans.BATCH, keep=keep, advance=advance)
        if done and last > begin:
            self._write(forward=done / (last - begin))
        return found

    def _probe(
        self, parts: look.Parts, model: model_folder.Model
    ) -> tuple[Fitted, list[BadImageError]]:
        """Fits the probe, and writes its model."""
        images = len(parts.train) + len(parts.val)
        self._say(f'features of {images:,} images, by {self._plan.weights} ...')
        begin = time.monotonic()
        choosing, worse = self._extract('val', parts.val, model)
        fitting, bad = self._extract('train', parts.train, model)
        unreadable = [*bad, *worse]
        if 'forward' not in self._state:  # of fewer images than two batches
            self._write(forward=images / (time.monotonic() - begin))
        for error in unreadable:
            self._say(f'WARNING: {error}')
        if len(unreadable) > look.MAX_UNREADABLE * images:
            raise UserError(
                f'{len(unreadable):,} of {images:,} images cannot be read; repair or remove them'
            )
        probe_choice.check_labels(fitting.label, parts.train.class_names)
        groups = parts.train.groups()
        results = probe_choice.choose(
            fitting.values,
            fitting.label,
            len(parts.train.class_names),
            groups=None if groups is None else groups[fitting.index],
            seed=self._plan.seed,
        )
        fitted = Fitted(results, fitting, choosing)
        head = fitted.best.probe
        assert isinstance(head, probes.Linear)
        logits = head.logits(choosing.values).astype(np.float64)
        rows = np.arange(len(choosing.label))
        loss = -float(special.log_softmax(logits, -1)[rows, choosing.label].mean())
        right = int((logits.argmax(-1) == choosing.label).sum())
        score = Score(right, len(parts.val), loss)
        if not (self._folder / PROBE / model_folder.MODEL_FILE).exists():
            data = {'train': parts.train.spec, 'train_fingerprint': parts.train.fingerprint()}
            self._save_probe(self._folder / PROBE, model, fitted, head, **data)
        self._keep(PROBE, score, what=f'frozen weights, {fitted.setting}')
        by_hand = plans.probe_command(self._plan)
        self._say(f'{PROBE} ({fitted.setting}): validation {score}. The same by hand:\n  {by_hand}')
        return fitted, unreadable

    def _save_probe(
        self,
        folder: pathlib.Path,
        model: model_folder.Model,
        fitted: Fitted,
        head: probes.Linear,
        **data: str,
    ) -> None:
        parts = self._parts
        source = {
            'probe': fitted.setting,
            'features_of': self._plan.weights,
            'dataset': self._plan.dataset,
            'val': parts.val.spec,
            'test': parts.test.spec,
            **data,
        }
        probes.save(folder, model, head, parts.train.class_names, source)

    def _keep(self, name: str, score: Score | None, **told: Any) -> None:
        scores = dict(self._state['scores'])
        scores[name] = told | (dataclasses.asdict(score) if score else {})
        self._write(scores=scores)

    def _next(self) -> Run | None:
        """The run under way, else the next one; None if none is to come."""
        for run in self._plan.runs:
            if run.name not in self._state['scores']:
                return run
        if self._replay:
            return None
        outlook = self._outlook()
        if 'trials' not in self._state:
            self._write(trials=trials.how_many(outlook))
        short = [run for run in self._plan.runs if not trials.is_last(run)]
        long = [run for run in self._plan.runs if trials.is_last(run)]
        planned = None
        if not long and len(short) < self._state['trials']:
            planned = trials.trial(outlook, len(short), self._state['trials'])
        if planned is None:
            planned = trials.last(outlook, self._by_promise(short), long)
        if planned is None:
            self._say('no time is left for another run of training')
            return None
        self._plan = self._plan.with_run(planned)
        self._plan.write(self._folder / PLAN_FILE)
        steps = planned.settings['total_steps']
        expected = telemetry.format_duration(trials.seconds_of(outlook, planned))
        self._say(f'next: {planned.name}, {steps:,} steps, about {expected}')
        return planned

    def _outlook(self) -> trials.Outlook:
        images = 2.2 * len(self._parts.test) + len(_SHARES) * len(self._parts.val)
        end = _REPORT_SECONDS + _BETWEEN_SECONDS + images / self._state['forward']
        told = self._state['scores'].values()
        return trials.Outlook(
            tries=self._tries,
            left=self.clock.left() - end,
            measured=[Measured(**each['measured']) for each in told if each.get('measured')],
            forward=self._state['forward'],
            images=len(self._parts.train),
            batch=self._plan.settings['batch'],
        )

    def _by_promise(self, short: Sequence[Run]) -> list[trials.Trial]:
        """What may be tried, the best of the short runs first; then what was not tried."""
        done = [run for run in short if 'right' in self._state['scores'][run.name]]
        done.sort(key=lambda run: self._score(run.name).order, reverse=True)
        tried = [(trials.kind_of(run), float(run.settings['base_lr'])) for run in done]
        failed = {run.name for run in short} - {run.name for run in done}
        rest = [
            each
            for each in self._tries
            if each not in tried and trials.name_of(*each) not in failed
        ]
        return [*tried, *rest]

    def _score(self, name: str) -> Score:
        told = self._state['scores'][name]
        return Score(told['right'], told['count'], told['loss'])

    def _train(self, run: Run) -> None:
        """Trains, and keeps what came out; a run that fails is told, and others go on."""
        workdir = self._folder / plans.RUNS / run.name
        self._say(
            f'{run.name}: {run.what}. The same by hand:\n  {plans.command(self._folder, run)}'
        )
        config = plans.read_config(self._folder / plans.CONFIG_FILE, run.settings)
        watch = self._watch(run)
        begin = time.monotonic()
        try:
            train.train_and_evaluate(config, workdir, callbacks=[watch])
        except UserError as error:
            self._say(f'{run.name}: FAILED: {error}')
            self._keep(run.name, None, what=run.what, reason=str(error))
            return
        if watch.ended and not run.ended:
            run = dataclasses.replace(run, ended=watch.steps)
            self._plan = self._plan.with_run(run)
            self._plan.write(self._folder / PLAN_FILE)
            self._say(f'{run.name}: ended after step {run.ended:,}, because the time is over')
        score = score_of(workdir)
        measured = watch.measured(trials.kind_of(run).name, begin)
        self._keep(
            run.name,
            score,
            what=run.what,
            steps=run.ended or run.settings['total_steps'],
            seconds=time.monotonic() - begin,
            measured=dataclasses.asdict(measured) if measured else None,
        )
        shutil.rmtree(workdir / 'checkpoints', ignore_errors=True)
        self._say(f'{run.name}: validation {score}')

    def _watch(self, run: Run) -> Watch:
        """What ends a run in time, and measures it."""
        if self._replay:
            return Watch(self.clock, math.inf, 0, 1, run.ended)
        outlook = self._outlook()
        step = outlook.step(trials.kind_of(run))
        if not trials.is_last(run):
            patient = self.clock.spent() + _PATIENCE * trials.seconds_of(outlook, run)
            return Watch(self.clock, min(patient, self.clock.seconds), 0, step, run.ended)
        after = len(self._parts.val) / outlook.forward + _SAVE_SECONDS
        after += self.clock.left() - outlook.left
        return Watch(self.clock, self.clock.seconds, after, step, run.ended)

    def _scores(self) -> dict[str, Score]:
        told = self._state['scores']
        return {name: self._score(name) for name in told if 'right' in told[name]}

    def _interpolate(self) -> None:
        """Makes a candidate of the best weights between the probe and the best run."""
        scores = self._scores()
        trained = [name for name in scores if name not in (PROBE, BETWEEN)]
        if not trained:
            return
        name = max(trained, key=lambda name: scores[name].order)
        if self._state['scores'].get(BETWEEN, {}).get('run') == name:
            return
        paths = [self._folder / plans.RUNS / name / product.MODEL_FOLDER, self._folder / PROBE]
        tuned, probe = (model_folder.load(path) for path in paths)
        start, _ = soup.as_start(probe, tuned, str(paths[1]))
        assess = soup.assessor(self._parts.val, tuned, plans.BATCH)
        found: dict[float, Score] = {}
        for share in _SHARES:
            result = assess(soup.interpolate(start, tuned, share))
            right = round(result['accuracy'] * len(self._parts.val))
            found[share] = Score(right, len(self._parts.val), result['loss'])
            self.clock.tick()
        share = max(_SHARES, key=lambda share: found[share].order)
        source = {key: tuned.source[key] for key in tuned.source if key not in ('steps', 'metrics')}
        source |= {'soup': [str(paths[0])], 'start': str(paths[1]), 'share': share}
        between = soup.interpolate(start, tuned, share)
        shutil.rmtree(self._folder / BETWEEN, ignore_errors=True)
        model_folder.save_new(self._folder / BETWEEN, dataclasses.replace(between, source=source))
        told = {'run': name, 'share': share}
        what = f'{share:.0%} of {name}, the rest of the probe'
        self._keep(BETWEEN, found[share], what=what, **told)
        by_hand = plans.between_command(self._folder, told)
        self._say(f'{BETWEEN} ({what}): validation {found[share]}. The same by hand:\n  {by_hand}')

    def _choose(self, model: model_folder.Model, fitted: Fitted) -> None:
        """The best on the validation images, of equal ones the first; its model is the product."""
        scores = self._scores()
        chosen = max(scores, key=lambda name: scores[name].order)
        if chosen == PROBE:
            # To the validation images, too: they have done their work.
            head = fitted.to_all(len(self._parts.train.class_names))
            self._save_probe(self._folder / MODEL, model, fitted, head, train=self._plan.train)
        else:
            source = self._folder / plans.RUNS / chosen / product.MODEL_FOLDER
            if chosen == BETWEEN:
                source = self._folder / BETWEEN
            with files.atomic_folder(self._folder / MODEL, exists='replace') as part:
                shutil.copytree(source, part, dirs_exist_ok=True)
        self._write(chosen=chosen)
        self._say(f'chosen: {chosen}, the best of {len(scores)} on the validation images')

    def _test(
        self,
        parts: look.Parts,
        frozen: model_folder.Model,
        fitted: Fitted,
        unreadable: list[BadImageError],
    ) -> Outcome:
        """Predicts the test images, with the chosen model alone."""
        self._say(f'testing it on {len(parts.test):,} images, once ...')
        model = model_folder.load(self._folder / product.MODEL_FOLDER)
        found, bad = metrics_lib.collect(
            JaxClassifier(model),
            parts.test,
            model_labels=range(len(parts.test.class_names)),
            batch=plans.BATCH,
            advance=lambda images: self.clock.tick(),
        )
        assert isinstance(found, metrics_lib.Outcomes)
        test, _ = self._extract('test', parts.test, frozen)
        head = fitted.best.probe
        of_probe = np.zeros(len(parts.test), bool)
        of_probe[test.index] = head.predict(test.values) == test.label
        right = int(found.right.sum())
        low, high = probes.interval(right, len(found.right))
        gain = found.right.astype(float) - of_probe
        half = 1.96 * gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
        result = {
            'right': right,
            'count': len(found.right),
            'interval': [low, high],
            'probe_right': int(of_probe.sum()),
            'gain': float(gain.mean()),
            'gain_half': half,
        }
        self._write(result=result, spent=self.clock.spent())
        return Outcome(
            self._folder,
            self._plan,
            dict(self._state),
            parts,
            model,
            fitted,
            found,
            test,
            [*unreadable, *bad],
        )
