"""What clusters do to a stage that a job trains, done on purpose; and what Slurm or a user then does about it.

Each disturbance strikes while both ranks stand still (``Training.freeze``), so that it hits the step it is meant for,
however fast the machine is; checks that it ended as promised, with the promised message; and returns when the stage
may be expected to start again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from slurm_cluster import ENDED, SlurmCluster
from slurm_runs import TIMINGS, TP2, TRAINING, Run, assert_same_steps

from nemo_rmt.manifest import latest_step, step_folders
from nemo_rmt.run_folder import RunFolder, StageRecord
from nemo_rmt.tracking import SAMPLES, read_metrics

START_S = 90.0
"""Seconds from the submission of a job, or the end of what ran before, to a step of its stage."""
STOP_S = 40.0
"""Seconds in which a disturbed stage must have stopped, a hang's limit not counted; Slurm itself waits for 10."""
DISK_BYTES = 2**28
ROOM_BYTES = 2**20
"""What a full disk has left: enough for messages, less than a checkpoint."""
WORDS = [TP2, "flywheel.keep_checkpoints=2", "flywheel.restarts=30"]
WORDS += [f"{stage}.checkpoint_interval=1" for stage in TRAINING]
"""Of the disturbed runs, beyond the recipe: none decides results."""


@dataclass
class Training:
    """A stage of two ranks, one on each node, that a job trains or is about to train."""

    cluster: SlurmCluster
    run: Run
    stage: str
    submit: Callable[[], int]
    """Submits the job; returns its id."""
    disk: Path
    """The small file system that the run is on."""
    hang_timeout_s: float
    """The run's."""
    iteration: int = 0
    job: int = 0
    since: float = field(default_factory=time.time)
    """Unix seconds: what was logged earlier is of a start that is over."""
    ranks: dict[int, int] = field(default_factory=dict)
    """Processes of the ranks that stand still."""

    @property
    def folder(self) -> Path:
        """The stage's."""
        return RunFolder(self.run.path).stage_dir(self.iteration, self.stage)

    @property
    def title(self) -> str:
        """As messages have it."""
        return f"iteration {self.iteration} {self.stage}"

    @property
    def record(self) -> StageRecord:
        """The stage's, in state.json."""
        return RunFolder(self.run.path).load_state().record(self.iteration, self.stage)

    def start(self) -> None:
        """Submit the job."""
        self.job = self.submit()
        self.since = time.time()

    def find_ranks(self) -> dict[int, int]:
        """The processes of the present start's ranks that have given a sign of life."""
        beats = self.folder / "log" / "beats"
        pids = self.run.rank_pids(self.iteration, self.stage)
        try:
            return {
                rank: pid for rank, pid in pids.items() if (beats / f"rank_{rank}.json").stat().st_mtime > self.since
            }
        except FileNotFoundError:
            return {}  # they are taken away before each start

    def step(self) -> int:
        """The last step that the present start has logged; 0 before the first."""
        logged = read_metrics(self.folder / "metrics.jsonl")
        return logged[-1]["step"] if logged and logged[-1]["time"] > self.since else 0

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = START_S) -> None:
        """Poll closely until the condition holds. AssertionError with the job's log when it ends first, or later."""
        begun = looked = time.monotonic()
        while not condition():
            time.sleep(0.005)
            if (now := time.monotonic()) - looked > 1:
                looked, job = now, self.cluster.job(self.job)
                over = (job.state in ENDED and not condition()) or now - begun > timeout
                assert not over, f"{now - begun:.0f} s for {what}: {job}\n{self.cluster.log(self.job)[-6000:]}"

    def freeze(self, step: int, delay_s: float = 0.0) -> None:
        """Let the present start log a step, this one or a later one, and stop both ranks a moment after that.

        step: 0: as soon as the ranks are there.
        """

        def there() -> bool:
            self.ranks = self.find_ranks()
            return len(self.ranks) == 2 and self.step() >= step

        self.wait_for(there, f"step {step} of {self.title}")
        time.sleep(delay_s)
        for pid in self.ranks.values():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, *ranks: int) -> None:
        """Let ranks go on; those that have ended do not mind."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self.ranks[rank], signal.SIGCONT)

    @contextmanager
    def saying(self, message: str, timeout: float = STOP_S) -> Iterator[None]:
        """A block after which the job's log must have something new that matches."""
        known = len(self.cluster.log(self.job))
        yield
        self.wait_for(lambda: re.search(message, self.cluster.log(self.job)[known:]), repr(message), timeout)

    def wait_until_requeued(self) -> None:
        """Wait until the job is back in the queue; then let it start at once."""
        self.cluster.release(self.job, timeout=STOP_S)
        self.since = time.time()

    def submit_again(self, state: str) -> None:
        """Wait until the job has ended so, and do what its user does."""
        self.cluster.wait(self.job, state, timeout=STOP_S)
        self.start()

    def wait_until_restarted(self, attempts: int, timeout: float = STOP_S) -> None:
        """Wait until the stage is started again in its job."""
        self.wait_for(lambda: self.record.attempts > attempts, f"{self.title} to be started again", timeout)
        self.since = time.time()


def ask_to_stop(training: Training) -> None:
    """SIGUSR1 to the batch script, as Slurm sends it before the time limit: the job requeues itself."""
    with training.saying(f"{training.title} stopped at a checkpoint; requeued, to go on from there"):
        training.cluster.slurm("scancel", "--signal=USR1", "--batch", training.job)
        wait_until_asked(training)
        training.thaw(0, 1)
    training.wait_until_requeued()


