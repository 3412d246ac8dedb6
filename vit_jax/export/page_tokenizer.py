"""Tokenizers for the page: what `page/tokenizer.js` needs to give the ids of `data.text`.

Word pieces, byte pairs and SentencePiece's unigrams are computed by Hugging Face's tokenizers.js,
whose own normalisation differs from that of the training: it is done in front of them.
"""

import base64
import json
import sys
from typing import Any

from vit_jax import files
from vit_jax.data import text, word_pieces
from vit_jax.errors import UserError, extra

_MODELS = ('BPE', 'WordPiece', 'Unigram')  # of tokenizers.js
_ADDED = '\ud800'  # begins names of tokens that no text can hold


def describe(tokenizer: text.Tokenizer) -> dict[str, Any]:
    """The content of the page's tokenizer.json.

    Returns:
        'tokenizer', of tokenizers.js, and 'settings': `kind`, `max_len`, ids `front`, `back` and
        `pad`, whether `pad_left`, and what a kind needs besides.

    Raises:
        UserError: a kind of tokenizer that the page does not have.
    """
    if isinstance(tokenizer, text.BertTokenizer):
        made, settings = _bert(tokenizer)
    elif isinstance(tokenizer, text.SentencepieceTokenizer):
        made, settings = _sentencepiece(tokenizer)
    else:
        made, settings = _json(tokenizer)
    settings = {'max_len': tokenizer.max_len, 'pad_left': False, **settings}
    return {'tokenizer': made, 'settings': settings}


def _made(model: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of a model alone."""
    parts = ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')
    return {'version': '1.0', 'added_tokens': [], **dict.fromkeys(parts), 'model': model}


def _bert(tokenizer: text.BertTokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    ids = {'[UNK]': tokenizer.unknown_token, **tokenizer.ids}
    model = {
        'type': 'WordPiece',
        'vocab': ids,
        'unk_token': '[UNK]',
        'continuing_subword_prefix': '##',
        'max_input_chars_per_word': word_pieces.MAX_WORD_BYTES,
    }
    characters = map(chr, range(sys.maxunicode + 1))
    folded = {c: c.casefold() for c in characters if c.casefold() != c.lower()}
    return _made(model), {
        'kind': 'bert',
        'front': [tokenizer.cls_token],
        'back': [],
        'pad': 0,
        'unknown': tokenizer.unknown_token,
        'casefold': folded,
    }


def _json(tokenizer: text.JsonTokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = tokenizer.uncut()
    content = json.loads(whole.to_str())
    kind = content['model']['type']
    if kind not in _MODELS:
        raise UserError(
            f'{tokenizer.vocab_path} is a tokenizer of kind {kind}, and the page has '
            f'{", ".join(_MODELS)}'
        )
    encoding = whole.encode('a')
    special = encoding.special_tokens_mask
    front = special.index(0) if 0 in special else 0
    back = special[::-1].index(0) if 0 in special else 0
    return content, {
        'kind': 'json',
        'front': encoding.ids[:front],
        'back': encoding.ids[len(special) - back :],
        'pad': whole.token_to_id(tokenizer.pad_token),
        'pad_left': tokenizer.pad_left,
        'lower': tokenizer.lower,
        'canonical': tokenizer.canonical,
        'blank': whole.token_to_id(tokenizer.blank_token) if tokenizer.blank_token else None,
        'lowercases': '"Lowercase"' in json.dumps(content.get('normalizer')),
    }


def _sentencepiece(
    tokenizer: text.SentencepieceTokenizer,
) -> tuple[dict[str, Any], dict[str, Any]]:
    with extra('text'):
        from sentencepiece import sentencepiece_model_pb2
    # Its classes are made when it is imported.
    model: Any = vars(sentencepiece_model_pb2)['ModelProto']()
    model.ParseFromString(files.expand(tokenizer.vocab_path).read_bytes())
    kinds = model.SentencePiece.Type
    found = {piece.type for piece in model.pieces}
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM or found & {
        kinds.USER_DEFINED,
        kinds.BYTE,
    }:
        raise UserError(
            f'{tokenizer.vocab_path} is a SentencePiece model with byte pairs, bytes or pieces of '
            'its own, and the page has that of unigrams alone'
        )
    vocabulary = [
        # Pieces that no text gives get names that none can hold.
        [piece.piece if piece.type == kinds.NORMAL else f'{_ADDED}{index}', piece.score]
        for index, piece in enumerate(model.pieces)
    ]
    unigram = {'type': 'Unigram', 'unk_id': tokenizer.unknown_token, 'vocab': vocabulary}
    return _made(unigram), {
        'kind': 'sentencepiece',
        'front': [],
        'back': [tokenizer.eos_token],
        'pad': tokenizer.eos_token,
        'canonical': tokenizer.canonical,
        'charsmap': base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode(),
        'collapse': model.normalizer_spec.remove_extra_whitespaces,
        'prefix': model.normalizer_spec.add_dummy_prefix,
    }
