"""The real stages on one GPU: against the CPU in fp32, and in bf16 and FP8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_recipe import small_recipe

from nemo_rmt.config import FP8_CAPABILITY
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


NORMS = {
    "before": {},
    "after": {"norm_position": "after", "qk_norm_span": "all_heads", "qkv_bias": False, "rope_skip_interval": 2},
}
SIZES = {"hidden_size": 128, "ffn_hidden_size": 256}
"""Wide enough for products in blocks of 128."""
ROUNDED = {
    "local": {"layers": "local"},
    "transformer_engine": {"layers": "transformer_engine"},
    "tensorwise": {"layers": "transformer_engine", "fp8": "hybrid", "fp8_bf16_layers": (1, 1)},
    "delayed": {"layers": "transformer_engine", "fp8": "hybrid", "fp8_recipe": "delayed"},
    "blockwise": {"layers": "transformer_engine", "fp8": "e4m3", "fp8_recipe": "blockwise"},
}


@pytest.fixture(scope="module", params=NORMS)
def published(request, run) -> dict:
    """An architecture's model keys, and the name of its folder with a CPU-made checkpoint."""
    model = {**SIZES, **NORMS[request.param]}
    job = {"stage": "pretrain", "iteration": 0, "inputs": DATA, "recipe": small_recipe(str(run), model=model)}
    run_stage(run / request.param / "pretrain", "", **job)
    return {"folder": request.param, "model": model}


def annealed(run: Path, published: dict, name: str, model: dict) -> list[float]:
    """The losses of an anneal from that checkpoint with other model keys."""
    recipe = small_recipe(str(run), model={**published["model"], **model}, anneal={"objective": "uniform"})
    recipe.anneal.resume_optimizer = False
    inputs = {**DATA, "checkpoint": f"{published['folder']}/pretrain/checkpoints/step_00000005"}
    folder = run / published["folder"] / name
    return [s["train/loss"] for s in run_stage(folder, "0", stage="anneal", iteration=0, inputs=inputs, recipe=recipe)]


@pytest.mark.parametrize("kind", ROUNDED)
def test_bf16_and_fp8_train_like_fp32_and_sample(run, published, kind):
    keys = {"precision": "bf16", **ROUNDED[kind]}
    if keys["layers"] == "transformer_engine":
        pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    if "fp8" in keys:
        needed = FP8_CAPABILITY[keys.get("fp8_recipe", "tensorwise")]
        if torch.cuda.get_device_capability() < needed:
            pytest.skip(f"{kind} scaling needs compute capability {needed}")
        without = annealed(run, published, f"{kind}_bf16", {"precision": "bf16", "layers": "transformer_engine"})
    found, exact = annealed(run, published, kind, keys), annealed(run, published, f"{kind}_fp32", {})
    assert found == pytest.approx(exact, rel=0.05) and found != exact
    assert "fp8" not in keys or found != without  # nothing fell back to BF16
    recipe = small_recipe(str(run), model={**published["model"], **keys})
    folder = published["folder"]
    inputs = {**DATA, "checkpoint": f"{folder}/{kind}/checkpoints/step_00000005"}
    steps = run_stage(run / folder / f"{kind}_rl", "0", stage="rl", iteration=0, inputs=inputs, recipe=recipe)
    assert all(step["rl/response_length"] > 0 for step in steps)
