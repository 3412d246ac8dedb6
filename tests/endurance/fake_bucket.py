"""Cloud storage for tests: a folder that fsspec gives as gs:// and s3://.

    python tests/endurance/fake_bucket.py FOLDER N WORDS...     vit_jax.main with it

The process kills itself (SIGKILL) instead of writing the N-th object, from 1; with 0 it does not.

As a bucket, it has no folders, renames or locks, and what `put` writes appears whole.
"""

import os
import pathlib
import shutil
import signal
import sys

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    """Addresses are paths below `folder`.

    `fail` is called with each operation and name, and may raise.
    """

    protocol = ('gs', 's3')
    cachable = False
    folder = ''
    log: list[tuple[str, str]] = []

    def __init__(self, **options):
        super().__init__(auto_mkdir=True)

    @staticmethod
    def fail(operation, name):
        pass

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        for protocol in cls.protocol:
            if path.startswith(f'{protocol}://'):
                path = f'{cls.folder}/{path[len(protocol) + 3 :]}'
        return path.rstrip('/')

    def _note(self, operation, path):
        name = os.path.relpath(path, self.folder)
        assert not name.startswith('..'), path
        self.log.append((operation, name))
        self.fail(operation, name)

    def put_file(self, lpath, rpath, **options):
        self._note('put', rpath)
        os.makedirs(os.path.dirname(rpath), exist_ok=True)
        part = f'{rpath}.{os.getpid()}.{os.urandom(4).hex()}~'
        shutil.copyfile(lpath, part)
        os.replace(part, rpath)

    def pipe_file(self, path, value, mode='overwrite', **options):
        self._note('put', path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = f'{path}.{os.getpid()}.{os.urandom(4).hex()}~'
        pathlib.Path(part).write_bytes(value)
        try:
            if mode == 'create':
                os.link(part, path)
            else:
                os.replace(part, path)
        finally:
            pathlib.Path(part).unlink(missing_ok=True)

    def get_file(self, rpath, lpath, **options):
        self._note('get', rpath)
        shutil.copyfile(rpath, lpath)

    def rm_file(self, path):
        self._note('remove', path)
        os.unlink(path)

    def find(self, path, detail=False, **options):
        self._note('list', path)
        found = super().find(path, detail=True, **options)
        return {name: info for name, info in found.items() if not name.endswith('~')}

    @classmethod
    def touched(cls, operation):
        return [name for what, name in cls.log if what == operation]


def register(folder) -> None:
    Bucket.folder, Bucket.log = os.fspath(folder), []
    for protocol in Bucket.protocol:
        fsspec.register_implementation(protocol, Bucket, clobber=True)


def main() -> None:
    register(sys.argv[1])
    last, sys.argv = int(sys.argv[2]), ['main.py', *sys.argv[3:]]
    from vit_jax import main
    from vit_jax.run import remote_workdir

    def fail(operation, name):
        if last and len(Bucket.touched('put')) == last:
            print(f'killed before {name}', flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    Bucket.fail = staticmethod(fail)
    remote_workdir._LOOK_SECONDS = 0.02  # a run of seconds
    try:
        main.run()
    finally:
        assert 'tensorflow' not in sys.modules


if __name__ == '__main__':
    main()
