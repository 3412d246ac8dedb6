"""Pages in Markdown that stand beside weights."""

from typing import Any


def render(folder: str, template: str, values: dict[str, Any], *, whole: bool) -> str:
    """The text of a page.

    Args:
      folder: of the package that has the template: 'inference'.
      template: its file.
      values: what it shows.
      whole: whether a value that is missing is an error; else it is empty, as what it would have.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('vit_jax', folder),
        undefined=jinja2.StrictUndefined if whole else jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
