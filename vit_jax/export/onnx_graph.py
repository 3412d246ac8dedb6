"""Building an ONNX graph: named values with known types, and the layers all families are made of.

The graph is typed explicitly, as a strongly typed TensorRT network has to be: in a float16 graph
the weights of matrix products and convolutions are float16, and `Cast` nodes stand where a value
changes its type. A layer casts what it reads to the type it computes in; products compute in the
graph's type, normalisation and softmax always in float32.

Operators: https://onnx.ai/onnx/operators/. Shapes: B batch, N tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError, extra
from vit_jax.export import onnx_activations

with extra('export'):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

FLOAT16, FLOAT32 = TensorProto.FLOAT16, TensorProto.FLOAT
INT64, UINT8 = TensorProto.INT64, TensorProto.UINT8
BOOL, INT8, INT32 = TensorProto.BOOL, TensorProto.INT8, TensorProto.INT32
TYPE_NAMES: dict[int, str] = {FLOAT16: 'float16', FLOAT32: 'float32', INT32: 'int32'}
TYPES = {name: elem_type for elem_type, name in TYPE_NAMES.items()}

# Names of the two lengths that are open until the graph runs.
BATCH = 'batch'  # images
ROWS = 'rows'  # tokens of all images, where they lie one below the other: [B * N, D]

# The version of the file format that came with each opset (https://onnx.ai/onnx/repo-docs/
# Versioning.html): a newer one would shut out runtimes that know the opset.
IR_VERSIONS = {17: 8, 20: 9}

# What is larger is kept out of the copy on which shapes are inferred, bytes.
_LARGE = 1024

# ONNX Runtime's own operators (https://github.com/microsoft/onnxruntime/blob/main/docs/
# ContribOperators.md).
_RUNTIME_DOMAIN = 'com.microsoft'
_BLOCK = 32  # weights of an output with one scale, where they are 8-bit integers
_EXACT = 1  # of MatMulNBits' accuracy levels: computes in float32
_STORED_FROM = 1024  # numbers of a weight; smaller ones are stored as they are


class Graph:
    """A graph under construction. A value is known by its name; every node's name is unique.

    Attributes:
        opset: version of the operators, a key of `IR_VERSIONS`.
        compute: type of matrix products and convolutions and of their weights, FLOAT32 or FLOAT16.
        stored: '', or how large weights are stored of which the graph makes float32: 'float16', or
            'int8', the kernels of dense layers as 8-bit integers and the others as float16.
        act: activation function of the MLPs, a name in `models.layers.ACTIVATIONS`.
        layer_norm_eps: what LayerNorm adds to the variance.
    """

    def __init__(
        self,
        opset: int,
        compute: int,
        stored: str = '',
        act: str = 'gelu_tanh',
        layer_norm_eps: float = 1e-6,
    ):
        self.opset = opset
        self.compute = compute
        self.stored = stored
        self.act, self.layer_norm_eps = act, layer_norm_eps
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._types: dict[str, int] = {}
        self._shapes: dict[str, Sequence[int | str]] = {}

    # Values

    def input(self, name: str, elem_type: int, shape: Sequence[int | str]) -> str:
        """Declares an input of the graph; `shape` may hold the name `BATCH`."""
        self._inputs.append(helper.make_tensor_value_info(name, elem_type, shape))
        self._types[name] = elem_type
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        """Declares `value` an output of this name, float32: the node that makes it is renamed."""
        if self._types[value] != FLOAT32:
            value = self.cast(value, FLOAT32)
        for names in [names for node in self._nodes for names in (node.input, node.output)]:
            names[:] = [name if old == value else old for old in names]
        if value in self._shapes:
            self._shapes[name] = self._shapes.pop(value)
        self._types[name] = self._types.pop(value)
        self._outputs.append(helper.make_tensor_value_info(name, FLOAT32, shape))

    def weight(self, name: str, array: Any, elem_type: int | None = None) -> str:
        """A constant of the graph's type (or of `elem_type`), from an array of any type.

        Without `elem_type` a large one is stored as `self.stored` says.
        """
        array = np.asarray(array)
        if not elem_type and self.stored and array.size >= _STORED_FROM:
            small = self.weight(f'{name}/stored', array, FLOAT16)
            return self.op('Cast', [small], name, elem_type=FLOAT32, to=FLOAT32)
        elem_type = elem_type or self.compute
        with np.errstate(over='ignore'):  # reported below, by name
            converted = np.ascontiguousarray(array, helper.tensor_dtype_to_np_dtype(elem_type))
        if not np.all(np.isfinite(array)):
            raise UserError(f'{name} holds NaN or infinity: these weights cannot be used')
        if not np.all(np.isfinite(converted)):
            raise UserError(
                f'{name} holds {np.abs(array).max():.3g}, beyond the range of float16 (65504): '
                'export in float32'
            )
        return self._constant(name, converted, elem_type)

    def integers(self, values: Sequence[int]) -> str:
        """A constant int64 vector (shapes, axes)."""
        return self._shared('int64[' + ','.join(map(str, values)) + ']', list(values), INT64)

    def index(self, value: int) -> str:
        """A constant int64 number."""
        return self._shared(f'int64({value})', value, INT64)

    def scalar(self, value: float) -> str:
        """A constant float32 number, as a vector of length 1."""
        return self._shared(f'float32({value!r})', [value], FLOAT32)

    def full(self, length: int, value: float) -> str:
        """A constant float32 vector of one number."""
        return self._shared(f'float32[{length}]({value!r})', [value] * length, FLOAT32)

    def _shared(self, name: str, values: Any, elem_type: int) -> str:
        """A small constant, of which equal ones are one."""
        if name in self._constants:
            return name
        array = np.array(values, helper.tensor_dtype_to_np_dtype(elem_type))
        return self._constant(name, array, elem_type)

    def _constant(self, name: str, array: np.ndarray, elem_type: int) -> str:
        if name in self._types:
            raise ValueError(f'two values have the name {name}')
        self._constants[name] = array
        self._types[name] = elem_type
        return name

    # Nodes

    def op(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        *,
        elem_type: int | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node with one output and returns that; node and output are called `name`.

        The name is the path of a layer ('Transformer/encoderblock_0/LayerNorm_0'). The output has
        the type of the first input, if not `elem_type`; `attributes` are those of the operator.
        """
        if name in self._types:
            raise ValueError(f'two values have the name {name}')
        self._nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        self._types[name] = elem_type or self._types[inputs[0]]
        return name

    def cast(self, x: str, elem_type: int) -> str:
        """`x` in this type; no node if it has it already, none twice."""
        if self._types[x] == elem_type:
            return x
        name = f'{x}/{TYPE_NAMES[elem_type]}'
        if name in self._types:
            return name
        return self.op('Cast', [x], name, elem_type=elem_type, to=elem_type)

    def reshape(self, x: str, shape: tuple[str, *tuple[int, ...]], name: str) -> str:
        """`x` in another shape, whose first length is open and has a name, such as BATCH."""
        _, *rest = shape
        self._shapes[name] = shape
        return self.op('Reshape', [x, self.integers([-1, *rest])], name)

    def transpose(self, x: str, perm: Sequence[int], name: str) -> str:
        """`x` with its axes in this order."""
        return self.op('Transpose', [x], name, perm=perm)

    def split(self, x: str, axis: int, names: Sequence[str]) -> list[str]:
        """Equal parts along an axis, called `names`."""
        # Older operators have no number of outputs: their parts are always equal.
        count: dict[str, Any] = {'num_outputs': len(names)} if self.opset >= 18 else {}
        node = helper.make_node('Split', [x], names, name=f'{x}/split', axis=axis, **count)
        self._nodes.append(node)
        self._types |= dict.fromkeys(names, self._types[x])
        return list(names)

    def add(self, x: str, y: str, name: str) -> str:
        """The sum, in float32.

        What is summed over the layers (the residual stream) is so never rounded to float16, whose
        range (65504) it can leave in large models.
        """
        return self.op('Add', [self.cast(x, FLOAT32), self.cast(y, FLOAT32)], name)

    def mean(self, x: str, axis: int, name: str) -> str:
        """The mean over one axis, which is removed, in float32."""
        return self._reduce('ReduceMean', x, axis, name)

    def max(self, x: str, axis: int, name: str) -> str:
        """The maximum over one axis, which is removed, in float32."""
        return self._reduce('ReduceMax', x, axis, name)

    def unit_length(self, x: str, name: str) -> str:
        """Vectors over the last axis divided by their lengths, in float32."""
        x = self.cast(x, FLOAT32)
        length = self._reduce('ReduceL2', x, -1, f'{name}/length', keepdims=1)
        length = self.op('Add', [length, self.scalar(1e-8)], f'{name}/not_zero')
        return self.op('Div', [x, length], name)

    def _reduce(self, op_type: str, x: str, axis: int, name: str, keepdims: int = 0) -> str:
        x = self.cast(x, FLOAT32)
        if self.opset < 18:
            return self.op(op_type, [x], name, axes=[axis], keepdims=keepdims)
        return self.op(op_type, [x, self.integers([axis])], name, keepdims=keepdims)

    # Layers

    def layer_norm(self, x: str, params: Any, name: str) -> str:
        """LayerNorm over the last axis, in float32; `params` has scale and bias [D]."""
        scale = self.weight(f'{name}/scale', params['scale'], FLOAT32)
        bias = self.weight(f'{name}/bias', params['bias'], FLOAT32)
        inputs = [self.cast(x, FLOAT32), scale, bias]
        return self.op('LayerNormalization', inputs, name, axis=-1, epsilon=self.layer_norm_eps)

    def dense(self, x: str, params: Any, name: str) -> str:
        """Rows [R, D] to rows [R, F]: one Gemm; `params` has kernel [D, F] and bias [F]."""
        bias = self.weight(f'{name}/bias', params['bias'])
        if self.stored == 'int8':
            x = self._product_of_integers(x, np.asarray(params['kernel']), name)
            return self.op('Add', [x, bias], name)
        kernel = self.weight(f'{name}/kernel', params['kernel'])
        return self.op('Gemm', [self.cast(x, self.compute), kernel, bias], name)

    def _product_of_integers(self, x: str, kernel: np.ndarray, name: str) -> str:
        """Rows times a kernel [D, F] of 8-bit integers, in float32.

        Each `_BLOCK` weights of an output are multiples of their largest / 127. (Without an
        accuracy level, and for DequantizeLinear in front of a product, ONNX Runtime rounds x to 8
        bits, too, and not alike on all processors.)
        """
        inputs, outputs = kernel.shape
        blocks = -(-inputs // _BLOCK)
        padded = np.zeros((outputs, blocks * _BLOCK), np.float32)
        padded[:, :inputs] = kernel.T
        padded = padded.reshape(outputs, blocks, _BLOCK)
        scales = np.maximum(np.abs(padded).max(axis=-1, keepdims=True), 1e-30) / 127
        integers = self.weight(f'{name}/integers', np.rint(padded / scales) + 128, UINT8)
        scale = self.weight(f'{name}/scales', scales.reshape(-1), FLOAT32)
        return self.op(
            'MatMulNBits',
            [self.cast(x, FLOAT32), integers, scale],
            f'{name}/product',
            domain=_RUNTIME_DOMAIN,
            K=inputs,
            N=outputs,
            bits=8,
            block_size=_BLOCK,
            accuracy_level=_EXACT,
        )

    def matmul(self, x: str, y: str, name: str) -> str:
        """Matrix product of the last two axes, in the graph's type."""
        return self.op('MatMul', [self.cast(x, self.compute), self.cast(y, self.compute)], name)

    def softmax(self, x: str, name: str) -> str:
        """Softmax over the last axis, in float32."""
        return self.op('Softmax', [self.cast(x, FLOAT32)], name, axis=-1)

    def masked(self, scores: str, mask: str, name: str) -> str:
        """Scores, in float32, of what is not to be looked at the lowest, as in `models`."""
        lowest = self.scalar(float(np.finfo(np.float32).min))
        inputs = [mask, self.cast(scores, FLOAT32), lowest]
        return self.op('Where', inputs, name, elem_type=FLOAT32)

    def probabilities(self, logits: str, multi_label: bool) -> str:
        """Softmax of the logits, or the sigmoid of each, in float32."""
        if multi_label:
            return self.op('Sigmoid', [self.cast(logits, FLOAT32)], 'sigmoid')
        return self.softmax(logits, 'softmax')

    def activation(self, x: str, act: str, name: str) -> str:
        """A function of `models.layers.ACTIVATIONS`."""
        return onnx_activations.build(self, x, act, name)

    def scale(self, x: str, params: Any, name: str) -> str:
        """LayerScale: each channel times a constant, in float32, the type of what it is added to.

        It is no part of the product before it: in float16 the product of small numbers would be 0.
        """
        scale = self.weight(f'{name}/scale', params['scale'], FLOAT32)
        return self.op('Mul', [self.cast(x, FLOAT32), scale], name)

    def mlp(self, x: str, params: Any, name: str) -> str:
        """Two dense layers with the graph's activation between them, gated or not; rows [R, D]."""
        inner = self.dense(x, params['Dense_0'], f'{name}/Dense_0')
        if 'gate' in params:
            gate = self.dense(x, params['gate'], f'{name}/gate')
            gate = self.cast(self.activation(gate, self.act, f'{name}/{self.act}'), self.compute)
            x = self.op('Mul', [gate, inner], f'{name}/gated')
        else:
            x = self.activation(inner, self.act, f'{name}/{self.act}')
        if 'norm' in params:
            x = self.layer_norm(x, params['norm'], f'{name}/norm')
        return self.dense(x, params['Dense_1'], f'{name}/Dense_1')

    def patches(
        self, x: str, params: Any, patch: tuple[int, int], shape: tuple[str, int, int], name: str
    ) -> str:
        """Cuts [B, F, h, w] into patches and projects them: tokens of `shape` (BATCH, N, D)."""
        x = self.conv(x, params['kernel'], name, bias=params.get('bias'), strides=patch)
        batch, tokens, width = shape
        x = self.reshape(x, (batch, width, tokens), f'{name}/positions')
        return self.transpose(x, (0, 2, 1), f'{name}/tokens')

    def conv(
        self,
        x: str,
        kernel: Any,
        name: str,
        *,
        bias: Any = None,
        strides: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> str:
        """Convolution of [B, F, h, w], in the graph's type.

        `kernel` is a Flax module's, [height, width, F, output], `bias` [output]; `strides` go down
        and across, `pads` are zeros added at the top, left, bottom and right.
        """
        kernel = np.asarray(kernel)
        weight = self.weight(f'{name}/kernel', kernel.transpose(3, 2, 0, 1))
        inputs = [self.cast(x, self.compute), weight]
        if bias is not None:
            inputs.append(self.weight(f'{name}/bias', bias))
        return self.op(
            'Conv', inputs, name, kernel_shape=kernel.shape[:2], strides=strides, pads=pads
        )

    # The result

    def model(self, name: str, producer_version: str) -> onnx.ModelProto:
        """The finished model, with the shapes of all values written into it.

        Raises:
            onnx.shape_inference.InferenceError: the shapes do not fit each other, which is an error
                in the graph's construction.
        """
        self._prune()
        # Shapes are inferred without the weights: protobuf does not take 2 GB at once.
        large = {name: a.shape for name, a in self._constants.items() if a.nbytes > _LARGE}
        small = {name: a for name, a in self._constants.items() if name not in large}
        made = {value for node in self._nodes for value in node.output}
        made -= {output.name for output in self._outputs}

        def described(shapes: Mapping[str, Sequence[int | str]]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(value, self._types[value], shape)
                for value, shape in shapes.items()
            ]

        graph = helper.make_graph(
            self._nodes,
            name,
            self._inputs + described(large),
            self._outputs,
            [numpy_helper.from_array(array, name) for name, array in small.items()],
            value_info=described({n: s for n, s in self._shapes.items() if n in made}),
        )
        opsets = [helper.make_opsetid('', self.opset)]
        if any(node.domain == _RUNTIME_DOMAIN for node in self._nodes):
            opsets.append(helper.make_opsetid(_RUNTIME_DOMAIN, 1))
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSIONS[self.opset],
            producer_name='vit_jax',
            producer_version=producer_version,
        )
        model = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
        del model.graph.input[len(self._inputs) :]
        del model.graph.initializer[:]
        for constant, array in self._constants.items():  # one by one: there may be gigabytes
            model.graph.initializer.append(numpy_helper.from_array(array, constant))
        return model

    def _prune(self) -> None:
        """Removes the nodes and constants that no output needs, such as features not asked for."""
        needed = {output.name for output in self._outputs}
        kept = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self._nodes = kept[::-1]
        self._constants = {n: a for n, a in self._constants.items() if n in needed}
