"""The models as ONNX graphs: Vision Transformer, hybrid, DeiT and MLP-Mixer.

What `vit_jax.models.vit`, `resnet` and `mixer` compute, with what needs no work at run time
done beforehand: the class token and the position embeddings are one constant, the projections to
queries, keys and values are one matrix, and the factor of the attention scores is part of it.

Shapes: B batch, N tokens, D width, H heads, K head size (D / H), C classes; of feature maps F
channels, h rows and columns.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax import variants
from vit_jax.export import onnx_heads
from vit_jax.export.onnx_graph import BATCH, FLOAT32, ROWS, Graph
from vit_jax.export.onnx_heads import Sizes
from vit_jax.models.resnet import GROUP_NORM_EPSILON, GROUPS, STANDARDISATION_EPSILON
from vit_jax.models.rotary import Rotary

_Tree = Mapping[str, Any]
_Size = tuple[int, int]  # height and width, pixels


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


def build(
    graph: Graph, image: str, params: _Tree, config: _Tree, size: _Size, *, attention: bool = False
) -> Values:
    """Adds a model to a graph.

    Args:
        graph: where to.
        image: [B, 3, height, width] in [-1, 1].
        params: of `models.VisionTransformer` or `models.MlpMixer`.
        config: its arguments; the classifier is not an unpooled one.
        size: height and width of the image, pixels.
        attention: whether the attention weights are needed. If not, the last block of a model that
            reads only its class token computes no other.
    """
    if variants.is_mixer(config):
        return _mixer(graph, image, params, config, size)
    classifier = config.get('classifier', 'token')
    x, num_tokens = _embed(graph, image, params, config, size)
    rotary = _rotary(graph, config, size)
    sizes = Sizes(num_tokens, config['transformer']['num_heads'], config['hidden_size'], rotary)
    num_layers = config['transformer']['num_layers']
    heads = 2 if config.get('distilled') else 1
    weights, read = [], 0
    for layer in range(num_layers):
        name = f'Transformer/encoderblock_{layer}'
        if layer == num_layers - 1 and not attention and classifier == 'token':
            read = heads
        x, w = encoder_block(
            graph, x, params['Transformer'][f'encoderblock_{layer}'], sizes, name, read
        )
        weights.append(w)
    if classifier == 'token' and not read:
        x = _front(graph, x, sizes, heads, 'tokens')

    if config.get('final_norm', True) and not config.get('fc_norm'):
        x = graph.layer_norm(x, params['Transformer']['encoder_norm'], 'Transformer/encoder_norm')
    if classifier != 'token':
        x = graph.reshape(x, (BATCH, num_tokens, sizes.width), 'tokens')
        x = onnx_heads.pool(graph, x, params, config, sizes)
    if config.get('fc_norm'):
        x = graph.layer_norm(x, params['fc_norm'], 'fc_norm')
    if config.get('distilled'):
        return Values(*onnx_heads.classify_distilled(graph, x, params), num_tokens, weights)
    act = config.get('representation_act', 'tanh')
    unit = config.get('unit_features', False)
    return Values(*onnx_heads.classify(graph, x, params, act, unit), num_tokens, weights)


def _rotary(graph: Graph, config: _Tree, size: _Size) -> Rotary | None:
    """Rotary positions, if the model has them; their cosines and sines [N, K] become constants.

    A point (a, b) is turned to (a, b) cos + (b, a) (-sin, sin).
    """
    if not config.get('rotary'):
        return None
    grid, prefix = variants.token_grid(config, size), variants.prefix_tokens(config)
    rotary = Rotary(**config['rotary'], shape=grid, prefix=prefix)
    angles = rotary.angles(config['hidden_size'] // config['transformer']['num_heads'])
    cos, sin = np.cos(angles), np.sin(angles)
    graph.weight('rotary/cos', np.concatenate([cos, cos], axis=1), graph.compute)
    graph.weight('rotary/sin', np.concatenate([-sin, sin], axis=1), graph.compute)
    return rotary


def _mixer(graph: Graph, image: str, params: _Tree, config: _Tree, size: _Size) -> Values:
    patch = tuple(config['patches']['size'])
    num_tokens = size[0] // patch[0] * (size[1] // patch[1])
    shape = (BATCH, num_tokens, config['hidden_dim'])
    x = graph.patches(image, params['stem'], patch, shape, 'stem')
    x = graph.reshape(x, (ROWS, shape[2]), 'rows')
    for i in range(config['num_blocks']):
        name, layers = f'MixerBlock_{i}', params[f'MixerBlock_{i}']
        y = graph.layer_norm(x, layers['LayerNorm_0'], f'{name}/LayerNorm_0')
        y = graph.reshape(y, shape, f'{name}/token_mixing/tokens')
        y = _token_mixing(graph, y, layers['token_mixing'], f'{name}/token_mixing')
        y = graph.reshape(y, (ROWS, shape[2]), f'{name}/token_mixing/rows')
        x = graph.add(x, y, f'{name}/tokens_mlp')
        y = graph.layer_norm(x, layers['LayerNorm_1'], f'{name}/LayerNorm_1')
        y = graph.mlp(y, layers['channel_mixing'], f'{name}/channel_mixing')
        x = graph.add(x, y, f'{name}/channels_mlp')
    x = graph.layer_norm(x, params['pre_head_layer_norm'], 'pre_head_layer_norm')
    x = graph.mean(graph.reshape(x, shape, 'tokens'), 1, 'mean_of_tokens')
    return Values(*onnx_heads.classify(graph, x, params), num_tokens, [])


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
            x = graph.activation(x, graph.act, f'{name}/{graph.act}')
            x = graph.cast(x, graph.compute)
    return x


def _embed(graph: Graph, image: str, params: _Tree, config: _Tree, size: _Size) -> tuple[str, int]:
    """Images [B, 3, height, width] to the encoder's input, rows [B * N, D]; and N."""
    x, width = image, config['hidden_size']
    if config.get('resnet'):
        num_layers = config['resnet']['num_layers']
        x, size = _resnet(graph, x, params, size, num_layers)
    patch = tuple(config['patches']['size'])
    grid = size[0] // patch[0] * (size[1] // patch[1])
    front = variants.tokens_in_front(config)
    prefix = sum(front.values())
    num_tokens = prefix + grid
    x = graph.patches(x, params['embedding'], patch, (BATCH, grid, width), 'embedding')

    # The tokens in front are zeros at first, and get their values with the position embeddings.
    added = np.zeros((1, num_tokens, width), np.float32)
    if front:
        added[:, :prefix] = np.concatenate([np.asarray(params[name]) for name in front], axis=1)
    positions = params['Transformer'].get('posembed_input')
    if positions:
        table = np.asarray(positions['pos_embedding'])
        count = variants.prefix_positions(config)
        added[:, :count] += table[:, :count]
        added[:, prefix:] += table[:, count:]
    if front:
        pads = graph.integers([0, prefix, 0, 0, 0, 0])
        x = graph.op('Pad', [graph.cast(x, FLOAT32), pads], 'tokens_in_front')
    if front or positions:
        constant = graph.weight('Transformer/posembed_input/pos_embedding', added, FLOAT32)
        x = graph.add(x, constant, 'Transformer/posembed_input')
    x = graph.reshape(x, (ROWS, width), 'rows')
    if 'pre_norm' in params['Transformer']:
        x = graph.layer_norm(x, params['Transformer']['pre_norm'], 'Transformer/pre_norm')
    return x, num_tokens


