"""What training and predicting take, estimated: bytes on a device, and images per second.

Arithmetic, about a millisecond a call. The memory is a formula whose numbers were fitted to
compiled training steps; a run does not rely on it, but asks the compiler (`run.resources`), and so
does `compile_training` here.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax import models, optim, sharding, state, steps, variants
from vit_jax.analysis import counts
from vit_jax.analysis.architecture import Architecture
from vit_jax.configs import common
from vit_jax.models.cpu import CHUNK
from vit_jax.run import resources
from vit_jax.variants import sides

BYTES = {'float32': 4, 'bfloat16': 2}
_LIBRARIES = {'gpu': 32 * 2**20, 'cpu': 0}  # bytes that cuBLAS works in, on Hopper


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is trained; for predicting, only batch, dtype and platform matter.

    Attributes:
      batch: images per step, over all devices.
      accum_steps: micro-batches per device.
      dtype: of activations, 'float32' or 'bfloat16'.
      optimizer: 'sgd' (with momentum) or 'adamw', see `optim.create_optimizer`.
      optim_dtype: of momentum, or of the first moment.
      remat: '', 'dots' or 'full', see `models.encoder.Encoder`.
      attention: 'auto', 'xla' or 'cudnn', see `models.attention`.
      devices: how many share the batch.
      fsdp: how many share the parameters.
      platform: 'gpu' or 'cpu': whose compiler, see `jax.default_backend`.
    """

    batch: int
    accum_steps: int = 1
    dtype: str = 'float32'
    optimizer: str = 'sgd'
    optim_dtype: str = 'bfloat16'
    remat: str = ''
    attention: str = 'auto'
    devices: int = 1
    fsdp: int = 1
    platform: str = 'gpu'

    @property
    def multiple(self) -> int:
        """Of which a batch has to be a multiple."""
        return self.devices * self.accum_steps

    @property
    def width(self) -> int:
        """Bytes of an activation. On a CPU, XLA computes bfloat16 as float32."""
        return 4 if self.platform == 'cpu' else BYTES[self.dtype]


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


def _rule(
    block: Units, once: tuple[Units, ...] = ((0, 0, 0),), images: float = 0.0
) -> tuple[Units, tuple[Units, ...], float]:
    """Numbers that are alive at the peak, for one image.

    `block` in every block; the largest of `once` in the block that is worked on (the gradients of
    its two halves are computed one after the other); and `images` times the float32 image.
    """
    return block, once, images


# Fits to `memory_analysis()` of the compiled training step. Keys: platform, bytes of an activation,
# rematerialisation.
_VIT = {
    ('cpu', 4, ''): _rule((8, 1, 2), ((3.9, 1, 0),), 0.85),
    ('cpu', 4, 'dots'): _rule((4.7, 1, 0), ((4.2, 2, 0.84),), 0.5),
    ('cpu', 4, 'full'): _rule((0.75, 0, 0), ((7.6, 3, 0.56),), 0.5),
    ('gpu', 4, ''): _rule((8.3, 3, 2), images=1.4),
    ('gpu', 4, 'dots'): _rule((5.3, 1, 0), ((2.1, 3, 0),), 1.7),
    ('gpu', 4, 'full'): _rule((1, 0, 0), ((8.8, 4, 2),)),
    ('gpu', 2, ''): _rule((8, 3, 3), images=1.1),
    ('gpu', 2, 'dots'): _rule((5, 1, 0), ((3.1, 1.3, 0.8),), 1.6),
    ('gpu', 2, 'full'): _rule((1, 0, 0), ((14.4, 3.8, 0), (12, 0, 5)), 0.3),
}
_MIXER = {
    ('cpu', 4, ''): _rule((4, 1, 1), ((6, 1, 0),), 1),
    ('gpu', 4, ''): _rule((4.3, 3, 3), images=1.4),
    ('gpu', 2, ''): _rule((4.3, 3, 3), images=0.9),
    ('gpu', 2, 'full'): _rule((1, 0, 0), ((6, 4, 0),)),
}
# The last block's, where only the class token is read; on a GPU not fitted yet, and as the others'.
_LAST = (2, 0, 0)
# More of T*D and T*M in every block that keeps the masks of dropout and, on a CPU, what GELU gave;
# and where they are made again, of the block that is worked on.
_DROPOUT = {'cpu': (4, 3), 'gpu': (0.1, 0.8)}
_DROPOUT_ONCE = {'cpu': (4, 2), 'gpu': (0, 0)}
# Numbers per output of a ResNet's convolution: of the root (with its pooling), of the units.
_RESNET = {('cpu', 4): (9, 2.5), ('gpu', 4): (5.7, 1.65), ('gpu', 2): (5.7, 1.65)}
# What is there of the gradients' size while the parameters are updated.
_UPDATE = {('cpu', 'sgd'): 2.2, ('cpu', 'adamw'): 2.5, ('gpu', 'sgd'): 1.1, ('gpu', 'adamw'): 1.1}


