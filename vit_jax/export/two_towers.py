"""Writes image-text models for transformers: folders of its CLIPModel and SiglipModel."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax import files, models
from vit_jax.checkpoint import adapt, key_tables, model_input, npz, tensors
from vit_jax.checkpoint.library_configs import TO_HUGGING_FACE
from vit_jax.data.text import JsonTokenizer
from vit_jax.errors import UserError
from vit_jax.export import to_hugging_face
from vit_jax.export.expressible import UnsupportedError
from vit_jax.inference import model_folder, two_tower

_TOKENIZER_FILES = {'sentencepiece': 'spiece.model', 'json': 'tokenizer.json'}


def write(destination: str | os.PathLike[str], towers: two_tower.TwoTowers) -> list[str]:
    """Writes a folder that `CLIPModel` or `SiglipModel` and `AutoTokenizer` open.

    Args:
        destination: a folder; must not exist. It appears when it is complete.
        towers: the model.

    Returns:
        What the user should know about the result, a sentence each.

    Raises:
        UserError: transformers has no class that computes the model (what it lacks is named), or
            the destination exists or cannot be written.
    """
    destination = pathlib.Path(destination)
    if destination.exists():
        raise UserError(f'{destination} exists; remove it, or name another place')
    try:
        named, config = _describe(towers)
    except UnsupportedError as why:
        raise UserError(f'huggingface cannot express this model: {why}') from why
    pp = towers.model.pp
    tokenizer = {'model_max_length': pp['max_len'], 'tokenizer_class': 'SiglipTokenizer'}
    notes: list[str] = []
    vocabulary = towers.vocabulary.read_bytes()
    if isinstance(towers.tokenizer, JsonTokenizer):
        tokenizer |= {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'pad_token': pp['pad_token'],
            'padding_side': 'left' if pp.get('pad_left') else 'right',
        }
        whole, notes = towers.tokenizer.to_json()
        vocabulary = whole.encode()
    processor = model_input.to_hugging_face(towers.preprocess)
    with files.atomic_folder(destination) as folder:
        tensors.save_safetensors(folder / 'model.safetensors', named, {})
        for name, content in (
            ('config.json', config),
            ('preprocessor_config.json', processor),
            ('tokenizer_config.json', tokenizer),
        ):
            files.write_json(folder / name, content, indent=2)
        (folder / _TOKENIZER_FILES[pp['tokenizer_name']]).write_bytes(vocabulary)
    return notes


def _describe(towers: two_tower.TwoTowers) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, config.json) of a model in transformers."""
    model = towers.model
    if model.text_model != 'text_transformer':
        raise UnsupportedError(
            f'its two-tower classes have no text tower of kind {model.text_model}'
        )
    text = models.text.TextTransformer(**model.text)
    siglip = towers.bias is not None
    if siglip == text.causal or siglip == (text.end_token is not None):
        raise UnsupportedError(
            'CLIP has a causal text tower, reads the end token and has no bias; SigLIP is the '
            'opposite in all three'
        )
    image = model_folder.Model(
        models.VisionTransformer(**{**model.image, 'num_classes': 0}),
        towers.params['img'],
        json.loads(json.dumps(dict(model.image), default=dict)),
        (),
        towers.preprocess,
        towers.source,
    )
    flat = npz.flatten(towers.params['img'])
    table, described = to_hugging_face.describe(image, flat)
    tower = described['config.json']
    kind = 'SigLIP' if siglip else 'CLIP'
    if table != kind:
        raise UnsupportedError(f'the image tower of its {kind} is another than this one')
    named, lost = key_tables.from_params(flat, table)
    texts = npz.flatten(towers.params['txt'])
    named_text, lost_text = key_tables.from_params(texts, f'{table} text')
    if lost or lost_text:
        raise UnsupportedError(
            f'its {kind} has no place for {adapt.shorten([*lost, *lost_text], 6)}'
        )
    whole: dict[str, Any] = to_hugging_face.name(named, tower)
    if siglip:
        whole = {f'vision_model.{name}': array for name, array in whole.items()}
        whole['logit_bias'] = towers.params['b']
    elif np.any(named_text.pop('text_projection.bias')):
        raise UnsupportedError("the projection of its CLIP's texts has no bias")
    whole |= named_text
    scale = np.asarray(towers.params['t'])
    whole['logit_scale'] = scale if siglip else scale.reshape(())
    projected = texts['head/kernel'].shape[1]
    config = {
        'architectures': ['SiglipModel' if siglip else 'CLIPModel'],
        'model_type': kind.lower(),
        'vision_config': {name: v for name, v in tower.items() if name != 'architectures'},
        'text_config': _text_config(text, texts, kind.lower()),
        **({} if siglip else {'projection_dim': projected}),
    }
    if siglip:
        config['text_config']['projection_size'] = projected
    return whole, config


def _text_config(
    text: models.text.TextTransformer, params: Mapping[str, Any], kind: str
) -> dict[str, Any]:
    """The configuration of a text tower."""
    end = {} if text.end_token is None else {'eos_token_id': text.end_token}
    return {
        'model_type': f'{kind}_text_model',
        'vocab_size': text.vocab_size,
        'hidden_size': text.width,
        'intermediate_size': text.mlp_dim,
        'num_hidden_layers': text.num_layers,
        'num_attention_heads': text.num_heads,
        'max_position_embeddings': params['pos_embedding'].shape[1],
        'hidden_act': TO_HUGGING_FACE[text.act],
        'layer_norm_eps': text.layer_norm_eps,
        **end,
    }
