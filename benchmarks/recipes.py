"""What each piece of a recipe costs: training steps with it beside plain ones, in turns.

    python -m benchmarks.recipes --variant ViT-Ti_16 --size 64 --batch 32 --rounds 9

Prints, for each piece, the median over rounds of its time by the plain step's of the same round,
and the bytes of the state (parameters and optimizer) by the plain one's; for what is done on the
host, the median time for an image.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import turns
from vit_jax import data, groups, models, optim, sharding, steps, variants
from vit_jax import state as state_lib
from vit_jax.configs import common
from vit_jax.data import own
from vit_jax.run import augmentation, distillation, recipe, trained_part

PIECES: dict[str, dict[str, Any]] = {
    'plain (sgd)': {},
    'label_smoothing=0.1': {'label_smoothing': 0.1},
    "loss='sigmoid'": {'loss': 'sigmoid'},
    "optimizer='adamw'": {'optimizer': 'adamw'},
    "optimizer='lion'": {'optimizer': 'lion'},
    "optimizer='lamb'": {'optimizer': 'lamb'},
    "optimizer='muon'": {'optimizer': 'muon'},
    "optimizer='adafactor'": {'optimizer': 'adafactor'},
    'sam_rho=0.1': {'sam_rho': 0.1},
    'sam_rho=0.6, gsam_alpha=0.6': {'sam_rho': 0.6, 'gsam_alpha': 0.6},
    'layer_decay=0.75': {'layer_decay': 0.75},
    "frozen='(?!head/).*'": {'frozen': '(?!head/).*'},
    'ema_decay=0.99': {'ema_decay': 0.99},
    'stochastic_depth=0.1': {'stochastic_depth': 0.1},
    'random_erasing=0.25': {'random_erasing': 0.25},
    "distillation='patient'": {'distillation': 'patient', 'teacher': 'of the same size'},
    'mixup=0.2': {'mixup': 0.2},
    'cutmix=1.0': {'cutmix': 1.0},
}
# What is done on the host, in the threads that decode: a time for each image.
ON_THE_HOST: dict[str, dict[str, Any]] = {
    "randaug='2,15'": {'randaug': '2,15'},
    "randaug='rand-m9-mstd0.5-inc1'": {'randaug': 'rand-m9-mstd0.5-inc1'},
    'three_augment=True': {'three_augment': True},
    'color_jitter=0.3': {'color_jitter': 0.3},
}
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A training step, compiled, and what it takes.

    Attributes:
      timed: does a step; seconds.
      state: bytes of parameters and optimizer.
      optimizer: bytes of the latter alone.
      temporary: bytes of activations and working space.
      trained: how many parameters are.
    """

    timed: Callable[[], float]
    state: int
    optimizer: int
    temporary: int
    trained: int


def contestant(variant: str, size: int, batch: int, knobs: dict[str, Any]) -> Contestant:
    """The training step with these knobs."""
    config = common.get_defaults()
    config.update(batch=batch, accum_steps=1, **knobs)
    plain = models.from_config(variants.get_config(variant), num_classes=CLASSES)
    model = trained_part.adapted(config, plain)
    mesh, rng = sharding.create_mesh(), np.random.default_rng(0)
    images = rng.uniform(0, 255, (batch, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, batch).astype(np.int32)
    names = [str(name) for name in range(CLASSES)]
    train = own.as_selection(data.from_arrays(images.astype(np.uint8), labels, names), 'images')
    params = jax.device_get(state_lib.init_params(model, size, seed=0))
    schedule = optim.schedule_of(config)
    named = functools.partial(groups.names_of, params)
    tx = recipe.optimizer_of(config, schedule, None, named)
    frozen = trained_part.frozen_of(config, named)
    state = state_lib.create_state(params, tx, mesh)
    places = sharding.state_sharding(params, mesh)
    step = steps.make_train_step(
        model,
        tx,
        schedule,
        mesh,
        sharding.state_sharding(state, mesh),
        seed=0,
        loss_fn=distillation.loss_of(config, recipe.losses_of(config, train, None)[0]),
        frozen=frozen,
        erasing=config.random_erasing,
        depth_rate=config.stochastic_depth,
        mix=augmentation.mix_of(config, train),
        sharpness=optim.sharpness_of(config, schedule),
        teacher=models.for_inference(model) if config.distillation else None,
        teacher_shardings=places if config.distillation else None,
    )
    taught = (sharding.put_tree(params, places),) if config.distillation else ()
    order = np.arange(batch, dtype=np.int32)
    inputs = sharding.put_batch({'image': images, 'label': labels, 'position': order}, mesh)
    compiled = step.lower(state, inputs, *taught).compile()
    kept = [jax.block_until_ready(compiled(state, inputs, *taught))[0]]  # once run

    def timed() -> float:
        begin = time.perf_counter()
        kept[0] = jax.block_until_ready(compiled(kept[0], inputs, *taught))[0]
        return time.perf_counter() - begin

    def size_of(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    return Contestant(
        timed,
        state=size_of(kept[0]),
        optimizer=size_of(kept[0].opt_state),
        temporary=getattr(compiled.memory_analysis(), 'temp_size_in_bytes', 0),
        trained=sum(leaf.size for leaf in jax.tree.leaves(groups.partition(params, frozen)[0])),
    )


def in_turns(made: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each contestant, in each round."""
    return turns.take_turns({name: made[name].timed for name in made}, rounds, pause=0.0)[0]


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Median over rounds of one's seconds by those of another."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def on_the_host(size: int, knobs: dict[str, Any], images: int = 200) -> float:
    """Median seconds for an image of `size` pixels, on one thread."""
    config = common.get_defaults()
    config.update(**knobs)
    rng, seconds = np.random.default_rng(0), []
    one = rng.uniform(0, 255, (1, size, size, 3)).astype(np.float32)
    train = own.as_selection(data.from_arrays(one.astype(np.uint8), [0], ['a', 'b']), 'images')
    made = augmentation.host_augment_of(config, train)
    for _ in range(images):
        pixels = one[0].copy()
        begin = time.perf_counter()
        made(pixels, rng)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--variant', default='ViT-Ti_16')
    parser.add_argument('--size', type=int, default=64, help='pixels')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=9)
    args = parser.parse_args()
    made = {
        name: contestant(args.variant, args.size, args.batch, knobs)
        for name, knobs in PIECES.items()
    }
    seconds = in_turns(made, args.rounds)
    plain, plain_bytes = seconds['plain (sgd)'], made['plain (sgd)'].state
    for name, one in made.items():
        ratio = median_ratio(seconds[name], plain)
        print(f'| `{name}` | {ratio:.2f} | {one.state / plain_bytes:.2f} |', flush=True)
    for name, knobs in ON_THE_HOST.items():
        print(f'| `{name}` | {on_the_host(224, knobs) * 1000:.2f} ms an image of 224 px |')
    print(f'plain: {statistics.median(plain):.3f} s; {args}')


if __name__ == '__main__':
    main()
