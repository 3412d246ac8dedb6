"""A server of files on this machine."""

import contextlib
import http.server
import re
import threading
from collections.abc import Callable

import pytest


class _Handler(http.server.BaseHTTPRequestHandler):
    """A bucket in memory, with ranges and ETags; may break off, or answer otherwise."""

    def do_GET(self):
        bucket = self.server.bucket
        bucket.requests.append((self.path, self.headers['Range']))
        if self.path in bucket.answers:
            bucket.answers[self.path](self)
            return
        if self.path not in bucket.files:
            self.send_error(404)
            return
        data, etag = bucket.files[self.path]
        start = 0
        if self.headers['Range'] and self.headers['If-Range'] == etag:
            start = int(re.fullmatch(r'bytes=(\d+)-', self.headers['Range'])[1])
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        else:
            self.send_response(200)
        self.send_header('ETag', etag)
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        end = bucket.break_off_at or len(data)
        bucket.break_off_at = None
        with contextlib.suppress(ConnectionError):  # whoever refuses the size hangs up
            self.wfile.write(data[start:end])

    def log_message(self, *args):
        pass


class _Bucket:
    def __init__(self):
        self.files: dict[str, tuple[bytes, str]] = {}
        self.answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.break_off_at: int | None = None
        self.pause = threading.Event()

    def put(self, path, data, etag='"v1"'):
        self.files[path] = (data, etag)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    bucket = _Bucket()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    server.daemon_threads = True
    server.bucket = bucket
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    bucket.url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setenv('VIT_JAX_BASE_URL', bucket.url)
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setenv('no_proxy', '*')
    yield bucket
    server.shutdown()
    server.server_close()
    thread.join()
