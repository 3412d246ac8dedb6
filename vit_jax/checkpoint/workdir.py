"""The checkpoints of a run: `<workdir>/checkpoints/<step>`, written by Orbax, verified by us.

Orbax writes asynchronously and renames a complete checkpoint into place, so a run that is killed
leaves the last complete one. It does not notice damage, though: a flipped byte loads silently as
another number. So every leaf gets a checksum, computed on the devices from the live state and
stored in the checkpoint's own metadata (committed by the same rename as the data); a checkpoint
counts only when what was read has the same checksums.

Deleting is our own, too: Orbax removes a folder file by file, and a kill in between leaves half a
checkpoint that it still lists. Here a folder is renamed first (`trash-<step>`), then removed.
(`files.atomic_folder` does neither: Orbax writes in the background, from several processes.)
"""

import contextlib
import errno
import gc
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vit_jax import files
from vit_jax.checkpoint import checksums
from vit_jax.errors import UserError

_log = logging.getLogger(__name__)

_METADATA_KEY = 'vit_jax'

# Bytes that Orbax compresses and writes at a time, unless one array is larger. Without a limit a
# save takes up to one and a half times the state more than the copy that it makes of it.
WRITTEN_AT_ONCE = 128 * 2**20

# How long reads of a checkpoint go on after Orbax has given up on it: measured, half a second.
_LEFTOVERS_SECONDS = 0.6