def training_memory(of: Architecture, plan: Plan) -> Memory:
    """What a training step needs on each device, by a fitted formula: an estimate.

    On a CPU it is held against compiled steps by the tests: ViTs and Mixers of a few blocks, each
    `remat`, within 10 %. On a GPU it was fitted to 61 steps of an earlier form of the step,
    compiled ahead of time for an H200 with jax 0.10.2 (ViT, Mixer, hybrids; within 10 % then), and
    rather overestimates. Least is known of hybrids in float32, `remat` of hybrids and Mixers, and
    several devices. `compile_training` asks the compiler.

    Raises:
      UserError: the image is not a whole number of patches.
    """
    parts = counts.parts(of.model_config, of.num_classes, of.image_size, channels=of.channels)
    size = sum(part.repeat * _share(shape, plan.fsdp) for part in parts for shape in part.shapes)
    weights, optimizer = 4 * size, size * BYTES[plan.optim_dtype] + 4
    if plan.optimizer == 'adamw':
        optimizer += 4 * size + 4
    images = -(-plan.batch // plan.devices)
    pixels = images * 4 * of.channels * math.prod(sides(of.image_size))
    micro = -(-images // max(1, plan.accum_steps))
    activations = micro * _per_image(of, plan, micro)
    gradients = weights
    if plan.platform == 'gpu' and plan.dtype == 'bfloat16':
        gradients //= 2  # those of the bfloat16 copies of the weights, which are there as well
        activations += gradients
    temporary = activations
    if plan.platform == 'cpu':
        temporary += 0.55 * gradients  # those of the first blocks to come; activations go meanwhile
    if plan.accum_steps > 1:
        temporary += pixels  # the mirrored images of the whole batch
    if plan.fsdp > 1:
        temporary += 1.8 * gradients  # with what is gathered of the weights
    else:
        temporary += weights if plan.accum_steps > 1 else 0  # their sum, float32
        temporary = max(temporary, _UPDATE[plan.platform, plan.optimizer] * gradients)
    inputs, workspace = pixels + 8 * images, _LIBRARIES[plan.platform]
    total = round(weights + optimizer + inputs + temporary + workspace)
    return Memory(weights, gradients, optimizer, round(activations), inputs, workspace, total)


def _share(shape: tuple[int, ...], fsdp: int) -> int:
    """Elements of an array on one device, by the rule of `sharding.state_sharding`."""
    size = math.prod(shape)
    if fsdp > 1 and size >= sharding.MIN_SIZE_TO_SHARD and any(n % fsdp == 0 for n in shape):
        return size // fsdp
    return size


def _per_image(of: Architecture, plan: Plan, batch: int) -> float:
    """Bytes of activations for one image of a micro-batch of `batch` images."""
    config = of.model_config
    s = counts.sizes(config, of.image_size)
    key = (plan.platform, plan.width, plan.remat)
    masks, square = (0.0, 0.0), s.heads * s.tokens**2
    if variants.is_mixer(config):
        block, once, images = _MIXER.get(key, _MIXER[(*key[:2], '')])
        square = s.width * s.tokens_hidden
    else:
        block, once, images = _VIT[key]
        transformer = config['transformer']
        drop = transformer.get('attention_dropout_rate', 0.0)
        chunked = plan.attention == 'auto' and plan.platform == 'cpu' and not drop
        # What is a single chunk is kept, because XLA merges its two computations.
        if chunked and batch * square > CHUNK:
            block = (*block[:2], 0)
        elif plan.attention == 'cudnn':
            square = 0
        if transformer.get('dropout_rate', 0.0):
            masks = (_DROPOUT_ONCE if plan.remat else _DROPOUT)[plan.platform]
    units = (s.tokens * s.width, s.tokens * s.hidden, square)

    def size(factors: Units) -> float:
        return sum(factor * unit for factor, unit in zip(factors, units, strict=True))

    blocks = s.blocks
    if plan.platform == 'cpu' and counts.unused_macs(config, of.image_size):
        blocks -= 1  # the last one keeps little, see `models.encoder.Encoder`
    numbers = blocks * size(block) + max(map(size, once))
    numbers += (1 if plan.remat else blocks) * size((*masks, 0))
    numbers += (s.blocks - blocks) * size(_LAST)
    for index, group in enumerate(counts.convolutions(config, of.image_size, of.channels)):
        numbers += _RESNET[key[:2]][min(index, 1)] * sum(c.outputs for c in group)
    return plan.width * numbers + images * 4 * of.channels * math.prod(sides(of.image_size))


def training_parts(
    of: Architecture, plan: Plan
) -> tuple[Any, optax.GradientTransformation, optax.Schedule, jax.sharding.Mesh]:
    """The model, its default optimizer and schedule, and a mesh of one device of this machine."""
    config = common.get_defaults()
    config.update(optimizer=plan.optimizer, optim_dtype=plan.optim_dtype)
    schedule = optim.schedule_of(config)
    model = models.from_config(
        of.model_config,
        num_classes=of.num_classes,
        dtype=jnp.dtype(plan.dtype),
        attention=plan.attention,
        remat=plan.remat,
    )
    mesh = sharding.create_mesh(1, jax.devices()[:1])
    return model, optim.create_optimizer(config, schedule), schedule, mesh


def compile_training(of: Architecture, plan: Plan) -> tuple[int, float]:
    """What XLA counts in the training step for one device of this machine; compiled, not run.

    Returns:
      Bytes (arguments, outputs and temporary memory, at one time), and floating-point operations,
      0 where they are not counted; the body of a loop is counted once.
    """
    model, tx, schedule, mesh = training_parts(of, plan)
    abstract = state.abstract_state(model, tx, of.image_size, mesh, channels=of.channels)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = steps.make_train_step(model, tx, schedule, mesh, shardings, seed=0)
    lowered = step.lower(
        abstract, steps.abstract_batch(plan.batch, of.image_size, mesh, channels=of.channels)
    )
    # Never run, so not optimised: memory and operations are the same.
    quick: dict[str, str | bool] = {}
    if jax.default_backend() == 'cpu':
        quick['xla_backend_optimization_level'] = '0'
    compiled = lowered.compile(compiler_options=quick)
    flops = (compiled.cost_analysis() or {}).get('flops', 0.0)
    return resources.program_bytes(compiled), flops


def inference_memory(of: Architecture, plan: Plan) -> Memory:
    """What a prediction step needs on one device.

    The working space is that of the widest layer: the image, the MLP's hidden layer, the attention
    weights, or a convolution, whichever is largest. On a CPU up to three times too much for small
    batches.
    """
    s = counts.sizes(of.model_config, of.image_size)
    weights = 4 * counts.parameters(
        of.model_config, of.num_classes, of.image_size, channels=of.channels
    )
    image, tokens = (
        4 * of.channels * math.prod(sides(of.image_size)),
        plan.width * s.tokens * s.width,
    )
    hidden = plan.width * max(s.tokens * s.hidden, s.width * s.tokens_hidden)
    phases = [
        image,
        (6 if plan.platform == 'cpu' else 1) * hidden + 2 * tokens,
        2 * plan.width * s.heads * s.tokens**2 + tokens,
    ]
    for group in counts.convolutions(of.model_config, of.image_size, of.channels):
        phases.append(4 * plan.width * max(c.outputs for c in group))
    activations = plan.batch * max(phases)
    if plan.platform == 'gpu' and plan.dtype == 'bfloat16':
        activations += weights // 2  # the weights in bfloat16
    inputs, workspace = plan.batch * image, _LIBRARIES[plan.platform]
    total = weights + activations + inputs + workspace
    return Memory(weights, 0, 0, activations, inputs, workspace, total)


def largest_batch(
    memory: int, needed: Callable[[Architecture, Plan], Memory], of: Architecture, plan: Plan
) -> int:
    """The largest batch that fits, a multiple of `plan.multiple`; 0 if none does.

    Args:
      memory: bytes that there are on a device.
      needed: `training_memory` or `inference_memory`.
      of: the model.
      plan: all but the batch.
    """

    def fits(count: int) -> bool:
        batch = count * plan.multiple
        return needed(of, dataclasses.replace(plan, batch=batch)).total <= memory

    low, high = 0, 1
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * plan.multiple
