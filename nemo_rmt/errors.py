"""The exceptions a person is meant to read."""


class UserError(ValueError):
    """Wrong input, found before any work started.

    The message names the key or path, its value and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


class Diverged(RuntimeError):
    """Training has left its rails: too many steps in a row were skipped, or the sampler's probabilities are not the
    trainer's. Another start from the last checkpoint would end the same way."""
