"""Kills a training run at random moments and shows that nothing is lost.

    python tests/endurance/kill.py --kills 20 [--seed 0] [--platform gpu] [FLAG...]

A run is killed (SIGKILL) and started again as often as asked, at moments drawn from its whole life:
while it starts, between steps, while it saves, while it evaluates. Then it is left to finish, and
its parameters, optimizer state and metrics.jsonl are compared, byte for byte, with those of a run
that nobody disturbed. Further flags go to both runs (`--config.fsdp=-1`). Exit code 0 if all are
equal.
"""

import argparse
import functools
import pathlib
import random
import re
import sys
import tempfile
import time

import processes


def kill_and_compare(
    folder,
    kills: int,
    seed: int,
    flags=(),
    *,
    platform='cpu',
    steps_per_kill=30,
    fresh=True,
    say=print,
) -> list[str]:
    """Runs the comparison in `folder`; returns what differs, [] if nothing."""
    folder = pathlib.Path(folder)
    steps = steps_per_kill * (kills + 1)
    flags = [f'--config.total_steps={steps}', *flags]
    cache = folder / 'cache'
    options = {'cache': cache, 'env': {'JAX_PLATFORMS': 'cpu'}, 'fresh': fresh}
    if platform == 'gpu':
        # Not all of its memory at once: the caller may hold some of it.
        options['env'] = {'JAX_PLATFORMS': 'cuda', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
        flags.append('--config.deterministic=True')

    begin = time.monotonic()
    run = processes.Run(folder / 'whole', *flags, log=folder / 'whole.log', **options)
    run.wait_for('weights: ')
    started = time.monotonic()
    if run.wait() != 0:
        raise RuntimeError(f'the undisturbed run failed:\n{run.output}')
    start_up = started - begin
    say(f'undisturbed: {steps} steps in {time.monotonic() - begin:.1f} s')

    rng = random.Random(seed)
    workdir, killed = folder / 'killed', 0
    while killed < kills:
        # Saving nearly always, or rarely: so that both sides of a save are hit.
        often = f'--config.checkpoint_every={rng.choice((5, 5, 25))}'
        log = folder / f'killed-{killed}.log'
        run = processes.Run(workdir, *flags, often, log=log, **options)
        if killed % 5 == 4:  # anywhere in the start, most of which is importing
            moment = 'starting'
            time.sleep(rng.uniform(0.3, 1) * start_up)
        else:
            moment = 'training'
            run.wait_for('weights: ')
            target = steps * (killed + rng.random()) / (kills + 1)
            while _last_step(workdir) < target and not run.ended:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
        if run.ended:
            raise RuntimeError(f'it ended before it was killed:\n{run.output}')
        run.kill()
        killed += 1
        saved = sorted(p.name[:16] for p in (workdir / 'checkpoints').glob('*'))
        has = ', '.join(saved) or 'nothing'
        say(f'kill {killed:2d} of {kills}, while {moment}: checkpoints/ has {has}')
    run = processes.Run(workdir, *flags, log=folder / 'last.log', **options)
    if run.wait() != 0:
        raise RuntimeError(f'the killed run did not finish:\n{run.output}')
    return processes.differences(folder / 'whole', workdir, steps)


def _last_step(workdir: pathlib.Path) -> int:
    """The last step in the metrics of a run."""
    metrics = workdir / 'metrics.jsonl'
    steps = re.findall(r'"step": (\d+),', metrics.read_text()) if metrics.exists() else []
    return int(steps[-1]) if steps else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--platform', choices=('cpu', 'gpu'), default='cpu')
    args, flags = parser.parse_known_args()
    say = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        different = kill_and_compare(
            folder, args.kills, args.seed, flags, platform=args.platform, say=say
        )
    if different:
        print(f'DIFFERENT: {", ".join(different)}')
        return 1
    print(
        f'after {args.kills} kills parameters, optimizer state and metrics are equal, byte for byte'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
