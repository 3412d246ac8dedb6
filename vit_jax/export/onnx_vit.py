"""The Vision Transformer as an ONNX graph: plain, hybrid and distilled (DeiT).

What `vit_jax.models.vit` computes, with what needs no work at run time done beforehand: the class
token and the position embeddings are one constant, the projections to queries, keys and values are
one matrix, and the factor of the attention scores is part of it.

Shapes: B batch, N tokens, D width, H heads, K head size (D / H), C classes.
"""

import dataclasses
from collections.abc import Mapping
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


def build(graph: Graph, image: str, params: _Tree, config: _Tree, side: int) -> Values:
    """Adds a Vision Transformer to a graph.

    Args:
        graph: where to.
        image: [B, 3, side, side] in [-1, 1].
        params: of `models.VisionTransformer`.
        config: its arguments; the classifier is 'token' or 'gap'.
        side: of the image, pixels.
    """
    token_names = ('cls', 'dist') if config.get('distilled') else ('cls',)
    if config.get('classifier', 'token') != 'token':
        token_names = ()
    width = config['hidden_size']
    x, num_tokens = _embed(graph, image, params, config, side, token_names)
    attention = []
    for layer in range(config['transformer']['num_layers']):
        name = f'Transformer/encoderblock_{layer}'
        block = params['Transformer'][f'encoderblock_{layer}']
        x, weights = _block(
            graph, x, block, num_tokens, config['transformer']['num_heads'], width, name
        )
        attention.append(weights)

    norm = params['Transformer']['encoder_norm']
    if not token_names:
        x = graph.layer_norm(x, norm, 'Transformer/encoder_norm')
        x = graph.mean(graph.reshape(x, (BATCH, num_tokens, width), 'tokens'), 1, 'gap')
        return Values(*classify(graph, x, params), num_tokens, attention)
    x = graph.reshape(x, (BATCH, num_tokens, width), 'tokens')
    # LayerNorm sees one token at a time: only those that are read need it.
    if len(token_names) == 1:
        x = graph.op('Gather', [x, graph.index(0)], 'tokens/cls', axis=1)
        x = graph.layer_norm(x, norm, 'Transformer/encoder_norm')
        return Values(*classify(graph, x, params), num_tokens, attention)
    x = graph.op('Gather', [x, graph.integers([0, 1])], 'tokens/cls_dist', axis=1)
    x = graph.layer_norm(x, norm, 'Transformer/encoder_norm')
    return Values(*_classify_distilled(graph, x, params), num_tokens, attention)


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


def _block(
    graph: Graph, x: str, params: _Tree, num_tokens: int, num_heads: int, width: int, name: str
) -> tuple[str, str]:
    """An encoder block: rows [B * N, D] to the same, and attention weights [B, H, N, N]."""
    y = graph.layer_norm(x, params['LayerNorm_0'], f'{name}/LayerNorm_0')
    y, weights = _attention(
        graph,
        y,
        params['MultiHeadDotProductAttention_0'],
        num_tokens,
        num_heads,
        width,
        f'{name}/MultiHeadDotProductAttention_0',
    )
    x = graph.add(x, y, f'{name}/self_attention')
    y = graph.layer_norm(x, params['LayerNorm_1'], f'{name}/LayerNorm_1')
    y = graph.mlp(y, params['MlpBlock_0'], f'{name}/MlpBlock_0')
    return graph.add(x, y, f'{name}/mlp'), weights


def _attention(
    graph: Graph, x: str, params: _Tree, num_tokens: int, num_heads: int, width: int, name: str
) -> tuple[str, str]:
    """Self-attention: rows [B * N, D] to the same, and its weights [B, H, N, N]."""
    head_size = width // num_heads
    # In float64, so that the factor adds one rounding of float32 and no more.
    scale = np.float64(head_size) ** -0.5
    kernels, biases = [], []
    for projection, factor in (('query', scale), ('key', 1.0), ('value', 1.0)):
        kernel, bias = (np.asarray(params[projection][key]) for key in ('kernel', 'bias'))
        kernels.append(kernel.reshape(width, width) * factor)
        biases.append(bias.reshape(width) * factor)
    x = graph.dense(
        x, np.concatenate(kernels, 1), np.concatenate(biases), f'{name}/query_key_value'
    )
    x = graph.reshape(x, (BATCH, num_tokens, 3 * num_heads, head_size), f'{name}/heads')
    x = graph.transpose(x, (0, 2, 1, 3), f'{name}/heads_first')
    query, key, value = graph.split(
        x, 3, 1, [f'{name}/{part}' for part in ('query', 'key', 'value')]
    )
    key = graph.transpose(key, (0, 1, 3, 2), f'{name}/key_transposed')
    weights = graph.softmax(graph.matmul(query, key, f'{name}/scores'), f'{name}/weights')
    x = graph.matmul(weights, value, f'{name}/weighted')
    x = graph.transpose(x, (0, 2, 1, 3), f'{name}/tokens_first')
    x = graph.reshape(x, (ROWS, width), f'{name}/rows')
    kernel = np.asarray(params['out']['kernel']).reshape(width, width)
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
    """Normalised class and distillation tokens [B, 2, D] to features (their mean) and logits.

    The logits are the mean of what two heads make of one token each: one product with both heads,
    halved, one above the other.
    """
    features = graph.mean(x, 1, 'pre_logits')
    if 'head' not in params:
        return features, None
    heads = params['head'], params['head_dist']
    kernel = np.concatenate([np.asarray(head['kernel']) for head in heads]) * np.float32(0.5)
    bias = sum(np.asarray(head['bias']) for head in heads) * np.float32(0.5)
    x = graph.reshape(x, (BATCH, kernel.shape[0]), 'tokens/side_by_side')
    return features, graph.dense(x, kernel, bias, 'head')
