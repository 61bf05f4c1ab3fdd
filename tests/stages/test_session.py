"""The training loop around a stage's steps: it goes on where it stopped, with the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages import pretrain
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.session import Session, Training
from nemo_rmt.tracking import read_metrics

TIMINGS = {"time", "train/tokens_per_s", "train/step_s"}


@pytest.fixture(scope="module")
def layout(recipe):
    with distributed(recipe.parallel, recipe.seed) as layout:
        yield layout


def session(recipe, data_folder, folder: Path, layout, **changes: int) -> Session:
    recipe = recipe.model_copy(deep=True)
    recipe.pretrain.micro_batch_size, recipe.pretrain.checkpoint_interval, recipe.flywheel.keep_checkpoints = 8, 2, 9
    for name, value in changes.items():
        setattr(recipe.pretrain, name, value)
    folder.mkdir(parents=True, exist_ok=True)
    job = StageJob(stage="pretrain", iteration=0, inputs={"data": str(data_folder)}, recipe=recipe)
    return Session(job, folder, layout)


def outcome(folder: Path) -> tuple[list[dict], dict]:
    """Steps and result without what depends on the clock."""
    steps = [{k: v for k, v in step.items() if k not in TIMINGS} for step in read_metrics(folder / "metrics.jsonl")]
    result = json.loads((folder / "result.json").read_text())
    metrics = {name: value for name, value in result["metrics"].items() if name not in TIMINGS}
    return steps, {**result, "metrics": metrics, "wall_s": None}


@pytest.fixture(scope="module")
def uninterrupted(recipe, data_folder, layout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "iteration_000" / "pretrain"
    pretrain.run(session(recipe, data_folder, folder, layout))
    return folder


def test_a_stage_leaves_its_steps_result_and_checkpoints(uninterrupted):
    steps, result = outcome(uninterrupted)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert result["tokens"] == steps[-1]["train/tokens"] == 5 * 8 * 64
    assert result["checkpoint"] == "iteration_000/pretrain/checkpoints/step_00000005"
    assert result["metrics"]["train/loss"] == steps[-1]["train/loss"]
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000005"]


@pytest.mark.parametrize("lost", [["4", "5"], ["5"], []], ids=["after_step_2", "after_step_4", "before_the_result"])
def test_an_interrupted_stage_ends_with_the_same_numbers(recipe, data_folder, layout, uninterrupted, tmp_path, lost):
    folder = tmp_path / "iteration_000" / "pretrain"
    shutil.copytree(uninterrupted, folder)
    (folder / "result.json").unlink()
    for step in lost:
        shutil.rmtree(folder / "checkpoints" / f"step_0000000{step}")
    pretrain.run(session(recipe, data_folder, folder, layout))
    assert outcome(folder) == outcome(uninterrupted)


def test_a_step_that_is_not_recorded_is_an_error(recipe, data_folder, layout, tmp_path):
    training = Training(session(recipe, data_folder, tmp_path / "iteration_000" / "pretrain", layout), start=None)
    with pytest.raises(RuntimeError, match="step 0 ended without a record"):
        for _ in training.steps():
            pass
