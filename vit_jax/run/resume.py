"""Whether a run may use its workdir: one run at a time, resumed only with what it began with.

A resumed run equals an uninterrupted one only if neither the settings nor the examples changed.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import filelock
import ml_collections
from flax import traverse_util

from vit_jax import files
from vit_jax.configs import common
from vit_jax.errors import UserError

LOCK_FILE = '.lock'
DATA_FILE = 'data.json'

# Settings that do not change what is learned. All others stay as they were when the run began.
FREE = frozenset({
    # Where and how to read. The examples themselves are compared by `check_data`.
    'dataset', 'columns', 'image_root', 'group', 'tfds_data_dir', 'tfds_manual_dir', 'data_threads',
    'cache', 'max_unreadable',
    # How often to report, what to keep, what to put up with.
    'batch_eval', 'progress_every', 'eval_every', 'checkpoint_every', 'keep_checkpoints',
    'keep_best', 'patience', 'test_at_end', 'profile', 'tracker', 'report', 'nan_policy',
    'check_memory',
    # How it is computed.
    'compile_cache', 'deterministic', 'attention', 'remat', 'scan_layers', 'fsdp',
})  # fmt: skip


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Locks the workdir for this process; the system releases it however the process ends.

    A folder that was made for the lock, and has nothing else in it in the end, is removed again.

    Raises:
      UserError: another run holds it, or the folder cannot be written.
    """
    workdir = pathlib.Path(workdir).absolute()
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    file = workdir / LOCK_FILE
    # Not a file whose existence is the lock: one that a killed process left would lock for ever.
    lock = filelock.FileLock(file, fallback_to_soft=False)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        holder = ' '.join(file.read_text(encoding='utf-8', errors='replace').split())
        raise UserError(
            f'another run is at work in {workdir} ({holder or "another process"}): wait for it, '
            'stop it, or use another --workdir'
        ) from error
    except OSError as error:
        what = 'written'
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            what = 'locked, so that two runs could mix in it'
        raise UserError(
            f'the workdir {workdir} cannot be {what} ({error.strerror}): use another --workdir'
        ) from error
    try:
        now = datetime.datetime.now().isoformat(sep=' ', timespec='seconds')
        file.write_text(f'process {os.getpid()} on {socket.gethostname()}, since {now}\n')
        yield
    finally:
        if made and os.listdir(workdir) == [LOCK_FILE]:
            file.unlink()
            with contextlib.suppress(OSError):  # somebody put something there
                for folder in made:
                    folder.rmdir()
        lock.release()


def learned_from(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings that say what is learned, by dotted names; what is no number is a text."""
    found = {
        name: value
        for name, value in _flatten(config.to_dict()).items()
        if name == 'dataset' or name.partition('.')[0] not in FREE
    }
    simple = (bool, int, float, str)
    return {name: v if isinstance(v, simple) else str(v) for name, v in found.items()}


def check_config(saved: pathlib.Path, config: Mapping[str, Any]) -> list[str]:
    """Compares the settings of a run with those it began with.

    Args:
      saved: the `config.json` of the run.
      config: resolved settings of now, nested, as JSON would give them back.

    Returns:
      The settings that changed and may, one text each: `eval_every: 100 -> 50`.

    Raises:
      UserError: settings changed that must not (`FREE` lists those that may), or the file is
        missing or damaged.
    """
    before, now = read_config(saved), _flatten(config)
    defaults = _flatten(common.get_defaults().to_dict())
    defaults |= {'model.act': 'gelu_tanh', 'model.layer_norm_eps': 1e-6}
    before.pop('data_processes', None)  # a knob of earlier versions that changed no result
    if before.get('loss') == 'softmax' and not now.get('loss'):  # the default of earlier versions
        before['loss'] = ''
    # Knobs that are newer than the run: without them, it did what their defaults do.
    changed = _differences({n: defaults[n] for n in now if n in defaults} | before, now)
    bound = [text for name, text in changed.items() if name.split('.')[0] not in FREE]
    if 'total_steps' in changed:
        bound.append(
            'the learning rate falls to its end over total_steps, so that more of them cannot be '
            'put on: to train the model of a finished run further, start from it in another '
            f'workdir with --config.pretrained={saved.parent / "model"} --config.keep_head=True'
        )
    if bound:
        raise UserError(
            f'{saved.parent} holds a run with other settings ({"; ".join(bound)}). To go on with '
            'it, use the old values; to start another, use another --workdir. What may change in '
            f'between: {", ".join(sorted(FREE))}'
        )
    return list(changed.values())


def read_config(saved: pathlib.Path) -> dict[str, Any]:
    """The settings that a run began with, by dotted names, from its `config.json`.

    Raises:
      UserError: the file is missing or damaged.
    """
    return _read(saved, 'the settings this run began with')


def check_data(saved: pathlib.Path, data: Mapping[str, Any]) -> None:
    """Compares the examples of a run with those it began with.

    Args:
      saved: the `data.json` of the run.
      data: description of the examples of now, nested, as JSON would give it back.

    Raises:
      UserError: they differ, or the file is missing or damaged.
    """
    before, now = _read(saved, 'which examples this run began with'), _flatten(data)
    if 'teacher' not in before:  # of earlier versions, which did not tell
        now.pop('teacher', None)
    changed = _differences(before, now)
    if changed:
        parts = sorted({'loss_fn', 'tx', 'model'} & changed.keys())
        what = f'of the caller, {" and ".join(parts)}' if parts else 'the dataset'
        if changed.keys() == {'teacher'}:
            what = 'the model that config.teacher names'
        raise UserError(
            f'{what} is another than when the run in {saved.parent} began '
            f'({"; ".join(changed.values())}). Put it back as it was, or use another --workdir'
        )


def _read(path: pathlib.Path, what: str) -> dict[str, Any]:
    try:
        return _flatten(files.read_json(path))
    except UserError as error:
        raise UserError(
            f'{error}. It says {what}: put the file back, or use another --workdir'
        ) from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Name -> `name: old -> new` of the values that differ; null where there is none."""
    return {
        name: f'{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}'
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value, as JSON gives it back."""
    return traverse_util.flatten_dict(json.loads(json.dumps(settings)), sep='.')


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + '...'
