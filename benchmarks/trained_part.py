"""What is saved by training less than all: steps of full training and of its parts, in turns.

    python -m benchmarks.trained_part --variant ViT-Ti_16 --size 224 --batch 32 --rounds 9

Prints, for each part: how many parameters are trained; the median over rounds of the time of a step
by that of the full one in the same round; temporary memory (activations and working space, by the
compiler's account) by the full one's; and the bytes of the optimizer's state. The optimizer is
that of the original release (SGD with momentum, 2 bytes a parameter), or another (--optimizer).
"""

import argparse
import statistics
from typing import Any

from benchmarks import recipes

FULL = 'full'
PARTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "train_only='last:3'": {'train_only': 'last:3'},
    "train_only='bias'": {'train_only': 'bias'},
    "train_only='norm'": {'train_only': 'norm'},
    'lora_rank=8': {'lora_rank': 8},
    "lora_rank=8, lora_targets='attention,mlp'": {
        'lora_rank': 8,
        'lora_targets': 'attention,mlp',
    },
    'lora_rank=8, dora=True': {'lora_rank': 8, 'dora': True},
    "train_only='head'": {'train_only': 'head'},
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--variant', default='ViT-Ti_16')
    parser.add_argument('--size', type=int, default=224, help='pixels')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--optimizer', default='sgd')
    args = parser.parse_args()
    made = {
        name: recipes.contestant(
            args.variant, args.size, args.batch, {'optimizer': args.optimizer, **knobs}
        )
        for name, knobs in PARTS.items()
    }
    seconds = recipes.in_turns(made, args.rounds)
    full = made[FULL]
    print('| what is trained | parameters | time | temporary memory | optimizer, bytes |')
    print('|---|---|---|---|---|')
    for name, one in made.items():
        ratio = recipes.median_ratio(seconds[name], seconds[FULL])
        print(
            f'| `{name}` | {one.trained:,} | {ratio:.2f} | {one.temporary / full.temporary:.2f} '
            f'| {one.optimizer:,} |'
        )
    print(
        f'full: {statistics.median(seconds[FULL]):.3f} s, {full.temporary / 2**20:,.0f} MiB of '
        f'temporary memory; {args}'
    )


if __name__ == '__main__':
    main()
