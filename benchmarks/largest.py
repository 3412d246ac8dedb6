"""The largest batch that a device takes, found by trying.

Each try runs in a new process, so running out of memory ends only that process.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import jax_workload, turns
from benchmarks.contestants import Contestant
from vit_jax.analysis import cost
from vit_jax.errors import UserError

# The words and the ends of a process that had too little memory: XLA's and PyTorch's messages, the
# signals of abort() and of the kernel.
_TOO_LITTLE = re.compile(
    r'RESOURCE_EXHAUSTED|[Oo]ut of memory|OutOfMemoryError|MemoryError|bad_alloc|'
    r'not enough memory|ended with status -(6|9)\b'
)


def search(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to about 6 %; 0 if one image is too much.

    Args:
      fits: whether a batch of that many images fits; assumed to be monotonic.
      start: the first to try; doubled or halved until the limit lies between two tries, which are
        then halved.
    """
    low, high, batch = 0, 0, start
    while batch:
        if fits(batch):
            low = batch
        else:
            high = batch
        if not high:
            batch = 2 * low
        elif high - low <= max(1, low // 16):
            break
        else:
            batch = (low + high) // 2
    return low


def measure(
    cell: Mapping[str, Any],
    people: Sequence[Contestant],
    timeout: float,
    memory_gib: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Tries batch sizes, with three steps each.

    Args:
      cell: see `contestants`; its batch is the first to try.
      people: who does it, one after the other.
      timeout: seconds to wait for a try.
      memory_gib: address space that a process gets, GiB; 0 for no limit. The memory of a GPU does
        not count.
      say: called with progress messages.

    Returns:
      For each a dict, for JSON: `contestant`, `facts` (of the last try that fit), `error` or
      `largest` (images), and for ours on a GPU `limit` (bytes that JAX may use) and `predicted`
      (images, by `cost`).

    Raises:
      UserError: there is no memory limit.
    """
    needed = cost.inference_memory if cell['mode'] == 'inference' else cost.training_memory
    rows = []
    for contestant in people:
        facts: dict[str, Any] = {}
        multiple = int(contestant.options.get('accum_steps', 1))

        def fits(count: int, contestant=contestant, facts=facts, multiple=multiple) -> bool:
            batch = count * multiple
            setup = contestant.setup(cell) | {'batch': batch, 'memory_gib': memory_gib}
            fine = _try(contestant.module, setup, timeout, facts)
            say(f'{contestant.label}, batch {batch}: {"fits" if fine else "too much memory"}')
            return fine

        row: dict[str, Any] = {'contestant': contestant.label, 'facts': facts}
        try:
            row['largest'] = multiple * search(fits, max(1, cell['batch'] // multiple))
        except turns.ContestantError as error:
            row['error'] = str(error)
        if limit := facts.get('memory_limit'):
            of, plan = jax_workload.described(contestant.setup(cell))
            plan = dataclasses.replace(plan, platform=facts['platform'])
            row |= {'limit': limit, 'predicted': cost.largest_batch(limit, needed, of, plan)}
        rows.append(row)
    return rows


def _try(module: str, setup: dict[str, Any], timeout: float, facts: dict[str, Any]) -> bool:
    """Whether three steps have enough memory; adds to `facts`. Other errors are raised."""
    try:
        with turns.Child(module, setup, timeout, alone=True) as child:
            facts |= child.facts
            if facts['platform'] == 'cpu' and not setup['memory_gib']:
                raise UserError(
                    'on a CPU --largest-batch needs --memory_gib: without a limit it would '
                    'take the memory of everything else on this machine'
                )
            child.time(2)
    except turns.ContestantError as error:
        if not _TOO_LITTLE.search(str(error)):
            raise
        return False
    return True
