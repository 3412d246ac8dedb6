"""The Vision Transformer as an ONNX graph: plain, hybrid and distilled (DeiT).

What `vit_jax.models.vit` computes, with what needs no work at run time done beforehand: the class
token and the position embeddings are one constant, the projections to queries, keys and values are
one matrix, and the factor of the attention scores is part of it.

Shapes: B batch, N tokens, D width, H heads, K head size (D / H), C classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.export import onnx_resnet
from vit_jax.export.onnx_graph import BATCH, FLOAT32, ROWS, Graph

_Tree = Mapping[str, Any]


@dataclasses.dataclass
class Values:
    """What a graph computes, by the names of its values.

    Attributes:
        features: what `pre_logits` gives, [B, D]; of a distilled model the mean of both tokens.
        logits: [B, C]; None for a model without a head.
        num_tokens: N.
        attention: the weights of each block [B, H, N, N]; empty for a Mixer.
    """

    features: str
    logits: str | None
    num_tokens: int
    attention: list[str]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """N, H and D."""

    tokens: int
    heads: int
    width: int

    @property
    def head_size(self) -> int:
        """K."""
        return self.width // self.heads


def build(
    graph: Graph, image: str, params: _Tree, config: _Tree, side: int, *, attention: bool = False
) -> Values:
    """Adds a Vision Transformer to a graph.

    Args:
        graph: where to.
        image: [B, 3, side, side] in [-1, 1].
        params: of `models.VisionTransformer`.
        config: its arguments; the classifier is 'token' or 'gap'.
        side: of the image, pixels.
        attention: whether the attention weights are wanted. If not, the last block of a model that
            reads only its class token computes no other.
    """
    front = ('cls', 'dist') if config.get('distilled') else ('cls',)
    if config.get('classifier', 'token') != 'token':
        front = ()
    x, num_tokens = _embed(graph, image, params, config, side, front)
    sizes = _Sizes(num_tokens, config['transformer']['num_heads'], config['hidden_size'])
    num_layers = config['transformer']['num_layers']
    weights, read = [], 0
    for layer in range(num_layers):
        name = f'Transformer/encoderblock_{layer}'
        if layer == num_layers - 1 and not attention:
            read = len(front)
        x, w = _block(graph, x, params['Transformer'][f'encoderblock_{layer}'], sizes, name, read)
        weights.append(w)
    if front and not read:
        x = _front(graph, x, sizes, len(front), 'tokens')

    x = graph.layer_norm(x, params['Transformer']['encoder_norm'], 'Transformer/encoder_norm')
    if config.get('distilled'):
        return Values(*_classify_distilled(graph, x, params), num_tokens, weights)
    if not front:
        x = graph.reshape(x, (BATCH, num_tokens, sizes.width), 'tokens')
        x = graph.mean(x, 1, 'mean_of_tokens')
    return Values(*classify(graph, x, params), num_tokens, weights)


def _embed(
    graph: Graph,
    image: str,
    params: _Tree,
    config: _Tree,
    side: int,
    token_names: tuple[str, ...],
) -> tuple[str, int]:
    """Images [B, 3, side, side] to the encoder's input, rows [B * N, D]; and N."""
    x, width = image, config['hidden_size']
    if config.get('resnet'):
        x, side = onnx_resnet.backbone(graph, x, params, side, **config['resnet'])
    patch = tuple(config['patches']['size'])
    grid = side // patch[0] * (side // patch[1])
    num_tokens = len(token_names) + grid
    x = graph.patches(x, params['embedding'], patch, (BATCH, grid, width), 'embedding')

    # The tokens in front are zeros at first, and get their values with the position embeddings.
    constant = np.zeros((1, num_tokens, width), np.float32)
    for i, name in enumerate(token_names):
        constant[:, i] = np.asarray(params[name])[:, 0]
    positions = params['Transformer'].get('posembed_input')
    if positions:
        constant += np.asarray(positions['pos_embedding'])
    if token_names:
        pads = graph.integers([0, len(token_names), 0, 0, 0, 0])
        x = graph.op('Pad', [graph.cast(x, FLOAT32), pads], 'tokens_in_front')
    if token_names or positions:
        constant = graph.weight('Transformer/posembed_input/pos_embedding', constant, FLOAT32)
        x = graph.add(x, constant, 'Transformer/posembed_input')
    return graph.reshape(x, (ROWS, width), 'rows'), num_tokens


def _front(graph: Graph, x: str, sizes: _Sizes, count: int, name: str) -> str:
    """Of rows [B * N, D] those of the first `count` tokens of each image, [B * count, D]."""
    x = graph.reshape(x, (BATCH, sizes.tokens, sizes.width), name)
    if count == 1:
        return graph.op('Gather', [x, graph.index(0)], f'{name}/first', axis=1)
    x = graph.op('Gather', [x, graph.integers(range(count))], f'{name}/first', axis=1)
    return graph.reshape(x, (f'{count}*{BATCH}', sizes.width), f'{name}/first_rows')


