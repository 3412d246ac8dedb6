"""The exceptions that are shown to the user as a plain line instead of a traceback."""

import contextlib
from collections.abc import Iterator

# Joiners in words and emoji, and the spaces that languages write with, for which str.isprintable()
# is false, too.
_KEPT = '\u200c\u200d\xa0\u202f\u3000'


def printable(text: object) -> str:
    r"""A text from elsewhere (a name, a server's answer) that is safe to show, on one line.

    Control characters, line breaks, escape sequences, marks that change the direction of what
    follows, and bytes that are not text are shown as Python writes them: `\x1b`, `\n`,
    `\u202e`. The only place that does it: for terminals, files, pictures and errors.

    Args:
      text: anything; what is no text is shown as `str` does.
    """
    text = str(text)
    if text.isprintable():
        return text
    return ''.join(
        char if char.isprintable() or char in _KEPT else char.encode('unicode_escape').decode()
        for char in text
    )


def printable_lines(text: object) -> str:
    """Like `printable`, but line breaks stay before lines that are indented, as ours are.

    So a name that holds a line break cannot begin a line of its own.
    """
    return '\n  '.join(printable(line) for line in str(text).split('\n  '))


class UserError(Exception):
    """Something the user gave (a flag, a file, a folder, a data set) is wrong.

    The message says what was wrong, what was expected and what to do. The command lines print it as
    one line and exit with a non-zero code; any other exception is a bug of this package and keeps
    its traceback. Further lines begin with two spaces; whatever else in it is not for a terminal is
    escaped, as it holds names and texts from elsewhere.
    """

    def __str__(self) -> str:
        return printable_lines(super().__str__())


class MissingPackageError(UserError, ModuleNotFoundError):
    """A package is not installed that only some uses of this one need."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Stands around the imports of packages that only an extra of this one installs.

    Args:
      name: of the extra, in pyproject.toml.

    Raises:
      MissingPackageError: one of them is not there; the message says how to install them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the package {error.name} is not installed: pip install 'vit_jax[{name}]' "
            f"(in a checkout: pip install -e '.[{name}]')",
            name=error.name,
        ) from error
