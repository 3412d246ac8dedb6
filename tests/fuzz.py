"""Damaged and hostile files for everything that is read from outside.

    python tests/fuzz.py --cases 10000 --seed 0             # all readers; the default
    python tests/fuzz.py --reader npz --case 17 --seed 0    # one case again, with its traceback

Small real files (made by this package's own writers, and photos and released formats from the
fixtures) are damaged: bits, cuts, insertions, repeated and exchanged parts, and the fields of their
formats (numbers in headers, names, JSON values, pickle opcodes, chunks, tags and scans of images,
ends of archives, answers of servers). Each is read in a process with 1.5 GB of memory beyond what
it started with, within 20 s. The outcome must be success or `UserError`. Faults are: any other
exception, no end, a crash, a file opened or changed outside the case's own folder, a child process,
an unpickled object, a connection to another machine, and more memory or CPU time than
`fuzzing.readers.limits` allows the reader for what it reads. The table shows the most that a case
took of both. Exit code 1 if there are any faults.
"""

import argparse
import collections
import contextlib
import functools
import json
import logging
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
MEMORY = 1500 << 20
SECONDS = 20


def main() -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', type=int, default=10_000, help='in all, shared by the readers')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--reader', default='', help='one reader only')
    parser.add_argument('--case', type=int, default=-1, help='one case of that reader')
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--worker', default='', metavar='CORPUS', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(pathlib.Path(options.worker), options.seed)
        return 0
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        corpus = pathlib.Path(folder) / 'corpus'
        if options.case < 0:
            return run(corpus, options)
        prepare(corpus)
        result = run_case(corpus, options.seed, options.reader, options.case, show=True)
        print(result)
        return int(result['outcome'].startswith('FAULT'))


def run(corpus: pathlib.Path, options: argparse.Namespace) -> int:
    """Runs the cases in worker processes and prints what came out."""
    first = Worker(corpus, options.seed)  # makes the files
    names = [options.reader] if options.reader else first.names
    counts = {name: collections.Counter() for name in names}
    share, rest = divmod(options.cases, len(names))
    todo = collections.deque(
        (name, begin, min(begin + 200, share + (place < rest)))
        for place, name in enumerate(names)
        for begin in range(0, share + (place < rest), 200)
    )
    faults, start, done, shown = [], time.monotonic(), 0, 0.0
    most = dict.fromkeys(names, (0, 0.0))
    workers = [first] + [Worker(corpus, options.seed) for _ in range(1, options.jobs)]
    while todo or any(worker.case < worker.end for worker in workers):
        for worker in workers:
            if worker.case == worker.end and todo:
                worker.start(*todo.popleft())
            if worker.case == worker.end or (result := worker.result()) is None:
                continue
            done += 1
            counts[worker.name][result['outcome']] += 1
            memory, cpu = most[worker.name]
            most[worker.name] = max(memory, result['memory']), max(cpu, result['cpu'])
            if result['outcome'].startswith('FAULT'):
                faults.append((worker.name, result))
                where = f'{worker.name} case {result["case"]}'
                print(f'{where}: {result["outcome"]}\n{result["detail"]}', flush=True)
        if sys.stderr.isatty() and time.monotonic() - shown > 1:
            shown = time.monotonic()
            speed = done / (shown - start)
            left = (options.cases - done) / max(speed, 1e-9)
            line = f'\r{done:,}/{options.cases:,}  {speed:.0f}/s  {left:.0f} s left '
            print(line, end='', file=sys.stderr)
    for worker in workers:
        worker.stop()
    report(counts, most, faults, options, time.monotonic() - start)
    return int(bool(faults))


def report(counts, most, faults, options, seconds: float) -> None:
    """Prints the table of outcomes and how to see each fault again."""
    kinds = sorted({kind for counter in counts.values() for kind in counter if 'FAULT' not in kind})
    shown = ''.join(f'{kind:>16}' for kind in kinds)
    print(f'{"reader":14}{"cases":>7}{shown}{"MiB":>8}{"CPU s":>8}{"faults":>8}')
    total = collections.Counter()
    most['all'] = tuple(max(values) for values in zip(*most.values(), strict=True))
    for name, counter in [*counts.items(), ('all', total)]:
        wrong = sum(n for kind, n in counter.items() if kind.startswith('FAULT'))
        cells = ''.join(f'{counter[kind]:>16,}' for kind in kinds)
        memory, cpu = most[name]
        print(f'{name:14}{counter.total():>7,}{cells}{memory / 2**20:>8,.0f}{cpu:>8.2f}{wrong:>8,}')
        total.update(counter if name != 'all' else {})
    speed = f'{total.total() / seconds:.1f} a second'
    print(f'{total.total():,} cases in {seconds:.0f} s, {speed}, seed {options.seed}')
    for name, result in faults:
        print(
            f'python tests/fuzz.py --seed {options.seed} --reader {name} --case {result["case"]}'
            f'   # {result["outcome"]}'
        )


