"""``python -m nemo_rmt.stages`` as a process of its own: exit statuses, messages, logs, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from fake_checkpoint import write_checkpoint

from nemo_rmt import pulse
from nemo_rmt.config import Recipe
from nemo_rmt.data.tokenizer import Tokenizer
from nemo_rmt.launch.meeting import Meeting
from nemo_rmt.launch.placement import Placement
from nemo_rmt.launch.ranks import worker_command
from nemo_rmt.launch.stage import run_stage
from nemo_rmt.stages.job import StageJob

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
LIMIT_S = 120
pytestmark = pytest.mark.slow


def start(stage_yaml: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "nemo_rmt.stages", str(stage_yaml)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_job(folder: Path, recipe: Recipe, stage: str, **inputs: Path) -> Path:
    job = StageJob(stage=stage, iteration=0, inputs={role: str(path) for role, path in inputs.items()}, recipe=recipe)
    job.save(folder / "stage.yaml")
    return folder / "stage.yaml"


@pytest.fixture(scope="module")
def outcomes(recipe, data_folder, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """(exit status, stderr, log) of a stage with each thing wrong, two at a time."""
    run = tmp_path_factory.mktemp("wrong")
    tokenizer = Tokenizer.load(data_folder / "tokenizer")
    ours = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    model = recipe.model.model_dump()
    checkpoints = {
        "another architecture": write_checkpoint(run / "wide", {**model, "hidden_size": 128}, **ours),
        "another tokenizer": write_checkpoint(run / "foreign", model, **{**ours, "tokenizer": "e" * 64}),
        "truncated": write_checkpoint(run / "short", model, **ours),
        "crash": write_checkpoint(run / "rubbish", model, **ours),  # whole by its manifest, but no weights
        "no such checkpoint": run / "nowhere",
    }
    (checkpoints["truncated"] / "weights.distcp").write_bytes(b"w" * 999)
    stages = {name: run / "iteration_000" / str(number) for number, name in enumerate(checkpoints)}
    jobs = {n: write_job(stages[n], recipe, "sft", data=data_folder, checkpoint=c) for n, c in checkpoints.items()}
    stages["no input"] = run / "iteration_000" / "no_input"
    jobs["no input"] = write_job(stages["no input"], recipe, "sft", data=data_folder)
    stages["not yaml"] = run / "iteration_000" / "not_yaml"
    stages["not yaml"].mkdir()
    jobs["not yaml"] = stages["not yaml"] / "stage.yaml"
    jobs["not yaml"].write_text("stage: [sft")

    def finished(name: str) -> tuple[int, str, str]:
        process = start(jobs[name])
        _, errors = process.communicate(timeout=LIMIT_S)
        log = stages[name] / "log" / "rank_0.log"
        return process.returncode, errors, log.read_text() if log.exists() else ""

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(finished, jobs), strict=True))
    found["folders"] = stages
    return found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("another architecture", "model.hidden_size is 128 in the checkpoint, 64 in the recipe"),
        ("another tokenizer", "was trained with another tokenizer (fingerprint eeeeeeeeeeee"),
        ("truncated", "is truncated: weights.distcp has 999 bytes instead of 1000"),
        ("no such checkpoint", "nowhere does not exist"),
        ("no input", "inputs.checkpoint is missing: stage sft needs it"),
    ],
)
def test_wrong_input_is_refused_with_status_2_a_message_and_a_note_for_those_who_watch(outcomes, wrong, message):
    status, errors, log = outcomes[wrong]
    assert status == 2
    assert errors.startswith("error: ") and message in errors and "Traceback" not in errors
    assert message in log
    assert message in pulse.read(outcomes["folders"][wrong] / "log" / "beats", 1)[0].failure


def test_a_refusal_by_several_ranks_has_status_2_and_its_reason(recipe, data_folder, tmp_path):
    two = recipe.model_copy(deep=True)
    two.cluster.gpus_per_node, two.parallel.tensor = 2, 2
    job = write_job(tmp_path / "iteration_000" / "sft", two, "sft", data=data_folder)
    with (tmp_path / ".lock").open("w") as lock:
        outcome = run_stage(job, two, worker_command, Meeting(tmp_path, Placement()), lock.fileno())
    assert outcome.status == 2 and "inputs.checkpoint is missing" in outcome.reason


def test_a_stage_file_that_cannot_be_read_is_refused(outcomes):
    status, errors, _ = outcomes["not yaml"]
    assert status == 2 and "stage.yaml is not valid YAML" in errors and "Traceback" not in errors


def test_a_crash_has_status_1_and_its_traceback_in_the_log(outcomes):
    status, errors, log = outcomes["crash"]
    assert status == 1
    assert "Traceback" in errors and "Traceback" in log and "stage sft failed on rank 0" in log
    assert pulse.read(outcomes["folders"]["crash"] / "log" / "beats", 1)[0].failure


def test_usage_is_explained():
    command = [sys.executable, "-m", "nemo_rmt.stages"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 2 and "usage: python -m nemo_rmt.stages STAGE.yaml" in done.stderr


@pytest.fixture
def background(recipe, data_folder, tmp_path) -> Path:
    """A pretrain stage that saves every step in the background."""
    recipe = recipe.model_copy(deep=True)
    recipe.flywheel.async_save, recipe.pretrain.steps, recipe.pretrain.checkpoint_interval = True, 100_000, 1
    return write_job(tmp_path / "iteration_000" / "pretrain", recipe, "pretrain", data=data_folder)


def wait_until(condition, what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.05)


def complete(stage_yaml: Path) -> list[Path]:
    return [path for path in (stage_yaml.parent / "checkpoints").glob("step_*") if path.suffix != ".tmp"]


def test_processes_that_write_checkpoints_end_with_a_killed_worker(background):
    process = start(background)
    wait_until(lambda: complete(background) or process.poll() is not None, "a checkpoint")
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) >= 2  # the writer, and the one that hands back its results
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def test_a_signal_to_all_processes_of_a_stage_stops_it_at_a_checkpoint(background):
    process = start(background)
    wait_until(lambda: complete(background) or process.poll() is not None, "a checkpoint")
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.send_signal(signal.SIGUSR1)  # as Slurm does
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, errors
    assert not list(background.parent.glob("checkpoints/*.tmp"))


def test_a_stage_that_fails_while_saving_in_the_background_ends(background):
    text = background.read_text().replace("lr: 0.002", "lr: 1.0e+30").replace("max_skipped: 5", "max_skipped: 2")
    assert "1.0e+30" in text and "max_skipped: 2" in text
    background.write_text(text)
    process = start(background)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 65 and "Diverged" in errors
