"""The exceptions a person is meant to read."""


class UserError(ValueError):
    """Wrong input, found before any work started.

    The message names the key or path, its value and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


class Diverged(RuntimeError):
    """Too many optimizer steps in a row were skipped. Another start from the last checkpoint would skip them again."""
