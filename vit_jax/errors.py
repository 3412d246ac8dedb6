"""The exceptions that are shown to the user as a plain line instead of a traceback."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something the user gave (a flag, a file, a folder, a data set) is wrong.

    The message says what was wrong, what was expected and what to do. The command lines print it as
    one line and exit with a non-zero code; any other exception is a bug of this package and keeps
    its traceback.
    """


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
