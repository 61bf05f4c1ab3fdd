"""The ranks of one stage on one node: started, signalled, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from nemo_rmt.config import Recipe
from nemo_rmt.process import die_with_parent, gpu_count


def worker_command(stage_yaml: Path) -> list[str]:
    """The command line of one rank."""
    return [sys.executable, "-m", "nemo_rmt.stages", str(stage_yaml)]


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


class Ranks:
    """One node's processes of a stage; leaving the block ends them all.

    Args:
        command: of each rank. env: of each, besides its place.
        ranks: those of this node. world_size: of all nodes.
        address, port: where rank 0 listens for the others.
        log: folder for what the ranks print; rank 0 prints to this process's own output.
        keep_open: file descriptors they inherit (the run's lock).

    Each leads a session of its own, so that Ctrl-C reaches this process alone, and ends when this process does, however
    that ends.
    """

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        ranks: range,
        *,
        world_size: int,
        address: str,
        port: int,
        log: Path,
        keep_open: tuple[int, ...] = (),
    ):
        self.processes: dict[int, subprocess.Popen] = {}
        self._killed: set[int] = set()
        parent = os.getpid()
        log.mkdir(parents=True, exist_ok=True)
        try:
            for local, rank in enumerate(ranks):
                place = {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": str(local),
                    "LOCAL_WORLD_SIZE": str(len(ranks)),
                    "MASTER_ADDR": address,
                    "MASTER_PORT": str(port),
                }
                output = (
                    None
                    if rank == 0
                    else os.open(log / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                )
                self.processes[rank] = subprocess.Popen(
                    command,
                    env=env | place,
                    stdout=output,
                    stderr=output,
                    pass_fds=keep_open,
                    start_new_session=True,
                    preexec_fn=lambda: die_with_parent(parent),
                )
                if output is not None:
                    os.close(output)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def ended(self) -> dict[int, int]:
        """Exit status by rank of those that ended by themselves (negative: the signal that killed it)."""
        statuses = {rank: process.poll() for rank, process in self.processes.items() if rank not in self._killed}
        return {rank: status for rank, status in statuses.items() if status is not None}

    def send(self, signum: int) -> None:
        """Send a signal to every rank that runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signum)

    def kill(self) -> None:
        """End what still runs, with what it started. SIGKILL: it also ends what is stopped or does not listen."""
        for rank, process in self.processes.items():
            if process.poll() is None:
                self._killed.add(rank)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # every process of the group has ended
        for process in self.processes.values():
            process.wait()
