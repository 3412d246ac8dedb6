"""Processes that make training batches, for machines where threads wait for Python's lock.

A process gets the dataset once and then step numbers, over a socket; it answers with the batch of
that step. Images lie in anonymous shared memory, whose descriptor is sent along once (not in
/dev/shm: containers have 64 MB of it). It is written again when nobody holds the batch any more:
filling new pages took 26 ms for 32 images of 224 px, and the same ones 2.5 ms.

A process ends when its socket is closed, so also when the one that started it is killed. SIGTERM
and Ctrl-C, which may reach all processes of a run, are for the one that trains; the others start
with them blocked.
"""

import collections
import contextlib
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError

_CHILD = (
    'import sys; sys.path[:] = sys.argv[2:]; '
    'from vit_jax.data import workers; workers.serve(int(sys.argv[1]))'
)
_LEFT_TO_THE_PARENT = (signal.SIGTERM, signal.SIGINT)
_CLOSED = (EOFError, BrokenPipeError, ConnectionResetError)
_ENDS_WITHIN = 10.0  # seconds, once its socket is closed from its side


def read_ahead(
    dataset: Any, start: int, threads: int, processes: int, ahead: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches start, start + 1, ... of a dataset, made in other processes.

    Args:
      dataset: a `loader.TrainDataset`.
      start: the first step.
      threads: over all processes; each has at least one.
      processes: at least 1.
      ahead: batches that are under way or wait, at least 1.

    Yields:
      What `dataset[step]` gives, to the byte.

    Raises:
      UserError: a process has died, or cannot be given the dataset.
      Exception: what making a batch raised.
    """
    try:
        pickled = pickle.dumps((dataset, max(1, threads // processes)))
    except Exception as error:  # noqa: BLE001  (anything may be in a source)
        raise UserError(
            f'config.data_processes={processes}: the dataset cannot be sent to other processes '
            f'({error}); use --config.data_processes=0'
        ) from error
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_Child()) for _ in range(processes)]
        for child in children:  # all are starting by now
            child.set_up(pickled)
        for step in range(start, start + ahead):
            children[step % processes].ask(step)
        step = start
        while True:
            batch, errors = children[step % processes].batch(step)
            children[(step + ahead) % processes].ask(step + ahead)
            for error in errors:
                dataset.on_bad(error)
            yield batch
            step += 1


class _Child:
    """One process, as the one that started it sees it."""

    def __init__(self):
        self._socket, theirs = socket.socketpair()
        # A blocked signal stays blocked in the program that is started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_PARENT)
        try:
            self._process = subprocess.Popen(
                [sys.executable, '-c', _CHILD, str(theirs.fileno()), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._connection = Connection(os.dup(self._socket.fileno()))
        self._answers: dict[int, tuple] = {}
        self._memory: dict[int, mmap.mmap] = {}
        self._free: collections.deque[int] = collections.deque()  # what it may write over

    def __enter__(self) -> '_Child':
        return self

    def __exit__(self, *exc_info: object) -> None:
        # It owns nothing that would have to be put away.
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._socket.close()

    def set_up(self, setup: bytes) -> None:
        """Gives it the dataset and the number of its threads, pickled."""
        with self._alive():
            self._connection.send_bytes(setup)

    def ask(self, step: int) -> None:
        """Asks for the batch of a step."""
        free = [self._free.popleft() for _ in range(len(self._free))]
        with self._alive():
            self._connection.send((step, free))

    def batch(self, step: int) -> tuple[dict[str, np.ndarray], list]:
        """Waits for the batch of a step that was asked for, and errors of images in it."""
        while step not in self._answers:  # threads may overtake each other
            with self._alive():
                number, *answer = self._connection.recv()
                if isinstance(answer[0], BaseException):
                    raise answer[0]
                batch, image, errors = answer
                if image.memory not in self._memory:
                    _, (descriptor,), _, _ = socket.recv_fds(self._socket, 1, 1)
                    self._memory[image.memory] = _map(descriptor, image)
            pixels = np.frombuffer(self._memory[image.memory], image.dtype)
            # Whatever is made of it, a view or an array of JAX, refers to this one.
            weakref.finalize(pixels, self._free.append, image.memory)
            batch['image'] = pixels.reshape(image.shape)
            self._answers[number] = batch, errors
        return self._answers.pop(step)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Says in one sentence that the process has died, where that shows."""
        try:
            yield
        except _CLOSED as error:
            try:
                status = self._process.wait(_ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                how = 'does not answer any more'
            else:
                how = f'ended with status {status}; what it said stands above'
                if status < 0:
                    how = f'was ended by {signal.Signals(-status).name}'
                if status == -signal.SIGKILL:
                    how += ', which the system sends where memory runs out'
            raise UserError(
                f'a process that reads images {how}. The same command goes on from the last '
                'checkpoint; fewer --config.data_processes need less memory'
            ) from error


class _Image(NamedTuple):
    """Images of a batch, in shared memory of this number."""

    memory: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _map(descriptor: int, image: _Image) -> mmap.mmap:
    """Shared memory; the descriptor is not needed any more."""
    try:
        return mmap.mmap(descriptor, image.size)
    finally:
        os.close(descriptor)


def serve(descriptor: int) -> None:
    """What such a process does: makes the batches it is asked for, until the socket is closed.

    Args:
      descriptor: of the socket.
    """
    import cv2

    cv2.setNumThreads(0)  # as `loader` does
    link = _Link(descriptor)
    with contextlib.suppress(*_CLOSED):
        link.dataset, threads = link.receive_setup()
        others = [threading.Thread(target=link.work) for _ in range(threads - 1)]
        for thread in others:
            thread.start()
        link.work()
        for thread in others:
            thread.join()


class _Link:
    """The socket, as the process that makes batches sees it; shared by its threads."""

    def __init__(self, descriptor: int):
        self.dataset: Any = None
        self._socket = socket.socket(fileno=descriptor)
        self._connection = Connection(os.dup(descriptor))
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._making = threading.Lock()
        self._memory: list[mmap.mmap] = []
        self._new: dict[int, int] = {}  # descriptors of what the other side does not have yet
        self._free: collections.deque[int] = collections.deque()

    def receive_setup(self) -> tuple[Any, int]:
        """The dataset, and the number of threads."""
        return pickle.loads(self._connection.recv_bytes())

    def work(self) -> None:
        """Makes batches until the socket is closed."""
        with contextlib.suppress(*_CLOSED):
            while True:
                with self._reading:
                    step, free = self._connection.recv()
                self._free.extend(free)
                self._answer(step)

    def _answer(self, step: int) -> None:
        made: list[_Image] = []

        def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            made.append(self._take(shape, np.dtype(dtype).str))
            return np.frombuffer(self._memory[made[0].memory], dtype).reshape(shape)

        try:
            batch, errors = self.dataset.batch_and_errors(step, empty)
        except BaseException as error:  # noqa: BLE001  (is raised where the batch is taken)
            answer = _pickled_error(step, error)
            with self._writing:
                self._connection.send_bytes(answer)
            return
        del batch['image']
        (image,) = made
        with self._writing:
            self._connection.send((step, batch, image, errors))
            descriptor = self._new.pop(image.memory, None)
            if descriptor is not None:
                socket.send_fds(self._socket, [b'.'], [descriptor])
                os.close(descriptor)

    def _take(self, shape: tuple[int, ...], dtype: str) -> _Image:
        """Memory for the images of a batch; all batches are of one size."""
        with contextlib.suppress(IndexError):
            return _Image(self._free.popleft(), shape, dtype)
        with self._making:
            image = _Image(len(self._memory), shape, dtype)
            descriptor = _anonymous(image.size)
            self._new[image.memory] = descriptor
            self._memory.append(_map(os.dup(descriptor), image))
        return image


def _pickled_error(step: int, error: BaseException) -> bytes:
    """The answer that a batch cannot be made."""
    where = traceback.format_exc()
    error.add_note(where)
    try:
        return pickle.dumps((step, error))
    except Exception:  # noqa: BLE001  (an exception may hold anything)
        return pickle.dumps((step, RuntimeError(where)))


def _anonymous(size: int) -> int:
    """The descriptor of so much memory that other processes can be given."""
    if hasattr(os, 'memfd_create'):
        descriptor = os.memfd_create('vit_jax batch')
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
