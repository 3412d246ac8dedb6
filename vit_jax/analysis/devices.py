"""Published figures of devices: memory and peak rates.

They are the makers' figures, not measured here: dense (without structured sparsity) peaks of the
tensor cores with float32 accumulation. What a training step reaches of them, its utilisation, is
30 to 60 %.
"""

import dataclasses
import difflib

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
      name: short, as on the command line.
      memory_gib: of the device, GiB.
      peak_16bit: TFLOP/s in bfloat16 (float16 on devices that have no bfloat16).
      peak_float32: TFLOP/s for float32 arrays: in TensorFloat-32, which JAX uses for them on
        devices that have it, else in float32.
      source: where the figures are published.
    """

    name: str
    memory_gib: float
    peak_16bit: float
    peak_float32: float
    source: str

    def peak(self, dtype: str) -> float:
        """TFLOP/s for arrays of 'float32', or of a 16-bit type."""
        return self.peak_float32 if dtype == 'float32' else self.peak_16bit


DEVICES = {
    device.name: device
    for device in (
        Device('h200', 141, 989, 495, 'NVIDIA H200 datasheet (SXM)'),
        Device('h100', 80, 989, 495, 'NVIDIA H100 datasheet (SXM5)'),
        Device('h100-pcie', 80, 756, 378, 'NVIDIA H100 datasheet (PCIe)'),
        Device('a100', 80, 312, 156, 'NVIDIA A100 80GB datasheet'),
        Device('a100-40gb', 40, 312, 156, 'NVIDIA A100 40GB datasheet'),
        Device('l40s', 48, 362, 183, 'NVIDIA L40S datasheet'),
        Device('l4', 24, 121, 60, 'NVIDIA L4 datasheet'),
        Device('a10', 24, 125, 62.5, 'NVIDIA A10 datasheet'),
        Device('t4', 16, 65, 8.1, 'NVIDIA T4 datasheet; float16, no bfloat16'),
        Device('v100', 32, 125, 15.7, 'NVIDIA V100 datasheet (SXM2); float16, no bfloat16'),
        Device('rtx4090', 24, 165.2, 82.6, 'NVIDIA Ada GPU architecture whitepaper'),
        Device('rtx3090', 24, 71, 35.6, 'NVIDIA Ampere GA102 architecture whitepaper'),
    )
}


def get(name: str) -> Device:
    """The device with a name; case, spaces and underscores do not matter ('RTX 4090').

    Raises:
      UserError: it is not in the table; the message names the nearest.
    """
    plain = name.lower().replace(' ', '').replace('_', '-')
    if plain not in DEVICES:
        near = difflib.get_close_matches(plain, DEVICES, n=1, cutoff=0.0)[0]
        raise UserError(
            f'device {name!r} is not in the table; nearest: {near!r}; known: {", ".join(DEVICES)}. '
            'For another give its --peak_tflops, and for memory its --memory_gib'
        )
    return DEVICES[plain]


def choose(name: str, memory_gib: float | None, peak_tflops: float | None, dtype: str) -> Device:
    """A device of the table, or the user's own.

    Args:
      name: see `get`; '' for the user's own, or, with neither number given, an H200.
      memory_gib: instead of the table's.
      peak_tflops: at `dtype`, instead of the table's.
      dtype: 'bfloat16' or 'float32'.

    Raises:
      UserError: not in the table, or only one of the two numbers of an unnamed device.
    """
    for option, value in (('--memory_gib', memory_gib), ('--peak_tflops', peak_tflops)):
        if value is not None and not value > 0:
            raise UserError(f'{option} {value:g}: expected a number above 0')
    if not name and (memory_gib is None) != (peak_tflops is None):
        raise UserError('give both --memory_gib and --peak_tflops, or a --device they belong to')
    device = get(name or 'h200')
    if memory_gib is None and peak_tflops is None:
        return device
    return Device(
        name or 'own device',
        device.memory_gib if memory_gib is None else memory_gib,
        device.peak_16bit if peak_tflops is None or dtype == 'float32' else peak_tflops,
        device.peak_float32 if peak_tflops is None or dtype != 'float32' else peak_tflops,
        'as given',
    )
