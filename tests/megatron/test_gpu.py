"""The real stages on one GPU: against the CPU in fp32, and in bf16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_recipe import small_recipe

from nemo_rmt.stages.job import StageJob
from nemo_rmt.tracking import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]
DATA = {"data": "iteration_000/data"}


def run_stage(folder: Path, devices: str, **job) -> list[dict]:
    """One stage in a process that sees these GPUs; its metrics by step."""
    StageJob(**job).save(folder / "stage.yaml")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-m", "nemo_rmt.stages", str(folder / "stage.yaml")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return read_metrics(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with data and a CPU-made checkpoint."""
    folder = tmp_path_factory.mktemp("gpu")
    recipe = small_recipe(str(folder))
    run_stage(folder / "iteration_000/data", "", stage="data", iteration=0, recipe=recipe)
    run_stage(folder / "iteration_000/pretrain", "", stage="pretrain", iteration=0, inputs=DATA, recipe=recipe)
    return folder


@pytest.mark.parametrize("stage", ["anneal", "rmt", "sft", "rl"])
def test_a_stage_on_the_gpu_follows_the_cpu(run, stage):
    recipe = small_recipe(str(run))
    checkpoint = "iteration_000/pretrain/checkpoints/step_00000005"
    inputs = {**DATA, "checkpoint": checkpoint} | ({"reference": checkpoint} if stage == "anneal" else {})
    job = {"stage": stage, "iteration": 0, "inputs": inputs, "recipe": recipe}
    cpu, gpu = (
        run_stage(run / f"{name}_{stage}/stage", devices, **job) for name, devices in (("cpu", ""), ("gpu", "0"))
    )
    for name in ("train/loss", "train/grad_norm"):
        assert [step[name] for step in gpu] == pytest.approx([step[name] for step in cpu], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("model", [{"precision": "bf16"}, {"precision": "bf16", "layers": "transformer_engine"}])
def test_bf16_trains_and_samples(run, model):
    if model.get("layers"):
        pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    recipe = small_recipe(str(run), model=model)
    name = "_".join(model.values())
    pretrain = {"stage": "pretrain", "iteration": 0, "inputs": DATA, "recipe": recipe}
    steps = run_stage(run / name / "pretrain", "0", **pretrain)
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    inputs = {**DATA, "checkpoint": f"{name}/pretrain/checkpoints/step_00000005"}
    steps = run_stage(run / name / "rl", "0", stage="rl", iteration=0, inputs=inputs, recipe=recipe)
    assert all(step["rl/response_length"] > 0 for step in steps)
