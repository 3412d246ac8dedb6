"""The ResNet of hybrid models as an ONNX graph.

What `vit_jax.models.resnet` computes. The kernels are standardised here, so the graph has plain
convolutions.

Shapes: B batch, h and w positions of the feature map, F channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.export.onnx_graph import BATCH, FLOAT32, Graph
from vit_jax.models.resnet import GROUP_NORM_EPSILON, GROUPS, STANDARDISATION_EPSILON

_Tree = Mapping[str, Any]


def backbone(
    graph: Graph, images: str, params: _Tree, side: int, num_layers: Sequence[int]
) -> tuple[str, int]:
    """Adds the ResNet: images [B, 3, side, side] to features [B, F, h, h].

    Args:
        graph: where to.
        images: in [-1, 1].
        params: of the hybrid, in which 'conv_root', 'gn_root', 'block1', ... lie at the top.
        side: of the image, pixels.
        num_layers: units of each stage.

    Returns:
        The features, and their side h.
    """
    x, side = _conv(graph, images, params['conv_root'], side, 2, 'conv_root')
    x = _group_norm(graph, x, params['gn_root'], side, 'gn_root', relu=True)
    # Padding of a maximum is minus infinity, in XLA and in ONNX.
    pads, side = _same(side, 3, 2)
    x = graph.op('MaxPool', [x], 'max_pool', kernel_shape=(3, 3), strides=(2, 2), pads=pads)
    for stage, units in enumerate(num_layers):
        for unit in range(units):
            name = f'block{stage + 1}/unit{unit + 1}'
            stride = 2 if stage and not unit else 1
            x, side = _unit(
                graph, x, params[f'block{stage + 1}'][f'unit{unit + 1}'], side, stride, name
            )
    return x, side


def _unit(
    graph: Graph, x: str, params: _Tree, side: int, stride: int, name: str
) -> tuple[str, int]:
    """A bottleneck unit: [B, F, h, h] to [B, 4 features, h / stride, h / stride], and that side."""
    shortcut, out = x, -(-side // stride)
    if 'conv_proj' in params:
        shortcut, _ = _conv(graph, x, params['conv_proj'], side, stride, f'{name}/conv_proj')
        shortcut = _group_norm(graph, shortcut, params['gn_proj'], out, f'{name}/gn_proj')
    y, _ = _conv(graph, x, params['conv1'], side, 1, f'{name}/conv1')
    y = _group_norm(graph, y, params['gn1'], side, f'{name}/gn1', relu=True)
    y, _ = _conv(graph, y, params['conv2'], side, stride, f'{name}/conv2')
    y = _group_norm(graph, y, params['gn2'], out, f'{name}/gn2', relu=True)
    y, _ = _conv(graph, y, params['conv3'], out, 1, f'{name}/conv3')
    y = _group_norm(graph, y, params['gn3'], out, f'{name}/gn3')
    return graph.op('Relu', [graph.add(shortcut, y, f'{name}/sum')], f'{name}/relu'), out


def _conv(
    graph: Graph, x: str, params: _Tree, side: int, stride: int, name: str
) -> tuple[str, int]:
    """A convolution with standardised kernel and 'SAME' padding; and the side of its output."""
    kernel = np.asarray(params['kernel'], np.float64)
    kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    kernel /= kernel.std((0, 1, 2), keepdims=True) + STANDARDISATION_EPSILON
    pads, out = _same(side, kernel.shape[0], stride)
    return graph.conv(x, kernel, name, strides=(stride, stride), pads=pads), out


def _same(side: int, size: int, stride: int) -> tuple[tuple[int, int, int, int], int]:
    """XLA's 'SAME' padding (top, left, bottom, right; an odd one is the last); and the output.

    With a stride it depends on the size of the image, so that PyTorch's fixed padding is another.
    """
    out = -(-side // stride)
    total = max((out - 1) * stride + size - side, 0)
    before, after = total // 2, total - total // 2
    return (before, before, after, after), out


def _group_norm(
    graph: Graph, x: str, params: _Tree, side: int, name: str, *, relu: bool = False
) -> str:
    """GroupNorm of [B, F, side, side], in float32, and on request what ReLU leaves of it.

    ONNX has GroupNormalization from opset 18, in its present meaning from opset 21; at all opsets
    it is an InstanceNormalization in which each group is one channel.
    """
    channels = np.asarray(params['scale']).size
    size = channels // GROUPS * side * side
    y = graph.reshape(graph.cast(x, FLOAT32), (BATCH, GROUPS, size), f'{name}/groups')
    no_change = graph.full(GROUPS, 1.0), graph.full(GROUPS, 0.0)  # of scale and bias
    y = graph.op(
        'InstanceNormalization', [y, *no_change], f'{name}/normalised', epsilon=GROUP_NORM_EPSILON
    )
    y = graph.reshape(y, (BATCH, channels, side, side), f'{name}/channels')
    for op_type, key, result in (('Mul', 'scale', f'{name}/times_scale'), ('Add', 'bias', name)):
        array = np.asarray(params[key]).reshape(channels, 1, 1)
        y = graph.op(op_type, [y, graph.weight(f'{name}/{key}', array, FLOAT32)], result)
    return graph.op('Relu', [y], f'{name}/relu') if relu else y
