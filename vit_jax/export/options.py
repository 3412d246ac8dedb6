"""The formats of an export, the options of each, and what can be checked before a model is read.

Imports nothing heavy: the command line needs it for its help and its checks.
"""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Mapping

from vit_jax.errors import UserError

# What a verification found stands in <output>.verify.json.
REPORT_SUFFIX = '.verify.json'

LAYOUTS = ('NHWC', 'NCHW')
OPSETS = (17, 20)
DTYPES = ('float32', 'float16', 'int8')
TOWERS = ('image', 'text')  # of a model with two
TOWER_FORMATS = ('onnx', 'stablehlo')


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
        opset: version of ONNX's operators, 20, or 17 for older runtimes, which has no Gelu: it is
            spelled out.
        layout: of the input, 'NHWC' for images [batch, S, S, 3], 'NCHW' for [batch, 3, S, S].
        probabilities: whether the softmax of each image's logits takes their place; of a model of
            many labels, the sigmoid of each.
        features: whether `features` is an output, too (see `outputs.py`). It is all that a model
            without a head can give.
        attention: whether `attention` is an output, too.
        preprocessing: False: images are float32 in [-1, 1]. True: they are uint8 in [0, 255], of
            the model's size, and normalised inside.
        dtype: of weights and products: 'float32'; 'float16', in which LayerNorm, GroupNorm, softmax
            and the sums over the layers stay float32; or 'int8', dynamic quantisation. Outputs are
            float32 in any case.
        weights_only: of 'float16' and 'int8': weights are stored so, and the graph computes in
            float32, so that its results are the same wherever it runs, but for float32's rounding.
            Of 8-bit integers each 32 weights have a scale; an operator of ONNX Runtime reads them.
        drop: layers to leave out, of `pytorch.DROPPABLE`.

    Raises:
        UserError: an unknown layout, opset or type, or `weights_only` of float32.
    """

    opset: int = 20
    layout: str = 'NHWC'
    probabilities: bool = False
    features: bool = False
    attention: bool = False
    preprocessing: bool = False
    dtype: str = 'float32'
    weights_only: bool = False
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (('opset', OPSETS), ('layout', LAYOUTS), ('dtype', DTYPES)):
            if (value := getattr(self, name)) not in known:
                raise UserError(f'unknown {name} {value!r}: one of {", ".join(map(str, known))}')
        if self.weights_only and self.dtype == 'float32':
            raise UserError('--weights_only goes with --dtype float16 or int8')

    @property
    def compute(self) -> str:
        """Type of the products in the graph; those of dynamic quantisation replace float32."""
        return 'float16' if self.dtype == 'float16' and not self.weights_only else 'float32'

    @property
    def stored(self) -> str:
        """Type that weights are stored in, where it is not that of the products, or ''."""
        return self.dtype if self.weights_only else ''

    def outputs(self, num_classes: int) -> tuple[str, ...]:
        """Names of the outputs of an ONNX or StableHLO file, see `outputs.py`."""
        scores = ('probabilities' if self.probabilities else 'logits',) if num_classes else ()
        extra = tuple(name for name in ('features', 'attention') if getattr(self, name))
        return scores + extra or ('logits',)


DEFAULT = Options()


@dataclasses.dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        suffix: required ending of the file's name; '' for any, None for a folder.
        options: fields of `Options` that it has.
        packages: what runs it, as arguments of `pip install`.
    """

    suffix: str | None
    options: tuple[str, ...]
    packages: str


_GRAPH = ('layout', 'probabilities', 'features', 'attention', 'preprocessing')

FORMATS: Mapping[str, Format] = {
    'onnx': Format('.onnx', ('opset', *_GRAPH, 'dtype', 'weights_only'), 'onnxruntime'),
    'stablehlo': Format('', _GRAPH, 'jax flatbuffers'),
    'timm': Format(None, ('drop',), 'torch torchvision timm'),
    'huggingface': Format(None, ('drop',), 'torch transformers'),
    'torchvision': Format(None, ('drop',), 'torch torchvision'),
    'npz': Format('.npz', ('drop',), 'vit_jax'),
}


def check(name: str, options: Options, output: str | os.PathLike[str]) -> None:
    """Raises `UserError` for what can be checked before a model is read.

    Args:
        name: of the format.
        options: those that differ from the default have to go with the format.
        output: the file or folder to write, which must not exist, in a folder that does.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.4)
        hint = f'; did you mean {near[0]}?' if near else ''
        raise UserError(f'unknown format {name!r}{hint} Known: {", ".join(FORMATS)}')
    form = FORMATS[name]
    for field in dataclasses.fields(Options):
        if getattr(options, field.name) != field.default and field.name not in form.options:
            takes = [n for n, f in FORMATS.items() if field.name in f.options]
            raise UserError(f'--{field.name} goes with --format {" or ".join(takes)}, not {name}')
    output = pathlib.Path(output)
    others = [f.suffix for f in FORMATS.values() if f.suffix]
    if form.suffix is None and output.suffix in (*others, '.safetensors', '.pth', '.pt'):
        raise UserError(f'--format {name} writes a folder; {output} looks like the name of a file')
    if form.suffix and output.suffix != form.suffix:
        raise UserError(
            f'--format {name} writes a file whose name ends in {form.suffix}; --output is {output}'
        )
    if not output.name:
        raise UserError(f'--output {output} has no name; give that of a file or folder')
    # External data, a description and the report may be written beside it.
    for suffix in ('', '.data', '.json', REPORT_SUFFIX):
        if os.path.lexists(place := output.with_name(output.name + suffix)):
            raise UserError(f'{place} exists; remove it, or name another place')
    if not output.parent.is_dir():
        raise UserError(f'there is no folder {output.parent}; make it first, or name another place')
