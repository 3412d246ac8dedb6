"""The one exception class that is shown to the user as a plain line instead of a traceback."""


class UserError(Exception):
    """Something the user gave (a flag, a file, a folder, a data set) is wrong.

    The message says what was wrong, what was expected and what to do. The command lines print it as
    one line and exit with a non-zero code; any other exception is a bug of this package and keeps
    its traceback.
    """
