"""The tables of vit_jax cost."""

import dataclasses
from collections.abc import Sequence

from vit_jax import variants
from vit_jax.analysis import cost, counts, devices
from vit_jax.analysis.architecture import Architecture
from vit_jax.analysis.tables import Table
from vit_jax.errors import UserError

GIB = 2**30
RULE_OF_THUMB = 20  # bytes per parameter: 16-bit weights and gradients beside float32, and Adam


@dataclasses.dataclass(frozen=True)
class Target:
    """What a model is trained on.

    Attributes:
      device: each of the devices.
      memory_fraction: what JAX takes of its memory, above 0, at most 1.
      utilisation: what is reached of its peak rate, above 0, at most 1.
    """

    device: devices.Device
    memory_fraction: float
    utilisation: float

    @property
    def memory(self) -> int:
        """Bytes of a device that JAX takes."""
        return int(self.device.memory_gib * GIB * self.memory_fraction)

    def images_per_second(self, macs: int, plan: cost.Plan) -> float:
        """A prediction, from the multiply-accumulates (2 FLOPs each) of an image."""
        peak = plan.devices * self.device.peak(plan.dtype) * 1e12
        return self.utilisation * peak / (2 * macs)

    def largest(self, of: Architecture, plan: cost.Plan) -> int:
        """The largest batch that can be trained, over all devices."""
        return cost.largest_batch(self.memory, cost.training_memory, of, plan)


def check(plan: cost.Plan, target: Target) -> None:
    """Raises `UserError` for what no run could have."""
    for name in ('batch', 'accum_steps', 'devices', 'fsdp'):
        if getattr(plan, name) < 1:
            raise UserError(f'--{name} {getattr(plan, name)}: expected a number from 1 up')
    for name in ('memory_fraction', 'utilisation'):
        if not 0 < getattr(target, name) <= 1:
            raise UserError(f'--{name} {getattr(target, name):g}: expected a share, above 0 to 1')
    if plan.devices % plan.fsdp:
        raise UserError(f'--fsdp {plan.fsdp} does not divide --devices {plan.devices}')
    if plan.batch % plan.multiple:
        nearest = max(1, round(plan.batch / plan.multiple)) * plan.multiple
        raise UserError(
            f'--batch {plan.batch} is not a multiple of devices times accum_steps, '
            f'{plan.multiple}: use {nearest}'
        )


def report(of: Architecture, plan: cost.Plan, target: Target) -> list[Table]:
    """Parameters and FLOPs; memory; speed and the largest batch."""
    return [_work(of, plan), _memory(of, plan), _speed(of, plan, target)]


def _work(of: Architecture, plan: cost.Plan) -> Table:
    sizes = counts.sizes(of.model_config, of.image_size)
    rows = []
    for part in counts.parts(of.model_config, of.num_classes, of.image_size, channels=of.channels):
        name = f'{part.repeat} x {part.name}' if part.repeat > 1 else part.name
        rows.append((name, f'{part.parameters:,}', _giga(2 * part.repeat * part.macs)))
    forward = counts.forward_macs(
        of.model_config, of.num_classes, of.image_size, channels=of.channels
    )
    training = counts.training_macs(
        of.model_config, of.num_classes, of.image_size, plan.remat, of.channels
    )
    total = counts.parameters(of.model_config, of.num_classes, of.image_size, channels=of.channels)
    rows.append(('forward', f'{total:,}', _giga(2 * forward)))
    remat = f', remat {plan.remat}' if plan.remat else ''
    rows.append((f'training{remat}', '', _giga(2 * training)))
    notes = [f'{forward / 1e9:.3f} G multiply-accumulates forward, {sizes.tokens} tokens.']
    unused = counts.unused_macs(of.model_config, of.image_size)
    if unused:
        notes.append(
            f'Of the last block, {2 * unused / 1e9:.3f} GFLOPs forward are not done here: nothing '
            'depends on them.'
        )
    h = sizes.width
    if sizes.heads and sizes.hidden == 4 * h:
        notes.append(f'A block has 12 h^2 + 13 h = {12 * h * h + 13 * h:,} parameters (h = {h}).')
    return Table(f'{of}: work for one image', ('Part', 'Parameters>', 'GFLOPs>'), rows, notes)


def _memory(of: Architecture, plan: cost.Plan) -> Table:
    training, inference = cost.training_memory(of, plan), cost.inference_memory(of, plan)
    rows = [
        (name, _gib(getattr(training, name)), _gib(getattr(inference, name)))
        for name in (f.name for f in dataclasses.fields(cost.Memory))
    ]
    parameters = counts.parameters(
        of.model_config, of.num_classes, of.image_size, channels=of.channels
    )
    state = training.weights + training.gradients + training.optimizer
    notes = (
        'The total is the most at one time; gradients come into being while activations go.',
        f'Weights, gradients and optimizer: {state / parameters:.1f} bytes per parameter and '
        f'device ({plan.optimizer}, moments {plan.optim_dtype}); the rule of thumb '
        f'{RULE_OF_THUMB} bytes (mixed precision with Adam) would be '
        f'{_gib(RULE_OF_THUMB * parameters)} GiB.',
        f'An estimate by formula, for the {plan.platform.upper()} compiler of XLA; --xla compiles.',
    )
    title = (
        f'{of}: GiB on each of {plan.devices} device(s), batch {plan.batch}, {plan.dtype}, '
        f'{plan.optimizer}'
    )
    return Table(title, ('Part', 'Training>', 'Inference>'), rows, notes)


