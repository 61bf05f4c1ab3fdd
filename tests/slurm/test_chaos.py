"""One flywheel on two nodes, disturbed thirty times at random: it ends as if nothing had been."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import disturbances as disturb
import pytest
from disturbances import STOP_S, WORDS, Training, assert_undisturbed, result, small_disk
from slurm_cluster import SlurmCluster
from slurm_runs import SCRIPTS, STEPS, Run

SEED = 20261
KINDS = {"ask_to_stop": 5, "requeue": 3, "cancel": 3, "fill_disk": 2, "hang": 1, "kill": 8, "truncate": 4, "flip": 4}
"""How often each happens."""
IN_STEPS = ("fill_disk", "truncate", "flip")
"""The others may also strike a stage that only starts."""
OF_ONE_RANK = ("kill", "hang", "truncate", "flip")
STAGES = ("pretrain", "anneal", "rmt", "sft", "rl")
STRIKES_IN_STEPS = STEPS // 2 - 1
"""Of each stage. Such an event may take up two steps: the one it strikes in, and the first that the next start logs."""
SCRIPT_OF = {"sft": "posttrain", "rl": "posttrain"}
"""Where it does not have the stage's name."""
HANG_S = 45.0
"""More than a rank takes to start, in which it does nothing that counts as progress."""
FLYWHEEL_S = 120.0
"""Seconds that what is left of the flywheel after the last event may take."""


@dataclass(frozen=True)
class Event:
    """What is to happen."""

    kind: str
    step: int
    """After which; 0: while the stage starts."""
    rank: int
    delay_s: float
    """After that."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[Path]:
    """A small file system."""
    with small_disk(tmp_path_factory.mktemp("chaos") / "disk") as folder:
        yield folder


@pytest.fixture(scope="module")
def cluster(disk) -> Iterator[SlurmCluster]:
    """A Slurm of its own: the second node does not see what is mounted after its start."""
    with SlurmCluster() as started:
        yield started


class Flywheel:
    """The jobs of flywheel_14b.sh."""

    def __init__(self, cluster: SlurmCluster, run: Run):
        self.cluster, self.run = cluster, run

    def submit(self) -> None:
        """Submit what is missing, once Slurm has cancelled what waited for a job that failed."""
        deadline = time.monotonic() + STOP_S
        while queue := self.cluster.slurm("squeue", "--noheader"):
            assert time.monotonic() < deadline, queue
            time.sleep(0.1)
        words = [*WORDS, f"cluster.hang_timeout_s={HANG_S}"]
        done = self.cluster.run("bash", SCRIPTS / "flywheel_14b.sh", env=self.run.environment(*words, ITERATIONS=1))
        assert done.returncode == 0, done.stdout + done.stderr

    def job(self, stage: str) -> int:
        """The job that trains a stage."""
        lines = [line.split("\t") for line in (self.run.path / "slurm_jobs.tsv").read_text().splitlines()]
        return int([line[2] for line in lines if line[1] == SCRIPT_OF.get(stage, stage)][-1])

    def training(self, stage: str, disk: Path) -> Training:
        """A stage, as the disturbances take it."""

        def submit() -> int:
            self.submit()
            return self.job(stage)

        return Training(self.cluster, self.run, stage, submit, disk, HANG_S, job=self.job(stage))


def plan_events(rng: random.Random) -> dict[str, list[Event]]:
    """Each kind as often as it is to happen, as many for each stage, and of those as many between steps."""
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    while True:
        rng.shuffle(kinds)
        shares = {stage: kinds[number :: len(STAGES)] for number, stage in enumerate(STAGES)}
        if all(sum(kind in IN_STEPS for kind in share) <= STRIKES_IN_STEPS for share in shares.values()):
            return {stage: plan_stage(rng, share) for stage, share in shares.items()}


def plan_stage(rng: random.Random, kinds: list[str]) -> list[Event]:
    """The events of one stage. Each leaves steps for those still to come, and damage finds two checkpoints."""
    late = [place for place, kind in enumerate(kinds) if kind in IN_STEPS]
    others = [place for place in range(len(kinds)) if place not in late]
    late += rng.sample(others, STRIKES_IN_STEPS - len(late))
    steps = [rng.randint(max(2, last - 1), last) for last in range(2, STEPS - 1, 2)]
    return [
        Event(
            kind,
            step := steps.pop(0) if place in late else 0,
            rank=rng.randrange(2),
            delay_s=rng.uniform(0, 0.1 if step else 3),
        )
        for place, kind in enumerate(kinds)
    ]


def strike(training: Training, event: Event) -> None:
    """Let it happen, and all that follows until the stage starts again."""
    training.freeze(event.step, event.delay_s)
    rank = {"rank": event.rank} if event.kind in OF_ONE_RANK else {}
    getattr(disturb, event.kind)(training, **rank)


@pytest.mark.timeout(1200)
def test_thirty_random_disturbances_leave_no_trace_in_the_results(cluster, disk, local_run):
    print(f"seed {SEED}")
    plan, begun = plan_events(random.Random(SEED)), time.monotonic()
    assert sum(map(len, plan.values())) == 30
    flywheel = Flywheel(cluster, Run(disk / "run", local_run.recipe))
    flywheel.submit()
    for stage, events in plan.items():
        training = flywheel.training(stage, disk)
        for event in events:
            print(f"{time.monotonic() - begun:.0f} s, {stage}: {event}", flush=True)
            strike(training, event)
    last = cluster.wait(flywheel.job("evaluate"), "COMPLETED", timeout=FLYWHEEL_S)
    assert last.exit_code == 0 and not cluster.slurm("squeue", "--noheader")
    assert not processes_of(flywheel.run)
    for stage in STAGES:
        assert_undisturbed(flywheel.run, local_run, 0, stage)
    assert result(flywheel.run, 0, "evaluate") == pytest.approx(result(local_run, 0, "evaluate"), rel=1e-5, abs=1e-5)


def processes_of(run: Run) -> list[str]:
    """Command lines that name the run's folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode())
        except FileNotFoundError:
            continue  # it has ended since
    return [line for line in lines if str(run.path) in line]
