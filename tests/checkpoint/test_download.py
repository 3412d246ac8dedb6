"""Downloads that are killed, redirected, answered oddly: never another file under a name."""

import base64
import errno
import fcntl
import hashlib
import os
import pathlib
import subprocess
import sys

import pytest

from vit_jax.checkpoint import download, formats, inspection
from vit_jax.errors import UserError

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'conformance'
A, B = bytes(range(256)) * 40, bytes(range(255, -1, -1)) * 40

KILLED = """
import os, sys, pathlib
from vit_jax.checkpoint import download

url, folder = sys.argv[1], pathlib.Path(sys.argv[2])
A, half = bytes(range(256)) * 40, 5000
download.source_of(folder / 'x')  # imports what there is to import

def attempt(die_at, target):
    '''Downloads in a child that dies before the nth opening to write, removal or rename.'''
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0
    def audit(event, arguments):
        nonlocal count
        writing = event == 'open' and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if writing or event in ('os.remove', 'os.rename'):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), 9)
    sys.addaudithook(audit)
    download.fetch(url, target)
    os._exit(0)

for n in range(1, 100):
    target = folder / str(n) / 'x'
    target.parent.mkdir()
    part = target.with_name('x.part')
    part.write_bytes(A[:half])
    target.with_name('x.part.etag').write_text('"a"')
    code = attempt(n, target)
    if not target.exists():
        assert attempt(-1, target) == 0
    print(n, code, hash(target.read_bytes()) == hash(bytes(range(255, -1, -1)) * 40))
    if not code:
        break
"""


def test_killed_at_any_point_while_another_file_takes_the_name(bucket, tmp_path):
    """The part of one file never ends as the beginning of another."""
    bucket.put('/x', B, '"b"')
    command = [sys.executable, '-c', KILLED, f'{bucket.url}/x', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 6 and lines[-1][1] == '0', done.stdout + done.stderr
    assert {code for _, code, _ in lines[:-1]} == {'-9'}
    assert all(right == 'True' for _, _, right in lines), done.stdout


@pytest.mark.parametrize('fails', ['write_bytes', 'write_text'])
def test_a_full_disk_while_another_file_takes_the_name(bucket, tmp_path, monkeypatch, fails):
    (tmp_path / 'x.part').write_bytes(A[:5000])
    (tmp_path / 'x.part.etag').write_text('"a"')
    bucket.put('/x', B, '"b"')

    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path if fails == 'write_bytes' else download.files, fails, full)
        with pytest.raises(UserError, match='No space left'):
            download.fetch(f'{bucket.url}/x', tmp_path / 'x')
    assert download.fetch(f'{bucket.url}/x', tmp_path / 'x').read_bytes() == B


