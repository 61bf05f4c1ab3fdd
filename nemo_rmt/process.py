"""Processes that must not outlive each other, signals that interrupt, and the GPUs a machine has."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """SIGINT or SIGHUP arrived. Not an Exception, so that only the flywheel's own handler takes it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn the first SIGINT or SIGHUP into Interrupted; later ones are ignored while stopping.

    A signal that was ignored before (nohup, a background job) stays ignored.
    """
    wanted = (signal.SIGINT, signal.SIGHUP)
    handled = [each for each in wanted if signal.getsignal(each) is not signal.SIG_IGN]

    def interrupt(signum: int, frame: object) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    previous = {each: signal.signal(each, interrupt) for each in handled}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to SIGKILL this process when its parent ends, however the parent ends. Nothing elsewhere.

    ``parent`` is the expected parent's pid, when the caller knows it. If the parent ended before the
    request took effect, nobody would send the signal: this process then ends itself. The request
    survives exec, not fork: each process makes its own.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid() if parent is None else parent
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def gpu_count() -> int:
    """NVIDIA GPUs visible to processes started from here, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [device.strip() for device in visible.split(",") if device.strip()]
        return 0 if not devices or devices[0] == "-1" else len(devices)
    nodes = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    if nodes or shutil.which("nvidia-smi") is None:
        return len(nodes)
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
