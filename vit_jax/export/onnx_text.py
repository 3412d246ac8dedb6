"""Text towers as ONNX graphs: BERT, and the text transformer of LiT, CLIP and SigLIP.

What `vit_jax.models.text` computes. The input is `tokens`, int32 [B, L] with the L of the
tokenizer; the output is `features`, float32 [B, C] of length 1.

Shapes: B batch, L tokens of a text, D width, C size of the embedding, V size of the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

import vit_jax
from vit_jax import models
from vit_jax.errors import extra
from vit_jax.export import onnx_models
from vit_jax.export.onnx_graph import (
    BATCH,
    BOOL,
    FLOAT32,
    INT8,
    INT32,
    INT64,
    ROWS,
    TYPES,
    Graph,
)
from vit_jax.export.onnx_heads import Sizes
from vit_jax.export.options import DEFAULT, Options
from vit_jax.models import text

with extra('export'):
    import onnx
    from onnx import helper

INPUT, OUTPUT = 'tokens', 'features'
_Tree = Mapping[str, Any]


def build(
    model: models.LitModel,
    params: _Tree,
    options: Options = DEFAULT,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Writes a text tower as an ONNX graph.

    Args:
        model: the two-tower model.
        params: its parameters.
        options: of which `opset`, `dtype` and `weights_only` count. With 'int8' the embeddings of
            the tokens are 8-bit integers, with a scale for each token; `onnx_quantize` does the
            rest, or, with `weights_only`, the graph.
        metadata: written into the file.

    Returns:
        The model; `onnx.save` writes it.

    Raises:
        UserError: weights beyond the range of float16.
    """
    config, params, length = dict(model.text or {}), params['txt'], model.pp['max_len']
    types = (TYPES[options.compute], options.stored)
    dtype = options.dtype
    if model.text_model == 'bert':
        bert = text.BertModel(**config)
        graph = Graph(options.opset, *types, bert.act, bert.layer_norm_eps)
        tokens = graph.input(INPUT, INT32, (BATCH, length))
        heads = text.BERT_SIZES.get(config.get('config', ''), config)['num_heads']
        x, width = _bert(graph, tokens, params['BertEncoder_0'], length, heads, dtype)
    else:
        tower = text.TextTransformer(**config)
        graph = Graph(options.opset, *types, tower.act, tower.layer_norm_eps)
        tokens = graph.input(INPUT, INT32, (BATCH, length))
        x, width = _transformer(graph, tokens, params, length, tower, dtype), tower.width
    if 'head' in params:
        x, width = graph.dense(x, params['head'], 'head'), np.size(params['head']['bias'])
    graph.output(graph.unit_length(x, 'unit_length'), OUTPUT, (BATCH, width))
    proto = graph.model(model.model_name or 'vit_jax', vit_jax.__version__)
    helper.set_model_props(proto, dict(metadata or {}))
    return proto


def _embed(graph: Graph, tokens: str, table: Any, added: Any, dtype: str) -> str:
    """The rows of a table [V, D] that the tokens name, [B, L, D] float32, plus `added` [1, L, D].

    A table of 'int8' has each row as multiples of its largest value / 127.
    """
    table = np.asarray(table)
    if dtype == 'int8':
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-30) / 127
        rows = graph.weight('embedding/integers', np.rint(table / scales), INT8)
        scale = graph.weight('embedding/scales', scales, FLOAT32)
        x = graph.op('Gather', [rows, tokens], 'embedding/tokens', axis=0)
        scale = graph.op('Gather', [scale, tokens], 'embedding/scale', axis=0)
        x = graph.op('Mul', [graph.cast(x, FLOAT32), scale], 'embedding/scaled')
    else:
        rows = graph.weight('embedding/rows', table, TYPES[dtype])
        x = graph.op('Gather', [rows, tokens], 'embedding/tokens', axis=0)
    return graph.add(x, graph.weight('embedding/added', added, FLOAT32), 'embedding')


def _bert(
    graph: Graph, tokens: str, params: _Tree, length: int, heads: int, dtype: str
) -> tuple[str, int]:
    """Tokens [B, L] to the features of the first one, [B, D]; and D."""
    embedder = {
        name: np.asarray(params['embedder'][f'embedders_{name}_ids']['embedding'])
        for name in ('token', 'position', 'segment')
    }
    width = embedder['token'].shape[1]
    added = (embedder['position'][:length] + embedder['segment'][0])[None]
    x = _embed(graph, tokens, embedder['token'], added, dtype)
    x = graph.layer_norm(x, params['layer_norm'], 'layer_norm')
    x = graph.reshape(x, (ROWS, width), 'rows')
    zero = graph.weight('padding', [0], INT32)
    mask = graph.op('Greater', [tokens, zero], 'is_no_padding', elem_type=BOOL)
    axes = graph.integers([1, 2])
    sizes = Sizes(length, heads, width, mask=graph.op('Unsqueeze', [mask, axes], 'mask'))
    blocks = params['encoder_block']['layer_sequence']
    for layer in range(len(blocks)):
        block, name = blocks[f'layers_{layer}'], f'layers_{layer}'
        attention = block['attention_block']
        layers = {**attention['attention_layer'], 'out': attention['dense_layer']}
        y, _ = onnx_models.attention_layer(graph, x, x, layers, sizes, f'{name}/attention', 0)
        x = graph.add(x, y, f'{name}/attention/sum')
        x = graph.layer_norm(x, attention['layer_norm'], f'{name}/attention/layer_norm')
        mlp = block['mlp_block']
        layers = {'Dense_0': mlp['mlp']['dense_layer'], 'Dense_1': mlp['dense_layer']}
        x = graph.add(x, graph.mlp(x, layers, f'{name}/mlp'), f'{name}/mlp/sum')
        x = graph.layer_norm(x, mlp['layer_norm'], f'{name}/mlp/layer_norm')
    x = graph.reshape(x, (BATCH, length, width), 'encoded')
    return graph.op('Gather', [x, graph.index(0)], 'class_token', axis=1), width


def _transformer(
    graph: Graph, tokens: str, params: _Tree, length: int, tower: text.TextTransformer, dtype: str
) -> str:
    """Tokens [B, L] to the features of the one that is read, [B, D]."""
    width = tower.width
    x = _embed(graph, tokens, params['Embed_0']['embedding'], params['pos_embedding'], dtype)
    x = graph.reshape(x, (ROWS, width), 'rows')
    mask = ''
    if tower.causal:
        mask = graph.weight('mask', np.tril(np.ones((1, 1, length, length), bool)), BOOL)
    sizes = Sizes(length, tower.num_heads, width, mask=mask)
    for layer in range(tower.num_layers):
        name = f'encoderblock_{layer}'
        x, _ = onnx_models.encoder_block(graph, x, params['Encoder_0'][name], sizes, name, 0)
    x = graph.layer_norm(x, params['Encoder_0']['encoder_norm'], 'encoder_norm')
    x = graph.reshape(x, (BATCH, length, width), 'encoded')
    if tower.end_token is None:
        return graph.op('Gather', [x, graph.index(length - 1)], 'last_token', axis=1)
    end = graph.weight('end', [tower.end_token], INT32)
    ends = graph.op('Equal', [tokens, end], 'is_end', elem_type=BOOL)
    ends = graph.cast(ends, INT32)
    # The first of several, and of none the first token, as in the model.
    place = graph.op('ArgMax', [ends], 'end_at', elem_type=INT64, axis=1, keepdims=1)
    return graph.op('GatherND', [x, place], 'end_token', batch_dims=1)