class Checkpoints:
    """Saves and restores the state of one run. A context manager; `close` waits for the last save.

    With several processes every process calls every method, with the same arguments.

    Example:
        with Checkpoints('runs/x', keep=2) as checkpoints:
            restored = checkpoints.restore_latest(abstract_state)
            step, state = restored or (0, init())
            ...
            checkpoints.save(step, state)
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 1):
        """Removes what an interrupted run left unfinished; reads nothing.

        Args:
            workdir: folder of the run on a local or shared disk; made by the first `save`.
            keep: how many of the newest checkpoints stay. At least 1; with 1 there is no older one
                to fall back to when the newest is damaged.

        Raises:
            ValueError: keep < 1.
        """
        if keep < 1:
            raise ValueError(f'keep={keep}: at least one checkpoint has to be kept')
        self._folder = pathlib.Path(workdir).absolute() / 'checkpoints'
        self._keep = keep
        self._known: set[int] = set()  # steps that this object has saved or verified
        self._protected: int | None = None  # a step that stays although it is not among the newest
        self._pending: tuple[int, Any] | None = None  # a save that is on its way: step, response
        self._quiet = _QuietOrbax()
        self._quiet.install()
        self._sweep()

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the steps that have a complete, perhaps damaged, checkpoint; ascending."""
        return saved_steps(self._folder.parent)

    def save(self, step: int, state: Any) -> None:
        """Starts to save `state` as the checkpoint of `step`.

        Returns as soon as checksums are computed and the values are copied, so `state` may be
        donated right after; the files are written in the background. Waits for the save before it,
        and then removes the checkpoints that are neither among the `keep` newest nor protected. A
        step that this object has saved or restored already is not written again.

        Args:
            step: number of finished optimizer steps, 0 or more.
            state: a pytree whose leaves are jax.Arrays of any shape, dtype and sharding.

        Raises:
            TypeError: a leaf is not a jax.Array.
            UserError: the folder has a checkpoint of this step, and this object did not write it;
                or the save before could not be written.
        """
        from orbax.checkpoint import v1 as ocp  # slow to import, and only runs that save need it

        self.wait()
        if step in self._known:
            return
        path = self._folder / str(step)
        if path.exists():
            raise UserError(
                f'{path} exists already, from another run. Use another workdir, or remove that '
                'folder'
            )
        sums, leaves = checksums.checksums(state), checksums.describe(state)
        digest = checksums.digest([leaves, sums])
        metadata = {'leaves': leaves, 'checksums': sums, 'digest': digest}
        try:
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
            context, sizes = ocp.Context(), [leaf.nbytes for leaf in jax.tree.leaves(state)]
            if sum(sizes) > WRITTEN_AT_ONCE:
                limit = max(WRITTEN_AT_ONCE, 2 * max(sizes))
                context.memory.write_concurrent_bytes = limit
            with context:
                response = ocp.save_async(path, state, custom_metadata={_METADATA_KEY: metadata})
        except Exception as error:  # as for `wait`
            raise self._not_written(step, error) from error
        self._pending = step, response
        self._known.add(step)

    def protect(self, step: int) -> None:
        """Keeps the checkpoint of this step whatever its age, instead of the one before it.

        Args:
            step: saved, or about to be.
        """
        self._protected = step

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """Restores the newest checkpoint whose checksums hold.

        A damaged one that is newer is named in a warning and renamed to `damaged-<step>`.

        Args:
            abstract_state: pytree with the structure of the state; its leaves have `shape`, `dtype`
                and `sharding` (jax.ShapeDtypeStruct, or arrays). Any sharding, whatever it was
                saved with.

        Returns:
            (step, state) with the structure, dtypes and shardings of `abstract_state`, or None if
            there is no checkpoint yet.

        Raises:
            UserError: there are checkpoints, but of another model or optimizer, or all are damaged.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            state, problem = self._read_and_verify(step, abstract_state)
            if problem:
                damaged[step] = problem
                continue
            for bad in damaged:
                self._set_aside(bad)
            _agreed(True)  # no process continues, and perhaps saves, before the names are free
            self._known.add(step)
            return step, state
        if damaged:
            raise UserError(
                f'none of the checkpoints in {self._folder} can be used (steps '
                f'{", ".join(map(str, damaged))}: {next(iter(damaged.values()))}). '
                'To start again from the beginning, remove that folder or use another workdir'
            )
        return None

    def restore(self, step: int, abstract_state: Any) -> Any | None:
        """Restores the checkpoint of one step, as `restore_latest` does.

        Returns:
            The state, or None if that checkpoint is damaged (a warning says how) or not there.
        """
        self.wait()
        return self._read_and_verify(step, abstract_state)[0] if step in self.steps() else None

    def wait(self) -> None:
        """Waits until the last save is complete on disk, then removes old checkpoints.

        Raises:
            UserError: it could not be written (disk full, no permission, ...); what was written of
                it is removed, earlier checkpoints are as they were.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:  # Orbax raises many types, ValueError for a full disk
            raise self._not_written(step, error) from error
        for old in self.steps()[: -self._keep]:
            if old != self._protected:
                self._remove(old)

    def _not_written(self, step: int, error: Exception) -> UserError:
        """Removes what was written of a checkpoint, and returns the error to raise."""
        self._quiet.stay_silent()
        self._known.discard(step)
        if jax.process_index() == 0:
            for path in self._folder.glob(f'{step}.orbax-checkpoint-tmp*'):
                shutil.rmtree(path, ignore_errors=True)
        reason = ' '.join(str(error).split())
        # tensorstore's messages end with the system's words: "... to file 14: No space left on ..."
        known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
        words = next((os.strerror(n) for n in known if os.strerror(n) in reason), reason[:300])
        kept = ', '.join(map(str, self.steps()))
        earlier = (
            f'the checkpoints of steps {kept} are intact' if kept else 'there is no earlier one'
        )
        return UserError(
            f'the checkpoint of step {step} could not be written to {self._folder} ({words}); '
            f'{earlier}. Make room or set the permissions, and run the same command again to go on'
        )

    def close(self) -> None:
        """Waits for the last save, as `wait`; the object must not be used afterwards."""
        try:
            self.wait()
        finally:
            self._quiet.remove()

    def _read_and_verify(self, step: int, abstract_state: Any) -> tuple[Any, str]:
        """(state, '') or, with a warning, (None, what is damaged); the same in all processes."""
        problem = ''
        with self._quiet.while_loading():
            try:
                state, saved = self._read(step, abstract_state)
            except (UserError, MemoryError):
                raise
            except Exception as e:  # Orbax raises many types for damage, bare Exception among them
                problem = f'{type(e).__name__}: {e}'
            if problem:
                # Collect here what the failed load leaves behind, while its complaints are hidden.
                time.sleep(_LEFTOVERS_SECONDS)
                gc.collect()
        # Checksums are computed by all processes together, so all must have come this far.
        if not _agreed(not problem):
            problem = problem or 'another process cannot read it'
        else:
            problem = checksums.compare(checksums.checksums(state), saved)
        if not problem:
            return state, ''
        problem = ' '.join(problem.split())[:300]
        path = self._folder / str(step)
        _log.warning('The checkpoint %s is damaged and not used: %s', path, problem)
        return None, problem

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, int]]:
        """(state, not verified yet, its checksums when it was saved), each process for itself.

        A UserError says that it has another structure, any other exception that it is damaged.
        """
        from orbax.checkpoint import v1 as ocp

        path = self._folder / str(step)
        # Read as JSON: Orbax's reader takes a damaged file for an empty one.
        metadata = files.parse_json((path / '_CHECKPOINT_METADATA').read_bytes())
        saved = metadata['custom_metadata'][_METADATA_KEY]
        if saved['digest'] != checksums.digest([saved['leaves'], saved['checksums']]):
            raise ValueError('its metadata do not match their own digest')
        checksums.check_structure(path, saved['leaves'], checksums.describe(abstract_state))
        abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), abstract_state
        )
        # No barriers with other processes: one that finds damage would leave the rest waiting.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'process_{me}'
        )
        with ocp.Context(multiprocessing_options=alone):
            state = ocp.load(path, abstract_state)
        # Typed keys come back with an equivalent sharding that is spelled otherwise, and the first
        # step would be compiled again. Where nothing differs this moves nothing.
        state = jax.tree.map(
            lambda x, want: jax.device_put(x, want.sharding), state, abstract_state
        )
        return state, saved['checksums']

    def _sweep(self) -> None:
        """Removes what killed runs left: half-removed checkpoints and half-written ones."""
        if jax.process_index() != 0 or not self._folder.is_dir():
            return
        for path in sorted(self._folder.iterdir()):
            if path.name.startswith('trash-'):
                shutil.rmtree(path)
            elif '.orbax-checkpoint-tmp' in path.name:
                _log.warning('Removing %s, a checkpoint that was never finished', path.name)
                shutil.rmtree(path)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; half of it never has its name."""
        self._known.discard(step)
        if jax.process_index() == 0:
            trash = self._folder / f'trash-{step}'
            os.rename(self._folder / str(step), trash)
            shutil.rmtree(trash)

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint: it must not count as one to keep, nor be in the way."""
        if jax.process_index() == 0:
            aside = self._folder / f'damaged-{step}'
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(self._folder / str(step), aside)


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Returns the steps that have a complete, perhaps damaged, checkpoint; ascending."""
    folder = pathlib.Path(workdir) / 'checkpoints'
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if re.fullmatch(r'\d+', p.name))


def _agreed(ok: bool) -> bool:
    """Whether `ok` holds in all processes: they must restore the same step."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


