"""What takes its own time: the limits of jobs and of hangs. ``test_chaos.py`` has the other disturbances too."""

from __future__ import annotations

import time
from collections.abc import Callable

import disturbances as disturb
import pytest
from disturbances import START_S, WORDS, Training, assert_undisturbed
from slurm_runs import SCRIPTS

from nemo_rmt.manifest import latest_step

HANG_S = 45.0
"""More than a rank takes to start, in which it does nothing that counts as progress."""
MARGIN_S = 10.0
"""How much later than that a hang may be over."""
TIME_LIMIT = ("--time=1", "--signal=B:USR1@60")
"""The shortest that Slurm has: its signal comes within 30 seconds, which is when it looks at time limits."""


@pytest.fixture
def begin(cluster, local_run, tmp_path) -> Callable[..., Training]:
    """``begin(stage, *flags, hang_s)`` submits the job that trains a stage again, in a copy of the local run."""

    def begin(stage: str, *flags: str, hang_s: float = 1200) -> Training:
        run = local_run.copy_before(tmp_path / "run", 0, stage)
        variables = run.environment(*WORDS, f"cluster.hang_timeout_s={hang_s}")

        def submit() -> int:
            return cluster.submit(SCRIPTS / f"{stage}_14b.sh", flags=(run.log_flag, *flags), env=variables)

        training = Training(cluster, run, stage, submit, tmp_path, hang_s)
        training.start()
        return training

    return begin


@pytest.fixture
def finish(local_run) -> Callable[[Training], None]:
    """Waits for the end of a job; then nothing may show what it went through."""

    def finish(training: Training) -> None:
        job = training.cluster.wait(training.job, "COMPLETED", timeout=START_S)
        assert training.cluster.log(job.id).rstrip().endswith("ended with exit code 0: done")
        assert_undisturbed(training.run, local_run, training.iteration, training.stage)

    return finish


def test_a_stage_goes_on_over_jobs_that_are_too_short(begin, finish):
    training = begin("pretrain", *TIME_LIMIT)
    training.freeze(2)  # the clock runs on
    with training.saying("iteration 0 pretrain stopped at a checkpoint; requeued, to go on from there"):
        disturb.wait_until_asked(training, timeout=60)
        training.thaw(0, 1)
    saved = latest_step(training.folder)
    assert 2 <= saved <= 3 and training.record.status == "pending"
    training.cluster.slurm("scontrol", "update", f"jobid={training.job}", "TimeLimit=10")
    training.wait_until_requeued()
    training.freeze(saved + 2)
    assert training.record.step == saved
    disturb.ask_to_stop(training)  # what Slurm sends, without the wait for it
    finish(training)
    # Two jobs that stopped and one that ended, and more where a machine is so busy that a job has no time to train.
    assert training.record.attempts == training.cluster.job(training.job).restarts + 1 >= 3


def test_a_rank_that_dies_or_hangs_is_named_and_the_stage_starts_again_in_its_job(begin, finish):
    training = begin("pretrain", hang_s=HANG_S)
    training.freeze(3)
    disturb.kill(training, rank=1)
    assert training.record.step in (2, 3)
    training.freeze(5)
    begun = time.monotonic()
    disturb.hang(training, rank=1)
    assert HANG_S / 2 < time.monotonic() - begun < HANG_S + MARGIN_S
    finish(training)
    assert training.record.attempts == 3 and training.cluster.job(training.job).restarts == 0
