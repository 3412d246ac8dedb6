"""Sweeps: settings are tried, the best is chosen on validation images, and that one is tested.

Each trial is a run of training in a process of its own, so that one that fails, or for which memory
does not suffice, ends no sweep. Optuna proposes, prunes, and keeps the state. In the folder:

    sweep.json           what is tried
    optuna.log           the trials, for Optuna and its dashboard
    trials/7/            the run of a trial, without its model; trials/7.log is what it printed
    final/trial7-seed0/  the chosen settings, trained again, tested once; with model/
    result.json          what was chosen, and what came out
    sweep.html           tables and plots

The same command goes on where it stopped: with the trial that was under way, from its checkpoint.
"""

import dataclasses
import math
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vit_jax import files
from vit_jax.errors import UserError, extra
from vit_jax.run import child, choice, preemption, resume, run_info, telemetry
from vit_jax.run.sweep_plan import Plan

if TYPE_CHECKING:
    import optuna

PLAN_FILE, STORAGE_FILE, RESULT_FILE = 'sweep.json', 'optuna.log', 'result.json'
TRIALS, FINAL = 'trials', 'final'
_POLL_SECONDS = 0.5
_TENTHS = 10  # of a trial, after which it is compared with others, however long each is
# No trial predicts test images.
_OF_TRIALS = ('--config.report=False', '--config.test_at_end=False')
_NEVER = 10**9  # as eval_every: at the end only
_ROOT = str(pathlib.Path(__file__).parents[2])


def run(plan: Plan, folder: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a sweep, or goes on with it.

    Args:
      plan: checked.
      folder: of the sweep.
      say: gets lines for people.

    Returns:
      What `result.json` holds: `trial`, its number; `settings`, values by knob; `metric` and
      `score`, of validation, where larger is better; `seeds`: of each its `seed`, `workdir` and
      what was measured on the test images.

    Raises:
      UserError: another sweep is in the folder, no trial succeeded, or a run at the end failed.
      PreemptedError: a signal came; the same command goes on.
    """
    with resume.locked(folder), preemption.StopSignals() as signals:
        _check_same(plan, folder / PLAN_FILE)
        sweep = _Sweep(plan, folder, say, signals)
        while (trial := sweep.next_trial()) is not None:
            sweep.run_trial(trial)
        result = sweep.choose()
        result['seeds'] = [sweep.run_final(result, seed) for seed in range(plan.seeds)]
        files.write_json(folder / RESULT_FILE, result)
        return result


def train(
    words: Sequence[str],
    workdir: pathlib.Path,
    signals: preemption.StopSignals,
    look: Callable[[], bool] = lambda: False,
) -> str:
    """Runs a training in a process of its own, or goes on with it; see `run_program`.

    Args:
      words: command line of `vit_jax.main`.
      workdir: of the run; what is printed goes to a file beside it.
      signals: at which the training saves and ends.
      look: asked all the time whether to end it.
    """
    arguments = ['-m', 'vit_jax.main', *words, '--workdir', str(workdir)]
    return run_program(arguments, workdir.with_name(f'{workdir.name}.log'), signals, look)


def run_program(
    arguments: Sequence[str],
    log: pathlib.Path,
    signals: preemption.StopSignals,
    look: Callable[[], bool] = lambda: False,
) -> str:
    """Runs a Python program in a process of its own.

    Args:
      arguments: see `child.start`.
      log: file to which what it prints is added.
      signals: at which the program is asked to end.
      look: asked all the time whether to end it.

    Returns:
      Why it failed; '' if it did not.

    Raises:
      PreemptedError: a signal came.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [_ROOT, os.environ.get('PYTHONPATH', ''), os.getcwd()]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    with open(log, 'ab') as output:
        process = child.start(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which passes it on, once
        )
        while process.poll() is None:
            if signals.received or look():
                process.terminate()
                process.wait()
                break
            time.sleep(_POLL_SECONDS)
    if signals.received:
        raise preemption.PreemptedError(
            signals.received,
            f'stopped; what is done is in {log.parents[1]}, and the same command goes on',
        )
    return '' if process.returncode == 0 else _why(log, process.returncode)


def open_study(folder: pathlib.Path) -> 'optuna.Study':
    """The trials of a sweep."""
    with extra('sweep'):
        import optuna
        from optuna.storages.journal import JournalFileBackend
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalFileBackend(str(folder / STORAGE_FILE))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name='sweep',
        direction='maximize',
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    )


