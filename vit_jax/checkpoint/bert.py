"""BERT of Hugging Face as the text tower of an image-text model: folders such as bert-base-uncased.

LiT starts from it (https://arxiv.org/abs/2111.07991, section 4.2). What the folder states of
activation and epsilon is computed: that is the exact GELU, where LiT's own BERT has the tanh form.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from vit_jax import files
from vit_jax.checkpoint import key_tables, npz, tensors
from vit_jax.checkpoint.arrays import Weights
from vit_jax.checkpoint.library_configs import hugging_face_activation
from vit_jax.data import text as text_lib
from vit_jax.errors import UserError, printable

_TENSORS = re.compile(r'(?:bert\.)?((?:embeddings|encoder)\..*)')
# Of the files that Google's own weights became, before PyTorch's names.
_OLD_ENDS = {'gamma': 'weight', 'beta': 'bias'}
# Settings that change what is computed, and the value that is computed here.
_FIXED = {
    'position_embedding_type': 'absolute',
    'is_decoder': False,
    'add_cross_attention': False,
}
# The same of its tokenizer.
_TOKENIZER = {'do_lower_case': True, 'strip_accents': None, 'tokenize_chinese_chars': True}
_SIZES = {
    'hidden_size': 'hidden_size',
    'num_layers': 'num_hidden_layers',
    'mlp_dim': 'intermediate_size',
    'vocab_size': 'vocab_size',
    'max_length': 'max_position_embeddings',
    'num_segments': 'type_vocab_size',
}
_EMBEDDERS = ('token', 'position', 'segment')
_LAYERS = 'BertEncoder_0/encoder_block/layer_sequence/layers_'


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A BERT, under the names of `models.text.BertModel`; its weights are not yet read.

    Attributes:
        source: the weights: `params` has `BertEncoder_0`, and no head.
        text: the arguments of `models.text.BertModel` but `num_classes`: what `LitModel.text` is,
            where `text_model` is 'bert'.
        pp: what `LitModel.pp` says of its tokenizer; `size` and `max_len` are to be chosen.
        vocabulary: the file of the tokenizer.
    """

    source: Weights
    text: Mapping[str, Any]
    pp: Mapping[str, Any]
    vocabulary: pathlib.Path


def open_folder(folder: str | os.PathLike[str]) -> TextTower:
    """Recognises a folder of BERT: config.json, weights, and vocab.txt or tokenizer.json.

    Weights are a model.safetensors or pytorch_model.bin of any of its classes; the pooler and heads
    are left out.

    Raises:
        UserError: it is of another model, damaged, lacks a file, or states what is not computed
            here.
    """
    folder = files.expand(folder)
    if not (folder / 'config.json').is_file():
        raise UserError(
            f'{folder} has no config.json; expected a folder of BERT of Hugging Face, such as '
            'bert-base-uncased, with config.json, model.safetensors and vocab.txt'
        )
    config = files.read_json(folder / 'config.json')
    if config.get('model_type', 'bert') != 'bert':
        kind = str(config.get('model_type'))[:100]
        raise UserError(f'{folder} has the model_type {kind!r}; the text towers known are: bert')
    _check(folder / 'config.json', config, _FIXED)
    found: dict[str, Any] = {}
    for file in tensors.find_in_folder(folder):
        found |= tensors.open_tensors(file)[0]
    named, others = {}, []
    for name, array in found.items():
        if match := _TENSORS.fullmatch(name):
            stem, _, end = match[1].rpartition('.')
            named[f'{stem}.{_OLD_ENDS.get(end, end)}'] = array
        else:
            others.append(name)
    if 'embeddings.word_embeddings.weight' not in named:
        raise UserError(f'{folder} has no BERT: no tensor embeddings.word_embeddings.weight')
    flat, notes = key_tables.to_params(named, 'BERT', 0, folder)
    text = _arguments(folder, config, flat)
    _check_shapes(folder, text, flat)
    if others:
        groups = ', '.join(sorted({printable(name.split('.')[0])[:50] for name in others})[:5])
        notes.append(f'{len(others)} tensors of no text tower are left out ({groups})')
    vocabulary = _vocabulary(folder, text['vocab_size'])
    source = Weights(str(folder), 'BERT of Hugging Face', npz.nest(flat, folder), tuple(notes))
    return TextTower(source, text, {'tokenizer_name': 'bert'}, vocabulary)


