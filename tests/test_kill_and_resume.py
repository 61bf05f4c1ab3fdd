"""SIGKILL at random moments in every stage, then start again: the numbers of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_recipe import small_recipe

from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.run_folder import RunFolder
from nemo_rmt.tracking import read_metrics

STAGES = [(0, name) for name in ("data", "pretrain", "anneal", "rmt", "sft", "rl", "evaluate")]
STAGES += [(1, name) for name in ("anneal", "rmt", "sft", "rl", "evaluate")]
KILLS_PER_STAGE = 2
STEPS = 6
# What depends on the clock, not on the computation.
TIMINGS = {"time", "train/tokens_per_s", "train/step_s", "train/model_tflops_per_s"}
TIMINGS |= {"rollout/wait_s", "rollout/tokens_per_s"}
SEED = 20260
LIMIT_S = 120


def start(run: Path, log: Path) -> subprocess.Popen:
    """The flywheel's own process, as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "nemo_rmt", "flywheel", "--yaml", str(run.with_suffix(".yaml")), f"run_dir={run}"]
    with open(log, "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def status(run: Path, iteration: int, stage: str) -> str:
    """A stage's status in state.json."""
    state = RunFolder(run).load_state()
    return "pending" if state is None or len(state.iterations) <= iteration else state.record(iteration, stage).status


def wait_for(condition, process: subprocess.Popen, what: str) -> None:
    """Poll until the condition holds; fail when the process ends with an error, or after LIMIT_S."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() in (None, 0), f"the flywheel exited {process.returncode} while waiting for {what}"
        assert time.monotonic() < deadline, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.01)


def kill_within(run: Path, log: Path, iteration: int, stage: str, rng: random.Random) -> bool:
    """Start, wait for the stage, SIGKILL at a random moment of it. False when the stage was over before the signal."""
    process = start(run, log)
    folder = RunFolder(run).stage_dir(iteration, stage)
    wait_for(lambda: status(run, iteration, stage) in ("running", "done"), process, f"{iteration}/{stage} to start")
    if stage in ("data", "evaluate") or rng.random() < 0.3:
        time.sleep(rng.uniform(0, 4))
    else:
        step = rng.randint(1, STEPS - 1)
        wait_for(
            lambda: len(read_metrics(folder / "metrics.jsonl")) >= step or status(run, iteration, stage) == "done",
            process,
            stage,
        )
        time.sleep(rng.uniform(0, 0.2))
    struck = status(run, iteration, stage) == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return struck


def outcome(run: Path) -> dict[str, object]:
    """Every step's metrics and every stage's result, without timings."""
    found: dict[str, object] = {}
    for iteration, stage in STAGES:
        folder = RunFolder(run).stage_dir(iteration, stage)
        steps = [{k: v for k, v in step.items() if k not in TIMINGS} for step in read_metrics(folder / "metrics.jsonl")]
        assert len(steps) == (0 if stage in ("data", "evaluate") else STEPS)
        result = json.loads((folder / "result.json").read_text())
        metrics = {name: value for name, value in result["metrics"].items() if name not in TIMINGS}
        found[f"{iteration}/{stage}"] = {"steps": steps, "metrics": metrics, "tokens": result["tokens"]}
    return found


@pytest.mark.slow
def test_killed_at_random_moments_of_every_stage_the_run_ends_with_the_same_numbers(tmp_path):
    recipe = small_recipe("unused")
    for stage in (recipe.pretrain, recipe.anneal, recipe.rmt, recipe.sft, recipe.rl):
        stage.steps, stage.checkpoint_interval = STEPS, 2
    runs = {name: tmp_path / name for name in ("undisturbed", "killed")}
    for run in runs.values():
        run.with_suffix(".yaml").write_text(resolved_yaml(recipe, comments=False))
    log = tmp_path / "log.txt"
    assert start(runs["undisturbed"], log).wait(timeout=600) == 0, log.read_text()[-3000:]

    rng, kills = random.Random(SEED), []
    for iteration, stage in STAGES:
        while sum(kill == (iteration, stage) for kill in kills) < KILLS_PER_STAGE:
            if kill_within(runs["killed"], log, iteration, stage, rng):
                kills.append((iteration, stage))
            elif status(runs["killed"], iteration, stage) == "done":
                RunFolder(runs["killed"]).discard(iteration, stage)  # over too soon: do it again
    assert len(kills) >= 20
    assert start(runs["killed"], log).wait(timeout=600) == 0, log.read_text()[-3000:]

    state = RunFolder(runs["killed"]).load_state()
    assert all(record.attempts > 1 for iteration in state.iterations for record in iteration.values())
    expected, found = outcome(runs["undisturbed"]), outcome(runs["killed"])
    for name, value in expected.items():
        assert found[name] == value, name
