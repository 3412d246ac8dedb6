"""Batches from other processes: the same ones, and what becomes of broken images and processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg

from vit_jax.data import loader, sources
from vit_jax.data.decode import BadImageError
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """24 JPEG files of two classes, of which two are broken."""
    random = np.random.RandomState(0)
    for index in range(24):
        folder = tmp_path / ('cat', 'dog')[index % 2]
        folder.mkdir(exist_ok=True)
        file = simplejpeg.encode_jpeg(random.randint(0, 256, (40, 60, 3)).astype(np.uint8))
        (folder / f'{index:02}.jpg').write_bytes(file[:99] if index in (4, 17) else file)
    return sources.open_dataset(str(tmp_path)).select('train')


def dataset(source, on_bad=None, exact=True):
    return loader.train_dataset(source, Preprocess(9), batch=10, seed=0, exact=exact, on_bad=on_bad)


def children():
    """Processes that make batches, of this one."""
    found = subprocess.run(
        ['ps', '-ww', '-o', 'pid=', '-o', 'args=', '--ppid', str(os.getpid())],
        capture_output=True,
        text=True,
    )
    return [int(x.split()[0]) for x in found.stdout.splitlines() if 'workers.serve' in x]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name])


def test_the_same_batches_and_errors_and_one_message_when_a_process_dies(photos):
    known, errors = [], []
    here, there = dataset(photos, known.append), dataset(photos, errors.append)
    with loader.train_batches(there, start=3, threads=3, processes=2) as iterator:
        held = next(iterator)
        for step in range(4, 9):
            assert_equal(next(iterator), here[step])
        # Signals for the whole group are not theirs.
        for child in children():
            os.kill(child, signal.SIGTERM)
            os.kill(child, signal.SIGINT)
        time.sleep(0.1)
        for step in range(9, 40):  # longer than there is memory for
            assert_equal(next(iterator), here[step])
        assert_equal(held, here[3])
        assert sorted(e.key for e in errors) == sorted(e.key for e in known)
        assert {(e.label, os.path.basename(e.key)) for e in errors} == {
            (0, '04.jpg'),
            (1, '17.jpg'),
        }
        assert len(errors) == 2
        first, second = children()
        for child in (first, second):
            maps = pathlib.Path(f'/proc/{child}/maps').read_text()
            assert 1 <= maps.count('vit_jax batch') < 9  # of 18 batches or more
        os.kill(first, signal.SIGKILL)
        with pytest.raises(UserError, match=r'was ended by SIGKILL, .*data_processes'):
            for _ in range(20):
                next(iterator)
    assert not children()


def test_errors_are_raised_where_batches_are_taken(photos):
    # Without on_bad the image itself is the error.
    with (
        pytest.raises(BadImageError, match=r'(04|17)\.jpg') as caught,
        loader.train_batches(
            dataset(photos, exact=False), start=0, threads=1, processes=1
        ) as iterator,
    ):
        for _ in range(3):
            batch = next(iterator)
            assert batch['image'].dtype == np.uint8
    assert caught.value.label in (0, 1) and not children()


def test_a_source_that_cannot_be_sent_is_said(photos):
    photos.lock = (x for x in ())
    with (
        pytest.raises(UserError, match='cannot be sent to other processes'),
        loader.train_batches(dataset(photos), start=0, processes=1) as iterator,
    ):
        next(iterator)


def test_processes_end_when_the_one_that_trains_is_killed(photos, tmp_path):
    script = (
        'import sys, time\n'
        'from vit_jax.data import loader, preprocess, sources\n'
        'train = sources.open_dataset(sys.argv[1]).select("train")\n'
        'data = loader.train_dataset(train, preprocess.Preprocess(9), batch=4, seed=0,'
        ' on_bad=lambda error: None)\n'
        'with loader.train_batches(data, start=0, processes=1, threads=1) as batches:\n'
        '    next(batches)\n'
        '    print("ready", flush=True)\n'
        '    time.sleep(60)\n'
    )
    parent = subprocess.Popen(
        [sys.executable, '-c', script, photos._name], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == 'ready\n'
    found = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(parent.pid)], capture_output=True, text=True
    )
    (child,) = map(int, found.stdout.split())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if (
            not pathlib.Path(f'/proc/{child}').exists()
            or 'Z' in pathlib.Path(f'/proc/{child}/stat').read_text().rpartition(')')[2].split()[:1]
        ):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError('it lives on')
