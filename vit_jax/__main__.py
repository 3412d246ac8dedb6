"""Vision Transformers in JAX/Flax: released weights in, a model fine-tuned on your images out.

vit_jax COMMAND ...              or: python -m vit_jax COMMAND ...
vit_jax COMMAND --help           what a command takes
vit_jax --version
"""

import difflib
import importlib
import sys

import vit_jax
from vit_jax import cli, commands


def main() -> int:
    """Runs the command that the first word names; returns the exit status."""
    return cli.run(_run)


def _run() -> int | None:
    first, *rest = sys.argv[1:] or ['--help']
    if first in ('-h', '--help'):
        print(_help())
        return 0
    if first == '--version':
        print(f'vit_jax {vit_jax.__version__}')
        return 0
    if first not in commands.NAMES:
        near = difflib.get_close_matches(first, commands.NAMES, n=1, cutoff=0.5)
        hint = near[0] if near else 'train' if first.startswith('-') else ''
        hint = f'did you mean `vit_jax {hint}`?' if hint else f'it has {", ".join(commands.NAMES)}'
        print(f'vit_jax: there is no command {first!r}; {hint}', file=sys.stderr)
        return 2
    sys.argv = [f'vit_jax {first}', *rest]
    return importlib.import_module(f'vit_jax.commands.{first}').main()


def _help() -> str:
    """What `vit_jax --help` prints: the commands, with the first line of each module."""
    lines = [__doc__ or '', 'Commands:']
    for name in commands.NAMES:
        doc = importlib.import_module(f'vit_jax.commands.{name}').__doc__ or ''
        lines.append(f'  {name:<{max(map(len, commands.NAMES))}}  {doc.splitlines()[0]}')
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main())