def _speed(of: Architecture, plan: cost.Plan, target: Target) -> Table:
    device, needed = target.device, cost.training_memory(of, plan).total
    alone = dataclasses.replace(plan, devices=1, accum_steps=1)
    predicting = cost.largest_batch(target.memory, cost.inference_memory, of, alone)
    forward = counts.forward_macs(
        of.model_config, of.num_classes, of.image_size, channels=of.channels
    )
    training = counts.training_macs(
        of.model_config, of.num_classes, of.image_size, plan.remat, of.channels
    )
    rates = [target.images_per_second(macs, plan) for macs in (training, forward)]
    fits = 'fits' if needed <= target.memory else 'does NOT fit'
    rows = (
        ('largest batch', f'{target.largest(of, plan):,}', f'{predicting:,}'),
        ('images per second', f'{rates[0]:,.0f}', f'{rates[1]:,.0f}'),
    )
    notes = (
        f'{device.name}: {device.memory_gib:g} GiB, of which JAX takes '
        f'{target.memory_fraction:.0%} ({_gib(target.memory, 1)} GiB); '
        f'{device.peak(plan.dtype):g} TFLOP/s peak at {plan.dtype}. '
        f'Published figures: {device.source}.',
        f'Images per second are a prediction at {target.utilisation:.0%} of that peak.',
        f'Batch {plan.batch} {fits}: {_gib(needed)} GiB.',
    )
    columns = ('Predicted', 'Training>', 'Inference>')
    return Table(f'{of} on {plan.devices} x {device.name}', columns, rows, notes)


def largest_batches(
    plan: cost.Plan, target: Target, num_classes: int, image_sizes: Sequence[counts.ImageSize]
) -> Table:
    """The largest batch of every variant at every image size, for each form of remat."""
    rows = []
    for name in variants.VARIANTS:
        config = variants.get_config(name).to_dict()
        for size in image_sizes:
            try:
                variants.token_grid(config, size)
            except ValueError:
                continue
            of = Architecture(name, config, num_classes, size)
            rate = target.images_per_second(counts.training_macs(config, num_classes, size), plan)
            batches = [
                target.largest(of, dataclasses.replace(plan, remat=remat))
                for remat in ('', 'dots', 'full')
            ]
            rows.append(
                (name, variants.in_words(size), *(f'{b:,}' for b in batches), f'{rate:,.0f}')
            )
    device = target.device
    title = (
        f'Largest training batch, predicted: {plan.devices} x {device.name}, '
        f'{_gib(target.memory, 1)} of {device.memory_gib:g} GiB, {plan.dtype}, {plan.optimizer}'
    )
    notes = (
        f'Image/s at {target.utilisation:.0%} of {device.peak(plan.dtype):g} TFLOP/s, without '
        f'remat. Device: {device.source}, published.',
    )
    columns = ('Variant', 'Pixels>', 'Batch>', 'remat dots>', 'remat full>', 'Image/s>')
    return Table(title, columns, rows, notes)


def beside_xla(of: Architecture, plan: cost.Plan) -> Table:
    """The formula beside what XLA counts in the training step, compiled for one device here."""
    import jax

    platform = jax.default_backend()
    plan = dataclasses.replace(plan, platform=platform, devices=1, fsdp=1, accum_steps=1)
    size, flops = cost.compile_training(of, plan)
    macs = counts.training_macs(
        of.model_config, of.num_classes, of.image_size, plan.remat, of.channels
    )
    macs -= counts.unused_macs(of.model_config, of.image_size, training=True, remat=plan.remat)
    rows = [
        _beside(f'TFLOPs, batch {plan.batch}', 2e-12 * macs * plan.batch, flops / 1e12),
        _beside(f'GiB, batch {plan.batch}', cost.training_memory(of, plan).total / GIB, size / GIB),
    ]
    notes = (
        f'XLA: the training step compiled for {platform} on one device, no accumulation; it counts '
        'the body of a loop once (attention on a CPU is one).',
    )
    return Table(f'{of}: formula beside XLA', ('', 'Formula>', 'XLA>', 'Difference>'), rows, notes)


def _beside(name: str, formula: float, xla: float) -> tuple[str, str, str, str]:
    if not xla:
        return name, f'{formula:.3f}', 'not counted', ''
    return name, f'{formula:.3f}', f'{xla:.3f}', f'{formula / xla - 1:+.1%}'


def _giga(flops: int) -> str:
    return f'{flops / 1e9:,.3f}'


def _gib(size: float, digits: int = 3) -> str:
    return f'{size / GIB:,.{digits}f}'
