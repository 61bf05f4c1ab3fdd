"""One of the processes that work on an experiment: it takes stages that nobody works on until all are done.

Workers know nothing of each other. Each looks at the shared folder, takes a stage whose inputs are done by its lock,
and looks again; when one is killed, the kernel releases its locks, and another goes on from the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_rmt import stopping
from nemo_rmt.errors import UserError
from nemo_rmt.exit_codes import DONE, FAILED, STOPPED
from nemo_rmt.experiment.grid import Cell, Grid, Needed
from nemo_rmt.experiment.store import StageStore
from nemo_rmt.experiment.views import write_recipe, write_view
from nemo_rmt.manifest import latest_step
from nemo_rmt.process import die_with_parent
from nemo_rmt.run_folder import StageRecord
from nemo_rmt.status import ago

TICK_S = 0.1
"""Seconds between two looks at this worker's own processes."""
LOOK_S = 2.0
"""Seconds between two looks at what other workers have done, which is in a folder that may be far away."""
LEAVE_S = 30.0
"""Seconds a stage's processes get to leave when this one is interrupted."""

Command = Callable[[Path, int], list[str]]
"""The command line that runs a stage, from its stage.yaml and the file descriptor of its lock."""


def stage_command(stage_yaml: Path, lock: int) -> list[str]:
    """Run a stage as ``nemo-rmt stage STAGE.yaml`` does."""
    return [sys.executable, "-m", "nemo_rmt.lone_stage", str(stage_yaml), str(lock)]


@dataclass
class Running:
    """A stage that this worker has taken."""

    needed: Needed
    process: subprocess.Popen[bytes]
    lock: int
    log: Path
    record: StageRecord
    began: float


