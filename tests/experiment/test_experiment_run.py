"""The experiment smoke, on the real stages, against a plain flywheel of one of its arms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rmt.experiment.config import arm_recipe, load_experiment
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.run_folder import RunFolder

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def nemo_rmt(*words: str) -> str:
    command = [sys.executable, "-m", "nemo_rmt", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(run: Path, stage: str) -> dict[str, float]:
    metrics = RunFolder(run).result(0, stage)["metrics"]
    return {name: value for name, value in metrics.items() if not name.endswith(("_s", "tokens_per_s"))}


@pytest.mark.slow
def test_an_arms_figures_are_those_of_a_plain_flywheel_with_its_recipe(tmp_path):
    out = tmp_path / "out"
    printed = nemo_rmt("experiment", "smoke", "--jobs", "2", "--out", str(out))
    assert "6 of 6 stages" in printed and "Results:" in printed
    _, smoke = load_experiment("smoke")
    (tmp_path / "hot.yaml").write_text(resolved_yaml(arm_recipe(smoke, "hot", 1, [], tmp_path / "run"), comments=False))
    nemo_rmt("flywheel", "--yaml", str(tmp_path / "hot.yaml"), "cluster.threads=1")
    arm = out / "smoke" / "hot" / "seed_1"
    for stage in ("data", "pretrain", "anneal", "evaluate"):
        assert figures(arm, stage) == figures(tmp_path / "run", stage), stage
    assert figures(arm, "evaluate") != figures(out / "smoke" / "short" / "seed_1", "evaluate")
    assert (arm / "iteration_000" / "pretrain").resolve() == (
        out / "smoke" / "short" / "seed_1" / "iteration_000" / "pretrain"
    ).resolve()
    nemo_rmt("status", str(arm))
    results = json.loads((out / "smoke" / "results.json").read_text())
    assert results