def answer(status, body=b'', **headers):
    def send(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace('_', '-'), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


@pytest.mark.parametrize('etag', ['"b"', None])
def test_a_server_that_ignores_if_range(bucket, tmp_path, etag):
    """It sends the rest of another file."""
    (tmp_path / 'x.part').write_bytes(A[:5000])
    (tmp_path / 'x.part.etag').write_text('"a"')

    def send(handler):
        rest = bool(handler.headers['Range'])
        more = {'ETag': '"b"', 'Content_Length': str(len(B) - 5000 * rest)}
        if rest:
            more['Content_Range'] = f'bytes {5000 if etag else 4000}-{len(B) - 1}/{len(B)}'
        answer(206 if rest else 200, B[5000 * rest :], **more)(handler)

    bucket.answers['/x'] = send
    assert download.fetch(f'{bucket.url}/x', tmp_path / 'x').read_bytes() == B


@pytest.mark.parametrize(
    ('status', 'headers', 'words'),
    [
        (204, {}, 'the server answers 204 No Content'),
        (206, {'Content_Range': 'bytes 0-9/10', 'Content_Length': '0'}, 'the server answers 206'),
        (416, {'Content_Length': '0'}, 'the server answers 416'),
        (302, {'Location': 'ftp://127.0.0.1/x'}, 'leads to ftp://.*only https and http'),
        (302, {'Location': 'file:///etc/passwd'}, 'not allowed'),
        (200, {'Content_Length': 'many'}, 'not HTTP'),
        (200, {'Content_Length': '-5'}, 'not HTTP'),
        (200, {'Content_Length': '0'}, 'a length of 0'),
    ],
)
def test_answers_that_are_no_file(bucket, tmp_path, status, headers, words):
    bucket.answers['/x'] = answer(status, **headers)
    with pytest.raises(UserError, match=words):
        download.fetch(f'{bucket.url}/x', tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('length', [10**30, 10**11])
def test_what_comes_with_a_redirect_is_not_read(bucket, tmp_path, length):
    bucket.put('/x', B)
    bucket.answers['/moved'] = answer(302, Location='/x', Content_Length=str(length))
    assert download.fetch(f'{bucket.url}/moved', tmp_path / 'x').read_bytes() == B


@pytest.mark.parametrize('url', ['ftp://127.0.0.1/x', 'file:///etc/passwd', 'data:,x', '/x'])
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(UserError, match='only https and http'):
        download.fetch(url, tmp_path / 'x')


def test_a_length_that_the_server_does_not_say(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(download, 'MAX_UNKNOWN_MIB', len(B) / download.MIB)
    bucket.answers['/x'] = answer(200, B)
    assert download.fetch(f'{bucket.url}/x', tmp_path / 'x').read_bytes() == B
    bucket.answers['/y'] = answer(200, B + A)
    with pytest.raises(UserError, match='the server sends more than'):
        download.fetch(f'{bucket.url}/y', tmp_path / 'y')
    bucket.answers['/z'] = answer(200, b'')
    with pytest.raises(UserError, match='the server sent nothing'):
        download.fetch(f'{bucket.url}/z', tmp_path / 'z')
    # Without an ETag nobody can go on, so nothing is kept.
    bucket.answers['/u'] = answer(200, B, Content_Length=str(len(B) + 1))
    with pytest.raises(UserError, match='broke off .* to begin anew'):
        download.fetch(f'{bucket.url}/u', tmp_path / 'u')
    assert not [path for path in tmp_path.iterdir() if '.part' in path.name]


def test_published_checksums_are_checked(bucket, tmp_path):
    def send(handler):
        md5 = base64.b64encode(hashlib.md5(B).digest()).decode()
        answer(200, data, x_goog_hash=f'crc32c=AAAAAA==,md5={md5}', ETag='"a"')(handler)

    bucket.answers['/x'] = send
    data = B[:-1] + b'x'
    with pytest.raises(UserError, match='MD5 sum'):
        download.fetch(f'{bucket.url}/x', tmp_path / 'x')
    assert {path.name for path in tmp_path.iterdir()} == {'x.lock'}
    data = B
    assert download.fetch(f'{bucket.url}/x', tmp_path / 'x').read_bytes() == B


def test_where_a_file_came_from_is_kept_and_said(bucket, tmp_path):
    content = (FIXTURES / 'vit_token.checkpoint.npz').read_bytes()
    bucket.put('/x.npz', content, '"b"')
    path = download.fetch(f'{bucket.url}/x.npz', tmp_path / 'x.npz')
    said = f'downloaded from {bucket.url}/x.npz on '
    assert said in str(formats.open_weights(path)) and said in str(inspection.inspect(path))
    assert f'{len(content):,} bytes, ETag "b"' in download.source_of(path)
    path.write_bytes(content + b'x')  # by somebody else
    assert download.source_of(path) == ''


def test_a_server_that_sends_a_byte_now_and_then(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(download, 'SPEED_SECONDS', 0.2)
    monkeypatch.setattr(download, 'MIN_SPEED', 10_000)

    def drip(handler):
        answer(200, Content_Length='10000')(handler)
        try:
            for _ in range(100):
                handler.wfile.write(b'x')
                handler.server.bucket.pause.wait(0.02)
        except ConnectionError:
            pass

    bucket.answers['/x'] = drip
    with pytest.raises(UserError, match='bytes a second are too few'):
        download.fetch(f'{bucket.url}/x', tmp_path / 'x')


@pytest.mark.parametrize('code', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_without_locks(bucket, tmp_path, monkeypatch, code):
    def no_lock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, 'flock', no_lock)
    bucket.put('/x', B)
    with pytest.raises(UserError, match='cannot be locked.*VIT_JAX_CACHE'):
        download.fetch(f'{bucket.url}/x', tmp_path / 'x')
