"""The test cluster as tests see it: submit jobs, wait for them, read what became of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DAEMONS = Path(__file__).with_name("slurm_daemons.py")
COMMAND_S = 60.0
"""Seconds a Slurm command or a submitting script may take."""
STOP_S = 60.0
"""Seconds until everything must have ended."""
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})
"""States in which a job stays."""


@dataclass(frozen=True)
class Job:
    """What Slurm says about a job."""

    id: int
    name: str
    state: str
    """PENDING, RUNNING, COMPLETING, or one of ENDED."""
    reason: str
    """Why it waits or ended so."""
    exit_code: int
    """Of the batch script, once it ended."""
    restarts: int
    """Times it was requeued."""
    output: Path | None
    """Where its log is."""


class SlurmCluster:
    """A Slurm of virtual nodes n1, n2, ... on this machine; a context manager, which takes everything down again.

    Each node has 16 CPUs and two counted GPUs. A requeued job starts again after 7 s (``release``: at once). SIGKILL
    comes 10 s after SIGTERM. Time limits are whole minutes, and Slurm looks at them every 30 s: with ``--time=1`` and
    ``--signal=B:USR1@N``, N up to 60, the signal comes 0 to 30 s after the start and the end 60 to 90 s after it.
    """

    def __init__(self, nodes: int = 2):
        self.nodes = nodes
        self.folder = Path()
        self.daemons: subprocess.Popen[str] | None = None

    def __enter__(self) -> SlurmCluster:
        # sockets have paths of at most 107 characters; the daemons delete it
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        command = [sys.executable, str(DAEMONS), str(self.folder), str(self.nodes)]
        # a session of its own: Ctrl-C is for pytest, which then ends the cluster
        self.daemons = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
        )
        if (answer := self.daemons.stdout.readline()) != "ready\n":
            raise RuntimeError(answer + self.daemons.stdout.read())
        return self

    def __exit__(self, *exception: object) -> None:
        self.daemons.stdin.close()
        self.daemons.wait(STOP_S)

    @property
    def hidden(self) -> Path:
        """A folder that n2 has too, but another one."""
        return self.folder / "hidden"

    def run(
        self, *command: object, env: Mapping[str, str] | None = None, timeout: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the project's folder, as a user of the cluster does; nothing is checked.

        ``env`` is added to the environment.
        """
        variables = {**environment(), "SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})}
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout)

    def slurm(self, *command: object) -> str:
        """Run a Slurm command that must succeed; returns what it prints."""
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
        return done.stdout

    def submit(
        self,
        script: Path,
        *arguments: object,
        flags: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> int:
        """``sbatch FLAGS SCRIPT ARGUMENTS``, which must be accepted; returns the job's id."""
        done = self.run("sbatch", "--parsable", *flags, script, *arguments, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, job_id: int) -> Job:
        """What Slurm says about a job now."""
        line = self.slurm("scontrol", "--oneliner", "show", "job", job_id)
        said = dict(re.findall(r"(\w+)=(\S*)", line))
        return Job(
            id=job_id,
            name=said["JobName"],
            state=said["JobState"],
            reason=said["Reason"],
            exit_code=int(said["ExitCode"].split(":")[0]),
            restarts=int(said["Restarts"]),
            output=Path(said["StdOut"]) if "StdOut" in said else None,
        )

    def jobs(self) -> list[Job]:
        """Every job that was ever submitted, in order."""
        listing = self.slurm("scontrol", "--oneliner", "show", "job")
        return [self.job(int(number)) for number in sorted(re.findall(r"^JobId=(\d+)", listing, re.M), key=int)]

    def log(self, job_id: int) -> str:
        """A job's log so far."""
        output = self.job(job_id).output
        return output.read_text(errors="replace") if output is not None and output.exists() else ""

    def wait(self, job_id: int, *states: str, timeout: float) -> Job:
        """Wait until a job is in one of the states (default: until it ended). AssertionError with its log otherwise."""
        wanted = set(states) or ENDED
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id)).state not in wanted:
            given_up = job.state in ENDED or time.monotonic() > deadline
            assert not given_up, f"waiting for {sorted(wanted)}: {job}\n{self.log(job_id)[-5000:]}"
            time.sleep(0.2)
        return job

    def wait_until(self, condition: Callable[[], object], job_id: int, timeout: float) -> None:
        """Poll until the condition holds. AssertionError with the job's log when the job ends first, or after that."""
        deadline = time.monotonic() + timeout
        while not condition():
            job = self.job(job_id)
            given_up = (job.state in ENDED and not condition()) or time.monotonic() > deadline
            assert not given_up, f"while waiting: {job}\n{self.log(job_id)[-5000:]}"
            time.sleep(0.05)

    def release(self, job_id: int, timeout: float) -> None:
        """Wait until a requeued job is back in the queue and let it start.

        Not within the second it was stopped in: slurmd would take it for the job it has just ended, and fail it.
        """
        self.wait(job_id, "PENDING", timeout=timeout)
        time.sleep(1.1)
        self.slurm("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free again."""
        self.slurm("scancel", "--user=root")
        deadline = time.monotonic() + STOP_S
        while self.slurm("squeue", "--noheader").strip():
            assert time.monotonic() < deadline, self.slurm("squeue")
            time.sleep(0.2)


def environment() -> dict[str, str]:
    """This process's environment without traces of another Slurm, threads and compilation kept down."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    sbin = "/usr/sbin:/sbin"
    return {**kept, "PATH": f"{kept['PATH']}:{sbin}", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
