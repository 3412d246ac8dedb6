"""What stands behind the encoder in the ONNX graphs: pooling and classification.

Shapes: B batch, N tokens, D width, H heads, K head size (D / H), C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax import variants
from vit_jax.export.onnx_graph import BATCH, ROWS, Graph
from vit_jax.models.rotary import Rotary

_Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """N, H and D; the rotary positions; and the name of a mask, bool [B or 1, 1, 1 or N, N]."""

    tokens: int
    heads: int
    width: int
    rotary: Rotary | None = None
    mask: str = ''

    @property
    def head_size(self) -> int:
        """K."""
        return self.width // self.heads


def pool(graph: Graph, x: str, params: _Tree, config: _Tree, sizes: Sizes) -> str:
    """Encoded tokens [B, N, D] to what the head reads, [B, D] (of 'token_gap' [B, 2 D]).

    As `models.heads.pool`, for the classifiers that give one vector of several tokens.
    """
    classifier, prefix = config['classifier'], variants.prefix_tokens(config)
    patches = x
    if prefix:
        limits = [graph.integers([n]) for n in (prefix, sizes.tokens, 1)]
        patches = graph.op('Slice', [x, *limits], 'tokens/patches')
    if classifier == 'map':
        return _map_head(graph, patches, params['MAPHead_0'], sizes, sizes.tokens - prefix)
    if classifier == 'max':
        return graph.max(patches, 1, 'maximum_of_tokens')
    mean = graph.mean(patches, 1, 'mean_of_tokens')
    if classifier == 'gap':
        return mean
    if classifier == 'token_gap':
        first = graph.op('Gather', [x, graph.index(0)], 'tokens/class_token', axis=1)
        return graph.op('Concat', [first, mean], 'class_token_and_mean', axis=-1)
    both = graph.add(mean, graph.max(patches, 1, 'maximum_of_tokens'), 'mean_and_maximum')
    return graph.op('Mul', [both, graph.scalar(0.5)], 'mean_of_both')


def _map_head(graph: Graph, x: str, params: _Tree, sizes: Sizes, tokens: int) -> str:
    """Attention pooling of tokens [B, N, D] to [B, D]: its query is a constant."""
    name, layer = 'MAPHead_0', params['MultiHeadDotProductAttention_0']
    asks = projections(layer, ['query'], sizes)
    query = np.asarray(params['probe'], np.float64)[0] @ asks['kernel'] + asks['bias']
    query = query.reshape(sizes.heads, 1, sizes.head_size)
    query = graph.weight(f'{name}/query', query)
    x = graph.reshape(x, (ROWS, sizes.width), f'{name}/rows')
    x = graph.dense(x, projections(layer, ['key', 'value'], sizes), f'{name}/key_value')
    shape = (BATCH, tokens, 2 * sizes.heads, sizes.head_size)
    x = graph.reshape(x, shape, f'{name}/heads')
    x = graph.transpose(x, (0, 2, 1, 3), f'{name}/heads_first')
    key, value = graph.split(x, 1, [f'{name}/key', f'{name}/value'])
    key = graph.transpose(key, (0, 1, 3, 2), f'{name}/key_transposed')
    weights = graph.softmax(graph.matmul(query, key, f'{name}/scores'), f'{name}/weights')
    x = graph.matmul(weights, value, f'{name}/weighted')
    x = graph.reshape(x, (BATCH, sizes.width), f'{name}/pooled')
    kernel = np.asarray(layer['out']['kernel']).reshape(sizes.width, sizes.width)
    x = graph.dense(x, {'kernel': kernel, 'bias': layer['out']['bias']}, f'{name}/out')
    y = graph.layer_norm(x, params['LayerNorm_0'], f'{name}/LayerNorm_0')
    return graph.add(x, graph.mlp(y, params['MlpBlock_0'], f'{name}/MlpBlock_0'), f'{name}/mlp')


def projections(params: _Tree, names: Sequence[str], sizes: Sizes) -> dict[str, np.ndarray]:
    """Kernels side by side [D, names * D], and biases, float64; queries with the factor of scores.

    In float64, so that the factor adds one rounding and no more. Where a norm of the queries
    follows, the factor stands in that.
    """
    kernels, biases = [], []
    for name in names:
        scaled = name == 'query' and 'query_ln' not in params
        factor = np.float64(sizes.head_size) ** (-0.5 if scaled else 0)
        kernel = np.asarray(params[name]['kernel'])
        bias = np.asarray(params[name].get('bias', np.zeros(sizes.width)))
        kernels.append(kernel.reshape(sizes.width, sizes.width) * factor)
        biases.append(bias.reshape(sizes.width) * factor)
    return {'kernel': np.concatenate(kernels, axis=1), 'bias': np.concatenate(biases)}


def classify(
    graph: Graph, x: str, params: _Tree, act: str = 'tanh', unit_features: bool = False
) -> tuple[str, str | None]:
    """Normalised class token, or mean of the tokens, [B, D], to features and logits."""
    if 'pre_logits' in params:
        x = graph.dense(x, params['pre_logits'], 'pre_logits')
        x = graph.activation(x, act, f'pre_logits/{act}')
    features = x = graph.unit_length(x, 'unit_features') if unit_features else x
    if 'head_hidden' in params:
        x = graph.dense(x, params['head_hidden'], 'head_hidden')
        x = graph.op('Relu', [x], 'head_hidden/relu')
    return features, graph.dense(x, params['head'], 'head') if 'head' in params else None


def classify_distilled(graph: Graph, x: str, params: _Tree) -> tuple[str, str | None]:
    """Normalised class and distillation tokens [B * 2, D] to features (their mean) and logits.

    The logits are the mean of what two heads make of one token each: one product with both heads,
    halved, one above the other.
    """
    width = np.asarray(params['cls']).shape[-1]
    features = graph.mean(graph.reshape(x, (BATCH, 2, width), 'pre_logits/tokens'), 1, 'pre_logits')
    if 'head' not in params:
        return features, None
    heads = params['head'], params['head_dist']
    kernel = np.concatenate([np.asarray(head['kernel']) for head in heads]) * np.float32(0.5)
    bias = sum(np.asarray(head['bias']) for head in heads) * np.float32(0.5)
    x = graph.reshape(x, (BATCH, 2 * width), 'pre_logits/side_by_side')
    return features, graph.dense(x, {'kernel': kernel, 'bias': bias}, 'head')