class Worker:
    """A process that runs cases, and is started anew when one of them ends it.

    Attributes:
      names: of the readers there are.
      name: of the reader whose cases it runs.
      case: the one it is at.
      end: the first one it shall not run.
    """

    def __init__(self, corpus: pathlib.Path, seed: int):
        self.name, self.case, self.end = '', 0, 0
        self._command = [sys.executable, __file__, '--seed', str(seed), '--worker', str(corpus)]
        self._launch()

    def start(self, name: str, begin: int, end: int) -> None:
        """Gives it cases `begin` to `end` - 1 of a reader."""
        self.name, self.case, self.end, self._heard = name, begin, end, time.monotonic()
        self._process.stdin.write(json.dumps([name, begin, end]) + '\n')
        self._process.stdin.flush()

    def result(self) -> dict[str, object] | None:
        """The result of the case it is at, and goes to the next; None if it is not done yet."""
        with contextlib.suppress(queue.Empty):
            if line := self._lines.get(timeout=0.02):
                self.case, self._heard = self.case + 1, time.monotonic()
                return json.loads(line)
            self._heard = -float('inf')  # it has ended
        if time.monotonic() - self._heard < 3 * SECONDS:
            return None
        self._process.kill()  # it hangs where no signal reaches it, or is dead already
        outcome = f'FAULT process ended with {self._process.wait()}'
        self._errors.seek(0)
        detail = self._errors.read()[-1500:]
        result = {'case': self.case, 'outcome': outcome, 'detail': detail, 'memory': 0, 'cpu': 0.0}
        self.stop()
        self._launch()
        self.case += 1
        if self.case < self.end:
            self.start(self.name, self.case, self.end)
        return result

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _launch(self) -> None:
        pipe = subprocess.PIPE
        self._errors = tempfile.TemporaryFile('w+', errors='replace')
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True
        )
        self._lines = queue.Queue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines)).start()
        line = self._lines.get()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f'no worker: {self._errors.read()[-1500:]}')
        self.names = json.loads(line)
        self._heard = time.monotonic()


def _forward(stream, lines: queue.Queue) -> None:
    """Puts the lines of a stream into a queue, and '' at its end."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put('')


def prepare(corpus: pathlib.Path) -> list[str]:
    """Makes the files to damage, if need be; returns the names of the readers."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from fuzzing import corpus as corpus_lib
    from fuzzing import readers

    if not corpus.exists():
        corpus_lib.make(corpus)
    readers.isolate()
    return readers.available(corpus)


def work(corpus: pathlib.Path, seed: int) -> None:
    """Runs the cases that standard input names and prints a line of JSON for each."""
    out = os.fdopen(os.dup(1), 'w')  # what libraries print goes elsewhere
    os.dup2(2, 1)
    names = prepare(corpus)
    from fuzzing import guard, readers

    logging.disable(logging.CRITICAL)
    # What is imported on the way neither counts as memory nor as opened.
    readers.read_undamaged(corpus)
    guard.limit_memory(MEMORY)
    readers.read_undamaged(corpus)
    print(json.dumps(names), file=out, flush=True)
    for line in sys.stdin:
        name, begin, end = json.loads(line)
        for case in range(begin, end):
            print(json.dumps(run_case(corpus, seed, name, case)), file=out, flush=True)


def run_case(corpus, seed: int, reader: str, case: int, show: bool = False) -> dict[str, object]:
    """Makes one case and reads it; says what came out."""
    from fuzzing import guard, readers

    rng = random.Random(f'{seed}/{reader}/{case}')
    folder = pathlib.Path(tempfile.mkdtemp(prefix='case-', dir=corpus.parent))
    try:
        read = readers.prepare_case(reader, rng, corpus, folder)
        limits = functools.partial(readers.limits, reader, folder)
        outcome = guard.watched(
            read, (folder, corpus), SECONDS, reader not in ('texts', 'runs'), limits, show
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {'case': case, 'outcome': outcome.text, 'detail': outcome.detail}
    return result | {'memory': outcome.memory, 'cpu': outcome.cpu}


if __name__ == '__main__':
    sys.exit(main())
