"""Who takes part in a benchmark of steps, and in what.

A *cell* is what is measured together, a dict with `variant` (its name), `model_config` (see
`variants.get_config`), `num_classes`, `image_size` (pixels), `dtype` ('float32' or 'bfloat16'),
`batch` (images), `mode` ('training' or 'inference'), `data` (a folder or dataset, or '' for made-up
images) and `cores` (that each contestant may use; 0 for all). A contestant's process gets it with
`contestant`, its name, and `options` besides.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError

OURS, ORIGINAL = 'vit_jax', 'original'
# The packages that a contestant needs.
_NEEDS = {
    'timm': ('torch', 'torchvision', 'timm'),
    'timm+compile': ('torch', 'torchvision', 'timm'),
    'transformers': ('torch', 'transformers'),
    'transformers+compile': ('torch', 'transformers'),
    'torchvision': ('torch', 'torchvision'),
    'torchvision+compile': ('torch', 'torchvision'),
    'torch-matmul': ('torch',),
}
NAMES = (OURS, ORIGINAL, *(name for name in _NEEDS if name != 'torch-matmul'))
DEFAULT = (OURS, ORIGINAL, 'timm', 'timm+compile', 'transformers', 'torchvision')
MATMULS = ('matmul', 'torch-matmul')
OPTIONS = ('attention', 'remat', 'accum_steps', 'optim_dtype')


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One that takes part.

    Attributes:
      label: as the user wrote it: 'timm+compile', 'vit_jax:remat=full,accum_steps=4'.
      options: of ours only, see `OPTIONS`.
    """

    label: str
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """One of `NAMES` or `MATMULS`."""
        return self.label.partition(':')[0]

    @property
    def module(self) -> str:
        """What its process runs, see `turns.serve`."""
        return f'benchmarks.{"torch" if self.name in _NEEDS else "jax"}_workload'

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return missing(_NEEDS.get(self.name, ()))

    def setup(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """The first message to its process."""
        return {**cell, 'contestant': self.name, 'options': dict(self.options)}

    def reason_to_leave_out(self, model_config: Mapping[str, Any], dtype: str) -> str:
        """Why it cannot take part with a model and dtype; '' if it can."""
        if lacks := self.missing():
            return f'not installed: {", ".join(lacks)} (pip install {" ".join(lacks)})'
        plain = (
            'transformer' in model_config
            and not any(model_config.get(key) for key in ('resnet', 'distilled', 'mlp_head'))
            and model_config.get('classifier') == 'token'
            and not model_config.get('representation_size')
        )
        if self.name in _NEEDS and not plain:
            return 'compared on plain ViTs with a class token only'
        if self.name == ORIGINAL and 'transformer' not in model_config:
            return "the original's Mixer computes as ours does"
        if self.name == ORIGINAL and dtype != 'float32':
            return 'computes in float32 only'
        return ''


def missing(packages: Sequence[str]) -> list[str]:
    """Those packages that are not installed; nothing is imported."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def parse(labels: Sequence[str]) -> list[Contestant]:
    """The contestants of a command line.

    Args:
      labels: names, ours with options: 'vit_jax:remat=full,accum_steps=4'.

    Raises:
      UserError: no such contestant or option, or one twice.
    """
    found = []
    for label in labels:
        name, _, text = label.partition(':')
        if name not in NAMES:
            raise UserError(f'contestant {name!r} is not one of {", ".join(NAMES)}')
        options = dict(part.partition('=')[::2] for part in text.split(',') if part)
        unknown = [key for key, value in options.items() if key not in OPTIONS or not value]
        if unknown or (options and name != OURS):
            raise UserError(
                f'contestant {label!r}: options are for {OURS} only, {OURS}:KEY=VALUE,... with '
                f'{", ".join(OPTIONS)}'
            )
        found.append(Contestant(label, options))
    if len(set(labels)) < len(labels):
        raise UserError(f'a contestant is named twice: {" ".join(labels)}')
    return found
