"""A server of files that misbehaves, and downloads from it that are killed and begun again."""

import contextlib
import http.server
import os
import pathlib
import random
import threading
from collections.abc import Callable

from fuzzing import mutate
from vit_jax.checkpoint import download
from vit_jax.errors import UserError

SIZE = 40_000
STATUSES = (200, 200, 201, 204, 206, 301, 302, 304, 400, 404, 416, 500, 999)
TARGETS = ('ftp://127.0.0.1/x', 'file:///etc/passwd', '/x', 'http://127.0.0.1:9/', 'x' * 70_000, '')


class Killed(BaseException):
    """In place of a signal, so that the process goes on with the next case."""


def prepare(rng: random.Random, case: pathlib.Path) -> Callable[[], None]:
    """Attempts at a file that changes on an honest server, or answers of a hostile one."""
    target = case / 'cache' / 'x'
    if rng.random() < 0.5:
        return lambda: _hostile(rng, target)
    return lambda: _honest(rng, target)


def _hostile(rng: random.Random, target: pathlib.Path) -> None:
    """Anything may be answered; what gets the name is then what was sent, or nothing does."""
    lines = [f'HTTP/1.1 {rng.choice(STATUSES)} {rng.choice(mutate.TEXTS)[:100]}']
    body = rng.randbytes(rng.choice((0, 1, 1000, SIZE)))
    for name, values in (
        ('Content-Length', (len(body), len(body) + 1, -1, 'x', 10**30, '1_0', '')),
        ('Content-Range', ('bytes 0-9/10', f'bytes 100-{len(body) + 99}/*', 'x', '')),
        ('ETag', ('"a"', '"b"', 'W/"a"', '"\x7f"', '"' + 'x' * 5000 + '"', '')),
        ('Location', TARGETS),
        ('Transfer-Encoding', ('chunked',)),
        ('x-goog-hash', ('md5=AAAA', 'crc32c=x', 'md5=' + 'A' * 9000)),
        (rng.choice(mutate.TEXTS)[:50], mutate.TEXTS),
    ):
        if rng.random() < 0.5:
            lines.append(f'{name}: {rng.choice(values)}'[:80_000])
    answer = '\r\n'.join(lines).encode('latin1', 'replace') + b'\r\n\r\n' + body
    if rng.random() < 0.4:
        answer = mutate.damage(rng, answer)
    if rng.random() < 0.5:
        target.parent.mkdir()
        target.with_name('x.part').write_bytes(bytes(100))
        etag = rng.choice(('"a"', 'W/"a"', 'a\r\nEvil: 1', '', '"é"'))
        target.with_name('x.part.etag').write_text(etag)
    with _server(lambda handler: handler.wfile.write(answer)) as url:
        download.fetch(url, target, published_mib=rng.choice((None, None, len(body) / 2**20)))


def _honest(rng: random.Random, target: pathlib.Path) -> None:
    """After any kills, full disks and changes of the file, what gets the name is the last one."""
    content, cut = b'', 0

    def send(handler: http.server.BaseHTTPRequestHandler) -> None:
        start, etag = 0, f'"{hash(content)}"'
        asked = handler.headers['Range']
        if asked and handler.headers['If-Range'] == etag:
            start = int(asked.removeprefix('bytes=').removesuffix('-'))
        if start >= len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        handler.send_header('ETag', etag)
        handler.send_header('Content-Length', str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start:cut])

    with _server(send) as url:
        for _ in range(rng.choice((1, 2, 4))):
            if rng.random() < 0.6:
                content = rng.randbytes(SIZE + rng.randrange(3))
            cut = rng.randrange(SIZE)
            with contextlib.suppress(UserError, Killed), _failing(rng):
                download.fetch(url, target)
        assert not target.exists() or target.read_bytes() == content
        content, cut = content or b'x', None
        assert download.fetch(url, target).read_bytes() == content, 'another file has the name'


@contextlib.contextmanager
def _failing(rng: random.Random):
    """Lets one call that changes a file fail, or be the last one."""
    left = rng.randrange(1, 8)
    error = rng.choice((Killed, lambda: OSError(28, 'No space left on device')))
    places = [(os, 'replace'), (pathlib.Path, 'unlink'), (pathlib.Path, 'write_bytes')]
    places += [(download.files, 'write_text'), (download.files, 'write_json'), (os, 'fsync')]
    originals = [getattr(*place) for place in places]

    def wrapped(original):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                raise error()
            return original(*arguments, **options)

        return call

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, wrapped(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


@contextlib.contextmanager
def _server(answer: Callable[[http.server.BaseHTTPRequestHandler], object]):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.005})
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/x'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
