"""Activation functions in an ONNX graph: those of `models.layers.ACTIVATIONS`."""

from typing import TYPE_CHECKING

import numpy as np

from vit_jax.errors import extra

if TYPE_CHECKING:
    from vit_jax.export.onnx_graph import Graph

with extra('export'):
    from onnx import TensorProto

FLOAT32 = TensorProto.FLOAT


def build(graph: 'Graph', x: str, act: str, name: str) -> str:
    """A function of `models.layers.ACTIVATIONS`."""
    if act.startswith('gelu'):
        return _gelu(graph, x, act, name)
    if act == 'linear':
        return x
    if act in ('relu', 'tanh'):
        return graph.op(act.title(), [x], name)
    x = scaled = graph.cast(x, FLOAT32)  # x sigmoid(x), or x sigmoid(1.702 x)
    if act == 'quick_gelu':
        scaled = graph.op('Mul', [x, graph.scalar(1.702)], f'{name}/scaled')
    y = graph.op('Sigmoid', [scaled], f'{name}/sigmoid')
    return graph.op('Mul', [x, y], name)


def _gelu(graph: 'Graph', x: str, act: str, name: str) -> str:
    """GELU (https://arxiv.org/abs/1606.08415), exact or in its tanh form.

    One node from opset 20 on; before, spelled x / 2 (1 + erf(x / sqrt(2))), or with
    tanh(sqrt(2 / pi) (x + 0.044715 x^3)), and in float32, because 1 + tanh cancels.
    """
    if graph.opset >= 20:
        approximate = 'tanh' if act == 'gelu_tanh' else 'none'
        return graph.op('Gelu', [x], name, approximate=approximate)
    x = graph.cast(x, FLOAT32)
    if act == 'gelu':
        y = graph.op('Mul', [x, graph.scalar(float(np.sqrt(0.5)))], f'{name}/scaled')
        y = graph.op('Erf', [y], f'{name}/erf')
    else:
        y = _tanh_of_gelu(graph, x, name)
    y = graph.op('Add', [y, graph.scalar(1.0)], f'{name}/plus_1')
    y = graph.op('Mul', [x, y], f'{name}/doubled')
    return graph.op('Mul', [y, graph.scalar(0.5)], name)


def _tanh_of_gelu(graph: 'Graph', x: str, name: str) -> str:
    y = graph.op('Pow', [x, graph.scalar(3.0)], f'{name}/cube')
    y = graph.op('Mul', [y, graph.scalar(0.044715)], f'{name}/cube_scaled')
    y = graph.op('Add', [x, y], f'{name}/inner')
    y = graph.op('Mul', [y, graph.scalar(float(np.sqrt(2 / np.pi)))], f'{name}/inner_scaled')
    return graph.op('Tanh', [y], f'{name}/tanh')
