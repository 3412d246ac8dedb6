"""Standard input and output that may be full, closed, or a pipe whose reader is gone.

The only place that deals with it: every command and every run calls `guard` first.
"""

import contextlib
import io
import logging
import os
import select
import signal
import sys

from vit_jax.errors import printable_lines


class _Output(io.RawIOBase):
    """A standard stream of which, after the first failure, the rest is dropped.

    Args:
      descriptor: where to write.
      go_on: whether a failure is hidden from whoever writes; otherwise it ends the process.
    """

    def __init__(self, descriptor: int, go_on: bool):
        self.go_on = go_on
        self._descriptor = descriptor
        self._lost = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data) -> int:
        if self._lost:
            return len(data)
        try:
            return self._write(data)
        except OSError as error:
            self._lost = True
            if isinstance(error, BrokenPipeError):  # its reader has enough, as `head`
                status, reason = 128 + signal.SIGPIPE, ''
            else:
                status = 1
                reason = f'standard output cannot be written ({error.strerror})'
                reason += ', the rest goes on' if self.go_on else ''
            if reason and self._descriptor != 2:
                print(f'{os.path.basename(sys.argv[0])}: {reason}', file=sys.stderr)
            if not self.go_on:
                raise SystemExit(status) from error
            return len(data)

    def _write(self, data) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # somebody made the pipe so; it is only full for the moment
                select.select((), (self._descriptor,), ())


def printable_record(record: logging.LogRecord) -> bool:
    """A filter of a log handler: names in messages of this package are made safe to show."""
    if record.name.startswith('vit_jax'):
        record.msg, record.args = printable_lines(record.getMessage()), ()
    return True


def guard(*, go_on: bool) -> None:
    """Makes the standard streams safe to use, and keeps them so.

    What is closed is opened as an empty file, or one that takes everything: else the next file to
    be opened would become standard output. Characters that cannot be written are escaped.

    Args:
      go_on: what happens when standard output cannot be written. True: the process goes on, and
        what it prints is lost: for what writes files. False: it ends, after a line on standard
        error, or quietly if the reader of a pipe has enough. Standard error is never missed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding='utf-8')
    if logging.lastResort:
        logging.lastResort.addFilter(printable_record)
    sys.stdout = _guarded(sys.stdout, sys.__stdout__, 1, go_on)
    sys.stderr = _guarded(sys.stderr, sys.__stderr__, 2, True)


def _guarded(stream, original, descriptor: int, go_on: bool):
    """The stream to use in place of one of Python's."""
    if isinstance(raw := getattr(getattr(stream, 'buffer', None), 'raw', None), _Output):
        raw.go_on = go_on
        return stream
    if stream is not original:  # a notebook's, a test's
        return stream
    encoding = stream.encoding if stream else 'utf-8'
    line_buffering = stream.line_buffering if stream else False
    if stream is None:
        descriptor = os.open(os.devnull, os.O_WRONLY)
    else:
        with contextlib.suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, go_on)),
        encoding,
        errors='backslashreplace',
        line_buffering=line_buffering,
        write_through=getattr(stream, 'write_through', False),
    )