class _QuietOrbax(logging.Filter):
    """Keeps Orbax's noise off the console: what it raises is reported by us, in one line.

    It logs through absl's logger, like others, so its records are recognised by their file.
    """

    _LOGGERS = ('absl', 'asyncio')

    def __init__(self) -> None:
        super().__init__()
        self._silent = self._stays = False
        self._hook = sys.unraisablehook

    def install(self) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).addFilter(self)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._show

    def remove(self) -> None:
        if self._stays:
            return
        for name in self._LOGGERS:
            logging.getLogger(name).removeFilter(self)
        sys.unraisablehook = self._hook

    def _show(self, unraisable: Any) -> None:
        # tensorstore raises this for writes that end after Orbax has given up on a save.
        if str(unraisable.exc_value) != 'Event loop is closed':
            self._hook(unraisable)

    def stay_silent(self) -> None:
        """Hides what a failed save goes on to report until the process ends.

        Its other threads fail later, and its tasks complain when they are collected.
        """
        self._silent = self._stays = True

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == 'asyncio':
            return not self._silent
        if f'{os.sep}orbax{os.sep}' not in record.pathname:
            return True
        # Its errors are tracebacks of what it raises a moment later.
        return record.levelno == logging.WARNING and not self._silent

    @contextlib.contextmanager
    def while_loading(self) -> Iterator[None]:
        """Silences all of Orbax while it loads: its complaints are about damage, raised as well.

        A failed load gives up with other reads under way. Their tasks are never awaited, end on a
        closed event loop, or raise when they are collected: it cannot be caught, only hidden.
        """
        self._silent, unraisablehook = True, sys.unraisablehook
        sys.unraisablehook = lambda unraisable: None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
                yield
        finally:
            self._silent, sys.unraisablehook = self._stays, unraisablehook