def _front(graph: Graph, x: str, sizes: Sizes, count: int, name: str) -> str:
    """Of rows [B * N, D] those of the first `count` tokens of each image, [B * count, D]."""
    x = graph.reshape(x, (BATCH, sizes.tokens, sizes.width), name)
    if count == 1:
        return graph.op('Gather', [x, graph.index(0)], f'{name}/first', axis=1)
    x = graph.op('Gather', [x, graph.integers(range(count))], f'{name}/first', axis=1)
    return graph.reshape(x, (f'{count}*{BATCH}', sizes.width), f'{name}/first_rows')


def encoder_block(
    graph: Graph, x: str, params: _Tree, sizes: Sizes, name: str, read: int
) -> tuple[str, str]:
    """An encoder block: rows [B * N, D] to the same, and attention weights [B, H, N, N].

    If only the first `read` tokens of each image (0: all) are read afterwards, only they are
    computed: rows [B * read, D], and weights [B, H, read, N].
    """
    y = query = graph.layer_norm(x, params['LayerNorm_0'], f'{name}/LayerNorm_0')
    if read:
        x = _front(graph, x, sizes, read, f'{name}/tokens')
        query = _front(graph, y, sizes, read, f'{name}/LayerNorm_0/tokens')
    layer = 'MultiHeadDotProductAttention_0'
    y, weights = attention_layer(graph, query, y, params[layer], sizes, f'{name}/{layer}', read)
    if 'LayerScale_0' in params:
        y = graph.scale(y, params['LayerScale_0'], f'{name}/LayerScale_0')
    x = graph.add(x, y, f'{name}/self_attention')
    y = graph.layer_norm(x, params['LayerNorm_1'], f'{name}/LayerNorm_1')
    y = graph.mlp(y, params['MlpBlock_0'], f'{name}/MlpBlock_0')
    if 'LayerScale_1' in params:
        y = graph.scale(y, params['LayerScale_1'], f'{name}/LayerScale_1')
    return graph.add(x, y, f'{name}/mlp'), weights


