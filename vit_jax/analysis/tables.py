"""Tables for people (terminal), documents (Markdown) and programs (CSV)."""

import csv
import dataclasses
import io
from collections.abc import Sequence

from vit_jax.errors import printable

FORMATS = ('terminal', 'markdown', 'csv')


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
      title: above it; not in CSV.
      columns: heads; those that end in '>' are aligned to the right.
      rows: as many cells as columns.
      notes: lines below it; not in CSV.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def render(table: Table, style: str) -> str:
    """The table as text that ends in a line break.

    Args:
      table: the table.
      style: one of `FORMATS`.
    """
    heads = [printable(head.removesuffix('>')) for head in table.columns]
    rows = [[printable(cell) for cell in row] for row in table.rows]
    if style == 'csv':
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows([heads, *rows])
        return text.getvalue()

    from rich import box, console
    from rich.table import Table as RichTable

    rich_table = RichTable(box=box.MARKDOWN if style == 'markdown' else box.SIMPLE_HEAD)
    for head, column in zip(heads, table.columns, strict=True):
        rich_table.add_column(
            head, justify='right' if column.endswith('>') else 'left', no_wrap=True
        )
    for row in rows:
        rich_table.add_row(*row)
    text = io.StringIO()
    out = console.Console(
        width=10_000,
        file=text,
        markup=False,
        highlight=False,
        force_jupyter=False,  # in a notebook, rich would show it and leave the file empty
        color_system=None,  # whatever FORCE_COLOR says: this is for files, too
    )
    out.print(rich_table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    body = '\n'.join(line for line in lines if line)
    title = printable(table.title)
    title = f'**{title}**\n\n' if style == 'markdown' else f'{title}\n'
    notes = ''.join(f'{printable(note)}\n' for note in table.notes)
    gap = '\n' if style == 'markdown' and notes else ''
    return f'{title}{body}\n{gap}{notes}'