class Worker:
    """Works on a grid until nothing is left that can be done.

    Args:
        grid: what is needed. store: where it is kept. jobs: stages side by side. command: that runs one.
        finished: called with the arms and seeds all of whose stages are done, whenever there are more of them.
    """

    def __init__(
        self, grid: Grid, store: StageStore, jobs: int, command: Command, finished: Callable[[list[Cell]], None]
    ):
        self.grid, self.store, self.jobs, self.command, self.finished = grid, store, jobs, command, finished
        self.needed: dict[str, Needed] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        """What is known of stages that failed, by name."""
        self.running: dict[str, Running] = {}
        self.whole = 0
        """How many arms with a seed were done at the last look."""
        self.spent = 0.0
        """Seconds that the stages done since the beginning took, whoever did them."""
        self.looked = -LOOK_S
        self.began = time.monotonic()

    def run(self) -> int:
        """Work; returns DONE, FAILED when a stage failed, or STOPPED on request, with what was done saved."""
        self.store.begin()
        try:
            with stopping.waiting():
                while True:
                    self.reap()
                    if stopping.requested():
                        return self.stop()
                    if time.monotonic() - self.looked >= LOOK_S:
                        self.look()
                        self.take()
                        if not self.running and not self.left():
                            return self.end()
                    time.sleep(TICK_S)
        finally:
            self.interrupt()

    def look(self) -> None:
        """Find what is done by now, by anybody, and bring all that follows from it up to date."""
        first, self.looked = not self.needed, time.monotonic()
        while True:
            self.needed = self.grid.needed()
            new = {name for name, each in self.needed.items() if name not in self.done and self.is_done(each)}
            self.done |= new
            self.spent += 0 if first else sum(self.seconds(self.needed[name]) or 0 for name in new)
            settled = self.grid.settle(self.store, self.done)
            for cell in self.grid.cells:
                if first or cell in settled:
                    write_recipe(cell)
                if first or cell in settled or any(stage.name in new for stage in cell.known.values()):
                    write_view(cell, self.store)
            first = False
            if not settled:
                break
        for name, each in self.needed.items():
            if name in self.done:
                self.failed.pop(name, None)  # somebody tried again
            elif name not in self.failed and self.store.has_failed(each.stage):
                self.failed[name] = f"{each}: failed elsewhere; see {self.log(each)}"
        whole = [cell for cell in self.grid.cells if self.is_whole(cell)]
        if len(whole) != self.whole:
            self.whole = len(whole)
            self.finished(whole)

    def is_done(self, needed: Needed) -> bool:
        """Whether a stage's result is there, and its process is none of this worker's any more."""
        return needed.stage.name not in self.running and self.store.is_done(needed.stage)

    def take(self) -> None:
        """Start what can be started, up to the number of jobs."""
        for name, each in self.needed.items():
            if len(self.running) == self.jobs:
                return
            taken = name in self.done or name in self.failed or name in self.running
            if not taken and all(source.name in self.done for source in each.stage.sources):
                self.start(each)

    def start(self, needed: Needed) -> None:
        """Start a stage unless somebody else works on it, or has worked on it since the last look."""
        stage, store = needed.stage, self.store
        lock = store.try_lock(stage)
        if lock is None:
            return
        if store.is_done(stage) or store.has_failed(stage):
            os.close(lock)
            self.looked = -LOOK_S
            return
        record, log, parent = store.record(stage), self.log(needed), os.getpid()
        record.started = record.started or time.time()
        try:
            record.begin(latest_step(store.folder(stage)), attended=True)
            command = self.command(store.write_job(stage), lock)
        except UserError as error:
            self.fail(needed, record, str(error))
            os.close(lock)
            self.view(needed)
            return
        store.save_record(stage, record)
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends them in order
                preexec_fn=lambda: die_with_parent(parent),
            )
        self.running[stage.name] = Running(needed, process, lock, log, record, time.monotonic())
        self.say(f"{needed}: " + ("goes on" if record.attempts > 1 else "started"))
        self.view(needed)

    def reap(self) -> None:
        """Note the stages of this worker that have ended."""
        for name, running in list(self.running.items()):
            status = running.process.poll()
            if status is None:
                continue
            del self.running[name]
            needed, record = running.needed, running.record
            if status == DONE and self.store.is_done(needed.stage):
                record = self.store.record(needed.stage)
                record.finished = time.time()
                self.store.save_record(needed.stage, record)
                self.looked = -LOOK_S
                self.look()
                self.say(f"{needed}: done in {ago(time.monotonic() - running.began)}", self.time_left())
                self.looked = -LOOK_S
                os.close(running.lock)
                continue
            if stopping.requested() or status in (STOPPED, *(-signum for signum in stopping.REQUESTS)):
                record.status = "pending"
                self.store.save_record(needed.stage, record)
            else:
                reason = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
                self.fail(needed, record, reason if status else "exit status 0, but no result.json")
            os.close(running.lock)
            self.view(needed)

    def fail(self, needed: Needed, record: StageRecord, reason: str) -> None:
        """Give a stage up, and with it all that needs it. Its lock must be held."""
        record.status, record.finished = "failed", time.time()
        self.store.save_record(needed.stage, record)
        self.failed[needed.stage.name] = f"{needed}: {reason}; see {self.log(needed)}"
        print(f"nemo-rmt: {self.failed[needed.stage.name]}", file=sys.stderr, flush=True)
        self.looked = -LOOK_S

    def left(self) -> list[Needed]:
        """The stages still to be done by somebody; those that need a failed one are not."""
        dead = set(self.failed)
        for name, each in self.needed.items():  # each after its inputs
            if any(source.name in dead for source in each.stage.sources):
                dead.add(name)
        return [each for name, each in self.needed.items() if name not in dead and name not in self.done]

    def stop(self) -> int:
        """Leave as asked, once the stages have saved what they did."""
        print("nemo-rmt: stopping; start it again to continue", file=sys.stderr, flush=True)
        for running in self.running.values():
            running.process.send_signal(signal.SIGUSR1)
        while self.running:
            time.sleep(TICK_S)
            self.reap()
        return STOPPED

    def interrupt(self) -> None:
        """End what still runs."""
        for running in self.running.values():
            running.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + LEAVE_S
        for running in self.running.values():
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()  # its ranks end with it
                running.process.wait()
            running.record.status = "pending"
            self.store.save_record(running.needed.stage, running.record)
            os.close(running.lock)
            self.view(running.needed)
        self.running.clear()

    def end(self) -> int:
        """Say what is not done, and why."""
        for reason in self.failed.values():
            print(f"nemo-rmt: failed: {reason}", file=sys.stderr)
        if not self.failed:
            return DONE
        given_up = [f"{cell.arm} with seed {cell.seed}" for cell in self.grid.cells if not self.is_whole(cell)]
        print(f"nemo-rmt: not done: {', '.join(given_up)}; start it again to try again", file=sys.stderr)
        return FAILED

    def is_whole(self, cell: Cell) -> bool:
        """Whether all stages of an arm with a seed are done."""
        return cell.matches is None and self.done.issuperset(stage.name for stage in cell.chain.values())

    def view(self, needed: Needed) -> None:
        """Write the run folders that have this stage."""
        for cell in {id(cell): cell for cell, _ in needed.users}.values():
            write_view(cell, self.store)

    def log(self, needed: Needed) -> Path:
        """What the processes of a stage print."""
        return self.store.folder(needed.stage) / "log" / "output.log"

    def say(self, what: str, more: str = "") -> None:
        """A line of progress."""
        total = len(self.needed) + len(self.grid.open())
        print(f"{what}; {len(self.done)} of {total} stages{more}", flush=True)

    def seconds(self, needed: Needed) -> float | None:
        """How long a finished stage took, from its first start to its end."""
        record = self.store.record(needed.stage)
        return None if record.started is None or record.finished is None else record.finished - record.started

    def time_left(self) -> str:
        """An estimate from the stages that are done, by their kind, and from how fast all workers together are."""
        taken: dict[str, list[float]] = {}
        for name in self.done & self.needed.keys():
            each = self.needed[name]
            if (seconds := self.seconds(each)) is not None:
                taken.setdefault(each.stage.stage, []).append(seconds)
        if not taken:
            return ""
        usual = {stage: statistics.median(seconds) for stage, seconds in taken.items()}
        kinds = [each.stage.stage for each in self.left()] + [ref.stage for _, ref in self.grid.open()]
        other = statistics.fmean(usual.values())
        at_once = max(1.0, self.spent / (time.monotonic() - self.began))
        left = sum(usual.get(kind, other) for kind in kinds) / at_once
        return f", about {ago(left)} left" if kinds else ""
