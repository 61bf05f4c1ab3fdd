"""The training loop around a stage's steps: it goes on where it stopped, with the same numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import tensor_parallel

from nemo_rmt import profiling, stopping
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.errors import Diverged, UserError
from nemo_rmt.megatron import guard
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.stages import pretrain
from nemo_rmt.stages.job import StageJob
from nemo_rmt.stages.pretrain import CorpusBatches, next_token
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training
from nemo_rmt.tracking import read_metrics

TIMINGS = {"time", "train/tokens_per_s", "train/step_s", "train/model_tflops_per_s", "rollout/wait_s"}


@pytest.fixture(scope="module")
def layout(recipe):
    with distributed(recipe.parallel, recipe.seed) as layout:
        yield layout


def session(recipe, data_folder, folder: Path, layout, *, samples: bool = False, **changes) -> Session:
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed)  # the same initial weights for every stage in here
    torch.manual_seed(recipe.seed)
    recipe = recipe.model_copy(deep=True)
    recipe.pretrain.micro_batch_size, recipe.pretrain.checkpoint_interval, recipe.flywheel.keep_checkpoints = 8, 2, 9
    recipe.tracking.samples = samples
    recipe.flywheel.async_save = changes.pop("async_save", False)
    recipe.pretrain.optim = recipe.pretrain.optim.model_copy(update=changes.pop("optim", {}))
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


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def lose(folder: Path, *steps: int) -> None:
    """Leave the folder as a kill before these checkpoints were complete would, but for what was logged."""
    (folder / "result.json").unlink(missing_ok=True)
    for step in steps:
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")


@pytest.fixture(scope="module")
def uninterrupted(recipe, data_folder, layout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "iteration_000" / "pretrain"
    pretrain.run(session(recipe, data_folder, folder, layout))
    return folder


def test_a_stage_leaves_its_steps_result_and_checkpoints(uninterrupted):
    steps, result = outcome(uninterrupted)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert {step["train/skipped_steps"] for step in steps} == {0}
    assert result["tokens"] == steps[-1]["train/tokens"] == 5 * 8 * 64
    assert result["checkpoint"] == "iteration_000/pretrain/checkpoints/step_00000005"
    assert result["metrics"]["train/loss"] == steps[-1]["train/loss"]
    assert checkpoints(uninterrupted) == ["step_00000002", "step_00000004", "step_00000005"]
    assert not (uninterrupted / "skipped.jsonl").exists() and not (uninterrupted / "samples.jsonl").exists()


@pytest.mark.parametrize("lost", [[4, 5], [5], []], ids=["after_step_2", "after_step_4", "before_the_result"])
def test_an_interrupted_stage_ends_with_the_same_numbers(recipe, data_folder, layout, uninterrupted, tmp_path, lost):
    folder = tmp_path / "iteration_000" / "pretrain"
    shutil.copytree(uninterrupted, folder)
    lose(folder, *lost)
    pretrain.run(session(recipe, data_folder, folder, layout))
    assert outcome(folder) == outcome(uninterrupted)


def test_every_step_says_its_model_flops_and_on_a_cpu_no_utilisation(recipe, data_folder, uninterrupted):
    model, vocabulary = recipe.model, Tokenizer.load(data_folder / "tokenizer").vocab_size
    widths = (4 + 2 + 2 + 4) * 16 + 3 * model.ffn_hidden_size  # of all products of a layer with the hidden size
    weights = model.num_layers * model.hidden_size * widths + vocabulary * model.hidden_size
    flops = 6 * weights + 12 * model.num_layers * model.hidden_size * recipe.pretrain.sequence_length
    for step in read_metrics(uninterrupted / "metrics.jsonl"):
        expected = step["train/tokens_per_s"] * flops / 1e12
        assert step["train/model_tflops_per_s"] == pytest.approx(expected)
        assert "train/mfu" not in step


def test_utilisation_is_the_share_of_the_recipes_peak_of_each_gpu(recipe, data_folder, layout, tmp_path):
    training = Training(session(recipe, data_folder, tmp_path / "iteration_000" / "pretrain", layout), start=None)
    alone = training._utilisation(1e6)["train/model_tflops_per_s"]
    training.session.layout = replace(layout, world_size=4, device=torch.device("cuda"))
    training.session.recipe.cluster.gpu_tflops = 200.0
    assert training._utilisation(1e6) == {
        "train/model_tflops_per_s": pytest.approx(alone / 4),
        "train/mfu": pytest.approx(alone / 4 / 200),
    }


def test_a_profiled_stage_leaves_its_parts(recipe, data_folder, layout, tmp_path):
    folder = tmp_path / "iteration_000" / "pretrain"
    with profiling.stage(folder, "0/pretrain", enabled=True):
        pretrain.run(session(recipe, data_folder, folder, layout))
    found = json.loads((folder / profiling.PARTS).read_text())
    assert {"start", "data", "forward_backward", "optimizer", "checkpoint", "logging"} <= found["seconds"].keys()
    assert found["steps"] + len(found["traced_steps"]) == 5 and (folder / profiling.TRACE).is_file()


def test_a_step_that_is_not_recorded_is_an_error(recipe, data_folder, layout, tmp_path):
    training = Training(session(recipe, data_folder, tmp_path / "iteration_000" / "pretrain", layout), start=None)
    with pytest.raises(RuntimeError, match="step 0 ended without a record"):
        for _ in training.steps():
            pass


@pytest.fixture
def factors(monkeypatch) -> dict[int, float]:
    """By what the loss of a step (1-based) is multiplied; to be filled in. The window is full enough at 3 steps."""
    factors, current = {}, {}
    batch_of = CorpusBatches.batch
    monkeypatch.setattr(guard, "FULL_ENOUGH", 3)
    monkeypatch.setattr(guard, "WINDOW", 6)

    def batch(self, step):
        current["step"] = step + 1
        return batch_of(self, step)

    def objective(scores, batch):
        output, factor = next_token(scores, batch), factors.get(current["step"], 1.0)
        total, count = output.metrics["loss"]
        metrics = {**output.metrics, "loss": (total * factor, count)}
        return replace(output, loss_sum=output.loss_sum * factor, metrics=metrics)

    monkeypatch.setattr(CorpusBatches, "batch", batch)
    monkeypatch.setattr(pretrain, "next_token", objective)
    return factors


def test_spikes_are_skipped_with_their_samples_and_a_resumed_run_skips_the_same(
    recipe, data_folder, layout, tmp_path, factors, capsys
):
    factors |= {5: 50.0, 8: 50.0, 10: math.nan}
    options = {"steps": 11, "samples": True, "optim": {"skip_spikes": 6.0, "schedule": "linear"}}
    folder = tmp_path / "iteration_000" / "pretrain"
    pretrain.run(session(recipe, data_folder, folder, layout, **options))
    steps, result = outcome(folder)
    assert [step["train/skipped_steps"] for step in steps] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    rates = [step["train/lr"] for step in steps[1:]]
    assert rates == sorted(set(rates), reverse=True) and len(rates) == 10  # the schedule goes on
    assert steps[9]["train/loss"] is None and result["status"] == "done"
    samples, skipped = lines(folder / "samples.jsonl"), lines(folder / "skipped.jsonl")
    assert [line["step"] for line in samples] == list(range(1, 12))
    assert [line["step"] for line in skipped] == [5, 8, 10]
    assert list(skipped[0]) == ["step", "reason", "loss", "grad_norm", "samples"]
    assert "deviations" in skipped[0]["reason"] and skipped[2]["reason"] == "the loss is not finite"
    assert skipped[0]["loss"] == pytest.approx(steps[4]["train/loss"]) and skipped[2]["loss"] is None
    assert [line["samples"] for line in skipped] == [samples[index]["samples"] for index in (4, 7, 9)]
    assert "[0/pretrain] step 5 skipped: the loss" in capsys.readouterr().out

    again = tmp_path / "again" / "iteration_000" / "pretrain"
    shutil.copytree(folder, again)
    lose(again, 8, 10, 11)
    pretrain.run(session(recipe, data_folder, again, layout, **options))
    assert outcome(again) == outcome(folder)
    for name in ("samples.jsonl", "skipped.jsonl"):
        assert (again / name).read_text() == (folder / name).read_text()


def test_too_many_skipped_steps_in_a_row_stop_the_stage_also_when_it_is_started_again(
    recipe, data_folder, layout, tmp_path, factors
):
    factors |= dict.fromkeys(range(3, 10), math.nan)
    folder = tmp_path / "iteration_000" / "pretrain"
    expected = (
        r"3 optimizer steps in a row were skipped, the last at step 5 of 9 \(loss nan, gradient norm nan, lr 0.002\): "
        r".* in .*/pretrain/skipped.jsonl; last checkpoint: .*/step_00000004"
    )
    for _ in range(2):  # the second one begins at step 4, after two of them
        with pytest.raises(Diverged, match=expected):
            pretrain.run(session(recipe, data_folder, folder, layout, steps=9, optim={"max_skipped": 3}))
        assert [line["step"] for line in lines(folder / "skipped.jsonl")] == [3, 4, 5]
        assert checkpoints(folder) == ["step_00000002", "step_00000004"] and not (folder / "result.json").exists()


def test_a_result_after_a_skipped_last_step_has_what_is_finite(recipe, data_folder, layout, tmp_path, factors):
    factors[5] = math.nan
    folder = tmp_path / "iteration_000" / "pretrain"
    pretrain.run(session(recipe, data_folder, folder, layout))
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert "train/loss" not in metrics and metrics["train/skipped_steps"] == 1


@pytest.fixture
def asked_at(monkeypatch) -> dict[str, int]:
    """The step (1-based) in which this process is asked to stop, under "step"; to be filled in."""
    asked = {}
    batch_of = CorpusBatches.batch

    def batch(self, step):
        if step + 1 == asked.get("step"):
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch_of(self, step)

    monkeypatch.setattr(stopping, "_requested", False)
    monkeypatch.setattr(CorpusBatches, "batch", batch)
    with stopping.catching():
        yield asked


@pytest.mark.parametrize("async_save", [False, True])
def test_a_stage_that_is_asked_to_stop_saves_its_step_and_ends_later_with_the_same_numbers(
    recipe, data_folder, layout, uninterrupted, tmp_path, asked_at, async_save
):
    folder = tmp_path / "iteration_000" / "pretrain"
    asked_at["step"] = 3
    with pytest.raises(stopping.Stopped, match="after step 3 of 5"):
        pretrain.run(session(recipe, data_folder, folder, layout, async_save=async_save))
    assert checkpoints(folder) == ["step_00000002", "step_00000003"] and not (folder / "result.json").exists()
    with stopping.catching():
        pretrain.run(session(recipe, data_folder, folder, layout, async_save=async_save))
    assert outcome(folder) == outcome(uninterrupted)


def test_a_request_in_the_last_step_lets_the_stage_finish(
    recipe, data_folder, layout, uninterrupted, tmp_path, asked_at
):
    folder = tmp_path / "iteration_000" / "pretrain"
    asked_at["step"] = 5
    pretrain.run(session(recipe, data_folder, folder, layout))
    assert outcome(folder) == outcome(uninterrupted)


def test_a_request_before_the_first_step_leaves_without_saving(recipe, data_folder, layout, tmp_path, asked_at):
    folder = tmp_path / "iteration_000" / "pretrain"
    with stopping.waiting():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(stopping.Stopped, match="after step 0 of 5"):
            pretrain.run(session(recipe, data_folder, folder, layout))
    assert checkpoints(folder) == []


def test_a_damaged_checkpoint_is_not_trained_from_and_a_whole_one_is_read_once(
    recipe, data_folder, layout, uninterrupted, tmp_path, monkeypatch
):
    copy = shutil.copytree(uninterrupted / "checkpoints" / "step_00000005", tmp_path / "step_00000005")
    shard = next(path for path in sorted(copy.iterdir()) if path.suffix == ".distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    stage = session(recipe, data_folder, tmp_path / "iteration_000" / "pretrain", layout)
    for load in (stage.frozen_model, lambda start: Training(stage, start, with_optimizer=True)):
        with pytest.raises(UserError, match="step_00000005"):
            load(copy)
    read = []
    monkeypatch.setattr("nemo_rmt.stages.session.require_sound", read.append)
    whole = uninterrupted / "checkpoints" / "step_00000005"
    for load in (stage.frozen_model, stage.frozen_model, lambda start: Training(stage, start)):
        load(whole)
    assert read == [whole]
