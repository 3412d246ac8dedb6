"""The MLP-Mixer as an ONNX graph: what `vit_jax.models.mixer` computes.

Shapes: B batch, N tokens, D width, C classes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.export.onnx_graph import BATCH, ROWS, Graph
from vit_jax.export.onnx_vit import Values, classify

_Tree = Mapping[str, Any]


def build(graph: Graph, image: str, params: _Tree, config: _Tree, side: int) -> Values:
    """Adds an MLP-Mixer to a graph.

    Args:
        graph: where to.
        image: [B, 3, side, side] in [-1, 1].
        params: of `models.MlpMixer`.
        config: its arguments.
        side: of the image, pixels.
    """
    patch = tuple(config['patches']['size'])
    num_tokens = side // patch[0] * (side // patch[1])
    width = config['hidden_dim']
    shape = (BATCH, num_tokens, width)
    x = graph.patches(image, params['stem'], patch, shape, 'stem')
    x = graph.reshape(x, (ROWS, width), 'rows')
    for i in range(config['num_blocks']):
        x = _block(graph, x, params[f'MixerBlock_{i}'], shape, f'MixerBlock_{i}')
    x = graph.layer_norm(x, params['pre_head_layer_norm'], 'pre_head_layer_norm')
    x = graph.mean(graph.reshape(x, shape, 'tokens'), 1, 'mean_of_tokens')
    return Values(*classify(graph, x, params), num_tokens, [])


def _block(graph: Graph, x: str, params: _Tree, shape: tuple[str, int, int], name: str) -> str:
    """A block: rows [B * N, D] to the same; `shape` is (BATCH, N, D)."""
    y = graph.layer_norm(x, params['LayerNorm_0'], f'{name}/LayerNorm_0')
    y = graph.reshape(y, shape, f'{name}/token_mixing/tokens')
    y = _token_mixing(graph, y, params['token_mixing'], f'{name}/token_mixing')
    y = graph.reshape(y, (ROWS, shape[2]), f'{name}/token_mixing/rows')
    x = graph.add(x, y, f'{name}/tokens_mlp')
    y = graph.layer_norm(x, params['LayerNorm_1'], f'{name}/LayerNorm_1')
    y = graph.mlp(y, params['channel_mixing'], f'{name}/channel_mixing')
    return graph.add(x, y, f'{name}/channels_mlp')


def _token_mixing(graph: Graph, x: str, params: _Tree, name: str) -> str:
    """The MLP over the tokens of [B, N, D].

    The kernels stand on the left, transposed, so that the tokens need not be.
    """
    for layer in ('Dense_0', 'Dense_1'):
        kernel = graph.weight(f'{name}/{layer}/kernel', np.asarray(params[layer]['kernel']).T)
        bias = graph.weight(f'{name}/{layer}/bias', np.asarray(params[layer]['bias'])[:, None])
        x = graph.matmul(kernel, x, f'{name}/{layer}/product')
        x = graph.op('Add', [x, bias], f'{name}/{layer}')
        if layer == 'Dense_0':
            x = graph.gelu(x, f'{name}/gelu')
            x = graph.cast(x, graph.compute)
    return x
