"""A Slurm for the tests of this folder. It needs root, and Slurm's packages, which ``make test-slurm`` installs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, environment
from slurm_runs import TP2, Run, run_locally, write_recipe

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """A Slurm of two virtual nodes, one for all tests."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=environment()["PATH"]) is None]
    if missing or os.geteuid() != 0:
        pytest.fail(f"these tests need root and Slurm (missing: {', '.join(missing) or 'nothing'}): make test-slurm")
    with SlurmCluster(nodes=2) as started:
        yield started


@pytest.fixture(autouse=True)
def no_jobs_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test, also a failed one, the cluster is idle."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").cancel_all()


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A flywheel of two turns without Slurm, TP2: what runs on the cluster are compared with it, and start from it."""
    folder = tmp_path_factory.mktemp("local")
    run = Run(folder / "run", write_recipe(folder / "recipe.yaml"))
    run_locally(run, TP2, timeout=500)
    return run
