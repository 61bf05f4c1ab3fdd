"""The recipe that the jobs of these tests run, how they are started, and how what they leave is read and compared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import ROOT, environment
from small_recipe import small_recipe

from nemo_rmt import pulse
from nemo_rmt.recipe_io import resolved_yaml
from nemo_rmt.run_folder import RunFolder
from nemo_rmt.tracking import read_metrics

SCRIPTS = ROOT / "slurm"
TRAINING = ("pretrain", "anneal", "rmt", "sft", "rl")
TIMINGS = {
    "time",
    "wall_s",
    "train/tokens_per_s",
    "train/step_s",
    "train/model_tflops_per_s",
    "rollout/wait_s",
    "rollout/tokens_per_s",
}
"""What depends on the clock, not on the computation."""
TP2 = "parallel.tensor=2"
STEPS = 8


@dataclass(frozen=True)
class Run:
    """A run folder, and what jobs need to know to work in it."""

    path: Path
    recipe: Path
    """A recipe file for ``--yaml``."""

    def environment(self, *overrides: str, **variables: object) -> dict[str, str]:
        """Variables for the scripts: this run, one process a node; ``variables`` adds to them or replaces them."""
        words = {
            "RECIPE": "tiny",
            "OVERRIDES": " ".join(["--yaml", str(self.recipe), *overrides]),
            "RUN_DIR": str(self.path),
            "SBATCH_GPUS_PER_NODE": "1",
            "GPUS_PER_NODE": "1",
            "SBATCH_TIMELIMIT": "10",
        }
        return words | {name: str(value) for name, value in variables.items()}

    @property
    def log_flag(self) -> str:
        """For sbatch: where the job's log is to be."""
        return f"--output={self.path.parent}/%x-%j.log"

    def copy_before(self, target: Path, iteration: int, stage: str) -> Run:
        """A copy of this run in which a stage, and everything after it in the chain, has not run yet."""
        shutil.copytree(self.path, target)
        folder = RunFolder(target)
        state = folder.load_state()
        later = [(i, name) for i, stages in enumerate(state.iterations) for name in stages]
        for i, name in later[later.index((iteration, stage)) :]:
            folder.discard(i, name)
            del state.iterations[i][name]
        folder.save_state(state)
        return Run(target, self.recipe)

    def steps(self, iteration: int, stage: str) -> list[dict[str, float]]:
        """What a stage logged at each step, without timings."""
        metrics = read_metrics(RunFolder(self.path).stage_dir(iteration, stage) / "metrics.jsonl")
        return [{name: value for name, value in step.items() if name not in TIMINGS} for step in metrics]

    def report(self) -> dict[str, Any]:
        """Every value of the report's summary by its path, without timings."""
        return dict(_leaves(json.loads((self.path / "report" / "summary.json").read_text()), ""))

    def status(self, iteration: int, stage: str) -> str:
        """A stage's status in state.json."""
        state = RunFolder(self.path).load_state()
        known = state is not None and len(state.iterations) > iteration and stage in state.iterations[iteration]
        return state.iterations[iteration][stage].status if known else "pending"

    def rank_pids(self, iteration: int, stage: str, ranks: int = 2) -> dict[int, int]:
        """The process of each rank that has given a sign of life in the stage, on whatever node."""
        beats = pulse.read(RunFolder(self.path).stage_dir(iteration, stage) / "log" / "beats", ranks)
        return {rank: beat.pid for rank, beat in beats.items()}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            if name not in TIMINGS:
                yield from _leaves(each, f"{path}/{name}")
    else:
        yield path, value


def write_recipe(path: Path, *, steps: int = STEPS, **changes: dict) -> Path:
    """A recipe file: two turns of the smallest real flywheel. ``changes``: as small_recipe takes them."""
    sections = {
        "iterations": 2,
        "data": {"tasks": [{"name": "chains"}]},
        "rollout": {"max_new_tokens": 8},
        "evaluate": {"problems": 4, "samples": 1, "positions": 4, "max_tokens": 256},
        "tracking": {"samples": True},
    }
    recipe = small_recipe("unused", **{**sections, **changes})
    for name in TRAINING:
        stage = getattr(recipe, name)
        stage.steps = stage.checkpoint_interval = steps
    path.write_text(resolved_yaml(recipe, comments=False))
    return path


def run_locally(run: Run, *overrides: str, timeout: float) -> None:
    """The whole flywheel without Slurm, as two processes of this machine."""
    words = ["--yaml", run.recipe, f"run_dir={run.path}", "cluster.gpus_per_node=2", *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_rmt", "flywheel", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Fail unless both have the same names and values; numbers may differ by the tolerance (relative above 1)."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, int | float):
            assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        else:
            assert found[name] == value, name


def assert_same_steps(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    """Fail unless two runs of a stage logged the same at every step."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, tolerance)