def attention_layer(
    graph: Graph, rows: str, x: str, params: _Tree, sizes: Sizes, name: str, read: int
) -> tuple[str, str]:
    """Attention of the tokens in `rows`, [B * n, D], to all, `x` [B * N, D].

    If they are all (`read` is 0, else n), queries, keys and values are one product.

    Returns:
        Rows [B * n, D], and the weights [B, H, n, N].
    """

    def project(x: str, tokens: int, *names: str) -> list[str]:
        """Rows [B * tokens, D] to as many [B, H, tokens, K] as there are names."""
        path = f'{name}/{"_".join(names)}'
        x = graph.dense(x, onnx_heads.projections(params, names, sizes), path)
        shape = (BATCH, tokens, len(names) * sizes.heads, sizes.head_size)
        x = graph.transpose(
            graph.reshape(x, shape, f'{path}/heads'), (0, 2, 1, 3), f'{path}/heads_first'
        )
        if len(names) == 1:
            return [x]
        return graph.split(x, 1, [f'{name}/{part}' for part in names])

    if sizes.rotary:
        params = _halved(params, sizes.rotary)
    if read:
        (query,) = project(rows, read, 'query')
        key, value = project(x, sizes.tokens, 'key', 'value')
    else:
        query, key, value = project(x, sizes.tokens, 'query', 'key', 'value')
    if 'query_ln' in params:
        query, key = _normalised(graph, query, key, params, sizes, name)
    if sizes.rotary:  # tokens that are read are not turned: none of them is a patch
        query = query if read else _turned(graph, query, f'{name}/query')
        key = _turned(graph, key, f'{name}/key')
    key = graph.transpose(key, (0, 1, 3, 2), f'{name}/key_transposed')
    scores = graph.matmul(query, key, f'{name}/scores')
    if sizes.mask:
        scores = graph.masked(scores, sizes.mask, f'{name}/masked')
    weights = graph.softmax(scores, f'{name}/weights')
    x = graph.matmul(weights, value, f'{name}/weighted')
    x = graph.transpose(x, (0, 2, 1, 3), f'{name}/tokens_first')
    first = f'{read}*{BATCH}' if read > 1 else BATCH if read else ROWS
    x = graph.reshape(x, (first, sizes.width), f'{name}/rows')
    if 'out_ln' in params:
        x = graph.layer_norm(x, params['out_ln'], f'{name}/out_ln')
    kernel = np.asarray(params['out']['kernel']).reshape(sizes.width, sizes.width)
    layer = {'kernel': kernel, 'bias': params['out']['bias']}
    return graph.dense(x, layer, f'{name}/out'), weights


def _normalised(
    graph: Graph, query: str, key: str, params: _Tree, sizes: Sizes, name: str
) -> tuple[str, str]:
    """Queries, with the factor of the scores, and keys [B, H, n, K] after their LayerNorms."""
    factor = float(sizes.head_size) ** -0.5
    ask = {part: np.asarray(array) * factor for part, array in params['query_ln'].items()}
    return (
        graph.layer_norm(query, ask, f'{name}/query_ln'),
        graph.layer_norm(key, params['key_ln'], f'{name}/key_ln'),
    )


def _halved(params: _Tree, rotary: Rotary) -> _Tree:
    """Attention whose points are numbers i and i + K / 2 of a head.

    Where they are neighbours, queries and keys are put into that order; their products stay.
    """
    if rotary.form != 'axial':
        return params

    def reorder(array: Any) -> np.ndarray:
        array = np.asarray(array)
        return np.concatenate([array[..., 0::2], array[..., 1::2]], axis=-1)

    names = [name for name in ('query', 'key', 'query_ln', 'key_ln') if name in params]
    new = {name: {part: reorder(x) for part, x in params[name].items()} for name in names}
    return {**params, **new}


def _turned(graph: Graph, x: str, name: str) -> str:
    """Queries or keys [B, H, N, K] at their rotary positions."""
    x = graph.cast(x, graph.compute)
    first, second = graph.split(x, 3, [f'{name}/first', f'{name}/second'])
    swapped = graph.op('Concat', [second, first], f'{name}/swapped', axis=-1)
    x = graph.op('Mul', [x, 'rotary/cos'], f'{name}/cos')
    return graph.op(
        'Add',
        [x, graph.op('Mul', [swapped, 'rotary/sin'], f'{name}/sin')],
        f'{name}/turned',
    )


