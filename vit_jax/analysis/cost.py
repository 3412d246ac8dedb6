"""What training and predicting take, estimated: bytes on a device, and images per second.

Arithmetic, about a millisecond a call. The memory is a formula whose numbers were fitted to
compiled training steps; a run does not rely on it, but asks the compiler (`run.resources`), and so
does `compile_training` here.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from configs import common
from vit_jax import models, optim, sharding, state, steps, variants
from vit_jax.analysis import counts
from vit_jax.models.cpu import CHUNK
from vit_jax.run import resources

BYTES = {'float32': 4, 'bfloat16': 2}
_WORKSPACE = {'gpu': 32 * 2**20, 'cpu': 0}  # bytes; of cuBLAS on Hopper


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      weights: the parameters, float32.
      gradients: float32, one per parameter; 0 for inference.
      optimizer: momentum or moments, and counters.
      activations: what the forward pass keeps for the backward pass, at its largest, and working
        space; of inference the working space alone.
      inputs: a batch as it is put on the device, float32 images.
      workspace: of libraries.
      total: the most that is there at one time, weights and inputs included. It is less than the
        sum: gradients come into being while activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    inputs: int
    workspace: int
    total: int


Units = tuple[float, float, float]  # of T*D, of T*M, and of H*T*T (of a Mixer D * tokens_hidden)


@dataclasses.dataclass(frozen=True)
class _Activations:
    """Numbers that are alive at the peak, for one image.

    `block` in every block; the largest of `once` in the block that is worked on (the gradients of
    its two halves are computed one after the other); and `images` times the float32 image.
    """

    block: Units
    once: tuple[Units, ...] = ((0, 0, 0),)
    images: float = 0.0


# Fits to `memory_analysis()` of the compiled training step. Keys: platform, bytes of an activation,
# rematerialisation. On a CPU, XLA computes bfloat16 as float32.
_VIT = {
    ('cpu', 4, ''): _Activations((8, 1, 2), ((3.9, 1, 0),), 0.85),
    ('cpu', 4, 'dots'): _Activations((4.7, 1, 0), ((4.2, 2, 0.84),), 0.5),
    ('cpu', 4, 'full'): _Activations((0.75, 0, 0), ((7.6, 3, 0.56),), 0.5),
    ('gpu', 4, ''): _Activations((8.3, 3, 2), images=1.4),
    ('gpu', 4, 'dots'): _Activations((5.3, 1, 0), ((2.1, 3, 0),), 1.7),
    ('gpu', 4, 'full'): _Activations((1, 0, 0), ((8.8, 4, 2),)),
    ('gpu', 2, ''): _Activations((8, 3, 3), images=1.1),
    ('gpu', 2, 'dots'): _Activations((5, 1, 0), ((3.1, 1.3, 0.8),), 1.6),
    ('gpu', 2, 'full'): _Activations((1, 0, 0), ((14.4, 3.8, 0), (12, 0, 5)), 0.3),
}
_MIXER = {
    ('cpu', 4, ''): _Activations((4, 1, 1), ((6, 1, 0),), 1),
    ('gpu', 4, ''): _Activations((4.3, 3, 3), images=1.4),
    ('gpu', 2, ''): _Activations((4.3, 3, 3), images=0.9),
    ('gpu', 2, 'full'): _Activations((1, 0, 0), ((6, 4, 0),)),
}
# The last block's, where only the class token is read; on a GPU not fitted yet, and as the others'.
_LAST = (2, 0, 0)
# More of T*D and T*M in every block that keeps the masks of dropout and, on a CPU, what GELU gave;
# and where they are made anew, of the block that is worked on.
_DROPOUT = {'cpu': (4, 3), 'gpu': (0.1, 0.8)}
_DROPOUT_ONCE = {'cpu': (4, 2), 'gpu': (0, 0)}
# Numbers per output of a ResNet's convolution: of the root (with its pooling), of the units.
_RESNET = {('cpu', 4): (9, 2.5), ('gpu', 4): (5.7, 1.65), ('gpu', 2): (5.7, 1.65)}
# What is there of the gradients' size while the parameters are updated.
_UPDATE = {('cpu', 'sgd'): 2.2, ('cpu', 'adamw'): 2.5, ('gpu', 'sgd'): 1.1, ('gpu', 'adamw'): 1.1}


def training_memory(
    model_config: Mapping[str, Any],
    *,
    num_classes: int,
    image_size: int,
    batch: int,
    accum_steps: int = 1,
    dtype: str = 'float32',
    optimizer: str = 'sgd',
    optim_dtype: str = 'bfloat16',
    remat: str = '',
    attention: str = 'auto',
    devices: int = 1,
    fsdp: int = 1,
    platform: str = 'gpu',
) -> Memory:
    """What a training step needs on each device, by a fitted formula: an estimate.

    On a CPU it is held against compiled steps by the tests: ViTs and Mixers of a few blocks, each
    `remat`, within 10 %. On a GPU it was fitted to 61 steps of an earlier form of the step,
    compiled ahead of time for an H200 with jax 0.10.2 (ViT, Mixer, hybrids; within 10 % then), and
    leans to too much. Least is known of hybrids in float32, `remat` of hybrids and Mixers, and
    several devices. `compile_training` tells what is so.

    Args:
      model_config: see `variants.get_config`.
      num_classes: C.
      image_size: side of the images, pixels.
      batch: images per step, over all devices.
      accum_steps: micro-batches per device.
      dtype: of activations, 'float32' or 'bfloat16'.
      optimizer: 'sgd' (with momentum) or 'adamw', see `optim.create_optimizer`.
      optim_dtype: of momentum, or of the first moment.
      remat: '', 'dots' or 'full', see `models.vit.Encoder`.
      attention: 'auto', 'xla' or 'cudnn', see `models.attention`.
      devices: how many share the batch.
      fsdp: how many share the parameters.
      platform: 'gpu' or 'cpu': whose compiler, see `jax.default_backend`.

    Raises:
      UserError: the image is not a whole number of patches.
    """
    arrays = list(_arrays(model_config, num_classes, image_size))
    size = sum(_share(shape, fsdp) for shape in arrays)
    weights = 4 * size
    optimizer_bytes = size * (
        BYTES[optim_dtype] + 4 if optimizer == 'adamw' else BYTES[optim_dtype]
    ) + (8 if optimizer == 'adamw' else 4)
    images = -(-batch // devices)
    inputs = images * (12 * image_size**2 + 8)
    micro = -(-images // max(1, accum_steps))
    activations = micro * _per_image(
        model_config, image_size, micro, dtype, remat, attention, platform
    )
    gradients = weights
    if platform == 'gpu' and dtype == 'bfloat16':
        gradients //= 2  # those of the bfloat16 copies of the weights, which are there as well
        activations += gradients
    temporary = activations
    if platform == 'cpu':
        temporary += 0.55 * gradients  # those of the first blocks to come; activations go meanwhile
    if accum_steps > 1:
        temporary += images * 12 * image_size**2  # the mirrored images of the whole batch
    if fsdp > 1:
        temporary += 1.8 * gradients  # with what is gathered of the weights
    else:
        temporary += weights if accum_steps > 1 else 0  # their sum, float32
        temporary = max(temporary, _UPDATE[platform, optimizer] * gradients)
    workspace = _WORKSPACE[platform]
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer_bytes,
        activations=round(activations),
        inputs=inputs,
        workspace=workspace,
        total=round(weights + optimizer_bytes + inputs + temporary + workspace),
    )


def _arrays(
    model_config: Mapping[str, Any], num_classes: int, image_size: int
) -> Iterator[tuple[int, ...]]:
    for part in counts.parts(model_config, num_classes, image_size):
        for _ in range(part.repeat):
            yield from part.shapes


def _share(shape: tuple[int, ...], fsdp: int) -> int:
    """Elements of an array on one device, by the rule of `sharding.state_sharding`."""
    size = math.prod(shape)
    if fsdp > 1 and size >= sharding.MIN_SIZE_TO_SHARD and any(n % fsdp == 0 for n in shape):
        return size // fsdp
    return size


def _per_image(
    model_config: Mapping[str, Any],
    image_size: int,
    batch: int,
    dtype: str,
    remat: str,
    attention: str,
    platform: str,
) -> float:
    """Bytes of activations for one image of a micro-batch."""
    s = counts.sizes(model_config, image_size)
    width = 4 if platform == 'cpu' else BYTES[dtype]
    key = (platform, width, remat)
    masks, square = (0.0, 0.0), s.heads * s.tokens**2
    if variants.is_mixer(model_config):
        rule, square = _MIXER.get(key, _MIXER[(*key[:2], '')]), s.width * s.tokens_hidden
        block = rule.block
    else:
        transformer = model_config['transformer']
        drop = transformer.get('attention_dropout_rate', 0.0)
        chunked = attention == 'auto' and platform == 'cpu' and not drop
        rule = _VIT[key]
        block = rule.block
        # What is a single chunk is kept, because XLA merges its two computations.
        if chunked and batch * square > CHUNK:
            block = (*block[:2], 0)
        elif attention == 'cudnn':
            square = 0
        if transformer.get('dropout_rate', 0.0):
            masks = (_DROPOUT_ONCE if remat else _DROPOUT)[platform]
    units = (s.tokens * s.width, s.tokens * s.hidden, square)

    def size(factors: Units) -> float:
        return sum(factor * unit for factor, unit in zip(factors, units, strict=True))

    blocks = s.blocks
    if platform == 'cpu' and counts.unused_macs(model_config, image_size):
        blocks -= 1  # the last one keeps little, see `models.vit.Encoder`
    numbers = blocks * size(block) + max(map(size, rule.once))
    numbers += (1 if remat else blocks) * size((*masks, 0))
    numbers += (s.blocks - blocks) * size(_LAST)
    for index, group in enumerate(counts.convolutions(model_config, image_size)):
        numbers += _RESNET[key[:2]][min(index, 1)] * sum(c.outputs for c in group)
    return width * numbers + rule.images * 12 * image_size**2


def compile_training(
    model_config: Mapping[str, Any],
    *,
    num_classes: int,
    image_size: int,
    batch: int,
    dtype: str = 'float32',
    optimizer: str = 'sgd',
    optim_dtype: str = 'bfloat16',
    remat: str = '',
    attention: str = 'auto',
) -> tuple[int, float]:
    """What XLA counts in the training step for one device of this machine; compiled, not run.

    Args: as for `training_memory`.

    Returns:
      Bytes (arguments, outputs and temporary memory, at one time), and floating-point operations,
      0 where they are not counted; the body of a loop is counted once.
    """
    config = common.get_defaults()
    config.update(dict(optimizer=optimizer, optim_dtype=optim_dtype))
    schedule = optim.create_learning_rate_schedule(
        config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
    )
    tx = optim.create_optimizer(config, schedule)
    model = models.from_config(
        model_config,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        attention=attention,
        remat=remat,
    )
    mesh = sharding.create_mesh(1, jax.devices()[:1])
    abstract = state.abstract_state(model, tx, image_size, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = steps.make_train_step(model, tx, schedule, mesh, shardings, seed=0)
    lowered = step.lower(abstract, steps.abstract_batch(batch, image_size, mesh))
    # Machine code that nobody runs need not be optimised; memory and operations are the same.
    quick = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
    compiled = lowered.compile(compiler_options=quick)
    flops = (compiled.cost_analysis() or {}).get('flops', 0.0)
    return resources.program_bytes(compiled), flops


def inference_memory(
    model_config: Mapping[str, Any],
    *,
    num_classes: int,
    image_size: int,
    batch: int,
    dtype: str = 'float32',
    platform: str = 'gpu',
) -> Memory:
    """What a prediction step needs; arguments as for `training_memory`, on one device.

    The working space is that of the widest layer: the image, the MLP's hidden layer, the attention
    weights, or a convolution, whichever is largest. On a CPU up to three times too much for small
    batches.
    """
    s = counts.sizes(model_config, image_size)
    width = 4 if platform == 'cpu' else BYTES[dtype]
    weights = 4 * counts.parameters(model_config, num_classes, image_size)
    image, tokens = 12 * image_size**2, width * s.tokens * s.width
    hidden = width * max(s.tokens * s.hidden, s.width * s.tokens_hidden)
    phases = [
        image,
        (6 if platform == 'cpu' else 1) * hidden + 2 * tokens,
        2 * width * s.heads * s.tokens**2 + tokens,
    ]
    for group in counts.convolutions(model_config, image_size):
        phases.append(4 * width * max(c.outputs for c in group))
    activations = batch * max(phases)
    if platform == 'gpu' and dtype == 'bfloat16':
        activations += weights // 2  # the weights in bfloat16
    inputs, workspace = batch * image, _WORKSPACE[platform]
    total = weights + activations + inputs + workspace
    return Memory(weights, 0, 0, activations, inputs, workspace, total)


def images_per_second(
    macs_per_image: int, peak_tflops: float, utilisation: float, devices: int = 1
) -> float:
    """Images per second at a share of the peak rate: 2 FLOPs to a multiply-accumulate.

    Args:
      macs_per_image: see `counts.training_macs` and `counts.forward_macs`.
      peak_tflops: of one device, TFLOP/s.
      utilisation: what is reached of it, above 0, at most 1.
      devices: how many work.
    """
    return devices * utilisation * peak_tflops * 1e12 / (2 * macs_per_image)


def largest_batch(memory: int, needed: Callable[[int], Memory], multiple: int = 1) -> int:
    """The largest batch that fits; 0 if none does.

    Args:
      memory: bytes that there are on a device.
      needed: what a batch takes, such as `training_memory` with all but `batch` given.
      multiple: of which the batch has to be a multiple (devices * accum_steps).
    """
    high = 1
    while needed(high * multiple).total <= memory:
        high *= 2
        if high > 2**24:
            return high * multiple
    low = high // 2  # fits, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        if needed(middle * multiple).total <= memory:
            low = middle
        else:
            high = middle
    return low * multiple
