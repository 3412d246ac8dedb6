"""The largest batch that a device takes, found by trying.

Each try runs in a new process, so running out of memory ends only that process.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import turns
from benchmarks.contestants import Cell, Contestant
from vit_jax.analysis import cost
from vit_jax.analysis.architecture import Architecture
from vit_jax.errors import UserError

# What a process says, or how it ends, that had too little memory: XLA's and PyTorch's words, and
# the signals of abort() and of the kernel.
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
    cell: Cell,
    contestants: Sequence[Contestant],
    timeout: float,
    memory_gib: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Tries batch sizes, with three steps each.

    Args:
      cell: what is done; its batch is the first to try.
      contestants: who does it, one after the other.
      timeout: seconds to wait for a try.
      memory_gib: address space that a process gets, GiB; 0 for no limit. The memory of a GPU has
        its own.
      say: called with progress messages.

    Returns:
      For each a dict, as JSON: `contestant`, `facts` (of the last try that fit), `error` or
      `largest` (images), and for ours on a GPU `limit` (bytes that JAX may use) and `predicted`
      (images, by `cost`).

    Raises:
      UserError: there is no memory limit.
    """
    rows = []
    for contestant in contestants:
        facts: dict[str, Any] = {}
        multiple = int(contestant.options.get('accum_steps', 1))

        def fits(count: int, contestant=contestant, facts=facts, multiple=multiple) -> bool:
            batch = count * multiple
            setup = cell.setup(contestant) | {'batch': batch, 'memory_gib': memory_gib}
            fine = _try(contestant, setup, timeout, facts)
            say(f'{contestant.label}, batch {batch}: {"fits" if fine else "too much memory"}')
            return fine

        row: dict[str, Any]
        try:
            row = {'largest': multiple * search(fits, max(1, cell.batch // multiple))}
        except turns.ContestantError as error:
            row = {'error': str(error)}
        if facts.get('memory_limit'):
            row |= {'limit': facts['memory_limit'], 'predicted': _predict(cell, contestant, facts)}
        rows.append({'contestant': contestant.label, 'facts': facts, **row})
    return rows


def _try(
    contestant: Contestant, setup: dict[str, Any], timeout: float, facts: dict[str, Any]
) -> bool:
    """Whether three steps have enough memory; adds to `facts`. Other errors are raised."""
    try:
        with turns.Child(contestant.command, setup, timeout, alone=True) as child:
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


def _predict(cell: Cell, contestant: Contestant, facts: dict[str, Any]) -> int:
    """What the formula says for our step."""
    options = contestant.options
    plan = cost.Plan(
        batch=1,
        accum_steps=int(options.get('accum_steps', 1)),
        dtype=cell.dtype,
        optim_dtype=options.get('optim_dtype', 'bfloat16'),
        remat=options.get('remat', ''),
        attention=options.get('attention', 'auto'),
        platform=facts['platform'],
    )
    needed = cost.inference_memory if cell.mode == 'inference' else cost.training_memory
    of = Architecture(cell.variant, cell.model_config, cell.num_classes, cell.image_size)
    return cost.largest_batch(facts['memory_limit'], needed, of, plan)
