"""What each piece of a recipe costs: training steps with it beside plain ones, in turns.

    python -m benchmarks.recipes --variant ViT-Ti_16 --size 64 --batch 32 --rounds 9

Prints, for each piece, the median over rounds of its time by the plain step's of the same round,
and the bytes of the state (parameters and optimizer) by the plain one's; for what is done on the
host, the median time for an image.
"""

import argparse
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
from vit_jax.run import augmentation, distillation, recipe

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


def contestant(
    variant: str, size: int, batch: int, knobs: dict[str, Any]
) -> tuple[Callable[[], float], int]:
    """A function that times one step, in seconds; and the bytes of the state."""
    config = common.get_defaults()
    config.update(batch=batch, accum_steps=1, **knobs)
    model = models.from_config(variants.get_config(variant), num_classes=CLASSES)
    mesh, rng = sharding.create_mesh(), np.random.default_rng(0)
    images = rng.uniform(0, 255, (batch, size, size, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, batch).astype(np.int32)
    names = [str(name) for name in range(CLASSES)]
    train = own.as_selection(data.from_arrays(images.astype(np.uint8), labels, names), 'images')
    params = jax.device_get(state_lib.init_params(model, size, seed=0))
    schedule = optim.schedule_of(config)
    tx = recipe.optimizer_of(config, schedule, None, lambda: groups.names_of(params))
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
        frozen=config.frozen,
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
    kept = [jax.block_until_ready(step(state, inputs, *taught))[0]]  # compiled, and once run

    def timed() -> float:
        begin = time.perf_counter()
        kept[0] = jax.block_until_ready(step(kept[0], inputs, *taught))[0]
        return time.perf_counter() - begin

    return timed, sum(leaf.nbytes for leaf in jax.tree.leaves(kept[0]))


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
    tasks = {name: timed for name, (timed, _) in made.items()}
    seconds, _ = turns.take_turns(tasks, args.rounds, pause=0.0)
    plain, (_, plain_bytes) = seconds['plain (sgd)'], made['plain (sgd)']
    for name, (_, size) in made.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], plain, strict=True))
        print(f'| `{name}` | {ratio:.2f} | {size / plain_bytes:.2f} |', flush=True)
    for name, knobs in ON_THE_HOST.items():
        print(f'| `{name}` | {on_the_host(224, knobs) * 1000:.2f} ms an image of 224 px |')
    print(f'plain: {statistics.median(plain):.3f} s; {args}')


if __name__ == '__main__':
    main()
