"""Downloads of large files: resumed, checked, put into place by a rename.

Not by `files.atomic_file`, which removes what a failed writer left: here the next call goes on with
`<target>.part`.
"""

import contextlib
import http.client
import logging
import os
import pathlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import BinaryIO

import filelock

from vit_jax.errors import UserError

_log = logging.getLogger(__name__)

MIB = 2**20
OPTION = '--config.pretrained=FILE'  # of training, which names a file
TIMEOUT_SECONDS = 30  # without a single byte

# Published sizes are rounded, 37.2 MiB to 37 for example.
_SIZE_TOLERANCE = 0.02


def fetch(
    url: str,
    target: pathlib.Path,
    *,
    published_mib: float | None = None,
    option: str = OPTION,
) -> pathlib.Path:
    """Downloads a file, unless it is there already.

    The bytes go to `<target>.part`; a download that was broken off goes on where it stopped, if the
    file on the server is still the same (by its ETag). When all has arrived it gets its name.
    Processes that want the same file take turns.

    Args:
        url: http or https address.
        target: where the file goes; its folder is made.
        published_mib: size that the file should have, in MiB, to 2 %; None if it is not known.
        option: how a user names a file instead, for messages.

    Returns:
        `target`.

    Raises:
        UserError: there is no connection, no such file, another size than published, no space, or
            the connection broke (then the next call goes on from there).
    """

    def failed(reason: object) -> UserError:
        return UserError(
            f'cannot download {url}: {reason}. If this machine has no access, get the file '
            f'elsewhere and put it at {target}, or name it with {option}'
        )

    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(target.name + '.lock')):
            if not target.exists():
                _download(url, target, published_mib)
    except urllib.error.HTTPError as e:
        e.close()
        raise failed(f'the server answers {e.code} {e.reason}') from e
    except (OSError, http.client.HTTPException) as e:
        raise failed(getattr(e, 'reason', e)) from e
    except ValueError as e:  # damaged headers: a length that is not a number, a broken tag
        raise failed(f'the answer of the server is not HTTP ({e})') from e
    return target


def _download(url: str, target: pathlib.Path, published_mib: float | None) -> None:
    part = target.with_name(target.name + '.part')
    with _open(url, part) as (response, offset):
        remaining = response.headers['Content-Length']
        total = None if remaining is None else offset + int(remaining)
        _check_size(total, published_mib)
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - offset > free:
            raise OSError(f'it needs {total:,} bytes, and only {free:,} are free there')
        _log.info('Downloading %s to %s', url, target)
        with open(part, 'r+b' if offset else 'wb') as f:
            f.seek(offset)
            _copy(response, f, offset, total, target.name)
            f.flush()
            os.fsync(f.fileno())
            size = f.tell()
    if total is not None and size != total:
        raise UserError(
            f'the download of {url} broke off after {size:,} of {total:,} bytes. Run the same '
            f'command again to go on from there (so far: {part})'
        )
    _check_size(size, published_mib)
    os.replace(part, target)
    _etag_file(part).unlink(missing_ok=True)


@contextlib.contextmanager
def _open(url: str, part: pathlib.Path) -> Iterator[tuple[http.client.HTTPResponse, int]]:
    """Opens `url` where `part` ends; yields the response and the offset of its first byte."""
    etag_file = _etag_file(part)
    headers = {'User-Agent': 'vit_jax'}
    offset = part.stat().st_size if part.exists() and etag_file.exists() else 0
    if offset:
        # The server sends everything (200) instead of the rest (206) if the file has changed.
        headers |= {'Range': f'bytes={offset}-', 'If-Range': etag_file.read_text()}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as e:
        if e.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        e.close()  # all of it is here, or more than that: start again
        etag_file.unlink()
        with _open(url, part) as opened:
            yield opened
        return
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            offset = 0
            etag_file.unlink(missing_ok=True)
            if etag := response.headers['ETag']:
                etag_file.write_text(etag)
        elif not response.headers.get('Content-Range', '').startswith(f'bytes {offset}-'):
            raise http.client.HTTPException('the server sent another range than it was asked for')
        yield response, offset


def _copy(
    response: http.client.HTTPResponse, f: BinaryIO, offset: int, total: int | None, name: str
) -> None:
    """Copies until the connection ends, with a progress bar on a terminal."""
    from rich import console, progress  # only a download needs them

    terminal = console.Console(stderr=True)
    columns = (
        progress.TextColumn('{task.description}'),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=offset)
        while block := response.read(MIB):
            f.write(block)
            bar.advance(task, len(block))


def _check_size(size: int | None, published_mib: float | None) -> None:
    if size is None or published_mib is None:
        return
    if abs(size / MIB - published_mib) > _SIZE_TOLERANCE * published_mib:
        raise OSError(f'it has {size / MIB:.2f} MiB there, the released file {published_mib:g}')


def _etag_file(part: pathlib.Path) -> pathlib.Path:
    return part.with_name(part.name + '.etag')
