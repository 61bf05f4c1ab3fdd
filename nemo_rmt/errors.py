"""The one exception a person is meant to read."""


class UserError(ValueError):
    """Wrong input, found before any work started.

    The message names the key or path, its value and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """
