"""The page of a model folder, README.md: what the model is, made from what model.json says."""

from collections.abc import Mapping
from typing import Any

from vit_jax.data.preprocess import Preprocess
from vit_jax.errors import printable
from vit_jax.inference.task import ONE_CLASS

_SHOWN_CLASSES = 20


def render(folder: str, described: Mapping[str, Any], parameters: int) -> str:
    """The text, in Markdown.

    Args:
      folder: name of the model folder.
      described: what model.json has, see `model_folder.save`.
      parameters: how many there are.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('vit_jax', 'inference'),
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source, names = dict(described['source']), [_text(n) for n in described['class_names']]
    metrics = source.pop('metrics', {})
    more = ', ...' if len(names) > _SHOWN_CLASSES else ''
    name = described['architecture']['variant'] or 'A model of no known variant'
    task = described.get('task', {})
    return environment.get_template('model_card.md.j2').render(
        name=_text(name),
        architecture=_text(name),
        folder=_text(folder),
        kind=task.get('kind', ONE_CLASS.kind),
        classes=names,
        shown=', '.join(names[:_SHOWN_CLASSES]) + more,
        parameters=parameters,
        pixels=Preprocess.from_dict(described['preprocessing']).describe(),
        source={key: v if isinstance(v, int) else _text(v) for key, v in source.items()},
        metrics={key: value for key, value in metrics.items() if isinstance(value, float)},
        version=described['versions']['vit_jax'],
    )


def _text(value: Any) -> str:
    """A text from elsewhere, which cannot become Markdown or HTML of its own."""
    text = printable(value)[:500]
    return ''.join(f'\\{char}' if char in '\\`*_[]<>|#' else char for char in text)