def wait_until_asked(training: Training, timeout: float = STOP_S) -> None:
    """Wait until the request to stop has come to the first rank, which stands still and does not take it yet."""
    status = Path(f"/proc/{training.ranks[0]}/status")

    def pending() -> bool:
        masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", status.read_text(), re.M)
        return any(int(mask, 16) >> (signal.SIGUSR1 - 1) & 1 for mask in masks)

    training.wait_for(pending, "SIGUSR1", timeout)


def requeue(training: Training) -> None:
    """``scontrol requeue``, as pre-emption does it: SIGTERM to all, time to save, and the job is in the queue again."""
    training.cluster.slurm("scontrol", "requeue", training.job)
    training.thaw(0, 1)
    training.wait_until_requeued()


def cancel(training: Training) -> None:
    """``scancel``: SIGTERM to all, time to save; the user submits again."""
    training.cluster.slurm("scancel", training.job)
    training.thaw(0, 1)
    training.submit_again("CANCELLED")


def kill(training: Training, rank: int) -> None:
    """SIGKILL of one rank."""
    _kill(training, rank, thaw=True)


def _kill(training: Training, rank: int, *, thaw: bool) -> None:
    """thaw: the other rank goes on, until it misses this one."""
    attempts = training.record.attempts
    with training.saying(
        rf"nemo-rmt: {training.title}: rank {rank} \(node n{rank + 1}\) was killed by SIGKILL.*; start"
    ):
        os.kill(training.ranks[rank], signal.SIGKILL)
        if thaw:
            training.thaw(1 - rank)
    training.wait_until_restarted(attempts)


def hang(training: Training, rank: int) -> None:
    """One rank stands still for good (SIGSTOP), which is noticed by ``cluster.hang_timeout_s``."""
    attempts, what = training.record.attempts, rf"rank {rank} \(node n{rank + 1}\) has not responded for \d+ s, last at"
    with training.saying(f"nemo-rmt: {training.title}: {what} .*; starting it again", training.hang_timeout_s + STOP_S):
        training.thaw(1 - rank)
    training.wait_until_restarted(attempts)


def fill_disk(training: Training) -> None:
    """No room for the next checkpoint: the job fails, and the user makes room and submits again."""
    saved, known = latest_step(training.folder), len(training.cluster.log(training.job))
    failed = re.compile(
        rf"ended with exit code 1: {training.title} failed: rank \d \(node n\d\): .*No space left on device.*; make "
        rf"room and start it again: its last checkpoint is of step ({saved}|{saved + 1}); see .*/log/rank_\d.log"
    )
    filler = training.disk / "filler"
    with open(filler, "wb") as file:

        def fill() -> re.Match | None:
            """What an old checkpoint leaves, or a draft, goes too."""
            if (room := shutil.disk_usage(training.disk).free - ROOM_BYTES) > 0:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)
            return failed.search(training.cluster.log(training.job)[known:])

        fill()
        training.thaw(0, 1)
        training.wait_for(fill, repr(failed.pattern), STOP_S)
    assert latest_step(training.folder) >= saved and training.record.status == "failed"
    filler.unlink()
    training.submit_again("FAILED")


def truncate(training: Training, rank: int) -> None:
    """The newest checkpoint's largest file loses its second half before a rank is killed."""
    shard = _largest_shard(training)
    os.truncate(shard, shard.stat().st_size // 2)
    _kill(training, rank, thaw=False)
    _wait_until_passed_over(training, shard, "is truncated: {file} has {size} bytes instead of")


def flip(training: Training, rank: int) -> None:
    """A byte of the newest checkpoint's largest file changes before a rank is killed."""
    shard = _largest_shard(training)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    _kill(training, rank, thaw=False)
    _wait_until_passed_over(training, shard, "is damaged: {file} has SHA-256")


def _largest_shard(training: Training) -> Path:
    return max(step_folders(training.folder)[0].glob("*.distcp"), key=lambda path: path.stat().st_size)


def _wait_until_passed_over(training: Training, shard: Path, complaint: str) -> None:
    """Wait for the warning, with file and step."""
    complaint = complaint.format(file=shard.name, size=shard.stat().st_size)
    log = training.folder / "log" / "rank_0.log"
    warning = re.compile(rf"WARNING .*/{shard.parent.name} {re.escape(complaint)}.*; passing over it")
    training.wait_for(lambda: warning.search(log.read_text()), f"{warning.pattern} in {log}")


def assert_undisturbed(run: Run, quiet: Run, iteration: int, stage: str) -> None:
    """Fail unless a finished stage logged, saw and ended with what it did in a run that nothing disturbed."""
    assert run.status(iteration, stage) == "done"
    assert_same_steps(run.steps(iteration, stage), quiet.steps(iteration, stage))
    assert samples(run, iteration, stage) == samples(quiet, iteration, stage)
    assert result(run, iteration, stage) == pytest.approx(result(quiet, iteration, stage), rel=1e-5, abs=1e-5)


def samples(run: Run, iteration: int, stage: str) -> list[tuple[int, list[str]]]:
    """What each step of a stage was made of, in the order of the file."""
    lines = (RunFolder(run.path).stage_dir(iteration, stage) / SAMPLES).read_text().splitlines()
    return [(line["step"], line["samples"]) for line in map(json.loads, lines)]


def result(run: Run, iteration: int, stage: str) -> dict[str, float]:
    """A finished stage's last metrics and tokens, without timings."""
    found = RunFolder(run.path).result(iteration, stage)
    metrics = {name: value for name, value in found["metrics"].items() if name not in TIMINGS}
    return {**metrics, "tokens": found["tokens"]}


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own, small enough to fill."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "small", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
