"""Large sets and slow storage, small and short."""

import os
import time
import tracemalloc

import pytest

from benchmarks import storage
from vit_jax.data import listing, sources

IMAGENET = 1_331_000  # training and validation images


@pytest.fixture(scope='module')
def made_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp('storage') / 'set'
    storage.make(folder, 20_000, 40)
    return folder


def test_time_and_memory_grow_with_a_set_so_that_imagenet_fits(made_up):
    sources.open_sources(str(made_up))  # imports what there is to import
    begin = time.process_time()
    train, test = sources.open_sources(str(made_up))
    train.fingerprint(), test.fingerprint()
    seconds = time.process_time() - begin
    assert len(train) + len(test) == 20_000
    assert seconds * IMAGENET / 20_000 < 30
    del train, test
    tracemalloc.start()
    opened = sources.open_sources(str(made_up))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened and peak * IMAGENET / 20_000 < 2**30


def test_a_known_set_is_opened_from_its_index(made_up, tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path))
    monkeypatch.setattr(listing, '_SETTLED', 0.0)
    monkeypatch.setattr(listing, '_keeps_times', lambda path: True)
    first = sources.open_sources(str(made_up))[0]
    assert [file.name for file in (tmp_path / 'listings').iterdir()]
    folders = [entry.path for entry in os.scandir(made_up / 'train')]
    monkeypatch.setattr(listing, '_look', lambda path, arrays: pytest.fail('a folder was read'))
    again = sources.open_sources(str(made_up))[0]
    assert again.fingerprint() == first.fingerprint() and len(folders) == 40
    found = storage.opened(str(made_up), batch=32)
    assert 0 < found['first_batch_s'] < 5 and found['peak_mib'] > 50


@pytest.mark.parametrize('threads', [1, 8])
def test_slow_storage_is_read_by_as_many_threads_as_are_asked_for(threads):
    for rounds in (3, 6):  # once more, if the machine was busy
        share = storage.share_of_bound(0.05, threads, batch=4, rounds=rounds)
        if share > 0.9:
            break
    assert 0.9 < share < 1.01