def _resnet(
    graph: Graph, images: str, params: _Tree, size: _Size, num_layers: Sequence[int]
) -> tuple[str, _Size]:
    """The ResNet of a hybrid: images [B, 3, height, width] to features [B, F, h, w], and (h, w).

    Its kernels are standardised here, so the graph has plain convolutions.
    """
    x, size = _conv(graph, images, params['conv_root'], size, 2, 'conv_root')
    x = _group_norm(graph, x, params['gn_root'], size, 'gn_root', relu=True)
    # Padding of a maximum is minus infinity, in XLA and in ONNX.
    pads, size = _same(size, 3, 2)
    x = graph.op('MaxPool', [x], 'max_pool', kernel_shape=(3, 3), strides=(2, 2), pads=pads)
    for stage, units in enumerate(num_layers):
        for unit in range(units):
            name = f'block{stage + 1}/unit{unit + 1}'
            stride = 2 if stage and not unit else 1
            x, size = _unit(
                graph, x, params[f'block{stage + 1}'][f'unit{unit + 1}'], size, stride, name
            )
    return x, size


def _unit(
    graph: Graph, x: str, params: _Tree, size: _Size, stride: int, name: str
) -> tuple[str, _Size]:
    """A bottleneck unit: [B, F, h, w] to [B, 4 features, h / stride, w / stride]; and its size."""
    shortcut, out = x, _divided(size, stride)
    if 'conv_proj' in params:
        shortcut, _ = _conv(graph, x, params['conv_proj'], size, stride, f'{name}/conv_proj')
        shortcut = _group_norm(graph, shortcut, params['gn_proj'], out, f'{name}/gn_proj')
    y, _ = _conv(graph, x, params['conv1'], size, 1, f'{name}/conv1')
    y = _group_norm(graph, y, params['gn1'], size, f'{name}/gn1', relu=True)
    y, _ = _conv(graph, y, params['conv2'], size, stride, f'{name}/conv2')
    y = _group_norm(graph, y, params['gn2'], out, f'{name}/gn2', relu=True)
    y, _ = _conv(graph, y, params['conv3'], out, 1, f'{name}/conv3')
    y = _group_norm(graph, y, params['gn3'], out, f'{name}/gn3')
    return graph.op('Relu', [graph.add(shortcut, y, f'{name}/sum')], f'{name}/relu'), out


def _conv(
    graph: Graph, x: str, params: _Tree, size: _Size, stride: int, name: str
) -> tuple[str, _Size]:
    """A convolution with standardised kernel and 'SAME' padding; and the size of its output."""
    kernel = np.asarray(params['kernel'], np.float64)
    kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    kernel /= kernel.std((0, 1, 2), keepdims=True) + STANDARDISATION_EPSILON
    pads, out = _same(size, kernel.shape[0], stride)
    return graph.conv(x, kernel, name, strides=(stride, stride), pads=pads), out


def _divided(size: _Size, stride: int) -> _Size:
    return -(-size[0] // stride), -(-size[1] // stride)


def _same(size: _Size, kernel: int, stride: int) -> tuple[tuple[int, int, int, int], _Size]:
    """XLA's 'SAME' padding (top, left, bottom, right; an odd one is the last); and the output.

    With a stride it depends on the size of the image, so that PyTorch's fixed padding is another.
    """
    out = _divided(size, stride)
    down, across = (
        max((o - 1) * stride + kernel - side, 0) for side, o in zip(size, out, strict=True)
    )
    return (down // 2, across // 2, down - down // 2, across - across // 2), out


def _group_norm(
    graph: Graph, x: str, params: _Tree, size: _Size, name: str, *, relu: bool = False
) -> str:
    """GroupNorm of [B, F, height, width], in float32, and on request what ReLU leaves of it.

    ONNX has GroupNormalization from opset 18, in its present meaning from opset 21; at all opsets
    it is an InstanceNormalization in which each group is one channel.
    """
    channels = np.asarray(params['scale']).size
    values = channels // GROUPS * size[0] * size[1]
    y = graph.reshape(graph.cast(x, FLOAT32), (BATCH, GROUPS, values), f'{name}/groups')
    no_change = graph.full(GROUPS, 1.0), graph.full(GROUPS, 0.0)  # of scale and bias
    y = graph.op(
        'InstanceNormalization', [y, *no_change], f'{name}/normalised', epsilon=GROUP_NORM_EPSILON
    )
    y = graph.reshape(y, (BATCH, channels, *size), f'{name}/channels')
    for op_type, key, result in (('Mul', 'scale', f'{name}/times_scale'), ('Add', 'bias', name)):
        array = np.asarray(params[key]).reshape(channels, 1, 1)
        y = graph.op(op_type, [y, graph.weight(f'{name}/{key}', array, FLOAT32)], result)
    return graph.op('Relu', [y], f'{name}/relu') if relu else y