def in_words(settings: Mapping[str, Any]) -> str:
    """`base_lr=0.01, epochs=5`."""
    return ', '.join(f'{knob.removeprefix("config.")}={v}' for knob, v in settings.items())


def score_in_words(metric: str, score: float) -> str:
    """A validation score for people: `91.20 %`, or a loss, `0.1234`."""
    accuracy = metric.startswith(('accuracy', 'mean_recall'))
    return f'{100 * score:.2f} %' if accuracy else f'{abs(score):.4f}'


def _check_same(plan: Plan, path: pathlib.Path) -> None:
    """Writes the plan, or compares it with the folder's; more trials and seeds may be asked for.

    Raises:
      UserError: they differ.
    """
    told = dataclasses.asdict(plan) | {'by_optuna': plan.trials > 0}
    told = {name: list(v) if isinstance(v, tuple) else v for name, v in told.items()}
    told['grid'] = {knob: list(values) for knob, values in plan.grid.items()}
    if path.exists():
        before = files.read_json(path)
        changed = [
            name
            for name in told
            if name not in ('trials', 'seeds', 'prune') and told[name] != before.get(name)
        ]
        if changed:
            raise UserError(
                f'{path.parent} holds another sweep ({", ".join(changed)}: see {path}): use '
                'another --workdir, or the command of before'
            )
    files.write_json(path, told)


