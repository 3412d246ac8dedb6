"""The page of a model folder, README.md: what the model is, made from what model.json says.

The templates are model_card.md.j2 and two_tower_card.md.j2; docs/model_cards tells what they hold.
"""

from collections.abc import Mapping
from typing import Any

import vit_jax
from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import printable
from vit_jax.inference import markdown
from vit_jax.inference.task import ONE_CLASS

_SHOWN = 20  # classes
_TOKENIZERS = {
    'bert': "BERT's word pieces (`vocab.txt`)",
    'sentencepiece': 'SentencePiece (`vocab.model`)',
    'json': 'byte pairs (`tokenizer.json`)',
}


def render(folder: str, described: Mapping[str, Any], parameters: int) -> str:
    """The text, in Markdown.

    Args:
      folder: name of the model folder.
      described: what model.json has, see `model_folder.save`.
      parameters: how many there are.
    """
    names = [_text(name) for name in described['class_names']]
    more = ', ...' if len(names) > _SHOWN else ''
    source = described['source']
    prompts = [_text(prompt) for prompt in source.get('prompts', ())]
    unknown = 'A zero-shot classifier' if prompts else 'A model of no known variant'
    name = described['architecture']['variant'] or unknown
    return _fill(
        'model_card.md.j2',
        name=_text(name),
        folder=_text(folder),
        kind=described.get('task', {}).get('kind', ONE_CLASS.kind),
        classes=names,
        shown=', '.join(names[:_SHOWN]) + more,
        prompts=prompts,
        shown_prompts=', '.join(f'"{prompt}"' for prompt in prompts[:3]),
        parameters=parameters,
        pixels=Preprocess.from_dict(described['preprocessing']).describe(),
        version=described['versions']['vit_jax'],
        **_origin(source),
    )


def render_two_towers(
    folder: str, described: Mapping[str, Any], source: Mapping[str, Any], parameters: int
) -> str:
    """The text for an image-text model.

    Args:
      folder: name of its folder.
      described: what model.json has, see `two_tower.save`.
      source: where the model came from.
      parameters: how many there are.
    """
    pp, text_size = described['pp'], described['out_dim'][1]
    return _fill(
        'two_tower_card.md.j2',
        name=_text(described['model_name'] or 'A model of images and texts'),
        folder=_text(folder),
        sigmoid=described['bias_init'] is not None,
        text_model=described['text_model'],
        size=text_size or described['image'].get('hidden_size'),
        tokenizer=_TOKENIZERS[pp['tokenizer_name']],
        length=pp['max_len'],
        parameters=parameters,
        pixels=Preprocess.from_dict(described['preprocessing']).describe(),
        version=vit_jax.__version__,
        **_origin(source),
    )


def _origin(source: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model came from, and what was measured, for both templates."""
    metrics = source.get('metrics') or {}
    return {
        'source': {
            key: value if isinstance(value, int) else _text(value)
            for key, value in source.items()
            if key != 'metrics'
        },
        'metrics': {key: value for key, value in metrics.items() if isinstance(value, float)},
    }


def _fill(template: str, **words: Any) -> str:
    return markdown.render('inference', template, words, whole=False)


def _text(value: Any) -> str:
    """A text from elsewhere, which cannot become Markdown or HTML of its own."""
    text = printable(value)[:500]
    return ''.join(f'\\{char}' if char in '\\`*_[]<>|#' else char for char in text)
