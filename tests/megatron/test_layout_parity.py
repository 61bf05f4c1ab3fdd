"""Every parallel layout trains and samples like one rank: real processes, the real stages, fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_recipe import small_recipe
from torchrun import run_ranks

from nemo_rmt.stages.job import StageJob
from nemo_rmt.tracking import read_metrics

WORKER = Path(__file__).with_name("stages_worker.py")
LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "dp2": (2, {"distributed_optimizer": True}),
}
ARMS = ("uniform", "remit", "grpo", "rmt")
TOLERANCE = 1e-5


def write_jobs(run: Path, name: str, processes: int, parallel: dict) -> list[Path]:
    """A stage.yaml for each arm and for evaluation, all from the same starting checkpoint."""
    recipe = small_recipe(
        str(run),
        parallel=parallel,
        cluster={"gpus_per_node": processes},
        flywheel={"keep_checkpoints": 2},
        rl={"grpo": {"samples_per_group": 4, "kl_coefficient": 0.1}},
        tracking={"samples": True},
    )
    recipe.anneal.checkpoint_interval = 3
    start = {"data": "iteration_000/data", "checkpoint": "start/pretrain/checkpoints/step_00000005"}
    reference = "start/sft/checkpoints/step_00000005"
    jobs = {
        "uniform": ("anneal", start),
        "remit": ("anneal", {**start, "reference": reference}),
        "evaluate": ("evaluate", {"data": start["data"], "sft": start["checkpoint"], "rl": reference}),
        "grpo": ("rl", start),
        "rmt": ("rmt", start),
    }
    for arm, (stage, inputs) in jobs.items():
        recipe.anneal.objective = "remit" if arm == "remit" else "uniform"
        StageJob(stage=stage, iteration=1, inputs=inputs, recipe=recipe).save(run / name / arm / "stage.yaml")
    return [run / name / arm / "stage.yaml" for arm in jobs]


def losses(stage: Path) -> dict[str, list[float]]:
    """What must agree between layouts, by step."""
    steps = read_metrics(stage.parent / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    names = ["train/loss", "train/grad_norm", "train/lr"] + [
        n
        for n in ("rl/reward_mean", "remit/weight_std", "rmt/reward_mean", "rmt/think_length", "ntp/loss")
        if n in steps[0]
    ]
    return {name: [step[name] for step in steps] for name in names}


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder with data, a starting checkpoint, another one as ReMiT's reference, and one rank's results."""
    folder = tmp_path_factory.mktemp("parity")
    recipe = small_recipe(str(folder))
    data = {"data": "iteration_000/data"}
    StageJob(stage="data", iteration=0, recipe=recipe).save(folder / "iteration_000/data/stage.yaml")
    StageJob(stage="pretrain", iteration=0, inputs=data, recipe=recipe).save(folder / "start/pretrain/stage.yaml")
    start = {**data, "checkpoint": "start/pretrain/checkpoints/step_00000005"}
    StageJob(stage="sft", iteration=0, inputs=start, recipe=recipe).save(folder / "start/sft/stage.yaml")
    stages = [folder / path / "stage.yaml" for path in ("iteration_000/data", "start/pretrain", "start/sft")]
    stages += write_jobs(folder, "one_rank", 1, {})
    run_ranks(WORKER, 1, str(folder / "one_rank.json"), *map(str, stages))
    return folder


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request, run) -> str:
    """One layout's results beside the one rank's."""
    processes, parallel = LAYOUTS[request.param]
    jobs = write_jobs(run, request.param, processes, parallel)
    run_ranks(WORKER, processes, str(run / f"{request.param}.json"), *map(str, jobs))
    return request.param


@pytest.mark.parametrize("arm", ARMS)
def test_losses_and_gradient_norms_equal_one_rank(run, layout, arm):
    expected, found = (losses(run / name / arm / "stage.yaml") for name in ("one_rank", layout))
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=1e-7), name


@pytest.mark.parametrize("arm", ARMS)
def test_the_samples_of_every_step_equal_one_ranks(run, layout, arm):
    expected, found = ((run / name / arm / "samples.jsonl").read_text() for name in ("one_rank", layout))
    assert found == expected
    assert [len(json.loads(line)["samples"]) > 0 for line in found.splitlines()] == [True] * 5


def test_evaluation_equals_one_rank(run, layout):
    expected, found = (
        json.loads((run / name / "evaluate" / "result.json").read_text()) for name in ("one_rank", layout)
    )
    assert found["tokens"] == expected["tokens"]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=TOLERANCE, abs=1e-7)


def test_objectives_differ_so_that_parity_means_something(run):
    uniform, remit, grpo, rmt = (losses(run / "one_rank" / arm / "stage.yaml") for arm in ARMS)
    assert uniform["train/loss"][1:] != pytest.approx(remit["train/loss"][1:], rel=TOLERANCE)
    assert min(remit["remit/weight_std"]) > 1e-3
    assert max(abs(loss) for loss in grpo["train/loss"]) > 1e-3 and min(grpo["train/grad_norm"]) > 1e-3
    assert len(set(rmt["rmt/reward_mean"])) > 1 and min(rmt["train/grad_norm"]) > 1e-3 and min(rmt["ntp/loss"]) > 1


def test_sampling_is_token_identical(run, layout):
    expected, found = (json.loads((run / f"{name}.json").read_text()) for name in ("one_rank", layout))
    assert [row[0] for row in found] == [row[0] for row in expected]
    for (_, logprobs, finished), (_, expected_logprobs, expected_finished) in zip(found, expected, strict=True):
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4) and finished == expected_finished


@pytest.mark.parametrize(("saved", "resumed"), [("tp2_pp2", "one_rank"), ("one_rank", "tp2_pp2"), ("dp2", "one_rank")])
def test_a_checkpoint_resumes_at_another_layout(run, saved, resumed):
    for name in {saved, resumed} - {"one_rank"}:
        if not (run / f"{name}.json").exists():
            run_ranks(
                WORKER, LAYOUTS[name][0], str(run / f"{name}.json"), *map(str, write_jobs(run, name, *LAYOUTS[name]))
            )
    processes, parallel = LAYOUTS.get(resumed, (1, {}))
    stage = write_jobs(run, f"{saved}_to_{resumed}", processes, parallel)[1]
    for part in ("metrics.jsonl", "checkpoints/step_00000003"):
        source, target = run / saved / "remit" / part, stage.parent / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    run_ranks(WORKER, processes, str(run / "resumed.json"), str(stage))
    expected, found = losses(run / "one_rank" / "remit" / "stage.yaml"), losses(stage)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE, abs=1e-7), name
