"""What it costs to open a set, and to read from a storage that lets each reader wait.

    python -m benchmarks.storage --images 1281000 --classes 1000 --folder /tmp/made-up
    python -m benchmarks.storage --wait_ms 50
    python -m benchmarks.storage --datasets photos/ photos.csv parquet/ shards/

The first makes a set in that folder unless it is there (links to some small JPEG files: an entry in
a folder each, no further inode), opens it twice, each time in a process of its own, and says how
long it took until the set was listed, fingerprinted, and the first batch was read, without imports.
The second reads from a source that waits so long for each image, with 1 to 64 threads. The third
reads all images of sets in random order, without decoding, by one thread, from a warm cache.
"""

import argparse
import multiprocessing
import pathlib
import resource
import sys
import time

import cv2
import numpy as np

from vit_jax.data import loader, sources
from vit_jax.data.examples import CLASS_INDEX, Example
from vit_jax.data.preprocess import Preprocess

BATCH = 512
_PER_FILE = 40  # file systems limit the links to a file


class Waiting:
    """Black images of 32 x 32 pixels, each of which comes after some seconds; a `Source`."""

    class_names: tuple[str, ...] = ('a', 'b')
    exif = False
    label_dtype = CLASS_INDEX

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._image = np.zeros((32, 32, 3), np.uint8)

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Example:
        time.sleep(self._seconds)
        return Example(self._image, 0, str(index))


def share_of_bound(seconds: float, threads: int, *, batch: int, rounds: int = 3) -> float:
    """Images per second that come from `Waiting`, by those that so many waiting threads can give.

    Args:
      seconds: that each image takes.
      threads: of the loader.
      batch: images; each thread is at work at one batch.
      rounds: batches of each thread that are timed, after one that is not.
    """
    batches = loader.BatchLoader(Waiting(seconds), Preprocess(crop=32), batch=batch, seed=0)
    reading = batches.from_step(0, threads=threads)
    for _ in range(threads + 1):
        next(reading)
    begin = time.perf_counter()
    for _ in range(rounds * threads):
        next(reading)
    speed = rounds * threads * batch / (time.perf_counter() - begin)
    reading.close()
    return speed * seconds / threads


def make(folder: pathlib.Path, images: int, classes: int) -> None:
    """A set of so many images in folders `train/0000/`, ..., by hard links."""
    rng = np.random.default_rng(0)
    base = folder / '.files'
    base.mkdir(parents=True)
    files = []
    for number in range(max(_PER_FILE, images // 30_000)):
        files.append(base / f'{number}.jpg')
        pixels = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (64, 48))
        cv2.imwrite(str(files[-1]), pixels)
    for label in range(classes):
        inside = folder / 'train' / f'{label:04}'
        inside.mkdir(parents=True)
        for number in range(label, images, classes):
            (inside / f'photo_{number}.jpg').hardlink_to(files[number % len(files)])


def opened(folder: str, batch: int = BATCH) -> dict[str, float]:
    """Seconds until a set is listed, fingerprinted, and a first batch of 64 px is there; and MiB.

    `cpu_s` are the processor's until it is fingerprinted, which is one thread's work.
    """
    sources.open_sources('digits')  # imports what there is to import
    next(loader.BatchLoader(Waiting(0), Preprocess(crop=32), batch=1, seed=0).from_step(0))
    begin, cpu = time.perf_counter(), time.process_time()
    train, _ = sources.open_sources(folder)
    listed = time.perf_counter()
    train.fingerprint()
    known, cpu = time.perf_counter(), time.process_time() - cpu
    batches = loader.BatchLoader(train, Preprocess(crop=64), batch=batch, seed=0)
    reading = batches.from_step(0)
    next(reading)
    first = time.perf_counter()
    reading.close()
    per_mib = 1 << (20 if sys.platform == 'darwin' else 10)
    return {
        'listed_s': listed - begin,
        'fingerprint_s': known - listed,
        'first_batch_s': first - known,
        'cpu_s': cpu,
        'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib,
    }


def read(name: str, rounds: int = 5) -> dict[str, float]:
    """Seconds to open a set, and microseconds to read an image of it: the least of some rounds."""
    begin = time.perf_counter()
    dataset = sources.open_dataset(name)
    source = dataset.select('+'.join(dataset.splits))
    opened_s, times = time.perf_counter() - begin, []
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    for _ in range(rounds):
        begin = time.perf_counter()
        for index in order:
            source[index]
        times.append((time.perf_counter() - begin) / len(source))
    return {'images': len(source), 'open_s': opened_s, 'read_us': 1e6 * min(times)}


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--folder', type=pathlib.Path, help='where the set is, or is made')
    parser.add_argument('--images', type=int, default=1_281_000)
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--wait_ms', type=float, default=0.0)
    parser.add_argument('--datasets', nargs='+', default=(), help='to read from')
    args = parser.parse_args()
    if args.folder:
        if not args.folder.exists():
            make(args.folder, args.images, args.classes)
            time.sleep(10)  # an index trusts a folder that has not changed for some seconds
        for time_of in ('first', 'second'):
            with multiprocessing.get_context('spawn').Pool(1) as process:
                found = process.apply(opened, (str(args.folder),))
            print(time_of, ', '.join(f'{name} {value:.2f}' for name, value in found.items()))
    for name in args.datasets:
        with multiprocessing.get_context('spawn').Pool(1) as process:
            found = process.apply(read, (name,))
        print(name, ', '.join(f'{key} {value:.3f}' for key, value in found.items()), flush=True)
    if args.wait_ms:
        for threads in (1, 2, 4, 8, 16, 32, 64):
            share = share_of_bound(args.wait_ms / 1000, threads, batch=32)
            speed = share * threads / args.wait_ms * 1000
            print(f'{threads} threads: {speed:.1f} images/s, {share:.3f} of the bound', flush=True)


if __name__ == '__main__':
    main()
