"""Image-text models of other libraries: transformers, big_vision, open_clip.

Their image towers are read as those of image models are, see `formats`; here is the rest.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from vit_jax import files
from vit_jax.checkpoint import (
    big_vision,
    formats,
    infer,
    key_tables,
    npz,
    open_clip_configs,
    state_dicts,
    tensors,
)
from vit_jax.checkpoint.arrays import Weights, derive
from vit_jax.checkpoint.hugging_face_families import FAMILIES
from vit_jax.checkpoint.library_configs import hugging_face_activation
from vit_jax.data import text as text_lib
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import UserError

# Model type -> its table of `key_tables`, and the number of heads where none is stated.
_KINDS = {'clip': ('CLIP text', 8), 'siglip': ('SigLIP text', 12)}
_PADDING = {'clip': '<|endoftext|>'}  # fills up texts where their tokenizer's configuration is mute
_SIGLIP_BIAS = -10.0  # before training, https://arxiv.org/abs/2303.15343, section 3
_TEXT = re.compile(r'text_model\..*|text_projection\.weight')
_OPEN_CLIP_TEXT = re.compile(
    r'(?:text\.)?((?:transformer|token_embedding|ln_final|positional_embedding|text_projection'
    r'|cls_emb|proj)(?:\..*)?)'
)


@dataclasses.dataclass(frozen=True)
class TwoTowerWeights:
    """An image-text model of a library, under this package's names; not yet read.

    Attributes:
        source: the weights as a whole, as `formats.open_weights` has them; `params` has both
            towers, `img` and `txt`, `t`, and `b` where logits have a bias.
        model: the arguments of `models.LitModel`.
        preprocess: from decoded images to pixels.
        vocabulary: the file of the tokenizer.
    """

    source: Weights
    model: Mapping[str, Any]
    preprocess: Preprocess
    vocabulary: pathlib.Path


def is_folder(folder: pathlib.Path) -> bool:
    """Whether a folder looks like one for `open_folder`."""
    return (folder / 'config.json').is_file() or open_clip_configs.is_folder(folder)


def open_folder(folder: pathlib.Path) -> TwoTowerWeights:
    """Recognises a folder of transformers' CLIPModel or SiglipModel, or of open_clip.

    The folder has the tokenizer's files, too.

    Raises:
        UserError: it is of another model, damaged, or states what no model here computes.
    """
    if open_clip_configs.is_folder(folder):
        return _open_clip(folder)
    config = files.read_json(folder / 'config.json')
    kind, told = config.get('model_type'), config.get('text_config')
    if kind == 'siglip2':
        raise UserError(
            f'{folder} is a SigLIP 2 of the NaFlex kind, which takes images of any shape and is '
            'not computed here; those of a fixed size, such as siglip2-base-patch16-224, are'
        )
    if kind not in _KINDS or not isinstance(told, Mapping):
        known = ', '.join(_KINDS)
        raise UserError(
            f'{folder} has the model_type {str(kind)[:100]!r} and is no model of images and texts '
            f'here; known: {known}, with a text_config'
        )
    table, heads = _KINDS[kind]
    image = formats.open_weights(folder)
    found = _tensors(folder)
    text, _ = key_tables.to_params(
        {name: array for name, array in found.items() if _TEXT.fullmatch(name)},
        table,
        _whole(told.get('num_attention_heads', heads), 'num_attention_heads', folder),
        folder,
    )
    if 'logit_scale' not in found or 'Embed_0/embedding' not in text:
        raise UserError(f'{folder} lacks logit_scale or the text tower: it is an image tower alone')
    if kind == 'clip':
        text['head/bias'] = derive(lambda kernel: 0 * kernel[0], text['head/kernel'])
    params: dict[str, Any] = {'img': image.params, 'txt': npz.nest(text, folder)}
    params['t'] = derive(lambda t: t.reshape(1), found['logit_scale'])
    if kind == 'siglip':
        params['b'] = derive(lambda b: b.reshape(1), found['logit_bias'])
    arguments = _text_arguments(text, folder) | {
        'act': hugging_face_activation(folder, told, 'hidden_act', FAMILIES[kind].hidden_act),
        'layer_norm_eps': float(told.get('layer_norm_eps', FAMILIES[kind].layer_norm_eps)),
    }
    if kind == 'clip':
        arguments |= {'causal': True, 'end_token': _end_token(told, arguments, folder)}
    pp, vocabulary = _tokenizer(folder, kind)
    return _whole_model(image, params, arguments, pp, vocabulary)


def _tensors(folder: pathlib.Path) -> dict[str, Any]:
    """All weights of a folder, by their names in it."""
    found: dict[str, Any] = {}
    for file in tensors.find_in_folder(folder):
        found |= tensors.open_tensors(file)[0]
    return {n: a for n, a in found.items() if not state_dicts.BUFFERS.fullmatch(n)}


def _open_clip(folder: pathlib.Path) -> TwoTowerWeights:
    """`open_folder`, of open_clip: a CLIP or a CustomTextCLIP."""
    told, found = open_clip_configs.read_text(folder), _tensors(folder)
    named = {m[1]: found[name] for name in found if (m := _OPEN_CLIP_TEXT.fullmatch(name))}
    needed = {'token_embedding.weight', 'positional_embedding'}
    if 'logit_scale' not in found or not needed <= named.keys():
        raise UserError(f'{folder} lacks logit_scale or the text tower: it is an image tower alone')
    image = formats.open_weights(folder)
    text, _ = key_tables.to_params(named, 'OpenCLIP text', told['num_heads'], folder)
    if 'head/kernel' in text and 'head/bias' not in text:
        text['head/bias'] = derive(lambda kernel: 0 * kernel[0], text['head/kernel'])
    params: dict[str, Any] = {'img': image.params, 'txt': npz.nest(text, folder)}
    params['t'] = derive(lambda t: t.reshape(1), found['logit_scale'])
    if 'logit_bias' in found:
        params['b'] = derive(lambda b: b.reshape(1), found['logit_bias'])
    arguments = _text_arguments(text, folder) | told['arguments']
    pp, vocabulary = _tokenizer(folder, '')
    pp |= told['pp']
    if told['of_clip']:
        pp['pad_token'] = text_lib.token_of_id(vocabulary, 0)
    if told['pool_type'] != 'last':
        length = text['pos_embedding'].shape[1]
        tokenizer = text_lib.make_tokenizer({**pp, 'max_len': length}, vocabulary)
        end = tokenizer.size - 1 if told['pool_type'] == 'argmax' else told['eos_id']
        if end not in tokenizer(['']):
            raise UserError(
                f'{folder / open_clip_configs.CONFIG} has pool_type={told["pool_type"]!r}, which '
                f'reads the token {end}, and the tokenizer.json beside it does not end texts with '
                'that'
            )
        arguments['end_token'] = end
    return _whole_model(image, params, arguments, pp, vocabulary)


def open_npz(path: pathlib.Path, vocabulary: pathlib.Path) -> TwoTowerWeights:
    """Recognises a SigLIP of big_vision.

    Args:
        path: its `.npz`.
        vocabulary: its SentencePiece model, or the tokenizer.json of Gemma for SigLIP 2.

    Raises:
        UserError: it is of another model, or damaged.
    """
    image = formats.open_weights(path)
    flat = npz.flatten(npz.open_file(path, whole=True).params)
    prefix = 'params/' if any(name.startswith('params/') for name in flat) else ''
    found = {n.removeprefix(prefix): a for n, a in flat.items() if n.startswith(prefix)}
    text = {n.removeprefix('txt/'): a for n, a in found.items() if n.startswith('txt/')}
    if not {'t', 'b'} <= found.keys() or 'Embed_0/embedding' not in text:
        raise UserError(
            f'{path} is no SigLIP: expected arrays t, b and txt/Embed_0/embedding beside the image '
            'tower'
        )
    tower, _ = big_vision.unstacked(npz.nest(text, path), 'Encoder_0', path)
    params = {'img': image.params, 'txt': tower, 't': found['t'], 'b': found['b']}
    pp: dict[str, Any] = {'tokenizer_name': 'sentencepiece', 'canonical': True}
    if vocabulary.suffix == '.json':  # Gemma's, which by itself marks the beginning, not the end
        pp = {'tokenizer_name': 'json', 'pad_token': '<pad>', 'end_token': '<eos>', 'lower': True}
    return _whole_model(image, params, _text_arguments(npz.flatten(tower), path), pp, vocabulary)


def _whole_model(
    image: Weights,
    params: Mapping[str, Any],
    text: Mapping[str, Any],
    pp: Mapping[str, Any],
    vocabulary: pathlib.Path,
) -> TwoTowerWeights:
    """Puts the towers together."""
    tower = infer.architecture(image.params, image.path, settings=image.settings)
    size = infer.image_size(image.params, tower, image.path, image.image_size)
    preprocess = image.preprocess or Preprocess(size, inception_crop=False)
    if image.refused:
        raise UserError(f'{image.path}: {image.refused} is not computed here')
    heads = [params[name].get('head', {}).get('kernel') for name in ('img', 'txt')]
    model = {
        'image': tower,
        'text_model': 'text_transformer',
        'text': dict(text),
        'out_dim': tuple(None if head is None else head.shape[-1] for head in heads),
        'pp': {'size': size, 'max_len': params['txt']['pos_embedding'].shape[1], **pp},
        'bias_init': _SIGLIP_BIAS if 'b' in params else None,
    }
    notes = tuple(note for note in image.notes if 'text tower' not in note)
    return TwoTowerWeights(
        dataclasses.replace(image, params=params, notes=notes), model, preprocess, vocabulary
    )


def _text_arguments(text: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """The sizes of a text tower, flat with Linen names."""
    block = 'Encoder_0/encoderblock_0'
    blocks = {name.split('/')[1] for name in text if name.startswith('Encoder_0/encoderblock_')}
    try:
        vocab_size, width = text['Embed_0/embedding'].shape
        return {
            'width': width,
            'num_layers': len(blocks),
            'mlp_dim': text[f'{block}/MlpBlock_0/Dense_0/kernel'].shape[1],
            'num_heads': text[f'{block}/MultiHeadDotProductAttention_0/query/kernel'].shape[1],
            'vocab_size': vocab_size,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f'{path}: its text tower lacks {error}, or it has another shape') from error


def _end_token(told: Mapping[str, Any], text: Mapping[str, Any], folder: pathlib.Path) -> int:
    """The token at which CLIP reads a text.

    Configurations before transformers 4.31 have a 2 there, which is wrong; the end token is then
    the last one of the vocabulary.
    """
    end = _whole(told.get('eos_token_id', 49_407), 'eos_token_id', folder)
    return text['vocab_size'] - 1 if end == 2 else end


def _whole(value: Any, name: str, folder: pathlib.Path) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise UserError(
            f'{folder / "config.json"} has {name} {str(value)[:100]!r} in its text_config, '
            'expected a whole number'
        )
    return value


def _tokenizer(folder: pathlib.Path, kind: str) -> tuple[dict[str, Any], pathlib.Path]:
    """What `LitModel.pp` says of the tokenizer of a folder, and its file."""
    config_file = folder / 'tokenizer_config.json'
    config = files.read_json(config_file) if config_file.is_file() else {}
    sentencepiece = folder / 'spiece.model'
    by_class = str(config.get('tokenizer_class', 'SiglipTokenizer')) == 'SiglipTokenizer'
    if kind == 'siglip' and by_class and sentencepiece.is_file():
        return {'tokenizer_name': 'sentencepiece', 'canonical': True}, sentencepiece
    file = folder / 'tokenizer.json'
    if not file.is_file():
        raise UserError(
            f'{folder} has no tokenizer.json: save_pretrained of its tokenizer or processor in '
            'transformers writes it'
        )
    if config.get('add_bos_token'):
        raise UserError(f'{config_file} has add_bos_token=true, which no text tower here is for')
    pp: dict[str, Any] = {
        'tokenizer_name': 'json',
        'pad_token': _token(config, 'pad_token', _PADDING.get(kind, '<pad>')),
        'pad_left': config.get('padding_side') == 'left',
        'lower': kind == 'siglip',  # as SigLIP 2 was trained; CLIP's file says it itself
    }
    if config.get('add_eos_token'):  # whatever tokenizer.json says, as transformers 4 has it
        pp['end_token'] = _token(config, 'eos_token', '</s>')
    return pp, file


def _token(config: Mapping[str, Any], name: str, default: str) -> str:
    """A token that a tokenizer_config.json names, as a text or as an object."""
    token = config.get(name) or default
    return str(token.get('content') if isinstance(token, Mapping) else token)
