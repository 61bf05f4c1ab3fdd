"""The scripts of ``slurm/`` on two nodes: they train what a local run trains, chain, resume and refuse."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from slurm_cluster import Job, SlurmCluster
from slurm_runs import SCRIPTS, TP2, Run, assert_close, assert_same_steps

JOB_S = 120
"""Seconds after which a job of one stage is too late."""
pytestmark = pytest.mark.usefixtures("unseen")
CHAIN = ["pretrain", "anneal", "rmt", "posttrain", "evaluate"]


@pytest.fixture(scope="module")
def unseen(local_run) -> Iterator[tuple[SlurmCluster, int, Run]]:
    """A job whose run folder is another one on each node. The nodes look for each other for a minute, in which nothing
    is computed: it begins first, on a cluster of its own, and is asked about last."""
    with SlurmCluster() as cluster:
        run = Run(cluster.hidden / "run", local_run.recipe)
        flag = f"--output={cluster.folder}/%j.log"
        yield cluster, cluster.submit(SCRIPTS / "pretrain_14b.sh", flags=(flag,), env=run.environment()), run


@dataclass
class Flywheel:
    """What flywheel_14b.sh did."""

    run: Run
    first: dict[str, Job]
    """The jobs of the first submission by name, in which RMT of iteration 0 fails."""
    second: dict[str, Job]
    """Those of the second, which succeeds."""
    tables: list[str]
    """What each submission printed."""


def submit_flywheel(cluster: SlurmCluster, run: Run) -> tuple[str, list[int]]:
    """Run flywheel_14b.sh; returns what it printed, and the ids of the jobs it submitted."""
    known = {job.id for job in cluster.jobs()}
    done = cluster.run("bash", SCRIPTS / "flywheel_14b.sh", env=run.environment(TP2))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [job.id for job in cluster.jobs() if job.id not in known]


@pytest.fixture(scope="module")
def flywheel(cluster, local_run, tmp_path_factory) -> Flywheel:
    """A flywheel of two turns in which a stage fails once."""
    run = Run(tmp_path_factory.mktemp("flywheel") / "run", local_run.recipe)
    table, ids = submit_flywheel(cluster, run)
    rmt = ids[CHAIN.index("rmt")]
    cluster.wait_until(lambda: 1 in run.rank_pids(0, "rmt"), rmt, timeout=3 * JOB_S)
    os.kill(run.rank_pids(0, "rmt")[1], signal.SIGKILL)
    first = [cluster.wait(job, timeout=JOB_S) for job in ids]
    again, ids = submit_flywheel(cluster, run)
    second = [cluster.wait(job, timeout=2 * JOB_S) for job in ids]
    return Flywheel(run, {job.name: job for job in first}, {job.name: job for job in second}, [table, again])


@pytest.mark.timeout(900)
def test_a_failing_stage_cancels_every_later_job(flywheel):
    states = [job.state for job in flywheel.first.values()]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"] + ["CANCELLED"] * 6
    assert flywheel.first["rmt_0"].exit_code == 1


def test_the_table_shows_every_job(flywheel):
    for job in flywheel.first.values():
        assert str(job.id) in flywheel.tables[0]


def test_running_it_again_submits_only_what_is_missing(flywheel):
    assert list(flywheel.second) == ["rmt_0", "posttrain_0", "evaluate_0"] + [f"{name}_1" for name in CHAIN[1:]]
    assert {(job.state, job.exit_code) for job in flywheel.second.values()} == {("COMPLETED", 0)}


def test_a_flywheel_over_two_nodes_ends_in_the_report_of_a_local_run(flywheel, local_run):
    assert_close(flywheel.run.report(), local_run.report())


def test_rmt_trains_data_parallel_across_two_nodes_as_on_one(cluster, local_run, tmp_path):
    run = local_run.copy_before(tmp_path / "run", 0, "rmt")
    job = cluster.submit(SCRIPTS / "rmt_14b.sh", flags=(run.log_flag,), env=run.environment())
    assert cluster.wait(job, "COMPLETED", timeout=JOB_S).exit_code == 0
    assert run.status(0, "rmt") == "done"
    assert set(run.rank_pids(0, "rmt", ranks=9)) == {0, 1}
    assert_same_steps(run.steps(0, "rmt"), local_run.steps(0, "rmt"))


def test_a_stage_goes_on_with_other_nodes_and_tensor_parallelism(cluster, local_run, tmp_path):
    run = local_run.copy_before(tmp_path / "run", 0, "rmt")
    job = cluster.submit(SCRIPTS / "rmt_14b.sh", flags=(run.log_flag,), env=run.environment(TP2))
    cluster.wait_until(lambda: run.steps(0, "rmt"), job, timeout=JOB_S)
    cluster.slurm("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(job, "PENDING", timeout=JOB_S)
    cluster.slurm("scancel", job)
    done = len(run.steps(0, "rmt"))
    assert run.status(0, "rmt") == "pending" and done < len(local_run.steps(0, "rmt"))
    job = cluster.submit(SCRIPTS / "rmt_14b.sh", flags=(run.log_flag, "--nodes=1"), env=run.environment())
    cluster.wait(job, "COMPLETED", timeout=JOB_S)
    assert_same_steps(run.steps(0, "rmt"), local_run.steps(0, "rmt"))


@pytest.mark.parametrize(
    ("variables", "word", "complaint"),
    [
        ({"SBATCH_PARTITION": "nowhere"}, "", "Invalid partition name"),
        ({"SBATCH_GPUS_PER_NODE": 4}, "", "Requested node configuration is not available"),
        ({"NODES": 4}, "", "Slurm would not take"),
        ({"CONTAINER_IMAGE": "nemo.sqsh"}, "", "CONTAINER_IMAGE=nemo.sqsh needs the pyxis plugin"),
        ({}, "cluster.gpu_memory_gib=0.001", "more than a GPU has"),
        ({}, "anneal.optim.learning_rate=1", "unknown key 'anneal.optim.learning_rate'"),
    ],
    ids=["partition", "gpus", "nodes", "container", "memory", "key"],
)
def test_what_cannot_work_is_refused_before_anything_is_submitted(
    variables, word, complaint, cluster, local_run, tmp_path
):
    run, known = Run(tmp_path / "run", local_run.recipe), cluster.jobs()
    done = cluster.run("bash", SCRIPTS / "flywheel_14b.sh", env=run.environment(word, **variables))
    assert done.returncode == 2 and complaint in done.stdout + done.stderr, done
    assert cluster.jobs() == known and not run.path.exists()


@pytest.mark.parametrize(
    ("variables", "word", "complaint"),
    [
        ({"GPUS_PER_NODE": 3}, "", "GPUS_PER_NODE=3, but the job has"),
        ({"CONTAINER_IMAGE": "nemo.sqsh"}, "", "CONTAINER_IMAGE=nemo.sqsh needs the pyxis plugin"),
        ({}, "cluster.gpu_memory_gib=0.001", "nemo-rmt plan failed; nothing was started"),
    ],
    ids=["gpus", "container", "memory"],
)
def test_a_job_that_cannot_work_ends_before_it_trains(variables, word, complaint, cluster, local_run, tmp_path):
    run = Run(tmp_path / "run", local_run.recipe)
    environment = run.environment(word, **variables)
    job = cluster.submit(SCRIPTS / "pretrain_14b.sh", flags=(run.log_flag,), env=environment)
    assert cluster.wait(job, "FAILED", timeout=JOB_S).exit_code == 2
    assert complaint in cluster.log(job)
    assert not run.path.exists()


def test_a_run_folder_that_not_every_node_sees_is_refused(unseen):
    cluster, job, run = unseen
    assert cluster.wait(job, "FAILED", timeout=JOB_S).exit_code == 2
    last = cluster.log(job).splitlines()[-1]
    assert f"run_dir={run.path}" in last and "must be on a file system that all nodes share" in last
    assert not (run.path / "iteration_000").exists()