def _arguments(
    folder: pathlib.Path, config: Mapping[str, Any], flat: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `models.text.BertModel`; sizes are those of the arrays, and stated alike."""
    place = folder / 'config.json'
    embedder = 'BertEncoder_0/embedder/embedders_'
    layers = {name.removeprefix(_LAYERS).split('/')[0] for name in flat if name.startswith(_LAYERS)}
    try:
        rows = {kind: flat[f'{embedder}{kind}_ids/embedding'].shape for kind in _EMBEDDERS}
        sizes = {
            'hidden_size': rows['token'][1],
            'num_layers': len(layers),
            'mlp_dim': flat[f'{_LAYERS}0/mlp_block/mlp/dense_layer/kernel'].shape[1],
            'vocab_size': rows['token'][0],
            'max_length': rows['position'][0],
            'num_segments': rows['segment'][0],
        }
    except (KeyError, IndexError) as error:
        raise UserError(f'{folder}: its BERT lacks {error}, or it has another shape') from error
    for ours, theirs in _SIZES.items():
        if config.get(theirs, sizes[ours]) != sizes[ours]:
            raise UserError(
                f'{place} states {theirs}={str(config[theirs])[:50]}, and the weights have '
                f'{sizes[ours]:,}: they are not of one model'
            )
    heads, epsilon = config.get('num_attention_heads', 12), config.get('layer_norm_eps', 1e-12)
    if type(heads) is not int or heads < 1 or sizes['hidden_size'] % heads:
        raise UserError(
            f'{place} states num_attention_heads={str(heads)[:50]}, which does not divide a width '
            f'of {sizes["hidden_size"]:,}'
        )
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise UserError(f'{place} states layer_norm_eps={str(epsilon)[:50]}; expected 0 to 1')
    act = hugging_face_activation(folder, config, 'hidden_act', 'gelu')
    return {**sizes, 'num_heads': heads, 'act': act, 'layer_norm_eps': float(epsilon)}


def _check_shapes(folder: pathlib.Path, text: Mapping[str, Any], flat: Mapping[str, Any]) -> None:
    """Raises `UserError` where an array is missing, or its shape does not go with the others."""
    import jax
    import jax.numpy as jnp

    from vit_jax import models

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model = models.text.BertModel(**text)
    init = jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)
    wanted = {name: leaf.shape for name, leaf in npz.flatten(init['params']).items()}
    for name in sorted(wanted.keys() | flat.keys()):
        found = tuple(flat[name].shape) if name in flat else 'missing'
        if found != wanted.get(name):
            raise UserError(
                f'{folder}: the weights are not those of one BERT: {name} is {found}, expected '
                f'{wanted.get(name, "no such array")}'
            )


def _vocabulary(folder: pathlib.Path, rows: int) -> pathlib.Path:
    """The file of the tokenizer."""
    place = folder / 'tokenizer_config.json'
    if place.is_file():
        _check(place, files.read_json(place), _TOKENIZER)
    places = [folder / name for name in ('vocab.txt', 'tokenizer.json')]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f'{folder} has neither vocab.txt, the vocabulary of its tokenizer, nor tokenizer.json: '
            'copy one from where the weights come from'
        )
    text_lib.check_vocabulary(text_lib.BertTokenizer(file, max_len=2), rows)
    return file


def _check(place: pathlib.Path, told: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, value in fixed.items():
        if told.get(name, value) not in (value, None):
            raise UserError(
                f'{place} has {name}={str(told[name])[:50]}, which no text tower here computes '
                f'(expected {value})'
            )
