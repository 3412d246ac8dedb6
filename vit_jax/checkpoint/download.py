"""Downloads of large files: resumed, checked, put into place by a rename.

Not by `files.atomic_file`, which removes what a failed writer left: here the next call goes on with
`<target>.part`. Beside that lies `<target>.part.etag`, which the server compares with its file. It
is removed before the part is cut off and written after, so a part never lies beside another file's.
"""

import base64
import contextlib
import errno
import hashlib
import http.client
import logging
import os
import pathlib
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import BinaryIO

import filelock

from vit_jax import files
from vit_jax.errors import UserError

_log = logging.getLogger(__name__)

MIB = 2**20
OPTION = '--config.pretrained=FILE'  # of training, which names a file
TIMEOUT_SECONDS = 30  # without a single byte
MIN_SPEED = 1024  # bytes a second, on average over
SPEED_SECONDS = 120
# Where the server does not say how much will come; the largest released file has 2.4 GiB.
MAX_UNKNOWN_MIB = 8 * 1024

# Published sizes are rounded, 37.2 MiB to 37 for example.
_SIZE_TOLERANCE = 0.02
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')  # RFC 9110, 8.8.3


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
    Processes that want the same file take turns. Address, length and ETag are kept in
    `<target>.source.json`; `source_of` tells them, wherever the weights are opened.

    Args:
        url: http or https address; another kind is refused, also when the server leads to it.
        target: where the file goes; its folder is made.
        published_mib: size that the file should have, in MiB, to 2 %; None if it is not known.
        option: how a user names a file instead, for messages.

    Returns:
        `target`.

    Raises:
        UserError: there is no connection, no such file, another size than published or another
            checksum than the server's, no space, or the connection broke or was too slow (then the
            next call goes on from there).
    """

    def failed(reason: object) -> UserError:
        return UserError(
            f'cannot download {url}: {reason}. If this machine has no access, get the file '
            f'elsewhere and put it at {target}, or name it with {option}'
        )

    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.with_name(target.name + '.lock')):
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


def source_of(target: pathlib.Path) -> str:
    """Where a file was downloaded from, a sentence; '' if it was not, or is another by now."""
    record = _source_file(target)
    if record.exists():
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            source = files.read_json(record, max_bytes=MIB)
            if source['bytes'] == target.stat().st_size:
                return (
                    f'downloaded from {source["url"]} on {source["date"]}: {source["bytes"]:,} '
                    f'bytes, ETag {source["etag"] or "unknown"}'
                )
    return ''


@contextlib.contextmanager
def _locked(file: pathlib.Path) -> Iterator[None]:
    lock = filelock.FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise OSError(
            f'its folder cannot be locked ({e.strerror}): name another one in VIT_JAX_CACHE'
        ) from e
    try:
        yield
    finally:
        lock.release()


def _download(url: str, target: pathlib.Path, published_mib: float | None) -> None:
    part = target.with_name(target.name + '.part')
    with _open(url, part) as (response, offset):
        headers = response.headers
        remaining = headers['Content-Length']
        total = None if remaining is None else offset + int(remaining)
        if total is not None and total <= 0:
            raise ValueError(f'a length of {total}')
        _check_size(total, published_mib)
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - offset > free:
            raise OSError(f'it needs {total:,} bytes, and only {free:,} are free there')
        _log.info('Downloading %s to %s', url, target)
        etag = _etag(headers)
        if not offset:
            _begin(part, etag)
        most = (published_mib or MAX_UNKNOWN_MIB) * (1 + _SIZE_TOLERANCE) * MIB
        try:
            with open(part, 'r+b') as f:
                f.seek(offset)
                _copy(response, f, offset, total, most if total is None else total, target.name)
                f.flush()
                os.fsync(f.fileno())
                size = f.tell()
            if total is not None and size != total:
                again = f'go on from there (so far: {part})' if etag else 'begin anew'
                raise UserError(
                    f'the download of {url} broke off after {size:,} of {total:,} bytes. Run the '
                    f'same command again to {again}'
                )
            if not size:
                raise OSError('the server sent nothing')
        except BaseException:
            if not etag:  # what the server cannot tell from another file is of no use
                part.unlink(missing_ok=True)
            raise
    _check_size(size, published_mib)
    _check_hash(headers, part)
    date = time.strftime('%Y-%m-%d %H:%M:%S')
    source = {'url': url, 'bytes': size, 'etag': etag, 'date': date}
    files.write_json(_source_file(target), source)
    os.replace(part, target)
    _etag_file(part).unlink(missing_ok=True)


def _begin(part: pathlib.Path, etag: str) -> None:
    """Makes an empty part of a new file; however far it comes, it is never taken for the old one.

    Args:
        part: where it is made.
        etag: of the new file; '' for one that cannot be resumed.
    """
    _etag_file(part).unlink(missing_ok=True)
    part.write_bytes(b'')
    if etag:
        files.write_text(_etag_file(part), etag)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only; urllib would follow those to ftp."""

    def redirect_request(self, request, fp, code, msg, headers, newurl):  # noqa: D102
        _check_scheme(newurl, request.full_url)
        fp.close()  # else all that comes with the redirect is read, however much that is
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def _check_scheme(url: str, origin: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ('http', 'https') or (scheme == 'http' and origin.startswith('https:')):
        raise OSError(f'it leads to {url[:300]}, and only https and http are followed')


@contextlib.contextmanager
def _open(url: str, part: pathlib.Path) -> Iterator[tuple[http.client.HTTPResponse, int]]:
    """Opens `url` where `part` ends; yields the response and the offset of its first byte."""
    etag_file = _etag_file(part)
    etag = etag_file.read_text() if part.exists() and etag_file.exists() else ''
    offset = part.stat().st_size if _STRONG_ETAG.fullmatch(etag) else 0
    response = _request(url, offset, etag)
    if response is None:  # the part is no part of what is there now
        etag_file.unlink()
        response = _request(url, 0, '')
    assert response is not None  # without an offset there is nothing to go on from
    with response:
        yield response, offset if response.status == http.client.PARTIAL_CONTENT else 0


def _request(url: str, offset: int, etag: str) -> http.client.HTTPResponse | None:
    """Asks for a file from `offset` on; None if it does not go on there."""
    headers = {'User-Agent': 'vit_jax'}
    if offset:
        # The server sends everything (200) instead of the rest (206) if the file has changed.
        headers |= {'Range': f'bytes={offset}-', 'If-Range': etag}
    _check_scheme(url, url)
    opener = urllib.request.build_opener(_Redirects)
    request = urllib.request.Request(url, headers=headers)
    try:
        response = opener.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as e:
        if not offset or e.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        e.close()
        return None
    is_part = response.status == http.client.PARTIAL_CONTENT and offset
    if response.status == http.client.OK or (
        is_part
        and response.headers.get('Content-Range', '').startswith(f'bytes {offset}-')
        and response.headers['ETag'] in (None, etag)  # else it does not know If-Range
    ):
        return response
    response.close()
    if is_part:
        return None
    raise http.client.HTTPException(
        f'the server answers {response.status} {response.reason}, which is not a whole file'
    )


def _copy(
    response: http.client.HTTPResponse,
    f: BinaryIO,
    offset: int,
    total: int | None,
    most: float,
    name: str,
) -> None:
    """Copies until the connection ends, with a progress bar on a terminal."""
    from rich import console, progress  # only a download needs them

    terminal = console.Console(stderr=True)
    columns = (
        progress.TextColumn('{task.description}', markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    place, since, before = offset, time.monotonic(), offset
    with progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=offset)
        while block := response.read1(MIB):  # what has come, so that it is kept if no more does
            place += len(block)
            if place > most:
                raise OSError(f'the server sends more than {most / MIB:,.0f} MiB')
            f.write(block)
            bar.advance(task, len(block))
            if (seconds := time.monotonic() - since) > SPEED_SECONDS:
                if place - before < MIN_SPEED * seconds:
                    raise OSError(f'{(place - before) / seconds:.0f} bytes a second are too few')
                since, before = time.monotonic(), place


def _check_size(size: int | None, published_mib: float | None) -> None:
    if size is None or published_mib is None:
        return
    if abs(size / MIB - published_mib) > _SIZE_TOLERANCE * published_mib:
        raise OSError(f'it has {size / MIB:.2f} MiB there, the released file {published_mib:g}')


def _check_hash(headers: http.client.HTTPMessage, part: pathlib.Path) -> None:
    """Compares the whole file with the checksum that Google Storage publishes of it.

    (https://docs.cloud.google.com/storage/docs/xml-api/reference-headers#xgooghash)
    """
    if headers.get('x-goog-stored-content-encoding', 'identity') != 'identity':
        return  # the sum is that of the compressed file
    published = re.search(r'md5=([\w+/]+=*)', ','.join(headers.get_all('x-goog-hash', [])))
    if published is None:
        return
    with open(part, 'rb') as f:
        found = base64.b64encode(hashlib.file_digest(f, 'md5').digest()).decode()
    if found != published[1]:
        _etag_file(part).unlink(missing_ok=True)
        part.unlink()
        raise OSError(
            f'what arrived has the MD5 sum {found}, and the server says {published[1]}; run the '
            'same command again to download it anew'
        )


def _etag(headers: http.client.HTTPMessage) -> str:
    """The ETag, if it stands for the bytes of the file (a weak one does not); else ''."""
    etag = headers.get('ETag', '')
    return etag if _STRONG_ETAG.fullmatch(etag) else ''


def _etag_file(part: pathlib.Path) -> pathlib.Path:
    return part.with_name(part.name + '.etag')


def _source_file(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(target.name + '.source.json')
