"""Starting stage processes so that none outlives the flywheel, and what the machine offers them."""

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

from nemo_rmt.config import Recipe

PR_SET_PDEATHSIG = 1
STOP_GRACE_S = 20.0
"""Seconds a worker gets between SIGTERM and SIGKILL."""


WRONG_INPUT = 2
"""Exit status of a worker that refused its input."""
REFUSAL = Path("log") / "refused"
"""Where a worker that refuses its input leaves the reason, in the stage's folder: torchrun turns any status into 1."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived. Not an Exception, so that only the flywheel's own handler takes it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into Interrupted; later ones are ignored while stopping.

    A signal that was ignored before (nohup, a background job) stays ignored.
    """
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


def worker_command(stage_yaml: Path, recipe: Recipe) -> list[str]:
    """The command line of one stage on this machine: one process, or torchrun with one per GPU."""
    module = ["-m", "nemo_rmt.stages", str(stage_yaml)]
    processes = recipe.cluster.gpus_per_node
    if processes == 1:
        return [sys.executable, *module]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *torchrun, *module]


def worker_environment(recipe: Recipe) -> dict[str, str]:
    """This process's environment with the thread counts; without a GPU torch.compile is off (it would build C++)."""
    env = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if recipe.cluster.threads:
            env[key] = str(recipe.cluster.threads)
        else:
            env.setdefault(key, str(max(1, cores // recipe.cluster.gpus_per_node)))
    if gpu_count() == 0:
        env.setdefault("TORCH_COMPILE_DISABLE", "1")
    return env


def run_worker(command: list[str], env: dict[str, str], keep_open: tuple[int, ...] = ()) -> int:
    """Run a worker to its end and return its exit status (negative: the signal that killed it).

    The worker leads a session of its own, so that Ctrl-C reaches this process alone, which then stops
    the whole group: SIGTERM, and SIGKILL after STOP_GRACE_S. ``keep_open``: file descriptors the worker
    inherits (the run's lock). Raises Interrupted once the worker is gone.
    """
    parent = os.getpid()
    worker = subprocess.Popen(
        command, env=env, pass_fds=keep_open, start_new_session=True, preexec_fn=lambda: die_with_parent(parent)
    )
    try:
        return worker.wait()
    except BaseException:
        _stop(worker)
        raise


def run_stage(stage_yaml: Path, command: list[str], recipe: Recipe, lock: int) -> int:
    """``run_worker`` for one stage, which inherits the run's lock; WRONG_INPUT also when torchrun stands between."""
    refusal = stage_yaml.parent / REFUSAL
    refusal.unlink(missing_ok=True)
    status = run_worker(command, worker_environment(recipe), (lock,))
    return WRONG_INPUT if status and refusal.exists() else status


def _stop(worker: subprocess.Popen) -> None:
    """End a worker's process group."""
    _signal_group(worker.pid, signal.SIGTERM)
    try:
        worker.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        print(f"a worker did not stop within {STOP_GRACE_S:.0f} s of SIGTERM: killing it", file=sys.stderr)
    _signal_group(worker.pid, signal.SIGKILL)
    worker.wait()


def _signal_group(group: int, signum: int) -> None:
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return  # every process of the group has ended: nothing left to stop