class _Sweep:
    """A sweep under way."""

    def __init__(
        self,
        plan: Plan,
        folder: pathlib.Path,
        say: Callable[[str], None],
        signals: preemption.StopSignals,
    ):
        self._plan, self._folder, self._say, self._signals = plan, folder, say, signals
        self._study = open_study(folder)
        self._count = plan.trials
        if not plan.trials:
            points = list(plan.corners())
            self._count = len(points)
            for point in points:
                self._study.enqueue_trial(point, skip_if_exists=True)

    def next_trial(self) -> 'optuna.Trial | None':
        """One that was under way, else the next of the grid or of Optuna; None if all are done."""
        import optuna

        states = optuna.trial.TrialState
        under_way = self._study.get_trials(deepcopy=False, states=(states.RUNNING,))
        if under_way:
            return optuna.trial.Trial(self._study, under_way[0]._trial_id)
        done = len(self._study.get_trials(deepcopy=False)) - len(
            self._study.get_trials(deepcopy=False, states=(states.WAITING,))
        )
        if done >= self._count:
            return None
        # A function of what was tried, so that a sweep that was stopped goes on as it would have.
        self._study.sampler = optuna.samplers.TPESampler(seed=done)
        return self._study.ask()

    def run_trial(self, trial: 'optuna.Trial') -> None:
        """Runs a trial, and tells Optuna what came out."""
        from optuna.trial import TrialState

        settings = self._plan.suggest(trial)
        workdir = self._folder / TRIALS / str(trial.number)
        told = f'trial {trial.number + 1} of {self._count}: {in_words(settings)}'
        self._say(f'{told} ...')
        begin, earlier = time.monotonic(), trial.user_attrs.get('seconds', 0.0)
        hopeless = False

        def look() -> bool:
            nonlocal hopeless
            hopeless = _report(trial, workdir) and self._plan.prune
            trial.set_user_attr('seconds', earlier + time.monotonic() - begin)
            return hopeless

        words = [f'--{knob}={value}' for knob, value in settings.items()]
        reason = train([*self._plan.words, *words, *_OF_TRIALS], workdir, self._signals, look)
        _report(trial, workdir)
        metric, scores = choice.read_scores(workdir)
        score = _score(workdir, scores)
        seconds = earlier + time.monotonic() - begin
        for name, value in (
            ('seconds', seconds), ('steps', max(scores, default=0)), ('metric', metric),
        ):  # fmt: skip
            trial.set_user_attr(name, value)
        for name in ('checkpoints', 'model', 'model_best'):
            shutil.rmtree(workdir / name, ignore_errors=True)
        took = telemetry.format_duration(seconds)
        if not reason and not math.isfinite(score):
            reason = 'its validation score is not finite'
        if hopeless:
            self._study.tell(trial, state=TrialState.PRUNED)
            self._say(f'{told}: ended early, below the median of the others ({took})')
        elif reason:
            trial.set_user_attr('reason', reason)
            self._study.tell(trial, state=TrialState.FAIL)
            self._say(f'{told}: FAILED: {reason}')
        else:
            self._study.tell(trial, score)
            self._say(f'{told}: {score_in_words(metric, score)} ({took})')

    def choose(self) -> dict[str, Any]:
        """The best trial, the first of equal ones."""
        from optuna.trial import TrialState

        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete:
            reasons = [t.user_attrs.get('reason') for t in self._study.get_trials(deepcopy=False)]
            raise UserError(f'not one trial succeeded; the last one: {reasons[-1]}')
        best = max(complete, key=lambda trial: trial.values[0])
        score = best.values[0]
        metric = best.user_attrs['metric']
        settings = self._plan.settings_of(best.params)
        told = score_in_words(metric, score)
        self._say(f'best of {len(complete)}: {in_words(settings)}, {metric} {told}')
        examples = self._data_of(best.number)['val']['examples']
        if examples < choice.FEW:
            self._say(
                f'WARNING: it was chosen on {examples} validation images; under {choice.FEW} the '
                'best of several is the best by luck'
            )
        return {
            'trial': best.number, 'settings': settings, 'metric': metric, 'score': score,
            'validation_images': examples, 'trials': len(complete),
        }  # fmt: skip

    def run_final(self, result: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Trains the chosen settings with a seed, and tells what was measured on test images."""
        workdir = self._folder / FINAL / f'trial{result["trial"]}-seed{seed}'
        words = [f'--{knob}={value}' for knob, value in result['settings'].items()]
        words += [*self._splits(result['trial']), f'--config.seed={seed}']
        self._say(f'seed {seed}: training the chosen settings ...')
        if reason := train([*self._plan.words, *words], workdir, self._signals):
            raise UserError(
                f'{workdir}: {reason}. The trials stay as they are; the same command tries it again'
            )
        rows = [row for _, row in telemetry.read_lines(workdir / telemetry.METRICS_FILE)]
        tested = next(row for row in reversed(rows) if 'loss_test' in row)
        measured = {name: value for name, value in tested.items() if name.endswith('_test')}
        shown = ', '.join(f'{name} {value:.4f}' for name, value in measured.items())
        self._say(f'seed {seed}: {shown}')
        return {'seed': seed, 'workdir': str(workdir.relative_to(self._folder)), **measured}

    def _splits(self, trial: int) -> list[str]:
        """What of the images the final runs take."""
        data = self._data_of(trial)
        train, val, test = (data[name]['split'] for name in ('train', 'val', 'test'))
        whole, without, _ = train.partition(' without ')
        words = [f'--config.pp.test={test}']
        if self._plan.retrain:
            train = whole if without else f'{train}+{val}'
            return [
                *words, f'--config.pp.train={train}', '--config.pp.val=',
                f'--config.eval_every={_NEVER}',
            ]  # fmt: skip
        return [*words, f'--config.pp.train={whole}', f'--config.pp.val={val.partition(" of ")[0]}']

    def _data_of(self, trial: int) -> dict[str, Any]:
        return files.read_json(self._folder / TRIALS / str(trial) / resume.DATA_FILE)


def _report(trial: 'optuna.Trial', workdir: pathlib.Path) -> bool:
    """Tells Optuna the scores so far; returns whether the trial is below the median of others."""
    if not (workdir / run_info.CONFIG_FILE).exists():
        return False
    total = files.read_json(workdir / run_info.CONFIG_FILE)['total_steps']
    known = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    for step, score in choice.read_scores(workdir)[1].items():
        tenth = _TENTHS * step // total
        if tenth < 1 or tenth in known or not math.isfinite(score):
            continue
        known.add(tenth)
        trial.report(score, tenth)
        if tenth < _TENTHS and trial.should_prune():
            return True
    return False


def _score(workdir: pathlib.Path, scores: Mapping[int, float]) -> float:
    """Of a run: the score of the step whose model it gives; NaN for none."""
    if not scores:
        return math.nan
    kept = resume.read_config(workdir / run_info.CONFIG_FILE).get('keep_best')
    finite = [score for score in scores.values() if math.isfinite(score)]
    return max(finite, default=math.nan) if kept else scores[max(scores)]


def _why(log: pathlib.Path, code: int) -> str:
    """Why a run failed: the last line that says so, else how its process ended."""
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines()[-100:]
    errors = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
    return errors[-1] if errors else f'{child.how_it_ended(code)}; see {log}'
