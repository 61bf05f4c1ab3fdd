"""Stopping when asked to, by SIGUSR1 or SIGTERM: at once, or at the next place that is good for it.

Slurm sends SIGTERM before it kills a job, and SIGUSR1 where ``sbatch --signal`` says so. Standard library only.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

REQUESTS = (signal.SIGUSR1, signal.SIGTERM)

_requested = False
_waiting = False


class Stopped(BaseException):
    """The request was followed. Not an Exception, so that no handler of failures takes it."""


def install() -> None:
    """Take the signals as requests to stop, in the main thread of a process."""
    for each in REQUESTS:
        signal.signal(each, _request)


def ignore() -> None:
    """Leave the signals to the process that this one works for: Slurm sends them to all processes of a job."""
    for each in REQUESTS:
        signal.signal(each, signal.SIG_IGN)


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested


@contextmanager
def catching() -> Iterator[None]:
    """``install`` for the length of a block, which knows no request but its own."""
    global _requested
    _requested = False
    previous = {each: signal.getsignal(each) for each in REQUESTS}
    install()
    try:
        yield
    finally:
        _requested = False
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextmanager
def waiting() -> Iterator[None]:
    """A block that asks ``requested`` itself. Outside of one a request raises Stopped at once."""
    global _waiting
    outer, _waiting = _waiting, True
    try:
        yield
    finally:
        _waiting = outer


def _request(signum: int, frame: object) -> None:
    global _requested
    _requested = True
    if not _waiting:
        raise Stopped(signal.Signals(signum).name)