def _block(
    graph: Graph, x: str, params: _Tree, sizes: _Sizes, name: str, read: int
) -> tuple[str, str]:
    """An encoder block: rows [B * N, D] to the same, and attention weights [B, H, N, N].

    If only the first `read` tokens of each image (0: all) are read afterwards, only they are
    computed: rows [B * read, D], and weights [B, H, read, N].
    """
    y = graph.layer_norm(x, params['LayerNorm_0'], f'{name}/LayerNorm_0')
    attention = params['MultiHeadDotProductAttention_0'], f'{name}/MultiHeadDotProductAttention_0'
    if read:
        x = _front(graph, x, sizes, read, f'{name}/tokens')
        query = _front(graph, y, sizes, read, f'{name}/LayerNorm_0/tokens')
        heads = _some_queries(graph, query, y, attention[0], sizes, attention[1], read)
    else:
        heads = _all_queries(graph, y, attention[0], sizes, attention[1])
    rows = f'{read}*{BATCH}' if read > 1 else BATCH if read else ROWS
    y, weights = _attention(graph, *heads, attention[0], sizes, attention[1], rows)
    x = graph.add(x, y, f'{name}/self_attention')
    y = graph.layer_norm(x, params['LayerNorm_1'], f'{name}/LayerNorm_1')
    y = graph.mlp(y, params['MlpBlock_0'], f'{name}/MlpBlock_0')
    return graph.add(x, y, f'{name}/mlp'), weights


def _all_queries(
    graph: Graph, x: str, params: _Tree, sizes: _Sizes, name: str
) -> tuple[str, str, str]:
    """Rows [B * N, D] to queries, keys and values [B, H, N, K], by one product."""
    layer = _projections(params, ('query', 'key', 'value'), sizes)
    x = graph.dense(x, *layer, f'{name}/query_key_value')
    x = _heads(graph, x, sizes.tokens, 3 * sizes.heads, sizes, f'{name}/query_key_value')
    return tuple(graph.split(x, 1, [f'{name}/{part}' for part in ('query', 'key', 'value')]))


def _some_queries(
    graph: Graph, query: str, x: str, params: _Tree, sizes: _Sizes, name: str, read: int
) -> tuple[str, str, str]:
    """Rows [B * read, D] to queries [B, H, read, K], and [B * N, D] to keys and values."""
    query = graph.dense(query, *_projections(params, ('query',), sizes), f'{name}/query')
    query = _heads(graph, query, read, sizes.heads, sizes, f'{name}/query')
    x = graph.dense(x, *_projections(params, ('key', 'value'), sizes), f'{name}/key_value')
    x = _heads(graph, x, sizes.tokens, 2 * sizes.heads, sizes, f'{name}/key_value')
    return query, *graph.split(x, 1, [f'{name}/key', f'{name}/value'])


def _projections(
    params: _Tree, names: Sequence[str], sizes: _Sizes
) -> tuple[np.ndarray, np.ndarray]:
    """Kernels side by side [D, names * D], and biases, float64; queries with the factor of scores.

    In float64, so that the factor adds one rounding and no more.
    """
    kernels, biases = [], []
    for name in names:
        factor = np.float64(sizes.head_size) ** (-0.5 if name == 'query' else 0)
        kernel, bias = np.asarray(params[name]['kernel']), np.asarray(params[name]['bias'])
        kernels.append(kernel.reshape(sizes.width, sizes.width) * factor)
        biases.append(bias.reshape(sizes.width) * factor)
    return np.concatenate(kernels, axis=1), np.concatenate(biases)


def _heads(graph: Graph, x: str, tokens: int, heads: int, sizes: _Sizes, name: str) -> str:
    """Rows [B * tokens, heads * K] to [B, heads, tokens, K]."""
    x = graph.reshape(x, (BATCH, tokens, heads, sizes.head_size), f'{name}/heads')
    return graph.transpose(x, (0, 2, 1, 3), f'{name}/heads_first')


def _attention(
    graph: Graph,
    query: str,
    key: str,
    value: str,
    params: _Tree,
    sizes: _Sizes,
    name: str,
    rows: str,
) -> tuple[str, str]:
    """[B, H, n, K] and twice [B, H, N, K] to rows [B * n, D]; and the weights [B, H, n, N]."""
    key = graph.transpose(key, (0, 1, 3, 2), f'{name}/key_transposed')
    weights = graph.softmax(graph.matmul(query, key, f'{name}/scores'), f'{name}/weights')
    x = graph.matmul(weights, value, f'{name}/weighted')
    x = graph.transpose(x, (0, 2, 1, 3), f'{name}/tokens_first')
    x = graph.reshape(x, (rows, sizes.width), f'{name}/rows')
    kernel = np.asarray(params['out']['kernel']).reshape(sizes.width, sizes.width)
    return graph.dense(x, kernel, params['out']['bias'], f'{name}/out'), weights


def classify(graph: Graph, x: str, params: _Tree) -> tuple[str, str | None]:
    """Normalised class token, or mean of the tokens, [B, D], to features and logits."""
    if 'pre_logits' in params:
        layer = params['pre_logits']
        x = graph.dense(x, layer['kernel'], layer['bias'], 'pre_logits')
        x = graph.op('Tanh', [x], 'pre_logits/tanh')
    features = x
    if 'head_hidden' in params:
        layer = params['head_hidden']
        x = graph.dense(x, layer['kernel'], layer['bias'], 'head_hidden')
        x = graph.op('Relu', [x], 'head_hidden/relu')
    if 'head' not in params:
        return features, None
    return features, graph.dense(x, params['head']['kernel'], params['head']['bias'], 'head')


def _classify_distilled(graph: Graph, x: str, params: _Tree) -> tuple[str, str | None]:
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
    return features, graph.dense(x, kernel, bias, 'head')
